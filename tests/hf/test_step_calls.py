"""A step of `generate` on a patched model: what it calls beside the unpatched model's, and what it may assume."""

import copy

import pytest
import torch
import transformers
from conftest import make_model, random_ids
from packaging.version import Version
from tokenizers import Tokenizer, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import gistkern
from bench.measured.calls import Calls, Operations, count
from gistkern.backends import native
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.step import Steps
from gistkern.ops import decode

LIMIT = 1.15  # of an unpatched model's calls of Python, of C and on tensors
# an older transformers calls less by itself, and without the extension a step is many operators
COMPARABLE = native.missing() is None and Version(transformers.__version__) >= Version("5.24")
SHORT, LONG = 12, 16  # tokens; between them no tail finds its room full
pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


def per_step(model, cache=None):
    """Calls, operations and waits of a step: what some tokens more take more."""

    def answer(tokens):
        held = {} if cache is None else {"past_key_values": cache.clone()}
        return lambda: model.generate(
            random_ids(1, 7), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **held
        )

    answer(2)()
    calls = [count(answer(tokens)) for tokens in (SHORT, LONG)]
    operations = []
    for tokens in (SHORT, LONG):
        with Operations() as found:
            answer(tokens)()
        operations.append(found)
    short, long = operations
    steps = LONG - SHORT
    return [number / steps for number in (*(calls[1] - calls[0]), long.total - short.total)], long.waits - short.waits


@pytest.mark.parametrize("layers", [2, 16])
def test_a_step_calls_little_more_than_the_unpatched_models(layers):
    model = make_model(dtype=torch.float32, num_hidden_layers=layers)
    plain, plain_waits = per_step(copy.deepcopy(model))
    gistkern.patch(model, num_gist_tokens=3)
    cache = gistkern.compress(model, random_ids(1, 25))
    kinds = {"GistCache": cache, "int8": cache.to(gist_dtype=torch.int8), "shared": cache.shared()}
    for name, held in (kinds | {"fixed": cache.fixed(40)}).items():
        found, waits = per_step(model, held)
        ratios = [one / other for one, other in zip(found, plain, strict=True)]
        print(f"{layers} layers, {name}: Python, C and tensor calls {found}, unpatched {plain}: {ratios}")
        assert max(ratios) <= LIMIT or not COMPARABLE, ratios
        assert waits.total() <= plain_waits.total()


def test_calls_are_counted_exactly():
    calls = count(lambda: [max(1, 2), str.upper("a")])
    assert calls == Calls(1, 2)
    with Operations() as found:
        x = torch.ones(3, 2)
        x[x > 0], x.sum().item(), torch.cat([x, x])
    assert found.total == sum(found.names.values()) >= 6
    assert {name for name, _ in found.waits} == {"index", "_local_scalar_dense"}
    assert all(place.startswith("tests/hf/test_step_calls.py") for _, place in found.waits)
    assert found.copied == 6 * 4 + 12 * 4


# ---- what a step may assume


@pytest.mark.parametrize("kind", ["fixed", "int8"])
def test_layers_look_again_at_what_has_changed_only(kind, monkeypatch):
    """A scale of equal value made anew, or a longer tail, is no other call; a changed scale is one."""
    checks, check = [], decode._checked
    monkeypatch.setattr(decode, "_checked", lambda *given: (checks.append(given[2]), check(*given))[1])
    model = make_model(dtype=torch.float32, num_hidden_layers=2)
    gistkern.patch(model, num_gist_tokens=2)
    cache = gistkern.compress(model, random_ids(1, 20))
    cache = cache.fixed(40) if kind == "fixed" else cache.to(gist_dtype=torch.int8)
    attention, ids = [layer.self_attn for layer in model.model.layers], random_ids(1, 1)
    scale = attention[0].scaling

    @torch.no_grad()
    def step(scale, held):
        for one in attention:
            one.scaling = scale
        checks.clear()
        return model(ids, past_key_values=held).logits, len(checks)

    layers = 2 if kind == "fixed" else 1  # once for each layer, or once for all
    for number in range(6):
        _, looked = step(torch.tensor(scale), cache)
        # behind its first row a growing tail finds room, whose strides are others
        assert looked == (layers if number == 0 or (number == 1 and kind == "int8") else 0)
    other, twin = cache.clone(), cache.clone()
    found, looked = step(torch.tensor(2 * scale), cache)
    assert looked == layers
    assert torch.equal(found, step(2 * scale, other)[0])
    assert not torch.equal(found, step(scale, twin)[0])


