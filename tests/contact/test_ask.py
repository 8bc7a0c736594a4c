"""`gistkern.ask` says what compressing, asking and generating by hand say."""

import pytest
import torch
from contact_cases import make_model, train
from tokenizers import processors
from training_oracle import make_tokenizer

import gistkern
from gistkern.hf.texts import context_ids

CONTEXT = "w3 w1 w4 w1 w5 w9 w2 w6 w5 w3 w5"
QUESTIONS = ["w8 w9", "w7", "w9 w3 w2 w3"]


def trained(peft=False, **notes):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=63)
    handle = gistkern.patch(model, num_gist_tokens=3)
    train(handle)
    handle.record(**notes)
    return model, tokenizer


@torch.no_grad()
def by_hand(model, tokenizer, question, tokens=8, **segments):
    """Greedy, each token by a masked forward over the whole stream, as training computes it."""
    handle = model.gistkern_handle
    ids = context_ids(tokenizer, CONTEXT)
    parts = gistkern.segments_of(ids, **segments) if segments else [ids]
    stream = [one for part in parts for one in (*part, *handle.gist_token_ids)]
    stream += tokenizer(question, add_special_tokens=False)["input_ids"]
    begun = len(stream)
    for _ in range(tokens):
        stream.append(int(model(torch.tensor([stream]), use_cache=False).logits[0, -1].argmax()))
        if stream[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(stream[begun:], skip_special_tokens=True)


@pytest.mark.parametrize("notes", [{}, {"segment_length": 4}, {"segment_length": 5, "segment_overlap": 2}])
def test_one_question_and_several(notes):
    model, tokenizer = trained(**notes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    expected = [by_hand(model, tokenizer, one, **notes) for one in QUESTIONS]
    assert len(set(expected)) > 1, "the questions matter"
    said = [gistkern.ask(model, tokenizer, CONTEXT, one, max_new_tokens=8) for one in QUESTIONS]
    assert said == expected
    assert gistkern.ask(model, tokenizer, CONTEXT, QUESTIONS, max_new_tokens=8) == expected
    assert gistkern.ask(model, tokenizer, CONTEXT, QUESTIONS[:1], max_new_tokens=8) == expected[:1]


def test_a_cache_is_asked_often_and_stays_as_it_is():
    model, tokenizer = trained()
    cache = gistkern.compress(model, tokenizer(CONTEXT, return_tensors="pt"))
    before = [layer.gist.key.clone() for layer in cache.layers]
    for one in QUESTIONS:
        assert gistkern.ask(model, tokenizer, cache, one) == gistkern.ask(model, tokenizer, CONTEXT, one)
    assert not cache.tail_rows.any()
    assert all(torch.equal(layer.gist.key, key) for layer, key in zip(cache.layers, before, strict=True))


def test_what_generate_takes_is_handed_on():
    model, tokenizer = trained()
    said = gistkern.ask(model, tokenizer, CONTEXT, "w8", num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert len(said) == len(set(said)) == 2
    torch.manual_seed(0)
    drawn = {gistkern.ask(model, tokenizer, CONTEXT, "w8", do_sample=True, temperature=3.0) for _ in range(4)}
    assert len(drawn) > 1


def test_an_answer_cut_short_is_as_long_as_asked():
    model, tokenizer = trained()
    model.generation_config.eos_token_id = None
    assert len(gistkern.ask(model, tokenizer, CONTEXT, "w8").split()) == 64
    assert len(gistkern.ask(model, tokenizer, CONTEXT, "w8", max_new_tokens=3).split()) == 3


@pytest.mark.parametrize(
    ("context", "question", "said"),
    [("", "w8", "context is empty"), (CONTEXT, "", "a question is empty"), (CONTEXT, [], "a question is empty")],
)
def test_nothing_to_ask(context, question, said):
    model, tokenizer = trained()
    with pytest.raises(ValueError, match=said):
        gistkern.ask(model, tokenizer, context, question)


def test_another_tokenizer_and_an_unpatched_model_are_refused():
    model, tokenizer = trained(context_prefix=[])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    with pytest.raises(ValueError, match="begin with no special token, this tokenizer"):
        gistkern.ask(model, tokenizer, CONTEXT, "w8")
    with pytest.raises(ValueError, match=r"gistkern\.load\(folder\)"):
        gistkern.ask(make_model(), tokenizer, CONTEXT, "w8")
