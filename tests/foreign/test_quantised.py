"""EoRA over checkpoints of compressed-tensors and GPTQ: repacked exactly, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.errors import InputError
from lrcompress.foreign.gptq import unpack_words
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.checkpoint.test_loading import IDS, load, logits
from tests.conftest import compress_tiny

BITS = [2, 3, 4, 8]


def linears(tensors):
    return [name.removesuffix(".weight") for name in tensors if "_proj." in name]


def write(folder, dense, tensors, settings):
    """A checkpoint of `tensors` whose config has the settings as quantization_config."""
    folder.mkdir()
    for path in dense.iterdir():
        if path.suffix == ".json" or path.suffix == ".jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def grids(weight, bits, group, symmetric, dtype):
    """Scale and signed zero (out, groups) of min-max grids."""
    parts = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    if symmetric:
        scale = parts.abs().amax(-1) / (half - 0.5)
        return scale.to(dtype), torch.zeros_like(scale, dtype=torch.int8)
    low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
    scale = ((high - low) / (2 * half - 1)).to(dtype)
    return scale, ((-low / scale.float()).round().clamp(0, 2 * half - 1) - half).to(torch.int8)


def correct(dense, folder, output, **changes):
    changes = {"rank": 2, "ratio": None, "dtype": "float32", **changes}
    return compress_tiny(dense, output, method="eora", base=str(folder), **changes).folder


def refuse(message, dense, folder, tmp_path, **changes):
    with pytest.raises(InputError, match=message):
        correct(dense, folder, tmp_path / "refused", **changes)
    assert not (tmp_path / "refused").exists()


def check_bases(folder, expected):
    """The loaded model's bases multiply by the `expected` weights (out, in), exactly, and it runs."""
    model, stored = load(folder), load_file(folder / "model.safetensors")
    layers = stored_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert layer.spec.parameters["base"]["format"] == "quantized"
        torch.testing.assert_close(layer.base.dense(), expected[name], rtol=0, atol=0)
        correction = stored[f"{name}.B.weight"] @ stored[f"{name}.A.weight"]
        torch.testing.assert_close(dense_parts(layer)[0], expected[name] + correction, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(logits(model, IDS)).all()


class TestCompressedTensors:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("compressed_tensors")

    def make(self, dense, folder, layout="pack-quantized", dtype=torch.float32, settings=None, **arguments):
        """A checkpoint that the library compressed; returns its folder and what the library decompresses."""
        from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        arguments = {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True, **arguments}
        args = QuantizationArgs(**{k: v for k, v in arguments.items() if v is not None})
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        kind = PackedQuantizationCompressor if layout == "pack-quantized" else IntQuantizationCompressor
        tensors, expected = load_file(dense / "model.safetensors"), {}
        for name in linears(tensors):
            weight = tensors.pop(f"{name}.weight")
            group = arguments["group_size"] or weight.shape[1]
            scale, zero = grids(weight, args.num_bits, group, args.symmetric, dtype)
            if args.strategy == "tensor":
                scale, zero = scale.max().reshape(1), zero.flatten()[:1] * 0 + (0 if args.symmetric else 1)
            local = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            stored = kind.compress(local, scheme)
            expected[name] = kind.decompress({**stored, "weight_scale": scale.float()}, scheme)["weight"]
            if dtype != torch.float32:
                assert torch.equal(kind.decompress(stored, scheme)["weight"], expected[name].to(dtype))
            tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        groups = {"group_0": json.loads(scheme.model_dump_json())}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"],
                  "quantization_status": "compressed", "version": "0.20.0", "sparsity_config": {},
                  "transform_config": {}, "kv_cache_scheme": None, **(settings or {})}  # fmt: skip
        return write(folder, dense, tensors, config), expected

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
    @pytest.mark.parametrize(
        ("bits", "strategy"), [(2, "group"), (3, "group"), (4, "group"), (8, "group"), (4, "channel"), (3, "tensor")]
    )
    def test_as_the_library_decompresses(self, llama, tmp_path, bits, symmetric, strategy, layout):
        made, expected = self.make(
            llama, tmp_path / "base", layout, num_bits=bits, symmetric=symmetric, strategy=strategy,
            group_size=16 if strategy == "group" else None,
        )  # fmt: skip
        check_bases(correct(llama, made, tmp_path / "out"), expected)

    def test_scales_of_another_dtype(self, llama, tmp_path):
        made, expected = self.make(llama, tmp_path / "base", dtype=torch.float16)
        check_bases(correct(llama, made, tmp_path / "out"), expected)
        refuse("as float16, which bfloat16 does not hold exactly: write with --dtype float16", llama, made, tmp_path,
               dtype="bfloat16")  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "settings", "message"),
        [
            ({"num_bits": 5}, {}, "weights of 5 bits"),
            ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "no longer unpacks"),
            ({}, {"transform_config": {"config_groups": {"u": {}}}}, "has a transform_config"),
            ({}, {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
            ({}, {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
            ({}, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"},
              "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}}}, "activations too"),
            ({}, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "actorder": "group",
              "strategy": "group", "group_size": 16}}}}, "compressed-tensors refuses: .*actorder"),
            ({}, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group",
              "group_size": 8}}}}, "has scales of shape"),
            ({}, {"config_groups": {"group_0": {"targets": ["re:nothing"], "weights": {"num_bits": 4, "strategy": "group",
              "group_size": 16}}}}, "is in no group"),
            ({}, {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float",
              "strategy": "group", "group_size": 16}}}}, "of 4 bits \\(float\\)"),
        ],
    )  # fmt: skip
    def test_refusals(self, llama, tmp_path, arguments, settings, message):
        made, _ = self.make(llama, tmp_path / "base", settings=settings, **arguments)
        refuse(message, llama, made, tmp_path)

    def test_words_of_an_older_library(self, llama, tmp_path):
        """Three bits used to be packed ten to a word."""
        made, _ = self.make(llama, tmp_path / "base", num_bits=3)
        tensors = load_file(made / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight_packed"
        tensors[name] = torch.zeros(32, 5 + 1, dtype=torch.int32)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("its layout is not known", llama, made, tmp_path)

    def test_reordered_groups(self, llama, tmp_path):
        made, expected = self.make(llama, tmp_path / "base")
        tensors = load_file(made / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight_g_idx"
        tensors[name] = torch.arange(32, dtype=torch.int32) // 16
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        check_bases(correct(llama, made, tmp_path / "out"), expected)
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("no neighbours", llama, made, tmp_path)


def test_without_the_library_the_install_is_named(llama, tmp_path, monkeypatch):
    made = write(tmp_path / "base", llama, {}, {"quant_method": "compressed-tensors"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    refuse("pip install compressed-tensors", llama, made, tmp_path)


def bit_stream(values, bits):
    """int32 words (words, columns) of values (n, columns): one number of n * bits bits a column, the first lowest."""
    columns = []
    for column in values.T.tolist():
        number = sum(int(v) << (bits * i) for i, v in enumerate(column))
        words = -(-len(column) * bits // 32)
        columns.append([(number >> (32 * i)) % 2**32 for i in range(words)])
    words = torch.tensor(columns, dtype=torch.int64).T
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class TestGptq:
    def make(self, dense, folder, bits=4, group=16, layout="gptq", settings=None, bias=None, zero_floor=1):
        """A checkpoint packed by hand; returns its folder and the weights that it means."""
        tensors, expected = load_file(dense / "model.safetensors"), {}
        for name in linears(tensors):
            weight = tensors.pop(f"{name}.weight")
            rows, width = weight.shape
            size = width if group == -1 else group
            scale, zero = grids(weight, bits, size, False, torch.float16)
            zero = (zero.int() + 2 ** (bits - 1)).clamp_min(zero_floor)
            index = torch.arange(width) // size
            codes = (weight / scale.float()[:, index] + zero[:, index]).round().clamp(0, 2**bits - 1)
            expected[name] = scale.float()[:, index] * (codes - zero[:, index])
            stored = (zero - int(layout == "gptq")) % 2**bits
            tensors |= {f"{name}.qweight": bit_stream(codes.T, bits), f"{name}.qzeros": bit_stream(stored, bits).T,
                        f"{name}.scales": scale.T, f"{name}.g_idx": index.int()}  # fmt: skip
            if bias is not None:
                tensors[f"{name}.bias"] = torch.full((rows,), bias, dtype=torch.float16)
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False,
                  "checkpoint_format": layout, **(settings or {})}  # fmt: skip
        return write(folder, dense, tensors, config), expected

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("group", [16, -1])
    @pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
    def test_repacked_exactly(self, llama, tmp_path, bits, group, layout):
        made, expected = self.make(llama, tmp_path / "base", bits, group, layout, bias=0.0)
        check_bases(correct(llama, made, tmp_path / "out"), expected)

    def test_float16_is_written_as_it_is(self, llama, tmp_path):
        made, expected = self.make(llama, tmp_path / "base", layout="gptq_v2", zero_floor=0)
        out = correct(llama, made, tmp_path / "out", dtype="float16", rank=0)
        tensors, kept = load_file(out / "model.safetensors"), load_file(made / "model.safetensors")
        for name in expected:
            assert torch.equal(tensors[f"{name}.scale"], kept[f"{name}.scales"].T)
        refuse("which bfloat16 does not hold exactly", llama, made, tmp_path, dtype="bfloat16")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"settings": {"bits": 5}}, "has 5 bits"),
            ({"settings": {"bits": 8}}, "its layout is not known"),
            ({"settings": {"group_size": 0}}, "group_size 0"),
            ({"settings": {"group_size": 32}}, "its layout is not known"),
            ({"settings": {"checkpoint_format": "marlin"}}, "checkpoint_format 'marlin'"),
            ({"bias": 1.0}, "has a bias, the dense layer has none"),
        ],
    )
    def test_refusals(self, llama, tmp_path, arguments, message):
        made, _ = self.make(llama, tmp_path / "base", **arguments)
        refuse(message, llama, made, tmp_path)

    def test_zero_points_that_wrapped_round(self, llama, tmp_path):
        made, _ = self.make(llama, tmp_path / "base")
        tensors = load_file(made / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.qzeros"].fill_(-1)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("up_proj has zero points that wrapped round .* save it as gptq_v2", llama, made, tmp_path)

    def test_act_order(self, llama, tmp_path):
        made, _ = self.make(llama, tmp_path / "base")
        tensors = load_file(made / "model.safetensors")
        name = "model.layers.1.mlp.up_proj"
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("model.layers.1.mlp.up_proj has groups of inputs that are no neighbours", llama, made, tmp_path)

    def test_missing_and_foreign_tensors(self, llama, make_model, tmp_path):
        made, _ = self.make(llama, tmp_path / "base")
        tensors = load_file(made / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.scales"]
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("up_proj has no tensor scales", llama, made, tmp_path)
        tensors = load_file(made / "model.safetensors")
        tensors["model.layers.7.mlp.up_proj.qweight"] = torch.zeros(1, dtype=torch.int32)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        refuse("compresses model.layers.7.mlp.up_proj, which the dense model does not have", llama, made, tmp_path)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 45])
def test_words_are_unpacked(bits, count):
    codes = torch.randint(0, 2**bits, (count, 3), generator=torch.Generator().manual_seed(count))
    assert torch.equal(unpack_words(bit_stream(codes, bits).T, bits, count).long(), codes.T)
