"""Batches of a chunk that is not finished yet, appended as they come: a kill loses the batch in work and no other.

A record is its length (8 bytes), its SHA-256 (32) and a safetensors blob. What a kill tore at the end is cut off when
the journal is opened again, and so is everything from the first record on that makes no sense: its batch is computed
again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gistkern.cache.file import finite
from gistkern.files import UnreadableError

__all__ = ["Journal"]

_HEAD = 8 + 32


def _locked(path: Path) -> BinaryIO:
    """The file, locked; a killed process's lock is gone."""
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            raise UnreadableError(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise RuntimeError(
                f"{path} is being written by another process: give every process its own rank, or wait"
            ) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            raise RuntimeError(f"{path} cannot be locked ({error}): its file system must know flock") from error
        file.close()  # between opening and locking whoever held it has deleted it: that lock guards no name


def _record(blob: bytes) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Batch and tensors of a record; None if they are no batch's."""
    try:
        tensors = load(blob)
        batch, numbers = tensors.pop("batch"), tensors["numbers"]
        rows, digests = tensors["rows"], tensors["digests"]
    except (SafetensorError, KeyError, AssertionError, ValueError, RuntimeError):
        return None
    makes_sense = (
        len(tensors) == 3
        and (batch.shape, batch.dtype, numbers.dtype, digests.dtype) == ((), torch.int64, torch.int64, torch.uint8)
        and (rows.dim(), rows.is_floating_point(), numbers.dim(), digests.dim()) == (5, True, 2, 2)
        and (numbers.shape[1], digests.shape) == (3, (len(numbers), 8))
        and bool(((numbers >= 0) & (numbers < 2**31)).all() and (numbers[:, 1] > 0).all())
        and int(numbers[:, 0].sum()) == len(rows)
        and rows.shape[2] == 2
        and rows.itemsize > 1
        and finite(rows)
    )
    return (int(batch), tensors) if makes_sense else None


class Journal:
    """Records of one chunk, by batch.

    Parameters
    ----------
    path : Path
        The file; it is locked for as long as the journal is open.

    Attributes
    ----------
    done : dict of int to dict of str to Tensor
        Whole records, by the number of their batch.

    Raises
    ------
    RuntimeError
        If another process writes the same journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _locked(path)
        self.done = self._recover()

    def _recover(self) -> dict[int, dict[str, torch.Tensor]]:
        found: dict[int, dict[str, torch.Tensor]] = {}
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        end = 0
        while len(head := self._file.read(_HEAD)) == _HEAD:
            length = int.from_bytes(head[:8], "little")
            if length > size - self._file.tell():
                break  # before so much is read
            blob = self._file.read(length)
            record = _record(blob) if hashlib.sha256(blob).digest() == head[8:] else None
            if record is None or record[0] in found:
                break
            kind = record[1]["rows"].shape[1:], record[1]["rows"].dtype
            if any((one["rows"].shape[1:], one["rows"].dtype) != kind for one in found.values()):
                break  # of another model
            end = self._file.tell()
            found[record[0]] = record[1]
        self._file.truncate(end)
        return found

    def add(self, batch: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append a record; it is on disk when this returns."""
        blob = save({**tensors, "batch": torch.tensor(batch)})
        self._file.seek(0, os.SEEK_END)
        self._file.write(len(blob).to_bytes(8, "little") + hashlib.sha256(blob).digest() + blob)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[batch] = dict(tensors)

    def close(self, delete: bool = False) -> None:
        """Let the lock go, and with `delete` the file."""
        if delete:
            self.path.unlink()
        self._file.close()
