"""Logits over restored rows are those of a dense forward in which question and answer see the restored tokens too.

The dense forward is the unpatched model's own attention, with a mask and positions of the whole stream.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import make_model, random_ids
from own_cases import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import gistkern
from gistkern import GistLayout
from gistkern.cache.questions import read_questions
from gistkern.cache.ranking import AttentionScores
from gistkern.hf.call import embed
from gistkern.hf.texts import context_ids, text_ids
from gistkern.layout.streams import segments_of

SEGMENT, TAIL = 7, 6
LENGTHS = (45, 23, 1)  # seven segments, four of which the last is short, and one that is all a sink
CLOSE = {"rtol": 0, "atol": 1e-12}


def patched(family="llama", dtype=torch.float64, changes=None, **settings):
    plain = make_model(family, dtype, **changes or {})
    model = copy.deepcopy(plain)
    return plain, model, gistkern.patch(model, num_gist_tokens=3, **settings)


def contexts(lengths=LENGTHS):
    return [random_ids(1, length, length)[0].tolist() for length in lengths]


def dense(plain, handle, context, tail, numbers, segment=SEGMENT, overlap=0):
    """Logits ``[TAIL, V]`` of the tail, which sees sinks, the gists that stay, itself, and segments `numbers`, raw."""
    pieces = [torch.from_numpy(piece) for piece in segments_of(np.array(context), segment, overlap)]
    ends = handle.segment_gist_token_ids or handle.gist_token_ids
    parts = [part for piece in pieces for part in (piece, torch.tensor(ends))]
    lengths = [len(piece) for piece in pieces]
    if handle.segment_gist_token_ids:
        stream = torch.cat([*parts, torch.tensor(handle.gist_token_ids), tail])
        counts = len(ends), len(handle.gist_token_ids)
        layout = GistLayout.hierarchical(lengths, *counts, tail=len(tail), sink_tokens=handle.sink_tokens)
    else:
        stream = torch.cat([*parts, tail])
        layout = GistLayout.from_input_ids(stream[None], handle.gist_token_ids, sink_tokens=handle.sink_tokens)
    begins = torch.tensor([0, *lengths]).cumsum(0) + len(ends) * torch.arange(len(pieces) + 1)
    back = torch.zeros(len(stream), dtype=torch.bool)
    for number in numbers:
        back[begins[number] : begins[number] + lengths[number]] = True
    rows = torch.arange(len(stream)) >= len(stream) - len(tail)

    def mask(layout):
        seen = layout.token_mask()[0] | (rows[:, None] & back)
        return torch.zeros(seen.shape, dtype=plain.dtype).masked_fill(~seen, torch.finfo(plain.dtype).min)[None, None]

    given = mask(layout)
    if any(handle.windows):
        window = max(filter(None, handle.windows))
        given = {"full_attention": given, "sliding_attention": mask(layout.windowed(window))}
    embeds = embed(handle, stream[None], handle.is_gist(stream[None]))
    place = layout.positions(handle.positions)
    with torch.no_grad():
        found = plain(inputs_embeds=embeds, attention_mask=given, position_ids=place, use_cache=False).logits
    return found[0, -len(tail) :]


def numbers_of(cache, restored):
    """Which segments each sample got back, read off the rows themselves."""
    found = []
    for sample in range(cache.batch_size):
        keys = restored.compact(0)[0][sample].transpose(0, 1)
        own = []
        for place, number in enumerate(cache.raw.of_sample(sample)):
            rows = cache.raw.rows(number).key[0]
            if len(rows) and any(torch.equal(rows, run) for run in keys.unfold(0, len(rows), 1).movedim(-1, 1)):
                own.append(place)
        found.append(own)
    return found


def check(plain, model, handle, top_k=2, scorer="attention", **kept):
    """At once, token by token, and by `generate`; returns the segments that came back."""
    samples, tail = contexts(), random_ids(len(LENGTHS), TAIL, 99)
    cache = gistkern.compress(model, samples, segment_length=SEGMENT, **{"keep_raw": "cpu", **kept})
    before = [layer.gist.key.clone() for layer in cache.layers]
    restored = cache.restore(model, tail, top_k, scorer=scorer)
    numbers = numbers_of(cache, restored)
    with torch.no_grad():
        at_once = model(tail, past_key_values=restored.clone()).logits
        steps = restored.clone()
        stepped = [model(tail[:, i : i + 1], past_key_values=steps).logits for i in range(TAIL)]
    torch.testing.assert_close(torch.cat(stepped, 1), at_once, **CLOSE)
    for sample, context in enumerate(samples):
        full = dense(plain, handle, context, tail[sample], numbers[sample])
        torch.testing.assert_close(at_once[sample], full, **CLOSE)
    assert all(torch.equal(layer.gist.key, key) for layer, key in zip(cache.layers, before, strict=True))
    assert not cache.tail_rows.any()
    return numbers


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("sink_tokens", [0, 1, 12])
@pytest.mark.parametrize("call_tokens", [7, 4096])
def test_restored_is_the_dense_forward_that_sees_the_segments(positions, sink_tokens, call_tokens, monkeypatch):
    """Sinks are rows already, and not twice: twelve reach over the first segment's gists into the second one."""
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: call_tokens)
    numbers = check(*patched(positions=positions, sink_tokens=sink_tokens))
    assert numbers[0]
    assert len(numbers[1]) <= 2


