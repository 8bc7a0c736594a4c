"""Bad input of the scripts: exit status 2 and one line that names what is wrong, before anything is computed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import EXAMPLES, SMOKE, command, smoke
from safetensors.torch import load_file

import eval_niah
import serve
import train_niah
from passkey.trained import newest_whole

pytestmark = pytest.mark.xdist_group("training")


@pytest.fixture
def place(tmp_path):
    """A folder with a file and a folder of each bad kind in it."""
    run = tmp_path / "run" / "checkpoint-1"
    run.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    files = {
        "file": "",
        "other.json": '{"rows": [{"tokens": null}]}',
        "latin": b"\xe9",
        "torn.yaml": "- {language: en, tokens: 150",
        "float.yaml": "- {language: en, tokens: 7.5, samples: 2}",
        "requests.json": '{"requests": [{"document": 1}]}',
        "run/settings.json": smoke().written(),
        "run/checkpoint-1/trainer_state.json": json.dumps(
            {
                "global_step": 1,
                "num_input_tokens_seen": 2,
                "stateful_callbacks": {
                    "GistCallback": {"attributes": {"cpu_seconds": 1, "curriculum": {"finished": False}}}
                },
            }
        ),
        "run/checkpoint-1/tokenizer.json": "{}",
        "run/checkpoint-1/model.safetensors": "nonsense",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


EVALUATE = "--checkpoint {run} --output {empty}"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (eval_niah, "--checkpoint {file} --output {empty}", "no folder .*file"),
        (eval_niah, "--checkpoint {none} --output {empty}", "no folder .*none"),
        (eval_niah, "--checkpoint {empty} --output {file}", "cannot write to a folder .*file"),
        (eval_niah, "--checkpoint {empty} --output {new}", "empty holds no checkpoint"),
        (eval_niah, f"{EVALUATE} --threads 0", "--threads: expected at least 1"),
        (eval_niah, f"{EVALUATE} --rows {{empty}}", "no file .*empty"),
        (eval_niah, f"{EVALUATE} --rows {{latin}}", "latin: 'utf-8' codec can't decode"),
        (eval_niah, f"{EVALUATE} --rows {{torn.yaml}}", "torn.yaml: while parsing"),
        (eval_niah, f"{EVALUATE} --rows {{float.yaml}}", "float.yaml: .*tokens"),
        (eval_niah, f"{EVALUATE} --rows {{other.json}}", "other.json: "),
        (eval_niah, f"{EVALUATE} --full 0", "--full: expected at least 1"),
        (eval_niah, EVALUATE, "checkpoint-1 holds no tokenizer"),
        (serve, f"transformers {EVALUATE}", "checkpoint-1 holds no tokenizer"),
        (serve, f"transformers {EVALUATE} --requests 0", "--requests: expected at least 1"),
        (serve, "vllm --output {none}", "no folder .*none"),
        (serve, "vllm --output {empty}", "requests.json is missing, or none that"),
        (serve, "vllm --output {.}", "requests.json is missing, or none that"),
        (train_niah, f"--preset {SMOKE} --run {{file}}", "cannot write to a folder .*file"),
        (train_niah, f"--preset {SMOKE} --run {{file}}/new", "cannot write to a folder .*file"),
        (train_niah, f"--preset {SMOKE} --threads -1", "--threads: expected at least 1"),
        (train_niah, f"--preset {SMOKE} --run {{run}} --resume", "checkpoint-1"),
        (train_niah, "--preset {file}.yaml", "unknown preset 'file'"),
        (train_niah, "--preset llama3-8b --run {new} --model {none}", "none"),
    ],
)  # fmt: skip
def test_bad_input(script, arguments, message, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spelled = re.sub(r"\{(.*?)\}", lambda found: str(place / found[1]), arguments)
    with pytest.raises(SystemExit, match="2"):
        script.main(shlex.split(spelled))
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: .*{message}", said), said


def test_a_checkpoint_that_is_torn(place, finished, capsys):
    folder = place / "run" / "checkpoint-1"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((newest_whole(finished[0]) / name).read_bytes())
    for broken, message in [
        ("model.safetensors", "checkpoint-1"),
        ("../settings.json", "settings.json: "),
    ]:
        (folder / broken).write_text("nonsense")
        with pytest.raises(SystemExit, match="2"):
            eval_niah.main(["--checkpoint", str(place / "run"), "--output", str(place / "empty")])
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", ["train_niah", "eval_niah", "serve", "compare"])
def test_a_wrong_option_is_refused_before_anything_loads(script):
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {script}\n"
        f"try: {script}.main(['--jsn'])\nexcept SystemExit: assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_says_the_command_that_goes_on(finished, tmp_path, monkeypatch):
    process = subprocess.Popen(
        command("--run", tmp_path / "run"),
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 120
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text()):  # the first checkpoint would be that of step 2
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert newest_whole(tmp_path / "run") is not None
    assert "is whole: go on with --resume" in said
    monkeypatch.setattr("evaluation.evaluate_run", lambda *_: None)
    train_niah.main([*command("--run", tmp_path / "run")[2:], "--resume"])
    expected, resumed = (load_file(newest_whole(one) / "model.safetensors") for one in (finished[0], tmp_path / "run"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_ctrl_c_before_the_first_step_and_in_the_evaluation(finished, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("passkey.training.PasskeyTrainer", stop)
    given = ["--preset", str(SMOKE), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="130"):
        train_niah.main(given)
    assert f"{tmp_path / 'run'} holds no checkpoint yet: pass --overwrite" in capsys.readouterr().err
    monkeypatch.setattr("evaluation.evaluate_run", stop)
    with pytest.raises(SystemExit, match="130"):
        train_niah.main(["--preset", str(SMOKE), "--run", str(finished[0]), "--resume"])
    assert "checkpoint-8 is whole: go on with --resume" in capsys.readouterr().err
