"""Input embeddings and output heads as targets: their metric, what is stored of them, what is loaded again."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.calibration.collect import collect_outside
from lrcompress.calibration.gradients import backward_block, loss_gradients
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.errors import InputError, Interrupted
from lrcompress.evaluation.bounds import counted
from lrcompress.evaluation.loading import load_model
from lrcompress.export.dense import export_dense
from lrcompress.formats.coded import Coded, Scales
from lrcompress.formats.table import Table, table_like
from lrcompress.linalg.by_row import row_metric
from lrcompress.methods.tokens import SEEN_AT_LEAST, token_parts
from lrcompress.model.limits import known_tokens
from lrcompress.model.lookups import row_scale
from lrcompress.protocols import InputStatistics, Lookups, Site, Spec
from lrcompress.recipe import make_recipe
from lrcompress.stages.vocabulary import embedding_statistics, heads_of
from tests.calibration.test_gradients import walked
from tests.conftest import compress_tiny
from tests.test_tied import perplexity, perplexity_said

EMBEDDINGS = {"llama": "model.embed_tokens", "qwen3": "model.embed_tokens", "gemma3": "model.embed_tokens",
              "gpt2": "transformer.wte", "opt": "model.decoder.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}  # fmt: skip
TIED = ("qwen3", "gemma3", "gpt2", "opt")
ECSQ = {"name": "ecsq", "metric": "input"}
SMALL = {"source": "python-docs", "samples": 2, "seqlen": 32}


@pytest.mark.parametrize("architecture", EMBEDDINGS)
def test_statistics_are_those_of_autograd_on_the_whole_model(make_model, tmp_path, architecture):
    """A row's own gradients, whatever its class and what follows do to it; of a head, gradients of every logit."""
    name = EMBEDDINGS[architecture]
    opened, walk = walked(
        make_model(architecture), tmp_path / "hidden", method="ecsq", target=[name], calibration=SMALL, ratio=0.5
    )
    (site,), ids, blocks = opened.embeddings, opened.calibration.ids, len(opened.blocks)
    assert (site.head is not None) == (architecture in TIED)
    heads, last = heads_of([site]), walk.calibration(blocks)
    inputs = collect_outside(opened.walker, ids, last, heads, None) if heads else {}
    out = walk.gradients(walk.gradient_path(blocks))
    squares = loss_gradients(opened.walker, ids, last, out, heads, gram=True)
    for block in reversed(range(blocks)):
        with opened.walker.block(block) as module:
            before, after = (walk.gradients(walk.gradient_path(block + i)) for i in (0, 1))
            backward_block(
                opened.walker, block, module, walk.calibration(block), after, before, [], None, lambda: None, gram=True
            )
    for head in heads:
        inputs[head.name].gradients = squares[head.name]
    found = embedding_statistics(opened, inputs, ids, walk.gradients(walk.gradient_path(0)))[site.name]
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture), dtype=torch.float32).eval()
    rows, logits, hidden = [], [], []
    for row in ids:
        model.zero_grad()
        apart = copy.deepcopy(model.get_input_embeddings().weight.detach())[row].requires_grad_(True)
        embeddings = copy.copy(model.get_input_embeddings())
        embeddings._parameters = {"weight": nn.Parameter(apart)}
        embeddings.padding_idx = None
        seen = {}
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, args, output, seen=seen: seen.update(x=args[0], y=output) or output.retain_grad()
        )
        model.get_input_embeddings().forward = lambda ids, own=embeddings: type(own).forward(
            own, torch.arange(ids.shape[1])[None]
        )
        output = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(output, row[1:], reduction="sum").backward()
        handle.remove()
        rows.append(embeddings.weight.grad)
        logits.append(seen["y"].grad[0, :-1])
        hidden.append(seen["x"].detach()[0])
    g = torch.cat(rows).double()
    expected = g.T @ g / len(g)
    energies = torch.zeros(site.shape[0], dtype=torch.float64).index_add(0, ids.flatten(), g.square().sum(1))
    torch.testing.assert_close(found.lookups.counts, len(g) * energies / energies.sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        found.lookups.gradients, expected, rtol=1e-3, atol=1e-5 * float(expected.diagonal().max())
    )
    if heads:
        torch.testing.assert_close(
            found.gradient_squares(), torch.cat(logits).double().square().mean(0), rtol=1e-3, atol=1e-9
        )
        h = torch.cat(hidden).double()
        torch.testing.assert_close(found.gram(), h.T @ h / len(h), rtol=1e-3, atol=1e-5)


