"""Evaluation: what readers read, that a kill loses nothing, that answers of different models never mix."""

import json
import shutil

import pytest
import torch
from conftest import smoke, tiny_llama, untrained_run

import eval_niah
import gistkern
from evaluation import answer_samples, swap_test
from passkey.metrics import Answer
from passkey.niah import dataset, train_tokenizer
from passkey.readers import Reader

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


def answered(reader, samples, **how):
    """The answers to both datasets of `samples`."""
    datasets = [[one for one in samples if one.language == language] for language in ("en", "ko")]
    return answer_samples(reader, datasets, **how)


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
        return [Answer(s, s.answer if int(s.id[-1]) % 3 else "I cannot say", 10, 100) for s in samples]


# ---- readers


def test_bytes_are_those_of_the_cache(tokenizer, model, samples):
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for reader in (Reader(model, tokenizer, SEGMENTS), Reader(untrained(), tokenizer, full=True)):
        for sample, answer in zip(samples, answered(reader, samples), strict=True):
            assert (answer.rows, answer.row_bytes) == (sample.tokens if reader.full else 10, per_token)


def test_batches_change_nothing(tokenizer, model, samples):
    reader = Reader(model, tokenizer, SEGMENTS)
    one, five = (answered(reader, samples, batch=batch) for batch in (1, 5))
    assert one == five
    assert [answer.sample.id for answer in one] == [sample.id for sample in samples]
    assert len({answer.said for answer in one}) > 1


def test_the_full_reader_reads_the_context(tokenizer, samples):
    model = untrained()
    model.gistkern_handle.unpatch()
    (answer,) = answered(Reader(model, tokenizer, new_tokens=3, full=True), samples[:1])
    ids = torch.tensor([tokenizer.encode(samples[0].context + samples[0].question).ids])
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert answer.said == tokenizer.decode(ids[0, -3:].tolist())


def test_an_answer_gets_the_tokens_of_a_right_one(tokenizer, model, samples):
    """A model that was not trained to stop is cut where the answer would end."""
    asked = []

    def generate(ids, max_new_tokens, **kwargs):
        asked.append(max_new_tokens)
        return torch.cat([ids, ids.new_full((len(ids), max_new_tokens), 5)], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", generate)
        answered(Reader(model, tokenizer, SEGMENTS), samples)
        answered(Reader(model, tokenizer, SEGMENTS, new_tokens=9), samples[:1])
    assert asked == [5, 5, 5, 9], "batches of one length"


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
    expected = answered(Scripted(), samples, batch=2, stream=whole)
    with pytest.raises(KeyboardInterrupt):
        answered(Scripted(batches=2), samples, batch=2, stream=killed)
    assert killed.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:4])
    with killed.open("a") as out:
        out.write('{"model": "scripted", "dig')
    reader = Scripted()
    assert answered(reader, samples, batch=2, stream=killed) == expected
    assert len(reader.asked) == len(samples) - 4
    assert killed.read_bytes() == whole.read_bytes()
    again = Scripted()
    assert answered(again, samples, stream=killed) == expected
    assert again.asked == []


def test_answers_of_different_models_never_mix(samples, tmp_path):
    path = tmp_path / "answers.jsonl"
    answered(Scripted(), samples, stream=path)
    before = path.read_bytes()
    other = Scripted()
    other.digest = "other"
    with pytest.raises(ValueError, match="holds answers of another checkpoint"):
        answered(other, samples, stream=path)
    with pytest.raises(ValueError, match="or other questions"):
        answered(Scripted(), samples[1:], stream=path)
    assert path.read_bytes() == before, "a refusal leaves the file alone"
    answered(other, samples, stream=path, overwrite=True)
    assert {json.loads(line)["model"] for line in path.read_text().splitlines()} == {"other"}


