"""Registers our formats with transformers, and with PEFT, when, and only when, these are imported.

Importing transformers takes seconds; `lrcompress --help` must not. So a finder waits for the import. The wheel's
lrcompress.pth has every Python of the environment import this, so that a program that knows nothing of us loads our
checkpoints: nothing is imported here that Python has not loaded itself.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_WATCHED = {
    "transformers.quantizers": "lrcompress.checkpoint.integration",
    "peft.tuners.lora.layer": "lrcompress.checkpoint.peft_integration",
}
"""A module of theirs to the module of ours that its import brings in."""


def register_with_transformers() -> None:
    """Register now what is loaded already, the rest as soon as it is."""
    for name, ours in _WATCHED.items():
        if name in sys.modules:
            _register(ours)
        elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name))


class _Finder:
    """Finds nothing itself: wraps the loader of the watched module so that registration follows its execution."""

    def __init__(self, name: str) -> None:
        self.name, self._looking = name, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._looking:
            return None
        from importlib.util import find_spec

        self._looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self._inner, self._finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register(_WATCHED[self._finder.name])


def _register(ours: str) -> None:
    """Import a module of ours; where theirs is of another version than it needs, programs that do without us go on."""
    try:
        importlib.import_module(ours)
    except (ImportError, AttributeError) as error:
        import warnings

        said = f"lrcompress cannot load its checkpoints here ({error}): install the versions that it names"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
