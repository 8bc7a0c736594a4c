"""Files of samples, as niah.py writes them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from passkey.global_tasks import GlobalSample
from passkey.niah import Sample

__all__ = ["read_samples"]


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of a JSON-lines file, or all; ValueError names the line that is no sample."""
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(_sample(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no sample of niah.py: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return samples


def _sample(entry: Any) -> Sample:
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object, got {entry!r:.40}")
    kind = GlobalSample if "task" in entry else Sample
    if "choices" in entry:
        entry["choices"] = tuple(entry["choices"])
    sample = kind(**entry)
    hints = get_type_hints(kind)
    for field in fields(sample):
        _check(field.name, getattr(sample, field.name), hints[field.name])
    if sample.tokens < 1:
        raise ValueError(f"tokens is {sample.tokens}")
    return sample


def _check(name: str, value: Any, kind: Any) -> None:
    """TypeError or ValueError unless `value` is what a field of this kind holds."""
    if kind == dict[str, str]:
        good, parts = isinstance(value, dict), [*value, *value.values()] if isinstance(value, dict) else []
    elif kind == tuple[str, ...]:
        good, parts = isinstance(value, tuple), [*value]
    else:
        good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        parts = [value] if kind is str else []
    if not good or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"{name} is {value!r:.40}")
    for part in parts:
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds half a surrogate pair, {part[error.start]!r}, which no text has") from error
