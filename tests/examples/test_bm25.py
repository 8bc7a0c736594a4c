"""BM25 against values worked out by hand."""

import math

import pytest

from tasks.bm25 import ranked, scores, sentences, terms


def test_sentences():
    assert sentences("One. Two! Three?\nFour\n\nFive 1.5 m. ") == ["One.", "Two!", "Three?", "Four", "Five 1.5 m."]
    assert sentences("비가 온다. 눈이 온다.") == ["비가 온다.", "눈이 온다."]


def test_terms():
    assert terms("The Bell's 2nd_bell") == ["the", "bell", "s", "2nd", "bell"]
    assert terms("서울특별시 물 a도시") == ["서울", "울특", "특별", "별시", "물", "a", "도시"]


def test_scores_by_hand():
    # three documents of 2, 2 and 4 terms, mean 8 / 3; "bell" stands in two, once and twice
    documents = ["bell rings", "cat sleeps", "bell of a bell"]
    rare = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    one = rare * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / (8 / 3)))
    two = rare * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / (8 / 3)))
    assert scores("Bell?", documents) == pytest.approx([one, 0, two])
    assert scores("bell bell", documents) == pytest.approx([2 * one, 0, 2 * two])
    assert ranked("Bell?", documents) == ([0, 2, 1] if one > two else [2, 0, 1])
    assert ranked("nothing of it", ["x", "y", "z"]) == [0, 1, 2]
    assert scores("x", []) == []
