"""What transformers takes in a call works on a patched model with the same answer, or is refused before computing."""

import pytest
import torch
from conftest import make_model, random_ids
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import gistkern
from gistkern import GistLayout

IGNORED = -100


@pytest.fixture(params=["absolute", "gist_first"])
def patched(request):
    model = make_model()
    with gistkern.patch_llama(model, num_gist_tokens=2, sink_tokens=1, positions=request.param) as handle:
        yield model, handle


def documents(handle):
    """Three documents in one row: two with a compressed context, one without; and the layout that keeps them apart."""
    gists = torch.tensor([handle.gist_token_ids])
    streams = [torch.cat([random_ids(1, n, n), gists, random_ids(1, 4, n + 1)], 1) for n in (7, 12)]
    streams.append(random_ids(1, 5, 3))
    layouts = [GistLayout.from_input_ids(stream, handle.gist_token_ids, sink_tokens=1) for stream in streams]
    counted = torch.cat([torch.arange(stream.shape[1]) for stream in streams])[None]
    ends = torch.tensor([0, *(stream.shape[1] for stream in streams)]).cumsum(0).int()
    return torch.cat(streams, 1), GistLayout.pack(layouts), counted, ends


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("marked", ["position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "all"])
def test_packed_documents_do_not_see_each_other(patched, training, marked):
    model, handle = patched
    ids, layout, counted, ends = documents(handle)
    index = (counted == 0).cumsum(1).int()
    given = {
        "position_ids": counted,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "seq_idx": index,
        "max_length_q": 18,
    }
    given = given if marked == "all" else {marked: given[marked]}
    model.train(training)
    with torch.no_grad():
        expected = model(ids, gist_layout=layout, use_cache=False).logits
        torch.testing.assert_close(model(ids, **given).logits, expected, rtol=0, atol=1e-12)


def test_rows_of_a_batch_pack_documents_of_their_own(patched):
    model, handle = patched
    ids, _, counted, _ = documents(handle)
    turned, places = torch.cat([ids[:, 13:], ids[:, :13]], 1), torch.cat([counted[:, 13:], counted[:, :13]], 1)
    with torch.no_grad():
        both = model(torch.cat([ids, turned]), position_ids=torch.cat([counted, places]), use_cache=False).logits
        alone = [model(i, position_ids=p, use_cache=False).logits for i, p in ((ids, counted), (turned, places))]
        torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.arange(8)[None] * 2},
        {"position_ids": torch.arange(8)[None] + 3},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), "attention_mask": torch.ones(1, 8)},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 7, 8, 9, 10]])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 8]), "seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 8]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
    ],
)
def test_positions_that_the_scheme_would_ignore_are_refused(patched, given, training):
    model, _ = patched
    with pytest.raises(ValueError, match=r"position_ids|cu_seq_lens_q"):
        model.train(training)(random_ids(1, 8), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": random_ids(1, 8)[0]}, "expected input_ids"),
        ({"input_ids": random_ids(1, 8)[:, :0]}, "expected input_ids"),
        ({"input_ids": random_ids(1, 8).tolist()}, "expected input_ids"),
        ({"inputs_embeds": torch.zeros(8, 32)}, "expected inputs_embeds"),
        ({"input_ids": random_ids(2, 8), "position_ids": torch.arange(7)[None]}, "position_ids must be"),
        ({"input_ids": random_ids(2, 8), "position_ids": torch.zeros(3, 8)}, "position_ids must be"),
        ({"input_ids": random_ids(2, 8), "seq_idx": torch.zeros(1, 7)}, "seq_idx must be"),
        ({"input_ids": random_ids(2, 8), "cu_seq_lens_q": "all"}, "cu_seq_lens_q must be"),
    ],
)
def test_shapes_are_checked_before_anything_is_computed(patched, given, message):
    model, _ = patched
    with pytest.raises(ValueError, match=message):
        model(**given)


