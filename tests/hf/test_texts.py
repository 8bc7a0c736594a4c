"""Texts become ids by one rule: a context begins as the tokenizer begins a document, once, and ends as it stands."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gistkern.hf.texts import check_prefix, context_ids, context_prefix, text_ids

WORDS = {"<s>": 0, "<x>": 1, "</s>": 2, "?": 3, "a": 4, "b": 5}


def raw_tokenizer(template):
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, WORDS[word]) for word in ("<s>", "<x>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return raw


def tokenizer(template):
    return PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(template), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [raw_tokenizer, tokenizer])
@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "a b", [4, 5]),
        ("$A </s>", "a b", [4, 5]),
        ("<s> $A", "a b", [0, 4, 5]),
        ("<s> $A", "<s> a b", [0, 4, 5]),
        ("<s> $A </s>", "b", [0, 5]),
        ("<s> $A </s>", "zz", [0, 3]),
        ("<s> $A", "<s>", [0]),
        ("<s> $A", "", []),
        ("<s> <x> $A </s>", "a", [0, 1, 4]),
        ("<s> <x> $A </s>", "<s> a", [0, 1, 4]),
        ("<s> <x> $A </s>", "<s> <x> a </s>", [0, 1, 4, 2]),
        ("$A", "<s> a", [0, 4]),
    ],
)
def test_contexts_begin_as_documents_once_and_have_no_end(make, template, text, expected):
    assert context_ids(make(template), text) == expected
    if "<" not in text:
        assert text_ids(make(template), text) == [one for one in expected if one > 2]


def test_a_setting_changed_after_loading_counts():
    begins = tokenizer("$A")
    for adds, prefix in ((True, [0]), (False, []), (True, [0])):
        begins.add_bos_token = adds
        assert context_prefix(begins) == prefix
        assert context_ids(begins, "a") == [*prefix, 4]


class Bare:
    """Returns ids alone, and knows nothing of special tokens."""

    def __call__(self, text):
        return [0, *map(ord, text)]


class Keyed:
    """As slow tokenizers are called."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * add_special_tokens + list(map(ord, text)) + [9] * add_special_tokens}


def test_other_tokenizers():
    assert context_prefix(Bare()) is None, "it cannot be seen, and the callable is believed"
    assert context_ids(Bare(), "ab") == [0, 97, 98]
    assert context_prefix(Keyed()) == [7]
    assert context_ids(Keyed(), "ab") == [7, 97, 98]
    assert text_ids(Keyed(), "ab") == [97, 98]


def test_another_beginning_is_refused():
    check_prefix([0], tokenizer("<s> $A </s>"), "the model")
    check_prefix(None, tokenizer("<s> $A"), "a model of an earlier version")
    check_prefix([0], Bare(), "the model")
    with pytest.raises(ValueError, match=r"contexts of the model begin with \[0\] \('<s>'\), .* no special token"):
        check_prefix([0], tokenizer("$A </s>"), "the model")
    with pytest.raises(ValueError, match=r"begin with no special token, .* begins them with \[0\]"):
        check_prefix([], tokenizer("<s> $A"), "the model")


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        (Keyed(), "ab\ud800", "character 2 of the text is half a surrogate pair"),
        (Keyed(), None, "a text must be a string, got NoneType"),
        (lambda text: [[1, 2]], "a", "the tokenizer returned list where a list of ids"),
        (lambda text: {"ids": [1]}, "a", "the tokenizer returned NoneType"),
        (lambda text: [0.5], "a", "a list of ids was expected"),
        (3, "a", "int cannot be"),
    ],
)
def test_what_is_no_text_or_tokenizer(given, text, message):
    with pytest.raises(ValueError, match=message):
        context_ids(given, text)
