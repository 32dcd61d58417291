"""Every family of causal language models goes through compress, write, load and generate; experts in detail."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, HunYuanMoEV1Config, ProphetNetConfig, ProphetNetForCausalLM

from lrcompress.calibration.collect import InputCollector, Recorded
from lrcompress.calibration.routing import LEAST_SHARE, complete
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.errors import InputError
from lrcompress.evaluation.bounds import counted
from lrcompress.evaluation.loading import load_model
from lrcompress.export.dense import export_dense
from lrcompress.formats import DENSE
from lrcompress.grams import symmetric
from lrcompress.model.experts import LinearExperts, fuse, linear_experts, linearise
from lrcompress.model.skeleton import checkpoint_names, empty_model, find_blocks
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.model.targets import find_sites, is_linear
from lrcompress.protocols import InputStatistics, Site, Spec
from lrcompress.recipe import make_recipe
from lrcompress.report.inspection import inspect_model
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import load_report, removed_in_words
from lrcompress.stages.allocate import allocate
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import profile
from lrcompress.stages.request import check_request
from tests.architectures import ALL_CODES, CARRYING, FAMILIES, MIXTURES, VOCABULARY, configs
from tests.conftest import compress_tiny, run_without_lrcompress

IDS = torch.arange(2, 42).reshape(2, 20)
SHORT = {"source": "python-docs", "samples": 2, "seqlen": 32}
METHODS = [
    {"method": {"name": "lord", "metric": "plain"}},
    {"method": {"name": "lord", "metric": "two_sided"}},
    {"method": {"name": "lord", "propagation": "sequential", "toward_dense": 0.5}},
    {"method": "welore"},
    {"method": "cospadi"},
    {"method": "eora", "base": "rtn:4:32", "ratio": 0.5},
    {"method": "auto"},
]


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def with_dense_weights(dense, compressed):
    """The dense model, its experts linear where those of `compressed` are, with every stored weight multiplied out."""
    filled = linearised(copy.deepcopy(dense), compressed)
    for name, layer in stored_layers(compressed).items():
        weight, bias = dense_parts(layer)
        target = filled.get_submodule(name)
        target.weight = nn.Parameter(weight.T if layer.spec.conv1d else weight)
        if bias is not None:
            target.bias = nn.Parameter(bias)
    return filled


@torch.no_grad()
def linearised(model, like):
    """`model` with its fused experts taken apart by their layout as transformers documents it."""
    for name, experts in linear_experts(like).items():
        fused = model.get_submodule(name)
        weights = {key: tensor.detach().clone() for key, tensor in fused.named_parameters()}
        if fused.is_transposed:
            weights |= {key: t.transpose(1, 2) for key, t in weights.items() if t.dim() == 3}
        apart = LinearExperts(fused)
        for index in range(experts.count):
            expert = apart.get_submodule(str(index))
            for suffix, leaf in (("", "weight"), ("_bias", "bias")):
                if f"down_proj{suffix}" in weights:
                    both = weights[f"gate_up_proj{suffix}"][index]
                    gate, up = both.chunk(2) if fused.is_concatenated else (both[::2], both[1::2])
                    for part, tensor in (("gate_proj", gate), ("up_proj", up)):
                        setattr(expert.get_submodule(part), leaf, nn.Parameter(tensor.clone()))
                    down = weights[f"down_proj{suffix}"][index]
                    setattr(expert.down_proj, leaf, nn.Parameter(down.clone()))
        model.set_submodule(name, apart)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(make_model, tmp_path, family):
    """Its matrices have rank 4 and are stored at higher ranks: the result computes what the dense model does."""
    model = make_model(family, rank=4)
    result = compress_tiny(
        model,
        tmp_path / "out",
        method={"name": "lord", "metric": "input"},
        format="low_rank",
        calibration=SHORT,
    )
    dense, loaded = logits(load(model)), load(result.folder)
    assert {t["name"] for t in result.report["targets"] if t["format"] != "dense"} == set(stored_layers(loaded))
    assert {t["format"] for t in result.report["targets"]} == {"low_rank"}
    assert (logits(loaded) - dense).abs().max() < 1e-4 * dense.abs().max()
    generates(loaded)


@pytest.mark.parametrize("family", ALL_CODES)
def test_blocks_may_be_codes_alone(make_model, tmp_path, family):
    result = compress_tiny(make_model(family), tmp_path / "out", method="auto", ratio=None, bpw=6, calibration=SHORT)
    dense, loaded = load(make_model(family)), load(result.folder)
    assert find_blocks(loaded) == find_blocks(dense)
    expected = logits(with_dense_weights(dense, loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()


def generates(model):
    with torch.no_grad():
        written = model.generate(IDS[:1, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: json.dumps(r["method"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_method(make_model, tmp_path, family, recipe):
    result = compress_tiny(make_model(family), tmp_path / "out", **recipe)
    loaded = load(result.folder)
    assert {t["name"] for t in result.report["targets"] if t["format"] != "dense"} == set(stored_layers(loaded))
    assert -1e-9 < result.report["ratio"]["stored"] - recipe.get("ratio", 0.2) < 0.01
    expected = logits(with_dense_weights(load(make_model(family)), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    generates(loaded)


@pytest.fixture
def mixture(compressed):
    """mixture(family): a mixture of experts compressed with metric=input."""

    def make(family, **options):
        return compressed(family, **(options or {"method": {"name": "lord", "metric": "input"}}))

    return make


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in MIXTURES), ("qwen3_moe", {"method": "ecsq", "bpw": 4, "ratio": None})],
    ids=[*MIXTURES, "coded"],
)
def test_experts_by_the_dense_ones(make_model, mixture, tmp_path, family, options):
    """Loaded, exported and dequantised, it computes what the dense model does with the stored weights in its place."""
    folder = mixture(family, **options)
    loaded = load(folder)
    assert sum(".experts." in target["name"] for target in load_report(folder)["targets"]) > 10
    expected = logits(with_dense_weights(load(make_model(family)), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    export_dense(str(folder), tmp_path / "dense")
    exported = load(tmp_path / "dense")
    assert type(exported) is type(loaded)
    assert not linear_experts(exported)
    assert (logits(exported) - expected).abs().max() < 2e-4 * expected.abs().max()
    report = json.loads((tmp_path / "dense" / "report.json").read_text())
    assert report["bytes"]["targets_stored"] == report["bytes"]["targets_dense"]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    plain = loaded.dequantize()
    assert not linear_experts(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert (logits(load(tmp_path / "plain")) - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_layer_whose_experts_all_stay_dense_counts_for_what_it_has(make_model, tmp_path, monkeypatch, family):
    """Such a layer lies fused in the files: counted, exported and inspected like the others."""
    allocated = {}

    def keep_first_layer_dense(opened, artefacts):
        plan = allocate(opened, artefacts)
        for site in opened.sites:
            if site.block == 0 and ".experts." in site.name:
                plan.specs[site.name] = Spec(DENSE, site.shape, site.bias)
                plan.bytes[site.name], plan.levels[site.name] = plan.dense_bytes[site.name], -1
        allocated.update(plan.bytes)
        return plan

    monkeypatch.setattr("lrcompress.pipeline.allocate", keep_first_layer_dense)
    method = {"name": "lord", "metric": "input"}
    result = compress_tiny(make_model(family), tmp_path / "out", method=method, calibration=SHORT)
    counted_bytes = {target["name"]: target["bytes"] for target in result.report["targets"]}
    assert counted_bytes == allocated
    dense = [t for t in result.report["targets"] if t["format"] == "dense"]
    assert len(dense) == 4 * 3
    assert all(t["bytes"] == t["dense_bytes"] > 0 for t in dense)
    expected = logits(with_dense_weights(load(make_model(family)), load(result.folder)))
    export_dense(str(result.folder), tmp_path / "dense")
    assert (logits(load(tmp_path / "dense")) - expected).abs().max() < 2e-4 * expected.abs().max()
    exported = json.loads((tmp_path / "dense/report.json").read_text())
    assert exported["bytes"]["targets_stored"] == result.report["bytes"]["targets_dense"]
    inspected = {t["name"]: t["bytes"] for t in inspect_model(str(result.folder))["targets"]}
    assert inspected == allocated


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma4_small", "auto"),
        ("glm_dsa", "auto"),
        ("deepseek_v4", "auto"),
        *((family, {"name": "lord", "propagation": "sequential", "toward_dense": 0.5}) for family in CARRYING),
    ],
)
def test_blocks_that_read_more_than_hidden_states(make_model, tmp_path, family, method):
    """Embeddings of the text, another block's keys or chosen tokens, several streams."""
    ratio = 0.7 if method == "auto" else 0.2  # of float32, where integers that take more than 12 bits stay dense
    result = compress_tiny(make_model(family), tmp_path / "out", method=method, ratio=ratio, calibration=SHORT)
    loaded = load(result.folder)
    assert len(stored_layers(loaded)) > 10
    expected = logits(with_dense_weights(load(make_model(family)), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    generates(loaded)


def test_what_several_blocks_share_is_left_as_it_is(make_model, tmp_path):
    model, shared = make_model("zamba2"), "model.layers.1.shared_transformer.self_attn.q_proj"
    result = compress_tiny(model, tmp_path / "out", calibration=SHORT)
    loaded = load(result.folder)
    assert stored_layers(loaded)
    assert not any("shared_transformer" in name for name in stored_layers(loaded))
    expected = logits(with_dense_weights(load(model), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    with pytest.raises(InputError, match=f"{shared} shares its weight with .*layers.2.*leave it out"):
        compress_tiny(model, tmp_path / "asked", target=[shared], calibration=SHORT)


@pytest.mark.parametrize(
    ("family", "stored", "named"),
    [
        ("sarvam_moe", "attention.query_key_value.weight", "self_attn.k_proj.weight"),
        ("olmo_hybrid", "linear_attn.k_conv1d.weight", "linear_attn.conv1d.weight"),
    ],
)
def test_tensors_that_are_joined_or_split_on_loading(make_model, tmp_path, family, stored, named):
    """Some of what is made from one tensor is compressed, some not; it loads, is saved and is exported."""
    files = load_file(make_model(family) / "model.safetensors")
    assert any(name.endswith(stored) for name in files)
    assert not any(name.endswith(named) for name in files)
    method = {"name": "lord", "metric": "input"}
    result = compress_tiny(make_model(family), tmp_path / "out", method=method, ignore=["*.v_proj"], calibration=SHORT)
    loaded, dense = load(result.folder), load(make_model(family))
    expected = logits(with_dense_weights(dense, loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    kept = {name: t for name, t in loaded.state_dict().items() if name.endswith(("v_proj.weight", "conv1d.weight"))}
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in kept.items())
    assert kept
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    export_dense(str(result.folder), tmp_path / "dense")
    assert (logits(load(tmp_path / "dense")) - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize(("family", "router"), [("gemma4", "router.proj"), ("hunyuan", "gate.wg")])
def test_what_chooses_experts_is_no_target_unless_it_is_named(family, router):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    hunyuan = HunYuanMoEV1Config(vocab_size=VOCABULARY, num_experts=4, moe_topk=2, head_dim=8, **sizes)
    skeleton = empty_model({**configs(), "hunyuan": hunyuan}[family])
    experts = linearise(skeleton)
    blocks = find_blocks(skeleton)
    routers = {name for name, module in skeleton.named_modules() if is_linear(module) and name.endswith(router)}
    assert len(routers) == len(experts)
    assert not routers & {site.name for site in find_sites(skeleton, blocks, [], [])}
    assert routers == {site.name for site in find_sites(skeleton, blocks, sorted(routers), [])}


def test_a_layer_that_only_some_blocks_have_is_tried_there(make_model):
    """Jamba's first block here is attention; its Mamba blocks read dt_proj's weight without a call."""
    request = check_request(make_recipe({"model": str(make_model("jamba")), "method": "lord", "ratio": 0.2}))
    kinds = {site.kind for site in open_request(request, Reporter(quiet=True), calibrate=False).sites}
    assert "mamba.in_proj" in kinds
    assert "self_attn.q_proj" in kinds
    assert "mamba.dt_proj" not in kinds


@pytest.mark.parametrize("original", [True, False], ids=["per expert", "fused"])
@pytest.mark.parametrize("family", MIXTURES)
def test_taking_experts_apart_and_back(make_model, tmp_path, family, original):
    """Bit for bit, with equal outputs on the way, however transformers stored them."""
    model = load(make_model(family))
    model.save_pretrained(tmp_path, save_original_format=original)
    expected, before = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    skeleton = empty_model(copy.deepcopy(model.config))
    linearise(skeleton)
    reader = ExpertReader(tmp_path, skeleton)
    names = checkpoint_names(skeleton, reader.names())
    read = dict(reader.read(list(names.values())))
    skeleton.load_state_dict({name: read[key] for name, key in names.items()}, assign=True)
    assert (logits(skeleton) - expected).abs().max() < 1e-5 * expected.abs().max()
    fuse(skeleton)
    assert skeleton.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in skeleton.state_dict().items())


def test_experts_that_are_left_out_stay_as_they_are(make_model, tmp_path):
    model = make_model("mixtral")
    result = compress_tiny(model, tmp_path / "out", ignore=["*.layers.0.*.experts.*", "*.experts.1.*"])
    stored = load_file(result.folder / "model.safetensors")
    dense = load(model).state_dict()
    fused = [name for name in dense if ".layers.0.mlp.experts." in name]
    assert len(fused) == 2
    assert all(torch.equal(stored[name], dense[name]) for name in fused)
    gate = dense["model.layers.1.mlp.experts.gate_up_proj"][1][:48]
    assert torch.equal(stored["model.layers.1.mlp.experts.1.gate_proj.weight"], gate)
    loaded = load(result.folder)
    assert list(linear_experts(loaded)) == ["model.layers.1.mlp.experts"]
    inspected = {t["name"]: t for t in inspect_model(str(result.folder), spectra=True)["targets"]}
    assert inspected["model.layers.0.mlp.experts.2.up_proj"]["format"] == "dense"
    values = torch.linalg.svdvals(dense["model.layers.0.mlp.experts.gate_up_proj"][2][48:].double())
    assert inspected["model.layers.0.mlp.experts.2.up_proj"]["spectrum"][0] == pytest.approx(float(values[0]))


def test_plain_transformers_refuses_them(make_model, compressed, mixture, tmp_path):
    """Linear layers, all experts, or those of one module partly: what is stored never loads as something else."""
    partly = [
        compress_tiny(make_model(family), tmp_path / family, ignore=["*.experts.1.*"])
        for family in ("mixtral", "qwen3_moe")
    ]
    folders = [compressed(), *map(mixture, MIXTURES), *(result.folder for result in partly)]
    code = """
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("LOADED")
    except RuntimeError as error:
        print(str(error).splitlines()[0].replace(" ", "_"))
"""
    done = run_without_lrcompress(code, *folders)
    said = done.stdout.split()
    assert len(said) == len(folders), done.stderr[-2000:]
    assert "ignore_mismatched_sizes" in said[0]
    assert all("ignore_mismatched_sizes" in line or "conversion" in line for line in said), said


def forward_mixtral(model, weights):
    """Statistics of every expert's layer in block 0 by the fused parameters: name to (rows, sum of w x, sum of w x xᵀ)."""
    seen = {}
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], index=args[1]) or None)
    logits(model)
    handle.remove()
    found = {}
    x, chosen = seen["x"].double(), seen["index"]
    for expert in range(4):
        tokens = (chosen == expert).any(1)
        gate, up = (x[tokens] @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        for name, rows in (("up_proj", x[tokens]), ("down_proj", nn.functional.silu(gate) * up)):
            w = weights[tokens].double()[:, None]
            found[f"{expert}.{name}"] = (int(tokens.sum()), (w * rows).sum(0), (w * rows).T @ rows)
    return found


def test_statistics_are_those_of_the_routed_tokens(make_model):
    model = load(make_model("mixtral"))
    weights = torch.linspace(0.5, 3, IDS.numel())
    with torch.no_grad():
        expected = forward_mixtral(model, weights)
    apart = linearised(copy.deepcopy(model), empty_apart("mixtral"))
    stem = "model.layers.0.mlp.experts."
    sites = [Site(stem + name, (32, 32 if "up" in name else 48), 0, stem + name, False) for name in expected]
    with InputCollector(apart, sites, weights) as collector:
        logits(apart)
    assert sum(rows for rows, _, _ in expected.values()) == 2 * 2 * IDS.numel()
    for name, (rows, total, second) in expected.items():
        found = collector.statistics[stem + name]
        assert found.rows == rows
        torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(symmetric(found.second), second, rtol=1e-4, atol=1e-3)


def empty_apart(family):
    skeleton = empty_model(configs()[family])
    linearise(skeleton)
    return skeleton


def statistics(rows, gradients):
    found = InputStatistics.zeros(rows.shape[1])
    found.update(rows)
    found.gradients = gradients.double().T @ gradients.double() / len(gradients)
    return found


def test_experts_that_get_few_tokens_are_topped_up():
    """A projection of three experts: one that got enough rows is left alone, two are filled up to their widths."""
    torch.manual_seed(0)
    sites = [Site(f"m.{e}.up_proj", (6, 4), 0, f"m.{e}.up_proj", False) for e in range(3)]
    sites += [Site(f"m.{e}.down_proj", (4, 6), 0, f"m.{e}.down_proj", False) for e in range(3)]
    many, few = (torch.randn(50, 4), torch.randn(50, 6)), (torch.randn(3, 4), torch.randn(3, 6))
    known = {"m.0.up_proj": statistics(*many), "m.1.up_proj": statistics(*few)}
    known |= {"m.0.down_proj": statistics(*many[::-1]), "m.1.down_proj": statistics(*few[::-1])}
    found = complete(sites, known, ["m"], 100.0)
    for name in ("m.0.up_proj", "m.0.down_proj"):
        assert torch.equal(found[name].second, known[name].second)
        torch.testing.assert_close(found[name].gradients, known[name].gradients)
        assert found[name].share == 0.5
    inputs, outputs = (torch.cat([a, b]).double() for a, b in zip(many, few, strict=True))
    pooled, eye = inputs.T @ inputs / 53, torch.eye(6, dtype=torch.float64)
    own = few[0].double().T @ few[0].double()
    torch.testing.assert_close(found["m.1.up_proj"].gram(), (own + pooled) / 4, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["m.2.up_proj"].gram(), pooled, rtol=1e-5, atol=1e-6)
    # An expert's neurons are its own: only how large they are on average can be had from the others.
    even = outputs.square().mean() * eye
    own = few[1].double().T @ few[1].double()
    torch.testing.assert_close(found["m.1.down_proj"].gram(), (own + 3 * even) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["m.2.down_proj"].gram(), even, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["m.1.up_proj"].gradients, (own + 3 * even) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["m.2.down_proj"].gradients, pooled, rtol=1e-5, atol=1e-6)
    assert found["m.1.up_proj"].share == pytest.approx(3 / 100)
    assert found["m.2.up_proj"].share == pytest.approx(LEAST_SHARE * 53 / 3 / 100)


def test_an_expert_s_errors_count_for_its_tokens(make_model, tmp_path):
    """The energy of a weight is the mean of |W x|² over all tokens of the block, those sent elsewhere with 0."""
    recipe = make_recipe({
        "model": str(make_model("mixtral")), "method": {"name": "lord", "metric": "input", "sink_share": 0}, "ratio": 0.2,
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}, "output": str(tmp_path / "out"),
    })  # fmt: skip
    opened = open_request(check_request(recipe), Reporter(quiet=True))
    artefacts = profile(opened, tmp_path, Reporter(quiet=True))
    model, seen = load(make_model("mixtral")), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args) or None)
    with torch.no_grad():
        for ids in opened.calibration.ids:
            model(input_ids=ids[None])
    x, chosen = (torch.cat([args[i] for args in seen]) for i in (0, 1))
    compared = 0
    for expert in range(4):
        rows = x[(chosen == expert).any(1)]
        if len(rows) >= 32:
            site = next(s for s in opened.sites if s.name == f"model.layers.0.mlp.experts.{expert}.gate_proj")
            energy = (rows @ experts.gate_up_proj[expert][:48].detach().T).double().square().sum() / len(x)
            assert float(artefacts.load(site, ("total",))["total"]) == pytest.approx(float(energy), rel=1e-3)
            compared += 1
    assert compared > 1


