"""Models whose layers have sliding windows, or learned sinks: each layer by a layout of its own."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import random_ids
from test_acceptance import check

import gistkern
from gistkern import GistLayout
from gistkern.cache.windows import layer_windows
from gistkern.hf.call import GistCall
from gistkern.hf.families import FAMILIES

SOME = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
QWEN = {"use_sliding_window": True}
# of every family whose layers may slide, how some do (else all)
WINDOWS = {
    **{"cohere2": SOME, "dots1": SOME, "exaone4": SOME, "gemma3_text": SOME, "gpt_oss": SOME, "ministral": SOME},
    **{"ministral3": {}, "mistral": {}, "mixtral": {}, "olmo3": SOME, "phi3": {}, "qwen2": {**QWEN, **SOME}},
    **{"qwen3": {**QWEN, **SOME}, "qwen3_moe": QWEN, "smollm3": {**QWEN, **SOME}, "starcoder2": {}},
}
CLOSE = {"rtol": 0, "atol": 1e-12}


def make_model(family, window=4, **changes):
    return conftest.make_model(
        family, **{"sliding_window": window, "initializer_range": 0.2, **WINDOWS[family], **changes}
    )


def test_every_family_with_windows_is_here():
    assert {name for name, row in FAMILIES.items() if row.attention != "full"} == set(WINDOWS)


def padded(mask):
    """Positions that count real tokens, which is what an unpatched model is told."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("window", [1, 4, 1000])
@torch.no_grad()
def test_without_gist_tokens_a_model_computes_what_it_did(family, window):
    model, ids = make_model(family, window), random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 16:] = 0, 0
    packed = torch.cat([torch.arange(8), torch.arange(11)]).expand(2, -1)
    calls = [
        {},
        {"use_cache": False},
        {"attention_mask": mask, "position_ids": padded(mask)},
        # gpt-oss hands no positions to its mask: unpatched it does not know packed documents
        *([{"position_ids": packed, "use_cache": False}] if family != "gpt_oss" else []),
    ]
    plain = [model(ids, **call).logits for call in calls]
    # without a cache: transformers' own keeps all rows of a window of 1
    answer = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)
    implementation = model.config._attn_implementation
    with gistkern.patch_llama(model, num_gist_tokens=2):
        for call, wanted in zip(calls, plain, strict=True):
            real = call.get("attention_mask", torch.ones_like(ids)) == 1
            torch.testing.assert_close(model(ids, **call).logits[real], wanted[real], rtol=0, atol=1e-10)
        assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), answer)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(ids).logits, plain[0], rtol=0, atol=0)


def test_the_window_is_seen_in_these_models():
    """What the tests above hold equal differs from full attention."""
    for family in WINDOWS:
        narrow, wide = (make_model(family, window) for window in (4, 1000))
        with torch.no_grad():
            assert (narrow(random_ids(1, 19)).logits - wide(random_ids(1, 19)).logits).abs().max() > 1e-3, family


def seen_by_layers(layout, window):
    """The two masks ``[B, 1, N, N]``, stated token by token: what lies in a row's own segment may be too far away."""
    rows = layout.num_rows
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    own = torch.arange(rows) >= layout.local_begin[..., None]
    full = layout.token_mask()
    sliding = full & ~(own & (distance >= window))
    return {"full_attention": full[:, None], "sliding_attention": sliding[:, None]}


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("window", [1, 2, 5, 11])
@torch.no_grad()
def test_gist_masked_layers_see_what_an_unpatched_model_is_shown(family, window):
    """The oracle: the plain model under dense masks, one for each type of layer, with the gist rows as embeddings."""
    model = make_model(family, window)
    plain = copy.deepcopy(model)
    handle = gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=2)
    gists = torch.tensor([handle.gist_token_ids] * 2)
    ids = torch.cat([random_ids(2, 9, 1), gists, random_ids(2, 6, 2), gists, random_ids(2, 8, 3)], 1)
    layout = GistLayout.from_input_ids(ids, handle.gist_token_ids, sink_tokens=2)
    layers = seen_by_layers(layout, window)
    masks = {k: torch.zeros(m.shape, dtype=torch.double).masked_fill_(~m, -1e300) for k, m in layers.items()}
    words = plain.get_input_embeddings()(ids.masked_fill(layout.is_gist, 0))
    embeds = torch.where(layout.is_gist[..., None], handle.inner.gist_embeddings((ids - 100).clamp(min=0)), words)
    given = masks if "layer_types" in vars(model.config) else masks["sliding_attention"]
    wanted = plain(inputs_embeds=embeds, attention_mask=given, position_ids=torch.arange(ids.shape[1])[None]).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@torch.no_grad()
def test_full_forward_equals_compressed_decode(family, positions):
    with gistkern.patch_llama(make_model(family), num_gist_tokens=3, positions=positions) as handle:
        check(handle.model, handle, 7, "right")


