"""Public names that load on first use, so that importing a package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

__all__ = ["loaded_on_use"]


def loaded_on_use(
    package: str, exports: Mapping[str, str], submodules: Sequence[str] = ()
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package whose public names stand in other modules.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    exports : mapping of str to str
        The module of each public name.
    submodules : sequence of str
        Names of public modules of the package, which need no import of their own either.
    """

    def load(name: str) -> object:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(exports), load, lambda: sorted([*exports, *submodules])
