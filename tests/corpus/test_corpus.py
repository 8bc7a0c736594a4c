"""Corpora: what is stored is what compress gives, nothing finished is lost or redone, damage is named."""

import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from corpus_cases import SMALL, WORDS, documents, patched

from gistkern import GistStore, compress, compress_corpus, left_padded
from gistkern.corpus import compress as compressing
from gistkern.corpus import journal
from gistkern.corpus.plan import batches_of, chunks_of, read_chunk

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus():
    return documents(21)


def rows(cache, sample=0):
    own = int(cache.gist_rows[sample])
    return torch.stack([torch.stack([layer.gist.key, layer.gist.value])[:, sample, :, -own:] for layer in cache.layers])


@pytest.mark.parametrize("segments", [{}, {"segment_length": 16}, {"segment_length": 16, "segment_overlap": 4}])
@pytest.mark.parametrize("options", [{}, {"positions": "gist_first", "sink_tokens": 2}, {"num_segment_gist_tokens": 2}])
def test_documents_come_back_as_compress_gives_them(tmp_path, corpus, segments, options):
    handle = patched(**options)
    if not segments and "num_segment_gist_tokens" in options:
        pytest.skip("a hierarchical model needs segments")
    store = compress_corpus(handle.model, corpus, tmp_path, **SMALL, **segments)
    assert len(store) == len(corpus)
    assert list(store) == list(corpus)
    question = torch.tensor([[3, 4, 5]])
    for name, ids in corpus.items():
        cache, alone = store[name], compress(handle.model, torch.tensor([ids]), **segments)
        torch.testing.assert_close(rows(cache), rows(alone), rtol=1e-4, atol=1e-5)  # batches round otherwise
        assert (cache.positions, cache.fingerprint) == (alone.positions, alone.fingerprint)
        assert cache.get_seq_length() == alone.get_seq_length()
        said = [handle.model(question, past_key_values=one).logits for one in (cache, alone)]
        torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_batches_are_ragged_and_generate(handle, store, corpus):
    names = ["doc-3", "doc-0", "doc-20", "doc-3"]
    questions = torch.tensor([[3, 4], [5, 6], [7, 8], [9, 10]])
    together = handle.model.generate(questions, past_key_values=store.batch(names), max_new_tokens=4, do_sample=False)
    for name, question, said in zip(names, questions, together, strict=True):
        alone = compress(handle.model, torch.tensor([corpus[name]]))
        expected = handle.model.generate(question[None], past_key_values=alone, max_new_tokens=4, do_sample=False)
        assert torch.equal(said, expected[0])


def test_a_batch_of_documents_of_different_rows(tmp_path):
    """Segment-wise, long documents own more rows."""
    handle, corpus = patched(), documents(6, 5, 90, seed=1)
    store = compress_corpus(handle.model, corpus, tmp_path, segment_length=20, **SMALL)
    cache = store.batch(corpus)
    expected = [len(range(0, len(ids), 20)) * 3 + 1 for ids in corpus.values()]  # gists, and a sink
    assert cache.gist_rows.tolist() == expected
    assert len(set(expected)) > 2
    for sample, name in enumerate(corpus):
        assert torch.equal(rows(cache, sample), rows(store[name]))


def test_a_queue_of_questions_is_served(handle, store, corpus):
    """Requests in batches as they come, some on one document: each is answered as if it were alone."""
    drawn = random.Random(0)
    queue = [(drawn.choice(list(corpus)[:6]), documents(1, 2, 9, seed=place)["doc-0"]) for place in range(23)]
    served = []
    for first in range(0, len(queue), 5):
        names, questions = zip(*queue[first : first + 5], strict=True)
        cache = store.batch(names, shared=True)
        assert cache.nbytes == store.batch(dict.fromkeys(names)).nbytes, "a document's rows once"
        ids, real = left_padded([torch.tensor(question) for question in questions])
        out = handle.model.generate(
            ids, attention_mask=real.long(), past_key_values=cache, max_new_tokens=4, do_sample=False
        )
        served += out[:, ids.shape[1] :].tolist()
    assert len({name for name, _ in queue}) < len(queue)
    for (name, question), said in zip(queue, served, strict=True):
        alone = compress(handle.model, torch.tensor([corpus[name]]))
        out = handle.model.generate(torch.tensor([question]), past_key_values=alone, max_new_tokens=4, do_sample=False)
        assert out[0, len(question) :].tolist() == said


