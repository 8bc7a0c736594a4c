"""gistkern bench: what it measures, says and refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gistkern
from gistkern.cli import side_by_side
from gistkern.cli.main import main

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=60)).eval()
    model.save_pretrained(folder / "plain")
    handle = gistkern.patch(model, num_gist_tokens=3)
    handle.record(segment_length=20)
    model.save_pretrained(folder / "trained")
    return folder


def bench(capsys, *words):
    main(["bench", *map(str, words), "--tokens", "50", "--question", "4", "--answer", "3", "--rounds", "2"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "rows"), [("plain", ["--gists", 2, "--segment-length", 30], 5), ("trained", [], 10)]
)
def test_both_sides_are_measured(folder, capsys, name, options, rows):
    found = json.loads(bench(capsys, folder / name, "--json", *options))
    assert found["gist_rows"] == rows  # with a sink
    assert found["trained"] == (name == "trained")
    lines = {line["what"]: line for line in found["measured"]}
    assert len(lines) == (5 if torch.cuda.is_available() else 4)
    row = 2 * SIZES["num_hidden_layers"] * 8 * 4  # keys and values of one head of 8, in bytes
    held = lines["cache, question included"]
    assert (held["full"], held["gist"]) == (54 * row, (rows + 4) * row)
    assert all(line["gain"] > 0 < line["full"] and line["gist"] > 0 for line in lines.values())


def test_the_table_fits_a_terminal(folder, capsys):
    said = bench(capsys, folder / "plain")
    assert "never trained" in said
    assert max(map(len, said.split("\n", 1)[1].splitlines())) <= 80
    assert "never trained" not in bench(capsys, folder / "trained")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trained", ["--gists", "4"], "leave --gists out"),
        ("plain", ["--base", "x"], "leave --base out"),
        ("nowhere", [], "there is no folder"),
        ("plain", ["--device", "cuda:99"], "cuda:99"),
        ("plain", ["--dtype", "int8"], "none that a model computes in"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, name, options, message):
    with pytest.raises(SystemExit) as stopped:
        bench(capsys, folder / name, *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_other_side_is_the_unpatched_model_of_the_same_tensors(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    ids = torch.arange(1, 9)[None]
    expected = plain(ids).logits
    gistkern.patch(plain)
    other = side_by_side._unpatched(plain)
    assert torch.equal(other(ids).logits, expected)
    assert not hasattr(other, "gistkern_handle")
    assert plain.gistkern_handle.model is plain
    held = {weight.data_ptr() for weight in plain.parameters()}
    assert {weight.data_ptr() for weight in other.parameters()} <= held