@pytest.mark.parametrize("top_k", [1, 4, 99])
def test_any_number_of_segments(top_k):
    numbers = check(*patched(sink_tokens=0), top_k=top_k)
    assert [len(own) for own in numbers] == [min(top_k, count) for count in (7, 4, 1)]


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
def test_hierarchical_segments_are_scored_by_the_gists_that_they_had(positions):
    plain, model, handle = patched(positions=positions, num_segment_gist_tokens=2)
    numbers = check(plain, model, handle)
    assert [len(own) for own in numbers] == [2, 2, 0]
    assert numbers[0] != [0, 1]


@pytest.mark.parametrize("family", ["ministral", "gpt_neox", "qwen3"])
def test_other_families_and_sliding_windows(family):
    """Restored rows are compact ones: as gist rows are, they are seen by every layer, whatever its window."""
    plain, model, handle = patched(family)
    assert any(handle.windows) == (family == "ministral")
    check(plain, model, handle)


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa"])
def test_every_backend_in_fp32_within_the_budget(backend):
    """The error against fp64 is at most twice that of the unpatched model's own fp32 forward."""
    if backend == "cpu" and gistkern.backends.get("cpu").reason(torch.zeros(1, 1, 1, 16), False):
        pytest.skip("the extension is not built")
    plain, model, handle = patched("llama", torch.float32, backend=backend)
    samples, tail = contexts(), random_ids(len(LENGTHS), TAIL, 99)
    cache = gistkern.compress(model, samples, segment_length=SEGMENT, keep_raw="cpu")
    restored = cache.restore(model, tail, 2)
    with torch.no_grad():
        logits = model(tail, past_key_values=restored.clone()).logits
    wide, _, wide_handle = patched()
    for sample, (context, numbers) in enumerate(zip(samples, numbers_of(cache, restored), strict=True)):
        given = context, tail[sample], numbers
        exact = dense(wide, wide_handle, *given)
        budget = (dense(plain, handle, *given) - exact).abs().max()
        assert (logits[sample] - exact).abs().max() <= 2 * budget


def test_none_restored_is_the_gist_cache_bit_for_bit():
    _, model, _ = patched(dtype=torch.float32)
    tail = random_ids(3, TAIL)
    kept, plain = (gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw=raw) for raw in ("cpu", None))
    given = [kept.restore(model, tail, 0), kept.shared().restore(model, tail, 0), plain.clone(), plain.shared()]
    with torch.no_grad():
        none, shared, expected, of_shared = (model(tail, past_key_values=cache).logits for cache in given)
    assert torch.equal(none, expected)
    assert torch.equal(shared, of_shared)


def test_a_shared_cache_and_several_questions_of_one_context():
    """Each question gets rows of its own; they may be shared again, and are ranges of one pool then."""
    _, model, _ = patched()
    cache = gistkern.compress(model, contexts()[:1], segment_length=SEGMENT, keep_raw="cpu")
    tails = random_ids(3, TAIL, 5)
    one_by_one = [cache.restore(model, tail[None], 2) for tail in tails]
    for given in (cache, cache.shared()):
        many = given.restore(model, tails, 2)
        assert many.gist_rows.tolist() == [int(one.gist_rows) for one in one_by_one]
        with torch.no_grad():
            for asked in (many.clone(), many.shared()):
                logits = model(tails, past_key_values=asked).logits
                for tail, found, alone in zip(tails, logits, one_by_one, strict=True):
                    expected = model(tail[None], past_key_values=alone.clone()).logits[0]
                    torch.testing.assert_close(found, expected, **CLOSE)
    picked = cache.clone()
    picked.batch_select_indices(torch.tensor([0, 0]))
    assert picked.restore(model, tails[:2], 2).gist_rows.tolist() == many.gist_rows[:2].tolist()


