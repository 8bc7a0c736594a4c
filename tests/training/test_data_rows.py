"""A user's rows: read line by line, or refused by file and line; held out by what they say."""

import json

import pytest
from chat_cases import chat_tokenizer

from gistkern.training.rows import check_files_differ, context_role, held_out, read_rows, tokenized, unread_fields

PAIR = {"context": "The bell is with Mira.", "question": " Who has it?", "answer": " Mira"}
TALK = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]}
TALK["messages"] += [{"role": "assistant", "content": "Mira"}, {"role": "user", "content": "And now?"}]
TALK["messages"] += [{"role": "assistant", "content": "Jonas"}]


def written(path, *lines, ends="\n"):
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else (json.dumps(line) + ends).encode() for line in lines)
    )
    return path


def test_what_editors_and_exports_leave_in_a_file(tmp_path):
    """A byte order mark, CRLF, empty lines, no newline at the end, a line of a megabyte, fields of one's own."""
    long = {**PAIR, "context": "bell " * 200_000, "id": 7}
    end = json.dumps({**PAIR, "answer": "끝 \u2028."}, ensure_ascii=False).encode()
    path = written(tmp_path / "x.jsonl", b"\xef\xbb\xbf", PAIR, b"\r\n", b"  \n", long, end, ends="\r\n")
    rows = read_rows(path)
    assert [row.where for row in rows] == [f"{path}, line {number}" for number in (1, 4, 5)]
    assert rows[0].fields == PAIR
    assert rows[1].fields == long
    assert rows[2].fields["answer"] == "끝 \u2028."
    assert unread_fields(rows) == ["id"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "line 2: no JSON"),
        (b'{"context": "c", "context": "d", "question": "q", "answer": "a"}\n', "line 2.*stands in it twice"),
        (b'{"context": NaN}\n', "line 2.*NaN is no JSON number"),
        (b'{"context": "\xff"}\n', r"line 2: byte 13 is no UTF-8 \(0xff\)"),
        (b"[1]\n", "line 2: no JSON object"),
        (b"{}\n", "line 2 lacks context, question, answer.*found nothing"),
        (
            b'{"context": "c", "question": "q", "reply": "a"}\n',
            "line 2 lacks answer.*found 'context', 'question', 'reply'",
        ),
        (
            b'{"context": "c", "question": "q", "answer": 5}\n',
            "line 2: answer must be a text that is not empty, found 5",
        ),
        (b'{"context": " ", "question": "q", "answer": "a"}\n', "line 2: context must be a text"),
        (b'{"messages": "hi"}\n', "line 2: messages must be a list"),
        (b'{"messages": [], "answer": "a"}\n', "line 2 has messages and answer"),
    ],
)
def test_lines_that_are_none(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path / "x.jsonl", PAIR, line))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(written(tmp_path / "x.jsonl", b"\n\n"))
    with pytest.raises(ValueError, match="line 1 begins a list: write one object a line"):
        read_rows(written(tmp_path / "x.json", b"[\n", PAIR))


def test_rows_as_ids(tmp_path):
    rows = read_rows(written(tmp_path / "x.jsonl", PAIR, TALK))
    tokenizer = chat_tokenizer("chatml")
    plain = tokenized(rows[:1], tokenizer, None)
    texts = {name: tokenizer.decode(ids) for name, ids in plain.features[0].items()}
    assert texts == {f"{name}_ids": text for name, text in {**PAIR, "answer": " Mira</s>"}.items()}
    talk = tokenized(rows[1:], tokenizer, "system")
    assert talk.where == [rows[1].where] * 2, "a row for each assistant turn"
    assert [tokenizer.decode(one["answer_ids"]) for one in talk.features] == ["Mira<|im_end|>", "Jonas<|im_end|>"]
    longest = max(sum(map(len, one.values())) for one in talk.features)
    short = tokenized(rows[1:], tokenizer, "system", longest - 1)
    assert (len(short.features), short.too_long) == (1, 1)
    with pytest.raises(ValueError, match="all 2 rows are longer than 3 tokens"):
        tokenized(rows[1:], tokenizer, "system", 3)
    bad = read_rows(written(tmp_path / "x.jsonl", {**PAIR, "answer": "\ud800"}))
    with pytest.raises(ValueError, match=r"line 1: .*half a surrogate pair"):
        tokenized(bad, tokenizer, None)
    with pytest.raises(ValueError, match="line 1: no assistant turn"):
        tokenized(read_rows(written(tmp_path / "x.jsonl", {"messages": TALK["messages"][:2]})), tokenizer, "system")


def test_whose_turn_contexts_begin(tmp_path):
    user = {"messages": TALK["messages"][1:], "context": "Be short."}
    pair, talk, document = read_rows(written(tmp_path / "x.jsonl", PAIR, TALK, user))
    expected = {None: None, "no": None, "user": "user", "system": "system"}
    assert {asked: context_role([pair], asked, True) for asked in expected} == expected
    assert context_role([talk, talk], None, True) == "system"
    assert context_role([document, pair], None, True) == "user"
    for rows, chat, template, message in (
        ([talk], "no", True, "line 2 holds messages, but --no-chat takes texts as they stand"),
        ([talk], None, False, "line 2 holds messages, but the tokenizer has no chat template"),
        ([talk, document], None, True, "begin different turns .*line 2: system, .*line 3: user"),
        ([pair, talk], None, True, "begin different turns"),
        ([talk], "user", True, "--chat user contradicts the messages, whose context is a system turn"),
    ):
        with pytest.raises(ValueError, match=message):
            context_role(rows, chat, template)


def test_a_share_is_held_out_by_what_rows_say(tmp_path):
    lines = [{**PAIR, "context": f"Note {number // 2}.", "question": str(number)} for number in range(40)]
    rows = read_rows(written(tmp_path / "x.jsonl", *lines))
    train, held = held_out(rows, 0.1)
    assert (len(train), len(held)) == (36, 4)
    assert not {row.fields["context"] for row in train} & {row.fields["context"] for row in held}
    again = held_out(list(reversed(rows)), 0.1)[1]
    assert {row.fields["question"] for row in again} == {row.fields["question"] for row in held}
    assert held_out(rows, 0.0) == (rows, [])
    # one context with all the rows, as a system prompt: each by itself
    train, held = held_out(read_rows(written(tmp_path / "y.jsonl", *[{**one, "context": "c"} for one in lines])), 0.1)
    assert (len(train), len(held)) == (36, 4)
    with pytest.raises(ValueError, match="all 1 rows would be held out"):
        held_out(rows[:1], 0.1)
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        held_out(rows, 1.0)


def test_rows_to_measure_by_are_not_trained_on(tmp_path):
    rows = read_rows(written(tmp_path / "x.jsonl", PAIR, TALK))
    check_files_differ(rows[:1], rows[1:])
    with pytest.raises(ValueError, match=r"y.jsonl, line 1 is .*x.jsonl, line 1 again"):
        check_files_differ(rows, read_rows(written(tmp_path / "y.jsonl", {**PAIR, "id": 1})))
