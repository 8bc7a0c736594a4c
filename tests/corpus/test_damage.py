"""Files of a corpus that were damaged, forged, cut or shared: a ValueError that names the file, or the right rows."""

import hashlib
import json
import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from corpus_cases import SMALL, documents
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from gistkern import GistStore, compress_corpus
from gistkern.corpus import compress as compressing
from gistkern.corpus import index
from gistkern.corpus.chunk_file import FORMAT, _header_checksum
from gistkern.corpus.journal import Journal


@pytest.fixture(scope="module")
def corpus():
    return documents(12)


def read(folder):
    """All rows, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = GistStore(folder)
        return {
            name: torch.cat([torch.cat([one.gist.key, one.gist.value]) for one in opened[name].layers])
            for name in opened
        }


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def damaged(path, drawn):
    """One flipped bit, or one cut."""
    content = bytearray(path.read_bytes())
    at = drawn.choice([drawn.randrange(len(content)), drawn.randrange(min(300, len(content)))])
    if drawn.random() < 0.3:
        return bytes(content[:at])
    content[at] ^= 1 << drawn.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_is_named_or_does_no_harm(store, seed):
    expected, drawn = read(store.folder), random.Random(seed)
    for path in sorted(store.folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(6):
            path.write_bytes(damaged(path, drawn))
            try:
                found = read(store.folder)
            except (ValueError, UserWarning) as error:
                said = str(error)
            else:
                said = str(path) if equal(found, expected) else ""
            assert str(path) in said or path.name == "corpus.json", said  # other settings: the files are another's
            path.write_bytes(whole)


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_journal_is_gone_on_with(handle, corpus, tmp_path, monkeypatch, seed):
    real = compressing.write_chunk

    def dies(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "write_chunk", dies)
    options = {**SMALL, "batch_tokens": 100}
    with pytest.raises(KeyboardInterrupt):
        compress_corpus(handle.model, corpus, tmp_path, **options)
    monkeypatch.setattr(compressing, "write_chunk", real)
    (path,) = tmp_path.glob("*.journal")
    path.write_bytes(damaged(path, random.Random(seed)))
    left = [entry.name for entry in tmp_path.iterdir()]
    assert sorted(left) == sorted([path.name, "corpus.json"])
    store = compress_corpus(handle.model, corpus, tmp_path, **options)
    expected = compress_corpus(handle.model, corpus, tmp_path / "alone", **options)
    assert equal(read(store.folder), read(expected.folder))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_a_declared_length_is_not_believed(tmp_path, length):
    path = tmp_path / "chunk-00000000.journal"
    path.write_bytes(length.to_bytes(8, "little") + bytes(40))
    journal = Journal(path)
    assert journal.done == {}
    journal.close()
    assert path.stat().st_size == 0
    path = tmp_path / "index.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + bytes(40))
    with pytest.raises(ValueError, match=r"index\.safetensors is torn"):
        index.read_index(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"batch": torch.tensor(0)},
        {"batch": torch.tensor(0), "rows": torch.zeros(2), "numbers": torch.zeros(2), "digests": torch.zeros(2)},
        {
            "batch": torch.tensor(0),
            "rows": torch.zeros(4, 2, 2, 1, 8),
            "numbers": torch.tensor([[2**62, 5, 5], [-(2**62) + 4, 5, 5]]),
            "digests": torch.zeros(2, 8, dtype=torch.uint8),
        },
        # no file of a store could hold these: a resumed run would write one that never opens
        *(
            {
                "batch": torch.tensor(0),
                "rows": torch.full((1, 2, kinds, 1, 8), value, dtype=dtype),
                "numbers": torch.tensor([[1, seen, 5]]),
                "digests": torch.zeros(1, 8, dtype=torch.uint8),
            }
            for kinds, value, dtype, seen in (
                (2, torch.nan, torch.float32, 5),
                (2, 1, torch.float8_e4m3fn, 5),
                (3, 1, torch.float32, 5),
                (2, 1, torch.float32, 0),
            )
        ),
    ],
)
def test_a_record_that_makes_no_sense_is_cut_off(tmp_path, tensors):
    journal = Journal(tmp_path / "a.journal")
    journal.add(int(tensors["batch"]), {name: one for name, one in tensors.items() if name != "batch"})
    journal.close()
    journal = Journal(tmp_path / "a.journal")
    assert journal.done == {}
    journal.close()


def test_records_of_two_models_are_cut_off(tmp_path):
    journal = Journal(tmp_path / "a.journal")
    for batch, layers in enumerate((2, 3)):
        rows, numbers = torch.zeros(1, layers, 2, 1, 8), torch.tensor([[1, 5, 5]])
        journal.add(batch, {"rows": rows, "numbers": numbers, "digests": torch.zeros(1, 8, dtype=torch.uint8)})
    journal.close()
    journal = Journal(tmp_path / "a.journal")
    assert list(journal.done) == [0]
    journal.close()


# ---- a checksum is no validation


@pytest.mark.parametrize("shape", [[0, 10**30], [0, 2**62, 2**62]])
def test_an_empty_array_of_a_shape_that_nothing_holds(store, shape):
    path = store.folder / "index.safetensors"
    entry = {"dtype": "I64", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(("hashes", "chunks", "places"), entry)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="which no file holds"):
        GistStore(store.folder)


def test_a_setting_that_nobody_made_is_refused_when_resumed(store, handle):
    """As one flipped bit in a field's name makes it: no file of the store would agree with it."""
    path = store.folder / "corpus.json"
    path.write_text(path.read_text().replace('"gistkern"', '"gistkerm"'))
    with pytest.raises(ValueError, match="was begun with gistkerm"):
        compress_corpus(handle.model, documents(12), store.folder, **SMALL)