def test_the_metric_of_a_row_is_the_exact_fisher_block_of_a_model_of_one_layer():
    """Tokens are looked up, multiplied by the same matrix and judged by squared error: both parts are exact there."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 5, (40,), generator=generator)  # token 5 is never seen
    lookup, head = (weight.clone().requires_grad_(True) for _ in range(2))
    wanted = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    hidden, logits, gradients, blocks = [], [], [], torch.zeros(2, 6, 3, 3, dtype=torch.float64)
    for token, aim in zip(ids, wanted, strict=True):
        row = lookup[token]
        logit = head @ row
        one, two, three = torch.autograd.grad((logit - aim).square().sum() / 2, [lookup, head, logit])
        for part, gradient in enumerate((one, two)):
            blocks[part] += torch.einsum("vi,vj->vij", gradient, gradient) / 40
        hidden.append(row.detach()), logits.append(three), gradients.append(one[token])
    statistics = InputStatistics.zeros(3)
    statistics.update(torch.stack(hidden))
    statistics.gradients = torch.stack(logits).square().mean(0)
    g = torch.stack(gradients)
    statistics.lookups = Lookups(torch.bincount(ids, minlength=6).double(), g.T @ g / 40)
    site = Site("e", (6, 3), 1, "e", False, lookup=True, head="h")
    head_part, lookup_part = token_parts(site, weight, statistics, "two_sided")
    for (shares, gram), block in zip((head_part, lookup_part), blocks.flip(0), strict=True):
        seen = shares - SEEN_AT_LEAST / 40
        # Factors of expectations are their product's only in the mean over the tokens: that is what K-FAC keeps.
        energy = torch.einsum("v,ii->v", seen.clamp_min(0), gram)
        assert float(energy.sum()) == pytest.approx(float(block.diagonal(dim1=1, dim2=2).sum()), rel=0.5)
    total = torch.einsum("v,ij->ij", lookup_part[0] - SEEN_AT_LEAST / 40, lookup_part[1])
    torch.testing.assert_close(total, blocks[0].sum(0))
    assert float(lookup_part[0][5]) == pytest.approx(SEEN_AT_LEAST / 40)
    assert row_metric([head_part, lookup_part], 0.0).weight.min() > 0


def test_without_gradients_lookups_count_as_much_as_the_head_and_plain_weights_all_alike():
    weight = torch.randn(7, 4, dtype=torch.float64)
    statistics = InputStatistics.zeros(4)
    statistics.update(torch.randn(30, 4))
    statistics.lookups = Lookups(torch.arange(7).double())
    site = Site("e", (7, 4), 1, "e", False, lookup=True, head="h")
    (ones, inputs), (shares, identity) = token_parts(site, weight, statistics, "input")
    torch.testing.assert_close((weight @ inputs @ weight.T).trace(), (shares[:, None] * weight.square()).sum())
    torch.testing.assert_close(
        shares / shares.sum(), (torch.arange(7) + SEEN_AT_LEAST).double() / (21 + 7 * SEEN_AT_LEAST)
    )
    assert torch.equal(ones, torch.ones(7).double())
    assert torch.equal(identity, torch.eye(4).double())
    (plain,) = token_parts(site, weight, None, "plain")
    assert torch.equal(plain[0], torch.ones(7).double())


def small_table(shape=(9, 5)):
    codes = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(1))
    scales = Scales.nearest(torch.linspace(0.5, 2, shape[0]), torch.linspace(1, 3, shape[1]))
    stored = Table.encode(codes.int(), scales)
    spec = Spec("table", shape, parameters={"length": len(stored["table.stream"])})
    table = Table(spec, torch.float32)
    table.load_state_dict({"weight": torch.empty(0), **stored})
    return table, codes * scales.rows[:, None] * scales.columns, stored


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_table_looks_up_and_multiplies_by_the_same_matrix(laid_out):
    table, weight, stored = small_table()
    embeddings = table_like(nn.Embedding(9, 5, padding_idx=2), table)
    if laid_out:
        table.lay_out()
    ids = torch.tensor([[0, 8, 3], [2, 2, 1]])
    torch.testing.assert_close(embeddings(ids), weight[ids])
    x = torch.randn(4, 5)
    torch.testing.assert_close(table(x), x @ weight.T)
    torch.testing.assert_close(table.dense(), weight)
    assert {key: value for key, value in table.state_dict().items() if key != "weight"}.keys() == stored.keys()
    assert torch.equal(table.state_dict()["table.stream"], stored["table.stream"])
    assert embeddings.padding_idx == 2
    assert type(embeddings.dense_embedding(weight)) is nn.Embedding


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.5


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class Reads(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight) * 2


def test_what_is_done_to_a_row_is_found_or_refused():
    assert row_scale(nn.Embedding(9, 5, padding_idx=8)) == 1
    assert row_scale(Scaled(9, 5)) == 3.5
    for refused in (Shifted(9, 5), Reads(9, 5), nn.Embedding(9, 5, max_norm=1.0)):
        with pytest.raises(InputError, match="more to a row"):
            row_scale(refused)
    table, weight, _ = small_table()
    torch.testing.assert_close(table_like(Scaled(9, 5), table)(torch.tensor([4])), 3.5 * weight[4:5])


@pytest.fixture(scope="module")
def compressed(make_model, tmp_path_factory):
    made = {}

    def make(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("embeddings") / architecture
            target = [EMBEDDINGS[architecture], "re:layers|\\.h\\."]
            found = perplexity_said(make_model(architecture), folder, method=ECSQ, ratio=0.7, target=target)
            made[architecture] = folder, *found
        return made[architecture]

    return make


@pytest.mark.parametrize("architecture", EMBEDDINGS)
class TestCompressed:
    def test_perplexity_said_is_that_of_what_is_stored(self, make_model, compressed, architecture):
        folder, (found, dense), _ = compressed(architecture)
        assert dense == pytest.approx(perplexity(make_model(architecture)), rel=1e-3)
        assert found == pytest.approx(perplexity(folder), rel=1e-3)

    def test_it_knows_the_dense_models_tokens(self, compressed, architecture):
        model = load_model(str(compressed(architecture)[0]), device="cpu").model
        known = known_tokens(model)
        assert known == 320
        model(torch.tensor([[0, known - 1]]))
        with pytest.raises(InputError, match=f"makes token {known}, the model knows {known}"):
            model(torch.tensor([[known]]))

    def test_a_table_is_stored_once_and_comes_back(self, compressed, architecture, tmp_path):
        folder, name = compressed(architecture)[0], EMBEDDINGS[architecture]
        model = AutoModelForCausalLM.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            keys = set(file.keys())
            assert sum(key.endswith("table.stream") for key in keys) == 1
            assert sum(len(file.get_slice(key).get_shape()) == 2 and file.get_slice(key).get_shape()[0] == 320
                       for key in keys) == (architecture not in TIED)  # fmt: skip
        assert isinstance(model.get_submodule(name), Table)
        assert isinstance(model.get_input_embeddings(), nn.Embedding)
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            expected = model(ids).logits
            model.save_pretrained(tmp_path / "again")
            model.tie_weights()
            assert torch.equal(model(ids).logits, expected)
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
            assert torch.equal(again(ids).logits, expected)
            assert torch.equal(copy.deepcopy(again)(ids).logits, expected)

    def test_generation_equals_the_dense_matrix_put_in_place(self, make_model, compressed, architecture, tmp_path):
        folder, name = compressed(architecture)[0], EMBEDDINGS[architecture]
        model = AutoModelForCausalLM.from_pretrained(folder)
        dense = AutoModelForCausalLM.from_pretrained(make_model(architecture))
        with torch.no_grad():
            for target, module in model.named_modules():
                if isinstance(module, Coded | Table):
                    dense.get_submodule(target).weight.copy_(module.dense().T if module.spec.conv1d else module.dense())
        ids = torch.arange(3, 9)[None]
        wanted = dense.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)
        export_dense(str(folder), tmp_path / "dense")
        for same in (model.dequantize(), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
            assert type(same.get_input_embeddings()) is type(dense.get_input_embeddings())
            tied = same.get_output_embeddings().weight is same.get_submodule(name).weight
            assert tied == (architecture in TIED)
            with torch.no_grad():
                torch.testing.assert_close(same(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_tied_head_multiplies_and_lookups_do_not(make_model, compressed):
    ids, work = torch.arange(3, 9)[None], []  # few enough for tiles to be multiplied as they are
    for folder in (make_model("qwen3"), compressed("qwen3")[0]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            work.append(counted(model, lambda model=model: model(ids))[0])
    assert work[0].multiply_adds == work[1].multiply_adds
    assert work[1].weight_bytes < 0.7 * work[0].weight_bytes  # levels and heads of tiles are much of so small a model


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_a_table_may_be_offloaded(compressed, tmp_path, device):
    folder = compressed("gemma3")[0]
    expected = AutoModelForCausalLM.from_pretrained(folder)
    names = ["model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(3))]
    layout = {**dict.fromkeys(names, "cpu"), "model.embed_tokens": device, "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=layout, offload_folder=tmp_path / "off")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("metric", "propagation"),
    [("two_sided", "sequential"), ("plain", "one_pass"), ("trace", "one_pass"), ("input", "sequential")],
)
def test_every_metric_and_both_ways_of_propagation(make_model, tmp_path, metric, propagation):
    method = {"name": "ecsq", "metric": metric, "propagation": propagation, "toward_dense": 0.0}
    (found, _), _ = perplexity_said(
        make_model("gemma3"), tmp_path / "out", method=method, ratio=0.7, target=["model.embed_tokens", "*.mlp.*"]
    )
    assert found == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert 0.7 <= report["ratio"]["stored"] < 0.705


def test_an_untied_head_needs_no_matrix_of_the_vocabularys_gradients(llama, tmp_path, monkeypatch):
    """Only the squares of every logit's gradient are added up."""
    from lrcompress.calibration import gradients

    def refuse(total, rows, rest=None):
        assert rows.shape[1] < 320
        return add_gram(total, rows, rest)

    add_gram = gradients.add_gram
    monkeypatch.setattr(gradients, "add_gram", refuse)
    method = {"name": "ecsq", "metric": "two_sided"}
    target = ["lm_head", "model.embed_tokens", "*.q_proj"]
    (found, _), _ = perplexity_said(llama, tmp_path / "out", method=method, ratio=0.7, target=target)
    assert found == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)
    formats = {t["name"]: t["format"] for t in json.loads((tmp_path / "out/report.json").read_text())["targets"]}
    assert (formats["lm_head"], formats["model.embed_tokens"]) == ("coded", "table")