def test_one_row_of_a_mask_serves_all_samples(patched):
    model, _ = patched
    ids, mask = random_ids(2, 8), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.expand(2, 8)).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_a_cache_cannot_hold_packed_documents(patched):
    model, _ = patched
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    for given in ({"use_cache": True}, {"past_key_values": gistkern.GistCache()}):
        with pytest.raises(ValueError, match="no cache can tell apart"):
            model(random_ids(1, 5), **packed, **given)


def test_usual_positions_behind_a_cache(patched):
    """Whoever counts on from the cache, from its context or from 0 means the next tokens."""
    model, _ = patched
    question = random_ids(1, 4)
    cache = gistkern.compress(model, random_ids(1, 30))
    with torch.no_grad():
        expected = model(question, past_key_values=cache.clone()).logits
        for start in (0, cache.get_seq_length()):
            places = torch.arange(start, start + 4)[None]
            assert torch.equal(model(question, past_key_values=cache.clone(), position_ids=places).logits, expected)
        with pytest.raises(ValueError, match="position_ids are set by the position scheme"):
            model(question, past_key_values=cache.clone(), position_ids=2 * torch.arange(4)[None])


# ---- outputs


def test_tuples(patched):
    model, handle = patched
    ids = torch.cat([random_ids(1, 6), torch.tensor([handle.gist_token_ids]), random_ids(1, 3)], 1)
    with torch.no_grad():
        named = model(ids, labels=ids)
        loss, logits, cache = model(ids, labels=ids, return_dict=False)
    assert torch.equal(named.logits, logits)
    assert torch.equal(named.loss, loss)
    assert cache.get_seq_length() == 11


def test_an_output_without_logits(patched, monkeypatch):
    """Fused losses (Liger, TRL) replace the forward by one that returns no logits."""
    model, handle = patched
    ids = torch.cat([random_ids(1, 6), torch.tensor([handle.gist_token_ids]), random_ids(1, 3)], 1)
    seen = {}

    def forward(self, input_ids=None, labels=None, **kwargs):
        seen["labels"], hidden = labels, self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=hidden.sum(), logits=None)

    monkeypatch.setattr(type(model), "forward", forward)
    assert model(ids, labels=ids).logits is None
    assert (seen["labels"] == torch.where(handle.is_gist(ids), IGNORED, ids)).all()


# ---- labels


def test_labels_of_gist_tokens_are_left_out_however_they_come(patched):
    model, handle = patched
    ids = torch.cat([random_ids(2, 6), torch.tensor([handle.gist_token_ids] * 2), random_ids(2, 3)], 1)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    real = torch.where(handle.is_gist(ids), IGNORED, ids)
    with torch.no_grad():
        expected = model(ids, labels=real).loss
        for given in ({"labels": ids}, {"labels": ids, "shift_labels": shifted}):
            torch.testing.assert_close(model(ids, **given).loss, expected, rtol=0, atol=1e-12)
        # a Trainer counted them: as they are, shifted, or without the first
        for count in (ids.numel(), ids[:, 1:].numel(), torch.tensor(ids[:, 1:].numel())):
            left = real.ne(IGNORED).sum() if int(count) == ids.numel() else real[:, 1:].ne(IGNORED).sum()
            torch.testing.assert_close(
                model(ids, labels=ids, num_items_in_batch=count).loss,
                model(ids, labels=real, num_items_in_batch=left).loss,
                rtol=0,
                atol=1e-12,
            )
        # one micro-batch of several cannot know what the others hold
        with pytest.raises(ValueError, match="ignore_gist_labels"):
            model(ids, labels=ids, num_items_in_batch=100)
        model(ids, labels=real, num_items_in_batch=100)


# ---- generate


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"use_cache": False}, "use_cache=False beside a cache"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"position_ids": 2 * torch.arange(4)[None]}, "takes no position_ids"),
        ({"position_ids": 9 + torch.arange(4)[None]}, "takes no position_ids"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "generation_config", "model"])