def test_padded_questions_rank_as_they_do_alone():
    _, model, _ = patched()
    cache = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu")
    questions = [random_ids(1, count, count)[0].tolist() for count in (3, 6, 2)]
    together = cache.restore(model, questions, 2)
    for sample, question in enumerate(questions):
        alone = gistkern.compress(model, contexts()[sample : sample + 1], segment_length=SEGMENT, keep_raw="cpu")
        one = alone.restore(model, [question], 2)
        rows = int(one.gist_rows)
        assert int(together.gist_rows[sample]) == rows
        torch.testing.assert_close(together.compact(1)[0][sample, :, -rows:], one.compact(1)[0][0], **CLOSE)


def test_questions_as_tokenizers_give_them():
    """Lists, arrays and mappings with their masks are the same question; what a mask hides counts for nothing."""
    _, model, handle = patched()
    cache = gistkern.compress(model, contexts()[:2], segment_length=SEGMENT, keep_raw="cpu")
    lists, mask = [[11, 12, 13], [14, 15, 10**6]], [[1, 1, 1], [1, 1, 0]]
    expected = cache.restore(model, [[11, 12, 13], [14, 15]], 2)
    for given, beside in (
        (lists, mask),
        (lists, torch.tensor(mask)),
        ({"input_ids": lists, "attention_mask": mask}, None),
        ({"input_ids": np.array(lists), "attention_mask": np.array(mask)}, None),
        (torch.tensor(lists, dtype=torch.int32), mask),
    ):
        ids, real = read_questions(handle, given, beside)
        assert [row[own].tolist() for row, own in zip(ids, real, strict=True)] == [[11, 12, 13], [14, 15]]
        found = cache.restore(model, given, 2, attention_mask=beside)
        assert numbers_of(cache, found) == numbers_of(cache, expected)
    alone = gistkern.compress(model, contexts()[:1], segment_length=SEGMENT, keep_raw="cpu")
    flat, one = alone.restore(model, [11, 12, 13], 2), alone.restore(model, [[11, 12, 13]], 2)
    assert torch.equal(flat.compact(0)[0], one.compact(0)[0])


def test_a_model_in_training_ranks_as_it_answers():
    """Neither its dropout nor its gradient checkpointing, under which no cache is filled, is in force."""
    _, model, _ = patched(changes={"attention_dropout": 0.9})
    cache, question = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu"), random_ids(3, TAIL)
    expected = numbers_of(cache, cache.restore(model, question, 2))
    model.train()
    model.gradient_checkpointing_enable()
    assert numbers_of(cache, cache.restore(model, question, 2)) == expected
    assert all(module.training for module in model.modules())


def test_scores_of_a_few_tokens_at_a_time_are_those_of_all(monkeypatch):
    _, model, _ = patched()
    cache, question = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu"), random_ids(3, TAIL)
    found = []
    for most in (2**24, 1):
        monkeypatch.setattr("gistkern.cache.ranking._SHARES", most)
        scores = AttentionScores(reading := cache.clone(), cache.raw, torch.ones(3, TAIL, dtype=torch.bool))
        reading.watch = scores.add
        with torch.no_grad():
            model(question, past_key_values=reading)
        found.append(np.concatenate(scores.of_segments()))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "ministral"])
@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("segment_overlap", [0, 3])
def test_gist_tokens_behind_restored_rows(family, positions, segment_overlap):
    """A turn that ends in gist tokens goes on from restored rows as from gist rows."""
    plain, model, handle = patched(family, positions=positions)
    samples, gists = contexts((45, 23, 9)), torch.tensor(handle.gist_token_ids).expand(3, -1)
    cut = {"segment_length": SEGMENT, "segment_overlap": segment_overlap}
    cache = gistkern.compress(model, samples, keep_raw="cpu", **cut)
    asked = cache.restore(model, random_ids(3, TAIL, 99), 2)
    numbers, first = numbers_of(cache, asked), torch.cat([random_ids(3, TAIL, 99), gists], 1)
    second = random_ids(3, 5, 98)
    with torch.no_grad():
        steps = [model(first, past_key_values=asked).logits]
        steps += [model(second[:, i : i + 1], past_key_values=asked).logits for i in range(5)]
    logits = torch.cat(steps, 1)
    for sample, context in enumerate(samples):
        rest = torch.cat([first[sample], second[sample]])
        full = dense(plain, handle, context, rest, numbers[sample], overlap=segment_overlap)
        torch.testing.assert_close(logits[sample], full, **CLOSE)


