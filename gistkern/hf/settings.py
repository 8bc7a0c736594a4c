"""The gist settings of a patched model: from arguments, from a checkpoint's config.json, and to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gistkern.layout.arguments import check_count
from gistkern.layout.positions import SCHEMES, check_scheme

__all__ = ["GistSettings", "agreed_settings", "config_block", "read_block"]

_OPTIONAL = ("ids_from_tokenizer", "context_prefix", "rows")


@dataclass(frozen=True)
class GistSettings:
    """What `patch_llama` is given, but for the model; ValueError if a value is none that it takes."""

    num_gist_tokens: int = 10
    positions: str = "absolute"
    sink_tokens: int = 1
    num_segment_gist_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_gist_tokens", 1), ("sink_tokens", 0), ("num_segment_gist_tokens", 0)):
            check_count(name, getattr(self, name), least)
        check_scheme(self.positions)

    @property
    def num_ids(self) -> int:
        """Gist tokens of both kinds."""
        return self.num_gist_tokens + self.num_segment_gist_tokens

    def numbers(self, first_id: int) -> list[int]:
        """As the buffer beside the rows holds them (`GistEmbedding`)."""
        return [
            self.num_gist_tokens,
            self.num_segment_gist_tokens,
            SCHEMES.index(self.positions),
            self.sink_tokens,
            first_id,
        ]


def agreed_settings(saved: dict[str, Any], given: GistSettings) -> GistSettings:
    """The settings of a checkpoint.

    Raises
    ------
    ValueError
        If a given setting is not the default and contradicts the saved one.
    """
    default = asdict(GistSettings())
    for name, value in asdict(given).items():
        if value not in (default[name], saved[name]):
            raise ValueError(
                f"{name}={value!r} contradicts the checkpoint, which was trained with {saved[name]!r}: "
                "leave it out, or delete model.config.gistkern to start afresh"
            )
    return GistSettings(**{name: saved[name] for name in default})


def config_block(
    settings: GistSettings, first_id: int, from_tokenizer: bool, prefix: list[int] | None
) -> dict[str, Any]:
    """What `save_pretrained` writes into config.json.

    `from_tokenizer` says that the ids are a tokenizer's (they may then lie inside a padded vocabulary), `prefix` with
    which ids its contexts begin (`gistkern.hf.texts`).
    """
    block = asdict(settings) | {"first_gist_id": first_id, "ids_from_tokenizer": from_tokenizer}
    return block if prefix is None else block | {"context_prefix": prefix}


def read_block(config: Any) -> dict[str, Any] | None:
    """The gist settings of a config, checked as arguments are; None if it has none.

    Raises
    ------
    ValueError
        Naming the checkpoint and the key, if a value is missing, unknown or none that `patch_llama` takes.
    """
    block = getattr(config, "gistkern", None)
    if block is None:
        return None
    try:
        _check_block(block)
    except ValueError as error:
        raise ValueError(
            f'the entry "gistkern" in config.json of {config._name_or_path!r} holds no gist settings: {error}'
        ) from None
    return block


def _check_block(block: Any) -> None:
    if not isinstance(block, dict):
        raise ValueError(f"expected an object, got {block!r}")
    required = [*asdict(GistSettings()), "first_gist_id"]
    missing = [name for name in required if name not in block]
    unknown = [name for name in block if name not in (*required, *_OPTIONAL)]
    if missing or unknown:
        raise ValueError(
            "; ".join([f"{one!r} is missing" for one in missing] + [f"{one!r} is unknown" for one in unknown])
        )
    settings = GistSettings(**{name: block[name] for name in asdict(GistSettings())})
    check_count("first_gist_id", block["first_gist_id"], 0)
    check_count("first_gist_id + the number of gist tokens", block["first_gist_id"] + settings.num_ids, 0)
    if not isinstance(block.get("ids_from_tokenizer", False), bool):
        raise ValueError(f"ids_from_tokenizer must be true or false, got {block['ids_from_tokenizer']!r}")
    if not isinstance(block.get("rows", ""), str):
        raise ValueError(f"rows must be a digest, got {block['rows']!r}")
    prefix = block.get("context_prefix", [])
    if not isinstance(prefix, list):
        raise ValueError(f"context_prefix must be a list of token ids, got {prefix!r}")
    for one in prefix:
        check_count("a token id in context_prefix", one, 0)
