"""What a function calls, counted exactly: Python and C calls, operations on tensors, waits for the device.

Counts say on a machine without a GPU how long the host works beside it, and they are the same at every run.
"""

import collections
import gc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Calls", "Operations", "count", "functions"]

# on a GPU each of them waits for all that was queued before it
_WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item", "masked_select", "unique", "bincount")
_COPIES = ("cat", "copy_", "clone", "index", "gather", "index_select", "_to_copy")


class Calls(NamedTuple):
    """Calls of Python functions and of C functions."""

    python: int
    c: int

    def __sub__(self, other: "Calls") -> "Calls":
        return Calls(self.python - other.python, self.c - other.c)


def count(function: Callable[[], Any]) -> Calls:
    """Python and C calls of one call of `function`, itself among them.

    Of this thread: a backward on a GPU runs in another one, where Python has nothing to do but for custom functions.
    """
    events = _profiled(function, lambda frame, event, argument: event)
    return Calls(events["call"], events["c_call"])


def functions(function: Callable[[], Any]) -> collections.Counter[str]:
    """How often `function` calls which: Python functions by file and name, C functions by name."""

    def name(frame, event, argument) -> str:
        if event == "c_call":
            return f"C {getattr(argument, '__qualname__', argument)}"
        code = frame.f_code
        return f"{'/'.join(code.co_filename.split('/')[-3:])}:{code.co_qualname}"

    return _profiled(function, name)


def _profiled(function: Callable[[], Any], name: Callable[[Any, str, Any], str]) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()

    def profile(frame, event, argument):
        if event in ("call", "c_call") and argument is not sys.setprofile:
            found[name(frame, event, argument)] += 1

    collecting = gc.isenabled()
    gc.disable()  # what it calls falls on whoever allocates
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return found


class Operations(TorchDispatchMode):
    """Operations on tensors within the block, by name; those of them that wait for the device, by place; copied bytes.

    Attributes
    ----------
    names : Counter
        Of all operations.
    waits : Counter
        Of those whose answer the host reads: a GPU has to be done with all before. By name and calling line.
    copied : int
        Bytes that copying operations wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.copied = 0

    @property
    def total(self) -> int:
        """All operations."""
        return self.names.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        self.names[name] += 1
        if name in _COPIES and torch.is_tensor(out):
            self.copied += out.nbytes
        if name in _WAITS or (name.startswith("index") and _by_mask(args)):
            self.waits[name, _caller()] += 1
        return out


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose true elements have to be counted first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    return any(torch.is_tensor(one) and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _caller() -> str:
    """The line that asked for the operation: the nearest outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-3:])}:{frame.f_lineno}"
