import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMOKE = Path(__file__).with_name("smoke.yaml")
sys.path.insert(0, str(EXAMPLES))


def smoke(**changes):
    """Settings of the smallest training run of the example."""
    from dataclasses import replace

    from passkey.settings import read_settings

    return replace(read_settings(SMOKE), **changes)


def tiny_llama(seed=0):
    """The tiny preset's model before it is patched."""
    from passkey.models import random_llama

    return random_llama(smoke(seed=seed))


def untrained_run(folder, settings):
    """A run's folder with the checkpoint of a model that nobody trained."""
    from passkey.models import patched

    checkpoint = folder / "checkpoint-1"
    model, _, tokenizer = patched(settings)
    for one in (model, tokenizer):
        one.save_pretrained(checkpoint)
    callback = {"attributes": {"curriculum": {"finished": False}, "cpu_seconds": 1.0}}
    state = {"global_step": 1, "num_input_tokens_seen": 9, "stateful_callbacks": {"GistCallback": callback}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (folder / "settings.json").write_text(settings.written())
    return folder


def drawn_by_a_process(*what, **how):
    """Samples as another process draws them, whose hashes have another seed."""
    code = f"""import json, sys; sys.path.insert(0, {str(EXAMPLES)!r})
from passkey.niah import dataset, train_tokenizer
print(json.dumps([vars(sample) for sample in dataset(train_tokenizer(), *{what!r}, **{how!r})]))"""
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def entries(folder):
    """What a run logged of its steps; the Trainer ends with an entry about the whole run."""
    return [one for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in (one := json.loads(line))]


def command(*arguments):
    """The smallest training run of the example."""
    return [sys.executable, str(EXAMPLES / "train_niah.py"), "--preset", str(SMOKE), *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of such a run by one process, and what it said; tests that use it share an xdist group."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run("--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done
