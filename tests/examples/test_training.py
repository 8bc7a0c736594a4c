"""The training example: what it writes, that a kill loses nothing, and what it refuses."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import command, run
from safetensors.torch import load_file

import eval_niah
import gistkern
import niah
import train_niah
from checkpoints import latest
from evaluation import evaluate_run
from models import tiny_llama
from opened import open_preset
from passkey.niah import train_tokenizer
from presets import preset
from task import answer_logits, haystacks, make_batch

pytestmark = pytest.mark.xdist_group("training")


def test_it_writes_log_checkpoint_and_report(finished):
    folder, done = finished
    steps = sum(stage.steps for stage in preset("smoke").stages)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(steps))
    assert latest(folder).name == f"checkpoint-{steps:06d}"
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    report = json.loads((folder / "report.json").read_text())
    for row, (language, tokens, count) in zip(report["rows"], preset("smoke").evaluate, strict=True):
        assert (row["language"], row["tokens"], row["n"]) == (language, tokens, count)
        assert row["gist_tokens"] == 10
        assert row["ratio"] == tokens / 10
        assert row["bytes_ratio"] == pytest.approx(row["ratio"])
        assert row["wilson_low"] <= row["exact"] <= row["wilson_high"]
    assert report["swap"]["n"] == 20
    assert report["side_by_side"]["gist"]["decode_tokens_per_s"] > 0
    assert (folder / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
    assert "95 % interval" in (folder / "report.md").read_text()
    assert "digit 0." in done.stderr, "the progress bar shows the digit accuracy"


def weights(folder):
    return load_file(latest(folder) / "model.safetensors")


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    """kill -9 in the middle, --resume, and the weights and the log equal those of the run nobody killed."""
    whole, _ = finished
    folder = tmp_path / "killed"
    process = subprocess.Popen(command("--run", folder), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (latest(folder) and (folder / "log.jsonl").read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "torn')
    done = run("--run", folder, "--resume")
    assert done.returncode == 0, done.stderr
    expected, resumed = weights(whole), weights(folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    def losses(path):
        return [
            (entry["step"], entry["loss"]) for entry in map(json.loads, (path / "log.jsonl").read_text().splitlines())
        ]

    assert losses(folder) == losses(whole)


def test_evaluating_a_dataset(finished, tmp_path, capsys):
    folder, _ = finished
    data = tmp_path / "data.jsonl"
    niah.main(["--tokens", "150", "--samples", "5", "--out", str(data)])
    eval_niah.main(
        ["--checkpoint", str(folder), "--dataset", str(data), "--output", str(tmp_path / "out"), "--limit", "3"]
    )
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["n"] == 3
    assert row["exact"] == sum(answer["exact"] for answer in answers) / 3
    assert "| en | 150 | 10 | 15x |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "nothing to resume"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--dry-run"], "are for recipes (llama3-8b, llama3-8b-poc)"),
        (["--preset", "llama3-8b", "--leak"], "it has no --leak"),
        (["--preset", "llama3-8b", "--seed", "1"], "its file sets seed"),
        (["--preset", "llama3-8b", "--fsdp"], "accelerate's settings how it is shared"),
        (["--accumulate", "0"], "--accumulate counts micro-batches, at least 1, got 0"),
        (["--fsdp"], "there is one: start several (torchrun)"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_niah.main(["--preset", "smoke", "--run", str(tmp_path / "none"), *arguments])
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(finished, tmp_path):
    before = weights(finished[0])
    with pytest.raises(ValueError, match="is in use: pass --resume to go on, --overwrite to start again"):
        train_niah.train(preset("smoke"), 0, finished[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(finished[0]).items())
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    train_niah.train(preset("smoke"), 0, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_resuming_another_seed_is_refused(finished):
    with pytest.raises(ValueError, match="is of preset 'smoke', seed 0: pass the same"):
        train_niah.train(preset("smoke"), 5, finished[0], resume=True)


@pytest.mark.parametrize(("text", "message"), [('{"id": "x"}\n', "line 1 is no sample"), ("", "holds no samples")])
def test_a_dataset_that_is_none_is_refused(finished, tmp_path, capsys, text, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        eval_niah.main(["--checkpoint", str(finished[0]), "--dataset", str(bad), "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        eval_niah.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path)])
    assert "holds no checkpoint" in capsys.readouterr().err


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'huge': expected one of tiny, smoke"):
        preset("huge")


def test_leak_lets_the_answer_see_the_context():
    """Masked, the answer's logits do not depend on the raw context once the gist rows are fixed; leaking, they do."""
    settings = preset("smoke")
    model = tiny_llama(0)
    handle = gistkern.patch_llama(
        model, num_gist_tokens=2, num_segment_gist_tokens=2, positions="gist_first", sink_tokens=0
    )
    drawn = haystacks(settings, train_tokenizer(), False, "0")
    batch = make_batch(drawn, handle, settings.stages[0], settings, random.Random(0))
    with torch.no_grad():
        handle.inner.gist_embeddings.weight.zero_()  # gist rows that can carry nothing in the first layer
        model.config.num_hidden_layers = 1
        masked, leaked = (answer_logits(model, batch, leak) for leak in (False, True))
        changed = batch.input_ids.clone()
        changed[:, 5:20] = 7
        other = dataclasses.replace(batch, input_ids=changed)
        assert torch.equal(answer_logits(model, other), masked)
        assert not torch.equal(answer_logits(model, other, True), leaked)


def test_leak_preset_trains_and_reports_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.side_by_side", lambda *_: None)
    monkeypatch.setattr("report._side_by_side", lambda _: [])
    settings = preset("smoke", leak=True)
    checkpoint = train_niah.train(settings, 0, tmp_path / settings.name)
    assert checkpoint.name == "checkpoint-000008"  # twice the first stage
    report = evaluate_run(open_preset(checkpoint), tmp_path)
    assert [row["language"] for row in report["context_visible"]] == ["en", "ko"]
    assert "With the context still in sight (ko, n=50)" in (tmp_path / "report.md").read_text()