def test_threads_share_a_store_and_processes_get_their_own(store, corpus, monkeypatch):
    """More files than are kept open, so that threads take them from each other; a pickled store opens its folder."""
    monkeypatch.setattr("gistkern.corpus.store._OPEN_FILES", 1)
    expected = {name: rows(store[name]) for name in corpus}
    names = [name for place in range(5) for name in random.Random(place).sample(list(corpus), len(corpus))]
    with ThreadPoolExecutor(8) as threads:
        for name, cache in zip(names, threads.map(store.__getitem__, names), strict=True):
            assert torch.equal(rows(cache), expected[name])
    again = pickle.loads(pickle.dumps(store))
    assert (again.folder, again.device, len(again)) == (store.folder, store.device, len(store))
    assert torch.equal(rows(again["doc-3"]), expected["doc-3"])


def test_the_store_does_not_depend_on_how_many_processes_wrote_it(handle, corpus, store, tmp_path):
    for rank in (2, 0, 1):
        shared = compress_corpus(handle.model, corpus, tmp_path / "shared", rank=rank, ranks=3, **SMALL)
    assert sorted(path.name for path in shared.folder.iterdir()) == sorted(p.name for p in store.folder.iterdir())
    for path in store.folder.iterdir():
        assert (shared.folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_is_compressed_twice(handle, corpus, store, monkeypatch):
    monkeypatch.setattr(compressing, "compress_documents", None)
    again = compress_corpus(handle.model, corpus, store.folder, **SMALL)
    assert list(again) == list(corpus)


def start(out, notes, rank):
    command = [sys.executable, str(HERE / "worker.py"), str(out), str(notes), str(rank), "2"]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_two_thousand_documents_two_processes_one_killed(tmp_path, request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as the workers, or the store of one process rounds otherwise
    out, notes = tmp_path / "store", tmp_path / "notes"
    first, second = start(out, notes, 0), start(out, notes, 1)
    # the second has finished a file and is in the middle of another one
    deadline = time.time() + 200
    while not (_odd(out, "safetensors") and any(path.stat().st_size > 5000 for path in _odd(out, "journal"))):
        assert time.time() < deadline
        assert second.poll() is None
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait(timeout=200) == 0
    partial = GistStore(out)
    assert 0 < len(partial) < 2000
    assert not (out / "index.safetensors").exists()
    half = notes.read_text().splitlines()
    assert start(out, notes, 1).wait(timeout=200) == 0
    begun = notes.read_text().splitlines()
    corpus = documents(2000)
    chunks = [read_chunk(chunk, None, WORDS) for chunk in chunks_of(corpus, 128, 10**6)]
    batches = sum(len(batches_of(chunk, 1500)) for chunk in chunks)
    assert len(half) < batches
    assert len(set(begun)) == batches
    assert len(begun) - batches <= 1, "only the batch that was killed is begun twice"
    store = GistStore(out)
    assert list(store) == list(corpus)
    assert not list(out.glob("*.journal"))
    alone = compress_corpus(
        patched().model, corpus, tmp_path / "alone", batch_tokens=1500, chunk_documents=128, progress=False
    )
    for path in alone.folder.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def _odd(out, ending):
    return [path for path in out.glob(f"chunk-*.{ending}") if int(path.stem.split("-")[1]) % 2]


def test_a_torn_record_is_done_again(handle, corpus, tmp_path, monkeypatch):
    calls, real = itertools.count(), compressing.compress_documents

    def dies(*arguments, **segments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **segments)

    monkeypatch.setattr(compressing, "compress_documents", dies)
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        compress_corpus(handle.model, corpus, folder, **{**SMALL, "batch_tokens": 60})
    (torn,) = folder.glob("*.journal")
    whole = torn.read_bytes()
    for cut in (whole[:-1], whole[:-300], whole + b"half a rec", whole[:-3] + b"xyz"):
        torn.write_bytes(cut)
        done = compressing.Journal(torn)
        assert torn.read_bytes() == whole[: torn.stat().st_size], "whole records alone are left"
        assert len(done.done) == (3 if cut.startswith(whole) else 2)
        with pytest.raises(RuntimeError, match="written by another process"):
            compressing.Journal(torn)
        done.close()
    monkeypatch.setattr(compressing, "compress_documents", real)
    store = compress_corpus(handle.model, corpus, folder, **{**SMALL, "batch_tokens": 60})
    for name, ids in corpus.items():
        alone = compress(handle.model, torch.tensor([ids]))
        torch.testing.assert_close(rows(store[name]), rows(alone), rtol=1e-4, atol=1e-5)


# ---- damage


def test_damage_is_named_and_the_rest_loads(store, corpus):
    path = store.folder / "chunk-00000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-500] ^= 1  # a bit of the rows of one of its last documents
    path.write_bytes(content)
    again, said = GistStore(store.folder), {}
    for name in corpus:
        try:
            assert again[name].gist_rows.tolist() == [4]
        except ValueError as error:
            said[name] = str(error)
    ((name, message),) = said.items()
    assert f"document {name!r} in {path} is damaged" in message
    assert name in [f"doc-{number}" for number in range(8, 16)]


@pytest.mark.parametrize("kept", [0, 4, 40, -200])
def test_a_truncated_file_is_named_and_the_rest_loads(store, corpus, kept):
    path = store.folder / "chunk-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    again = GistStore(store.folder)
    assert again["doc-0"].gist_rows.tolist() == again["doc-20"].gist_rows.tolist() == [4]
    with pytest.raises(ValueError, match=r"document 'doc-9' cannot be read: .*chunk-00000001.safetensors is torn"):
        again["doc-9"]
    (store.folder / "index.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"left out: .*chunk-00000001"):
        scanned = GistStore(store.folder)
    assert len(scanned) == len(corpus) - 8
    assert len(scanned.damaged) == 1
    assert list(scanned) == [name for name in corpus if name not in {f"doc-{number}" for number in range(8, 16)}]
    assert scanned["doc-20"].gist_rows.tolist() == [4]


def test_foreign_files(store, handle, tmp_path):
    path = store.folder / "chunk-00000001.safetensors"

    def said():
        with pytest.raises(ValueError, match=r"'doc-9' cannot be read: ") as error:
            GistStore(store.folder)["doc-9"]
        return str(error.value)

    shutil.copy(store.folder / "chunk-00000000.safetensors", path)
    assert f"{path} holds chunk 0: it was renamed" in said()
    for model, options in ((patched(seed=5).model, {}), (handle.model, {"segment_length": 16})):
        other = compress_corpus(model, documents(21), tmp_path / f"other-{len(options)}", **SMALL, **options)
        shutil.copy(other.folder / path.name, path)
        assert f"{path} is another store's: made with {'segment_length 16, not None' if options else 'fing'}" in said()
    compress(handle.model, torch.tensor([[1, 2, 3]])).save(path)
    assert "is no file of a gistkern-corpus-3 store" in said()
    with pytest.raises(ValueError, match="written by another model"):
        handle.model(torch.tensor([[1]]), past_key_values=GistStore(tmp_path / "other-0")["doc-9"])


def test_a_damaged_header_is_named(store):
    path = store.folder / "chunk-00000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"doc-9", b"doc-8", 1))
    with pytest.raises(ValueError, match=r"chunk-00000001.safetensors is damaged: the checksum of its header"):
        GistStore(store.folder)["doc-9"]
    with pytest.warns(UserWarning, match="left out: .*chunk-00000001"):
        assert len(list(GistStore(store.folder))) == len(store) - 8


@pytest.mark.parametrize("content", [None, "{", '{"format": "gistkern-corpus-1"}'])
def test_a_store_needs_its_settings(store, content):
    path = store.folder / "corpus.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"corpus.json (cannot be read|is not of a gistkern-corpus-3 store)"):
        GistStore(store.folder)


def test_a_file_of_another_name_is_left_out(store):
    (store.folder / "index.safetensors").unlink()
    shutil.copy(store.folder / "chunk-00000001.safetensors", store.folder / "chunk-1.safetensors")
    with pytest.warns(UserWarning, match=r"chunk-1.safetensors is not named as a store's files are"):
        assert len(GistStore(store.folder)) == len(store)


def test_a_journal_that_was_deleted_while_it_was_waited_for_guards_nothing(tmp_path, monkeypatch):
    """Two processes of one rank: the first finishes and deletes between the other's opening and locking."""
    path, real = tmp_path / "chunk.journal", journal.fcntl.flock
    first = compressing.Journal(path)

    def finishes(file, how):
        if not first._file.closed:
            first.close(delete=True)
        real(file, how)

    monkeypatch.setattr(journal.fcntl, "flock", finishes)
    second = compressing.Journal(path)
    assert path.exists(), "it locks a file that has the name"
    with pytest.raises(RuntimeError, match="written by another process"):
        compressing.Journal(path)
    second.close()


def test_a_torn_index_is_named(store):
    path = store.folder / "index.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"index.safetensors is torn or no index .* delete it"):
        GistStore(store.folder)


def test_a_damaged_index_is_named(store):
    path = store.folder / "index.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no index .its checksum does not match"):
        GistStore(store.folder)


# ---- what is refused


def test_unknown_names_and_folders(store, tmp_path):
    assert "doc-3" in store
    assert "doc-99" not in store
    with pytest.raises(KeyError, match="no document 'doc-99'"):
        store["doc-99"]
    with pytest.raises(ValueError, match="no names"):
        store.batch([])
    with pytest.raises(ValueError, match="is no folder"):
        GistStore(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda corpus: {**corpus, "doc-3": [1, 2]}, "'doc-3' where 'doc-3' was given, with another content"),
        (lambda corpus: {name: corpus[name] for name in reversed(corpus)}, "'doc-0' where 'doc-20' was given"),
        (lambda corpus: {**corpus, "more": [1]}, "holds 5 documents, 6 were given"),
        (
            lambda corpus: dict(list(corpus.items())[:8]),
            "holds chunk-00000001.safetensors, behind",
        ),
    ],
)
def test_other_documents_in_the_same_folder(handle, store, corpus, change, message):
    with pytest.raises(ValueError, match=message):
        compress_corpus(handle.model, change(corpus), store.folder, **SMALL)


