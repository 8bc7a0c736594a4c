"""Batches of the collator: what training attends to is what `compress` will cache, and nothing else is labeled."""

import pickle

import pytest
import torch
from training_cases import SCHEMES, make_features, patched

import gistkern
from gistkern.training import GistDataCollator

TOLERANCE = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_masked_training_forward_equals_compress_and_cached_decode(scheme, positions):
    model, handle, segments = patched(scheme, positions)
    features = make_features(5)
    assert len({len(feature["context_ids"]) for feature in features}) > 2, "the batch is ragged"
    batch = GistDataCollator(0, handle, **segments)(features)
    with torch.no_grad():
        model.eval()
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
        for row, feature in enumerate(features):
            answer = feature["answer_ids"]
            cache = gistkern.compress(model, torch.tensor([feature["context_ids"]]), **segments)
            step = torch.tensor([feature["question_ids"]])
            for place, token in enumerate(answer):
                decoded = model(step, past_key_values=cache).logits[0, -1]
                trained = logits[row, place - len(answer) - 1]
                torch.testing.assert_close(trained, decoded, **TOLERANCE)
                step = torch.tensor([[token]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_answers_are_labeled_and_padding_stands_left(scheme):
    _, handle, segments = patched(scheme)
    features = make_features(4, seed=1)
    batch = GistDataCollator(7, handle, **segments)(features)
    for row, feature in enumerate(features):
        answer = feature["answer_ids"]
        assert batch["labels"][row, -len(answer) :].tolist() == answer
        assert (batch["labels"][row, : -len(answer)] == -100).all()
        real = batch["attention_mask"][row] == 1
        assert (batch["input_ids"][row][~real] == 7).all()
        stream = batch["input_ids"][row][real].tolist()
        assert real.tolist() == sorted(real.tolist()), "padding stands left of the tokens"
        assert stream[-len(answer) - len(feature["question_ids"]) :] == feature["question_ids"] + answer
        gists = [token for token in stream if token >= handle.first_id]
        if scheme == "single":
            assert gists == handle.gist_token_ids
            assert stream[: len(feature["context_ids"])] == feature["context_ids"]
        if scheme == "hierarchical":
            assert gists[-3:] == handle.gist_token_ids
            assert gists[:-3] == handle.segment_gist_token_ids * ((len(gists) - 3) // 2)
    assert ("gist_layout" in batch) == (scheme == "hierarchical")


def test_teacher_and_reconstruction_rows():
    _, handle, segments = patched("segments")
    features = make_features(3, span=True)
    batch = GistDataCollator(0, handle, **segments, teacher=True, cue=[11, 12])(features)
    plain = GistDataCollator(0, handle, **segments, cue=[11, 12])(
        [{**f, "span_ids": f["context_ids"]} for f in features]
    )
    whole = GistDataCollator(0, handle, **segments, cue=[11, 12])(make_features(3))
    for row, feature in enumerate(features):
        seen = batch["teacher"]["input_ids"][row][batch["teacher"]["attention_mask"][row] == 1].tolist()
        assert seen == feature["context_ids"] + feature["question_ids"] + feature["answer_ids"]
        again = batch["reconstruction"]
        assert again["input_ids"][row, -5:].tolist() == [11, 12, *feature["span_ids"]]
        assert again["labels"][row, -4:].tolist() == [-100, *feature["span_ids"]]
        length = int(again["attention_mask"][row].sum())
        question = len(feature["question_ids"]) + len(feature["answer_ids"])
        assert length == int(batch["attention_mask"][row].sum()) - question + 5, "the same context and gist tokens"
    assert torch.equal(plain["reconstruction"]["input_ids"], whole["reconstruction"]["input_ids"]), "no span: all of it"


class Words:
    """A tokenizer of numbers."""

    pad_token_id = None

    def __init__(self, bos=()):
        self.bos = list(bos)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.bos * add_special_tokens + [int(word, 16) for word in text.split()]}


def test_texts_are_their_ids():
    _, handle, _ = patched()
    collate = GistDataCollator(Words(), handle, cue="5 6")
    texts = collate([{"context": "1 2 3", "question": "4", "answer_ids": [8, 9]}])
    ids = GistDataCollator(0, handle, cue=[5, 6])(
        [{"context_ids": torch.tensor([1, 2, 3]), "question_ids": (4,), "answer_ids": [8, 9]}]
    )
    assert torch.equal(texts["input_ids"], ids["input_ids"])
    assert torch.equal(texts["reconstruction"]["input_ids"], ids["reconstruction"]["input_ids"])
    assert set(collate.fields) >= {"context", "span_ids", "answer"}


@pytest.mark.parametrize("text", ["b c", "7 b c"])
def test_a_context_begins_as_in_a_corpus_and_what_follows_does_not(text, tmp_path):
    """Whatever spells the BOS out, it stands there once: in training, and in what is compressed for serving."""
    model, handle, _ = patched()
    trained = GistDataCollator(Words([7]), handle)([{"context": text, "question": "d", "answer": "e f"}])
    gists = handle.gist_token_ids
    assert trained["input_ids"].tolist() == [[7, 11, 12, *gists, 13, 14, 15]]
    store = gistkern.compress_corpus(model.eval(), {"d": text}, tmp_path, Words([7]), progress=False)
    assert store["d"].get_seq_length() == 3 + len(gists)


def test_a_model_remembers_how_contexts_began():
    _, handle, _ = patched()
    handle.record(context_prefix=[7])
    GistDataCollator(Words([7]), handle)
    with pytest.raises(ValueError, match=r"contexts of the model's training begin with \[7\], this tokenizer .* no "):
        GistDataCollator(Words(), handle)


def test_a_worker_gets_a_copy_without_the_model():
    _, handle, segments = patched("hierarchical")
    collate = GistDataCollator(0, handle, **segments)
    data = pickle.dumps(collate)
    assert len(data) < 2000
    features = make_features(2)
    assert torch.equal(pickle.loads(data)(features)["input_ids"], collate(features)["input_ids"])


def test_accelerate_moves_the_layout_with_the_batch():
    from accelerate.utils import send_to_device

    _, handle, segments = patched("hierarchical")
    batch = GistDataCollator(0, handle, **segments, teacher=True, cue=[9])(make_features(2))
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert moved["gist_layout"].device.type == moved["reconstruction"]["gist_layout"].device.type == "meta"
    assert moved["gist_layout"].num_rows == batch["gist_layout"].num_rows
    assert moved["teacher"]["labels"].is_meta


GOOD = {"context_ids": [1, 2], "question_ids": [3], "answer_ids": [4]}
TEXTS = {"context": "1 2", "question": "3", "answer": "4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_ids": [1, 60]}, "context_ids of feature 1 holds gist tokens: pass raw tokens"),
        ({"answer_ids": [61]}, "answer_ids of feature 1 holds gist tokens"),
        ({"answer_ids": []}, "answer_ids of feature 1 must be a list of at least one token"),
        ({"context_ids": [[1, 2]]}, r"at least one token, got shape \(1, 2\)"),
        ({"question_ids": [0.5]}, "question_ids of feature 1 must be token ids, got torch.float32"),
        ({"question_ids": [5, -1]}, "question_ids of feature 1 must be token ids, got -1"),
        ({"question_ids": None}, "question_ids of feature 1 must be a list of token ids, got None"),
        ({"question_ids": "ask"}, "question_ids of feature 1 must be a list of token ids, got 'ask'"),
        ({"question_ids": [[1], [2, 3]]}, "question_ids of feature 1 must be a list of token ids, got"),
        ({"depth": 0.5}, r"feature 1 has unknown fields \['depth'\]: expected some of \['context_ids'"),
        ({"context": "x"}, r"unknown fields \['context'\] \(texts need a tokenizer"),
        ({"span_ids": [1]}, r"unknown fields \['span_ids'\] \(a span is read where the collator has a cue\)"),
    ],
)
def test_bad_features(change, message):
    _, handle, _ = patched()
    with pytest.raises(ValueError, match=message):
        GistDataCollator(0, handle)([GOOD, {**GOOD, **change}])


