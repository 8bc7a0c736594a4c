"""Gist rows and tail rows apart: what a step writes, who shares memory with whom, and quantized gist rows."""

import copy
import pickle

import pytest
import torch
from conftest import make_model, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

import gistkern
from gistkern.backends import native
from gistkern.ops.decode import Decodes
from gistkern.rows import LARGEST

QUANTIZED = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in LARGEST]


@pytest.fixture(params=["absolute", "gist_first"])
def patched(request):
    model = make_model(dtype=torch.float32, initializer_range=0.3)
    gistkern.patch_llama(model, num_gist_tokens=3, positions=request.param)
    return model


def logits(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


class Copied(TorchDispatchMode):
    """Bytes that copies in the cache's own modules write."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix("aten::") in ("cat", "copy_", "clone", "index", "gather"):
            self.total += out.nbytes
        return out


# ---- the tail


def test_a_step_writes_its_own_row_whatever_the_length_of_the_tail(patched):
    found = []
    for question in (40, 400):
        cache = gistkern.compress(patched, random_ids(1, 20))
        logits(patched, cache, random_ids(1, question))
        logits(patched, cache, random_ids(1, 1))  # makes room
        gists = [layer.gist for layer in cache.layers]
        place = [layer.tail.key.data_ptr() for layer in cache.layers]
        with Copied() as copied:
            logits(patched, cache, random_ids(1, 1))
        assert [layer.tail.key.data_ptr() for layer in cache.layers] == place, "written behind the others"
        assert all(layer.gist is gist for layer, gist in zip(cache.layers, gists, strict=True))
        found.append(copied.total)
    assert found[0] == found[1]


def test_room_that_was_cropped_is_nobody_elses(patched):
    """Clones, copies and moved caches taken before a crop keep their rows when others are written in their place."""
    cache = gistkern.compress(patched, random_ids(2, 20))
    logits(patched, cache, random_ids(2, 5))
    logits(patched, cache, random_ids(2, 2, 3))
    copies = {
        "clone": cache.clone(),
        "copy": copy.deepcopy(cache),
        "pickle": pickle.loads(pickle.dumps(cache)),
        "moved": cache.to(dtype=torch.float64).to(dtype=torch.float32),
        "quantized": cache.to(gist_dtype=torch.int8).to(gist_dtype=torch.float32),
    }
    cache.crop(-4)
    logits(patched, cache, random_ids(2, 4, 8))
    again = gistkern.compress(patched, random_ids(2, 20))
    logits(patched, again, random_ids(2, 5))
    logits(patched, again, random_ids(2, 2, 3))
    expected = logits(patched, again, random_ids(2, 1, 9))
    for name, one in copies.items():
        tolerance = 0.3 if name == "quantized" else 1e-5
        torch.testing.assert_close(logits(patched, one, random_ids(2, 1, 9)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", ["", "q_proj", "v_proj"], ids=["all", "queries", "values"])
def test_calls_that_train_write_into_nothing_that_a_graph_saved(patched, trained):
    """Steps without gradients before, between and after; then backward: the gradients of one call."""
    for name, parameter in patched.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = [random_ids(1, n, n) for n in (3, 4, 2, 5, 1)]
    gradients = []
    for whole in (True, False):
        cache = gistkern.compress(patched, random_ids(1, 20))
        if whole:
            with torch.no_grad():
                patched(torch.cat(ids[:2], 1), past_key_values=cache)
            loss = patched(torch.cat(ids[2:4], 1), past_key_values=cache).logits.square().sum()
        else:
            logits(patched, cache, ids[0])
            logits(patched, cache, ids[1])
            parts = [patched(one, past_key_values=cache).logits for one in ids[2:4]]
            loss = torch.cat(parts, 1).square().sum()
            cache.crop(-1)
            logits(patched, cache, ids[4])
        loss.backward()
        gradients.append([p.grad for p in patched.parameters() if p.grad is not None])
        patched.zero_grad()
    assert gradients[0]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_inference_mode_and_back(patched):
    tokens = random_ids(1, 6)
    expected = logits(patched, gistkern.compress(patched, random_ids(1, 20)), tokens)
    with torch.inference_mode():
        cache = gistkern.compress(patched, random_ids(1, 20))
        found = [patched(tokens[:, i : i + 1], past_key_values=cache).logits.clone() for i in range(3)]
    found += [logits(patched, cache, tokens[:, i : i + 1]) for i in range(3, 5)]
    with torch.inference_mode():
        found.append(patched(tokens[:, 5:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


# ---- quantized gist rows


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_element_is_half_a_step_off_at_most(patched, dtype):
    own = gistkern.compress(patched, random_ids(2, 60), segment_length=10)
    cache = own.to(gist_dtype=dtype)
    asked = gistkern.compress(patched, random_ids(2, 60), segment_length=10, gist_dtype=dtype)
    for index, layer in enumerate(cache.layers):
        assert layer.gist.key.dtype == dtype
        assert all(map(torch.equal, layer.gist.tensors()[2:], asked.layers[index].gist.tensors()[2:]))
        scales = layer.gist.key_scale, layer.gist.value_scale
        for found, exact, scale in zip(cache.compact(index), own.compact(index), scales, strict=True):
            if dtype == torch.int8:
                step = scale[..., None].expand_as(exact)
            else:  # three bits behind the first, or of the smallest exponent
                step = scale[..., None] * 2.0 ** (torch.frexp(exact / scale[..., None])[1] - 4).clamp(min=-9)
            assert ((found - exact).abs() <= 0.5001 * step).all()
    rows = 2 * 3 * 2 * 2 * int(cache.gist_rows[0])  # samples, layers, heads, keys and values
    assert cache.nbytes == rows * (16 + 4)
    assert own.nbytes == rows * 16 * 4


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_rows_are_read_as_what_they_stand_for(monkeypatch, dtype, backend):
    """Where they stand by short calls, as floats by long ones; ragged, several turns, gathered and shared."""
    if backend == "cpu" and native.missing():
        pytest.skip("the extension is not built")
    model = make_model(dtype=torch.float32, initializer_range=0.3)
    gistkern.patch_llama(model, num_gist_tokens=3, backend=backend)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :27] = 0
    quantized = gistkern.compress(model, random_ids(2, 40), mask, segment_length=10, gist_dtype=dtype)
    floats, shared = quantized.to(gist_dtype=torch.float32), quantized.shared()
    assert shared.nbytes < quantized.nbytes
    reads = []
    decode = Decodes.decode
    monkeypatch.setattr(
        Decodes, "decode", lambda self, q, gist, *rest: reads.append(gist.key) or decode(self, q, gist, *rest)
    )
    for cache in (floats, quantized, shared):
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
    for tokens in (11, 1, 8, 2):
        ids = random_ids(3, tokens, tokens)
        reads.clear()
        expected = logits(model, floats, ids)
        for cache in (quantized, shared):
            torch.testing.assert_close(logits(model, cache, ids), expected, rtol=1e-4, atol=1e-4)
        assert len(reads) == (0 if tokens > 8 else 2 * 3)
        assert all(key.dtype == dtype for key in reads)
        if reads:
            first = quantized.layers[0].gist.key
            assert reads[0].data_ptr() == first.data_ptr(), "in place"


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_caches_travel(patched, tmp_path, dtype):
    cache = gistkern.compress(patched, random_ids(2, 40), segment_length=10, gist_dtype=dtype)
    ids = random_ids(2, 3)
    expected = logits(patched, cache.clone(), ids)
    cache.save(tmp_path / "c")
    loaded = gistkern.GistCache.load(tmp_path / "c", patched)
    for one in (loaded, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache.to("cpu")):
        assert one.gist_dtype == dtype
        assert torch.equal(logits(patched, one.clone(), ids), expected)
    assert cache.to(gist_dtype=dtype) is cache
    prefix = gistkern.plain_prefix(cache, patched.config)
    assert prefix.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_more_gists_are_quantized_and_the_others_stay_as_they_are(patched, dtype):
    gists = patched.gistkern_handle.gist_token_ids
    cache = gistkern.compress(patched, random_ids(1, 20), gist_dtype=dtype)
    before = [[t.clone() for t in layer.gist.tensors()] for layer in cache.layers]
    ids = torch.cat([random_ids(1, 9, 5), torch.tensor([gists]), random_ids(1, 2, 6)], 1)
    with pytest.raises(ValueError, match="gist rows that are trained are not quantized"):
        patched(ids, past_key_values=cache.clone())
    logits(patched, cache, ids)
    assert (cache.gist_rows.tolist(), cache.tail_rows.tolist()) == ([7], [2])
    for layer, held in zip(cache.layers, before, strict=True):
        for found, kept in zip(layer.gist.tensors(), held, strict=True):
            assert torch.equal(found[:, :, :4].float(), kept.float())


def test_types_that_rows_are_not_held_in(patched):
    cache = gistkern.compress(patched, random_ids(1, 20))
    for wrong in (torch.int32, torch.float16, torch.float8_e5m2):
        with pytest.raises(ValueError, match=r"gist_dtype must be torch\.int8, torch\.float8_e4m3fn or the model's"):
            cache.to(gist_dtype=wrong)
        with pytest.raises(ValueError, match="gist_dtype must be"):
            gistkern.compress(patched, random_ids(1, 20), gist_dtype=wrong)
    with pytest.raises(ValueError, match="dtype is what the model computes in"):
        cache.to(dtype=torch.float8_e4m3fn)


def test_rows_keep_their_type_until_another_is_asked_for(patched):
    """Under autocast the tail is narrower than what the model computes in, and than gist rows that were made floats."""
    exact = gistkern.compress(patched, random_ids(1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gistkern.compress(patched, random_ids(1, 20), gist_dtype=torch.int8)
        logits(patched, narrow, random_ids(1, 3))
    wide = narrow.to(gist_dtype=torch.float32)
    assert (wide.layers[0].gist.key.dtype, wide.layers[0].tail.key.dtype) == (torch.float32, torch.bfloat16)
    scaled = narrow.layers[0].gist.key.float() * narrow.layers[0].gist.key_scale[..., None]
    assert torch.equal(wide.layers[0].gist.key, scaled), "not rounded to the type of the tail on the way"
    for one in (exact, narrow, wide):
        assert one.to("cpu", one.dtype) is one
        kinds = [{t.dtype for t in cache.layers[0].tensors()} for cache in (one, one.to(gist_dtype=torch.int8))]
        assert kinds[0] <= {torch.float32, torch.bfloat16, torch.int8}
        assert kinds[1] == {torch.int8, torch.float32, one.layers[0].tail.key.dtype}
    half = wide.to(dtype=torch.float16)
    assert {t.dtype for t in half.layers[0].tensors()} == {torch.float16}


def test_a_deep_copy_of_rows_that_a_gradient_may_come_back_to(patched):
    cache = gistkern.compress(patched, random_ids(1, 20))
    patched(random_ids(1, 3), past_key_values=cache)
    assert cache.layers[0].tail.key.requires_grad
    for one in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        expected = logits(patched, cache.clone(), random_ids(1, 1))
        assert torch.equal(logits(patched, one, random_ids(1, 1)), expected)


# ---- files


def test_a_scale_that_makes_no_sense(patched, tmp_path):
    from test_cache_file import forged

    cache = gistkern.compress(patched, random_ids(1, 20), gist_dtype=torch.int8)
    name = "layers.1.gist_key_scale"
    scales = cache.layers[1].gist.key_scale
    for wrong, said in (
        (-scales, "no scale below 0"),
        (scales * torch.inf, "must be finite"),
        (scales[:, :, 1:], "of shape"),
        (scales.double(), "must be numbers"),
        (None, "is missing"),
    ):
        cache.save(tmp_path / "c")
        forged(tmp_path / "c", {name: None if wrong is None else wrong.contiguous()})
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            gistkern.GistCache.load(tmp_path / "c")


def test_the_former_format_is_refused_with_what_to_do(patched, tmp_path):
    from test_cache_file import forged

    gistkern.compress(patched, random_ids(1, 20)).save(tmp_path / "c")
    forged(tmp_path / "c", header={"format": "gistkern-cache-1"})
    with pytest.raises(ValueError, match="'gistkern-cache-1', which this version does not read: compress the context"):
        gistkern.GistCache.load(tmp_path / "c")
