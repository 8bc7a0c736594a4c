"""Names that differ between the transformers versions that gistkern works with; everything else asks here.

=================================  =================================
up to 5.23                         from 5.24 on
=================================  =================================
``model(past_key_values=cache)``   ``model(cache=cache)``; the old name until 5.40
=================================  =================================
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaModel

__all__ = ["CACHE", "CROP_TAKES_LENGTH", "named"]

_NAMES = ("past_key_values", "cache")
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
_OTHER = "past_key_values" if CACHE == "cache" else "cache"
# crop(n) with n > 0 keeps n tokens in versions whose assisted decoding calls it so
CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def named(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's call with the cache under the name that this version uses.

    Where both names are given the newer one counts, as in transformers.
    """
    if _OTHER not in arguments and arguments.get(CACHE, _OTHER) is not None:
        return dict(arguments)
    given = [arguments[name] for name in _NAMES if arguments.get(name) is not None]
    rest = {name: value for name, value in arguments.items() if name not in _NAMES}
    return {**rest, CACHE: given[-1]} if given else rest
