"""llama.cpp's own block types, rounded in the metric of the inputs."""

from typing import ClassVar

from torch import Tensor

from lrcompress.bases.base import BASES, BaseOptions, ComputedBase
from lrcompress.errors import InputError, nearest
from lrcompress.formats import DENSE
from lrcompress.formats.ggml import Ggml
from lrcompress.ggml.file_types import fitting
from lrcompress.ggml.rounding import round_weight
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.protocols import Spec


@BASES.register
class GgmlBase(ComputedBase):
    """ggml:TYPE, stored as `ggml`, byte for byte as a GGUF file holds it.

    Rows that are no whole blocks get what llama-quantize falls back to; where that does not fit either, the weight
    stays dense.
    """

    name: ClassVar[str] = "ggml"
    example: ClassVar[str] = "ggml:Q4_K"
    paper: ClassVar[str] = "https://github.com/ggml-org/llama.cpp"
    needs_gram: ClassVar[bool] = True

    def __init__(self, arguments: list[str], options: BaseOptions) -> None:
        super().__init__([argument.upper() for argument in arguments], options)
        if len(arguments) != 1:
            raise InputError(f"base {self.text!r} is not understood: write ggml:TYPE, such as {self.example}")
        self.kind = self.arguments[0]
        if self.kind not in BLOCK_TYPES:
            raise InputError(
                f"base {self.text!r} has an unknown block type: {nearest(self.kind, list(BLOCK_TYPES))}; "
                "mixtures such as Q4_K_M are for --type"
            )

    def spec(self, shape: tuple[int, int], site: str = "") -> Spec:
        kind = fitting(self.kind, shape[1])
        return Spec(Ggml.name, shape, parameters={"type": kind}) if kind in BLOCK_TYPES else Spec(DENSE, shape)

    def encode(self, weight: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        kind = BLOCK_TYPES[fitting(self.kind, weight.shape[1])]
        return Ggml.encode(round_weight(kind, weight, gram), None)
