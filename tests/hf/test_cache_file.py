"""A compressed document on disk: what comes back, and every way a file can be wrong."""

import dataclasses
import json
import os
import threading

import pytest
import torch
from conftest import make_model, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gistkern
from gistkern.cache import file as cache_file


@pytest.fixture
def patched(model):
    return model, gistkern.patch_llama(model, num_gist_tokens=3)


@pytest.fixture
def saved(patched, tmp_path):
    cache = gistkern.compress(patched[0], random_ids(2, 30))
    path = tmp_path / "context.safetensors"
    cache.save(path)
    return cache, path


def test_a_loaded_cache_answers_as_the_saved_one(patched, saved):
    model, _ = patched
    cache, path = saved
    question = random_ids(2, 4)
    expected = model(question, past_key_values=cache).logits
    for arguments in ({}, {"model": model}):
        loaded = gistkern.GistCache.load(path, **arguments)
        assert torch.equal(model(question, past_key_values=loaded).logits, expected)
    assert path.stat().st_size < 20_000
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_a_used_cache_keeps_its_tail(patched, saved, tmp_path):
    model, _ = patched
    cache, _ = saved
    model(random_ids(2, 4), past_key_values=cache)
    cache.save(tmp_path / "used.safetensors")
    loaded = gistkern.GistCache.load(tmp_path / "used.safetensors", model)
    assert torch.equal(
        model(random_ids(2, 2), past_key_values=loaded).logits, model(random_ids(2, 2), past_key_values=cache).logits
    )
    assert loaded.state.fed == 6


def test_other_weights_are_refused_at_load_and_at_first_use(patched, saved):
    model, handle = patched
    _, path = saved
    with torch.no_grad():
        handle.trainable_parameters()[0][0, 0] += 1
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(path, model)
    unchecked = gistkern.GistCache.load(path)
    with pytest.raises(ValueError, match="written by another model"):
        model(random_ids(2, 3), past_key_values=unchecked)


def test_one_training_step_makes_it_another_model(patched, saved):
    model, _ = patched
    _, path = saved
    optimizer = torch.optim.SGD([model.model.layers[1].mlp.up_proj.weight], lr=0.1)
    model(random_ids(1, 8), labels=random_ids(1, 8)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(path, model)


def test_other_position_scheme_is_refused(patched, saved):
    model, handle = patched
    handle.unpatch()
    with (
        gistkern.patch_llama(model, num_gist_tokens=3, positions="gist_first"),
        pytest.raises(ValueError, match="written with positions='absolute', the model is patched with"),
    ):
        gistkern.GistCache.load(saved[1], model)


def test_other_dtype_is_refused(saved):
    model = make_model(dtype=torch.float32)
    with gistkern.patch_llama(model, num_gist_tokens=3), pytest.raises(ValueError, match=r"holds torch\.float64"):
        gistkern.GistCache.load(saved[1], model)


def test_unpatched_model_is_refused(patched, saved):
    model, handle = patched
    handle.unpatch()
    with pytest.raises(ValueError, match="knows no gist tokens"):
        gistkern.GistCache.load(saved[1], model)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=lambda k: f"keep={k}")
def test_torn_file(saved, keep):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    with pytest.raises(ValueError, match="is torn or no safetensors file"):
        gistkern.GistCache.load(path)


def test_flipped_bit(saved):
    _, path = saved
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum does not match"):
        gistkern.GistCache.load(path)


def test_changed_header(saved):
    _, path = saved
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gistkern"])
    header["positions"] = "gist_first"
    save_file(load_file(path), path, metadata={"gistkern": json.dumps(header)})
    with pytest.raises(ValueError, match="checksum does not match"):
        gistkern.GistCache.load(path)


