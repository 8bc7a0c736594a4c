"""``gistkern train``: from a file of rows to a folder that loads, answers and says what it is worth."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from own_cases import PEOPLE, gistkern, make_base, rows, terminal, write
from safetensors.torch import load_file

from gistkern import ask, compress, load
from gistkern.cli.main import main
from gistkern.hf.chat import chat_context, chat_parts
from gistkern.hf.texts import context_ids
from gistkern.training.checkpoints import newest_whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    make_base(folder / "base")
    make_base(folder / "chat", template="qwen2")
    write(folder / "mine.jsonl", rows())
    write(folder / "chat.jsonl", rows(chat=True))
    return folder


def words(place, output, *more, data="mine.jsonl", base="base"):
    given = ["--data", place / data, "--model", place / base, "--output", output, "--gists", 2, *more]
    return ["train", *map(str, given)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder):
    return lines_of(folder / "log.jsonl")


def losses_of(folder):
    return [(one["step"], one["loss"]) for one in log_of(folder) if "loss" in one]


@pytest.fixture(scope="module")
def trained(place):
    """A LoRA of forty rows, in a process of its own."""
    done = gistkern(*words(place, "out", "--steps", 6, "--lora", 4, "--tensorboard"), cwd=place, watched=True)
    assert done.returncode == 0, done.stderr
    return place / "out", done


def test_a_run_says_what_it_does_and_what_to_do_next(trained):
    folder, done = trained
    said = done.stdout.splitlines()
    assert said[0] == "36 rows to train on, 4 held out; texts as they stand"
    saved = next(at for at, line in enumerate(said) if line.startswith("saved out: a LoRA adapter of rank 4"))
    assert re.fullmatch(r".* kB; step \d of 6, which answered best", said[saved])
    assert [line.split("  ")[0] for line in said[saved + 4 : saved + 7]] == [
        "gist rows",
        "full context, base",
        "no context",
    ]
    assert said[-4:-2] == ["curves: out/curves.png", "next:"]
    assert said[-2].split()[:2] == ["gistkern", "compress"]
    assert max(map(len, said)) <= 100
    bars = done.stderr
    assert re.search(r"training: 100%.* 6/6 \[\d\d:\d\d<00:00", bars), "a bar, with what is left"
    assert "loss " in bars
    assert re.search(r"answering: .*/12 ", bars), "four questions, three ways"
    assert re.search(r"answering: .*/4 ", bars), "of an evaluation"
    for wait in ("starting torch and transformers ...", f"loading {folder.parent / 'base'} ..."):
        assert wait in bars.splitlines()
    assert "Warning" not in bars
    assert "Loading weights" in bars
    assert sum("held-out loss" in line for line in said) == 3, "a fifth of six steps is two"
    assert list(folder.glob("runs/*/events.out.tfevents*"))


def test_a_folder_holds_what_answers_best_and_how_to_load_it(trained, monkeypatch, capsys):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "gistkern.json", "tokenizer.json", "README.md", "training.json"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    evaluations = [entry for entry in log_of(folder) if "eval_loss" in entry]
    best = max(evaluations, key=lambda one: one["eval_generation_best"])["step"]
    kept = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    saved = load_file(folder / "adapter_model.safetensors")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    card = (folder / "README.md").read_text()
    assert "![loss and accuracy by step](curves.png)" in card
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for part in (
        "base_model:",
        "\n| full context, base | 4 | ",
        "gistkern train --data",
        "transformers 5.",
        "36",
        "held out",
    ):
        assert part in card
    monkeypatch.chdir(folder.parent)
    (folder.parent / "document.txt").write_text("The bell number 1 is with Mira.")
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(compile(block, "README.md", "exec"), {})
    capsys.readouterr()


def test_a_folder_is_measured_and_compressed_with(trained, place, monkeypatch, capsys):
    _, done = trained
    monkeypatch.chdir(place)
    main(["eval", "out", "--data", "mine.jsonl", "--eval-share", "0.1", "--output", "answers.jsonl"])
    again = capsys.readouterr().out.splitlines()
    table = done.stdout.splitlines()
    assert max(map(len, again)) <= 100
    for line in again[2:]:  # but for the seconds, the numbers of the training's end
        assert line.split()[:-1] in [other.split()[:-1] for other in table]
    answers = lines_of(place / "answers.jsonl")
    assert len(answers) == 4
    assert all(set(one) == {"row", "right", "gist", "full", "none", "tokens", "rows"} for one in answers)
    assert {one["right"] for one in answers} <= set(PEOPLE)
    main(["eval", "out", "--data", "mine.jsonl", "--samples", "3", "--only", "gist", "--batch", "2"])
    (_, _, line) = capsys.readouterr().out.splitlines()
    assert line.split()[:3] == ["gist", "rows", "3"]
    model, tokenizer, _ = load("out")
    row = lines_of(place / "mine.jsonl")[0]
    main(
        [
            "eval",
            "out",
            "--data",
            "mine.jsonl",
            "--samples",
            "1",
            "--only",
            "gist",
            "--output",
            "one.jsonl",
            "--max-new-tokens",
            "7",
        ]
    )
    assert (
        lines_of(place / "one.jsonl")[0]["gist"]
        == ask(model, tokenizer, row["context"], row["question"], max_new_tokens=7).strip()
    )


def test_all_weights_learn_rows_by_heart(place, tmp_path, capsys):
    """And the answers are the context's, not the question's."""
    few = write(
        tmp_path / "few.jsonl",
        [{**rows()[0], "context": f"The bell is with {one}.", "answer": f" {one}"} for one in PEOPLE],
    )
    main(words(place, tmp_path / "out", "--data", few, "--lora", 0, "--steps", 60, "--rate", "3e-3", "--eval-share", 0))
    assert "None: no rows were held out" in capsys.readouterr().out
    main(["eval", str(tmp_path / "out"), "--data", str(few), "--only", "gist", "full"])
    said = capsys.readouterr().out.splitlines()
    assert said[2].split()[2:4] == ["4", "100.0%"]
    assert said[3].startswith("full context  4"), "a whole checkpoint has no base beside it"


def test_a_killed_run_goes_on_as_if_nothing_had_happened(place, tmp_path, capsys):
    given = ("--steps", 6, "--save-every", 2, "--lora", 4, "--eval-samples", 2)
    main(words(place, tmp_path / "whole", *given))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("checkpoint-6", "README.md", "adapter_model.safetensors"):
        path = tmp_path / "killed" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torn = tmp_path / "killed" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st')
    main(words(place, tmp_path / "killed", *given, "--resume"))
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    for more, message in (
        (("--resume", "--seed", 1), "base.seed 0, now 1, run.seed 0, now 1"),
        ((), "is in use: pass --resume"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words(place, tmp_path / "killed", *given, *more))
        assert message in capsys.readouterr().err


def test_a_finished_run_is_made_longer(place, tmp_path, capsys):
    out, given = tmp_path / "out", ("--lora", 4, "--eval-share", 0, "--save-every", 2)
    main(words(place, out, "--steps", 4, *given))
    main(words(place, out, "--steps", 7, *given, "--resume"))
    assert newest_whole(out).name == "checkpoint-7"
    steps = [step for step, _ in losses_of(out)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 7
    assert "after 7 steps" in capsys.readouterr().out
    assert json.loads((out / "training.json").read_text())["run"]["steps"] == 7
    with pytest.raises(SystemExit, match="2"):
        main(words(place, out, "--steps", 6, *given, "--resume"))
    assert "checkpoint-7 has made all 6 steps: pass more --steps" in capsys.readouterr().err
    assert json.loads((out / "training.json").read_text())["run"]["steps"] == 7


def test_what_stands_in_the_way_is_said_before_torch_is_loaded(place, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    for output, more, message in (
        ("used", (), "is in use: pass --resume"),
        ("new", ("--resume",), "nothing to resume"),
        ("new", ("--model", "./nowhere"), "there is no folder './nowhere'"),
        (
            "new",
            ("--step", "3"),
            "unrecognized arguments: --step 3 (did you mean --steps?) (see gistkern train --help)",
        ),
    ):
        code = f"""
