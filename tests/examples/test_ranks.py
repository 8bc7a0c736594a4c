"""train_niah.py under torchrun: the losses of one process; a killed process loses nothing, and any number goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import command
from launching import launch, torchrun
from ranks_worker import BATCHES
from ranks_worker import run as train_shares
from safetensors.torch import load_file

import gistkern
from checkpoints import latest
from models import tiny_llama
from passkey.niah import train_tokenizer
from presets import preset
from ranks import Ranks, Share
from task import haystacks, make_batch

pytestmark = [pytest.mark.xdist_group("training"), pytest.mark.timeout(600)]


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_losses(found, expected):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "digit", "exact", "running", "lr", "stage"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (one["step"], name)


def ranks_of(parent):
    """Process ids of torchrun's workers."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return sorted(map(int, children.split()))


ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--num_processes",
    "2",
]


@pytest.mark.parametrize(
    ("options", "resumed_by"),
    [
        pytest.param(["--accumulate", 2], command()[:1], id="ddp-then-one-process"),
        pytest.param(["--fsdp", "--accumulate", 2], ACCELERATE, id="fsdp-then-fsdp-by-accelerate"),
    ],
)
def test_a_killed_process_ends_the_run_and_nothing_is_lost(finished, tmp_path, options, resumed_by):
    """Two processes train until one is killed, others go on, and the log is that of a run by one process."""
    alone, _ = finished
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*torchrun(2), *command("--run", folder, *options)[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not latest(folder):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        workers = ranks_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        _, said = process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said, "torchrun says which process died, and of what"
    whole = latest(folder)
    assert 0 < int(whole.name.split("-")[1]) < len(entries(alone))
    again = subprocess.run([*resumed_by, *command("--run", folder, "--resume")[1:]], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    same_losses(entries(folder), entries(alone))
    assert latest(folder).name == latest(alone).name
    weights = [load_file(latest(run) / "model.safetensors") for run in (folder, alone)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-4)
    assert (folder / "report.json").exists(), "one process evaluates"
    assert not list(folder.glob(".checkpoint-*.tmp"))


def test_micro_batches_of_two_processes_equal_one_batch(tmp_path):
    """Gradients, by the optimizers' states, which no normalization hides; under DDP and FSDP2."""
    launch(Path(__file__).with_name("ranks_worker.py"), 2, tmp_path)
    for batch in BATCHES:
        alone = tmp_path / f"alone-{batch}"
        train_shares(alone, batch, Ranks(), accumulate=1)
        expected = load_file(latest(alone) / "optimizer.safetensors")
        for name in ("ddp", "fsdp"):
            folder = tmp_path / f"{name}-{batch}"
            same_losses(entries(folder), entries(alone))
            found = load_file(latest(folder) / "optimizer.safetensors")
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                scale = value.float().abs().max()
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3 * float(scale), msg=f"{name} {key}")


def test_processes_share_every_batch():
    """Side by side or in one row: every sample is some process's, and no one else's; all draw alike."""
    settings = preset("smoke")
    handle = gistkern.patch_llama(
        tiny_llama(0), num_gist_tokens=2, num_segment_gist_tokens=2, positions="gist_first", sink_tokens=0
    )
    drawn = haystacks(settings, train_tokenizer(), False, "0")
    for stage in settings.stages:
        for seed in range(4):
            whole = make_batch(drawn, handle, stage, settings, random.Random(seed))
            parts = []
            for index in range(2):
                parts.append(make_batch(drawn, handle, stage, settings, random.Random(seed), Share(index, 2)))
            assert all(part.size == whole.size == sum(len(p.answers) for p in parts) for part in parts)
            woven = torch.empty_like(whole.answers)
            for index, part in enumerate(parts):
                woven[index::2] = part.answers
            assert torch.equal(woven, whole.answers)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_weights_add_up_and_spare_processes_have_none(size):
    """A process without a sample of its own computes the first one for nothing: every process must take part."""
    every = [Share(index, 3) for index in range(3)]
    assert sum(one.weight(size) for one in every) == pytest.approx(1)
    assert sorted(place for one in every if one.weight(size) for place in one.own(size)) == list(range(size))
    assert all(one.own(size) == range(1) for one in every if not one.weight(size))


def test_micro_batches_divide_a_process_s_share():
    """Together they are the batch; the last one of a process has samples if any has."""
    model = torch.nn.Identity()
    shares = [[share for share, *_ in Ranks(index, 2).micro_batches(model, 3)] for index in range(2)]
    lasts = [[last for _, last, _ in Ranks(index, 2).micro_batches(model, 3)] for index in range(2)]
    assert lasts == [[False, False, True]] * 2
    for size in (1, 2, 5, 12):
        places = sorted(place for own in shares for one in own if one.weight(size) for place in one.own(size))
        assert places == list(range(size))
        for own in shares:
            assert own[-1].weight(size) >= max(one.weight(size) for one in own)


def test_one_process_shares_its_model_with_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="FSDP shares the model between processes, and there is one"):
        Ranks.started(sharded=True)
