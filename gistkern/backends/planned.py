"""A planned forward or backward as one call of the extension, which makes its results and launches its kernels.

What csrc/planned.cpp does at every call is described here once, of launches that Triton has chosen (kernels/launch.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from gistkern.backends import native
from gistkern.backends.launcher import describe
from gistkern.kernels.device import emulated, facts_of
from gistkern.kernels.launch import ALIGNMENT, Steps

__all__ = ["GIVEN", "PART", "RESULT", "PlannedCall", "planned_call"]

# of csrc/planned.cpp
GIVEN, FIXED, RESULT, PART = "given", "fixed", "result", "part"
_KINDS = {GIVEN: 0, FIXED: 1, RESULT: 2, PART: 3}
_ON_CPU = -1
# torch's ScalarType
_ELEMENTS = {
    **{torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15},
}


class PlannedCall:
    """The launches of a forward or backward on tensors of one kind.

    Parameters
    ----------
    description : torch.Tensor
        int64 on the CPU, as csrc/planned.cpp says.
    vectors : tuple of Tensor
        Tensors that are the same at every call; the description holds their addresses.
    addresses : tuple of int
        Where in the description.
    kernels : tuple
        Kept, so that the driver keeps the code that the description points to.
    """

    __slots__ = ("addresses", "description", "kernels", "output", "run", "vectors")

    def __init__(
        self,
        description: torch.Tensor,
        vectors: tuple[torch.Tensor, ...],
        addresses: tuple[int, ...],
        kernels: tuple[Any, ...],
    ) -> None:
        self.description, self.vectors, self.addresses, self.kernels = description, vectors, addresses, kernels
        native_operators = native.operators()
        # of (description, tensors): the results in new tensors, or none if a tensor is not of the kind described
        self.run = native_operators.run_planned.default._op  # beneath a Python function that only passes on
        # of (description, q, k, v, past_k, past_v): the one result of a forward, or None
        self.output = native_operators.planned_output.default._op

    def on(self, vectors: tuple[torch.Tensor, ...]) -> PlannedCall:
        """The same on other vectors of the same shapes."""
        numbers = array("q", self.description.numpy().tobytes())
        for at, vector in zip(self.addresses, vectors, strict=True):
            numbers[at] = vector.data_ptr()
        return PlannedCall(torch.frombuffer(numbers, dtype=torch.int64), vectors, self.addresses, self.kernels)


def planned_call(steps: Steps, tensors: Sequence[torch.Tensor], roles: Sequence[str | int]) -> PlannedCall | None:
    """Describe `steps`, which have run on `tensors`.

    Parameters
    ----------
    steps : Steps
        Prepared.
    tensors : sequence of Tensor
        As `Steps.run` took them.
    roles : sequence of str or int
        Of each of them: ``GIVEN`` by each call, a ``RESULT`` or a ``PART`` of the workspace, both contiguous, or the
        number of the tensor before it that stands in its place.

    Returns
    -------
    PlannedCall or None
        None where Triton's own launcher has to launch: without the extension, on AMD's chips, under an interpreter, or
        for kernels that take what `describe` does not know.
    """
    device = steps.device
    if native.missing() is not None or facts_of(device).amd:
        return None
    # an object for each, since objects tell them apart: a call may give one tensor twice where the next gives two
    alike: list[torch.Tensor] = []
    for tensor, role in zip(tensors, roles, strict=True):
        alike.append(alike[role] if isinstance(role, int) else tensor.detach())
    others = [tensor.detach() for tensor in steps.arguments((), steps.workspace(device))]
    kernels = steps.kernels((*alike, *others))
    slots = _Slots()
    for tensor, role in zip(alike, roles, strict=True):
        if not isinstance(role, int):
            slots.add(role, tensor)
    for number, tensor in enumerate(others):
        slots.add(FIXED if number < len(steps.vectors) else PART, tensor)
    try:
        launches = [describe(kernel, grid, values, slots.numbers) for kernel, grid, values in kernels]
    except (KeyError, ValueError, RuntimeError):
        return None
    head = [_ON_CPU if emulated() else device.index, slots.bytes, len(slots.numbers), len(launches)]
    numbers = array("q", (*head, *slots.entries))
    for launch in launches:
        numbers.extend((len(launch), *launch))
    addresses = tuple([len(head) + at for at in slots.fixed])
    code = tuple([kernel for kernel, _, _ in kernels])
    return PlannedCall(torch.frombuffer(numbers, dtype=torch.int64), steps.vectors, addresses, code)


class _Slots:
    """Entries of csrc/planned.cpp, the number of each tensor's by its id, and the bytes of the workspace.

    `fixed` is where among the entries the addresses of fixed ones stand.
    """

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.fixed: list[int] = []
        self.numbers: dict[int, int] = {}
        self.bytes = 0

    def add(self, role: str, tensor: torch.Tensor) -> None:
        """One slot more."""
        value, shape = 0, tensor.shape
        if role == GIVEN:
            value = ALIGNMENT
        elif role == FIXED:
            value = tensor.data_ptr()
            self.fixed.append(len(self.entries) + 2)
        elif role == PART:
            value = self.bytes
            self.bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.numbers[id(tensor)] = len(self.numbers)
        self.entries += (_KINDS[role], _ELEMENTS[tensor.dtype], value, len(shape), *shape, *tensor.stride())