def test_other_settings_in_the_same_folder(handle, store, corpus):
    with pytest.raises(ValueError, match="was begun with segment_length None, not 7"):
        compress_corpus(handle.model, corpus, store.folder, segment_length=7, **SMALL)
    with pytest.raises(ValueError, match="was begun with sink_tokens 1, not 2"):
        compress_corpus(patched(sink_tokens=2).model, corpus, store.folder, **SMALL)
    with pytest.raises(ValueError, match="was begun with fingerprint"):
        compress_corpus(patched(seed=1).model, corpus, store.folder, **SMALL)
    (store.folder / "corpus.json").unlink()
    with pytest.raises(ValueError, match=r"files of a store but no corpus.json"):
        compress_corpus(handle.model, corpus, store.folder, **SMALL)


def test_a_hierarchical_model_needs_segments(tmp_path):
    with pytest.raises(ValueError, match="pass segment_length"):
        compress_corpus(patched(num_segment_gist_tokens=2).model, [[1, 2]], tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["batch_tokens", "chunk_documents", "chunk_length"])
def test_counts_are_positive(handle, tmp_path, name):
    with pytest.raises(ValueError, match=name):
        compress_corpus(handle.model, [[1, 2]], tmp_path / "store", **{name: 0})


def test_a_corpus_that_grows_has_no_index_of_its_first_part(handle, corpus, tmp_path):
    first = dict(list(corpus.items())[:16])
    compress_corpus(handle.model, first, tmp_path, **SMALL)
    assert (tmp_path / "index.safetensors").exists()
    more = compress_corpus(handle.model, documents(32), tmp_path, **SMALL, rank=0, ranks=2)
    assert not (tmp_path / "index.safetensors").exists(), "the other process is not through"
    assert "doc-17" in more
    assert "doc-25" not in more
    whole = compress_corpus(handle.model, documents(32), tmp_path, **SMALL, rank=1, ranks=2)
    assert list(whole) == list(documents(32))