def test_files_that_hold_the_tied_matrix_under_the_heads_name_alone(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(make_model("qwen3"), tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    whole = {"method": ECSQ, "ratio": 0.7, "target": ["model.embed_tokens"]}
    compress_tiny(tmp_path / "model", tmp_path / "out", **whole)
    compress_tiny(make_model("qwen3"), tmp_path / "same", **whole)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "same"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_other_methods_and_tied_heads_are_refused_in_words(make_model, tmp_path):
    with pytest.raises(InputError, match="names the input embeddings, which this method does not compress"):
        compress_tiny(make_model("qwen3"), tmp_path / "out", target=["*embed*"])
    with pytest.raises(InputError, match="name the embeddings"):
        compress_tiny(make_model("qwen3"), tmp_path / "out", method=ECSQ, target=["lm_head"])
    with pytest.raises(InputError, match="tied weight"):
        compress_tiny(make_model("qwen3"), tmp_path / "out", target=["lm_head"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tied", [3, {"lm_head": 3}, {"lm_head": "model.norm"}, {"model.embed_tokens": "model.embed_tokens"}]
)
def test_an_impossible_tie_is_refused(tied):
    entry = {"format": "table", "shape": [9, 5], "length": 40}
    data = {"quant_method": "lrcompress", "format_version": 1, "modules": {"model.embed_tokens": entry}, "tied": tied}
    with pytest.raises(InputError, match="ties output heads"):
        Manifest.from_json(data)


@pytest.mark.parametrize(("architecture", "metric"), [("gemma3", "two_sided"), ("llama", "input")])
def test_kept_statistics_and_resumed_work_end_with_the_same_bytes(
    make_model, tmp_path, monkeypatch, architecture, metric
):
    from lrcompress.pipeline import compress
    from lrcompress.stages import backward, profile

    whole = {"method": {"name": "ecsq", "metric": metric}, "ratio": 0.7, "target": ["model.embed_tokens"]}
    plain = compress_tiny(make_model(architecture), tmp_path / "plain", **whole)
    stage = backward if metric == "two_sided" else profile
    real = stage.decompose_block

    def interrupted(opened, block, *rest):
        if block == len(opened.blocks) + 1:
            raise KeyboardInterrupt
        return real(opened, block, *rest)

    monkeypatch.setattr(stage, "decompose_block", interrupted)
    with pytest.raises(Interrupted):
        compress_tiny(make_model(architecture), tmp_path / "again", **whole)
    monkeypatch.setattr(stage, "decompose_block", real)
    again = compress(make_recipe({**plain.report["recipe"], "output": str(tmp_path / "again")}), resume=True)
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    first, second = (compress_tiny(make_model(architecture), tmp_path / name, **whole) for name in ("first", "second"))
    expected = (plain.folder / "model.safetensors").read_bytes()
    assert all((other.folder / "model.safetensors").read_bytes() == expected for other in (again, first, second))
