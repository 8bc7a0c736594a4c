"""A model that is put to evaluation while it reads a context or a question."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from gistkern.cache.fingerprint import named_modules

__all__ = ["evaluating"]

_lock = threading.Lock()
# of each model: how many threads evaluate it now, and the modules that train otherwise
_inside: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no part of the model is in training mode. The last thread to leave puts back what the first found."""
    with _lock:
        count, training = _inside.get(model) or (0, [module for _, module in named_modules(model) if module.training])
        _inside[model] = count + 1, training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            count, training = _inside.pop(model)
            if count > 1:
                _inside[model] = count - 1, training
            else:
                for module in training:
                    module.training = True