def test_dense_counterparts_follow_the_tokens():
    dense = Recorded(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([4, 7, 9]))
    rows = torch.tensor([[10.0], [20.0], [30.0]])
    assert dense.beside(rows, torch.tensor([7, 8, 9])).flatten().tolist() == [2.0, 20.0, 3.0]


@pytest.mark.parametrize(
    "options", [{"metric": "centred"}, {"metric": "two_sided"}, {"propagation": "sequential", "toward_dense": 0.5}]
)
def test_an_expert_without_tokens(make_model, tmp_path, options):
    """Every router score is 0, so that the last of four is never chosen: it is compressed by what the others see."""
    folder = tmp_path / "dense"
    shutil.copytree(make_model("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = compress_tiny(folder, tmp_path / "out", method={"name": "lord", **options}, calibration=SHORT)
    idle = [t for t in result.report["targets"] if ".experts.3." in t["name"]]
    assert len(idle) == 6
    assert all(t["format"] != "dense" and 0 < t["relative_error"] < 1 for t in idle)
    assert torch.isfinite(logits(load(result.folder))).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "mamba"])
def test_gradients_reach_every_layer(make_model, tmp_path, family):
    result = compress_tiny(make_model(family), tmp_path / "out", method="auto", calibration=SHORT)
    errors = [t["relative_error"] for t in result.report["targets"]]
    assert all(0 <= error < 1 for error in errors)
    generates(load(result.folder))


