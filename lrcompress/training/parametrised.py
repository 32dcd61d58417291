"""Parametrisations: tensors made of what is trained."""

from collections.abc import Callable

from torch import Tensor, nn


class Stored(nn.Module):
    """A parametrisation of a stored tensor; between `hold` and what it returns, it gives what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self._held: Tensor | None = None

    def forward(self, trained: Tensor) -> Tensor:
        """The tensor for what is trained."""
        return self.make(trained) if self._held is None else self._held

    def make(self, trained: Tensor) -> Tensor:
        """`forward` where nothing is held."""
        raise NotImplementedError

    def hold(self, tensor: Tensor) -> Callable[[], None]:
        """Give `tensor`, whatever is trained, until what is returned is called."""
        self._held = tensor
        return self._release

    def _release(self) -> None:
        self._held = None


class SingularValues(Stored):
    """left · diag(relative) · right with left (a, r) or nothing and right (r, n) fixed: SVFit (arXiv 2409.05926).

    `right` carries the singular values, so that what is trained, (r,), begins at one and moves by fractions of them.
    """

    left: Tensor | None
    right: Tensor

    def __init__(self, left: Tensor | None, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def make(self, trained: Tensor) -> Tensor:
        scaled = trained[:, None] * self.right
        return scaled if self.left is None else self.left @ scaled

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained where nothing has been."""
        return weight.new_ones(len(self.right))


class Entries(Stored):
    """A tensor whose entries at `index` (k,) are trained, (k,), the others fixed."""

    base: Tensor
    index: Tensor

    def __init__(self, base: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.register_buffer("index", index)

    def make(self, trained: Tensor) -> Tensor:
        return self.base.flatten().index_copy(0, self.index, trained).view_as(self.base)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained where nothing has been."""
        return weight.flatten()[self.index]


class Fractions(Stored):
    """A tensor whose entries move by fractions of themselves: base times what is trained, which begins at one."""

    base: Tensor

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)

    def make(self, trained: Tensor) -> Tensor:
        return self.base * trained

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained where nothing has been."""
        return weight.new_ones(self.base.shape)
