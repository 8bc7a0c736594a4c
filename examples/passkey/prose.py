"""Real prose for haystacks, as documents of sentences, read from the wheels of two PyPI packages.

    pip install --no-deps gensim konlpy        # `make setup` does; neither is ever imported

| language | side | source | documents | sentences | characters | tokens of the tiny preset | of SmolLM2 |
|---|---|---|---|---|---|---|---|
| en | training | gensim, `lee_background.cor`: four documents of five | 235 | 2,073 | 274,774 | 168,365 | 57,862 |
| en | held out | gensim, `lee.cor` and the fifth ones | 108 | 670 | 94,760 | 58,103 | 19,596 |
| ko | training | konlpy, `kolaw`: chapters in turn; `kobill`: 8 bills | 14 | 318 | 18,732 | 27,399 | 39,006 |
| ko | held out | konlpy, `kolaw`: the other chapters; `kobill`: 2 bills | 7 | 154 | 7,836 | 11,291 | 16,516 |

A longer context goes through a side's text again. The English text is news of the Australian Broadcasting
Corporation, collected by Lee, Pincombe and Welsh (2005), "An Empirical Evaluation of Models of Text Document
Similarity"; the Korean one the constitution of the Republic of Korea and bills of its National Assembly of November
2010. Nothing is copied into this project: the packages are LGPL-2.1 (gensim) and GPL-3 (konlpy), the news remain their
publisher's, and Korea's Copyright Act (article 7) protects no laws.

Whole documents belong to one side of the split, and what still stands in both (the formulas of bills) is left out of
the held-out side.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["passage", "prose"]

INSTALL = "pip install --no-deps gensim konlpy"
# last digits of 180989x; 0 to 3 share their texts, and so do 7 and 8
BILLS = {False: (0, 1, 2, 3, 6, 7, 8, 9), True: (4, 5)}


@lru_cache
def prose(language: str, held_out: bool) -> tuple[tuple[str, ...], ...]:
    """Documents of one side of the split (evaluation's, if `held_out`), each a tuple of its sentences in order.

    No sentence stands on both sides. ValueError if the package that carries the text is not installed.
    """
    # a sentence stands once on its side: bills repeat one another
    seen = {line for document in prose(language, False) for line in document} if held_out else set()
    documents = []
    for lines in _READERS[language](held_out):
        documents.append(tuple(dict.fromkeys(line for line in lines if line not in seen)))
        seen.update(documents[-1])
    return tuple(filter(None, documents))


def passage(documents: tuple[tuple[str, ...], ...], rng: random.Random) -> Iterator[str]:
    """Consecutive sentences from a random place on, then the other documents in random order, without end.

    No sentence comes twice before all have come.
    """
    while True:
        (first,) = rng.choices(range(len(documents)), [len(document) for document in documents])
        start = rng.randrange(len(documents[first]))
        order = [index for index in range(len(documents)) if index != first]
        rng.shuffle(order)
        yield from documents[first][start:]
        for index in order:
            yield from documents[index]
        yield from documents[first][:start]


def _read(package: str, path: str, encoding: str = "utf-8") -> str:
    found = importlib.util.find_spec(package)  # of a top-level package: executes nothing
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"prose haystacks are read from the package {package}, which is not installed: {INSTALL}")
    file = Path(found.submodule_search_locations[0], path)
    if not file.is_file():
        raise ValueError(f"{path} is missing from the installed package {package}: reinstall it, {INSTALL}")
    return file.read_text(encoding)


def _english(held_out: bool) -> Iterator[list[str]]:
    documents = _read("gensim", "test/test_data/lee_background.cor", "cp1252").splitlines()
    held = documents[4::5]
    del documents[4::5]
    if held_out:
        documents = _read("gensim", "test/test_data/lee.cor", "cp1252").splitlines() + held
    for document in documents:
        text = " ".join(document.split())
        lines = re.split(r"""(?<!\b[DM]r\.)(?<!\bSt\.)(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'(]?[A-Z0-9])""", text)
        yield [line for line in lines if re.search(r"""[.!?]["')]?$""", line) and len(line) >= 20]


def _korean(held_out: bool) -> Iterator[list[str]]:
    constitution = _read("konlpy", "data/corpus/kolaw/constitution.txt")
    for chapter in re.split(r"\n\s*(?:제\d+장|부칙)[^\n]*\n", constitution)[held_out::2]:
        yield _korean_sentences(chapter.splitlines())
    for number in BILLS[held_out]:
        yield _korean_sentences(_bill(_read("konlpy", f"data/corpus/kobill/180989{number}.txt")))


def _bill(text: str) -> Iterator[str]:
    """Paragraphs of a bill: page numbers and the two columns of old and new wording are left out."""
    text = re.sub(r"^\s*- \d+ -\s*$", "", text.replace("\f", ""), flags=re.MULTILINE)
    text = re.sub(r"^신\s*[·ㆍ]\s*구조문대비표.*?(?=^[^\n]*비용추계서|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    paragraph = ""
    for line in filter(str.strip, text.splitlines()):
        # lines break inside words, so a space at a line's end counts; only full lines go on in the next
        if re.match(r"\s|제\d+조(의\d+)?\(|[①-⑳]", line):
            yield paragraph
            paragraph = ""
        paragraph += line.lstrip() + (" " if line.endswith(".") else "")
        if len(line.strip()) < 28:
            yield paragraph
            paragraph = ""
    yield paragraph


# what stands in front of a sentence: the number and title of an article, a list item's mark
MARKS = (
    r"^(?:제\d+조(?:의\d+)?(?:\([^)]*\)\s*|\s+(?!및|중|제\d|제목))|[①-⑳]\s*|[가-하]\.\s+|○\s+|\d+\.\s+|\([^)]*\)\s+)+"
)


def _korean_sentences(paragraphs: Iterable[str]) -> list[str]:
    """Sentences that end like one and are whole, without headings, captions and formulas."""
    found = []
    for paragraph in paragraphs:
        for line in re.split(r"(?<=[다음임함됨자]\.)\s+|(?<=\)\.)\s+", " ".join(paragraph.split())):
            bare = re.sub(MARKS, "", line)
            whole = all(bare.count(left) == bare.count(right) for left, right in ("“”", "()", "｢｣"))
            ends = len(bare) >= 12 and re.search(r"[다음임함됨)]\.$", bare)
            if whole and ends and not re.search(r"자료:| : |[가-힣]제\d+조", bare):
                found.append(bare)
    return found


_READERS = {"en": _english, "ko": _korean}
