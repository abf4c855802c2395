"""Registers cloven with transformers when its quantizers are imported, not before: `import cloven` imports neither it nor torch."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"
_REGISTER = ("cloven.model.registration", "cloven.slip.scheme", "cloven.kv_shield.scheme", "cloven.private_lora.scheme")


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        register()


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of the watched module, once."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Register the quantisation method and the schemes, now."""
    if not hasattr(importlib.import_module(_REGISTER[0]), "ClovenQuantizer"):
        return  # it is being imported, imports transformers, and calls this function at its end
    for name in _REGISTER[1:]:
        importlib.import_module(name)


def install() -> None:
    """Register at once if transformers' quantizers are imported already, else as soon as they are."""
    if _WATCHED in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