import sys
from gistkern.cli.main import main
try:
    main({words(place, tmp_path / output, *more)!r})
except SystemExit as done:
    assert done.code == 2
print("torch" in sys.modules, "transformers" in sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"]
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_kill_9_and_resume(place, tmp_path):
    given = ("--steps", 12, "--save-every", 2, "--lora", 4)
    assert gistkern(*words(place, tmp_path / "whole", *given)).returncode == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "gistkern", *words(place, killed, *given)])
    while newest_whole(killed) is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = gistkern(*words(place, killed, *given, "--resume"))
    assert done.returncode == 0, done.stderr
    assert losses_of(killed) == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_says_only_what_works(place, tmp_path):
    """Before the first checkpoint the same command starts again; the first Ctrl-C leaves one."""
    given = ("--steps", 40_000, "--lora", 4, "--eval-share", 0)
    for presses, advice in ((2, "the same command starts again"), (1, "the same command with --resume goes on")):
        ours, theirs = terminal()
        command = [sys.executable, "-m", "gistkern", *words(place, tmp_path / "out", *given)]
        process = subprocess.Popen(command, stderr=theirs)
        os.close(theirs)
        said = ""
        while not re.search(r" ([3-9]|\d\d)/40000", said):  # a step has begun
            said += os.read(ours, 1).decode(errors="replace")
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01 if presses == 1 else 0.002)
        with contextlib.suppress(OSError):  # the process has ended
            while True:
                said += os.read(ours, 1 << 16).decode(errors="replace")
        os.close(ours)
        assert process.wait() == 130
        assert advice in said or "is whole" in said
    done = gistkern(*words(place, tmp_path / "out", *given, "--resume", "--save-every", 400))
    assert done.returncode == 2, "other settings"


