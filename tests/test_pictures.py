"""Calibration on images beside text: the language model reads what the whole model makes of both."""

import copy
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers as t
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lrcompress.calibration import corpus
from lrcompress.calibration.collect import token_weights
from lrcompress.calibration.corpus import documents, parse_source, split_held_out, tokenise
from lrcompress.calibration.pictures import Looker
from lrcompress.errors import InputError, ResourceError
from lrcompress.model.probing import check_look
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages import backward, profile
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request
from tests.architectures import VOCABULARY, wrappers
from tests.conftest import compress_tiny

SPECIAL = ["<image>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
WORDS = "the quick brown fox jumps over a lazy dog while many others look on and wonder".split()
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}</s>{% endfor %}"
)
OWN_CODE = '''
import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class SmallProcessor(ProcessorMixin):
    """As processors whose videos need torchvision; for an image without a grid 64 squares of 4 x 4 and their places."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<image>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs):
        text, read = list(text) if isinstance(text, list) else [text], {}
        if images:
            read = self.image_processor(images=images, return_tensors="pt")
            if "image_grid_thw" not in read:
                squares = read["pixel_values"].unflatten(2, (8, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 3, 5, 1)
                places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), dim=-1)
                count = len(squares)
                read = {
                    "pixel_values": squares.reshape(count, 64, 48),
                    "image_position_ids": places.reshape(1, 64, 2).expand(count, 64, 2),
                }
            grids = read.get("image_grid_thw", torch.full((len(read["pixel_values"]),), 64))
            for grid in grids:
                text[0] = text[0].replace("<image>", "<place>" * int(grid.prod() // 4), 1)
            text[0] = text[0].replace("<place>", "<image>")
        words = self.tokenizer(text, return_tensors="pt")
        read["mm_token_type_ids"] = (words["input_ids"] == self.tokenizer.convert_tokens_to_ids("<image>")).int()
        return BatchFeature({**words, **read})
'''


def gemma3():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.Gemma3Config(
        text_config=t.Gemma3TextConfig(
            num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=256, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"], bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes,
        ),
        vision_config=t.SiglipVisionConfig(
            image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            vision_use_head=False,
        ),
        mm_tokens_per_image=4, image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip


def config_of(kind):
    return copy.deepcopy(gemma3() if kind == "gemma3" else wrappers()[kind][0])


@pytest.fixture(scope="module")
def words(prose):
    """A tokenizer whose token 300 is an image's, behind 298 pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [prose[:100_000]],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    return raw


def tokenizer_of(kind, raw):
    extra = {"image_token": "<image>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_special_tokens({"pad_token": "</s>"})
    if kind == "gemma3":
        tokenizer = t.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=extra
        )
    return tokenizer


def save_processor(kind, raw, folder):
    tokenizer = tokenizer_of(kind, raw)
    assert tokenizer.convert_tokens_to_ids("<image>") == 300
    if kind == "llava":
        pictures = t.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
        made = t.LlavaProcessor(
            pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        )  # fmt: skip
    elif kind == "gemma3":
        pictures = t.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        made = t.Gemma3Processor(
            pictures, tokenizer, image_seq_length=4, chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|>")
        )
    made.save_pretrained(folder)


def small_processor(kind, raw, folder):
    (folder / "processing_small.py").write_text(OWN_CODE)
    tokenizer_of(kind, raw).save_pretrained(folder)
    if kind == "qwen3_vl":
        sizes = {"shortest_edge": 256, "longest_edge": 2048}
        pictures = t.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=sizes)
    else:
        pictures = t.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False, do_normalize=False)
    pictures.save_pretrained(folder)
    own = {"processor_class": "SmallProcessor", "auto_map": {"AutoProcessor": "processing_small.SmallProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(own))
    place = "<|vision_start|><image><|vision_end|>"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", place))


@pytest.fixture(scope="module")
def multimodal(once, words):
    """multimodal(kind): the folder of a tiny model with a processor of its own."""

    def make(folder, kind):
        torch.manual_seed(0)
        dense = AutoModelForImageTextToText.from_config(config_of(kind)).eval()
        with torch.no_grad():
            for parameter in dense.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        dense.save_pretrained(folder)
        (save_processor if kind in ("llava", "gemma3") else small_processor)(kind, words, folder)

    return lambda kind: once(f"{kind} pictures", lambda folder: make(folder, kind))


def picture(path, seed, size=(40, 30)):
    raw = random.Random(seed).randbytes(3 * size[0] * size[1])
    Image.frombytes("RGB", size, raw).save(path)


def said(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def pairs(once):
    """A file of thirteen records, the last of which is held out: pairs, chats, one without an image, two images in one."""

    def make(folder):
        folder.mkdir()
        for number in range(5):
            picture(folder / f"{number}.png", number, (40 + 8 * number, 30))
        user = [
            {"type": "text", "text": said(1, 3)},
            {"type": "image", "path": "1.png"},
            {"type": "image", "path": "2.png"},
        ]
        rows = [{"image": f"{i % 5}.png", "text": said(i, 3 + 2 * i)} for i in range(9)]
        rows += [
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": said(2, 5)}]},
            {"images": ["3.png"], "conversations": [{"from": "human", "value": f"<image>\n{said(3, 4)}"},
                                                    {"from": "gpt", "value": said(4, 6)}]},
            {"text": said(5, 9)},
            {"image": "4.png", "text": said(6, 8)},
        ]  # fmt: skip
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return once("pairs", make) / "pairs.jsonl"


def by_hand(folder, pairs, kind):
    """What the folder's own processor makes of the first twelve records, written down here once more."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    user = [{"type": "text", "text": said(1, 3)}, {"type": "image"}, {"type": "image"}]
    chats = [
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said(i, 3 + 2 * i)}]}], [i % 5])
        for i in range(9)
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": said(2, 5)}]}
    chats.append(([{"role": "user", "content": user}, answer], [1, 2]))
    answer = {"role": "assistant", "content": [{"type": "text", "text": said(4, 6)}]}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said(3, 4)}]}
    chats.append(([asked, answer], [3]))
    found = []
    for messages, numbers in chats:
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [Image.open(pairs.parent / f"{number}.png") for number in numbers]
        found.append(processor(text=[text], images=[images], return_tensors="pt"))
    found.append(processor(text=[said(5, 9)], return_tensors="pt"))
    return found


