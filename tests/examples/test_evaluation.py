"""Evaluation: what readers read, that a kill loses nothing, that answers of different models never mix."""

import json
import shutil

import pytest
import torch
from conftest import smoke, tiny_llama, untrained_run

import eval_niah
import gistkern
from evaluation import answer_samples, swap_test
from passkey import global_tasks, measure
from passkey.niah import dataset, train_tokenizer
from passkey.readers import FullReader, GistReader
from passkey.trained import open_trained

SETTINGS = smoke()
SEGMENTS = vars(SETTINGS.segments)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def untrained(seed=0):
    model = tiny_llama(seed).eval()
    gistkern.patch_llama(model, **SETTINGS.gists)
    return model


@pytest.fixture(scope="module")
def model():
    return untrained()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with the checkpoint of an untrained model."""
    return untrained_run(tmp_path_factory.mktemp("run"), smoke(seed=3))


@pytest.fixture(scope="module")
def samples(tokenizer):
    return [*dataset(tokenizer, "en", 150, 5), *dataset(tokenizer, "ko", 100, 3, wordings="held_out")]


class Scripted:
    """A reader that says the right key to all but every third sample, and can be killed after some batches."""

    digest = "scripted"

    def __init__(self, batches=None):
        self.batches, self.asked = batches, []

    def read(self, samples):
        if self.batches is not None:
            if not self.batches:
                raise KeyboardInterrupt
            self.batches -= 1
        self.asked += [sample.id for sample in samples]
        return [(s.answer if int(s.id[-1]) % 3 else "I cannot say", 10, 1000, 100) for s in samples]


# ---- readers


def test_bytes_are_those_of_the_cache(tokenizer, model, samples):
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for reader in (GistReader(model, tokenizer, SEGMENTS), FullReader(untrained(), tokenizer)):
        for sample, answer in zip(samples, answer_samples(reader, samples), strict=True):
            rows = 10 if isinstance(reader, GistReader) else sample.tokens
            assert (answer.rows, answer.bytes) == (rows, rows * per_token)
            assert answer.full_bytes == sample.tokens * per_token


def test_batches_change_nothing(tokenizer, model, samples):
    reader = GistReader(model, tokenizer, SEGMENTS)
    one, five = (answer_samples(reader, samples, batch=batch) for batch in (1, 5))
    assert one == five
    assert [answer.id for answer in one] == [sample.id for sample in samples]
    assert len({answer.said for answer in one}) > 1


def test_the_full_reader_reads_the_context(tokenizer, samples):
    model = untrained()
    model.gistkern_handle.unpatch()
    (answer,) = answer_samples(FullReader(model, tokenizer, new_tokens=3), samples[:1])
    ids = torch.tensor([tokenizer.encode(samples[0].context + samples[0].question).ids])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert answer.said == tokenizer.decode(ids[0, -3:].tolist())


def test_an_answer_gets_the_tokens_of_its_own_task(tokenizer, model, samples):
    """A model that was not trained to stop is cut at the longest permitted answer, task by task."""
    asked = []

    def generate(ids, max_new_tokens, **kwargs):
        asked.append(max_new_tokens)
        return torch.cat([ids, ids.new_full((len(ids), max_new_tokens), 5)], 1)

    reader = GistReader(model, tokenizer, SEGMENTS)
    counting = list(global_tasks.dataset(tokenizer, "counting", "en", 400, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", generate)
        answer_samples(reader, [samples[0], *counting, samples[1]])
        answer_samples(GistReader(model, tokenizer, SEGMENTS, new_tokens=9), samples[:1])
    assert asked == [5, 1, 9]


class Keys:
    """The cache of a `Swapping` reader."""

    def __init__(self, keys):
        self.keys = keys

    def batch_select_indices(self, order):
        self.keys = [self.keys[index] for index in order.tolist()]


class Swapping:
    """A reader whose answers come from the cache, or from where the question came from."""

    def __init__(self, leaks):
        self.leaks = leaks

    def compress(self, samples):
        return Keys([sample.answer for sample in samples])

    def ask(self, cache, samples):
        return [f"{sample.answer if self.leaks else key}." for sample, key in zip(samples, cache.keys, strict=True)]


def test_the_swap_test_tells_a_leak(samples):
    found = swap_test(Swapping(leaks=False), samples)
    assert found == {"n": 8, "answers_of_the_swapped_cache": 1.0, "answers_of_the_own_context": 0.0}
    assert swap_test(Swapping(leaks=True), samples)["answers_of_the_own_context"] == 1.0


# ---- the stream of answers


def test_a_killed_evaluation_goes_on_where_it_was(samples, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    expected = answer_samples(Scripted(), samples, batch=2, stream=whole)
    with pytest.raises(KeyboardInterrupt):
        answer_samples(Scripted(batches=2), samples, batch=2, stream=killed)
    assert killed.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:4])
    with killed.open("a") as out:
        out.write('{"model": "scripted", "dig')
    reader = Scripted()
    assert answer_samples(reader, samples, batch=2, stream=killed) == expected
    assert len(reader.asked) == len(samples) - 4
    assert killed.read_bytes() == whole.read_bytes()
    again = Scripted()
    assert answer_samples(again, samples, stream=killed) == expected
    assert again.asked == []


def test_answers_of_different_models_never_mix(samples, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_samples(Scripted(), samples, stream=path)
    before = path.read_bytes()
    other = Scripted()
    other.digest = "other"
    with pytest.raises(ValueError, match="holds answers of another checkpoint"):
        answer_samples(other, samples, stream=path)
    with pytest.raises(ValueError, match="or other questions"):
        answer_samples(Scripted(), samples[1:], stream=path)
    assert path.read_bytes() == before, "a refusal leaves the file alone"
    answer_samples(other, samples, stream=path, overwrite=True)
    assert {json.loads(line)["model"] for line in path.read_text().splitlines()} == {"other"}


def test_a_reader_is_its_weights_and_its_way_of_reading(tokenizer, model):
    reader = GistReader(model, tokenizer, SEGMENTS)
    assert reader.digest == GistReader(untrained(), tokenizer, dict(SEGMENTS)).digest
    moved = untrained()
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    others = {
        GistReader(moved, tokenizer, SEGMENTS).digest,
        GistReader(model, tokenizer, {"segment_length": 56}).digest,
        GistReader(model, tokenizer, SEGMENTS, new_tokens=8).digest,
        FullReader(model, tokenizer).digest,
    }
    assert len(others | {reader.digest}) == 5


def test_a_damaged_file_is_refused_by_line(samples, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer_samples(Scripted(), samples, stream=path)
    lines = path.read_text().splitlines(True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 is no answer"):
        answer_samples(Scripted(), samples, stream=path)
    reader = Scripted()
    answer_samples(reader, samples, stream=path, overwrite=True)
    assert len(reader.asked) == len(samples)


def test_the_same_question_twice_is_refused(samples):
    with pytest.raises(ValueError, match="the same question twice"):
        answer_samples(Scripted(), [*samples, samples[2]])


# ---- eval_niah.py


@pytest.fixture
def data(tmp_path, tokenizer):
    paths = [tmp_path / "passkeys.jsonl", tmp_path / "majority.jsonl"]
    samples_of_each = [
        list(dataset(tokenizer, "en", 150, 4)),
        list(global_tasks.dataset(tokenizer, "majority", "ko", 400, 4)),
    ]
    for path, samples in zip(paths, samples_of_each, strict=True):
        path.write_text("".join(json.dumps(vars(sample)) + "\n" for sample in samples))
    return [str(path) for path in paths]


def evaluate(run, output, *arguments):
    eval_niah.main(["--checkpoint", str(run), "--output", str(output), *arguments])
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def no_peaks(monkeypatch):
    """Peaks need a fresh process, which the tests of training run."""
    monkeypatch.setattr("passkey.measure._peaks", lambda *_: {"gist": {}, "full": {}})


@pytest.mark.usefixtures("no_peaks")
def test_the_own_grid_beside_the_full_context(run, tmp_path):
    report = evaluate(run, tmp_path / "out", "--full", "2")
    assert [row["n"] for row in report["rows"]] == [4, 4]
    assert [(row["n"], row["tokens"], row["ratio"]) for row in report["full_context"]] == [(2, 120, 1), (2, 120, 1)]


@pytest.mark.parametrize("option", [["--limit", "2"], ["--measure"], ["--new-tokens", "9"], ["--batch", "2"]])
def test_options_of_datasets_are_not_ignored_without_one(option, run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(run, tmp_path / "out", *option)
    assert f"{option[0]} is for datasets" in capsys.readouterr().err


@pytest.mark.usefixtures("no_peaks")
def test_another_evaluation_of_the_own_grid_is_not_replaced_unasked(run, data, tmp_path, capsys):
    output = tmp_path / "out"
    evaluate(run, output, "--dataset", *data, "--limit", "3")
    with pytest.raises(SystemExit, match="2"):
        evaluate(run, output)
    assert "other questions" in capsys.readouterr().err
    evaluate(run, output, "--overwrite")
    assert len((output / "answers.jsonl").read_text().splitlines()) == 8


def test_any_checkpoint_on_any_datasets(run, data, tmp_path, capsys):
    output = tmp_path / "out"
    report = evaluate(run, output, "--dataset", *data, "--limit", "3", "--full")
    assert [(row["task"], row["language"], row["tokens"], row["n"]) for row in report["rows"]] == [
        ("passkey", "en", 150, 3),
        ("majority", "ko", 400, 3),
    ]
    assert [row["chance"] for row in report["rows"]] == pytest.approx([1e-5, 0.25])
    assert [row["ratio"] for row in report["rows"]] == [15, 40]
    assert [row["ratio"] for row in report["full_context"]] == [1, 1]
    assert report["swap"]["n"] == 3
    assert (report["preset"], report["seed"], report["checkpoint"]) == ("smoke", 3, "checkpoint-1")
    assert report["model"]["parameters"] > 200_000
    assert len((output / "answers.jsonl").read_text().splitlines()) == 6
    assert {path.name for path in output.iterdir()} == {
        "answers.jsonl",
        "answers-full.jsonl",
        "report.json",
        "heatmap.png",
    }
    assert "ko, majority" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # more questions than the answers in the folder are about are fine, fewer are not
        evaluate(run, output, "--dataset", data[0])
    assert "or other questions" in capsys.readouterr().err


def test_time_and_memory_on_request(run, data, tmp_path, monkeypatch):
    """Peaks too: each side in a process of its own."""
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(measure, "NEW_TOKENS", 3)
    both = evaluate(run, tmp_path / "out", "--dataset", data[0], "--measure")["side_by_side"]
    assert (both["tokens"], both["runs"], both["new_tokens"]) == (150, 1, 3)
    for side in (both["gist"], both["full"]):
        assert side["time_to_first_token_s"] > 0
        assert side["decode_tokens_per_s"] > 0
        assert side["prefill_peak_bytes"] >= 0
        assert side["decode_peak_bytes"] >= 0


def test_evaluating_while_training_deletes_checkpoints(run, tmp_path, monkeypatch):
    training = tmp_path / "training"
    shutil.copytree(run, training)
    copytree = shutil.copytree
    newer = training / "checkpoint-2"

    def copy_while_training(source, target, **kwargs):
        if source != newer:
            copytree(source, newer)
            shutil.rmtree(source)
        return copytree(source, target, **kwargs)

    monkeypatch.setattr("shutil.copytree", copy_while_training)
    (tmp_path / "copy").mkdir()
    snapshot = eval_niah._snapshot(training, tmp_path / "copy")
    shutil.rmtree(training)
    assert snapshot.name == "checkpoint-2"
    assert not list(snapshot.glob("optimizer*"))
    open_trained(snapshot)


def test_what_is_timed_is_what_generate_says(run, samples, monkeypatch):
    """With as many tokens as asked for, from the gist rows and from the whole context."""
    monkeypatch.setattr(measure, "NEW_TOKENS", 6)
    said = []
    put = measure._Watch.put
    monkeypatch.setattr(measure._Watch, "put", lambda self, value: (said.append(value.tolist()), put(self, value))[1])
    trained, plain = open_trained(run), open_trained(run)
    plain.handle.unpatch()
    context, question = (trained.tokenizer(t)["input_ids"] for t in (samples[0].context, samples[0].question))
    for side, opened in (("gist", trained), ("full", plain)):
        said.clear()
        found = measure.answered(opened, side, context, question)
        assert set(found) == {"time_to_first_token_s", "decode_tokens_per_s", "prefill_peak_bytes", "decode_peak_bytes"}
        (prompt,), *tokens = said
        past = {}
        if side == "gist":
            assert prompt == question
            past["past_key_values"] = gistkern.compress(opened.model, context, **SEGMENTS)
        else:
            assert prompt == context + question
        out = opened.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, **past)
        assert [token for (token,) in tokens] == out[0, -6:].tolist()