def test_foreign_safetensors(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a gist cache of format 'gistkern-cache-2'"):
        gistkern.GistCache.load(tmp_path / "x.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gistkern.GistCache.load(tmp_path / "none.safetensors")


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    cache, path = saved
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_empty_cache_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="the cache is empty"):
        gistkern.GistCache().save(tmp_path / "x")


# ---- a checksum is no validation


def forged(path, tensors=None, header=None, text=None):
    """The file with some tensors and header fields replaced (None: taken out) and a checksum that fits."""
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["gistkern"])
    held = {**load_file(path), **(tensors or {})}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    state = header.pop("state", {}) if header else {}
    found = {**found, **(header or {})}
    if isinstance(state, dict):
        found["state"] = {name: value for name, value in {**found["state"], **state}.items() if value is not None}
    else:
        found["state"] = state
    found = {name: value for name, value in found.items() if value is not None and name != "sha256"}
    if text is None:
        found["sha256"] = cache_file._checksum(held, found)
        text = json.dumps(found)
    save_file(held, path, metadata={"gistkern": text})


BOOLS = torch.zeros(2, 3, dtype=torch.bool)
TWO = torch.tensor([2, 2])
HOSTILE = {
    "gist_rows must be at most the 4": ({"state.gist_rows": torch.tensor([4, 5000])}, {}),
    "gist_rows must be between 0 and": ({"state.gist_rows": torch.tensor([4, -1])}, {}),
    "gist_rows must be of shape": ({"state.gist_rows": torch.tensor([4, 4, 4])}, {}),
    "gist_rows must be torch.int64": ({"state.gist_rows": torch.tensor([4.0, float("nan")])}, {}),
    "tail_rows must be at most the 3": ({"state.tail_rows": torch.tensor([4, 3])}, {}),
    "tail_rows must be between": ({"state.tail_rows": torch.tensor([2**62, 3])}, {}),
    "tail_position must be between": ({"state.tail_position": torch.tensor([2**31, 3])}, {}),
    "tail_position must be of shape": ({"state.tail_position": torch.tensor([[3, 3]])}, {}),
    "seen must be the tokens": ({"state.seen": torch.tensor([2, 50])}, {}),
    "seen must be of shape": ({"state.seen": torch.tensor(33)}, {}),
    "tail_is_gist must be of shape": ({"state.tail_is_gist": torch.zeros(2, 2, dtype=torch.bool)}, {}),
    "tail_is_gist must be torch.bool": ({"state.tail_is_gist": torch.zeros(2, 3, dtype=torch.uint8)}, {}),
    "tail_is_gist must be between": (
        {"state.tail_is_gist": torch.full((2, 3), 2).to(torch.uint8).view(torch.bool)},
        {},
    ),
    "tail_is_gist must be of rows": ({"state.tail_is_gist": ~BOOLS, "state.tail_rows": TWO}, {}),
    "tail_has_gists must be true": ({"state.tail_is_gist": ~BOOLS}, {}),
    "layers.0.gist_key must be of shape": ({}, {"state": {"gist_columns": 5}}),
    "layers.0.gist_key must be .B, Hkv": ({"layers.0.gist_key": torch.zeros(2, 2, 4)}, {}),
    "gist_columns must be between": ({}, {"state": {"gist_columns": -4}}),
    "tail_columns must be between": ({}, {"state": {"tail_columns": 10**30}}),
    "tail_columns must be int, found True": ({}, {"state": {"tail_columns": True}}),
    "length must be int, found 37.0": ({}, {"state": {"length": 37.0}}),
    "length must be at least": ({}, {"state": {"length": 3}}),
    "length must be between": ({}, {"state": {"length": 2**31}}),
    "fed must be int, found '3'": ({}, {"state": {"fed": "3"}}),
    "moving must be bool, found 1": ({}, {"state": {"moving": 1}}),
    "fed is missing": ({}, {"state": {"fed": None}}),
    "'more' is new": ({}, {"state": {"more": 1}}),
    "state must be dict": ({}, {"state": [1]}),
    "positions is missing": ({}, {"positions": None}),
    "positions must be one of": ({}, {"positions": ["absolute"]}),
    "fingerprint must be a digest": ({}, {"fingerprint": 7}),
    "layers must be int": ({}, {"layers": "3"}),
    "layers must be the number": ({}, {"layers": 10**9}),
    "layers.2.gist_key' is new": ({}, {"layers": 2}),
    "layers.1.gist_value is missing": ({"layers.1.gist_value": None}, {}),
    "'state.extra' is new": ({"state.extra": TWO}, {}),
    "layers.1.gist_value must be of shape": (
        {"layers.1.gist_value": torch.zeros(2, 2, 3, 16, dtype=torch.float64)},
        {},
    ),
    "layers.1.tail_key must be of shape": ({"layers.1.tail_key": torch.zeros(2, 2, 4, 16, dtype=torch.float64)}, {}),
    "layers.2.gist_key must be torch.float64": ({"layers.2.gist_key": torch.zeros(2, 2, 4, 16)}, {}),
    "layers.0.tail_value must be torch.float64": ({"layers.0.tail_value": torch.zeros(2, 2, 3, 16)}, {}),
    "layers.0.gist_value must be numbers": (
        {f"layers.{i}.gist_value": torch.zeros(2, 2, 4, 16, dtype=torch.int64) for i in range(3)},
        {},
    ),
    "layers.1.gist_key must be finite": (
        {"layers.1.gist_key": torch.full((2, 2, 4, 16), torch.inf, dtype=torch.float64)},
        {},
    ),
    "dtype must be one of": ({}, {"dtype": "int8"}),
    "dtype is missing": ({}, {"dtype": None}),
}