def test_a_reader_is_its_weights_and_its_way_of_reading(tokenizer, model):
    reader = Reader(model, tokenizer, SEGMENTS)
    assert reader.digest == Reader(untrained(), tokenizer, dict(SEGMENTS)).digest
    moved = untrained()
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    others = {
        Reader(moved, tokenizer, SEGMENTS).digest,
        Reader(model, tokenizer, {"segment_length": 56}).digest,
        Reader(model, tokenizer, SEGMENTS, new_tokens=8).digest,
        Reader(model, tokenizer, full=True).digest,
    }
    assert len(others | {reader.digest}) == 5


def test_a_damaged_file_is_refused_by_line(samples, tmp_path):
    path = tmp_path / "answers.jsonl"
    answered(Scripted(), samples, stream=path)
    lines = path.read_text().splitlines(True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2 is no answer"):
        answered(Scripted(), samples, stream=path)
    reader = Scripted()
    answered(reader, samples, stream=path, overwrite=True)
    assert len(reader.asked) == len(samples)


def test_the_same_question_twice_is_refused(samples):
    with pytest.raises(ValueError, match="the same question twice"):
        answered(Scripted(), [*samples, samples[2]])


# ---- eval_niah.py


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("- {language: en, tokens: 150, samples: 3}\n- {language: ko, tokens: 400, samples: 2, keys: 2}\n")
    return str(path)


def evaluate(run, output, *arguments):
    eval_niah.main(["--checkpoint", str(run), "--output", str(output), *arguments])
    return json.loads((output / "report.json").read_text())


def test_the_own_grid_beside_the_full_context(run, tmp_path):
    report = evaluate(run, tmp_path / "out", "--full", "2")
    assert [row["n"] for row in report["rows"]] == [4, 4]
    assert [(row["n"], row["tokens"], row["ratio"]) for row in report["full_context"]] == [(2, 120, 1), (2, 120, 1)]


def test_another_evaluation_is_not_replaced_unasked(run, rows, tmp_path, capsys):
    output = tmp_path / "out"
    evaluate(run, output, "--rows", rows)
    for other in ([], ["--rows", rows, "--seed", "2"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate(run, output, *other)
        assert "other questions" in capsys.readouterr().err
    evaluate(run, output, "--overwrite")
    assert len((output / "answers.jsonl").read_text().splitlines()) == 8


def test_any_checkpoint_on_any_rows(run, rows, tmp_path, capsys):
    output = tmp_path / "out"
    report = evaluate(run, output, "--rows", rows, "--full", "9", "--new-tokens", "7")
    assert [(row["language"], row["tokens"], row["keys"], row["n"]) for row in report["rows"]] == [
        ("en", 150, 1, 3),
        ("ko", 400, 2, 2),
    ]
    assert [row["ratio"] for row in report["rows"]] == [15, 40]
    assert [row["ratio"] for row in report["full_context"]] == [1, 1]
    assert (report["swap"]["n"], report["evaluation_seed"]) == (20, 1)
    assert (report["preset"], report["seed"], report["checkpoint"]) == ("smoke", 3, "checkpoint-1")
    assert report["model"]["parameters"] > 200_000
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [row["exact"] for row in report["rows"]] == [
        sum(one["exact"] for one in answers if one["tokens"] == tokens) / n for tokens, n in ((150, 3), (400, 2))
    ]
    names = {"answers.jsonl", "answers-full.jsonl", "report.json"}
    assert {path.name for path in output.iterdir()} == names
    said = " ".join(capsys.readouterr().out.split())
    assert "en 150 10 15x 3" in said
    assert "ko, 2 keys 400 10 40x 2" in said


def test_an_evaluation_outlives_its_checkpoint(run, rows, tmp_path, monkeypatch):
    """Training deletes old checkpoints while they are evaluated, with the whole context in sight too."""
    training, read = tmp_path / "training", Reader.read
    shutil.copytree(run, training)

    def read_while_training(reader, samples):
        shutil.rmtree(training, ignore_errors=True)
        return read(reader, samples)

    monkeypatch.setattr(Reader, "read", read_while_training)
    report = evaluate(training, tmp_path / "out", "--rows", rows, "--full", "1")
    assert report["checkpoint"] == "checkpoint-1"
    assert [row["n"] for row in report["rows"] + report["full_context"]] == [3, 2, 1, 1]
