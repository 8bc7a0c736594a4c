"""Files of samples, as niah.py and global_tasks.py write them."""

from __future__ import annotations

import json
from pathlib import Path

from global_tasks import GlobalSample
from niah import Sample

__all__ = ["read_samples"]


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of a JSON-lines file, or all; ValueError names the line that is no sample."""
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if "task" in entry:
                samples.append(GlobalSample(**{**entry, "choices": tuple(entry["choices"])}))
            else:
                samples.append(Sample(**entry))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no sample of niah.py or global_tasks.py: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return samples