def test_steps_over_a_fixed_cache_are_announced_to_it(monkeypatch):
    """They write and say what calls that are looked at do, bit for bit, also in ragged batches and after a reset."""
    model = make_model(dtype=torch.float32)
    gistkern.patch(model, num_gist_tokens=2)
    contexts = gistkern.left_padded([random_ids(1, n, n)[0] for n in (20, 9)])
    fixed = gistkern.compress(model, contexts[0], contexts[1].long()).fixed(30)
    question, mask = gistkern.left_padded([random_ids(1, n, n)[0] for n in (5, 3)])
    asked = {"attention_mask": mask.long(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    announced, found = [], FixedGistCache.is_announced

    def asks(self, ids):
        announced.append(found(self, ids))
        return announced[-1]

    def answers(tell):
        fixed.reset_tail()
        monkeypatch.setattr(FixedGistCache, "is_announced", asks if tell else lambda self, ids: False)
        ids = model.generate(question, past_key_values=fixed, **asked)
        rows = [tensor.clone() for layer in fixed.layers for tensor in layer.tail.tensors()]
        return [ids, fixed.length.clone(), fixed.ids.clone(), fixed.fed.clone(), *rows]

    answers(False)  # buffers hold what an earlier question left
    looked, told = answers(False), answers(True)
    assert announced == [True] * 7
    assert all(map(torch.equal, looked, told))


@pytest.fixture
def announced(monkeypatch):
    """Ids of the calls that caches were told of."""
    ids, announce = [], Steps.announce
    monkeypatch.setattr(Steps, "announce", lambda self, given: (ids.append(given.clone()), announce(self, given)))
    return ids


@pytest.fixture
def padded():
    """A model whose logits reach over its gist tokens, and their ids."""
    words = {str(i): i for i in range(90)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    model = make_model(dtype=torch.float32)
    return model, gistkern.patch(model, tokenizer, num_gist_tokens=3).gist_token_ids


class Favour(LogitsProcessor):
    """Makes one token the likeliest."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = 99
        return scores


class Write(LogitsProcessor):
    """Writes over the last token of the ids that it is shown."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        input_ids[:, -1] = self.token
        return scores


def said(model, cache, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(random_ids(cache.batch_size, 4, 3), past_key_values=cache, **options)


def test_what_is_sampled_is_announced(announced, padded):
    model, (first, *_) = padded
    cache = gistkern.compress(model, random_ids(2, 20) % 90)
    out = said(model, cache.clone(), logits_processor=[Favour(first)])
    assert torch.equal(torch.cat(announced, 1), out[:, 4:-1])
    assert not (out >= first).any()


def test_settings_that_could_append_gist_tokens_announce_nothing(announced, padded):
    model, (first, *_) = padded
    cache = gistkern.compress(model, random_ids(2, 20) % 90)
    favoured = said(model, cache.clone())[0, 4].item()  # the first sample ends at once, the second may go on
    announced.clear()
    out = said(model, cache.clone(), pad_token_id=first, eos_token_id=favoured)
    said(model, cache.clone(), num_beams=2)
    assert not announced
    assert (out[0, 5:] == first).all()


def test_beams_are_announced_where_no_logit_is_a_gists(announced):
    model = make_model(dtype=torch.float32)
    gistkern.patch(model, num_gist_tokens=3)
    said(model, gistkern.compress(model, random_ids(1, 20)), num_beams=2)
    assert len(announced) == 5


def test_gist_tokens_put_in_behind_generates_back_are_an_error(padded):
    model, (first, *_) = padded
    with pytest.raises(RuntimeError, match="generate has appended a gist token"):
        said(model, gistkern.compress(model, random_ids(1, 20) % 90), logits_processor=[Write(first)])


def test_tokens_that_the_caller_suppresses_stay_suppressed(padded):
    model, _ = padded
    cache = gistkern.compress(model, random_ids(1, 20) % 90)
    unwanted = said(model, cache.clone())[0, 4:].unique().tolist()
    assert not torch.isin(said(model, cache, suppress_tokens=unwanted)[:, 4:], torch.tensor(unwanted)).any()


def test_a_call_of_other_ids_than_announced_is_looked_at():
    """A step that was prepared and never called says nothing of the next call."""
    model = make_model()
    handle = gistkern.patch(model, num_gist_tokens=2)
    gists, token = torch.tensor([handle.gist_token_ids]), random_ids(1, 1)
    cache = gistkern.compress(model, random_ids(1, 20))
    with torch.no_grad():
        model(random_ids(1, 3), past_key_values=cache)
        plain = cache.clone()
        cache.steps.announce(token)
        for one in (plain, cache):
            model(gists, past_key_values=one)
        assert cache.state.tail_has_gists
        cache.steps.announce(token)
        answers = [model(token, past_key_values=one).logits for one in (cache, plain)]
    assert torch.equal(*answers)
    assert cache.gist_rows.tolist() == plain.gist_rows.tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_announced_steps_say_what_others_say(dtype):
    """Where a segment is open, after crops and selections, in ragged batches: the same state and the same logits."""
    model = make_model(dtype=dtype)
    handle = gistkern.patch(model, num_gist_tokens=2)
    contexts = gistkern.left_padded([random_ids(1, n, n)[0] for n in (20, 9)])
    cache = gistkern.compress(model, contexts[0], contexts[1].long())
    others = cache.clone()

    def step(seed, tell=True):
        ids = random_ids(2, 1, seed)
        if tell:
            cache.steps.announce(ids)
        others.steps.last = None  # whose call is planned anew
        found, expected = (model(ids, past_key_values=one).logits for one in (cache, others))
        assert torch.equal(found, expected)
        for name, value in vars(others.state).items():
            same = torch.equal if torch.is_tensor(value) else int.__eq__
            assert same(getattr(cache.state, name), value), name

    with torch.no_grad():
        for seed in range(18):  # through a room that is full
            step(seed)
        for one in (cache, others):
            one.crop(-2)
        step(20)
        step(21)
        for one in (cache, others):
            one.batch_select_indices(torch.tensor([1, 0]))
        step(22)
        step(23, tell=False)
        step(24)
        for one in (cache, others):  # gists that stay open
            model(torch.tensor([handle.gist_token_ids] * 2), past_key_values=one)
        step(25)
        step(26)