@pytest.fixture
def gathered(monkeypatch):
    """Site or group to statistics, as they are decomposed by."""
    found = {}

    def noting(decompose):
        def note(opened, block, statistics, *more):
            found.update({"sites": opened.sites, **statistics, **found})
            return decompose(opened, block, statistics, *more)

        return note

    monkeypatch.setattr(profile, "decompose_block", noting(profile.decompose_block))
    monkeypatch.setattr(backward, "decompose_block", noting(backward.decompose_block))
    return found


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("llava", "centred"), *((kind, "two_sided") for kind in ("llava", "qwen3_vl", "gemma3", "gemma4"))],
)
def test_statistics_are_those_of_the_whole_model_on_its_processors_inputs(
    multimodal, pairs, gathered, tmp_path, kind, metric
):
    folder = multimodal(kind)
    result = compress_tiny(
        folder, tmp_path / "out", method={"name": "lord", "metric": metric, "sink_share": 0.125},
        calibration={"source": str(pairs), "samples": 12, "seqlen": 128}, trust_remote_code=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    sites = gathered["sites"]
    outputs = {site.name: site.by_outputs for site in sites}
    inputs, gradients = {site.name: [] for site in sites}, {site.name: [] for site in sites}

    def note(name):
        def hook(module, args, output):
            rows = args[0].detach().double().flatten(0, -2)
            weights = token_weights(len(rows), 0.125).double()
            summed = output.detach().double().flatten(0, -2) if outputs[name] else rows
            second = summed.T @ (summed * weights[:, None])
            inputs[name].append((weights.sum(), (rows * weights[:, None]).sum(0), second))
            output.register_hook(lambda g: gradients[name].append(g.double().flatten(0, -2)))

        return hook

    for site in sites:
        model.get_submodule(site.name).register_forward_hook(note(site.name))
    images = tokens = 0
    for reads in by_hand(folder, pairs, kind):
        output = model(**reads, use_cache=False)
        labels = reads["input_ids"][0].masked_fill(reads["input_ids"][0] == 300, -100)
        torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), labels[1:], reduction="sum").backward()
        images, tokens = images + ((labels[1:] == -100).any()), tokens + len(labels)
    assert images == 11
    assert result.report["calibration"]["tokens"] == tokens
    assert result.report["calibration"]["images"] == 12
    for site in sites:
        one = gathered.get(site.name) or gathered[site.group]
        count, total, second = (sum(parts) for parts in zip(*inputs[site.name], strict=True))
        assert one.count == pytest.approx(float(count))
        assert (one.total - total).norm() < 1e-4 * total.norm()
        assert (one.second - second).norm() < 1e-4 * second.norm()
        if metric == "two_sided":
            rows = torch.cat(gradients[site.name])
            expected = rows.T @ rows / len(rows)
            assert (one.gradients - expected).norm() < 1e-3 * expected.norm()
    assert "held_out" in result.report


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": {"name": "lord", "propagation": "sequential"}, "allocator": "sensitivity"},
        {"method": {"name": "lord", "metric": "plain"}, "target": ["re:visual.(blocks|merger)"]},
    ],
    ids=["language model", "tower"],
)
def test_held_out_records_are_read_with_their_images_by_the_compressed_model(multimodal, pairs, tmp_path, recipe):
    folder = multimodal("qwen3_vl")
    result = compress_tiny(
        folder, tmp_path / "out", **recipe,
        calibration=[{"source": str(pairs), "samples": 6, "seqlen": 128},
                     {"source": "python-docs", "samples": 2, "seqlen": 128}],
        trust_remote_code=True, ratio=0.3,
    )  # fmt: skip
    assert "target" in recipe or result.report["calibration"]["images"] >= 5
    loaded = AutoModelForImageTextToText.from_pretrained(result.folder).eval()
    processor = AutoProcessor.from_pretrained(result.folder, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said(6, 8)}]}]
    text = processor.apply_chat_template(chat, tokenize=False)
    reads = processor(text=[text], images=[[Image.open(pairs.parent / "4.png")]], return_tensors="pt")
    opened_text = documents(parse_source("python-docs"))
    held = split_held_out(tokenise(opened_text, processor.tokenizer))[1][:128]
    total = count = 0
    for one in (reads, {"input_ids": held[None]}):
        labels = one["input_ids"][0].masked_fill(one["input_ids"][0] == 300, -100)[1:]
        with torch.no_grad():
            logits = loaded(**one).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert result.report["held_out"]["windows"] == 2
    assert result.report["held_out"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)


