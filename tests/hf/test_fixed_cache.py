"""A cache of fixed size says what an ordinary one says, eager and compiled, in buffers that never move."""

import copy

import pytest
import torch
from conftest import make_model, random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.configuration_utils import CompileConfig

import gistkern
from gistkern.testing import assert_within_budget

NEW = 6
CASES = [
    pytest.param(({"positions": scheme, "sink_tokens": sinks, **summary}, segments), id=f"{scheme}-{sinks}-{name}")
    for scheme, sinks in (("absolute", 1), ("gist_first", 0))
    for name, summary, segments in (
        ("one segment", {}, {}),
        ("segments", {}, {"segment_length": 10}),
        ("hierarchical", {"num_segment_gist_tokens": 2}, {"segment_length": 10}),
    )
]
pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def small(dtype=torch.float32, options=None, **changes):
    model = make_model(dtype=dtype, initializer_range=0.3, **changes)
    gistkern.patch_llama(model, num_gist_tokens=3, **options or {})
    return model


@pytest.fixture(params=CASES)
def patched(request):
    options, segments = request.param
    return small(options=options), segments


def left_padded(rows):
    ids, real = gistkern.left_padded(rows)
    return ids, real.long()


def ragged(model, lengths=(37, 9, 20), **segments):
    return gistkern.compress(model, *left_padded([random_ids(1, n, n)[0] for n in lengths]), **segments)


def questions(count, seed=50):
    return left_padded([random_ids(1, 2 + 5 * place, place + seed)[0] for place in range(count)])


def said(model, cache, ids, mask=None, **options):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **{"do_sample": False, **options}
    )


@torch.no_grad()
def logits(model, cache, ids, mask=None):
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def buffers(cache):
    """All that a call may write to."""
    tails = [tensor for layer in cache.layers for tensor in layer.tail.tensors()]
    return [*tails, cache.length, cache.ids, cache.fed]


def addresses(cache):
    return [tensor.data_ptr() for tensor in buffers(cache)]


# ---- equal to the ordinary cache


@pytest.mark.parametrize("case", CASES)
def test_logits_are_within_the_error_budget(case):
    """Against float64: at most twice what the ordinary cache errs, for calls of any length, padded ones too."""
    (options, segments), found = case, {}
    for name, dtype in (("ours", torch.float32), ("plain", torch.float32), ("exact", torch.float64)):
        model = small(dtype, options)
        cache = ragged(model, **segments)
        cache = cache.fixed(60) if name == "ours" else cache
        found[name] = []
        for tokens in (11, 1, 8, 9, 1, 2):
            ids, mask = questions(3, tokens) if tokens == 8 else (random_ids(3, tokens, tokens), None)
            last = logits(model, cache, ids, mask)
            found[name].append(last if mask is None else last[mask == 1])
        assert cache.tail_rows.tolist() == [26, 31, 36]
    for place, (ours, plain, exact) in enumerate(zip(*found.values(), strict=True)):
        assert_within_budget(f"call {place}", ours, exact, plain, 2.0)


@pytest.mark.parametrize("kind", ["own", "shared", "int8", "float8_e4m3fn"])
def test_ragged_batches_answer_the_same(patched, kind):
    model, segments = patched
    cache = ragged(model, **segments)
    if kind == "shared":
        cache = cache.shared()
        cache.batch_select_indices(torch.tensor([2, 0, 0]))
    elif kind != "own":
        cache = cache.to(gist_dtype=getattr(torch, kind))
    ids, mask = questions(3)
    fixed = cache.fixed(12 + NEW - 1)
    before = addresses(fixed)
    assert torch.equal(said(model, fixed, ids, mask), said(model, cache.clone(), ids, mask))
    assert fixed.length.tolist() == [7, 12, 17]
    assert addresses(fixed) == before


