"""The metrics of docs/reference/metrics.md: every answer is one of four outcomes, and rows add up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passkey.metrics import OUTCOMES, Answer, numbers_in, rows_of, wilson
from passkey.niah import Sample

CONTEXT = "Ticket 13579 belongs to Mira. The river rose by 1234567 inches, 24,680 coins were lost, 900 found."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("52047", "exact"),
        (" 52047. Remember it, not 13579.", "exact"),
        ("The pass key is 52047", "exact"),
        ("13579", "hallucinated_context"),
        ("24680", "hallucinated_context"),
        ("34567", "hallucinated_invented"),  # digits of a longer number are not a number of the context
        ("99999", "hallucinated_invented"),
        ("5204", "abstained"),
        ("520471", "abstained"),
        ("900, then 52047", "abstained"),  # the first number counts: a model may not list candidates
        ("I do not know.", "abstained"),
        ("", "abstained"),
    ],
)
def test_outcome_of_a_passkey(said, expected):
    assert answer(said).outcome == expected


def test_numbers_in():
    assert numbers_in(CONTEXT) == {"13579", "1234567", "24680", "900"}
    assert numbers_in("1,2345 and 12,345,678") == {"1", "2345", "12345678"}


@pytest.mark.parametrize(
    ("said", "share"),
    [("52047", 1.0), ("52048", 0.8), ("x2047", 0.8), ("It is 52946", 0.6), ("", 0.0), ("25704", 0.0)],
)
def test_digit_accuracy(said, share):
    assert answer(said).digits == share


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (9, 10, 0.5958, 0.9821), (0, 0, 0, 1)])
def test_wilson(hits, n, low, high):
    """Values of Newcombe (1998), "Two-sided confidence intervals for the single proportion", method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-3)


def answer(said="52047", **changed):
    sample = {"id": "en-0", "language": "en", "context": CONTEXT, "question": "?", "answer": "52047", "depth": 0.5}
    sample |= {"tokens": 3000, "keys": {"": "52047"}, "filler": "templates", "wordings": "training"}
    return Answer(Sample(**{**sample, **changed}), said, rows=10, row_bytes=2048)


ANYTHING = st.one_of(st.sampled_from(["52047", "13579", "34567", "24,680", ""]), st.text(max_size=8))


@settings(max_examples=30)
@given(st.lists(ANYTHING, min_size=1, max_size=40))
def test_outcomes_add_up_to_one(texts):
    (row,) = rows_of([answer(text) for text in texts])
    assert sum(row[name] for name in OUTCOMES) == pytest.approx(1)
    assert row["hallucinated"] == pytest.approx(row["hallucinated_context"] + row["hallucinated_invented"])
    assert row["wilson_low"] <= row["exact"] <= row["wilson_high"]


def test_a_row_says_what_its_answers_say():
    said = ["52047", "52047", "52048", "13579", "none"]
    (row,) = rows_of([answer(text) for text in said])
    assert (row["n"], row["exact"], row["abstained"]) == (5, 0.4, 0.2)
    assert (row["hallucinated_context"], row["hallucinated_invented"]) == (0.2, 0.2)
    assert row["digit"] == pytest.approx((1 + 1 + 0.8 + 0 + 0) / 5)
    assert (row["gist_tokens"], row["ratio"], row["bytes_ratio"]) == (10, 300, 300)
    assert (row["full_kv_bytes"], row["gist_kv_bytes"]) == (6_144_000, 20_480)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("filler", "prose"),
        ("wordings", "held_out"),
        ("language", "ko"),
        ("tokens", 500),
        ("keys", {"Mira": "52047", "Noah": "13579"}),
    ],
)
def test_different_questions_are_never_averaged(field, other):
    right, wrong = answer(), answer("13579", **{field: other})
    rows = rows_of([right, wrong, right])
    assert [(row[field], row["n"], row["exact"]) for row in rows] == [
        (right.kind[field], 2, 1),
        (wrong.kind[field], 1, 0),
    ]
    assert right.kind[field] != wrong.kind[field]


def test_depths():
    (row,) = rows_of([answer(depth=0.0), answer("13579", depth=0.05), answer(depth=1.0)])
    by_depth = {cell["depth"]: (cell["n"], cell["exact"]) for cell in row["by_depth"]}
    assert by_depth[0.05] == (2, 0.5)
    assert by_depth[0.95] == (1, 1.0)
    assert by_depth[0.45] == (0, None)
