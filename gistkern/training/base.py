"""The model that a user trains: loaded, quantized, patched and wrapped in an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gistkern.hf.chat import stop_ids
from gistkern.hf.load import four_bits
from gistkern.hf.patch import patch

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["Base", "opened_tokenizer", "source_of"]


def source_of(name: str) -> str:
    """A folder's absolute path, by which an adapter finds its base from anywhere; a hub name as it is."""
    if not Path(name).is_dir():
        return name
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"{name} is an adapter: pass its base model, or --resume to go on with a run")
    return str(Path(name).resolve())


def opened_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or on the hub; ValueError if there is none."""
    return _loaded(AutoTokenizer, name)


@dataclass(frozen=True)
class Base:
    """Which model is trained and how; defaults are those of ``gistkern train``.

    Parameters
    ----------
    name : str
        Folder or hub name.
    dtype : str
        ``"auto"``: with an adapter that of the checkpoint (of float16 bfloat16), else float32.
    four_bit : bool
        Linear layers in 4 bits (NF4, by bitsandbytes).
    lora : int
        Rank of the adapter; 0 trains all weights.
    target_modules : tuple of str
        Of the adapter; all linear layers by default.
    gists, segment_gists : int
        `num_gist_tokens` and `num_segment_gist_tokens` of `gistkern.patch`.
    positions : str
        As of `gistkern.patch`.
    seed : int
        Of the adapter's weights.
    """

    name: str
    dtype: str = "auto"
    four_bit: bool = False
    lora: int = 16
    target_modules: tuple[str, ...] = ()
    gists: int = 10
    segment_gists: int = 0
    positions: str = "absolute"
    seed: int = 0

    def config(self) -> Any:
        """Of the model, without its weights."""
        return _loaded(AutoConfig, self.name)

    def computed_in(self) -> torch.dtype:
        """The dtype that weights are loaded in; ValueError for a name that is none."""
        if self.dtype == "auto":
            stored = getattr(self.config(), "dtype", None) or torch.float32
            found = torch.float32 if not self.lora else torch.bfloat16 if stored == torch.float16 else stored
        else:
            found = getattr(torch, self.dtype, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize in (2, 4)):
            raise ValueError(f"--dtype {self.dtype} is none that a model trains in: pass auto, float32 or bfloat16")
        if found == torch.float16:
            raise ValueError("--dtype float16 overflows in training: pass bfloat16 or float32")
        return found

    def made(self, tokenizer: Any, role: str | None) -> tuple[Any, GistHandle]:
        """The model that trains, patched, and its handle. Generation ends where answers of the training end."""
        options: dict[str, Any] = {"dtype": self.computed_in()}
        if self.four_bit:
            options["quantization_config"] = four_bits(options["dtype"])
            if torch.cuda.is_available():
                options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
        model = _loaded(AutoModelForCausalLM, self.name, **options)
        try:
            handle = patch(
                model,
                tokenizer,
                num_gist_tokens=self.gists,
                positions=self.positions,
                num_segment_gist_tokens=self.segment_gists,
            )
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be patched: {error}") from error
        model.generation_config.eos_token_id = stop_ids(model, tokenizer, role is not None) or None
        return (self._adapted(model, handle) if self.lora else model), handle

    def _adapted(self, model: Any, handle: GistHandle) -> Any:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError(f"an adapter needs peft ({error}): pip install 'gistkern[train]', or --lora 0") from error
        handle.inner.gist_embeddings.float()  # an optimizer's steps are smaller than bfloat16 tells apart
        torch.manual_seed(self.seed)
        config = LoraConfig(
            r=self.lora,
            lora_alpha=2 * self.lora,
            target_modules=list(self.target_modules) or "all-linear",
            modules_to_save=["gist_embeddings"],
            task_type="CAUSAL_LM",
        )
        adapter: Any = get_peft_model(model, config)
        # peft would look on the hub whether the vocabulary was resized
        adapter.save_pretrained = partial(adapter.save_pretrained, save_embedding_layers=False)
        return adapter


def _loaded(loader: Any, name: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, all from what is in that folder or not
        what = loader.__name__.removeprefix("Auto").removesuffix("ForCausalLM").lower()
        raise ValueError(f"the {what} {name} cannot be loaded ({type(error).__name__}: {error})") from error
