"""The gist settings of a patched model: from arguments, from a checkpoint's config.json, and to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from gistkern.layout.arguments import check_count
from gistkern.layout.positions import SCHEMES, check_scheme
from gistkern.layout.streams import check_segmentation

__all__ = ["GistSettings", "Training", "agreed_settings", "agreed_training", "config_block", "read_block"]


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

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> GistSettings:
        """The settings that `numbers` made a list of; ValueError if that is none."""
        if len(numbers) != 5 or numbers[2] not in range(len(SCHEMES)):
            raise ValueError(f"no gist settings: {numbers}")
        gists, segment_gists, scheme, sinks, _ = numbers
        return cls(gists, SCHEMES[scheme], sinks, segment_gists)

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


@dataclass(frozen=True)
class Training:
    """How contexts were made in training, which whoever makes contexts later has to repeat.

    Parameters
    ----------
    context_prefix : list of int, optional
        Special tokens that contexts begin with (`gistkern.hf.texts`); None where nobody knows.
    segment_length, segment_overlap : int
        Of `gistkern.compress`; no length where a context was one segment, or nobody knows.
    chat : str or bool, optional
        Whose turn contexts began, where they and the questions went through the chat template (`gistkern.hf.chat`):
        ``"user"`` or ``"system"`` (True is the first). False where texts were taken as they stand, None where nobody
        knows.
    """

    context_prefix: list[int] | None = None
    segment_length: int | None = None
    segment_overlap: int = 0
    chat: str | bool | None = None

    def __post_init__(self) -> None:
        prefix = self.context_prefix
        if prefix is not None and (
            not isinstance(prefix, list) or any(type(one) is not int or not 0 <= one < 2**31 for one in prefix)
        ):
            raise ValueError(f"context_prefix must be a list of token ids or None, got {prefix!r}")
        check_segmentation(self.segment_length, self.segment_overlap)
        if not (self.chat is None or isinstance(self.chat, bool) or self.chat in ("user", "system")):
            raise ValueError(f'chat must be "user", "system", true, false or None, got {self.chat!r}')

    @property
    def role(self) -> str | None:
        """Whose turn contexts begin; None where there are no turns, or nobody knows."""
        return self.chat if isinstance(self.chat, str) else "user" if self.chat else None

    def role_for(self, chat: str | bool | None) -> str | None:
        """Whose turn a context is to begin, where somebody says `chat`: a role, True, False, or None for as trained."""
        asked = Training(chat=chat)
        return self.role if chat is None or (chat is True and self.role) else asked.role

    def stated(self) -> dict[str, Any]:
        """What is known, by name."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}


_OPTIONAL = ("ids_from_tokenizer", "rows", *(one.name for one in fields(Training)))


def agreed_training(saved: dict[str, Any] | None, given: Training) -> Training:
    """What a checkpoint (`read_block`) and arguments say; ValueError where they differ."""
    known = {name: value for name, value in (saved or {}).items() if name in given.__dataclass_fields__}
    for name, value in given.stated().items():
        if name in known and known[name] != value:
            raise ValueError(f"{name}={value!r} contradicts the checkpoint, which was trained with {known[name]!r}")
    return Training(**{**given.stated(), **known})


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


def config_block(settings: GistSettings, first_id: int, from_tokenizer: bool, training: Training) -> dict[str, Any]:
    """What `save_pretrained` writes into config.json.

    `from_tokenizer` says that the ids are a tokenizer's (they may then lie inside a padded vocabulary).
    """
    return asdict(settings) | {"first_gist_id": first_id, "ids_from_tokenizer": from_tokenizer} | training.stated()


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
    Training(**{name: block[name] for name in Training.__dataclass_fields__ if name in block})
