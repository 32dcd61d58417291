"""Evaluations of the second model of a comparison, kept by content: models, text, settings, versions."""

import hashlib
from typing import Any

from torch import Tensor

from lrcompress.checkpoint.cache import note, recall
from lrcompress.evaluation.harness import Measured
from lrcompress.evaluation.tasks import Task
from lrcompress.evaluation.tokens import Divergence, Losses
from lrcompress.model.device import resolve_device
from lrcompress.recipe import EvaluateSpec
from lrcompress.report.summary import versions

SCHEMA = 1
"""Of the entries: one more whenever they, or what they are computed by, change without a new version."""


def circumstances(spec: EvaluateSpec, device: str) -> dict[str, Any]:
    """What else decides a result."""
    return {
        "schema": SCHEMA, "versions": versions(), "device": resolve_device(device).type, "dtype": spec.compute_dtype,
        "batch_size": spec.batch_size, "fewshot": spec.fewshot, "chat_template": spec.chat_template,
    }  # fmt: skip


class KeptScores:
    """Block by block, how two models did on the same tokens.

    Divergences need both models' predictions, so an entry belongs to the pair: another first model loads both again.
    """

    def __init__(self, digests: list[str], blocks: Tensor, how: dict[str, Any]) -> None:
        text = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
        self._key = {"models": digests, "blocks": [*blocks.shape], "tokens": text, "how": how}
        self._shape = blocks.shape

    def read(self) -> tuple[Losses, Losses, Divergence] | None:
        """None where there is no entry, or a broken one."""
        value = recall(self._key)
        count, scored = self._shape[0], self._shape[1] - 1
        lengths = [count] * 4 + [2, 1]
        if not isinstance(value, list) or len(value) != len(lengths):
            return None
        for part, length in zip(value, lengths, strict=True):
            if not isinstance(part, list) or len(part) != length or not all(isinstance(x, float) for x in part):
                return None
        return Losses(scored, value[0]), Losses(scored, value[1]), Divergence(*value[2:])

    def write(self, label: str, found: tuple[Losses, Losses, Divergence]) -> None:
        """Keep the values of every block."""
        ours, theirs, apart = found
        note(self._key, label, [ours.blocks, theirs.blocks, apart.kl, apart.top1, apart.spread, apart.floor])


class KeptTask:
    """A model's results on the items of an lm-eval task, which the first model's run has shown."""

    def __init__(self, digest: str, task: Task, asked: str, how: dict[str, Any]) -> None:
        self._key = {"model": digest, "task": task.key, "asked": asked, "how": how}
        self._asked = asked

    def read(self) -> Measured | None:
        """None where there is no entry, or a broken one."""
        value = recall(self._key)
        try:
            results = {name: {k: float(v) for k, v in found.items()} for name, found in value["results"].items()}
            items = {
                name: {metric: {int(i): float(v) for i, v in found.items()} for metric, found in metrics.items()}
                for name, metrics in value["items"].items()
            }
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        return Measured(results, items, self._asked)

    def write(self, label: str, found: Measured) -> None:
        """Keep the results and the values of every item."""
        note(self._key, label, {"results": found.results, "items": found.items})
