"""Registries: a method, format, allocator or base is one file in its package, found here by name."""

import importlib
import pkgutil
from typing import Generic, TypeVar

from lrcompress.errors import InputError, nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by their `name`; the modules of `package` are imported at the first look-up."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._classes: dict[str, T] = {}
        self._loaded = False

    def register(self, cls: T) -> T:
        """Class decorator; a name that is taken is a programming error."""
        name = cls.name  # type: ignore[attr-defined]
        if name in self._classes:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._classes[name] = cls
        return cls

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> T:
        """The class registered as `name`; an unknown name is an InputError that names the nearest."""
        self._load()
        if name not in self._classes:
            raise InputError(f"unknown {self.kind} {name!r}: {nearest(name, list(self._classes))}")
        return self._classes[name]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True
