"""Reading the calibration text, and grouping the targets by what they read."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from lrcompress.calibration.corpus import narrow_text
from lrcompress.calibration.drawing import Calibration, calibration_blocks
from lrcompress.calibration.pictures import TEXT_ONLY, Looker
from lrcompress.errors import InputError
from lrcompress.model.experts import experts_of
from lrcompress.model.limits import check_tokens, length_warning, reads_images
from lrcompress.model.probing import check_look, probe
from lrcompress.model.skeleton import library_errors
from lrcompress.model.targets import group_sites, towers
from lrcompress.precision import wide
from lrcompress.protocols import Site
from lrcompress.report.progress import Reporter
from lrcompress.stages.opened import Opened

FEW_TOKENS = 4
"""Calibration tokens for every number of the widest input, below which its second moment is mostly chance."""


def calibrate_model(opened: Opened, reporter: Reporter) -> None:
    """Read the text, probe the model with its first block of tokens, group the sites by their inputs.

    A method that needs no statistics still gets the held-out windows, to judge the result by.
    """
    recipe = opened.request.recipe
    tokenizer = opened.model.tokenizer(trust_remote_code=recipe.trust_remote_code)
    wanted = opened.request.method.needs_statistics
    if wanted and (narrow := narrow_text([source for source, _, _ in opened.request.sources], "--calibration")):
        reporter.say(narrow)
    opened.calibration = calibration_blocks(
        opened.request.drawn,
        tokenizer,
        recipe.seed,
        opened.model.folder,
        opened.request.windows,
        trust_remote_code=recipe.trust_remote_code,
        looker=lambda which: _looker(opened, which),
    )
    samples = [*opened.calibration.samples, *opened.calibration.unseen]
    if not samples:
        raise InputError("the calibration text has no held-out window to judge the result by: use more text")
    for note in opened.calibration.notes:
        reporter.say(note)
    check_tokens(torch.cat([sample.words for sample in samples]), opened.vocabulary, recipe.model)
    if warning := length_warning(opened.skeleton, max(map(len, samples))):
        reporter.warn(f"--seqlen: {warning}")
    if wanted:
        _warn_few_tokens(opened, opened.calibration, reporter)
    text = next((sample for sample in samples if sample.look is None), samples[0])  # whose calls serve for all of text
    looked = next((sample for sample in samples if sample.look is not None), None)
    cure = "are its config and its code those of its files? --method ecsq --set metric=plain runs no block"
    try:
        with torch.no_grad(), library_errors(f"model {recipe.model} cannot be run as its config says", cure):
            groups = probe(opened.walker, text.words, [site.name for site in opened.sites if not site.lookup])
            if looked is not None:
                check_look(opened.walker, looked)
    except InputError as error:
        if wanted or recipe.max_loss is not None or recipe.refine is not None:
            raise
        reporter.warn(f"not judged by held-out text, for {error}")
        opened.calibration = Calibration([], [], opened.calibration.length)
        return
    opened.unread = [site.name for site in opened.sites_of(len(opened.blocks)) if site.name not in groups]
    if wanted and opened.unread:
        raise InputError(_unread_in_words(opened))
    opened.sites = _by_outputs(group_sites(opened.sites, groups), opened)


def _warn_few_tokens(opened: Opened, calibration: Calibration, reporter: Reporter) -> None:
    """Said before the work: how many tokens there are, and how wide the inputs, is known by then."""
    widest = max(site.shape[1] for site in opened.sites)
    if calibration.tokens < FEW_TOKENS * widest:
        samples = math.ceil(FEW_TOKENS * widest / calibration.length)
        reporter.warn(
            f"{calibration.tokens} calibration tokens are few for inputs of {widest} numbers: take at least "
            f"{FEW_TOKENS * widest} (--samples {samples}), more if you have them"
        )


def _unread_in_words(opened: Opened) -> str:
    """Why targets have no statistics, and what to do: by their weights alone, or without them."""
    first, count = opened.unread[0], len(opened.unread)
    said = f"no text reaches {first}" + (f" and {count - 1} other targets" if count > 1 else "")
    alone = "compress by the weights alone, --method ecsq --set metric=plain"
    if count == len(opened.sites):
        return f"{said}, so that nothing says what they read: {alone}"
    beside = towers(opened.skeleton, opened.blocks)
    parts = {next((part for part in beside if f"{name}.".startswith(f"{part}.")), name) for name in opened.unread}
    ignored = " ".join(f"--ignore '{part}*'" for part in sorted(parts))
    return f"{said}, so that nothing says what they read: leave them out with {ignored}, or {alone}"


def _looker(opened: Opened, which: str) -> Looker:
    """What reads records with images, of which `which` is one; InputError where the model or its folder cannot."""
    recipe = opened.request.recipe
    if not reads_images(opened.skeleton):
        raise InputError(f"{which} has an image, and {recipe.model} reads text alone: {TEXT_ONLY}")
    processor = opened.model.processor(trust_remote_code=recipe.trust_remote_code)
    config: Any = opened.skeleton.config
    named = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
    if not any(isinstance(token, int) for token in named):
        named = [getattr(processor, "image_token_id", None), *(getattr(processor, "image_token_ids", None) or ())]
    return Looker(processor, {token for token in named if isinstance(token, int)})


def _by_outputs(sites: list[Site], opened: Opened) -> list[Site]:
    """The sites, marked where statistics are of outputs: of weights alone in their groups, of no expert.

    None where blocks compute in half precision: its outputs are rounded, its inputs are what the layer really reads.
    Nor where the wide dtype is float32, for then decompositions need a factor of the inputs' Gram.
    """
    if opened.walker.dtype != torch.float32 or wide(opened.walker.device) != torch.float64:
        return sites
    sizes = Counter(site.group for site in sites)
    method = opened.request.method

    def alone(site: Site) -> bool:
        return sizes[site.group] == 1 and experts_of(site.name, opened.experts) is None

    return [replace(site, by_outputs=alone(site) and method.outputs_suffice(site)) for site in sites]
