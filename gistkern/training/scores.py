"""What answers are worth, as texts: equal, contained, words in common, and how sure a share of them is."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gistkern.training.generation import Generated, generation_metrics

__all__ = ["mean_scores", "normalized", "scores_of", "text_metrics", "token_f1", "wilson"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# scripts in which words are not, or not always, set apart by spaces; Korean attaches its particles
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "。，、？！：；「」『』（）《》“”‘’…", " "))


def normalized(text: str) -> str:
    """Lower case, without punctuation and English articles, with single spaces (as SQuAD's evaluation has it).

    Examples
    --------
    >>> from gistkern.training.scores import normalized
    >>> normalized(" The  Bell-ringer. ")
    'bell ringer'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _pieces(text: str, unspaced: bool) -> list[str]:
    plain = normalized(text)
    return list(plain.replace(" ", "")) if unspaced else plain.split()


def token_f1(said: str, right: str) -> float:
    """Harmonic mean of how much of `said` is right and how much of `right` was said.

    Counted in words (Rajpurkar et al. 2016, SQuAD), or in characters where the right answer is of a script without
    spaces between its words, and in Korean.

    Examples
    --------
    >>> from gistkern.training.scores import token_f1
    >>> round(token_f1("in the old mill", "The mill"), 3)
    0.5
    """
    unspaced = bool(_UNSPACED.search(right))
    one, other = _pieces(said, unspaced), _pieces(right, unspaced)
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def scores_of(said: str, right: str) -> dict[str, float]:
    """`exact` and `contained` (0 or 1, of normalized texts, by whole words where there are any) and `f1`."""
    one, other = normalized(said), normalized(right)
    if _UNSPACED.search(right):
        one, other = one.replace(" ", ""), other.replace(" ", "")
        inside = other in one
    else:
        inside = f" {other} " in f" {one} "
    if not other:  # punctuation alone
        one, other = said.strip(), right.strip()
        inside = other in one if other else not one
    return {"exact": float(one == other), "contained": float(inside), "f1": token_f1(said, right)}


def mean_scores(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """The means of `scores_of` all answers."""
    each = [scores_of(one, other) for one, other in zip(said, right, strict=True)]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def text_metrics(tokenizer: Any) -> Callable[[Generated], dict[str, float]]:
    """Metrics of generated ids for `GistTrainer`: those of their texts, and `token_accuracy` of the ids."""

    def metrics(generated: Generated) -> dict[str, float]:
        said, right = (
            [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
            for rows in (generated.predictions, generated.labels)
        )
        return mean_scores(said, right) | {"token_accuracy": generation_metrics(generated)["token_accuracy"]}

    return metrics


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, "Probable inference, the law of succession").

    Examples
    --------
    >>> from gistkern.training.scores import wilson
    >>> [round(end, 3) for end in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not n:
        return 0.0, 1.0
    share, square = hits / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)
