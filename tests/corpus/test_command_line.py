"""python -m gistkern.corpus: what it writes, and what it says where something is wrong, without a traceback."""

import json
import os
import subprocess
import sys

import pytest
import torch
from corpus_cases import patched
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gistkern import GistStore, compress
from gistkern.corpus import __main__ as command_line
from gistkern.corpus.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a patched model with its tokenizer; `plain` beside it was never patched."""
    folder = tmp_path_factory.mktemp("models")
    handle = patched()
    handle.model.save_pretrained(folder / "model")
    vocabulary = {word: number for number, word in enumerate(["<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "model")
    handle.unpatch()
    handle.model.save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def given(folder, tmp_path):
    """Arguments; options in pairs, so that a test replaces some."""
    (tmp_path / "documents.jsonl").write_text('{"id": "x", "text": "a b c"}\n\n{"id": 7, "text": "j i"}\n')
    return {
        "--model": str(folder / "model"),
        "--documents": str(tmp_path / "documents.jsonl"),
        "--out": str(tmp_path / "store"),
    }


def listed(options):
    return [part for option in options.items() for part in option]


def test_every_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command_line._device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command_line._device() == "cuda:3"


def test_the_command_line(given, capsys):
    main(listed(given))
    assert "2 documents in" in capsys.readouterr().out
    store = GistStore(given["--out"])
    assert list(store) == ["x", "7"]
    expected = compress(patched().model, torch.tensor([[1, 2, 3]]))
    for layer, wanted in zip(store["x"].layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.gist.key, wanted.gist.key, rtol=1e-4, atol=1e-5)
    assert json.loads((store.folder / "corpus.json").read_text())["segment_length"] is None


def refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(listed(options))
    assert stop.value.code == 2
    assert not os.path.exists(options["--out"]), "nothing is half written"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": "y"}', "line 2, is no document: it lacks 'text'"),
        (b'{"text": "a"}', "line 2, is no document: it lacks 'id'"),
        (b"{", "line 2, is no document: no JSON"),
        (b"[1, 2]", "line 2, is no document: no JSON object but [1, 2]"),
        (b"[" * 90000, "line 2, is no document: no JSON"),
        (b'{"id": NaN, "text": "a"}', "line 2, is no document: no JSON (NaN"),
        (b'{"id": 1.5, "text": "a"}', "line 2, is no document: its id must be a string or a whole number, found 1.5"),
        (b'{"id": null, "text": "a"}', "line 2, is no document: its id must be"),
        (b'{"id": true, "text": "a"}', "line 2, is no document: its id must be"),
        (b'{"id": "", "text": "a"}', "line 2: names of documents must be strings that say something"),
        (b'{"id": "y", "text": null}', "line 2: document 'y' is a None"),
        (b'{"id": "y", "text": ""}', "line 2: document 'y' is empty"),
        (b'{"id": "y", "text": 3.5}', "line 2: document 'y' is a float"),
        (b'{"id": "y", "text": [1, 2.5]}', "line 2: document 'y' holds 2.5 where token ids"),
        (b'{"id": "y", "text": [1, 99]}', "line 2: document 'y' holds token 99"),
        (b'{"id": "y", "text": "half \\ud800"}', "line 2: document 'y' cannot be written as UTF-8"),
        (b'{"id": "half \\ud800", "text": "a"}', "line 2: the name 'half \\ud800' cannot be written as UTF-8"),
        (b'{"id": "x", "text": "a"}', "lines 1, 2: two documents are called 'x'"),
        (b'{"id": "y", "text": "\xe9"}', "line 2, is no document: byte 21 is no UTF-8"),
        ('{"id": "y", "text": "a"}'.encode("utf-16"), "line 2, is no document: byte 0 is no UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_file(given, capsys, line, said):
    with open(given["--documents"], "wb") as file:
        file.write(b'{"id": "x", "text": "a b c"}\n' + line)
    assert f"{given['--documents']}, {said}" in refused(given, capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--documents": "{tmp}"}, "is a folder: pass a file of JSON lines"),
        ({"--documents": "{tmp}/none"}, "none does not exist"),
        ({"--documents": ""}, "it is empty, which would be this folder"),
        ({"--documents": "/dev/null"}, "is no regular file"),
        ({"--documents": "{tmp}/empty"}, "empty holds no documents"),
        ({"--model": "{tmp}/none"}, "none cannot be loaded"),
        ({"--model": "{tmp}"}, "cannot be loaded"),
        ({"--model": "{folder}/plain"}, "has no trained gist rows"),
        ({"--model": "{tmp}/adapter"}, "and pass that folder as --model"),
        ({"--tokenizer": "{folder}/plain"}, "the tokenizer {folder}/plain cannot be loaded"),
        ({"--device": "cuda:99"}, "device='cuda:99' cannot be used here"),
        ({"--device": "nowhere"}, "device='nowhere' cannot be used here"),
        ({"--dtype": "int8"}, "--dtype int8 is none that a model computes in"),
        ({"--segment-length": "0"}, "segment_length must be"),
        ({"--batch-tokens": "-3"}, "batch_tokens must be"),
    ],
)
def test_bad_arguments(folder, given, tmp_path, capsys, change, said):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    change = {name: value.format(tmp=tmp_path, folder=folder) for name, value in change.items()}
    assert said.format(folder=folder) in refused({**given, **change}, capsys)


def test_a_folder_that_is_a_file(given, capsys):
    with pytest.raises(SystemExit):
        main(listed({**given, "--out": given["--documents"]}))
    assert "is a file: pass a folder" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(given, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        main(listed(given))
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_help_and_mistyped_options_load_no_torch():
    code = (
        "import sys\nfrom gistkern.corpus.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    for argument, status in (("--help", 0), ("--modle", 2)):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
