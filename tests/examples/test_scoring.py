"""Scores of answers, each against a value worked out by hand."""

import pytest

from tasks.scoring import (
    SCORES,
    best,
    chosen,
    contained,
    edit_similarity,
    exact,
    f1,
    normalized,
    recall_all,
    recall_part,
    repeated,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Denver Broncos.", "denver broncos"),
        ("  a   cat and an ant ", "cat and ant"),
        ("$1,000 (about)", "1000 about"),
        ("theatre", "theatre"),  # an article inside a word is none
        ("Levi's Stadium", "levis stadium"),
        ("24–10", "24–10"),  # no punctuation of ASCII
        ("The", ""),
    ],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


def test_normalized_korean():
    assert normalized("‘서울특별시’의, 중구.", "ko") == "서울특별시의 중구"
    assert normalized("a B", "ko") == "a b"


@pytest.mark.parametrize(
    ("said", "answer", "value"),
    [
        ("Denver Broncos", "The Denver Broncos", 1.0),
        ("the team of Denver", "Denver Broncos", 2 * 1 / (3 + 2)),  # precision 1/3, recall 1/2
        ("gold gold", "gold", 2 * 1 / (2 + 1)),  # the second one is one too many
        ("gold and blue", "blue and gold", 1.0),  # order does not count
        ("silver", "gold", 0.0),
        ("", "gold", 0.0),
        ("the", "a", 1.0),  # both empty
    ],
)
def test_f1(said, answer, value):
    assert f1(said, answer) == pytest.approx(value)


def test_f1_counts_characters_in_korean():
    # 서울특별시에서 has 7 characters, 서울특별시 5, all of them shared
    assert f1("서울특별시에서", "서울특별시", "ko") == pytest.approx(2 * 5 / (7 + 5))
    assert f1("서울 특별시", "서울특별시", "ko") == 1.0
    assert f1("부산", "서울", "ko") == 0.0


def test_exact_and_contained():
    assert exact("The gold.", "Gold") == 1
    assert exact("gold one", "gold") == 0
    assert contained("It was gold, I think", "the gold") == 1
    assert contained("in 1917", "7") == 0  # not a whole word
    assert contained("in 19 17", "17") == 1
    assert contained("anything", "the") == 0  # an answer that normalizes to nothing
    assert exact("‘세종’", "세종", "ko") == 1
    assert contained("세종대왕이 만들었다.", "세종대왕", "ko") == 1  # an ending follows
    assert contained("세종", "세종대왕", "ko") == 0


def test_rulers_recall():
    assert recall_all("123, 456 and 9", ["123", "456", "789", "9"]) == 0.75
    assert recall_all("Sunny-HARBOR", ["sunny-harbor"]) == 1
    assert recall_all("", ["1", "2"]) == 0
    assert recall_part("in Paris", ["London", "paris"]) == 1
    assert recall_part("Rome", ["London", "Paris"]) == 0
    assert recall_all("마법 숫자는 123이고", ["123", "456"]) == 0.5


@pytest.mark.parametrize(
    ("said", "value"), [("7", 1), (" 07.", 1), ("Rule 7, not 3", 1), ("3 or 7", 0), ("17", 0), ("seven", 0)]
)
def test_chosen(said, value):
    assert chosen(said, "7") == value


def test_repeated():
    assert repeated("The cat sat.", "The cat sat.") == 1
    assert repeated("The cat  sat. And more", "The cat sat.") == 1
    assert repeated("The car", "The cat sat.") == pytest.approx(6 / 12)
    assert repeated("", "cat") == 0
    assert repeated("산은 산이다", "산은 물이다") == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    ("said", "answer", "edits", "longer"),
    [
        ("kitten", "sitting", 3, 7),
        ("", "abc", 3, 3),
        ("abc", "abc", 0, 3),
        ("flaw", "lawn", 2, 4),
        ("바람이 분다", "바람은 분다", 1, 6),
    ],
)
def test_edit_similarity(said, answer, edits, longer):
    assert edit_similarity(said, answer) == pytest.approx(1 - edits / longer)
    assert edit_similarity(answer, said) == pytest.approx(1 - edits / longer)


def test_the_best_answer_counts():
    answers = ["Santa Clara, California", "Levi's Stadium"]
    assert best("f1", "Levi's Stadium", answers) == 1
    assert best("f1", "Santa Clara", answers) == pytest.approx(2 * 2 / (2 + 3))
    assert best("exact", "santa clara california", answers) == 1
    assert best("contained", "at Levis Stadium", answers) == 1
    assert best("recall_all", "levi's stadium", answers) == 0.5
    assert best("recall_part", "levi's stadium", answers) == 1
    assert best("chosen", "3", ["3"]) == best("repeated", "ab", ["ab"]) == best("edit_similarity", "ab", ["ab"]) == 1
    for score in SCORES:
        assert 0 <= best(score, "something 1", ["1"]) <= 1
