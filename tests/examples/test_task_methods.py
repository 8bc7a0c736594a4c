"""Ways to read, on a tiny model of random weights: rows as budgeted, greedy as `generate`, caches left alone."""

import contextlib
import sys
import types

import pytest
import torch
from conftest import smoke, tiny_llama, untrained_run

from gistkern import patch_llama
from passkey.models import fast_tokenizer
from tasks.engine import Engine, first_line
from tasks.item import Item
from tasks.methods import PLAIN, Gists, best_sentences, budget
from tasks.presses import Pressed, make_press

CONTEXT = "The river rose. Ticket 13579 belongs to Mira. The bell is old. Rain fell on the town, and it was cold."
ITEM = Item("0", CONTEXT, "Who has ticket 13579?", " Who has it?", ("Mira",), ("f1",), 6)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama().eval(), fast_tokenizer())


@pytest.mark.parametrize("name", PLAIN)
def test_rows_bytes_and_ratios(engine, name):
    tokens = len(engine.ids(CONTEXT))
    for ratio in (1, 3, 7.5, 1000):
        (answer,) = PLAIN[name](engine, [ITEM], ratio)
        rows = {"full": tokens, "none": 0}.get(name, max(1, int(tokens / ratio)))
        assert (answer.tokens, answer.rows) == (tokens, rows)
        cache = engine.read(list(range(5, 5 + rows)))
        assert answer.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert answer.seconds >= 0


def test_the_whole_context_is_read_as_generate_reads_it(engine):
    ids = torch.tensor([engine.ids(CONTEXT) + engine.ids(ITEM.tail)])
    out = engine.model.generate(ids, max_new_tokens=ITEM.new_tokens, do_sample=False)
    expected = first_line(engine.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    (full,), (beginning,), (found,) = (PLAIN[name](engine, [ITEM], 1) for name in ("full", "truncated", "bm25"))
    assert full.said == beginning.said == expected
    assert len(expected) > 0
    (none,) = PLAIN["none"](engine, [ITEM], 1)
    assert none.said != full.said
    assert found.rows == full.rows


def test_questions_about_one_context_do_not_see_each_other(engine):
    other = Item("1", CONTEXT, "What is old?", " What is old? It is", ("bell",), ("f1",), 6)
    alone = [PLAIN["full"](engine, [one], 1)[0].said for one in (ITEM, other)]
    assert [one.said for one in PLAIN["full"](engine, [ITEM, other], 1)] == alone
    assert [one.said for one in PLAIN["full"](engine, [other, ITEM], 1)] == alone[::-1]


def test_bm25_takes_the_best_sentence_first_and_fills_up(engine):
    best = engine.ids("Ticket 13579 belongs to Mira.")
    assert best_sentences(engine, ITEM, len(best)) == best
    assert best_sentences(engine, ITEM, 3) == best[:3]
    text = engine.tokenizer.decode(best_sentences(engine, ITEM, len(best) + 20))
    assert text.index("Ticket 13579") > text.index("The river")  # in the text's order


def test_an_answer_ends_at_its_line():
    assert first_line(" Mira \nQuestion: more") == "Mira"
    assert first_line("\n\n") == first_line("") == ""


@pytest.fixture(scope="module")
def gists(tmp_path_factory):
    folder, model, tokenizer = tmp_path_factory.mktemp("gists"), tiny_llama(), fast_tokenizer()
    with patch_llama(model, tokenizer, num_gist_tokens=3):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Gists(str(folder), None)


def test_a_checkpoint_without_a_ratio_is_refused(tmp_path):
    folder = untrained_run(tmp_path, smoke()) / "checkpoint-1"
    with pytest.raises(ValueError, match="writes as many rows whatever the length"):
        Gists(str(folder), None)


def test_gist_rows_stay_in_the_budget(gists):
    count = len(gists.handle.gist_token_ids)
    for context in (CONTEXT, CONTEXT * 5):
        item = Item("0", context, "", " Who has it?", ("Mira",), ("f1",), 4)
        for ratio in (1.5, 4, 9):
            (answer,) = gists.read([item], ratio)
            least = count + gists.handle.sink_tokens
            assert answer.rows <= max(least, budget(answer.tokens, ratio))
            assert answer.rows > max(least, budget(answer.tokens, ratio)) / 3
            assert answer.nbytes % answer.rows == 0
            assert answer.said == gists.read([item], ratio)[0].said


class Press:
    """Stands for kvpress' classes: keeps as many of the first rows as their arithmetic says."""

    def __init__(self, ratio, window_size=None):
        self.ratio, self.window_size = ratio, window_size

    @contextlib.contextmanager
    def __call__(self, model):
        def cut(module, args, kwargs, output):
            for layer in kwargs["past_key_values"].layers:
                kept = int(layer.keys.shape[2] * (1 - self.ratio))
                layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]

        handle = model.model.register_forward_hook(cut, with_kwargs=True)
        yield
        handle.remove()
        if hasattr(self, "hidden"):
            assert (self.prefix_length, self._suffix_ids.shape[0]) == (0, 1)
            for block in model.model.layers:
                block.self_attn.masked_key_indices = (torch.zeros(self.hidden),) * 3


class Hiding(Press):
    """As KVzip: drops nothing, hides three rows of all heads together."""

    hidden = 3

    def __init__(self, ratio):
        super().__init__(0.0)


@pytest.fixture
def kvpress(monkeypatch):
    made = types.ModuleType("kvpress")
    for name in ("CompactorPress", "ExpectedAttentionPress", "SnapKVPress"):
        setattr(made, name, Press)
    made.KVzipPress, made.AdaKVPress = Hiding, lambda press: ("ada", press)
    monkeypatch.setitem(sys.modules, "kvpress", made)
    return made


def test_presses_keep_the_budget(kvpress):
    for tokens in (8, 100, 1013):
        for rows in (1, 2, tokens // 4, tokens - 1):
            press = make_press("snapkv", rows, tokens)
            assert int(tokens * (1 - press.ratio)) == rows
            assert 1 <= press.window_size <= max(1, rows / 2)
            assert make_press("adakv", rows, tokens)[1].ratio == press.ratio
            assert make_press("compactor", rows, tokens).ratio == press.ratio


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_pressed_cache_is_asked_from_behind_the_context(kvpress, engine):
    tokens = len(engine.ids(CONTEXT))
    (answer,) = Pressed(engine, "snapkv").read([ITEM], 4)
    assert (answer.tokens, answer.rows) == (tokens, tokens // 4)
    assert answer.nbytes == answer.rows * engine.row_bytes
    cache = engine.read(engine.ids(CONTEXT)[: tokens // 4])
    assert answer.said == engine.answer(cache, tokens, ITEM)
    (hidden,) = Pressed(engine, "kvzip").read([ITEM], 4)
    for block in engine.model.model.layers:
        del block.self_attn.masked_key_indices
    assert hidden.rows == tokens - 3 / engine.model.config.num_key_value_heads


def test_without_kvpress_its_methods_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match="kvzip is kvpress', which has an environment of its own"):
        make_press("kvzip", 4, 100)
