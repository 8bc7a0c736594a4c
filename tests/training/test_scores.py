"""What answers are worth, against a second way of counting."""

import random

import pytest
from training_cases import make_features, patched

from gistkern.hf.compress import compress
from gistkern.tables import as_text
from gistkern.training.answering import Answered, answered, cells
from gistkern.training.collator import GistDataCollator
from gistkern.training.rows import Tokenized
from gistkern.training.scores import mean_scores, scores_of, token_f1, wilson


@pytest.mark.parametrize(
    ("said", "right", "exact", "contained", "f1"),
    [
        (" The Mill. ", "mill", 1, 1, 1),
        ("in the old mill", "mill", 0, 1, 0.5),
        ("a windmill", "mill", 0, 0, 0),
        ("", "mill", 0, 0, 0),
        ("미라", "미라가", 0, 0, 0.8),
        ("열쇠는 미라가 가졌다", "미라", 0, 1, 4 / 11),
        ("東京 です", "東京", 0, 1, 2 / 3),
        ("?!", "!", 0, 1, 1),
        ("52047", "52047", 1, 1, 1),
    ],
)
def test_scores(said, right, exact, contained, f1):
    assert scores_of(said, right) == {"exact": exact, "contained": contained, "f1": pytest.approx(f1)}


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    rng = random.Random(0)
    for _ in range(50):
        said, right = (rng.choices("bcdefg", k=rng.randint(1, 6)) for _ in range(2))
        left, common = list(right), 0
        for word in said:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(said), common / len(right)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert token_f1(" ".join(said), " ".join(right)) == pytest.approx(expected)


def test_means_and_intervals():
    assert mean_scores(["a b", "c"], ["b", "d"]) == {"exact": 0.5, "contained": 0.5, "f1": 0.5}
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(81, 100)
    assert low == pytest.approx(0.7222, abs=1e-4)
    assert high == pytest.approx(0.8749, abs=1e-4)


class Digits:
    """Ids as words."""

    def __call__(self, text):
        return []

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def test_every_way_says_what_one_row_alone_says():
    """Sorted by length and batched, back in order; the base model, and the trained one without a context."""
    import torch
    from training_cases import lora

    model, handle, segments = patched("segments")
    wrapped = lora(model, init_lora_weights=False).double().eval()
    collator = GistDataCollator(0, handle, **segments)
    features = [{name: torch.tensor(ids).numpy() for name, ids in one.items()} for one in make_features(7)]
    data = Tokenized(features, [str(at) for at in range(7)], 0)
    found = {one.way: one for one in answered(wrapped, Digits(), data, collator, batch=3, max_new_tokens=4)}

    def alone(ids, **cache):
        out = wrapped.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False, **cache)
        return Digits().decode(out[0, len(ids) :].tolist())

    for at, one in enumerate(features):
        context, question = one["context_ids"].tolist(), one["question_ids"].tolist()
        cache = compress(wrapped, [context], **segments)
        assert found["gist"].rows[at] == int(cache.gist_rows[0])
        assert found["gist"].said[at] == alone(question, past_key_values=cache)
        assert found["none"].said[at] == alone(question)
        with wrapped.disable_adapter():
            assert found["full"].said[at] == alone(context + question)
        assert found["full"].right[at] == Digits().decode(one["answer_ids"].tolist())
    layers, heads, head_dim = 2, 1, 16
    assert found["gist"].row_bytes == found["full"].row_bytes == 2 * layers * heads * head_dim * 8
    assert found["full"].rows == found["full"].tokens == [len(one["context_ids"]) for one in features]
    said = as_text(*cells({way: one.summary() for way, one in found.items()}))
    assert len(said.splitlines()) == 2 + len(found)
    assert max(map(len, said.splitlines())) <= 100


def test_the_widest_table_has_a_hundred_columns():
    wide = Answered("full", ["a"] * 99_999, ["a"] * 99_999, [131_072] * 99_999, [131_072] * 99_999, 131_072.0, 86_400.0)
    summary = wide.summary()
    assert (summary["exact"], summary["ratio"], summary["bytes"]) == (1.0, 1.0, 131_072**2)
    lines = as_text(
        *cells({"gist": summary, "full": summary, "none": {**summary, "rows": 0, "ratio": None}})
    ).splitlines()
    assert max(map(len, lines)) <= 100
    assert "17.2 GB" in lines[2]


def test_an_answer_of_nothing_is_contained_in_nothing_else():
    assert scores_of("a lamp", "")["contained"] == 0
    assert scores_of("", "")["contained"] == 1
