"""train_niah.py under torchrun: the losses of one process; a killed process loses nothing, and one goes on alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import command, entries, smoke, tiny_llama
from launching import launch
from safetensors.torch import load_file

import gistkern
from gistkern.training import Share
from passkey.data import PasskeyData
from passkey.models import fast_tokenizer
from passkey.trained import newest_whole, open_trained
from passkey.training import train

pytestmark = [pytest.mark.xdist_group("training"), pytest.mark.timeout(600)]


def same_run(folder, other, optimizer=True):
    """Losses, accuracies, rates, and the optimizer's states, whose gradients no normalization hides."""
    for one, expected in zip(entries(folder), entries(other), strict=True):
        for name in ("step", "loss", "token_accuracy", "exact", "running_accuracy", "learning_rate", "stage"):
            assert one[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), (one["step"], name)
    found, expected = (load_file(newest_whole(run) / "model.safetensors") for run in (folder, other))
    assert found.keys() - {"lm_head.weight"} == expected.keys(), "tied, and written twice of a sharded model"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    if not optimizer:
        return
    found, expected = (
        torch.load(newest_whole(run) / "optimizer.pt", weights_only=True)["state"] for run in (folder, other)
    )
    assert found.keys() == expected.keys()
    for key, state in expected.items():
        for name, value in state.items():
            scale = float(value.float().abs().max())
            torch.testing.assert_close(found[key][name], value, rtol=1e-3, atol=2e-3 * scale, msg=f"{key} {name}")


def ranks_of(parent):
    """Process ids of torchrun's workers."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return sorted(map(int, children.split()))


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_one_goes_on(finished, tmp_path):
    """Two processes train in micro-batches until one is killed, one goes on, and the log is that of one from the start.

    The smoke preset's batches are of two contexts: in half of the four shares there is none. accelerate launches them,
    whose launcher calls torchrun's, as others here do (`launch`).
    """
    alone, _ = finished
    folder = tmp_path / "run"
    # "--cpu" would start one process; without a GPU these are two on the CPU
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    python, *rest = command("--run", folder, "--accumulate", 2)
    process = subprocess.Popen(
        [python, *launcher, *rest],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not newest_whole(folder):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        assert "rng_state_1.pth" in {path.name for path in newest_whole(folder).iterdir()}, "there were two"
        workers = ranks_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        _, said = process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said, "the launcher says which process died, and of what"
    again = subprocess.run(command("--run", folder, "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    same_run(folder, alone)
    assert (folder / "report.json").exists()


@pytest.mark.slow
def test_a_sharded_model_trains_the_same_and_resumes(finished, tmp_path):
    """FSDP2, with Muon on shards; checkpoints hold whole tensors."""
    folder = tmp_path / "run"
    worker = Path(__file__).with_name("fsdp_worker.py")
    launch(worker, 2, folder)
    before = (folder / "log.jsonl").read_text()
    shutil.rmtree(newest_whole(folder))
    launch(worker, 2, folder, "--resume")
    same_run(folder, finished[0], optimizer=False)
    assert [one["loss"] for one in entries(folder)] == [json.loads(one)["loss"] for one in before.splitlines()[:8]]
    assert open_trained(folder).about["checkpoint"] == "checkpoint-8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate can shard here")
def test_sharding_is_refused_where_accelerate_would_not_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate shards models on GPUs only"):
        train(smoke(), tmp_path / "run")


def test_processes_share_every_batch():
    """Side by side or in one row: every sample is some process's, and no one else's; all draw alike."""
    settings = smoke()
    handle = gistkern.patch_llama(
        tiny_llama(), num_gist_tokens=2, num_segment_gist_tokens=2, positions="gist_first", sink_tokens=0
    )
    data = PasskeyData(settings, settings.curriculum.made(), handle, fast_tokenizer())

    def answers(batch):
        return batch["labels"][batch["labels"] != -100].view(-1, 5)

    for stage in settings.curriculum.stages:
        for seed in range(4):
            whole = answers(data.batch(stage, random.Random(seed), Share()))
            assert len(whole) == data.size
            woven = torch.empty_like(whole)
            for index in range(2):
                woven[index::2] = answers(data.batch(stage, random.Random(seed), Share(index, 2)))
            assert torch.equal(woven, whole)


def test_a_share_without_a_sample_has_a_batch_without_labels():
    settings = smoke()
    handle = gistkern.patch_llama(tiny_llama(), **settings.gists)
    data = PasskeyData(settings, settings.curriculum.made(), handle, fast_tokenizer())
    assert [bool((data.draw(0, Share(index, 3))["labels"] != -100).any()) for index in range(3)] == [True, True, False]
    assert len(data.draw(0, Share(2, 3))["input_ids"]) == 1


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_shares_divide_a_batch(size):
    for count in (1, 3, 4):
        places = sorted(place for index in range(count) for place in Share(index, count).own(size))
        assert places == list(range(size))