def test_others_may_read_the_files(store):
    modes = {path.name: path.stat().st_mode & 0o777 for path in store.folder.iterdir()}
    assert set(modes.values()) == {modes["corpus.json"]}
    assert modes["corpus.json"] != 0o600


def test_batches_hold_no_more_than_they_may():
    found = read_chunk(list(documents(50).items()), None, WORDS)
    batches = batches_of(found, 200)
    assert list(itertools.chain(*batches)) == list(range(50))
    tokens = [sum(len(found[place].ids) for place in batch) for batch in batches]
    assert max(tokens) <= 200
    for this, following in zip(tokens, batches[1:], strict=False):
        assert this + len(found[following[0]].ids) > 200, "the next document had no room"
    assert batches_of(found, 3) == [[place] for place in range(50)]


@pytest.mark.parametrize(("size", "length"), [(8, 10**6), (8, 150), (50, 60), (1, 1)])
def test_chunks_hold_no_more_than_they_may(size, length):
    """Documents in order; a chunk ends where one more would be too many or too long."""
    corpus = documents(50)
    chunks = list(chunks_of(corpus, size, length))
    assert [pair for chunk in chunks for pair in chunk] == list(corpus.items())
    totals = [sum(len(ids) for _, ids in chunk) for chunk in chunks]
    for chunk, total, after in zip(chunks, totals, [*chunks[1:], None], strict=True):
        assert len(chunk) <= size
        assert total <= length or len(chunk) == 1
        assert after is None or len(chunk) == size or total + len(after[0][1]) > length
    assert list(chunks_of(list(corpus.values()), size, length)) == [
        [(name.removeprefix("doc-"), ids) for name, ids in chunk] for chunk in chunks
    ]


