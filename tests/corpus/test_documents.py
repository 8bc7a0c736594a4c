"""What is taken for documents, and what is refused before anything is computed or written."""

import numpy as np
import pytest
import torch
from corpus_cases import WORDS, patched
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gistkern import GistStore, compress, compress_corpus
from gistkern.corpus import compress as compressing

SMALL = {"batch_tokens": 200, "chunk_documents": 8, "progress": False}


@pytest.fixture(scope="module")
def handle():
    return patched()


@pytest.fixture
def nothing_computed(monkeypatch):
    monkeypatch.setattr(compressing, "compress_documents", lambda *_, **__: pytest.fail("a document was compressed"))


def letters(text):
    """A tokenizer that knows no special tokens."""
    return {"input_ids": [ord(one) % WORDS for one in text]}


GOOD = [[1]] * 9


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (["a text"], {}, "document '0' is a text: pass a tokenizer"),
        ([*GOOD, []], {}, "document '9' is empty"),
        ([*GOOD, ("b", "")], {"tokenizer": letters}, "document 'b' is empty"),
        ([*GOOD, ("b", None)], {}, "document 'b' is a None"),
        ([*GOOD, ("b", 7)], {}, "document 'b' is a int"),
        ([*GOOD, ("b", b"bytes")], {}, "document 'b' is a bytes"),
        ([*GOOD, {"input_ids": [1]}], {}, "document '9' is a dict"),
        ([*GOOD, [1, 2.0]], {}, "document '9' holds 2.0 where token ids"),
        ([*GOOD, [1, True]], {}, "document '9' holds True where token ids"),
        ([*GOOD, ["1"]], {}, "document '9' holds '1' where token ids"),
        ([*GOOD, [[1, 2]]], {}, r"document '9' holds \[1, 2\] where token ids"),
        ([*GOOD, torch.ones(2)], {}, "document '9' holds 1.0 where token ids"),
        ([*GOOD, ("b", [2, WORDS])], {}, f"document 'b' holds token {WORDS}, the model's words are 0 to {WORDS - 1}"),
        ([*GOOD, ("b", [-1])], {}, "document 'b' holds token -1"),
        ([*GOOD, ("b", [10**30])], {}, "document 'b' holds token 1000"),
        ([*GOOD, ("b", "half \ud800")], {"tokenizer": letters}, "document 'b' cannot be written as UTF-8"),
        ([("a", [1]), ("a", [2])], {}, "two documents are called 'a'"),
        ([*GOOD, ("3", [2])], {}, "two documents are called '3'"),
        ({3: [1]}, {}, "names of documents must be strings"),
        ({None: [1]}, {}, "names of documents must be strings"),
        ([*GOOD, ("", [1])], {}, "names of documents must be strings that say something"),
        ({"a": [1], "\ud800": [1]}, {}, "cannot be written as UTF-8"),
        ("texts/", {"tokenizer": letters}, "documents is a single str"),
        (b"texts", {}, "documents is a single bytes"),
        ({"a", "b"}, {"tokenizer": letters}, "documents is a set"),
        (None, {}, "documents must be a mapping or iterable, got NoneType"),
        ([[1]], {"rank": 1}, "pass both rank and ranks"),
        ([[1]], {"rank": 2, "ranks": 2}, "rank must lie in 0..1"),
        ([[1]], {"rank": 0, "ranks": 0}, "ranks must be"),
        ([[1]], {"segment_overlap": 3}, "segment_overlap must be less than segment_length"),
    ],
)
def test_bad_input(handle, tmp_path, nothing_computed, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        compress_corpus(handle.model, corpus, tmp_path / "store", **{**SMALL, "chunk_documents": 1}, **options)
    assert not (tmp_path / "store").exists()


def test_paths_are_refused_and_ranks_of_the_environment_are_counts(handle, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="documents is a single PosixPath"):
        compress_corpus(handle.model, tmp_path, tmp_path / "store")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK='one' and WORLD_SIZE='1' in the environment must be counts"):
        compress_corpus(handle.model, [[1]], tmp_path / "store")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: pass a folder"):
        compress_corpus(handle.model, [[1]], tmp_path / "file", progress=False)


def test_what_streams_is_refused_before_its_chunk(handle, tmp_path, monkeypatch):
    """And what came before it is kept, for the run that gets a better stream."""
    begun = []
    real = compressing.compress_documents
    monkeypatch.setattr(
        compressing, "compress_documents", lambda *given, **more: begun.append(1) or real(*given, **more)
    )
    options = {**SMALL, "chunk_documents": 2}
    with pytest.raises(ValueError, match="two documents are called 'a'"):
        compress_corpus(handle.model, iter([("a", [1]), ("b", [2]), ("c", [3]), ("a", [4])]), tmp_path, **options)
    assert len(begun) == 1
    assert list(GistStore(tmp_path)) == ["a", "b"]
    stream = iter([("a", [1]), ("b", [2]), ("c", [3]), ("d", [4])])
    assert list(compress_corpus(handle.model, stream, tmp_path, **options)) == list("abcd")
    assert len(begun) == 2


def test_what_changes_between_two_readings_is_refused(handle, tmp_path):
    class Once:
        left = ([1], [2])

        def __iter__(self):
            yield from self.left
            self.left = ()

    with pytest.raises(ValueError, match="documents were 2 when they were checked and 0"):
        compress_corpus(handle.model, Once(), tmp_path, **SMALL)


@pytest.mark.parametrize(
    "ids", [(1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2], list(torch.tensor([1, 2]))]
)
def test_ids_of_every_kind(handle, tmp_path, ids):
    store = compress_corpus(handle.model, {"a": ids, "b": [1, 2]}, tmp_path, **SMALL)
    one, other = store["a"].layers[1], store["b"].layers[1]
    torch.testing.assert_close(one.gist.key, other.gist.key, rtol=1e-5, atol=1e-5)


def test_names_that_are_not_there(handle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = compress_corpus(handle.model, [[1]], "store", **SMALL)
    monkeypatch.chdir("/")
    assert store["0"].batch_size == 1, "a relative folder is meant where it was given"
    for name in ("\ud800", 0, None, ("0",)):
        assert name not in store
        with pytest.raises(KeyError):
            store[name]
    with pytest.raises(ValueError, match="names is one string"):
        store.batch("0")
    with pytest.raises(ValueError, match="device='cuda:99'"):
        GistStore(tmp_path / "store", "cuda:99")


def test_texts_begin_as_the_tokenizer_begins_documents(handle, tmp_path):
    raw = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    store = compress_corpus(handle.model, {"x": "a b", "y": "<s> a b"}, tmp_path, tokenizer, **SMALL)
    expected = compress(handle.model, torch.tensor([[0, 2, 3]] * 2))
    torch.testing.assert_close(store.batch(["x", "y"]).layers[1].gist.key, expected.layers[1].gist.key)
    assert store["y"].get_seq_length() == store["x"].get_seq_length() == 3 + 3
    tokenizer.add_bos_token = False
    with pytest.raises(ValueError, match=r"was begun with context_prefix \[0\], not \[\]"):
        compress_corpus(handle.model, {"x": "a b", "y": "<s> a b"}, tmp_path, tokenizer, **SMALL)