def forged(path, header=None, **tensors):
    """The file with other header fields and tensors and a checksum that fits."""
    text = json.loads(json.dumps(read_header(path)))
    held = {**load_file(path), **tensors}
    text = json.dumps({name: one for name, one in {**text, **(header or {})}.items() if one is not None})
    entry = f"{_header_checksum(text, held['offsets'], held['numbers'])} {text}"
    save_file(held, path, metadata={FORMAT: entry})


def read_header(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"][FORMAT].partition(" ")[2])


@pytest.mark.parametrize(
    ("header", "tensors", "said"),
    [
        ({"names": None}, {}, "lacks names"),
        ({"names": "abcdefgh"}, {}, "names must be list"),
        ({"names": [*"abcdefg", 3]}, {}, "names must be strings, found 3"),
        ({"names": [*"abcdefg", "a"]}, {}, "names holds 'a' twice"),
        ({"names": [*"abcdefg", ""]}, {}, "names must be strings"),
        ({"names": ["a"]}, {}, "documents must be 1, found 8"),
        ({"sha256": []}, {}, "sha256 must be 8, found 0"),
        ({"chunk": True}, {}, "chunk must be int"),
        ({"settings": []}, {}, "settings must be dict"),
        ({}, {"offsets": torch.arange(0, 36, 4).flip(0)}, "offsets must rise"),
        ({}, {"offsets": torch.arange(0, 45, 5)}, "offsets must rise from 0 to the 32 rows"),
        ({}, {"offsets": torch.arange(0, 28, 4)}, "offsets must be int64 of shape"),
        ({}, {"offsets": torch.arange(0, 36, 4, dtype=torch.int32)}, "offsets must be int64"),
        ({}, {"numbers": torch.full((8, 2), -1)}, "numbers must be between"),
        ({}, {"numbers": torch.full((8, 2), 2**40)}, "numbers must be between"),
        ({}, {"numbers": torch.ones(8, 2)}, "numbers must be int64"),
        ({}, {"rows": torch.zeros(32, 2, 3, 1, 8)}, "rows must be .R, layers, 2"),
        ({}, {"rows": torch.zeros(32, 2, 2, 1, 8, dtype=torch.int64)}, "rows must be floats"),
        ({}, {"rows": torch.zeros(32, 2, 2, 1, 8, dtype=torch.uint8)}, "rows'. are of no dtype"),
        ({}, {"more": torch.zeros(2)}, "it holds .'more', "),
    ],
)
def test_a_file_that_says_what_no_file_says(store, header, tensors, said):
    path = store.folder / "chunk-00000000.safetensors"
    forged(path, header, **tensors)
    with pytest.raises(ValueError, match=said) as error:
        GistStore(store.folder)["doc-3"]
    assert f"document 'doc-3' cannot be read: {path}" in str(error.value)


def test_rows_that_are_not_finite_or_of_two_models(store, handle, corpus, tmp_path):
    path = store.folder / "chunk-00000000.safetensors"
    rows = load_file(path)["rows"]
    forged(path, rows=torch.full_like(rows, torch.nan))
    with pytest.raises(ValueError, match="is damaged"):  # its checksum is of its own
        GistStore(store.folder)["doc-3"]
    sums = [
        hashlib.sha256(f"{seen} {place} {(4, *rows.shape[1:])}".encode() + rows[:4].fill_(torch.nan).numpy().tobytes())
        for seen, place in load_file(path)["numbers"].tolist()
    ]
    forged(path, {"sha256": [one.hexdigest() for one in sums]}, rows=torch.full_like(rows, torch.nan))
    with pytest.raises(ValueError, match=f"document 'doc-3' in {path} holds inf or NaN"):
        GistStore(store.folder)["doc-3"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"hashes": [3, 2, 1]}, "hashes must be sorted"),
        ({"places": [0, 0, 0]}, "two names stand at one place"),
        ({"chunks": [0, 0, -1]}, "must not be negative"),
        ({"chunks": [0, 0]}, "not equally many"),
    ],
)
def test_an_index_that_says_what_no_index_says(store, arrays, said):
    arrays = {"hashes": [1, 2, 3], "chunks": [0, 0, 0], "places": [0, 1, 2], **arrays}
    arrays = {name: np.array(array, dtype=index._KINDS[name]) for name, array in arrays.items()}
    save_arrays(arrays, store.folder / "index.safetensors", metadata={"sha256": index._checksum(arrays)})
    with pytest.raises(ValueError, match=f"index.safetensors is torn or no index .*{said}"):
        GistStore(store.folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_doubled_name_is_refused_at_opening(store, indexed):
    path = store.folder / "chunk-00000001.safetensors"
    names = ["doc-3", *read_header(path)["names"][1:]]
    forged(path, {"names": names})
    file = store.folder / "index.safetensors"
    arrays = index.read_index(store.folder)
    if indexed:
        at = int(np.flatnonzero((arrays["chunks"] == 1) & (arrays["places"] == 0))[0])
        arrays["hashes"][at] = index.hash_of("doc-3")
        order = np.argsort(arrays["hashes"])
        arrays = {name: array[order] for name, array in arrays.items()}
        save_arrays(arrays, file, metadata={"sha256": index._checksum(arrays)})
    else:
        file.unlink()
    with pytest.raises(ValueError, match="are called 'doc-3', in chunks"):
        GistStore(store.folder)


# ---- files that are used by several


def test_files_cut_while_they_are_open(store, corpus):
    """A process whose mapped file is cut dies; here the rest is there, and what is not is named."""
    opened = GistStore(store.folder)
    assert opened["doc-0"].gist_rows.tolist() == [4]
    for path in store.folder.glob("*.safetensors"):
        os.truncate(path, 100)
    assert len(opened) == len(corpus)
    assert "doc-3" in opened
    with pytest.raises(ValueError, match=r"chunk-00000000.safetensors is torn .*it ended while it was read"):
        opened["doc-3"]


def test_a_child_forked_while_threads_read(store, corpus):
    """No lock of a thread that the child has not got, no place in a file that two processes move."""
    torch.randn(600, 600).clone() @ torch.randn(600, 600)  # torch's threads are the parent's: a child hangs in them
    names = list(corpus) * 20
    expected = store.batch(names).layers[1].gist.key
    opened = GistStore(store.folder)
    over = threading.Event()

    def go_on():
        while not over.is_set():
            opened[random.choice(names)]

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            child = os.fork()
            if not child:
                os._exit(0 if (opened.batch(names).layers[1].gist.key.numpy() == expected.numpy()).all() else 1)
            assert _ended(child) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ended(child, seconds=30):
    waiting = threading.Event()
    for _ in range(seconds * 100):
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            return found[1]
        waiting.wait(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_equal_process_ids_write_one_folder(handle, corpus, tmp_path, monkeypatch):
    """As containers have them; and what a killed one left is taken away, once nobody else is at work."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    folder = tmp_path / "store"
    (folder / ".gistkern-killed").mkdir(parents=True)
    (folder / ".gistkern-killed" / "draft").write_text("half")
    errors = []

    def work(rank):
        try:
            compress_corpus(handle.model, corpus, folder, rank=rank, ranks=2, **SMALL)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = {path.name for path in folder.iterdir()}
    assert found == {*("corpus.json", "index.safetensors", "chunk-00000000.safetensors", "chunk-00000001.safetensors")}
    assert list(GistStore(folder)) == list(corpus)


@pytest.mark.parametrize("file", ["chunk-00000000.safetensors", "index.safetensors"])
def test_an_unreadable_file_is_not_called_torn(store, monkeypatch, file):
    path, real = store.folder / file, os.open

    def refused(name, *arguments, **options):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ValueError, match=r"cannot be read .Permission denied.: it may be whole") as error:
        GistStore(store.folder)["doc-3"]
    assert "torn" not in str(error.value)


def test_the_store_knows_what_made_it(store, handle):
    found = json.loads((store.folder / "corpus.json").read_text())
    assert found["gistkern"]
    assert found["model"] == handle.model.config._name_or_path
    found["model"], found["gistkern"] = "elsewhere", "9.9"
    (store.folder / "corpus.json").write_text(json.dumps(found))
    assert len(compress_corpus(handle.model, documents(12), store.folder, **SMALL)) == 12, "it is not compared"