def test_generate_refuses_what_it_would_answer_wrongly(patched, asked, message, by):
    model, _ = patched
    cache = None if "cache_implementation" in asked else gistkern.compress(model, random_ids(1, 20))
    arguments = dict(asked)
    if by != "argument" and "position_ids" not in asked:
        config = model.generation_config.__class__(**model.generation_config.to_dict() | asked)
        arguments = {"generation_config": config} if by == "generation_config" else {}
        model.generation_config = config if by == "model" else model.generation_config
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(1, 4), past_key_values=cache, max_new_tokens=2, **arguments)


def test_generate_takes_positions_that_the_scheme_sets_anyway(patched):
    model, _ = patched
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    cache = gistkern.compress(model, random_ids(2, 20))
    asked = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"past_key_values": cache}):
        copies = [{name: value.clone() for name, value in given.items()} for _ in range(3)]
        expected = model.generate(ids, **copies[0], **asked)
        assert torch.equal(model.generate(ids, position_ids=counted, **copies[1], **asked), expected)
        places = counted + (cache.get_seq_length() if given else 5)
        assert torch.equal(model.generate(ids, position_ids=places, **copies[2], **asked), expected)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("draft", ["patched", "plain", "itself"])
def test_a_draft_model_changes_no_answer(patched, draft, compressed):
    model, handle = patched
    small = model if draft == "itself" else make_model(seed=4)
    if draft == "patched":
        gistkern.patch_llama(small, num_gist_tokens=2)
    cache = gistkern.compress(model, random_ids(1, 20)) if compressed else gistkern.GistCache()
    asked = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(random_ids(1, 5), past_key_values=cache.clone(), **asked)
    assert torch.equal(
        model.generate(random_ids(1, 5), past_key_values=cache, assistant_model=small, **asked), expected
    )
    if draft == "plain":
        with pytest.raises(ValueError, match="patch that model too"):
            model.generate(torch.tensor([handle.gist_token_ids]), assistant_model=small, **asked)


def test_generate_from_embeddings(patched):
    model, _ = patched
    ids = random_ids(1, 6)
    embeds = model.get_input_embeddings()(ids)
    cache = gistkern.compress(model, random_ids(1, 20))
    for given in ({}, {"past_key_values": cache}):
        copies = [{name: value.clone() for name, value in given.items()} for _ in range(2)]
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, **copies[0])[:, 6:]
        assert torch.equal(
            model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, **copies[1]), expected
        )


def test_output_attentions_are_refused_also_by_the_config():
    model = make_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with gistkern.patch_llama(model), pytest.raises(ValueError, match="output_attentions"):
        model(random_ids(1, 4))


class HandsOn(LlamaForCausalLM):
    """A user's own class, which names no arguments."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_class_that_hands_its_arguments_on(patched):
    model, handle = patched
    own = HandsOn(make_model().config).to(model.dtype).eval()
    gistkern.patch_llama(own, num_gist_tokens=2, positions=handle.positions)
    own.load_state_dict(model.state_dict())
    ids = torch.cat([random_ids(1, 6), torch.tensor([handle.gist_token_ids]), random_ids(1, 3)], 1)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    assert torch.equal(own(ids, mask, labels=ids).loss, model(input_ids=ids, attention_mask=mask, labels=ids).loss)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ([random_ids(1, 3), *[None] * 12], {}, TypeError, "up to 8 positional arguments, got 13"),
        ([random_ids(1, 3)], {"input_ids": random_ids(1, 3)}, TypeError, "input_ids twice"),
        ([random_ids(1, 3)[:, :0]], {}, ValueError, r"at least one token, got \(1, 0\)"),
        ([random_ids(1, 3)[0]], {}, ValueError, r"input_ids \[batch, tokens\].*got \(3,\)"),
        ([[[1, 2, 3]]], {}, ValueError, "got list"),
        ([], {"inputs_embeds": torch.zeros(1, 3)}, ValueError, r"inputs_embeds \[batch, tokens, width\]"),
    ],
)
def test_arguments_that_no_model_takes(patched, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        patched[0](*args, **kwargs)
