"""What an answer is worth: SQuAD's scores, RULER's, and how much of a sentence was repeated.

All scores are shares between 0 and 1. Of several right answers the best counts, but in `recall_all`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = [
    "SCORES",
    "best",
    "chosen",
    "contained",
    "edit_similarity",
    "exact",
    "f1",
    "normalized",
    "recall_all",
    "recall_part",
    "repeated",
]

# as SQuAD's own script: punctuation of ASCII alone
_ASCII = str.maketrans("", "", string.punctuation)


def normalized(text: str, language: str = "en") -> str:
    """A text without case, punctuation, English articles and extra space, as SQuAD's evaluation compares them.

    For other languages all of Unicode's punctuation goes, and no articles do.
    """
    text = text.lower()
    if language == "en":
        text = re.sub(r"\b(a|an|the)\b", " ", text.translate(_ASCII))
    else:
        text = "".join(one for one in text if not unicodedata.category(one).startswith("P")).translate(_ASCII)
    return " ".join(text.split())


def _pieces(text: str, language: str) -> Sequence[str]:
    """What F1 counts: words, and in Korean, whose words take endings, characters (as KorQuAD does)."""
    found = normalized(text, language)
    return found.split() if language == "en" else found.replace(" ", "")


def exact(said: str, answer: str, language: str = "en") -> float:
    """Whether both are the same when normalized."""
    return float(normalized(said, language) == normalized(answer, language))


def f1(said: str, answer: str, language: str = "en") -> float:
    """Harmonic mean of precision and recall of the words (in Korean: characters), each as often as it stands there.

    Examples
    --------
    >>> round(f1("in the Denver area", "Denver Broncos"), 2)
    0.4
    """
    ours, right = _pieces(said, language), _pieces(answer, language)
    if not ours or not right:
        return float(ours == right)
    same = sum((Counter(ours) & Counter(right)).values())
    return 2 * same / (len(ours) + len(right))


def contained(said: str, answer: str, language: str = "en") -> float:
    """Whether the normalized answer stands in what was said: as whole words, in Korean anywhere."""
    ours, right = normalized(said, language), normalized(answer, language)
    if not right:
        return float(not ours)
    return float(f" {right} " in f" {ours} " if language == "en" else right in ours)


def recall_all(said: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in what was said, whatever their case: RULER's score of most tasks."""
    return sum(one.lower() in said.lower() for one in answers) / len(answers)


def recall_part(said: str, answers: Sequence[str]) -> float:
    """Whether any answer stands in what was said: RULER's score of questions."""
    return float(any(one.lower() in said.lower() for one in answers))


def chosen(said: str, answer: str) -> float:
    """Whether the first whole number that was said is the right one."""
    found = re.search(r"\d+", said)
    return float(found is not None and int(found[0]) == int(answer))


def repeated(said: str, answer: str) -> float:
    """Share of the answer's characters before the first mistake; spaces count as one."""
    ours, right = (" ".join(text.split()) for text in (said, answer))
    same = next((i for i, (a, b) in enumerate(zip(ours, right, strict=False)) if a != b), min(len(ours), len(right)))
    return same / len(right)


def edit_similarity(said: str, answer: str) -> float:
    """1 - edits / length of the longer one: insertions, deletions and substitutions of characters (Levenshtein)."""
    ours, right = (" ".join(text.split()) for text in (said, answer))
    if not ours and not right:
        return 1.0
    row = list(range(len(right) + 1))
    for i, a in enumerate(ours, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return 1 - row[-1] / max(len(ours), len(right))


def best(score: str, said: str, answers: Sequence[str], language: str = "en") -> float:
    """A score by its name (`SCORES`): the best over the answers where one of them is enough."""
    found = {"recall_all": recall_all, "recall_part": recall_part}.get(score)
    if found is not None:
        return found(said, answers)
    if score in ("exact", "f1", "contained"):
        each = {"exact": exact, "f1": f1, "contained": contained}[score]
        return max(each(said, answer, language) for answer in answers)
    plain = {"chosen": chosen, "repeated": repeated, "edit_similarity": edit_similarity}[score]
    return max(plain(said, answer) for answer in answers)


SCORES = ("f1", "exact", "contained", "recall_all", "recall_part", "chosen", "repeated", "edit_similarity")