# narrower than the gists, than the tail, than a segment; wider than a segment, than everything
@pytest.mark.parametrize("window", [1, 2, 5, 9, 1000])
@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_windows_sinks_and_padding_sides(window, sink_tokens, side):
    model = make_model("gpt_oss", window)
    with gistkern.patch_llama(model, num_gist_tokens=3, positions="gist_first", sink_tokens=sink_tokens) as handle:
        check(model, handle, 7, side)
        check(model, handle, None, side)


@pytest.mark.parametrize("window", [1, 3, 8])
@torch.no_grad()
def test_hierarchical(window):
    model = make_model("gemma3_text", window)
    with gistkern.patch_llama(model, num_gist_tokens=4, sink_tokens=2, num_segment_gist_tokens=2) as handle:
        check(model, handle, 7, "left")


@pytest.mark.parametrize("chunk", [1, 3, 8])
@torch.no_grad()
def test_streaming_in_any_chunks_equals_the_full_forward(chunk):
    model = make_model("gpt_oss", 3)
    handle = gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=2)
    gists = torch.tensor(handle.gist_token_ids).expand(2, -1)
    stream = torch.cat([random_ids(2, 9, 1), gists, random_ids(2, 4, 2), gists, random_ids(2, 6, 3)], 1)
    cache = gistkern.GistCache()
    pieces = [model(piece, past_key_values=cache).logits for piece in stream.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(stream).logits, **CLOSE)
    assert cache.tail_rows.tolist() == [6, 6], "the tail is kept in full, whatever the window"


@pytest.mark.parametrize("family", ["gpt_oss", "mistral"])
@torch.no_grad()
def test_shared_quantized_and_saved_rows(family, tmp_path):
    """The paths that read rows where they stand (`gist_decode`) have the layer's window and sinks too."""
    model = make_model(family).float()
    gistkern.patch_llama(model, num_gist_tokens=3)
    cache = gistkern.compress(model, random_ids(2, 21), segment_length=7)
    tail = random_ids(2, 12, 5)

    def steps(cache):
        return torch.cat([model(tail[:, :6], past_key_values=cache).logits] + [
            model(one, past_key_values=cache).logits for one in tail[:, 6:].split(1, 1)
        ], 1)  # fmt: skip

    wanted = steps(cache.clone())
    torch.testing.assert_close(steps(cache.shared()), wanted, rtol=0, atol=1e-4)
    cache.save(tmp_path / "rows")
    torch.testing.assert_close(steps(gistkern.GistCache.load(tmp_path / "rows", model)), wanted, rtol=0, atol=0)
    rounded = cache.to(gist_dtype=torch.int8)
    torch.testing.assert_close(steps(rounded.clone()), steps(rounded.to(gist_dtype=torch.float32)), rtol=0, atol=1e-4)
    torch.testing.assert_close(steps(rounded.shared()), steps(rounded.clone()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_generate_beams_and_crop():
    model = make_model("gpt_oss", 3)
    handle = gistkern.patch_llama(model, num_gist_tokens=3)
    context, question = random_ids(1, 21), random_ids(1, 7, 2)
    cache = gistkern.compress(model, context, segment_length=7)

    def full(ids):
        return torch.cat(
            [*(t for s in context.split(7, 1) for t in (s, torch.tensor([handle.gist_token_ids]))), ids], 1
        )

    answer = model.generate(question, past_key_values=cache.clone(), max_new_tokens=9, do_sample=False)
    greedy = question
    for _ in range(9):
        greedy = torch.cat([greedy, model(full(greedy), use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(answer, greedy)
    beams = model.generate(
        question, past_key_values=cache.clone(), max_new_tokens=6, num_beams=3, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0, do_sample=False,
    )  # fmt: skip
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        logits = model(full(sequence[None]), use_cache=False).logits[0, -7:-1].log_softmax(-1)
        torch.testing.assert_close(logits.gather(1, sequence[-6:, None]).sum().float(), score, rtol=0, atol=1e-5)
    tail = cache.clone()
    model(random_ids(1, 8, 3), past_key_values=tail)
    tail.crop(-5)
    both = torch.cat([random_ids(1, 8, 3)[:, :3], question], 1)
    cropped = model(question, past_key_values=tail).logits
    torch.testing.assert_close(cropped, model(full(both), use_cache=False).logits[:, -7:], **CLOSE)


@pytest.mark.parametrize("family", ["gpt_oss", "mistral"])
def test_gradients_with_and_without_checkpoints(family):
    """Against autograd through the plain model under dense masks, sinks and gist rows included."""
    model = make_model(family, 3)
    plain = copy.deepcopy(model)
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    ids = torch.cat([random_ids(1, 9, 1), torch.tensor([handle.gist_token_ids]), random_ids(1, 6, 2)], 1)
    layout = GistLayout.from_input_ids(ids, handle.gist_token_ids)
    layers = seen_by_layers(layout, 3)
    masks = {k: torch.zeros(m.shape, dtype=torch.double).masked_fill_(~m, -1e300) for k, m in layers.items()}
    rows = handle.inner.gist_embeddings.weight.detach().clone().requires_grad_()
    words = plain.get_input_embeddings()(ids.masked_fill(layout.is_gist, 0))
    embeds = torch.where(layout.is_gist[..., None], rows[(ids - 100).clamp(min=0)], words)
    given = masks if "layer_types" in vars(model.config) else masks["sliding_attention"]
    wanted = plain(inputs_embeds=embeds, attention_mask=given, position_ids=torch.arange(ids.shape[1])[None]).logits
    direction = torch.randn(wanted.shape, dtype=torch.double)
    (wanted * direction)[:, -6:].sum().backward()
    of_plain = {name: p.grad for name, p in plain.named_parameters()}

    def gradients():
        model.zero_grad()
        (model(ids, use_cache=False).logits * direction)[:, -6:].sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    torch.testing.assert_close(ours.pop("model.gist_embeddings.weight"), rows.grad, rtol=1e-6, atol=1e-9)
    assert ours.keys() == {name for name, grad in of_plain.items() if grad is not None}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, of_plain[name], rtol=1e-6, atol=1e-9)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        if name in ours:
            torch.testing.assert_close(gradient, ours[name], **CLOSE)


def test_layouts_of_several_devices():
    """As accelerate spreads layers; a device without data shows where they went."""
    layout, made = GistLayout.from_segments([9], 2, tail=4), {}
    call = GistCall(layout, "auto", (4, None, 4), made=made)
    there = torch.device("meta")
    assert call._layout_of(layout.device, None) is layout
    assert call._layout_of(there, 4) is call._layout_of(there, 4) is not call._layout_of(there, None)
    assert {key: found.device for key, found in made.items()} == {(there, 4): there, (there, None): there}
    assert torch.equal(call._layout_of(layout.device, 4).local_begin, layout.windowed(4).local_begin)


@torch.no_grad()
def test_one_layout_for_each_window_of_a_call(monkeypatch):
    made = []
    windowed = GistLayout.windowed
    monkeypatch.setattr(GistLayout, "windowed", lambda *given: made.append(given[1]) or windowed(*given))
    model = make_model("gemma3_text", 4)
    gistkern.patch_llama(model)
    model(random_ids(1, 9))
    assert made == [4]


@pytest.mark.slow  # tracing takes a quarter of a minute
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model = make_model("qwen2", 4, num_hidden_layers=2, layer_types=SOME["layer_types"][:2])
    gistkern.patch_llama(model, num_gist_tokens=2)
    cache = gistkern.compress(model, random_ids(1, 9))
    ids = random_ids(1, 7)
    wanted = model(ids, past_key_values=cache.clone()).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, past_key_values=cache.clone()).logits, wanted, **CLOSE)


def test_a_layer_that_does_not_say_its_window_is_an_error():
    """As families whose window is in their mask alone would, if their row said otherwise."""
    model = make_model("qwen2")
    model.model.layers[2].self_attn.sliding_window = None
    gistkern.patch_llama(model)
    with pytest.raises(RuntimeError, match="layer 2 was patched with sliding_window=4 and now attends with None"):
        model(random_ids(1, 9))


def test_a_window_that_changes_after_patching_is_an_error():
    model = make_model("mistral", 4)
    gistkern.patch_llama(model)
    model.config.sliding_window = 5
    with pytest.raises(RuntimeError, match="sliding_window=4 and now attends with 5"):
        model(random_ids(1, 9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["sliding_attention"], "sliding_window": 0}, "sliding_window=0, which must be at least 1"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window=None, which must be at least 1"),
        ({"layer_types": ["full_attention", "b_attention", "a_attention"]}, "type 'a_attention', 'b_attention': gist"),
    ],
)
def test_other_layers_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        layer_windows(SimpleNamespace(**config))


def test_bidirectional_attention_is_refused():
    model = make_model("gemma3_text")
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="bidirectional"):
        gistkern.patch_llama(model)


