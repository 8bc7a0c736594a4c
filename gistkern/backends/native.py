"""The compiled extension (csrc/): whether it is there, and its operators. It is optional everywhere."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from gistkern.kernels.arguments import AttentionArguments, DecodeArguments, PoolWrite
from gistkern.rows import dense_rows

__all__ = [
    "INTERFACE",
    "LIBRARY",
    "VARIANTS",
    "compact",
    "compact_into",
    "cuda_archs",
    "decode_rows",
    "instruction_set",
    "is_broken",
    "library_path",
    "missing",
    "missing_cuda",
    "operators",
    "pool_compact",
    "pool_decode",
    "prepared_decode",
    "prepared_pool_decode",
]

# kernels of gistkern/decode.h; "automatic" chooses by shape
VARIANTS = {"automatic": 0, "simt": 1, "tensor_core": 2}
# a library to load instead of the installed one: tests build some of their own (csrc/build_extension.py)
LIBRARY = "GISTKERN_LIBRARY"
_TORCH = (2, 10)
# of the operators in csrc/ that this package calls
INTERFACE = 4


def library_path() -> Path:
    """Where the library is, or would be."""
    return Path(os.environ.get(LIBRARY) or Path(__file__).parents[1] / "_C.so")


def _load() -> str | None:
    path = library_path()
    if not path.is_file():
        return (
            f"needs the compiled extension, which is not built (no {path}): install with a C++ compiler and "
            "`pip install --no-build-isolation`, see docs/internals/extension.md"
        )
    if _is_torn(path):
        return (
            f"needs the compiled extension, but {path} is torn (shorter than it says, or no ELF file): build it again"
        )
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _TORCH:
        return f"needs torch >= {_TORCH[0]}.{_TORCH[1]} (libtorch's stable ABI), this is {torch.__version__}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"needs the compiled extension, which does not load: {error}"
    try:
        found = torch.ops.gistkern_native.interface()
        torch.ops.gistkern_native.instruction_set()
    except (AttributeError, RuntimeError) as error:
        return f"needs the compiled extension, which does not work here: {str(error).splitlines()[0]}"
    if found != INTERFACE:
        return f"needs interface {INTERFACE} of the compiled extension, {path} has {found}: build it again"
    return None


def _is_torn(path: Path) -> bool:
    """Whether an ELF file ends before its section headers do: loading such a file kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return True
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + size * count


# once, at import: what is asked at every call must not touch files, which torch.compile could not trace
_MISSING = _load()
_CUDA_ARCHS = "" if _MISSING else torch.ops.gistkern_native.cuda_archs()


def missing() -> str | None:
    """Why there is no extension here, or None."""
    return _MISSING


def is_broken() -> bool:
    """Whether a library is there and cannot be used, although this torch is recent enough for it."""
    return _MISSING is not None and library_path().is_file() and not _MISSING.startswith("needs torch")


def missing_cuda() -> str | None:
    """Why the extension has no CUDA kernels, or None."""
    if _MISSING or _CUDA_ARCHS:
        return _MISSING
    return "needs the extension's CUDA kernels: rebuild it where nvcc is, see docs/internals/extension.md"


def operators():
    """The extension's operators (csrc/bindings.cpp). RuntimeError where there is no extension."""
    if reason := missing():
        raise RuntimeError(f"gistkern {reason}")
    return torch.ops.gistkern_native


def instruction_set() -> str:
    """Which compiled CPU kernels run here: avx512, avx2 or baseline (``GISTKERN_CPU_ISA`` chooses)."""
    return operators().instruction_set()


def cuda_archs() -> str:
    """Chips that the CUDA kernels were compiled for (``80;90a``); empty in a build without nvcc.

    ``emulated`` in a test build, whose CUDA kernels run on CPU tensors (docs/internals/evidence.md).
    """
    return _CUDA_ARCHS


def compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compaction kernel into new rows; arguments as `gistkern.rows.compact`. A filler is zeros."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    out = k.new_empty(shape), v.new_empty(shape)
    rows = [None if t is None else dense_rows(t) for t in (k, v, past_k, past_v)]
    operators().compact(*rows, gather, None, *out, None, None)
    return out


def compact_into(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """The gathered rows alone, written to `out_k` and `out_v`, which lie alike; arguments as `gistkern.rows`."""
    operators().compact(dense_rows(k), dense_rows(v), None, None, gather, None, out_k.data, out_v.data, None, None)


def decode_rows(arguments: AttentionArguments, multiprocessors: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The decode kernel on the arguments of an attention call with at most 8 query rows."""
    return _decoder(arguments, multiprocessors)(*arguments.buffers)


def prepared_decode(
    arguments: AttentionArguments, multiprocessors: int = 1
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """`decode_rows` as a function of q, k, v, gist_k and gist_v alone; None where a tensor's D is not contiguous.

    They may have any number of local rows, the last of which is the last query's own. Strides are as they are here.
    """
    if any(tensor.stride(-1) != 1 for tensor in arguments.buffers):
        return None
    return _decoder(arguments, multiprocessors)


def _decoder(arguments: AttentionArguments, multiprocessors: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    begin, end, local = arguments.intervals
    rows, scale, variant = arguments.gist_k.shape[2], arguments.scale, VARIANTS["automatic"]
    decode = operators().decode.default

    def decoded(q, k, v, gist_k, gist_v):
        vectors = None, None, begin, end, k, v, None, None, None, local, None
        return decode(q, gist_k, gist_v, *vectors, rows, k.shape[2], scale, variant, multiprocessors)

    return decoded


def pool_decode(arguments: DecodeArguments, multiprocessors: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The decode kernel over a pool and a paged tail."""
    tail_k, pages = arguments.tail_k, arguments.page_table
    tail_capacity = tail_k.shape[2] if pages is None else pages.shape[1] * tail_k.shape[1]
    buffers = {name: dense_rows(getattr(arguments, name)) for name in ("q", "gist_k", "gist_v", "tail_k", "tail_v")}
    vectors = {
        name: vector.contiguous()
        for name in ("gist_begin", "gist_end", "tail_length", "local_begin", "page_table")
        if (vector := getattr(arguments, name)) is not None
    }
    *tensors, capacity, scale = arguments._replace(**buffers, **vectors)
    return operators().decode(*tensors, capacity, tail_capacity, scale, VARIANTS["automatic"], multiprocessors)


def prepared_pool_decode(
    arguments: DecodeArguments, multiprocessors: int = 1
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """`pool_decode` over a tail of floats without pages, as a function of the tensors alone.

    Those are q, the pool (KeyValueRows), tail_k, tail_v, gist_begin, gist_end, tail_length and local_begin, the vectors
    contiguous. The tail may have any number of rows; strides are as they are here. None where a row's D is not
    contiguous.
    """
    rows = arguments.q, arguments.gist_k, arguments.gist_v, arguments.tail_k, arguments.tail_v
    if any(tensor.stride(-1) != 1 for tensor in rows):
        return None
    capacity, scale, variant = arguments.gist_capacity, arguments.scale, VARIANTS["automatic"]
    decode = operators().decode.default

    def decoded(q, pool, tail_k, tail_v, begin, end, length, local):
        return decode(
            *(q, pool.key, pool.value, pool.key_scale, pool.value_scale, begin, end, tail_k, tail_v, None, None),
            *(length, local, None, capacity, tail_k.shape[2], scale, variant, multiprocessors),
        )

    return decoded


def pool_compact(arguments: PoolWrite) -> None:
    """The compaction kernel into a pool."""
    k, v, gather, slot, *pool = arguments
    operators().compact(dense_rows(k), dense_rows(v), None, None, gather, slot.contiguous(), *pool)