def test_the_answer_of_generate_is_that_of_greedy_steps():
    _, model, _ = patched()
    question = random_ids(1, TAIL, 3)
    cache = gistkern.compress(model, contexts()[:1], segment_length=SEGMENT, keep_raw="cpu")
    restored = cache.restore(model, question, 3)
    said = model.generate(question, past_key_values=restored.clone(), max_new_tokens=5, do_sample=False)
    beams = model.generate(question, past_key_values=restored.clone(), max_new_tokens=5, num_beams=2, do_sample=False)
    assert beams.shape == said.shape
    ids, steps = question, restored.clone()
    with torch.no_grad():
        for _ in range(5):
            fresh = ids[:, steps.get_seq_length() - cache.get_seq_length() :]
            ids = torch.cat([ids, model(fresh, past_key_values=steps).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids)


@pytest.mark.parametrize("raw_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("gist_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_quantized_rows(raw_dtype, gist_dtype):
    """Each row is what quantizing it makes of it, once: rows of one type stay in it, others become floats."""
    _, model, _ = patched(dtype=torch.float32)
    tail = random_ids(3, TAIL, 99)
    exact = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu")
    kinds = {"gist_dtype": gist_dtype, "raw_dtype": raw_dtype}
    cache = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu", **kinds)
    assert cache.raw.nbytes < exact.raw.nbytes / 2
    restored, wide = cache.restore(model, tail, 99), exact.restore(model, tail, 99)
    assert restored.gist_dtype == (raw_dtype if raw_dtype == gist_dtype else torch.float32)
    for layer in range(3):
        for found, of_all, alone in zip(
            restored.compact(layer), wide.compact(layer), exact.compact(layer), strict=True
        ):
            for sample, (gists, rows) in enumerate(zip(exact.gist_rows, wide.gist_rows, strict=True)):
                mine, theirs = found[sample, :, -rows:], of_all[sample, :, -rows:]
                parts = {raw_dtype: (slice(gists, None), theirs[:, gists:])}
                parts |= {gist_dtype: (slice(0, gists), alone[sample, :, -gists:])} if gist_dtype != raw_dtype else {}
                for dtype, (place, of) in parts.items():
                    wanted = (
                        of if dtype is None else gistkern.rows.dequantize(*gistkern.rows.quantize(of, dtype), of.dtype)
                    )
                    torch.testing.assert_close(mine[:, place], wanted, rtol=1e-6, atol=1e-6)


def test_other_types_and_copies_keep_the_raw_rows():
    _, model, _ = patched(dtype=torch.float32)
    tail = random_ids(3, TAIL)
    cache = gistkern.compress(model, contexts(), segment_length=SEGMENT, keep_raw="cpu")
    expected = cache.restore(model, tail, 2)
    for other in (cache.clone(), copy.deepcopy(cache), cache.to(gist_dtype=torch.int8).to(gist_dtype=torch.float32)):
        assert other.restore(model, tail, 2).gist_rows.tolist() == expected.gist_rows.tolist()


def test_bm25_finds_the_words_and_the_union_takes_both():
    _, model, _ = patched(sink_tokens=0)
    context = contexts()[0]
    cache = gistkern.compress(model, [context], segment_length=SEGMENT, keep_raw="cpu")
    question = torch.tensor([context[4 * SEGMENT : 4 * SEGMENT + 5]])
    found = {scorer: numbers_of(cache, cache.restore(model, question, 1, scorer=scorer))[0] for scorer in SCORERS}
    assert found["bm25"] == [4]
    assert set(found["union"]) == {4, *found["attention"]}


SCORERS = ("attention", "bm25", "union")


@pytest.mark.parametrize("call_tokens", [7, 4096])
@pytest.mark.parametrize(("sink_tokens", "summary"), [(2, 0), (12, 0), (2, 2)])
def test_the_scores_are_shares_of_attention(sink_tokens, summary, call_tokens, monkeypatch):
    """The softmax of the question's queries over keys of the whole stream's own forward finds the same segments."""
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: call_tokens)
    _, model, handle = patched(sink_tokens=sink_tokens, num_segment_gist_tokens=summary)
    context, tail = contexts()[0], random_ids(1, TAIL, 99)
    cache = gistkern.compress(model, [context], segment_length=SEGMENT, keep_raw="cpu")
    pieces, ends = torch.tensor(context).split(SEGMENT), handle.segment_gist_token_ids or handle.gist_token_ids
    stream = torch.cat([part for piece in pieces for part in (piece, torch.tensor(ends))])
    layout, count = None, len(ends)
    if summary:
        stream = torch.cat([stream, torch.tensor(handle.gist_token_ids)])
        layout = GistLayout.hierarchical([len(piece) for piece in pieces], count, 3, tail=0, sink_tokens=sink_tokens)
    keys, attended, whole, clone = [], [], gistkern.GistCache(), cache.clone()
    whole.watch = lambda layer, q, k, v, options: keys.append(k)
    clone.watch = lambda layer, q, k, v, options: attended.append(q)
    with torch.no_grad():
        model(stream[None], gist_layout=layout, past_key_values=whole)
        model(tail, past_key_values=clone)
    seen = handle.is_gist(stream) | (torch.arange(len(stream)) < sink_tokens)
    segment = torch.arange(7).repeat_interleave(torch.tensor([len(piece) + count for piece in pieces]))
    segment = torch.cat([segment, torch.full((len(stream) - len(segment),), -1)]).masked_fill(
        ~handle.is_gist(stream), -1
    )
    total = torch.zeros(7, dtype=torch.float64)
    for q, k in zip(attended, keys, strict=True):
        scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 16**-0.5).masked_fill(~seen, -torch.inf)
        share = scores.softmax(-1)[0].mean((0, 1))
        total += torch.stack([share[segment == number].sum() for number in range(7)])
    for top_k in (1, 2, 3):
        best = set(total.argsort(descending=True)[:top_k].tolist()) - ({0} if sink_tokens == 12 else set())
        assert set(numbers_of(cache, cache.restore(model, tail, top_k))[0]) == best