@pytest.fixture
def used(patched, saved):
    """A file of two samples with 4 gist and 3 tail columns."""
    cache, path = saved
    patched[0](random_ids(2, 3), past_key_values=cache)
    cache.save(path)
    return path


@pytest.mark.parametrize("said", HOSTILE)
def test_a_state_that_the_tensors_do_not_bear_out(used, said):
    tensors, header = HOSTILE[said]
    forged(used, tensors, dict(header))
    with pytest.raises(ValueError, match=said) as error:
        gistkern.GistCache.load(used)
    assert str(error.value).startswith(str(used))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"format": NaN}', '{"a": 1, "a": 2}', "1" * 5000, '{"x": ' * 900 + "1" + "}" * 900],
    ids=lambda text: text[:12],
)
def test_a_header_that_is_no_json_object(used, text):
    forged(used, text=text)
    with pytest.raises(ValueError, match=str(used)):
        gistkern.GistCache.load(used)


def test_metadata_that_is_null(used):
    content = used.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": None}).encode()
    used.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(ValueError, match="is not a gist cache"):
        gistkern.GistCache.load(used)


def test_a_pipe_is_not_replaced(saved, tmp_path):
    """Nor /dev/null, by those who may."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        saved[0].save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_and_an_unreadable_file(saved, monkeypatch):
    _, path = saved
    with pytest.raises(ValueError, match=r"cannot be read .Is a directory"):
        gistkern.GistCache.load(path.parent)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(ValueError, match=r"cannot be read .Input/output error.: it may be whole"):
        gistkern.GistCache.load(path)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta", 3.5, "hpu"])
def test_a_device_that_is_not_there(saved, device):
    with pytest.raises(ValueError, match="device="):
        gistkern.GistCache.load(saved[1], device=device)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 32}])
def test_a_model_of_another_shape_is_refused_before_it_computes(saved, changes):
    """Also where no fingerprint says who wrote the cache."""
    cache, path = saved
    cache.fingerprint = None
    cache.save(path)
    model = make_model(**changes)
    with gistkern.patch_llama(model, num_gist_tokens=3), pytest.raises(ValueError, match="holds 3 layers of 2 key/val"):
        gistkern.GistCache.load(path, model)


def _streamed(model, handle):
    cache = gistkern.GistCache()
    ids = torch.cat([random_ids(2, 6), torch.tensor([handle.gist_token_ids[:2]] * 2)], 1)
    model(ids, past_key_values=cache)  # gists in the open tail
    return cache


def _ragged(model, handle):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    cache = gistkern.compress(model, random_ids(2, 9), mask, segment_length=3)
    model(random_ids(2, 4), past_key_values=cache, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    cache.batch_select_indices(torch.tensor([0]))  # the sample that owns fewer rows than there are columns
    return cache


def _moving(model, handle):
    cache = gistkern.GistCache()
    layout = gistkern.GistLayout.sliding(12, 4, 3)
    model(random_ids(1, layout.num_rows), past_key_values=cache, gist_layout=layout)
    return cache


def _autocast(model, handle):
    with torch.autocast("cpu", torch.bfloat16):
        cache = gistkern.compress(model.float(), random_ids(2, 9))
    assert cache.layers[0].gist.key.dtype != cache.layers[0].dtype
    return cache


STATES = {
    "autocast": _autocast,
    "ragged": _ragged,
    "streamed": _streamed,
    "moving": _moving,
    "no samples": lambda model, handle: _selected(gistkern.compress(model, random_ids(2, 9)), []),
    **{
        str(dtype): lambda model, handle, dtype=dtype: gistkern.compress(model, random_ids(2, 9)).to(dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
    },
    **{
        f"gist rows in {dtype}": lambda model, handle, dtype=dtype: gistkern.compress(model, random_ids(2, 9)).to(
            gist_dtype=dtype
        )
        for dtype in (torch.int8, torch.float8_e4m3fn)
    },
}


def _selected(cache, samples):
    cache.batch_select_indices(torch.tensor(samples, dtype=torch.long))
    return cache


@pytest.mark.parametrize("state", STATES)
def test_every_state_that_is_saved_loads(patched, tmp_path, state):
    cache = STATES[state](*patched)
    cache.save(tmp_path / "c")
    loaded = gistkern.GistCache.load(tmp_path / "c")
    for name, value in vars(cache.state).items():
        found = getattr(loaded.state, name)
        assert torch.equal(found, value) if torch.is_tensor(value) else found == value, name
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert one.dtype == other.dtype
        for held, found in zip(one.tensors(), other.tensors(), strict=True):
            assert held.dtype == found.dtype
            assert torch.equal(held.float(), found.float())


def test_an_overflow_is_said_at_once(saved):
    cache, path = saved
    cache.layers[1].gist.value[0, 0, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match="layers.1.gist_value holds inf or NaN"):
        cache.save(path)


@pytest.mark.parametrize("place", range(0, 100, 4))
def test_any_flipped_or_missing_byte_is_refused(saved, place):
    _, path = saved
    data = bytearray(path.read_bytes())
    at = min(place * 40, 3600) if place < 80 else len(data) - 1 - place  # most in the header
    data[at] ^= 1 << place % 8
    for content in (data, data[:at]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            gistkern.GistCache.load(path)


# ---- how it is written


def test_a_file_has_the_mode_and_the_names_that_files_have(saved, tmp_path, monkeypatch):
    """Without asking for the umask, which sets it for all threads; under the longest name that a folder takes."""
    cache, path = saved
    before = os.umask(0o027)
    try:
        monkeypatch.setattr("os.umask", lambda *_: pytest.fail("the umask is the process's"))
        cache.save(tmp_path / ("x" * 255))
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / ("x" * 255)).stat().st_mode & 0o777 == 0o640
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {path.name, "x" * 255}
    for target, error in (("x" * 256, OSError), ("none/c", FileNotFoundError), (".", IsADirectoryError)):
        with pytest.raises(error):
            cache.save(tmp_path / target)
    assert {entry.name for entry in tmp_path.iterdir()} == names


def test_threads_save_the_same_file(saved):
    cache, path = saved
    threads = [threading.Thread(target=cache.save, args=[path]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dataclasses.astuple(gistkern.GistCache.load(path).state)[5:8] == (4, 0, cache.get_seq_length())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_counts_that_are_one_tensor(patched, tmp_path):
    """A stream without gists: its counts of rows and its first position are the same zeros."""
    cache = gistkern.GistCache()
    with torch.no_grad():
        patched[0](random_ids(2, 5), past_key_values=cache)
        cache.save(tmp_path / "c")
        loaded = gistkern.GistCache.load(tmp_path / "c", patched[0])
        found, expected = (patched[0](random_ids(2, 2), past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, expected)
