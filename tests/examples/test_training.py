"""The training example: what it writes, that a kill loses nothing, and what it refuses."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import SMOKE, command, entries, run, smoke, tiny_llama
from safetensors.torch import load_file

import eval_niah
import gistkern
import train_niah
from evaluation import evaluate_run
from gistkern.training import Share
from passkey.data import PasskeyData
from passkey.models import fast_tokenizer
from passkey.settings import Data, read_settings
from passkey.trained import newest_whole, open_trained
from passkey.training import train

pytestmark = pytest.mark.xdist_group("training")
LEAK = SMOKE.with_name("smoke-leak.yaml")


def test_it_writes_log_checkpoint_and_report(finished):
    folder, done = finished
    settings = smoke()
    steps = sum(stage.steps for stage in settings.curriculum.stages)
    assert [entry["step"] for entry in entries(folder)] == list(range(1, steps + 1))
    assert newest_whole(folder).name == f"checkpoint-{steps}"
    assert len(list(folder.glob("checkpoint-*"))) == 2, "the newest two"
    report = json.loads((folder / "report.json").read_text())
    for row, asked in zip(report["rows"], settings.evaluation, strict=True):
        assert (row["language"], row["tokens"], row["n"]) == (asked.language, asked.tokens, asked.samples)
        assert row["gist_tokens"] == 10
        assert row["ratio"] == asked.tokens / 10
        assert row["bytes_ratio"] == pytest.approx(row["ratio"])
        assert row["wilson_low"] <= row["exact"] <= row["wilson_high"]
    assert report["training"]["steps"] == steps
    assert report["training"]["tokens"] == entries(folder)[-1]["num_input_tokens_seen"] > 1000
    assert report["training"]["cpu_seconds"] >= 0
    assert report["swap"]["n"] == 20
    assert "95 % interval" in done.stdout
    assert f"curves: {folder / 'curves.png'}" in done.stdout
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "token_accuracy 0." in done.stderr, "the progress bar shows what the gates are about"


def test_rates_follow_warm_up_and_the_last_stage(finished):
    """Of the first group, whose factor is 2; a batch of 2 contexts has a quarter of the rate of 32."""
    rates = [entry["learning_rate"] for entry in entries(finished[0])]
    whole = 2 * 4e-3 / 4
    assert rates[:4] == pytest.approx([whole / 2, whole, whole, whole])
    assert rates[4:] == pytest.approx([whole, whole * 0.75, whole * 0.5, whole * 0.25])


def weights(folder):
    return load_file(newest_whole(folder) / "model.safetensors")


def losses(path):
    names = ("step", "loss", "learning_rate", "running_accuracy", "num_input_tokens_seen")
    return [[entry[name] for name in names] for entry in entries(path)]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    """kill -9 in the middle, --resume, and the weights and the log equal those of the run nobody killed."""
    whole, _ = finished
    folder = tmp_path / "killed"
    process = subprocess.Popen(command("--run", folder), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (newest_whole(folder) and (folder / "log.jsonl").read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "torn')
    torn = folder / "checkpoint-99"  # as a kill leaves one that was being written
    torn.mkdir()
    (torn / "model.safetensors").write_text("torn")
    done = run("--run", folder, "--resume")
    assert done.returncode == 0, done.stderr
    expected, resumed = weights(whole), weights(folder)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "nothing to resume"),
        (
            ["--preset", "huge"],
            "unknown preset 'huge': expected one of compare, compare-keys, llama3-8b",
        ),
        (["--preset", "none.yaml"], "unknown preset 'none'"),
        (["--preset", "tiny", "--dry-run"], "--dry-run is for pretrained models, tiny starts from random weights"),
        (["--preset", "tiny", "--model", "x"], "--model and --tokenizer are for pretrained models"),
        (["--preset", "llama3-8b", "--leak"], "unknown preset 'llama3-8b-leak': --leak is the tiny model's experiment"),
        (["--preset", "llama3-8b", "--dry-run", "--model", "x"], "a dry run makes its own model"),
        (["--accumulate", "0"], "--accumulate: expected at least 1, got 0"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_niah.main(["--preset", str(SMOKE), "--run", str(tmp_path / "none"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_earlier_run_is_not_overwritten(finished, tmp_path):
    before = weights(finished[0])
    with pytest.raises(ValueError, match="is in use: pass --resume to go on, --overwrite to start again"):
        train(smoke(), finished[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(finished[0]).items())
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert train(smoke(), tmp_path, overwrite=True).name == "checkpoint-8"
    assert (tmp_path / "thesis.txt").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items()), "micro-seconds apart"


def test_resuming_another_seed_is_refused(finished):
    with pytest.raises(ValueError, match="is a run of other settings or another seed"):
        train(smoke(seed=5), finished[0], resume=True)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        eval_niah.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path)])
    assert "holds no checkpoint" in capsys.readouterr().err


def test_leak_lets_the_answer_see_the_context():
    """Masked, the answer's logits do not depend on the raw context once the gist rows are fixed; leaking, they do."""
    settings = read_settings(LEAK)
    model, tokenizer = tiny_llama(), fast_tokenizer()
    handle = gistkern.patch_llama(
        model, num_gist_tokens=2, num_segment_gist_tokens=2, positions="gist_first", sink_tokens=0
    )
    batches = [
        PasskeyData(smoke(data=data), settings.curriculum.made(), handle, tokenizer).batch(
            settings.curriculum.stages[0], random.Random(0), Share()
        )
        for data in (Data(), Data(leak=True))
    ]
    with torch.no_grad():
        handle.inner.gist_embeddings.weight.zero_()  # gist rows that can carry nothing in the first layer
        model.config.num_hidden_layers = 1
        changed = batches[0]["input_ids"].clone()
        changed[:, 5:20] = 7
        for batch, sees in zip(batches, (False, True), strict=True):
            layout, ids = batch["gist_layout"], batch["input_ids"]
            before, after = (model(one, gist_layout=layout, logits_to_keep=6).logits for one in (ids, changed))
            assert torch.equal(before, after) != sees


def test_leak_preset_trains_and_reports_both_sides(tmp_path, monkeypatch):
    checkpoint = train(read_settings(LEAK), tmp_path / "run")
    assert checkpoint.name == "checkpoint-8"
    report = evaluate_run(open_trained(checkpoint), tmp_path)
    assert [row["language"] for row in report["context_visible"]] == ["en", "ko"]
    assert [row["n"] for row in report["context_visible"]] == [50, 50]