@pytest.mark.parametrize("metric", ["input", "two_sided"])
def test_places_of_images_are_no_lookups(multimodal, pairs, gathered, tmp_path, metric):
    folder = multimodal("llava")
    compress_tiny(
        folder, tmp_path / "out", method={"name": "ecsq", "metric": metric}, ratio=0.7,
        calibration={"source": str(pairs), "samples": 12, "seqlen": 128},
        target=["model.language_model.embed_tokens", "*language_model*q_proj"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    rows, texts = [], []

    def note(module, args, output):
        output.requires_grad_(True).register_hook(lambda g: rows.append(g.double().flatten(0, -2)))

    model.get_input_embeddings().register_forward_hook(note)
    model.requires_grad_(False)
    for reads in by_hand(folder, pairs, "llava"):
        ids = reads["input_ids"][0]
        labels = ids.masked_fill(ids == 300, -100)
        texts.append(ids[ids != 300])
        logits = model(**reads, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").backward()
    lookups = gathered["model.language_model.embed_tokens"].lookups
    if metric == "input":
        assert torch.equal(lookups.counts, torch.bincount(torch.cat(texts), minlength=VOCABULARY).double())
    else:
        gradients = torch.cat(rows)
        expected = gradients.T @ gradients / len(torch.cat(texts))
        assert (lookups.gradients - expected).norm() < 1e-3 * expected.norm()


def recipe_of(folder, pairs, output, **more):
    return make_recipe({
        "model": str(folder), "method": {"name": "lord", "metric": "input"}, "ratio": 0.2, "output": str(output),
        "calibration": {"source": str(pairs), "samples": 4, "seqlen": 64, **more.pop("text", {})}, **more,
    })  # fmt: skip


def test_records_are_read_once(multimodal, pairs, tmp_path, monkeypatch):
    """By a run; of a finished one that is asked for again only where they name images, which may have changed."""
    reads, read = [], corpus.read_records
    monkeypatch.setattr(corpus, "read_records", lambda path, wanted: reads.append(path) or read(path, wanted))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a sentence of number {n} " * 9}) + "\n" for n in range(40)))
    for source, again in ((pairs, [pairs]), (text, [])):
        asked = recipe_of(multimodal("llava"), source, tmp_path / source.stem)
        report = compress(asked).report
        assert ("calibration images" in report["made_from"]) == (source == pairs)
        assert reads == [source]
        assert compress(asked, resume=True).report == report
        assert reads == [source, *again]
        reads.clear()


def test_images_of_held_out_records_are_watched_where_no_text_is_calibrated_on(multimodal, pairs, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "own")
    own = tmp_path / "own" / "pairs.jsonl"
    asked = recipe_of(multimodal("llava"), own, tmp_path / "out", method={"name": "lord", "metric": "plain"})
    report = compress(asked).report
    assert compress(asked, resume=True).report == report
    picture(own.parent / "0.png", 70)  # of a record that is not held out
    assert compress(asked, resume=True).report == report
    picture(own.parent / "4.png", 71)
    with pytest.raises(InputError, match="calibration images changed"):
        compress(asked, resume=True)


def test_another_image_is_other_calibration_data(multimodal, pairs, tmp_path):
    shutil.copytree(pairs.parent, tmp_path / "own")
    own, folder = tmp_path / "own" / "pairs.jsonl", multimodal("llava")
    first = compress(recipe_of(folder, own, tmp_path / "out"))
    again = compress(recipe_of(folder, own, tmp_path / "again"))
    assert again.report["calibration"]["sha256"] == first.report["calibration"]["sha256"]
    assert compress(recipe_of(folder, own, tmp_path / "out"), resume=True).report == first.report
    for number in range(5):
        picture(own.parent / f"{number}.png", 50 + number)
    with pytest.raises(InputError, match="calibration images changed"):
        compress(recipe_of(folder, own, tmp_path / "out"), resume=True)
    other = compress(recipe_of(folder, own, tmp_path / "other"))
    assert other.report["calibration"]["sha256"] != first.report["calibration"]["sha256"]
    assert other.report["calibration"]["tokens"] == first.report["calibration"]["tokens"]


def test_ends_of_long_records_are_left_out_and_said(multimodal, pairs, tmp_path, capsys):
    folder = multimodal("llava")
    cut = {"samples": 9, "seqlen": 48}
    rows = pairs.read_text().splitlines()[:9]
    short = pairs.parent / "short.jsonl"
    try:
        short.write_text("\n".join(rows) + "\n")
        result = compress(recipe_of(folder, short, tmp_path / "out", text=cut), reporter=Reporter())
        printed = " ".join(capsys.readouterr().err.split())
    finally:
        short.unlink()
    lengths = [len(reads["input_ids"][0]) for reads in by_hand(folder, pairs, "llava")[:9]]
    assert min(lengths) < 48 < max(lengths)
    assert result.report["calibration"]["tokens"] == sum(min(48, length) for length in lengths)
    assert f"{sum(length > 48 for length in lengths)} records are longer than 48 tokens" in printed
    with pytest.raises(InputError, match="record .* to the end of its last image, --seqlen is 20: use a longer"):
        compress(recipe_of(folder, pairs, tmp_path / "no", text={"samples": 4, "seqlen": 20}))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"image": "none.png", "text": "a"}, "record 1 of .*: image .*none.png does not exist"),
        ({"image": "broken.png", "text": "a"}, "record 1 of .*: image .*broken.png cannot be read .*whole picture"),
        ({"image": "0.png", "caption": "a"}, r"record 1 of .*: it has no text in field 'text' \(it has: image, caption\)"),
        ({"image": "0.png", "text": " "}, "record 1 of .*: it has no text"),
        ({"image": 7, "text": "a"}, "record 1 of .*: an image is named by int: name its file"),
        ({"images": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "<image> a"}]},
         "record 1 of .*: it names 2 images for 1 places"),
        ({"image": "0.png", "text": "<image><image> a"}, "record 1 of .*processor .*as many images as marks"),
        ({"image": "0.png", "messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]},
         "record 1 of .*: a message has a part of type 'video'"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read_are_named(multimodal, pairs, tmp_path, row, sentence):
    shutil.copy(pairs.parent / "0.png", tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes((pairs.parent / "0.png").read_bytes()[:90])
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=sentence) as error:
        compress(recipe_of(multimodal("llava"), tmp_path / "a.jsonl", tmp_path / "out", text={"samples": 1}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_are_missed_before_any_is_read(multimodal, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Looker, "sample", lambda *args: pytest.fail("it read one"))
    shutil.copy(pairs.parent / "0.png", tmp_path / "0.png")
    rows = [{"image": name, "text": "a"} for name in ("0.png", "none.png")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(InputError, match="record 2 of .*none.png does not exist"):
        compress(recipe_of(multimodal("llava"), tmp_path / "a.jsonl", tmp_path / "out", text={"samples": 2}))


def test_what_cannot_read_images_says_so(multimodal, pairs, llama, tmp_path):
    with pytest.raises(
        InputError, match="record 1 of .* has an image, and .* reads text alone: write the text to a file"
    ):
        compress(recipe_of(llama, pairs, tmp_path / "out"))
    bare = tmp_path / "bare"
    shutil.copytree(multimodal("llava"), bare)
    (bare / "processor_config.json").unlink()
    with pytest.raises(InputError, match="no processor of images .* copy its processor files there"):
        compress(recipe_of(bare, pairs, tmp_path / "out"))
    with pytest.raises(InputError, match="only text is read here: write the text to a file of its own"):
        documents(parse_source(str(pairs)))
    for asked, option in (({"max_loss": 0.5, "ratio": None}, "--max-loss"), ({"refine": 0.1}, "--refine")):
        with pytest.raises(InputError, match=f"{option} reads text alone, the calibration data has images"):
            compress(recipe_of(multimodal("llava"), pairs, tmp_path / "out", **asked))
    compress(recipe_of(bare, "python-docs", tmp_path / "text"))


def test_without_pillow_the_package_is_named(multimodal, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_vision_available", lambda: False)
    with pytest.raises(InputError, match="pip install pillow"):
        compress(recipe_of(multimodal("llava"), pairs, tmp_path / "out"))


def test_a_processor_without_a_template_gets_its_own_marks(multimodal, pairs, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(multimodal("llava"), folder)
    (folder / "chat_template.jinja").unlink()
    rows = [json.loads(row) for row in pairs.read_text().splitlines()]
    own = pairs.parent / "plain.jsonl"
    try:
        own.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        result = compress(recipe_of(folder, own, tmp_path / "out"))
    finally:
        own.unlink()
    processor = AutoProcessor.from_pretrained(folder)
    expected = [processor.tokenizer(row["text"]).input_ids for row in rows[:4]]
    assert result.report["calibration"]["tokens"] == sum(map(len, expected)) + 4 * 16


def test_the_records_of_the_documentation_are_read(multimodal, pairs, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "compressing.md").read_text(encoding="utf8")
    rows = [line for line in text.splitlines() if line.startswith("{") and "cat.png" in line]
    assert len(rows) == 2
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copy(pairs.parent / "0.png", tmp_path / "cat.png")
    given = recipe_of(multimodal("llava"), tmp_path / "pairs.jsonl", tmp_path / "out", text={"samples": 2})
    assert compress(given).report["calibration"]["images"] == 2


def test_blocks_that_only_images_reach_are_named(multimodal, pairs):
    recipe = recipe_of(multimodal("llava"), pairs, "unused")
    opened = open_request(check_request(recipe), Reporter(quiet=True))
    sample = next(sample for sample in opened.calibration.samples if sample.images)
    check_look(opened.walker, sample)
    silent = opened.walker.blocks.pop()
    with pytest.raises(InputError, match=f"{silent} runs only where there are images.*: calibrate on text alone"):
        check_look(opened.walker, sample)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(multimodal, pairs, tmp_path, monkeypatch):
    folder, decompose = multimodal("gemma4"), profile.decompose_block
    asked = {"trust_remote_code": True, "text": {"seqlen": 128}}

    def stop(opened, block, *more):
        if block == 1:
            raise ResourceError("the disk is full")
        return decompose(opened, block, *more)

    whole = compress(recipe_of(folder, pairs, tmp_path / "whole", **copy.deepcopy(asked)))
    monkeypatch.setattr(profile, "decompose_block", stop)
    with pytest.raises(ResourceError):
        compress(recipe_of(folder, pairs, tmp_path / "out", **copy.deepcopy(asked)))
    monkeypatch.setattr(profile, "decompose_block", decompose)
    result = compress(recipe_of(folder, pairs, tmp_path / "out", **copy.deepcopy(asked)), resume=True)
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (whole.folder, result.folder))
    assert one == two
