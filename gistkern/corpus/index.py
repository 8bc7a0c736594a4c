"""Where a document is: sorted hashes of names, so that millions open at once and are found by bisection."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gistkern.corpus.tensor_file import TensorFile
from gistkern.files import UnreadableError, replacing

__all__ = ["INDEX", "hash_of", "read_index", "write_index"]

INDEX = "index.safetensors"
_KINDS = {"hashes": np.int64, "chunks": np.int32, "places": np.int32}


def hash_of(name: str) -> int:
    """64 bits of a name; files hold the names themselves, so a collision is seen."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def write_index(folder: Path, names: Iterable[Sequence[str]]) -> None:
    """Write the index of the names in each chunk; ValueError if a name is in two of them."""
    entries = [
        (hash_of(name), chunk, place, name) for chunk, known in enumerate(names) for place, name in enumerate(known)
    ]
    entries.sort()
    for (one, first, *_, name), (two, second, *_, other) in itertools.pairwise(entries):
        if one == two and name == other:
            raise ValueError(f"two documents are called {name!r}, in chunks {first} and {second}: names must differ")
    columns = zip(*(entry[:3] for entry in entries), strict=True)
    tensors: dict[str, np.ndarray] = {
        name: np.array(column, dtype=kind) for (name, kind), column in zip(_KINDS.items(), columns, strict=True)
    }
    with replacing(folder / INDEX) as draft:
        save_file(tensors, draft, metadata={"sha256": _checksum(tensors)})


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _KINDS:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_index(folder: Path) -> dict[str, np.ndarray] | None:
    """Its arrays; None if there is no index; ValueError if it is torn or says what no index says."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        file = TensorFile(path)
        file.require(set(_KINDS))
        found = {name: file.tensor(name).numpy() for name in _KINDS}
        if any(array.dtype != _KINDS[name] or array.ndim != 1 for name, array in found.items()):
            raise ValueError("it holds other arrays")
        if file.metadata.get("sha256") != _checksum(found):
            raise ValueError("its checksum does not match")
        if len({len(array) for array in found.values()}) != 1:
            raise ValueError("hashes, chunks and places are not equally many")
        if (found["hashes"][1:] < found["hashes"][:-1]).any():
            raise ValueError("hashes must be sorted")
        if any((found[name] < 0).any() for name in ("chunks", "places")):
            raise ValueError("chunks and places must not be negative")
        if len(np.unique(found["chunks"].astype(np.int64) << 32 | found["places"])) != len(found["places"]):
            raise ValueError("two names stand at one place")
    except ValueError as error:
        if not path.exists():  # its corpus has begun to grow
            return None
        if isinstance(error, UnreadableError):
            raise
        raise ValueError(
            f"{path} is torn or no index ({error}): delete it, the files of the store are enough"
        ) from error
    return found
