"""Two processes under torchrun train as one: same losses, same weights, each its own data, one writer."""

import json
from pathlib import Path

import pytest
import torch
from ddp_worker import CASES, GLOBAL_BATCH, train
from launching import launch
from safetensors.torch import load_file

# one launch serves all tests; it takes seconds, but three processes import transformers, on a busy machine for minutes
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Folder of a run with two processes, and what each of them reports."""
    folder = tmp_path_factory.mktemp("ddp")
    for case in CASES:
        (folder / case).mkdir()
    launch(Path(__file__).with_name("ddp_worker.py"), 2, folder)
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(launched, case, tmp_path):
    folder, ranks = launched
    alone = train(case, tmp_path, 1)
    expected, found = load_file(tmp_path / "weights.safetensors"), load_file(folder / case / "weights.safetensors")
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    steps = [[entry for entry in entries(one) if "loss" in entry] for one in (tmp_path, folder / case)]
    assert len(steps[0]) == 3
    for one, two in zip(*steps, strict=True):
        assert two == pytest.approx(one, rel=1e-6), "loss, its parts, gradient norm, accuracies, curriculum"
    assert any(0 < entry["token_accuracy"] < 1 for entry in steps[0]), "or else the curricula would agree anyway"
    for rank in ranks:
        assert bool(rank[case]["sharded"]) == (case == "fsdp")
        assert rank[case]["curriculum"] == alone["curriculum"]
        for name in ("eval_exact", "eval_token_accuracy"):
            assert rank[case]["eval"][name] == alone["eval"][name]
        if case == "fsdp":
            assert "FSDP shards cannot compress" in rank[case]["said"]
        else:
            assert rank[case]["said"] == alone["said"], "to each question, in their order, on every process"
            assert len(alone["said"]) == 7


@pytest.mark.parametrize("case", CASES)
def test_every_process_reads_its_own_half(launched, case):
    _, ranks = launched
    accumulation = CASES[case]["arguments"].get("gradient_accumulation_steps", 1)
    per_step = GLOBAL_BATCH // 2 // accumulation * accumulation
    first, second = ([tuple(context) for context in rank[case]["seen"][: 3 * per_step]] for rank in ranks)
    assert len(first) == len(second) == 6
    assert not {*first} & {*second}
    assert len({*first} | {*second}) == 12, "the whole data set, once"


@pytest.mark.parametrize("case", CASES)
def test_one_process_writes(launched, case):
    folder, _ = launched
    steps = [entry["step"] for entry in entries(folder / case) if "loss" in entry]
    assert steps == [1, 2, 3], "a line per step, not one per process"
    checkpoint = folder / case / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["GistCallback"]
    assert state["attributes"]["curriculum"]["step"] == 3
    assert (checkpoint / "gistkern.json").exists() == (case == "peft")


def test_an_iterable_data_set_is_not_cut_up(launched):
    for rank in launched[1]:
        assert "pass accelerator_config={'dispatch_batches': False}" in rank["refusal"]
