"""`gistkern.ask` says what compressing, asking and generating by hand say."""

import pytest
import torch
from contact_cases import make_model, train
from tokenizers import processors
from training_oracle import make_tokenizer

import gistkern
from gistkern.hf.chat import chat_context, chat_parts
from gistkern.hf.texts import context_ids, text_ids

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
def by_hand(model, tokenizer, question, context=CONTEXT, tokens=8, **segments):
    """Greedy, each token by a masked forward over the whole stream, as training computes it."""
    handle = model.gistkern_handle
    ids = context_ids(tokenizer, context)
    parts = gistkern.segments_of(ids, **segments) if segments else [ids]
    stream = [one for part in parts for one in (*part, *handle.gist_token_ids)] + text_ids(tokenizer, question)
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


# a template with an end of turn, and one that rewrites what was said earlier
SAID = "{{ m['content'] }}"
TURNS = (
    "{% for m in messages %}{{ m['role'] }} " + SAID + " <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
EARLIER = "loop.index < loop.length - 2 and m['role'] == 'assistant'"
FORGETS = TURNS.replace(SAID, "{% if " + EARLIER + " %}w50{% else %}" + SAID + "{% endif %}")


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_chat_template_is_used_as_in_training(role):
    model, tokenizer = trained(chat=True, segment_length=6)
    tokenizer.chat_template = TURNS
    context = chat_context(tokenizer, CONTEXT, role)
    for one in QUESTIONS:
        asked = chat_parts(tokenizer, CONTEXT, one, role=role).question
        expected = by_hand(model, tokenizer, asked, context, segment_length=6)
        assert gistkern.ask(model, tokenizer, CONTEXT, one, chat=role, max_new_tokens=8) == expected
        model.gistkern_handle.record(chat=role)
        assert gistkern.ask(model, tokenizer, CONTEXT, one, max_new_tokens=8) == expected, "as it was trained"
        plain = by_hand(model, tokenizer, one, segment_length=6)
        assert gistkern.ask(model, tokenizer, CONTEXT, one, chat=False, max_new_tokens=8) == plain


@pytest.mark.parametrize("template", [TURNS, FORGETS], ids=["turns", "rewritten"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_turn_after_turn_is_the_masked_forward_of_the_whole_conversation(template, role):
    """The system prompt is compressed once; each answer is that of the uncompressed conversation under the mask."""
    model, tokenizer = trained(segment_length=6)
    tokenizer.chat_template = template
    chat = gistkern.Chat(model, tokenizer, CONTEXT, role=role)
    rows = int(chat.cache.gist_rows[0])
    for turn, text in enumerate(QUESTIONS):
        asked = [*chat.messages, {"role": "user", "content": text}]
        whole = [{"role": "system", "content": CONTEXT}, *asked] if role == "system" else [
            {**asked[0], "content": f"{CONTEXT}\n\n{asked[0]['content']}"}, *asked[1:]]  # fmt: skip
        rendered = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        context = chat_context(tokenizer, CONTEXT, role)
        assert rendered.startswith(context)
        expected = by_hand(model, tokenizer, rendered[len(context) :], context, segment_length=6)
        assert chat.say(text, max_new_tokens=8) == expected
        assert len(chat.messages) == 2 * turn + 2
        assert int(chat.cache.gist_rows[0]) == rows
    other = chat.again()
    assert other.say(QUESTIONS[0], max_new_tokens=8) == chat.messages[1]["content"]


def test_a_turn_that_fails_leaves_the_conversation_as_it_was():
    model, tokenizer = trained()
    tokenizer.chat_template = TURNS
    chat = gistkern.Chat(model, tokenizer, CONTEXT)
    first = chat.say("w8", max_new_tokens=4)
    for wrong in ({"num_return_sequences": 2}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match=r"num_return_sequences|max_new_tokens"):
            chat.say("w9", **wrong)
    with pytest.raises(ValueError, match="turn is empty"):
        chat.say(" ")
    assert chat.messages == [{"role": "user", "content": "w8"}, {"role": "assistant", "content": first}]
    again = chat.again()
    again.say("w8", max_new_tokens=4)
    assert chat.say("w9", max_new_tokens=4) == again.say("w9", max_new_tokens=4)


def test_a_context_cut_otherwise_than_in_training_is_warned_of_once(recwarn):
    model, tokenizer = trained(segment_length=4)
    ids = tokenizer(CONTEXT)["input_ids"]
    gistkern.compress(model, ids, segment_length=4)
    assert not [one for one in recwarn if "was trained with" in str(one.message)]
    with pytest.warns(UserWarning, match="segment_length=None, segment_overlap=0; the model was trained with 4 and 0"):
        gistkern.compress(model, ids)
    recwarn.clear()
    gistkern.compress(model, ids)
    assert not [one for one in recwarn if "was trained with" in str(one.message)]


def test_gist_tokens_spelled_out_are_refused():
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=80)
    handle = gistkern.patch(model, tokenizer, num_gist_tokens=3)
    train(handle)
    tokenizer.chat_template = TURNS
    chat = gistkern.Chat(model, tokenizer, CONTEXT)
    for call in (
        lambda: gistkern.ask(model, tokenizer, CONTEXT, "w1 <gist_0> <gist_1> <gist_2> w2"),
        lambda: gistkern.ask(model, tokenizer, "w1 <gist_0> w2", "w1"),
        lambda: chat.say("w1 <gist_0> <gist_1> <gist_2> w2"),
    ):
        with pytest.raises(ValueError, match="holds gist tokens"):
            call()
    assert chat.messages == []


def test_a_conversation_goes_on_after_a_beam_search():
    model, tokenizer = trained()
    tokenizer.chat_template = TURNS
    chat = gistkern.Chat(model, tokenizer, CONTEXT)
    chat.say("w8", num_beams=3, max_new_tokens=5)
    other = gistkern.Chat(model, tokenizer, CONTEXT)
    other.messages = list(chat.messages)
    assert chat.say("w9", max_new_tokens=5) == other.say("w9", max_new_tokens=5)


def test_a_conversation_ends_with_its_weights():
    model, tokenizer = trained()
    tokenizer.chat_template = TURNS
    chat = gistkern.Chat(model, tokenizer, CONTEXT)
    chat.say("w8", max_new_tokens=5)
    train(model.gistkern_handle, 0.2)
    with pytest.raises(ValueError, match="others than when the context was compressed"):
        chat.say("w9")


def test_a_conversation_knows_its_own_cache():
    model, tokenizer = trained()
    tokenizer.chat_template = TURNS.replace("{{ m['role'] }}", "{{ 'w20' if m['role'] == 'user' else 'w21' }}")
    cache = gistkern.Chat(model, tokenizer, CONTEXT).cache
    gistkern.Chat(model, tokenizer, CONTEXT, cache=cache)
    for changed in ({"context": CONTEXT + " w1"}, {"role": "user"}, {"context": " "}, {"role": "assistant"}):
        with pytest.raises(ValueError, match=r"another context|context is empty|turn of one of"):
            gistkern.Chat(model, tokenizer, **{"context": CONTEXT, "cache": cache, **changed})


def test_whose_turn_a_context_begins_is_one_argument():
    model, tokenizer = trained(chat="system")
    tokenizer.chat_template = TURNS
    system = gistkern.ask(model, tokenizer, CONTEXT, "w8", chat="system")
    assert gistkern.ask(model, tokenizer, CONTEXT, "w8") == gistkern.ask(model, tokenizer, CONTEXT, "w8", chat=True)
    assert gistkern.ask(model, tokenizer, CONTEXT, "w8") == system
    assert gistkern.ask(model, tokenizer, CONTEXT, "w8", chat="user") != system
    with pytest.raises(ValueError, match='chat must be "user", "system"'):
        gistkern.ask(model, tokenizer, CONTEXT, "w8", chat="assistant")


@pytest.mark.parametrize(("context", "question"), [(["w1"], "w2"), (None, "w2"), (CONTEXT, [3]), (CONTEXT, [None])])
def test_what_is_no_text_is_refused(context, question):
    model, tokenizer = trained()
    with pytest.raises(TypeError, match="must be a text"):
        gistkern.ask(model, tokenizer, context, question)
