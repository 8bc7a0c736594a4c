"""The comparison with kvpress, without kvpress: a stand-in with its interface, on a tiny random Llama."""

import dataclasses
import json
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpress_baseline as baseline
from gistkern.cache.versions import CACHE
from passkey.niah import dataset, train_tokenizer

TOKENS = 150


@dataclasses.dataclass
class BasePress:
    """Calls `compress` after each layer's prefill and stores what it returns, as kvpress documents."""

    compression_ratio: float = 0.0

    @contextmanager
    def __call__(self, model):
        def after(module, inputs, kwargs, output):
            layer = kwargs[CACHE].layers[module.layer_idx]
            layer.keys, layer.values = self.compress(
                module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
            )

        handles = [layer.self_attn.register_forward_hook(after, with_kwargs=True) for layer in model.model.layers]
        yield
        for handle in handles:
            handle.remove()


class Last(BasePress):
    """Keeps the last rows."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        return keys[:, :, -kept:].clone(), values[:, :, -kept:].clone()


class First(Last):
    """Keeps the first rows."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        return keys[:, :, :kept].clone(), values[:, :, :kept].clone()


class Greedy(Last):
    """Keeps one row too many."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        keys, values = super().compress(module, hidden_states, keys, values, attentions, kwargs)
        return torch.cat([keys, keys[:, :, :1]], 2), torch.cat([values, values[:, :, :1]], 2)


@pytest.fixture(autouse=True)
def kvpress(monkeypatch):
    fake = types.ModuleType("kvpress")
    fake.BasePress, fake.StreamingLLMPress, fake.KnormPress = BasePress, Last, First
    monkeypatch.setitem(sys.modules, "kvpress", fake)
    monkeypatch.setattr("passkey.report.version", lambda name: f"{name}-0")
    return fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    # weights so large that answers depend on what is read and where it stood
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=2, initializer_range=0.4, **size)
    LlamaForCausalLM(config).save_pretrained(path)
    train_tokenizer().save(str(path / "tokenizer.json"))
    (path / "rows.yaml").write_text(f"- {{language: en, tokens: {TOKENS}, samples: 6}}")
    return path


@pytest.fixture
def reader(folder):
    return baseline.Reader(LlamaForCausalLM.from_pretrained(folder).eval(), train_tokenizer())


def run(folder, output, *more):
    common = ["--model", str(folder), "--rows", str(folder / "rows.yaml"), "--output", str(output)]
    baseline.main([*common, *more])
    return json.loads((output / "report.json").read_text())


def samples():
    """What that file asks."""
    return list(dataset(train_tokenizer(), "en", TOKENS, 6, seed=1, asked_by="cue"))


def greedy(model, tokenizer, text, tokens):
    """Recomputes the whole sequence for every token."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:].tolist())


def test_the_full_cache_answers_as_the_whole_text_does(reader, folder):
    said = set()
    for sample in samples():
        ((_, answer),) = reader.read(sample, [("full", TOKENS)])
        assert answer.said == greedy(reader.model, reader.tokenizer, sample.context + sample.question, 5)
        assert answer.row_bytes == 2 * 2 * 2 * 8 * 4  # k and v, layers, heads, dims, bytes
        said.add(answer.said)
    assert len(said) > 1


def test_budgets_do_not_touch_one_another(reader, folder):
    """Each answer from a prefill shared by all is that of a prefill of its own."""
    budgets = [("full", TOKENS), ("streaming_llm", 10), ("knorm", 10), ("streaming_llm", 60)]
    sample, *_ = samples()
    together = dict(reader.read(sample, budgets))
    alone = dict(given for one in budgets for given in reader.read(sample, [one]))
    assert together == alone
    assert set(together) == set(budgets)
    assert len({answer.said for answer in together.values()}) == 4, "nothing would show a mix-up"


