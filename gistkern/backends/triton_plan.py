"""What the calls of one layout launch, for tensors of one kind: worked out once, run many times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch

from gistkern.backends.hopper import ENVIRONMENT, HopperForward, MappedSteps, wanted
from gistkern.backends.hopper_backward import HopperBackward
from gistkern.backends.planned import GIVEN, PART, RESULT, PlannedCall, planned_call
from gistkern.kernels import configs
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.attn_bwd_dkv import plan_gist_attn_bwd_dkv
from gistkern.kernels.attn_bwd_dq import plan_gist_attn_bwd_dq
from gistkern.kernels.attn_fwd import plan_gist_attn_fwd
from gistkern.kernels.compact import plan_gist_compact
from gistkern.kernels.decode import plan_gist_decode
from gistkern.kernels.device import products_precision
from gistkern.kernels.fold import plan_gist_fold
from gistkern.kernels.launch import ALIGNMENT, Steps, hooked
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.rows import dense_rows

__all__ = ["TritonPlan"]


# launches that are described, of forwards and of backwards, by the kind of their tensors: what serves one layout serves
# others on their own vectors. Beyond so many, tensors of ever new shapes come by: start again
_MOST = 256
_known: dict[Any, _Forward | _Backward] = {}


class TritonPlan:
    """Forward and backward of one layout on q, k, v and past rows of the shapes, strides and type of those given.

    Parameters
    ----------
    q, k, v : Tensor
        As of `gistkern.gist_attention`; the calls bring others like them.
    past_k, past_v : Tensor, optional
        ``[B, Hkv, past, D]``.
    vectors : tuple of Tensor
        gist_begin, gist_end, local_begin and gather of a checked layout, contiguous, which stay as they are.
    scale : float
        Of the scores.
    in_room : bool
        Whether each call brings a buffer, of keys and of values, that holds its past rows and takes its new ones.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_k: torch.Tensor | None,
        past_v: torch.Tensor | None,
        vectors: tuple[torch.Tensor, ...],
        scale: float,
        in_room: bool = False,
    ) -> None:
        self.device, self.dtype, self.scale = q.device, q.dtype, scale
        self.vectors, self.in_room = vectors, in_room
        self.fp32, self.has_past = q.dtype == torch.float32, past_k is not None
        given = [q, k, v] if past_k is None or past_v is None else [q, k, v, past_k, past_v]
        self.copies = any(tensor.stride(-1) != 1 or tensor.is_neg() for tensor in given)
        self.past = 0 if past_k is None else past_k.shape[2]
        self.compact = self.past + vectors[3].shape[1]
        self.gathers = past_k is None or self.compact > self.past
        self.lse_shape = tuple(q.shape[:3])
        self.gist_shape = (*k.shape[:2], self.compact, k.shape[3])
        self.past_shape = (*k.shape[:2], self.past, k.shape[3])
        # all that decides which launches a call consists of, and on what they run but for addresses
        of = tuple([(tensor.shape, tensor.stride(), tensor.is_neg()) for tensor in given])
        sizes = tuple([vector.shape for vector in vectors])
        chosen = configs.changes, os.environ.get(ENVIRONMENT)
        self.kind = (of, self.has_past, q.dtype, q.device, sizes, scale, in_room, chosen)
        self._forward: _Forward | None = None
        self._backward: _Backward | None = None

    def again(
        self,
        whole: bool,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_k: torch.Tensor | None,
        past_v: torch.Tensor | None,
        room: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Sequence[Any] | None:
        """`forward` by one call of the extension (planned.py); unless `whole` it may hand back the output alone.

        None, and nothing has been launched, where tensors are of another kind than those that the plan was made for, or
        the calls are not described.
        """
        planned = self._forward
        if planned is None:
            planned = self._forward = _adopted((self.kind, _Forward), self.vectors)
        if planned is None or hooked() or (self.fp32 and planned.precision != products_precision(self.device)):
            return None
        call = planned.calls[whole]
        if call is None:
            return None
        if not whole:
            out = call.output(call.description, q, k, v, past_k, past_v)
            return None if out is None else (out, None, None, None)
        rows: tuple[Any, ...] = (past_k, past_v)
        given = (q, k, v) if past_k is None else (q, k, v, past_k, past_v)
        if room is not None:
            rows = room[0].narrow(2, 0, self.compact), room[1].narrow(2, 0, self.compact)
            given = (*given, *rows)
        found = call.run(call.description, given)
        if not found:
            return None
        return found if len(found) == 4 else (*found, *rows)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_k: torch.Tensor | None,
        past_v: torch.Tensor | None,
        room: tuple[torch.Tensor, torch.Tensor] | None = None,
        whole: bool = True,
    ) -> Sequence[Any]:
        """Output, LSE, and the compact rows ``[B, Hkv, G, D]`` of keys and values: the past ones where none are new.

        Unless `whole`, all but the output may be None.
        """
        found = self.again(whole, q, k, v, past_k, past_v, room)
        if found is not None:
            return found
        if self.copies:
            q, k, v = map(_dense, (q, k, v))
            past_k, past_v = (None if t is None else _dense(t) for t in (past_k, past_v))
        dtype, device = q.dtype, q.device
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # half the time of `torch.empty`
        lse = torch.empty(*self.lse_shape, dtype=torch.float32, device=device)
        if room is not None:
            gist_k, gist_v = room[0].narrow(2, 0, self.compact), room[1].narrow(2, 0, self.compact)
        elif self.gathers:
            gist_k = torch.empty(*self.gist_shape, dtype=dtype, device=device)
            gist_v = torch.empty_like(gist_k)
        else:
            assert past_k is not None
            assert past_v is not None
            gist_k, gist_v = past_k, past_v
        if past_k is None or past_v is None:
            past_k, past_v = k, v  # not read
        tensors = q, k, v, past_k, past_v, out, lse, gist_k, gist_v
        precision = products_precision(device) if self.fp32 else "ieee"  # the user's setting by now
        planned = self._forward
        if planned is None or planned.precision != precision or not planned.reaches(tensors):
            planned = self._forward = _Forward(self, tensors, precision)
        if planned.run(tensors, whole):
            _share((self.kind, _Forward), planned)
        return out, lse, gist_k, gist_v

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gist_k: torch.Tensor,
        gist_v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and the past rows of keys and values; k's and v's hold those of the gathered rows.

        Without atomics: two runs are bit-identical. Tensors may lie otherwise than in the forward: what offloads saved
        tensors brings them back contiguous.
        """
        given = grad_out, q, k, v, gist_k, gist_v, out, lse
        planned = self._backward
        if planned is None:
            planned = self._backward = _adopted((self.kind, _Backward), self.vectors)
        precision = products_precision(q.device) if self.fp32 else "ieee"
        if planned is not None and planned.call is not None and planned.key[-1] == precision and not hooked():
            found = planned.call.run(planned.call.description, given)
            if found:
                return tuple(found) if self.past else (*found, None, None)
        askew = any(tensor.data_ptr() % ALIGNMENT for tensor in given)  # beyond tensor maps
        key = (*(tensor.stride() for tensor in given), askew, precision)
        dense = (*map(_dense, given[:6]), out.contiguous(), lse.contiguous())
        if any(one is not other for one, other in zip(dense, given, strict=True)):
            return self.backward(*dense)
        if planned is None or planned.key != key:
            planned = self._backward = _Backward(self, given[:6], key)
        dq, dk = torch.empty_like(out), torch.empty_like(k, memory_format=torch.contiguous_format)
        past_k = dk
        if self.past:
            past_k = torch.empty(*self.past_shape, dtype=q.dtype, device=q.device)
        dv = torch.empty_like(dk)
        past_v = torch.empty_like(past_k) if self.past else dv
        if planned.run((*given, dq, dk, dv, past_k, past_v)):
            _share((self.kind, _Backward), planned)
        return (dq, dk, dv, past_k, past_v) if self.past else (dq, dk, dv, None, None)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`dense_rows`, of which the memory does not hold the negative."""
    return dense_rows(tensor.resolve_neg())