def test_ask_restores_for_each_question(tmp_path):
    """The answers of `restore=` are those of a cache that was restored by hand; from the text they are the same."""
    make_base(tmp_path, template="chatml")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    handle = gistkern.patch(model, tokenizer, num_gist_tokens=2)
    handle.record(segment_length=8)
    text, questions = "The bell is with Mira. The lamp is with Jonas. " * 3, [" Who has the lamp?", " The bell?"]
    cache = gistkern.compress(model, [context_ids(tokenizer, text)], segment_length=8, keep_raw="cpu")
    asked = [text_ids(tokenizer, question) for question in questions]
    expected = []
    for ids in asked:
        given = torch.tensor([ids])
        found = cache.restore(model, given, 2, scorer="bm25")
        out = model.generate(given, past_key_values=found, max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    how = {"restore": 2, "scorer": "bm25", "max_new_tokens": 5, "pad_token_id": 0}
    assert gistkern.ask(model, tokenizer, cache, questions, **how) == expected
    assert gistkern.ask(model, tokenizer, text, questions, **how) == expected
    assert gistkern.ask(model, tokenizer, cache.shared(), questions, **how) == expected
    with pytest.raises(ValueError, match="restore must be an int >= 0"):
        gistkern.ask(model, tokenizer, cache, questions, restore=-1)
    plain = gistkern.compress(model, [context_ids(tokenizer, text)], segment_length=8)
    with pytest.raises(ValueError, match="the cache holds no raw rows"):
        gistkern.ask(model, tokenizer, plain, questions, restore=1)


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
def test_other_forms_of_a_restored_cache(positions, tmp_path):
    """Of a fixed size, shared, from a file, and as the prefix of the unpatched model: the same logits."""
    plain, model, _ = patched(dtype=torch.float32, positions=positions)
    tail = random_ids(1, TAIL, 99)
    cache = gistkern.compress(model, contexts()[:1], segment_length=SEGMENT, keep_raw="cpu")
    restored = cache.restore(model, tail, 2)
    restored.save(tmp_path / "restored")
    with torch.no_grad():
        expected = model(tail, past_key_values=restored.clone()).logits
        loaded = gistkern.GistCache.load(tmp_path / "restored", model)
        for other in (restored.fixed(room=TAIL), restored.shared(), loaded):
            torch.testing.assert_close(model(tail, past_key_values=other).logits, expected, rtol=0, atol=1e-4)
        prefix = gistkern.plain_prefix(restored, model.config)
        rows = int(restored.gist_rows)
        shown = torch.ones(1, rows + TAIL, dtype=torch.long)
        place = torch.arange(rows, rows + TAIL)[None]
        logits = plain(tail, attention_mask=shown, position_ids=place, past_key_values=prefix).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
