"""A kernel with everything fixed but its buffers: launched by Triton's front end, or prepared, by addresses alone.

Triton binds, specializes and looks up at every launch, which is most of a launch's cost on the host
(docs/internals/host.md). All of it depends on what a plan fixes (data types, strides, integers) and on whether
addresses are multiples of 16 bytes. So the kernel that Triton chose once is kept, and run again on other addresses.
Tensors that stand askew, an interpreter, and a profiler that wants to hear of launches go through the front end.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gistkern.kernels.device import guard

__all__ = ["ALIGNMENT", "Launch", "Steps", "hooked"]

# of addresses, in bytes: what Triton asks of a pointer before it loads several elements at once
ALIGNMENT = 16
_ASKEW = ALIGNMENT - 1
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

    def chosen(self, device: torch.device, types: tuple[Any, ...], buffers: tuple[Any, ...]) -> CompiledKernel | None:
        """The kernel that Triton chooses for such buffers, loaded; nothing is launched. None under an interpreter.

        `types` is all that `buffers` bring of what Triton specializes on beside alignment: data types and strides.
        Their addresses must be aligned.
        """
        if not isinstance(self.kernel, JITFunction):
            return None
        wide = tuple([isinstance(number, int) and not -_INT32 <= number < _INT32 for number in self.numbers])
        key = self.kernel, device, types, wide, tuple(self.constants.values()), self.num_warps, self.num_stages
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
                chosen.run  # noqa: B018 (its first use loads the code)
        return chosen

    @property
    def rest(self) -> tuple[Any, ...]:
        """The arguments behind the buffers."""
        return (*self.numbers, *self.constants.values())

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
    buffers_of : callable
        ``buffers_of(*tensors, *vectors, *parts of the workspace)`` tells each launch's buffers. It may be given
        addresses in the place of all of these.
    """

    def __init__(
        self,
        device: torch.device,
        vectors: tuple[torch.Tensor, ...],
        work: tuple[int, ...],
        buffers_of: Callable[..., tuple[tuple[Any, ...], ...]],
    ) -> None:
        self.device, self.vectors, self.buffers_of = device, vectors, buffers_of
        self.launches: list[tuple[Launch, tuple[Any, ...]]] = []
        self._vectors = tuple(map(_address, vectors))
        ends = [0]
        for count in work:  # each part aligned
            ends.append(ends[-1] + -(-4 * count // ALIGNMENT) * ALIGNMENT)
        self._parts, self._counts, self._bytes = tuple(ends[:-1]), work, ends[-1]
        self._index = device.index if device.type == "cuda" else None
        self._prepares = True
        self._kernels: tuple[CompiledKernel, ...] | None = None
        self._prepared: tuple[_Prepared, ...] | None = None
        self._stream: Callable[[int], int] = int  # unless prepared

    def on(self, vectors: tuple[torch.Tensor, ...]) -> Steps:
        """The same launches on other vectors of the same shapes."""
        other = copy(self)
        other.vectors, other._vectors = vectors, tuple(map(_address, vectors))
        return other

    def add(self, launch: Launch, *types: Any) -> None:
        """One launch more; `types` as `Launch.chosen` takes them."""
        self.launches.append((launch, types))

    def run(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Launch on `tensors`."""
        work = self.workspace(tensors[0].device)
        if self._prepares and not hooked():
            addresses = (*map(_address, tensors), *self._vectors)
            if work is not None:
                first = work.data_ptr()
                addresses = (*addresses, *map(first.__add__, self._parts))
            if not reduce(or_, addresses) & _ASKEW and (self._prepared or self._prepare(tensors, work)):
                self._run_prepared(self.buffers_of(*addresses))
                return
        buffers = self.buffers_of(*self.arguments(tensors, work))
        for (launch, _), given in zip(self.launches, buffers, strict=True):
            launch(self.device, *given)

    @property
    def prepared(self) -> bool:
        """Whether they have been launched by addresses."""
        return self._prepared is not None

    def workspace(self, device: torch.device) -> torch.Tensor | None:
        """Memory for what the launches hand to each other, if they do."""
        return torch.empty(self._bytes, dtype=torch.uint8, device=device) if self._bytes else None

    def arguments(self, tensors: tuple[torch.Tensor, ...], work: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What `buffers_of` takes."""
        if work is None:
            return (*tensors, *self.vectors)
        spans = zip(self._parts, self._counts, strict=True)
        parts = [work[first : first + 4 * count].view(torch.float32) for first, count in spans]
        return (*tensors, *self.vectors, *parts)

    def kernels(
        self, arguments: tuple[torch.Tensor, ...]
    ) -> list[tuple[CompiledKernel, tuple[int, int, int], tuple[Any, ...]]]:
        """Of each launch the kernel that Triton chose, its grid and its arguments; only of what is prepared."""
        assert self._kernels is not None
        every = zip(self._kernels, self.launches, self.buffers_of(*arguments), strict=True)
        return [(kernel, (launch.programs, 1, 1), (*given, *launch.rest)) for kernel, (launch, _), given in every]

    def _prepare(self, tensors: tuple[torch.Tensor, ...], work: torch.Tensor | None) -> bool:
        found = []
        for (launch, types), given in zip(self.launches, self.buffers_of(*self.arguments(tensors, work)), strict=True):
            kernel = launch.chosen(self.device, types, given)
            if kernel is None:
                self._prepares = False
                return False
            found.append(kernel)
        self._kernels, self._stream = tuple(found), driver.active.get_current_stream
        both = zip(found, self.launches, strict=True)
        self._prepared = tuple([_prepared(kernel, launch) for kernel, (launch, _) in both])
        return True

    def _run_prepared(self, calls: tuple[tuple[Any, ...], ...]) -> None:
        if self._index is not None and self._index != torch._C._cuda_getDevice():
            with guard(self.device):
                self._run_prepared(calls)
            return
        assert self._prepared is not None
        stream = self._stream(self._index or 0)
        for (run, programs, function, metadata, rest), buffers in zip(self._prepared, calls, strict=True):
            run(programs, 1, 1, stream, function, metadata, None, None, None, *buffers, *rest)


def _prepared(kernel: CompiledKernel, launch: Launch) -> _Prepared:
    return _Prepared(kernel.run, launch.programs, kernel.function, kernel.packed_metadata, launch.rest)


def hooked() -> bool:
    """Whether somebody has asked Triton to tell of launches: it is not told of prepared ones."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