@pytest.mark.parametrize("role", ["system", "user"])
def test_conversations_are_asked_as_they_were_trained(place, tmp_path, capsys, role):
    more = ["--data", place / "mine.jsonl", "--chat"] if role == "user" else []
    given = ("--steps", 2, "--lora", 4, "--segment-length", 8, "--segment-overlap", 2, *more)
    main(words(place, tmp_path / "out", *given, data="chat.jsonl", base="chat"))
    said = capsys.readouterr().out
    assert f"through the chat template, contexts in the {role} turn" in said
    model, tokenizer, handle = load(tmp_path / "out")
    assert (handle.training.chat, handle.training.segment_length, handle.training.segment_overlap) == (role, 8, 2)
    text, question = "The bell number 3 is with Mira.", "Who has it?"
    parts = chat_parts(tokenizer, text, question, role=role)
    ids = context_ids(tokenizer, chat_context(tokenizer, text, role))
    cache = compress(model, [ids], segment_length=8, segment_overlap=2)
    asked = torch.tensor([tokenizer(parts.question, add_special_tokens=False)["input_ids"]])
    out = model.generate(asked, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=[2, 4])
    expected = tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)
    assert ask(model, tokenizer, text, question, max_new_tokens=6) == expected


def test_four_bits_and_every_objective(place, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    config = tmp_path / "more.yaml"
    config.write_text("max_grad_norm: 1e-1\nlr_scheduler_type: constant\n")
    objectives = ("--objectives", "answer", "distillation=0.5", "reconstruction=0.1")
    cut = ("--segment-gists", 1, "--segment-length", 5, "--positions", "gist_first")
    main(words(place, tmp_path / "out", "--4bit", "--steps", 2, *objectives, *cut, "--config", config))
    assert "objectives: answer 1, distillation 0.5, reconstruction 0.1" in (tmp_path / "out/README.md").read_text()
    entry = next(one for one in log_of(tmp_path / "out") if "distillation" in one)
    assert entry["loss"] == pytest.approx(
        entry["answer"] + 0.5 * entry["distillation"] + 0.1 * entry["reconstruction"], rel=1e-4
    )
    capsys.readouterr()
    main(
        [
            "eval",
            str(tmp_path / "out"),
            "--data",
            str(place / "mine.jsonl"),
            "--samples",
            "2",
            "--4bit",
            "--dtype",
            "float32",
        ]
    )
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["gist", "rows", "2"]


def test_a_ratio_is_tokens_for_each_gist_token(place, tmp_path, capsys):
    main([*words(place, tmp_path / "out", "--steps", 1, "--lora", 2, "--eval-share", 0, "--ratio", 2.5)])
    assert json.loads((tmp_path / "out/gistkern.json").read_text())["segment_length"] == 5
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratio", "8", "--segment-length", "64"), "give two of the three"),
        (("--ratio", "0.5"), "--ratio must be at least 1"),
        (("--ratio", "8", "--segment-gists", "2"), "--ratio with --segment-gists"),
        (("--4bit", "--lora", "0"), "leave --lora 0 out"),
        (("--objectives", "answers"), "expected answer, distillation or reconstruction"),
        (("--objectives", "answer=x"), "expected answer=WEIGHT"),
        (("--objectives", "reconstruction"), "answer and distillation both weigh 0"),
        (("--eval-share", "1"), "at least 0 and below 1"),
        (("--eval-data", "{place}/mine.jsonl"), "are never trained on"),
        (("--resume",), "nothing to resume: "),
        (("--dtype", "float16"), "overflows in training"),
        (("--eval-every", "2", "--save-every", "3"), "must be a multiple of --eval-every"),
        (("--model", "{place}/bas"), "there is no folder .*bas'.*did you mean .*/base'?"),
        (("--model", "somebody/something"), "nothing of that name was downloaded before, and HF_HUB_OFFLINE is set"),
        (("--max-length", "3"), "rows are longer than 3 tokens"),
        (("--chat",), "no chat template"),
        (("--config", "{place}/wrong.yaml"), r"learning_rats, which is none .* \(did you mean learning_rate\?\)"),
        (("--config", "{place}/option.yaml"), "--config gives seed, which is the option --seed"),
        (("--step", "3"), r"did you mean --steps\?"),
    ],
)
def test_refusals_are_one_line(place, tmp_path, capsys, more, message):
    (place / "wrong.yaml").write_text("learning_rats: 1")
    (place / "option.yaml").write_text("seed: 1")
    with pytest.raises(SystemExit, match="2"):
        main(words(place, tmp_path / "out", *(one.format(place=place) for one in more)))
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()