def test_the_question_keeps_its_place_behind_the_whole_context(reader, folder):
    """The last 10 rows alone, at their own positions, by a mask over the whole sequence."""
    sample, *_ = samples()
    # with a single layer a row's key and value depend on its token alone
    reader.model.model.layers = reader.model.model.layers[:1]
    reader.model.config.num_hidden_layers = 1
    ((_, answer),) = reader.read(sample, [("streaming_llm", 10)])
    ids = reader.tokenizer.encode(sample.context + sample.question, add_special_tokens=False).ids
    said = []
    for _ in range(5):
        n = len(ids)
        sees = torch.ones(n, n, dtype=torch.bool).tril()
        sees[TOKENS:, : TOKENS - 10] = False
        with torch.no_grad():
            logits = reader.model(torch.tensor([ids]), attention_mask=sees[None, None], use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
        ids.append(said[-1])
    assert answer.said == reader.tokenizer.decode(said)


@pytest.mark.parametrize("tokens", [150, 200, 2990])
@pytest.mark.parametrize("rows", [8, 10, 30, 100])
def test_ratios_keep_exactly_the_rows(rows, tokens):
    press = baseline.make_press("knorm", rows, tokens)
    assert int(tokens * (1 - press.compression_ratio)) == rows


def test_a_method_that_keeps_too_much_is_refused(folder, tmp_path, kvpress, capsys):
    kvpress.KnormPress = Greedy
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--methods", "knorm")
    assert "did not keep 10 rows" in capsys.readouterr().err


def test_report_counts_the_answers_that_were_written(folder, tmp_path, capsys):
    options = ("--methods", "full", "streaming_llm", "--keep", "10", "50")
    report = run(folder, tmp_path, *options)
    assert report["command"].startswith("python examples/kvpress_baseline.py --model ")
    assert report["environment"]["versions"]["kvpress"] == "kvpress-0"
    assert [(row["method"], row["gist_tokens"], row["n"]) for row in report["rows"]] == [
        ("full", 150, 6),
        ("streaming_llm", 10, 6),
        ("streaming_llm", 50, 6),
    ]
    assert [row["ratio"] for row in report["rows"]] == [row["bytes_ratio"] for row in report["rows"]] == [1, 15, 3]
    # four of the six answers made right by hand: the next run counts them and asks nothing again
    path = tmp_path / "answers-streaming_llm-10.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries[:4]:
        entry["said"] = entry["answer"]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    row = run(folder, tmp_path, *options)["rows"][1]
    assert row["exact"] == pytest.approx(4 / 6)
    # Wilson's interval of 4 of 6, worked out from its formula with z = 1.96
    assert (row["wilson_low"], row["wilson_high"]) == pytest.approx((0.3000, 0.9032), abs=1e-4)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("streaming_llm, en 150 10 15x 6 66.7% 30.0% to 90.3%") for line in said)
    assert any(line.startswith("full, en 150 150 1x 6") for line in said)


def test_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    options = ("--methods", "streaming_llm", "knorm")
    whole = run(folder, tmp_path / "whole", *options)["rows"]
    ask, asked = baseline.Reader._ask, []

    def dies(self, cache, sample):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(sample.id)
        return ask(self, cache, sample)

    monkeypatch.setattr(baseline.Reader, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", *options)
    torn = tmp_path / "cut" / "answers-knorm-10.jsonl"
    with torn.open("a") as out:
        out.write('{"model": "')
    monkeypatch.setattr(baseline.Reader, "_ask", lambda *given: asked.append(given[2].id) or ask(*given))
    assert run(folder, tmp_path / "cut", *options)["rows"] == whole
    assert len(asked) == 12, "what was answered is not asked again"


def test_answers_of_another_version_are_not_mixed_in(folder, tmp_path, monkeypatch, capsys):
    run(folder, tmp_path, "--methods", "knorm", "--every", "3")
    monkeypatch.setattr("passkey.report.version", lambda name: f"{name}-1")
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--methods", "knorm", "--every", "3")
    assert "answers of another checkpoint" in capsys.readouterr().err


def test_every_other_question(folder, tmp_path):
    row, *_ = run(folder, tmp_path, "--methods", "knorm", "--every", "2")["rows"]
    answers = [json.loads(line) for line in (tmp_path / "answers-knorm-10.jsonl").read_text().splitlines()]
    assert [one["depth"] for one in answers] == [sample.depth for sample in samples()[::2]]
    assert row["n"] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--keep", "4"), "--keep: expected at least 8, got 4"),
        (("--keep", "10", "150"), "--keep 150: the contexts have 150 tokens"),
        (("--every", "0"), "--every: expected at least 1"),
        (("--methods", "nonsense"), "invalid choice: 'nonsense'"),
    ],
)
def test_argument_errors(folder, tmp_path, capsys, options, expected):
    with pytest.raises(SystemExit):
        run(folder, tmp_path, *options)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "knorm"])
def test_without_kvpress_the_error_names_it(folder, tmp_path, monkeypatch, capsys, method):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--methods", method)
    assert "error: import of kvpress halted" in capsys.readouterr().err
