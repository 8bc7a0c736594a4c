"""A user's own data: JSON lines of questions about contexts, or of conversations, read strictly and tokenized once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gistkern.files import parse_json
from gistkern.hf.chat import ChatParts, chat_parts, chat_turns, plain_parts

__all__ = [
    "DataRow",
    "Tokenized",
    "check_files_differ",
    "context_role",
    "held_out",
    "read_rows",
    "tokenized",
    "unread_fields",
]

_PAIR = ("context", "question", "answer")


@dataclass(frozen=True)
class DataRow:
    """A line of a file: `fields` as it holds them, and `where` it stands, for messages about it."""

    where: str
    fields: dict[str, Any]

    @property
    def is_conversation(self) -> bool:
        """Whether it holds messages, instead of a context, a question and an answer."""
        return "messages" in self.fields

    def parts(self, tokenizer: Any, role: str | None) -> list[ChatParts]:
        """Its texts; a conversation has those of each assistant turn.

        `role` is whose turn the context begins, as of `gistkern.hf.chat`; None takes texts as they stand.
        """
        try:
            if self.is_conversation:
                return chat_turns(tokenizer, self.fields["messages"], self.fields.get("context"))
            context, question, answer = (self.fields[name] for name in _PAIR)
            if role is None:
                return [plain_parts(tokenizer, context, question, answer)]
            return [chat_parts(tokenizer, context, question, answer, role)]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


def read_rows(path: str | Path) -> list[DataRow]:
    """The rows of a file of JSON lines (UTF-8; empty lines are skipped).

    Parameters
    ----------
    path : str or Path
        Each line is an object with the texts `context`, `question` and `answer`, or with `messages` (a list of
        objects with `role` and `content`) and perhaps a document as `context`. Other fields are not read
        (`unread_fields` names them).

    Raises
    ------
    ValueError
        Naming file and line: if a line is no JSON object, holds a name twice, lacks a field or has one that is no
        text; if there are no rows.

    Examples
    --------
    >>> from pathlib import Path
    >>> from gistkern.training.rows import read_rows
    >>> _ = Path("mine.jsonl").write_text('{"context": "The bell is blue.", "question": " Colour?", "answer": " blue"}')
    >>> read_rows("mine.jsonl")[0].where
    'mine.jsonl, line 1'
    """
    rows: list[DataRow] = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            if not rows and text.lstrip()[:1] == b"[":
                raise ValueError(f"{where} begins a list: write one object a line (jq -c '.[]' does)")
            rows.append(DataRow(where, _fields(text, where)))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is no UTF-8 ({line[error.start]:#04x})") from error
    fields = parse_json(text, where)
    if "messages" in fields:
        if doubled := [name for name in ("question", "answer") if name in fields]:
            raise ValueError(f"{where} has messages and {doubled[0]}: give one of the two")
        wanted = [name for name in ("context",) if fields.get(name) is not None]
        if not isinstance(fields["messages"], list):
            raise ValueError(f"{where}: messages must be a list of objects with role and content")
    else:
        wanted = list(_PAIR)
        if missing := [name for name in wanted if name not in fields]:
            raise ValueError(
                f"{where} lacks {', '.join(missing)}: a row has context, question and answer, or messages; "
                f"found {', '.join(map(repr, fields)) or 'nothing'}"
            )
    for name in wanted:
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise ValueError(f"{where}: {name} must be a text that is not empty, found {fields[name]!r:.40}")
    return fields


def unread_fields(rows: Sequence[DataRow]) -> list[str]:
    """Names that stand in rows and are not read."""
    return sorted({name for row in rows for name in row.fields} - {*_PAIR, "messages"})


def context_role(rows: Sequence[DataRow], chat: str | None, has_template: bool) -> str | None:
    """Whose turn contexts begin, in all rows alike; None where texts stand as they are.

    Parameters
    ----------
    rows : sequence of DataRow
        Of one data set.
    chat : str or None
        What was asked for: a role, ``"no"``, or None for conversations alone.
    has_template : bool
        Of the tokenizer.

    Raises
    ------
    ValueError
        If conversations are to be read without a template, or rows have their contexts in different turns.
    """
    talks = [row for row in rows if row.is_conversation]
    if not talks:
        return None if chat in (None, "no") else chat
    if chat == "no" or not has_template:
        why = "the tokenizer has no chat template" if not has_template else "--no-chat takes texts as they stand"
        raise ValueError(f"{talks[0].where} holds messages, but {why}: write context, question and answer instead")
    roles: dict[str, DataRow] = {}
    for row in talks:
        first = row.fields["messages"][0] if row.fields["messages"] else {}
        role = "system" if isinstance(first, dict) and first.get("role") == "system" else "user"
        roles.setdefault("user" if row.fields.get("context") is not None else role, row)
    if len(talks) < len(rows):
        roles.setdefault(chat or "user", next(row for row in rows if not row.is_conversation))
    if len(roles) > 1:
        said = ", ".join(f"{row.where}: {role}" for role, row in roles.items())
        raise ValueError(
            f"contexts begin different turns ({said}): a model is asked about one kind later, train one for each"
        )
    (role,) = roles
    if chat not in (None, role):
        raise ValueError(f"--chat {chat} contradicts the messages, whose context is a {role} turn: leave it out")
    return role


class Tokenized(NamedTuple):
    """Rows as ids: `features` for a `GistDataCollator`, `where` each stands, how many were `too_long`, and left out."""

    features: list[dict[str, np.ndarray]]
    where: list[str]
    too_long: int

    @property
    def longest_answer(self) -> int:
        """In tokens, with the one that ends it."""
        return max(len(one["answer_ids"]) for one in self.features)

    def first(self, count: int) -> Tokenized:
        """At most so many of them."""
        return Tokenized(self.features[:count], self.where[:count], self.too_long)


def tokenized(rows: Sequence[DataRow], tokenizer: Any, role: str | None, max_length: int | None = None) -> Tokenized:
    """Token ids of rows, of each assistant turn in them. Ids are kept as int32.

    Every row is looked at here, before a model is loaded; ValueError names the one that is wrong.
    """
    found = Tokenized([], [], 0)
    for row in rows:
        for parts in row.parts(tokenizer, role):
            try:
                ids = parts.ids(tokenizer)
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
            if empty := [name for name, one in ids.items() if not one]:
                raise ValueError(f"{row.where}: {empty[0].removesuffix('_ids')} has no tokens")
            if max_length is not None and sum(map(len, ids.values())) > max_length:
                found = found._replace(too_long=found.too_long + 1)
                continue
            found.features.append({name: np.asarray(one, dtype=np.int32) for name, one in ids.items()})
            found.where.append(row.where)
    if not found.features:
        raise ValueError(f"all {found.too_long} rows are longer than {max_length} tokens: pass a larger --max-length")
    return found


def held_out(rows: Sequence[DataRow], share: float) -> tuple[list[DataRow], list[DataRow]]:
    """Rows to train on, and about a `share` of them (one at least) to evaluate on, by a fixed hash of what they say.

    The same rows are held out of the same file whatever their order. Rows about one context stay on one side, so that
    no document that is asked about was trained on; unless one context has more rows than the share, as a system prompt
    has: then each row is drawn by itself.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of the rows must be at least 0 and below 1, got {share}")
    if not share:
        return list(rows), []
    contexts = [row.fields.get("context") or "" if not row.is_conversation else _canonical(row) for row in rows]
    wanted = max(1, round(share * len(rows)))
    by_context = max(Counter(contexts).values()) <= wanted
    keys = contexts if by_context else [_canonical(row) for row in rows]
    drawn, count = set(), 0
    for key, size in sorted(Counter(keys).items(), key=lambda one: _hash(one[0])):
        if count >= wanted:
            break
        drawn.add(key)
        count += size
    if count == len(rows):
        raise ValueError(f"all {count} rows would be held out: give more rows, or --eval-share 0")
    sides: tuple[list[DataRow], list[DataRow]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        sides[key in drawn].append(row)
    return sides


def check_files_differ(rows: Sequence[DataRow], others: Sequence[DataRow]) -> None:
    """Raise ValueError if a row to evaluate on is one that is trained on."""
    known = {_canonical(row): row for row in rows}
    for row in others:
        if (same := known.get(_canonical(row))) is not None:
            raise ValueError(f"{row.where} is {same.where} again: rows to evaluate on are never trained on")


def _canonical(row: DataRow) -> str:
    return json.dumps({name: row.fields.get(name) for name in (*_PAIR, "messages")}, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
