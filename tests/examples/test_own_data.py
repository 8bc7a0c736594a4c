"""own_data.py from a JSON-lines file to an answer, with a small random model; with an adapter too."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import own_data
from passkey.niah import train_tokenizer

PEOPLE = ("Mira", "Odette", "Jonas", "Petra")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=2, bos_token_id=None, eos_token_id=0, **size)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), pad_token="<pad>", eos_token="<pad>")
    tokenizer.save_pretrained(folder / "base")
    lines = [
        {"context": f"The bell is with {name}.", "question": " Who has it?", "answer": f" {name}"} for name in PEOPLE
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1]]))
    return folder


def run(place, output, *more):
    own_data.main(["--model", str(place / "base"), "--data", str(place / "data.jsonl"), "--output", str(output), *more])


@pytest.mark.parametrize("lora", [(), ("--lora", "4")], ids=["all weights", "adapter"])
def test_from_a_file_to_an_answer(place, tmp_path, capsys, lora):
    run(place, tmp_path, "--gists", "2", "--steps", "80", "--rate", "5e-3", *lora)
    asked = f"' Who has it?' is answered ' {PEOPLE[1]}'"
    said = capsys.readouterr().out.splitlines()[-1]
    if not lora:
        assert said == f"{asked}; the file says ' {PEOPLE[1]}'", "it was one of the four that were trained on"
    plain, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (place / "base", tmp_path / "model"))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (plain, trained)]
    assert not torch.equal(*weights), "the adapter is merged"
    others = own_data.answer(tmp_path / "model", f"The bell is with {PEOPLE[0]}.", " Who has it?")
    assert lora or others == f" {PEOPLE[0]}", "the context is what makes the answer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 lines"),
        ('{"context": "c", "question": "q", "answer": "a"}\nnonsense', "line 2 is no JSON"),
        ('{"context": "c", "question": "q"}', "line 1 must be an object of texts: answer, context, question"),
        ('{"context": "c", "question": "q", "answer": 5}', "line 1 must be an object of texts"),
    ],
)
def test_lines_that_are_none(tmp_path, capsys, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        own_data.main(["--model", "m", "--data", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