def test_long_documents_make_small_files(handle, corpus, tmp_path):
    """The store is the same, in more files."""
    store = compress_corpus(handle.model, corpus, tmp_path, **SMALL, chunk_length=100)
    sizes = [len(chunk) for chunk in chunks_of(corpus, SMALL["chunk_documents"], 100)]
    assert max(sizes) < SMALL["chunk_documents"]
    assert len(list(tmp_path.glob("chunk-*.safetensors"))) == len(sizes)
    assert list(store) == list(corpus)
    with pytest.raises(ValueError, match="was begun with chunk_length 100, not 200"):
        compress_corpus(handle.model, corpus, tmp_path, **SMALL, chunk_length=200)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_bar_counts_the_documents_of_its_rank(handle, corpus, tmp_path, capsys, ranks):
    """It knows the total beforehand, so it can tell the time that is left; of a stream nobody knows it."""
    options = {**SMALL, "progress": True, "chunk_length": 150}
    chunks = [len(chunk) for chunk in chunks_of(corpus, SMALL["chunk_documents"], 150)]
    for rank in range(ranks):
        compress_corpus(handle.model, corpus, tmp_path / "store", rank=rank, ranks=ranks, **options)
        own = sum(chunks[rank::ranks])
        assert f"{own}/{own} " in capsys.readouterr().err
    compress_corpus(handle.model, iter(corpus.items()), tmp_path / "stream", **options)
    assert f"{len(corpus)}document [" in capsys.readouterr().err
