"""A kernel with everything fixed but its buffers: launched by Triton's front end, or prepared, by addresses alone.

Triton binds, specializes and looks up at every launch, which is most of a launch's cost on the host
(docs/internals/host.md). All of it depends on what a plan fixes (data types, strides, integers) and on whether
addresses are multiples of 16 bytes. So the kernel that Triton chose once is kept, and run again on other addresses.
Tensors that stand askew, an interpreter, and a profiler that wants to hear of launches go through the front end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gistkern.kernels.device import guard

__all__ = ["Launch", "Steps"]

# of addresses, in bytes: what Triton asks of a pointer before it loads several elements at once
_ALIGNMENT = 16
_ASKEW = _ALIGNMENT - 1
_INT32 = 2**31
# kernels that Triton chose, by what it chose them by; beyond so many, tensors of ever new strides come by: start again
_MOST = 4096
_chosen: dict[Any, CompiledKernel] = {}
_address = torch.Tensor.data_ptr


class _Prepared(NamedTuple):
    """A kernel that Triton chose, and its fixed arguments."""

    run: Callable[..., None]
    programs: int
    function: int
    metadata: Any
    rest: tuple[Any, ...]


class Launch(NamedTuple):
    """One kernel: its grid of `programs`, and what stands behind its buffers.

    `numbers` are arguments that change no code; `constants` (constexprs, by name) follow them. All of it stands in the
    order of the kernel's parameters.
    """

    kernel: Any
    programs: int
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None  # Triton's own choice

    def __call__(self, device: torch.device, *buffers: Any) -> None:
        """Launch on tensors, by Triton's front end."""
        with guard(device):
            self.kernel[(self.programs,)](*buffers, *self.numbers, **self._options())

    def prepared(self, device: torch.device, types: tuple[Any, ...], buffers: tuple[Any, ...]) -> _Prepared | None:
        """What launches it on addresses; nothing is launched. None under an interpreter.

        `types` is all that `buffers` bring of what Triton specializes on beside alignment: data types and strides.
        Their addresses must be aligned.
        """
        if not isinstance(self.kernel, JITFunction):
            return None
        wide = tuple([isinstance(number, int) and not -_INT32 <= number < _INT32 for number in self.numbers])
        constants = tuple(self.constants.values())
        key = self.kernel, device, types, wide, constants, self.num_warps, self.num_stages
        chosen = _chosen.get(key)
        if chosen is None:
            with guard(device):
                chosen = self.kernel.warmup(*buffers, *self.numbers, grid=(self.programs,), **self._options())
            if not isinstance(chosen, CompiledKernel):
                return None
            if len(_chosen) >= _MOST:
                _chosen.clear()
            _chosen[key] = chosen
        with guard(device):
            run = chosen.run  # its first use loads the code
        return _Prepared(run, self.programs, chosen.function, chosen.packed_metadata, (*self.numbers, *constants))

    def _options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps}
        return self.constants | options | ({} if self.num_stages is None else {"num_stages": self.num_stages})


class Steps:
    """Launches that follow each other on one device, of tensors of the same types and strides at every call.

    Parameters
    ----------
    device : torch.device
        Where they run.
    vectors : tuple of Tensor
        Contiguous tensors that are the same at every call; they are kept.
    work : tuple of int
        How many fp32 elements each part of a workspace holds, which every call allocates.
    """

    def __init__(self, device: torch.device, vectors: tuple[torch.Tensor, ...], work: tuple[int, ...] = ()) -> None:
        self.device, self.vectors = device, vectors
        self.launches: list[tuple[Launch, tuple[Any, ...]]] = []
        self._vectors = tuple(map(_address, vectors))
        ends = [0]
        for count in work:  # each part aligned
            ends.append(ends[-1] + -(-4 * count // _ALIGNMENT) * _ALIGNMENT)
        self._parts, self._bytes = tuple(ends[:-1]), ends[-1]
        self._index = device.index if device.type == "cuda" else None
        self._prepares = True
        self._prepared: tuple[_Prepared, ...] | None = None
        self._stream: Callable[[int], int] = int  # unless prepared

    def add(self, launch: Launch, *types: Any) -> None:
        """One launch more; `types` as `Launch.prepared` takes them."""
        self.launches.append((launch, types))

    def run(self, tensors: tuple[torch.Tensor, ...], buffers_of: Callable[..., tuple[tuple[Any, ...], ...]]) -> None:
        """Launch on `tensors`.

        ``buffers_of(*tensors, *vectors, *parts of the workspace)`` tells each launch's buffers; it may be given
        addresses in the place of all of these.
        """
        work = None
        if self._bytes:
            work = torch.empty(self._bytes, dtype=torch.uint8, device=tensors[0].device)
        if self._prepares and not _hooked():
            addresses = (*map(_address, tensors), *self._vectors)
            if work is not None:
                first = work.data_ptr()
                addresses = (*addresses, *map(first.__add__, self._parts))
            if not reduce(or_, addresses) & _ASKEW and (self._prepared or self._prepare(tensors, work, buffers_of)):
                self._run_prepared(buffers_of(*addresses))
                return
        for (launch, _), buffers in zip(self.launches, buffers_of(*self._all(tensors, work)), strict=True):
            launch(self.device, *buffers)

    def _all(self, tensors: tuple[torch.Tensor, ...], work: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        parts = () if work is None else tuple([work[start:].view(torch.float32) for start in self._parts])
        return (*tensors, *self.vectors, *parts)

    def _prepare(self, tensors: Any, work: torch.Tensor | None, buffers_of: Callable[..., Any]) -> bool:
        calls = zip(self.launches, buffers_of(*self._all(tensors, work)), strict=True)
        found = [launch.prepared(self.device, types, buffers) for (launch, types), buffers in calls]
        self._prepares = None not in found
        if self._prepares:
            self._prepared, self._stream = tuple(found), driver.active.get_current_stream  # type: ignore[arg-type]
        return self._prepares

    def _run_prepared(self, calls: tuple[tuple[Any, ...], ...]) -> None:
        if self._index is not None and self._index != torch._C._cuda_getDevice():
            with guard(self.device):
                self._run_prepared(calls)
            return
        assert self._prepared is not None
        stream = self._stream(self._index or 0)
        for (run, programs, function, metadata, rest), buffers in zip(self._prepared, calls, strict=True):
            run(programs, 1, 1, stream, function, metadata, None, None, None, *buffers, *rest)


def _hooked() -> bool:
    """Whether somebody has asked Triton to tell of launches: it is not told of prepared ones."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