def test_more_bad_input():
    _, handle, _ = patched()
    for collate, features, message in [
        (GistDataCollator(0, handle), [], "the list of features is empty"),
        (GistDataCollator(0, handle), [{"context_ids": [1], "answer_ids": [2]}], "feature 0 lacks question_ids"),
        (GistDataCollator(0, handle), [{}], "a plain Trainer drops them, unless it has remove_unused_columns=False"),
        (GistDataCollator(Words(), handle), [{**GOOD, "answer": "4"}], "both answer_ids and answer"),
        (GistDataCollator(Words(), handle), [{**GOOD, "context": ["1"]}], "both context_ids and context"),
        (GistDataCollator(Words(), handle), [{**TEXTS, "question": None}], "question of feature 0: a text must be a s"),
        (GistDataCollator(Words(), handle), [{**TEXTS, "context": "\ud83d"}], "context of feature 0: character 0 of"),
        (GistDataCollator(0, handle, cue=[1]), [GOOD, {**GOOD, "span_ids": [1]}], "1 of 2 features have a span"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate(features)
    with pytest.raises(ValueError, match="cue is a text, which needs a tokenizer"):
        GistDataCollator(0, handle, cue="again:")
    with pytest.raises(ValueError, match="cue_ids of the cue must be a list of at least one token"):
        GistDataCollator(0, handle, cue=[])


def test_segments_that_compress_refuses():
    _, handle, _ = patched("hierarchical")
    for arguments, message in [
        ({}, "trained in segments: pass segment_length"),
        ({"segment_length": 0}, "segment_length must be an int >= 1"),
        ({"segment_length": 4, "segment_overlap": 4}, "segment_overlap must be less than segment_length"),
    ]:
        with pytest.raises(ValueError, match=message):
            GistDataCollator(0, handle, **arguments)
    handle.sink_tokens = 5
    with pytest.raises(ValueError, match="segment_length must be at least the 5 sink tokens"):
        GistDataCollator(0, handle, segment_length=4)
