"""Where a model comes from, looked at before torch is loaded: a mistyped path and a missing network do not wait."""

from __future__ import annotations

import difflib
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from gistkern.progress import announce

__all__ = ["look_for"]

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_CONFIGS = ("config.json", "adapter_config.json")


def look_for(name: str) -> None:
    """Say that a name which is no folder is looked for on the hub; ValueError if that is of no use."""
    path = Path(name).expanduser()
    if path.exists():
        return
    missing, near = f"there is no folder {name!r} (seen from {Path.cwd()})", _near(path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # no hub's name either
        raise ValueError(missing + near)
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, one), str) for one in _CONFIGS):
        return
    if set_ := next((one for one in _OFFLINE if os.environ.get(one, "0") not in ("", "0")), None):
        raise ValueError(f"{missing}, nothing of that name was downloaded before, and {set_} is set{near}")
    announce(f"{missing}{near}\nlooking for it on the hub")
    if any(one.lower() in ("https_proxy", "all_proxy") for one in os.environ):
        return  # which finds the hub's address for us
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"{missing}, nothing of that name was downloaded before, and {host} is not found{near}"
        ) from error


def _near(path: Path) -> str:
    """A folder beside it that may have been meant."""
    names = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, names, n=1)
    return f": did you mean {str(path.parent / found[0])!r}?" if found else ""
