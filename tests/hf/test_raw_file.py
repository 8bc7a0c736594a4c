"""Raw rows in files: the same as in memory, read a segment at a time, and never silently wrong ones."""

import copy
import json
import os
import pickle
from contextlib import contextmanager

import pytest
import torch
from conftest import make_model, random_ids
from safetensors.torch import load_file

import gistkern
from gistkern.cache import raw_file

SEGMENT, TAIL = 7, 6


@pytest.fixture
def model():
    model = make_model(dtype=torch.float32)
    gistkern.patch(model, num_gist_tokens=3)
    return model


@pytest.fixture
def summarized():
    model = make_model(dtype=torch.float32)
    gistkern.patch(model, num_gist_tokens=3, num_segment_gist_tokens=2)
    return model


CONTEXTS = [random_ids(1, length, length)[0].tolist() for length in (45, 23, 1)]
QUESTIONS = random_ids(3, TAIL, 99)


def compressed(model, keep_raw, **more):
    return gistkern.compress(model, CONTEXTS, segment_length=SEGMENT, keep_raw=keep_raw, **more)


def same(one, other):
    assert one.gist_rows.tolist() == other.gist_rows.tolist()
    for layer, mine in enumerate(one.layers):
        for found, expected in zip(mine.gist.tensors(), other.layers[layer].gist.tensors(), strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", ["segments", "hierarchical"])
@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_a_file_holds_what_memory_holds(kind, dtype, model, summarized, tmp_path):
    model, path = model if kind == "segments" else summarized, tmp_path / "raw.safetensors"
    memory = compressed(model, "cpu", raw_dtype=dtype)
    file = compressed(model, path, raw_dtype=dtype)
    memory.raw.save(tmp_path / "saved.safetensors")
    assert path.read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    memory.save(tmp_path / "gists.safetensors")
    again = gistkern.GistCache.load(tmp_path / "gists.safetensors", model, raw=tmp_path / "saved.safetensors")
    assert memory.raw.nbytes == file.raw.nbytes == again.raw.nbytes
    for top_k in (1, 3):
        expected = memory.restore(model, QUESTIONS, top_k)
        for cache in (file, again, copy.deepcopy(file), pickle.loads(pickle.dumps(file))):
            same(cache.restore(model, QUESTIONS, top_k), expected)


def test_it_is_a_safetensors_file(model, tmp_path):
    cache = compressed(model, tmp_path / "raw.safetensors")
    tensors = load_file(tmp_path / "raw.safetensors")
    for number in range(len(cache.raw.segments)):
        assert torch.equal(tensors[f"{number}.key"], cache.raw.rows(number).key)
        assert torch.equal(tensors[f"{number}.value"], cache.raw.rows(number).value)
    assert tensors["ids"].tolist() == [token for sample in CONTEXTS for token in sample] or len(CONTEXTS) > 1
    by_sample = [[cache.raw.segments[number] for number in cache.raw.of_sample(sample)] for sample in range(3)]
    for context, segments in zip(CONTEXTS, by_sample, strict=True):
        assert [token for one in segments for token in one.ids.tolist()] == context
        behind = [place + 3 * (place // SEGMENT) for place in range(len(context))]  # gists stand between them
        assert [place for one in segments for place in one.positions.tolist()] == behind


def test_a_call_of_the_compression_is_written_when_it_is_through(model, tmp_path, monkeypatch):
    """Memory holds one call's rows; what fails leaves no file, and the one that was there."""
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: SEGMENT)
    expected = compressed(model, "cpu").restore(model, QUESTIONS, 2)
    same(compressed(model, tmp_path / "raw").restore(model, QUESTIONS, 2), expected)
    before, calls = (tmp_path / "raw").read_bytes(), []

    def fails(*given):
        calls.append(given)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    with model.gistkern_handle.inner.register_forward_hook(fails), pytest.raises(RuntimeError, match="out of memory"):
        compressed(model, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == before
    assert os.listdir(tmp_path) == ["raw"]


def test_a_torn_file_is_refused_whichever_byte_is_missing(model, tmp_path):
    compressed(model, tmp_path / "raw")
    whole = (tmp_path / "raw").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for length in (0, 7, 8, 100, header, header + 8, header + 40, len(whole) - 1):
        (tmp_path / "raw").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"torn|raw: no JSON"):
            gistkern.RawSegments.load(tmp_path / "raw")
    (tmp_path / "raw").write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="torn"):
        gistkern.RawSegments.load(tmp_path / "raw")


def test_a_changed_byte_is_seen_where_it_is_used(model, tmp_path):
    """In front of the rows when the file is opened, in a segment's rows when those are wanted."""
    cache = compressed(model, tmp_path / "raw")
    whole = (tmp_path / "raw").read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in (begin, begin + 8, begin + 32 * len(cache.raw.segments) + 3):  # the table, and an id
        (tmp_path / "raw").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|torn"):
            gistkern.RawSegments.load(tmp_path / "raw")
    (tmp_path / "raw").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    opened = gistkern.RawSegments.load(tmp_path / "raw")
    last = max(number for number, one in enumerate(opened.segments) if one.rows)
    opened.rows(0)
    for raw in (opened, cache.raw):  # one that was opened before as well
        with pytest.raises(ValueError, match=f"damaged: the raw rows of segment {last}"):
            raw.rows(last)
    (tmp_path / "raw").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged"):
        cache.restore(model, QUESTIONS, 9)
    assert cache.restore(model, QUESTIONS, 0).gist_rows.tolist() == cache.gist_rows.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layers", 0), ("layers", "3"), ("heads", 1), ("dim", 2**40), ("segments", 10**12), ("segments", True)),
        *(("dtype", "F33"), ("rows_dtype", "I64"), ("index", 1), ("gists", -1), ("seen", []), ("contexts", 3)),
        *(("rows", []), ("format", "gistkern-raw-9"), ("positions", "gist_first"), ("seen", [1, 2, 3])),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(field, value, model, tmp_path):
    compressed(model, tmp_path / "raw")
    whole = (tmp_path / "raw").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    about = json.loads(header["__metadata__"]["gistkern"])
    header["__metadata__"]["gistkern"] = json.dumps({**about, field: value})
    text = json.dumps(header).encode()
    (tmp_path / "raw").write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(ValueError, match="raw"):
        gistkern.RawSegments.load(tmp_path / "raw")


def test_a_missing_file(model, tmp_path):
    cache = compressed(model, tmp_path / "raw")
    (tmp_path / "raw").unlink()
    with pytest.raises(FileNotFoundError, match="the file with the raw rows is gone"):
        cache.restore(model, QUESTIONS, 1)
    with pytest.raises(FileNotFoundError):
        gistkern.RawSegments.load(tmp_path / "raw")
    os.mkfifo(tmp_path / "raw")
    with pytest.raises(ValueError, match="no regular file"):
        cache.restore(model, QUESTIONS, 1)
    with pytest.raises(OSError, match="no such folder"):
        compressed(model, tmp_path / "nowhere" / "raw")


def test_raw_rows_of_something_else_are_refused(model, tmp_path):
    cache, other = compressed(model, tmp_path / "raw"), make_model(dtype=torch.float32, seed=5)
    cache.save(tmp_path / "gists")
    gistkern.patch(other, num_gist_tokens=3)
    longer = gistkern.compress(model, CONTEXTS, segment_length=SEGMENT + 4, keep_raw="cpu")
    elsewhere = gistkern.compress(model, CONTEXTS[::-1], segment_length=SEGMENT, keep_raw="cpu")
    stranger = compressed(other, "cpu")
    for number, wrong in enumerate((longer, elsewhere, stranger)):
        wrong.raw.save(tmp_path / str(number))
        with pytest.raises(ValueError, match="the raw rows are not of the context"):
            gistkern.GistCache.load(tmp_path / "gists", model, raw=tmp_path / str(number))
    with pytest.raises(ValueError, match="another model"):
        cache.restore(other, QUESTIONS, 1)
    with pytest.raises(ValueError, match="format"):
        gistkern.GistCache.load(tmp_path / "gists", model, raw=tmp_path / "gists")
    with pytest.raises(ValueError, match="is not a gist cache"):
        gistkern.GistCache.load(tmp_path / "raw", model)
    with pytest.raises(ValueError, match="holds no raw rows"):
        gistkern.GistCache.load(tmp_path / "gists", model).restore(model, QUESTIONS, 1)


def test_raw_rows_of_nearly_the_same_compression_are_refused(model, tmp_path):
    """As many tokens and rows, but another order, another ending (which a context's digest leaves out), another cut."""
    one, other = (random_ids(1, 45, seed)[0].tolist() for seed in (1, 2))
    ending = one[:-8] + other[-8:]
    kept = {"segment_length": 23, "keep_raw": tmp_path / "raw"}
    gistkern.compress(model, [one, other], **kept).save(tmp_path / "gists")
    gistkern.GistCache.load(tmp_path / "gists", model).save(tmp_path / "again")
    for name in ("gists", "again"):
        found = gistkern.GistCache.load(tmp_path / name, model, raw=tmp_path / "raw")
        assert found.restore(model, QUESTIONS[:2], 1).gist_rows.min() > found.gist_rows.max()
    found.batch_select_indices(torch.tensor([1, 0]))
    found.save(tmp_path / "turned")
    for wrong, changes in (([other, one], {}), ([ending, other], {}), ([one, other], {"segment_length": 24})):
        gistkern.compress(model, wrong, **kept | changes)
        with pytest.raises(ValueError, match="the raw rows are not of the context"):
            gistkern.GistCache.load(tmp_path / "gists", model, raw=tmp_path / "raw")
    gistkern.compress(model, [one, other], **kept)
    with pytest.raises(ValueError, match="the raw rows are not of the context"):
        gistkern.GistCache.load(tmp_path / "turned", model, raw=tmp_path / "raw")


@pytest.mark.parametrize("kind", ["segments", "hierarchical"])
def test_picked_samples_are_saved_as_they_are(kind, model, summarized, tmp_path):
    """What is left of a batch has files of its own, without the rows of the others."""
    model = model if kind == "segments" else summarized
    cache = compressed(model, "cpu")
    picked = torch.tensor([1, 0, 1])
    cache.batch_select_indices(picked)
    cache.raw.save(tmp_path / "raw")
    cache.save(tmp_path / "gists")
    again = gistkern.GistCache.load(tmp_path / "gists", model, raw=tmp_path / "raw")
    for top_k in (1, 3):
        same(again.restore(model, QUESTIONS[picked], top_k), cache.restore(model, QUESTIONS[picked], top_k))
    cache.batch_select_indices(torch.tensor([1]))
    cache.raw.save(tmp_path / "one")
    one = gistkern.RawSegments.load(tmp_path / "one")
    assert [token for segment in one.segments for token in segment.ids.tolist()] == CONTEXTS[0]
    assert one.cuts() == cache.raw.cuts()


def test_saving_over_the_raw_rows_is_refused(model, tmp_path):
    """One name for both files would leave a cache that cannot restore; the raw rows may be saved to their own."""
    cache = compressed(model, tmp_path / "one")
    with pytest.raises(ValueError, match="holds the raw rows of this cache"):
        cache.save(tmp_path / ".." / tmp_path.name / "one")
    before = (tmp_path / "one").read_bytes()
    cache.raw.save(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == before
    (tmp_path / "one").unlink()
    cache.save(tmp_path / "gists")  # gist rows are saved without their raw rows too


def test_another_writer_of_the_same_name_is_seen(model, tmp_path, monkeypatch):
    """Who writes last has the name; the cache of the other one refuses to restore from what is not its own."""
    ending = [*CONTEXTS[0][:-8], *CONTEXTS[1][:8]]
    gistkern.compress(model, [ending], segment_length=SEGMENT, keep_raw=tmp_path / "other")
    replacing = raw_file.replacing

    @contextmanager
    def overtaken(path):
        with replacing(path) as draft:
            yield draft
        os.replace(tmp_path / "other", path)

    monkeypatch.setattr(raw_file, "replacing", overtaken)
    cache = gistkern.compress(model, CONTEXTS[:1], segment_length=SEGMENT, keep_raw=tmp_path / "raw")
    with pytest.raises(ValueError, match="damaged"):
        cache.restore(model, QUESTIONS[:1], 99)


def test_questions_that_want_the_same_segment_read_it_once(model, tmp_path, monkeypatch):
    cache, read = gistkern.compress(model, CONTEXTS[:1], segment_length=SEGMENT, keep_raw=tmp_path / "raw"), []
    rows = type(cache.raw).rows
    monkeypatch.setattr(type(cache.raw), "rows", lambda raw, number: read.append(number) or rows(raw, number))
    cache.restore(model, QUESTIONS[:1].repeat(3, 1), 2)
    assert len(read) == len(set(read)) == 2


def test_what_restore_and_compress_do_not_take(model):
    cache = compressed(model, "cpu")
    for top_k in (-1, True, 1.0, "2", None, 2**31):
        with pytest.raises(ValueError, match="top_k must be"):
            cache.restore(model, QUESTIONS, top_k)
    for questions, message in (
        (QUESTIONS[:2], "2 questions for a cache of 3 samples"),
        (torch.cat([QUESTIONS, QUESTIONS]), "6 questions for a cache of 3 samples"),
        ([5, 6], "1 questions for a cache of 3 samples"),
        ([[5], [], [6]], "a question is empty"),
        ([], "a question is empty"),
        (torch.full_like(QUESTIONS, 10**6), "holds the id 1000000, the model's vocabulary has"),
        ({"words": [5]}, "hold no input_ids"),
        (QUESTIONS[0], "integers"),
        (QUESTIONS.float(), "integers"),
        (QUESTIONS[:, :0], "integers"),
        (torch.full_like(QUESTIONS, model.gistkern_handle.gist_token_ids[1]), "gist tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.restore(model, questions, 1)
    for questions in ("Who has it?", ["Who has it?"], None, [None, 1]):
        with pytest.raises(TypeError, match=r"the questions must be (lists of )?token ids"):
            cache.restore(model, questions, 1)
    with pytest.raises(ValueError, match="pass one of the two"):
        cache.restore(model, {"input_ids": QUESTIONS, "attention_mask": QUESTIONS}, 1, attention_mask=QUESTIONS)
    with pytest.raises(ValueError, match="a question is empty"):
        cache.restore(model, QUESTIONS, 1, attention_mask=torch.zeros(3, TAIL, dtype=torch.long))
    with pytest.raises(ValueError, match="scorer must be one of"):
        cache.restore(model, QUESTIONS, 1, scorer="best")
    with pytest.raises(ValueError, match="not from one that restore has made"):
        cache.restore(model, QUESTIONS, 1).restore(model, QUESTIONS, 1)
    with pytest.raises(ValueError, match="the cache is empty"):
        gistkern.GistCache().restore(model, QUESTIONS, 1)
    asked = cache.clone()
    with torch.no_grad():
        model(QUESTIONS, past_key_values=asked)
    with pytest.raises(ValueError, match="restore before the question is read"):
        asked.restore(model, QUESTIONS, 1)
    with pytest.raises(ValueError, match="raw_dtype is of raw rows that are kept"):
        compressed(model, None, raw_dtype=torch.int8)
    with pytest.raises(ValueError, match="raw_dtype must be"):
        compressed(model, "cpu", raw_dtype=torch.float16)
    for place in ("disk", "cuda:0", "mps", ""):
        with pytest.raises(ValueError, match='keep_raw must be "cpu" or the path'):
            compressed(model, place)
    with pytest.raises(TypeError, match='keep_raw must be "cpu" or the path'):
        compressed(model, True)


def test_more_context_behind_the_raw_rows_is_refused(model):
    """What was streamed onto a compressed context has no raw rows here."""
    handle = model.gistkern_handle
    cache = gistkern.compress(model, CONTEXTS[:1], segment_length=SEGMENT, keep_raw="cpu")
    gists = torch.tensor([handle.gist_token_ids])
    with torch.no_grad():
        model(torch.cat([random_ids(1, 5), gists], 1), past_key_values=cache)
        model(random_ids(1, 1), past_key_values=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match=r"not of the context|tail"):
        cache.restore(model, QUESTIONS[:1], 1)
