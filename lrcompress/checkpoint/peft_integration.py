"""Merging a PEFT adapter into a stored format is refused in words; PEFT alone stops on the shape of an empty tensor.

Imported by `import lrcompress` as soon as PEFT's LoRA layers are (see _autoload).
"""

import functools
from typing import Any

from peft.tuners.lora.layer import Linear

from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear
from lrcompress.formats.low_rank import LENT

_merge = Linear.merge


@functools.wraps(_merge)
def _merge_into_dense(self: Any, *args: Any, **kwargs: Any) -> None:
    base = self.get_base_layer()
    if isinstance(base, StoredLinear):
        raise InputError(
            f"an adapter cannot be merged into a weight stored as {base.name}: put it on the dense model, "
            "PeftModel.from_pretrained(model.dequantize(), adapter)"
        )
    if getattr(base, LENT, False):
        raise InputError(
            "an adapter cannot be merged into a factor that several weights share (join=auto): put it on the dense "
            "model, PeftModel.from_pretrained(model.dequantize(), adapter)"
        )
    _merge(self, *args, **kwargs)


Linear.merge = _merge_into_dense