@torch.no_grad()
def test_the_language_model_of_a_model_of_images(tmp_path, monkeypatch):
    """The block of docs/reference/families.md, which writes a folder, and what it says of the whole model."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    names = {}
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.S)[1], names)
    whole, ids = names["whole"], names["ids"]
    assert (tmp_path / "text-part" / "config.json").is_file()
    plain = whole(ids).logits
    with pytest.raises(TypeError, match="patch the language model inside"):
        gistkern.patch(whole)
    with gistkern.patch(names["model"], num_gist_tokens=2):
        with pytest.raises(ValueError, match="attention_mask must be a tensor"):
            whole(ids)
        torch.testing.assert_close(names["model"](ids).logits, plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_sliding_model_are_no_plain_prefix():
    model = make_model("mistral")
    gistkern.patch_llama(model)
    cache = gistkern.compress(model, random_ids(1, 9))
    with pytest.raises(ValueError, match=r"have a sliding window \(4 rows\)"):
        gistkern.plain_prefix(cache, model.config)


@torch.no_grad()
def test_a_cache_of_another_window_is_another_models():
    model, other = make_model("mistral", 4), make_model("mistral", 5)
    for one in (model, other):
        gistkern.patch_llama(one)
    with pytest.raises(ValueError, match="written by another model"):
        other(random_ids(1, 3), past_key_values=gistkern.compress(model, random_ids(1, 9)))
