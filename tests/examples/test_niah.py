"""Haystacks: exact lengths, one findable needle, a clean split, the same bytes for the same seed."""

import json
import random
import re

import pytest
from conftest import drawn_by_a_process

from passkey.haystack import LANGUAGES, is_held_out, sentence
from passkey.niah import KEY_DIGITS, Haystack, dataset, train_tokenizer
from passkey.settings import read_evaluation


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("tokens", [60, 500, 6096])
def test_samples_are_exact_and_hold_their_needle(tokenizer, language, tokens):
    for sample in dataset(tokenizer, language, tokens, 5):
        assert sample.tokens == tokens
        assert len(tokenizer.encode(sample.context).ids) == tokens, "the text itself has this many tokens"
        assert sample.context.count(sample.answer) >= 2, "the needle states its key twice"
        assert len(sample.answer) == KEY_DIGITS
        assert sample.answer not in sample.question


def test_depths_cover_the_context(tokenizer):
    depths = [sample.depth for sample in dataset(tokenizer, "en", 1000, 20)]
    assert depths == sorted(depths)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9


def test_several_keys_are_asked_by_name(tokenizer):
    for sample in dataset(tokenizer, "ko", 400, 10, keys=4):
        assert len(sample.keys) == len(set(sample.keys.values())) == 4
        (name,) = (name for name in sample.keys if name in sample.question)
        assert sample.answer == sample.keys[name]
        assert all(key in sample.context for key in sample.keys.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_eight_keys_by_name(tokenizer, language):
    for sample in dataset(tokenizer, language, 900, 6, keys=8):
        assert len(tokenizer.encode(sample.context).ids) == 900
        assert len(set(sample.keys.values())) == 8
        assert all(sample.context.count(key) >= 2 for key in sample.keys.values())
        assert [sample.keys[name] for name in sample.keys if name in sample.question] == [sample.answer]


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_wordings_are_others(tokenizer, language):
    material = LANGUAGES[language]
    frames = {"en": r"pass key(:| is) {key}|{key} is the pass key", "ko": "패스키는 {key}|{key}이 패스키"}[language]
    assert len(material.held_out_needles) >= 4
    assert all(re.search(frames, needle) for needle in material.needles)
    assert not any(re.search(frames, needle) for needle in material.held_out_needles)
    sides = {}
    for wordings, needles in (("training", material.needles), ("held_out", material.held_out_needles)):
        samples = list(dataset(tokenizer, language, 200, 60, wordings=wordings))
        sides[wordings] = {
            needle for sample in samples for needle in needles if needle.format(key=sample.answer) in sample.context
        }
        assert sides[wordings] == set(needles), "every wording comes, and each key stands in one"
        for sample in samples:
            (needle,) = (needle for needle in needles if needle.format(key=sample.answer) in sample.context)
            assert sample.context.count(sample.answer) == needle.count("{key}")
            assert sample.wordings == wordings
            assert len(tokenizer.encode(sample.context).ids) == 200
    haystack = Haystack(tokenizer, language, False, random.Random(0))
    for _ in range(60):
        _, sample = haystack.draw(100)
        assert not any(needle.format(key=sample.answer) in sample.context for needle in material.held_out_needles)


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_never_sees_what_evaluation_asks(tokenizer, language):
    rng = random.Random(0)
    lines = {side: {sentence(LANGUAGES[language], side, rng) for _ in range(3000)} for side in (False, True)}
    assert not lines[False] & lines[True]
    haystack = Haystack(tokenizer, language, False, rng)
    assert not any(is_held_out(haystack.key()) for _ in range(20))
    assert all(is_held_out(sample.answer) for sample in dataset(tokenizer, language, 100, 20))


def test_distractors_look_like_keys(tokenizer):
    (sample,) = dataset(tokenizer, "en", 3000, 1)
    numbers = {number for number in re.findall(r"\d+", sample.context) if len(number) == KEY_DIGITS}
    assert len(numbers) > 5


def test_same_seed_same_samples():
    first, again, other = (drawn_by_a_process("ko", 300, 4, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert {sample["language"] for sample in first} == {"ko"}


@pytest.mark.parametrize(
    ("tokens", "how", "message"),
    [
        (12, {}, "12 tokens are too few for 1 needle"),
        (300, {"keys": 11}, "11 keys with training wordings: expected 1 to 10"),
        (300, {"keys": 0}, "0 keys with training wordings: expected 1 to 10"),
        (300, {"keys": 2, "wordings": "held_out"}, "2 keys with held_out wordings: expected 1 to 1"),
    ],
)
def test_what_cannot_be_drawn(tokenizer, tokens, how, message):
    with pytest.raises(ValueError, match=message):
        list(dataset(tokenizer, "en", tokens, 1, **how))


@pytest.mark.parametrize("wrong", [{"language": "fr"}, {"filler": "poems"}, {"wordings": "new"}], ids=str)
def test_unknown_names(tmp_path, wrong):
    (tmp_path / "rows.yaml").write_text(json.dumps([{"language": "en", "tokens": 100, "samples": 1, **wrong}]))
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"rows.yaml: \[0\].{name}: Input should be "):
        read_evaluation(tmp_path / "rows.yaml")