def test_weights_that_are_read_without_a_call_are_left(make_model, tmp_path):
    """Mamba multiplies by dt_proj's weight itself."""
    result = compress_tiny(make_model("mamba"), tmp_path / "out", method={"name": "lord", "metric": "plain"})
    assert {t["name"].rpartition(".")[2] for t in result.report["targets"]} == {"in_proj", "x_proj", "out_proj"}
    with pytest.raises(InputError, match=r"never calls mixer\.dt_proj as a layer"):
        compress_tiny(make_model("mamba"), tmp_path / "other", target=["*.dt_proj"])


def test_a_class_of_its_own_is_linear_where_it_computes_that():
    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with torch.device("meta"):
        assert [is_linear(cls(3, 4, bias=b)) for cls in (Same, Other) for b in (True, False)] == [
            True,
            True,
            False,
            False,
        ]


def test_few_targets_are_announced(make_model, tmp_path):
    result = compress_tiny(make_model("llama"), tmp_path / "out", target=["*.q_proj"])
    report = result.report
    share = 3 * 32 * 32 / sum(p.numel() for p in load(make_model("llama")).parameters())
    warning = next(w for w in report["warnings"] if w.startswith("targets hold"))
    assert f"{share:.0%} of the model's" in warning
    assert "model.embed_tokens" in warning or "lm_head" in warning
    words = removed_in_words(report)
    assert words.startswith(f"removed {report['ratio']['whole_model']:.2%} of the whole model")
    assert f"the targets are {share:.0%} of it" in words
    assert f"{share:.2%} |" in (result.folder / "README.md").read_text()
    everything = compress_tiny(make_model("llama"), tmp_path / "all").report
    assert not any(w.startswith("targets hold") for w in everything["warnings"])
    assert removed_in_words(everything).startswith(f"removed {everything['ratio']['stored']:.2%} of the targets' bytes")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({trace!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_checkpoint_s_code_runs_only_when_trusted(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trace = tmp_path / "own_llama", tmp_path / "trace"
    shutil.copytree(make_model("llama"), folder)
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        compress_tiny(folder, tmp_path / "out")
    with pytest.raises(InputError):
        inspect_model(str(folder))
    assert not trace.exists()
    result = compress_tiny(folder, tmp_path / "out", trust_remote_code=True)
    assert trace.exists()
    trace.unlink()
    for refused in (lambda: inspect_model(str(result.folder)), lambda: load_model(str(result.folder), device="cpu")):
        with pytest.raises(InputError):
            refused()
    assert not trace.exists()
    loaded = AutoModelForCausalLM.from_pretrained(result.folder, trust_remote_code=True)
    assert len(stored_layers(loaded)) == len(result.report["targets"])


def test_speed_bounds_count_experts_fused_or_not(make_model):
    """Each token is multiplied by the experts that it is sent to, and only the experts that ran are read."""
    model = load(make_model("mixtral"))
    apart = linearised(copy.deepcopy(model), empty_apart("mixtral"))
    works = [counted(each, lambda each=each: logits(each))[0] for each in (model, apart)]
    assert works[0] == works[1]
    attention = 2 * (32 * 32 * 2 + 32 * 16 * 2) + 32 * 320
    assert works[0].multiply_adds == IDS.numel() * (attention + 2 * 2 * 3 * 32 * 48)


def test_corrections_of_experts(make_model, tmp_path):
    """EoRA over a base that is ours, partly compressed experts among it, and exported as an adapter and its base."""
    model = make_model("qwen3_moe")
    base = compress_tiny(model, tmp_path / "base", method={"name": "lord", "metric": "plain"}, format="pivoted",
                         ignore=["*.layers.1.*.experts.*", "*.experts.2.*"])  # fmt: skip
    result = compress_tiny(model, tmp_path / "out", method="eora", base=str(base.folder), ratio=None, rank=2,
                           calibration=SHORT)  # fmt: skip
    loaded = load(result.folder)
    assert {t["format"] for t in result.report["targets"]} == {"sum", "dense"}
    assert sum(".experts." in name for name in stored_layers(loaded)) == 5 * 3
    expected = logits(with_dense_weights(load(model), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()


def test_blocks_that_cannot_be_walked_are_compressed_by_their_weights_alone(tokenizer, tmp_path):
    """Batch and tokens change places in ProphetNet's decoder: no dimension of what it hands on is that of tokens."""
    config = ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_decoder_layers=3, num_decoder_attention_heads=4, decoder_ffn_dim=48,
        num_encoder_layers=1, num_encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=128,
        is_decoder=True, add_cross_attention=False, is_encoder_decoder=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    ProphetNetForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    walked = {"method": {"name": "lord", "metric": "input"}, "calibration": SHORT}
    with pytest.raises(InputError, match="block by block; --method ecsq --set metric=plain does without"):
        compress_tiny(tmp_path / "dense", tmp_path / "out", **walked)
    for asked in ({"max_loss": 0.5, "ratio": None}, {"refine": 0.1}):
        alone = {"method": {"name": "lord", "metric": "plain"}, "calibration": SHORT, **asked}
        with pytest.raises(InputError, match="cannot be calibrated block by block"):
            compress_tiny(tmp_path / "dense", tmp_path / "out", **alone)
    result = compress_tiny(
        tmp_path / "dense", tmp_path / "out", method={"name": "ecsq", "metric": "plain"}, ratio=0.7, calibration=SHORT
    )
    assert sum("not judged by held-out text" in line for line in result.report["warnings"]) == 1
    assert "held_out" not in result.report
    loaded, dense = (ProphetNetForCausalLM.from_pretrained(f).eval() for f in (result.folder, tmp_path / "dense"))
    assert len(stored_layers(loaded)) > 3 * 4
    with torch.no_grad():
        models = (with_dense_weights(dense, loaded), loaded)
        expected, found = (model(input_ids=IDS, use_cache=False).logits for model in models)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


def test_experts_of_two_layers_stay_fused(make_model):
    model = load(make_model("mixtral"))
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj = first.gate_up_proj
    assert linearise(model) == {}
    one, other = (layer.self_attn for layer in model.model.layers)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        other.get_submodule(name).weight = one.get_submodule(name).weight
    with pytest.raises(InputError, match=r"every linear layer of model.layers, .* is another's too: name others"):
        find_sites(model, find_blocks(model), [], [])
