"""A kernel with everything fixed but its buffers: launched by Triton's front end, or prepared, by addresses alone.

Triton binds, specializes and looks up at every launch, which is most of a launch's cost on the host
(docs/internals/host.md). All of it depends on what a plan fixes (data types, strides, integers) and on whether
addresses are multiples of 16 bytes. So the kernel that Triton chose once is kept, and run again on other addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from gistkern.kernels.device import guard

__all__ = ["ALIGNMENT", "Launch", "Prepared", "hooked", "stream_getter"]

# of addresses, in bytes: what Triton asks of a pointer before it loads several elements at once
ALIGNMENT = 16
_INT32 = 2**31
# kernels that Triton chose, by what it chose them by; beyond so many, tensors of ever new strides come by: start again
_MOST = 4096
_chosen: dict[Any, CompiledKernel] = {}


class Prepared(NamedTuple):
    """A kernel that Triton chose, and its fixed arguments."""

    run: Callable[..., None]
    programs: int
    function: int
    metadata: Any
    rest: tuple[Any, ...]

    def __call__(self, stream: int, *buffers: Any) -> None:
        """Launch on the current device; `buffers` as of `Launch`, with aligned addresses in the place of tensors."""
        run, programs, function, metadata, rest = self
        run(programs, 1, 1, stream, function, metadata, None, None, None, *buffers, *rest)


class Launch(NamedTuple):
    """One kernel: its grid of `programs`, and what stands behind its buffers.

    `numbers` are arguments that change no code, `constants` (constexprs) follow them; all of it in the order of the
    kernel's parameters.
    """

    kernel: Any
    programs: int
    numbers: tuple[Any, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int = 3

    def __call__(self, device: torch.device, *buffers: Any) -> None:
        """Launch on tensors, by Triton's front end."""
        with guard(device):
            self.kernel[(self.programs,)](*self._arguments(buffers), **self._options())

    def prepared(self, device: torch.device, types: tuple[Any, ...], *buffers: Any) -> Prepared | None:
        """What launches it on other tensors of the same `types`; nothing is launched. None under an interpreter.

        `types` is all that `buffers` bring of what Triton specializes on beside alignment: data types and strides.
        Their addresses must be aligned.
        """
        wide = tuple([isinstance(number, int) and not -_INT32 <= number < _INT32 for number in self.numbers])
        key = self.kernel, device, types, wide, self.constants, self.num_warps, self.num_stages
        chosen = _chosen.get(key)
        if chosen is None:
            with guard(device):
                chosen = self.kernel.warmup(*self._arguments(buffers), grid=(self.programs,), **self._options())
            if not isinstance(chosen, CompiledKernel):
                return None
            if len(_chosen) >= _MOST:
                _chosen.clear()
            _chosen[key] = chosen
        with guard(device):  # its first use loads the code
            run = chosen.run
        return Prepared(run, self.programs, chosen.function, chosen.packed_metadata, (*self.numbers, *self.constants))

    def _arguments(self, buffers: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*buffers, *self.numbers, *self.constants)

    def _options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def hooked() -> bool:
    """Whether a profiler has asked Triton to tell it of launches: it is not told of prepared ones."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def stream_getter() -> Callable[[int], int]:
    """Triton's own way to a device's current stream."""
    return driver.active.get_current_stream