def _share(key: tuple[Any, ...], described: _Forward | _Backward) -> None:
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = described


def _adopted(key: tuple[Any, ...], vectors: tuple[torch.Tensor, ...]) -> Any:
    """What is known of such calls, on these vectors; None if nothing is."""
    known = _known.get(key)
    return None if known is None else known.on(vectors)


class _Forward:
    """The launches of a forward: compaction where rows are gathered, attention or decoding, the merge of its splits.

    Attributes
    ----------
    calls : dict of PlannedCall or None
        The same in one call of the extension, that hands back all that it makes (True) or the output alone (False).
    """

    def __init__(self, plan: TritonPlan, tensors: tuple[torch.Tensor, ...], precision: str) -> None:
        self.precision, merge = precision, None
        self.calls: dict[bool, PlannedCall | None] = {True: None, False: None}
        # copies are new at each call; rows in their room are wanted
        self.undescribed = set() if plan.copies else {True} if plan.in_room else {True, False}
        q, k, v, past_k, past_v, _, _, gist_k, gist_v = tensors
        arguments = AttentionArguments(q, k, v, gist_k, gist_v, *plan.vectors[:3], plan.scale)
        if q.shape[2] <= DECODE_ROWS:
            launch, merge = plan_gist_decode(arguments, precision)
        else:
            launch = plan_gist_attn_fwd(arguments, precision)
        splits, stats = 1 if merge is None else launch.numbers[-1], q.shape[:3].numel()
        work: tuple[int, ...] = () if merge is None else (splits * stats * q.shape[3], splits * stats)
        self.hopper = None
        if q.shape[2] > DECODE_ROWS and wanted("fwd", *arguments.buffers):
            self.hopper = HopperForward(arguments)
            work = self.hopper.work
        steps = Steps if self.hopper is None else MappedSteps
        self.steps = steps(plan.device, plan.vectors, work, self.buffers)
        self.strides = tuple(t.stride()[:3] for t in (q, k, v, past_k, past_v, gist_k, gist_v))
        self.compacts = plan.gathers and gist_k.numel() > 0
        if self.compacts:
            copies = plan_gist_compact(k, plan.past, plan.compact, plan.past if plan.in_room else 0)
            self.steps.add(copies, plan.dtype, self.strides[1:])
        for one in (launch,) if self.hopper is None else self.hopper.launches:
            self.steps.add(one, plan.dtype, self.strides, splits > 1)
        if merge is not None:
            self.steps.add(merge, plan.dtype)
        self.gathers, self.in_room, self.has_past = plan.gathers, plan.in_room, plan.has_past

    def reaches(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether the kernels chosen can read these addresses: tensor maps begin at multiples of 16 bytes."""
        return self.hopper is None or not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)

    def run(self, tensors: tuple[torch.Tensor, ...], whole: bool) -> bool:
        """Launch; what is launched a second time is described for `TritonPlan.again`. Returns whether it was by now."""
        describes = self.steps.prepared and whole in self.undescribed
        if describes:
            self.undescribed = self.undescribed - {whole}
            self.calls[whole] = planned_call(self.steps, tensors, self.roles(RESULT if whole else PART))
        self.steps.run(tensors)
        return describes

    def on(self, vectors: tuple[torch.Tensor, ...]) -> _Forward:
        """The same on another layout's vectors."""
        other = copy(self)
        other.steps = self.steps.on(vectors)
        other.calls = {whole: call and call.on(vectors) for whole, call in self.calls.items()}
        return other

    def roles(self, made: str) -> tuple[str | int, ...]:
        """Of the tensors that `buffers` takes, with the LSE and gathered rows `made` so (`planned_call`)."""
        past: tuple[str | int, ...] = (GIVEN, GIVEN) if self.has_past else (1, 2)  # k and v, which are not read
        rows: tuple[str | int, ...] = (GIVEN, GIVEN) if self.in_room else (made, made) if self.gathers else (3, 4)
        return GIVEN, GIVEN, GIVEN, *past, RESULT, made, *rows

    def buffers(
        self, q, k, v, past_k, past_v, out, lse, gist_k, gist_v, begin, end, start, gather, *parts
    ) -> tuple[tuple[Any, ...], ...]:
        """Those of each launch."""
        of_q, of_k, of_v, of_past_k, of_past_v, of_gist_k, of_gist_v = self.strides
        local = (k, of_k), (v, of_v)
        seen = ((q, of_q), *local, (gist_k, of_gist_k), (gist_v, of_gist_v))
        rule = begin, end, start
        if self.hopper is not None:
            calls = self.hopper.buffers((q, k, v, gist_k, gist_v), out, lse, rule, *parts)
        else:
            attention = (seen, *(parts or (out, lse)), rule)
            calls = (attention, (parts, out, lse)) if parts else (attention,)
        if not self.compacts:
            return calls
        return (((*local, (past_k, of_past_k), (past_v, of_past_v)), gather, seen[3:]), *calls)


class _Backward:
    """The launches of a backward for tensors of these strides: dq, compact rows, local rows, and both together.

    Attributes
    ----------
    call : PlannedCall or None
        The same in one call of the extension.
    """

    def __init__(self, plan: TritonPlan, tensors: tuple[torch.Tensor, ...], key: tuple[Any, ...]) -> None:
        grad_out, q, k, v, gist_k, gist_v = tensors
        self.key, precision, self.undescribed = key, key[-1], True
        self.call: PlannedCall | None = None
        arguments = AttentionArguments(q, k, v, gist_k, gist_v, *plan.vectors[:3], plan.scale)
        self.folds, self.has_past = gist_k.numel() > 0, plan.past > 0
        if wanted("bwd", *arguments.buffers, grad_out):
            self.steps: Steps = HopperBackward(arguments, plan.past).steps(plan.device, plan.vectors)
            return
        gist, chunks = plan_gist_attn_bwd_dkv(q, gist_k, grad_out, True, plan.scale, precision)
        local, _ = plan_gist_attn_bwd_dkv(q, k, grad_out, False, plan.scale, precision)
        stats, sums = q.shape[:3].numel(), chunks * gist_k.numel()
        work = (stats, stats, sums, sums) if self.folds else (stats, stats)
        self.steps = Steps(plan.device, plan.vectors, work, self.buffers)
        self.strides = tuple(t.stride()[:3] for t in tensors)
        of_grad, of_q, of_k, of_v, of_gist_k, of_gist_v = self.strides
        self.steps.add(plan_gist_attn_bwd_dq(arguments, precision), plan.dtype, self.strides)
        if self.folds:
            self.steps.add(gist, plan.dtype, (of_q, of_gist_k, of_gist_v, of_grad))
        self.steps.add(local, plan.dtype, (of_q, of_k, of_v, of_grad))
        if self.folds:
            self.of_parts = torch.empty(gist_k.shape, device="meta").stride()[:3]
            self.steps.add(plan_gist_fold(k, plan.past, plan.compact, chunks), plan.dtype, self.of_parts)

    def run(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """As `_Forward.run`."""
        describes = self.steps.prepared and self.undescribed
        if describes:
            self.undescribed = False
            past = (RESULT, RESULT) if self.has_past else (9, 10)  # dk and dv, where no row is written
            self.call = planned_call(self.steps, tensors, (*[GIVEN] * 8, RESULT, RESULT, RESULT, *past))
        self.steps.run(tensors)
        return describes

    def on(self, vectors: tuple[torch.Tensor, ...]) -> _Backward:
        """The same on another layout's vectors."""
        other = copy(self)
        other.steps, other.call = self.steps.on(vectors), self.call and self.call.on(vectors)
        return other

    def buffers(self, *values: Any) -> tuple[tuple[Any, ...], ...]:
        """Those of each launch."""
        grad_out, q, k, v, gist_k, gist_v, out, lse, dq, dk, dv, past_k, past_v, *rest = values
        begin, end, start, gather, rows_lse, delta, *sums = rest
        of_grad, of_q, of_k, of_v, of_gist_k, of_gist_v = self.strides
        queries, grad = (q, of_q), (grad_out, of_grad)
        local, gist = ((k, of_k), (v, of_v)), ((gist_k, of_gist_k), (gist_v, of_gist_v))
        stats, rule = (rows_lse, delta), (begin, end, start)
        by_rows = (queries, *local, *gist, grad), (out, lse), (dq, *stats), rule
        by_columns = (queries, *local, grad), stats, (dk, dv), (start, start)
        if not self.folds:
            return by_rows, by_columns
        part_k, part_v = sums
        by_gists = (queries, *gist, grad), stats, (part_k, part_v), (begin, end)
        fold = ((part_k, self.of_parts), (part_v, self.of_parts)), gather, (past_k, past_v), (dk, dv)
        return by_rows, by_gists, by_columns, fold