def test_several_turns_and_the_next_question(patched):
    """generate takes everything since the context, of which the cache has read the first; reset_tail begins anew."""
    model, segments = patched
    cache = ragged(model, **segments)
    fixed, before = cache.fixed(60), None
    for seed in (50, 70):
        ordinary, (ids, mask) = cache.clone(), questions(3, seed)
        for turn in range(3):
            answer = said(model, ordinary, ids, mask)
            assert torch.equal(said(model, fixed, ids, mask), answer)
            more = random_ids(3, 2, turn)
            ids = torch.cat([answer, more], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        assert fixed.tail_rows.tolist() == ordinary.tail_rows.tolist()
        assert fixed.get_seq_length() == ordinary.get_seq_length()
        assert addresses(fixed) == (before or addresses(fixed))
        before = addresses(fixed)
        fixed.reset_tail()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_sampling_and_several_answers(patched, options):
    model, segments = patched
    cache, answers = ragged(model, **segments), []
    for one in (cache.fixed(20), cache.clone()):
        torch.manual_seed(3)
        answers.append(said(model, one, *questions(3), **options))
    assert torch.equal(*answers)


def test_one_document_many_questions_and_a_tail_that_was_there(patched):
    model, segments = patched
    own = gistkern.compress(model, random_ids(1, 37), **segments)
    ids, mask = questions(4)
    assert torch.equal(said(model, own.fixed(30), ids, mask), said(model, own.clone(), ids, mask))
    read = own.clone()
    read.batch_repeat_interleave(4)
    logits(model, read, ids, mask)  # the ordinary way of reading, then a fixed size
    fixed = read.fixed(30)
    assert fixed.tail_rows.tolist() == mask.sum(1).tolist()
    more = torch.cat([ids, random_ids(4, 3, 9)], 1), torch.nn.functional.pad(mask, (0, 3), value=1)
    assert torch.equal(said(model, fixed, *more), said(model, read, *more))


def test_steps_are_taken_back():
    """crop, and assisted decoding, which drafts tokens and crops those that are refused."""
    model = small()
    cache, ids = gistkern.compress(model, random_ids(1, 37)), random_ids(1, 9, 3)
    fixed = cache.fixed(40)
    first = logits(model, fixed, ids)
    fixed.crop(-4)
    assert torch.equal(fixed.length, torch.tensor([5], dtype=torch.int32))
    torch.testing.assert_close(logits(model, fixed, ids[:, 5:]), first[:, 5:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot crop 10 tokens: only the 9 raw tokens"):
        fixed.crop(-10)
    fixed.reset_tail()
    repeated = ids.repeat(1, 2)
    ordinary = said(model, cache.clone(), repeated, eos_token_id=-1)
    assert torch.equal(said(model, fixed, repeated, prompt_lookup_num_tokens=3, eos_token_id=-1), ordinary)


def test_bfloat16():
    model = small(torch.bfloat16)
    cache, (ids, mask) = ragged(model), questions(3)
    found, plain = (logits(model, one, ids, mask)[mask == 1] for one in (cache.fixed(20), cache))
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.1)


def test_copies_and_failed_calls_leave_it_alone():
    model = small()
    fixed = ragged(model).fixed(30)
    ids, mask = questions(3)
    logits(model, fixed, ids, mask)
    clone, deep = fixed.clone(), copy.deepcopy(fixed)
    assert clone.layers[0].gist.key is fixed.layers[0].gist.key, "rows that nobody writes are not copied"
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, fixed, random_ids(3, 4))
    handle.remove()
    assert fixed.length.tolist() == [2, 7, 12]
    step = random_ids(3, 1, 5)
    expected = logits(model, clone, step)
    assert torch.equal(logits(model, fixed, step), expected)
    assert torch.equal(logits(model, deep, step), expected)
    fixed.reset_tail()
    assert clone.length.tolist() == [3, 8, 13]


# ---- what it refuses


def test_no_room_is_an_error_before_anything_is_written():
    model = small()
    cache, ids = gistkern.compress(model, random_ids(1, 30)), random_ids(1, 5, 2)
    fixed = cache.fixed(4)
    with pytest.raises(ValueError, match="has room for 4 tokens behind its context, this call would make them 5"):
        logits(model, fixed, ids)
    padded = torch.nn.functional.pad(ids[:, :3], (6, 0))
    logits(model, fixed, padded, torch.tensor([[0] * 6 + [1] * 3]))  # padding takes no room
    logits(model, fixed, ids[:, :1])
    held = [tensor.clone() for tensor in buffers(fixed)]
    with pytest.raises(ValueError, match="would make them 5"):
        logits(model, fixed, ids[:, :1])
    assert all(map(torch.equal, buffers(fixed), held))
    fixed.reset_tail()
    with pytest.raises(ValueError, match="would make them 5"):
        said(model, fixed, ids[:, :2])
    assert said(model, cache.fixed(2 + NEW - 1), ids[:, :2]).shape == (1, 2 + NEW)
    two = gistkern.compress(model, random_ids(2, 30)).fixed(6)  # what counts is each sample's own length
    for shown in ([[0] * 4 + [1], [1] * 5], [[1] * 5, [0] * 4 + [1]]):
        logits(model, two, random_ids(2, 5), torch.tensor(shown))
    assert two.length.tolist() == [6, 6]


def test_bad_calls_are_refused():
    model = small()
    handle = model.gistkern_handle
    cache, ids = gistkern.compress(model, random_ids(2, 30)), random_ids(2, 3, 2)
    fixed = cache.fixed(20)

    def refused(message, ids=ids, **arguments):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(ids, past_key_values=fixed, **arguments)

    refused("takes no gist tokens after its context", torch.full_like(ids, handle.gist_token_ids[0]))
    refused("position_ids does not go with a cache of fixed size", position_ids=torch.arange(3)[None])
    refused("gist_layout does not go with", gist_layout=gistkern.GistLayout.from_input_ids(ids, handle.gist_token_ids))
    refused("holds 2 samples, the call has 3", random_ids(3, 2))
    refused(r"must be \[batch, tokens\] with at least the 3 new tokens", attention_mask=torch.ones(2, 2))
    refused("padding in front of a call's tokens, not behind", attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match="gist_decode has no gradient"):
        model(ids, past_key_values=fixed)
    said(model, fixed, ids)
    refused("hides tokens that the cache has read", attention_mask=torch.tensor([[0, 1, 1, 1] + [1] * 7] * 2)[:, :11])
    with pytest.raises(ValueError, match="is not the one that the cache has read there"):
        said(model, fixed, random_ids(2, 20, 9))
    with pytest.raises(ValueError, match=r"reset_tail\(\) forgets"):
        fixed.reset()
    assert fixed.length.tolist() == [8, 8]


def test_bad_caches_are_refused():
    model = small()
    cache = gistkern.compress(model, random_ids(1, 30))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cache.fixed(0)
    with pytest.raises(ValueError, match="empty"):
        gistkern.GistCache().fixed(3)
    with pytest.raises(ValueError, match="not float64"):
        gistkern.compress(small(torch.float64), random_ids(1, 9)).fixed(3)
    read = cache.clone()
    logits(model, read, random_ids(1, 5))
    with pytest.raises(ValueError, match="has 5 rows behind its context already, room is 4"):
        read.fixed(4)
    logits(model, read, torch.tensor([[model.gistkern_handle.gist_token_ids[0]]]))
    with pytest.raises(ValueError, match="is not ended"):
        read.fixed(40)
    with pytest.raises(ValueError, match="written by another model"), torch.no_grad():
        small(seed=1)(random_ids(1, 2), past_key_values=cache.fixed(4))
    with pytest.raises(RuntimeError, match="works with a patched model only"), torch.no_grad():
        make_model(dtype=torch.float32)(random_ids(1, 2), past_key_values=cache.fixed(4))


# ---- compiled


class Watch(TorchDispatchMode):
    """What a CUDA graph could not replay: waiting for a value, sizes that depend on values, writing to other memory."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self, known):
        super().__init__()
        self.known, self.found = set(known), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, schema = function._schema.name.split("::")[1], function._schema
        if any(name.startswith(wait) for wait in self.waits):
            self.found.append(name)
        for given, argument in zip(args, schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and given.data_ptr() not in self.known:
                self.found.append(f"{name} writes elsewhere")
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor.numel():
                self.known.add(tensor.data_ptr())
        return out


def test_a_step_waits_for_nothing_and_writes_in_place():
    model = small()
    fixed = ragged(model).fixed(20)
    logits(model, fixed, *questions(3))
    before, step = addresses(fixed), random_ids(3, 1)
    logits(model, fixed, step)  # the host counts once what a padded call has left
    with Watch(before) as watch:
        logits(model, fixed, step)
    assert not watch.found
    assert addresses(fixed) == before
    assert fixed.length.tolist() == [4, 9, 14]


def test_one_graph_for_all_steps():
    """No graph break (fullgraph), and no step after the first is compiled; the hooks of the patch are in the graph."""
    model = small()
    cache, (ids, mask) = ragged(model, segment_length=10), questions(3)
    fixed, ordinary = cache.fixed(20), cache.clone()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one in (fixed, ordinary):
        logits(model, one, ids, mask)
    for step in range(5):
        token = random_ids(3, 1, step)
        torch.testing.assert_close(logits(compiled, fixed, token), logits(model, ordinary, token), rtol=1e-4, atol=1e-4)
    fixed.reset_tail()
    logits(compiled, fixed, token)
    logits(compiled, fixed.clone(), token)  # other buffers, the same program
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def compile_here(backend="eager"):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # transformers compiles on CUDA devices alone otherwise
    return config


def test_generate_compiles_by_itself():
    model = small()
    cache = ragged(model, segment_length=10)
    fixed = cache.fixed(20)
    for seed in (50, 60):
        ids, mask = questions(3, seed)
        answer = said(model, fixed, ids, mask, compile_config=compile_here())
        assert torch.equal(answer, said(model, cache.clone(), ids, mask))
        fixed.reset_tail()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    beams = {"num_beams": 3, "compile_config": compile_here()}
    assert torch.equal(said(model, fixed, ids, mask, **beams), said(model, cache.clone(), ids, mask, num_beams=3))
    with pytest.raises(ValueError, match="room for 14 tokens behind its context, this call would make them 15"):
        said(model, cache.fixed(14), ids, mask, compile_config=compile_here())


def test_compiled_calls_stay_inside_the_buffers():
    """Where nobody on the host counts, the program itself refuses; a gist token is read as any other."""
    model = small(num_hidden_layers=1)
    fixed = gistkern.compress(model, random_ids(1, 30)).fixed(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    token = torch.tensor([[model.gistkern_handle.gist_token_ids[0]]])
    for _ in range(2):
        assert logits(compiled, fixed, token).isfinite().all()
    held = [tensor.clone() for tensor in buffers(fixed)[2:]]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has no room for this call's rows"):
            logits(compiled, fixed, token)
    assert all(map(torch.equal, buffers(fixed)[2:], held))
    with pytest.raises(ValueError, match="would make them 3"):
        logits(model, fixed, token)


def test_a_compiled_call_knows_its_model(tmp_path):
    model = small(num_hidden_layers=1)
    gistkern.compress(model, random_ids(1, 30)).save(tmp_path / "cache.safetensors")
    fixed = gistkern.GistCache.load(tmp_path / "cache.safetensors").fixed(8)
    compiled, token = torch.compile(model, fullgraph=True, backend="eager"), random_ids(1, 1)
    with pytest.raises(Exception, match="has not read the cache yet"):
        logits(compiled, fixed, token)
    torch._dynamo.reset()
    logits(model, fixed, token)
    logits(compiled, fixed, token)
    assert fixed.length.tolist() == [2]


@pytest.mark.slow  # half a minute of g++
def test_inductor():
    model = small(num_hidden_layers=1)
    cache, (ids, mask) = ragged(model).to(gist_dtype=torch.int8), questions(3)
    fixed = cache.fixed(13)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for one in (fixed, cache):
        logits(model, one, ids, mask)
    token = random_ids(3, 1)
    torch.testing.assert_close(logits(compiled, fixed, token), logits(model, cache, token), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="has no room for this call's rows"):
        logits(compiled, fixed, token)
    assert fixed.length.tolist() == [3, 8, 13]
