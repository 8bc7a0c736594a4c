"""Key/value rows: a layer's keys and values quantized or not, quantizing them, and filling compact rows.

INT8 and FP8 (e4m3) rows have one scale per token and head: ``scale = max|x| / 127`` (or ``/ 448``), as in KV caches of
serving engines (Xiao et al. 2022, "SmoothQuant", section 2). What stands here in plain torch is the specification of
what csrc/ and kernels/ do, and what backends without kernels use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from gistkern.layout.arguments import check_count

__all__ = [
    "LARGEST",
    "KeyValueRows",
    "as_bytes",
    "check_gist_dtype",
    "compact",
    "compact_backward",
    "compact_into",
    "dense_rows",
    "dequantize",
    "dequantize_rows",
    "gather_rows",
    "quantize",
    "quantize_rows",
]

# the largest magnitude each element type holds
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class KeyValueRows:
    """Keys and values of one layer, quantized or not.

    Parameters
    ----------
    key, value : Tensor
        ``[..., D]``: a pool ``[R, Hkv, D]``, pages ``[P, page_size, Hkv, D]``, or tails ``[B, Hkv, M, D]``; float16,
        bfloat16, float32, or quantized: int8 or float8_e4m3fn.
    key_scale, value_scale : Tensor, optional
        fp32, the shape of `key` without D: what a quantized row is multiplied by.

    Raises
    ------
    ValueError
        If the tensors do not fit each other, or scales are missing or superfluous.

    Examples
    --------
    >>> pool = KeyValueRows.empty(100, kv_heads=2, head_dim=64, dtype=torch.int8)
    >>> pool.key.shape, pool.key_scale.shape, pool.nbytes
    (torch.Size([100, 2, 64]), torch.Size([100, 2]), 27200)
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # every layer of every call makes some: attributes only, and the questions one by one where the answer is no
        key, value = self.key, self.value
        if not (
            key.__class__ is value.__class__ is torch.Tensor
            and self.key_scale is self.value_scale is None
            and key.dtype is value.dtype
            and key.dtype in _FLOATS
            and key.device == value.device
            and key.shape == value.shape
            and key.ndim >= 3
            and key.shape[-1] > 0
        ):
            self._check()

    def _check(self) -> None:
        """Raise ValueError or TypeError that says what is wrong."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not torch.is_tensor(tensor) and (tensor is not None or field.name in ("key", "value")):
                raise TypeError(f"{field.name} must be a tensor, got {type(tensor).__name__}")
        if self.key.dim() < 3 or self.key.shape[-1] == 0:
            raise ValueError(f"key must be [..., rows, heads, D] with D at least 1, got {tuple(self.key.shape)}")
        if not self.key.is_floating_point() and not self.quantized:
            raise ValueError(f"keys and values are floats, int8 or float8_e4m3fn, got {self.key.dtype}")
        if self.key.shape != self.value.shape or self.key.dtype != self.value.dtype:
            raise ValueError(
                f"key and value must be alike, got {tuple(self.key.shape)} {self.key.dtype} and "
                f"{tuple(self.value.shape)} {self.value.dtype}"
            )
        for name in ("key_scale", "value_scale"):
            scale = getattr(self, name)
            if (scale is not None) != self.quantized:
                wanted = "needs fp32 scales" if self.quantized else "takes no scales"
                raise ValueError(f"{self.key.dtype} {wanted}, got {name}={'None' if scale is None else 'a tensor'}")
            if scale is not None and (scale.shape != self.key.shape[:-1] or scale.dtype != torch.float32):
                raise ValueError(
                    f"{name} must be torch.float32 of shape {tuple(self.key.shape[:-1])}, "
                    f"got {scale.dtype} of shape {tuple(scale.shape)}"
                )
        if len({t.device for t in self.tensors()}) > 1:
            raise ValueError(
                f"keys, values and scales are on {[str(t.device) for t in self.tensors()]}: use one device"
            )

    def __reduce__(self) -> tuple[Callable[..., KeyValueRows], tuple[torch.Tensor | torch.dtype, ...]]:
        """Float8 elements as bytes: plain pickle writes what it cannot read of them."""
        held = [t.view(torch.int8) if t.dtype in LARGEST else t for t in self.tensors()]
        return _unpickled, (self.key.dtype, *held)

    @classmethod
    def empty(
        cls,
        rows: int,
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> KeyValueRows:
        """An unwritten pool ``[rows, kv_heads, head_dim]``; int8 and float8_e4m3fn come with scales."""
        check_count("rows", rows)
        check_count("kv_heads", kv_heads, least=1)
        check_count("head_dim", head_dim, least=1)
        key, value = (torch.empty((rows, kv_heads, head_dim), dtype=dtype, device=device) for _ in range(2))
        if dtype not in LARGEST:
            return cls(key, value)
        scales = (torch.empty((rows, kv_heads), dtype=torch.float32, device=device) for _ in range(2))
        return cls(key, value, *scales)

    @property
    def quantized(self) -> bool:
        """Whether the elements are int8 or float8_e4m3fn."""
        return self.key.dtype in LARGEST

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are there: keys, values, and their scales if quantized."""
        return [tensor for field in fields(self) if (tensor := getattr(self, field.name)) is not None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> KeyValueRows:
        """`function` applied to keys, values and scales alike, to copy, move or pick whole rows.

        Of float8 elements it gets the bytes: torch has few kernels for them, and older versions none to pick rows.
        """
        key, value, *scales = self.tensors()
        key, value = (as_bytes(function, t) for t in (key, value))
        return KeyValueRows(key, value, *map(function, scales))


def check_gist_dtype(gist_dtype: torch.dtype | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless gist rows of a model of `dtype` (None: of any) can be held so."""
    if gist_dtype is None or gist_dtype in LARGEST or gist_dtype == dtype:
        return
    raise ValueError(f"gist_dtype must be torch.int8, torch.float8_e4m3fn or the model's {dtype}, got {gist_dtype}")


def quantize(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements ``[..., D]`` of `dtype`, rounded to nearest even, and fp32 scales ``[...]``, 0 for a row of zeros."""
    wide = rows.float()
    scale = wide.abs().amax(-1) / LARGEST[dtype]
    value = torch.where(scale[..., None] == 0, 0.0, wide / scale[..., None])
    if dtype == torch.int8:
        value = value.round()
    # a tiny row's scale is rounded to one of few subnormals, possibly down: its largest element is then beyond the type
    return value.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def dequantize(rows: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The rows as `dtype`; `scale` None where they are not quantized."""
    if scale is None:
        return rows.to(dtype)
    return (rows.float() * scale[..., None]).to(dtype)


def as_bytes(function: Callable[[torch.Tensor], torch.Tensor], elements: torch.Tensor) -> torch.Tensor:
    """What `function`, which looks at no value, makes of a tensor; float8 elements as their bytes meanwhile."""
    if elements.dtype not in LARGEST:
        return function(elements)
    return function(elements.view(torch.int8)).view(elements.dtype)


def _unpickled(dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor, *scales: torch.Tensor) -> KeyValueRows:
    return KeyValueRows(key.view(dtype), value.view(dtype), *scales)


def quantize_rows(rows: KeyValueRows, dtype: torch.dtype) -> KeyValueRows:
    """Rows as int8 or float8_e4m3fn with their scales."""
    (key, key_scale), (value, value_scale) = quantize(rows.key, dtype), quantize(rows.value, dtype)
    return KeyValueRows(key, value, key_scale, value_scale)


def dequantize_rows(rows: KeyValueRows, dtype: torch.dtype) -> KeyValueRows:
    """Rows as `dtype`, a float; the same object where they are."""
    if rows.key.dtype == dtype:
        return rows
    return KeyValueRows(dequantize(rows.key, rows.key_scale, dtype), dequantize(rows.value, rows.value_scale, dtype))


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous: kernels read whole rows of D, every other stride is free."""
    if tensor.stride(-1) == 1:
        return tensor
    if max(tensor.shape) >= 2**31:  # an expanded one, which no memory holds
        raise ValueError(f"a tensor must have fewer than 2^31 rows, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` (``[B, G]``, -1 for a filler that nobody sees) of ``[B, H, M, D]`` (scales: ``[B, H, M]``)."""
    batch, heads = (torch.arange(size, device=rows.device) for size in rows.shape[:2])
    # indices of whole rows: torch.gather takes one for every element, and is 2 to 9 times slower on CPU
    return rows[batch[:, None, None], heads[None, :, None], index.clamp(min=0)[:, None]]


def compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact rows ``[B, Hkv, past + G, D]`` of keys and values.

    k, v ``[B, Hkv, M, D]``; past_k, past_v ``[B, Hkv, past, D]`` or None; gather int64 ``[B, G]``.
    """
    gathered = gather_rows(k, gather), gather_rows(v, gather)
    if past_k is None or past_v is None:
        return gathered
    return torch.cat([past_k, gathered[0]], 2), torch.cat([past_v, gathered[1]], 2)


def compact_into(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """The rows that `gather` lists, written to `out_k` and `out_v` ``[B, Hkv, G, D]``, parts of larger buffers.

    Other parts of those may be saved for somebody's backward, which these rows are none of: no version counts them.
    """
    out_k.data.copy_(gather_rows(k, gather))
    out_v.data.copy_(gather_rows(v, gather))


def compact_backward(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients ``[B, Hkv, num_local, D]`` of k and v from those of the gathered rows; repeated tokens add up."""
    gradients = []
    for grad in (grad_gist_k, grad_gist_v):
        # a filler's gradient is zero, since nobody sees it: adding it to row 0 changes nothing
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = wide.new_zeros((*grad.shape[:2], num_local, grad.shape[3]))
        gradients.append(total.scatter_add_(2, _expanded(gather.clamp(min=0), grad), wide).to(grad.dtype))
    return gradients[0], gradients[1]


def _expanded(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
