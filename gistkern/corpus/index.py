"""Where a document is: sorted hashes of names, so that millions open at once and are found by bisection."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gistkern.corpus.shard_file import replace_file

__all__ = ["INDEX", "hash_of", "read_index", "write_index"]

INDEX = "index.safetensors"


def hash_of(name: str) -> int:
    """64 bits of a name; files hold the names themselves, so a collision is seen."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def write_index(folder: Path, names: Iterable[Sequence[str]]) -> None:
    """Write the index of the names in each chunk; ValueError if a name is in two of them."""
    entries = [
        (hash_of(name), chunk, place, name) for chunk, known in enumerate(names) for place, name in enumerate(known)
    ]
    entries.sort()
    for (one, first, *_, name), (two, second, *_, other) in itertools.pairwise(entries):
        if one == two and name == other:
            raise ValueError(f"two documents are called {name!r}, in chunks {first} and {second}: names must differ")
    tensors: dict[str, np.ndarray] = {
        "hashes": np.array([entry[0] for entry in entries], dtype=np.int64),
        "chunks": np.array([entry[1] for entry in entries], dtype=np.int32),
        "places": np.array([entry[2] for entry in entries], dtype=np.int32),
    }
    temporary = folder / f".{INDEX}.{os.getpid()}.tmp"  # several processes may find the corpus complete
    save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
    replace_file(temporary, folder / INDEX)


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("hashes", "chunks", "places"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_index(folder: Path) -> dict[str, np.ndarray] | None:
    """Its arrays, memory-mapped; None if there is no index; ValueError if it is torn."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        kinds = {"I64": np.int64, "I32": np.int32}
        found: dict[str, np.ndarray] = {}
        for name in ("hashes", "chunks", "places"):
            begin, end = header[name]["data_offsets"]
            kind = kinds[header[name]["dtype"]]
            count = (end - begin) // np.dtype(kind).itemsize
            found[name] = np.memmap(path, kind, "r", offset=8 + size + begin, shape=(count,))
        if header["__metadata__"]["sha256"] != _checksum(found):
            raise ValueError("its checksum does not match")
        return found
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} is torn or no index ({error}): delete it, the files of the store are enough"
        ) from error
