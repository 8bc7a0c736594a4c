"""gistkern compress and gistkern ask: what they write and say, and what is wrong, in one line without a traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gistkern
from gistkern import GistStore, compress
from gistkern.cli.main import main
from gistkern.hf.handle import handle_of

WORDS = "abcdefghij"


def make_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"vocab_size": 60, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **rest, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a patched model with its tokenizer; an adapter on `plain`, which was never patched."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    model = make_model()
    model.save_pretrained(folder / "plain")
    gistkern.patch(model, num_gist_tokens=3)
    model.save_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "plain")
    handle = gistkern.patch(base, num_gist_tokens=3)
    handle.record(segment_length=2)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["gist_embeddings"])
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    (folder / "adapter" / "gistkern.json").write_text(json.dumps(handle.arguments()))
    tokenizer.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def given(folder, tmp_path):
    """Arguments; options in pairs, so that a test replaces some."""
    (tmp_path / "documents.jsonl").write_text('{"id": "x", "text": "a b c"}\n\n{"id": 7, "text": "j i"}\n')
    return {
        "compress": str(tmp_path / "documents.jsonl"),
        "--model": str(folder / "model"),
        "--out": str(tmp_path / "store"),
    }


def listed(options):
    return [part for option in options.items() for part in option]


def test_every_process_takes_its_own_gpu(monkeypatch, folder):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gistkern.cache.file.check_device", lambda device: taken.append(device) or 1 / 0)
    for rank in (None, "3"):
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ZeroDivisionError):
            main(["compress", str(folder), "--model", str(folder / "model"), "--out", str(folder / "never")])
    assert taken == ["cuda:0", "cuda:3"]


def test_json_lines_become_a_store(given, capsys):
    main(listed(given))
    store = GistStore(given["--out"])
    assert list(store) == ["x", "7"]
    rows, bytes_of_a_row = 2 * 3 + 2, 2 * 2 * 8 * 4
    totals = f"2 documents, 5 tokens in {rows} rows (0.6x), {rows * bytes_of_a_row:,} bytes in {given['--out']}, "
    assert capsys.readouterr().out.startswith(totals)
    handle = gistkern.load(given["--model"])[2]
    expected = compress(handle.model, torch.tensor([[1, 2, 3]]))
    for layer, wanted in zip(store["x"].layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.gist.key, wanted.gist.key, rtol=1e-4, atol=1e-5)
    found = json.loads((store.folder / "corpus.json").read_text())
    assert found["segment_length"] is None
    assert store.about == {"gistkern": gistkern.__version__, "model": given["--model"], "dtype": "float32"}
    assert repr(store) == f"GistStore({str(store.folder)!r}, 2 documents by {given['--model']})"


def write_texts(folder):
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "a.TXT").write_bytes(b"\xef\xbb\xbfa b c")
    (folder / "sub" / "b.md").write_text("d e")
    (folder / "sub" / "c.JSONL").write_text('{"id": "row", "text": "f g h i"}\n')
    (folder / "sub" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "sub" / ".git" / "hidden.txt").write_text("j")
    return folder


def test_a_folder_by_an_adapter_and_questions_about_it(folder, given, tmp_path, capsys):
    """The store names both, so asking needs neither; segments are those of the training."""
    given |= {"compress": str(write_texts(tmp_path / "texts")), "--model": str(folder / "adapter")}
    main([*listed(given), "--plain-model", str(tmp_path / "merged")])
    said = capsys.readouterr()
    assert "1 files that are no texts were left out" in said.err
    store = GistStore(given["--out"])
    assert list(store) == ["a.TXT", "sub/b.md", "row"]
    assert store.about == {
        "gistkern": gistkern.__version__,
        "model": str(folder / "plain"),
        "adapter": str(folder / "adapter"),
        "dtype": "float32",
    }
    model, tokenizer, _ = gistkern.load(folder / "adapter")
    cache = compress(model, [[6, 7, 8, 9]], segment_length=2)
    torch.testing.assert_close(store["row"].compact(1)[0], cache.compact(1)[0], rtol=1e-5, atol=1e-5)
    expected = gistkern.ask(model, tokenizer, cache, ["j i", "h"], max_new_tokens=5)
    main(["ask", given["--out"], "row", "j i", "h", "--max-new-tokens", "5"])
    assert capsys.readouterr().out == f"j i\n  {expected[0]}\nh\n  {expected[1]}\n"
    main(["ask", given["--out"], "row", "h", "--max-new-tokens", "5", "--model", str(folder / "adapter")])
    assert capsys.readouterr().out == f"{expected[1]}\n"

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "gistkern")
    assert not [name for name in plain.state_dict() if "gist" in name or "lora" in name]
    prefix = gistkern.plain_prefix(store["row"], plain.config)
    ids = torch.tensor([[0] * prefix.get_seq_length() + tokenizer("h")["input_ids"]])
    answer = plain.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=prefix, max_new_tokens=5, do_sample=False
    )
    assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == expected[1]
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_asking_about_what_is_not_there(given, capsys):
    main(listed(given))
    for words, said in (
        (["ask", given["--out"], "xx", "a"], "no document 'xx' in"),
        (["ask", given["--out"], "xx", "a"], "did you mean 'x'?"),
        (["ask", given["compress"], "x", "a"], "no folder"),
        (["ask", given["--out"], "x", " "], "a question is empty"),
        (["ask", given["--out"], "x", "a", "--modle", "m"], "did you mean --model?"),
        (["ask", given["--out"], "x", "a", "--model", given["--out"]], "holds no model and no adapter"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


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
    with open(given["compress"], "wb") as file:
        file.write(b'{"id": "x", "text": "a b c"}\n' + line)
    assert f"{given['compress']}, {said}" in refused(given, capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compress": "{tmp}/adapter"}, "holds no documents: they end in .txt, .md, .rst, .jsonl"),
        ({"compress": "{tmp}/none"}, "no file or folder"),
        ({"compress": ""}, "it is empty, which would be this folder"),
        ({"compress": "/dev/null"}, "is no regular file"),
        ({"compress": "{tmp}/empty.jsonl"}, "no documents"),
        ({"compress": "{tmp}/latin.txt"}, "latin.txt: byte 2 is no UTF-8"),
        ({"compress": "{tmp}/blank.txt"}, "document 'blank.txt' is empty"),
        ({"--plain-model": "{folder}/model"}, "holds what was trained, or its base"),
        ({"--plain-model": "{tmp}/latin.txt"}, "cannot write to a folder"),
        ({"--model": "{tmp}/none"}, "there is no folder"),
        ({"--model": "{tmp}"}, "holds no model and no adapter"),
        ({"--model": "{folder}/plain"}, "was not saved while patched"),
        ({"--model": "{tmp}/adapter"}, "holds no gist rows"),
        ({"--base": "{folder}/plain"}, "is no peft adapter: leave base out"),
        ({"--device": "cuda:99"}, "device='cuda:99' cannot be used here"),
        ({"--device": "nowhere"}, "device='nowhere' cannot be used here"),
        ({"--dtype": "int8"}, "--dtype int8 is none that a model computes in"),
        ({"--segment-length": "0"}, "expected at least 1, got 0"),
        ({"--batch-tokens": "-3"}, "expected at least 1, got -3"),
    ],
)
def test_bad_arguments(folder, given, tmp_path, capsys, change, said):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"a \xe9")
    (tmp_path / "blank.txt").write_text(" \n\t ")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    change = {name: value.format(tmp=tmp_path, folder=folder) for name, value in change.items()}
    assert said.format(folder=folder) in refused({**given, **change}, capsys)


def test_a_folder_that_is_a_file(given, capsys):
    with pytest.raises(SystemExit):
        main(listed({**given, "--out": given["compress"]}))
    assert "cannot write to a folder" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(given, capsys, monkeypatch):
    monkeypatch.setattr(
        "gistkern.corpus.compress.compress_documents", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(SystemExit) as stop:
        main(listed(given))
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_help_and_mistyped_options_load_no_torch():
    code = "import sys\nfrom gistkern.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for words, status in (("--help", 0), ("compress --help", 0), ("ask --help", 0), ("compress x --modle m", 2)):
        done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
        assert done.returncode == status
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_chat_models_store_knows_whose_turn_its_texts_begin(folder, given, tmp_path, capsys, role):
    turns = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant {% endif %}"
    shutil.copytree(folder / "model", tmp_path / "model")
    model, tokenizer, handle = gistkern.load(tmp_path / "model")
    tokenizer.chat_template = template
    handle.record(chat=role)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    main(listed({**given, "--model": str(tmp_path / "model")}))
    capsys.readouterr()
    assert GistStore(given["--out"]).role == role
    main(["ask", given["--out"], "x", "d e", "--max-new-tokens", "6"])
    rows = tokenizer(f"{role} a b c")["input_ids"], tokenizer("d e x" if role == "user" else "x d e x")["input_ids"]
    out = model.generate(torch.tensor([rows[1]]), past_key_values=compress(model, [rows[0]]), max_new_tokens=6)
    expected = tokenizer.decode(out[0, len(rows[1]) :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_store_is_asked_in_the_type_it_was_compressed_in(folder, given, capsys):
    main([*listed(given), "--dtype", "bfloat16"])
    capsys.readouterr()
    main(["ask", given["--out"], "x", "d e", "--max-new-tokens", "3"])
    assert len(capsys.readouterr().out.split()) <= 3
    with pytest.raises(SystemExit):
        main(["ask", given["--out"], "x", "d e", "--dtype", "float32"])
    assert "torch.bfloat16" in capsys.readouterr().err


def test_an_adapter_of_unknown_place_is_said_to_be_so(folder, given, capsys):
    model, tokenizer, _ = gistkern.load(folder / "adapter")
    model.load_adapter(folder / "adapter", "second")
    model.set_adapter("second")
    gistkern.compress_corpus(model, {"x": "a b"}, given["--out"], tokenizer, segment_length=2, progress=False)
    with pytest.raises(SystemExit):
        main(["ask", given["--out"], "x", "d e"])
    assert "pass --model, what training saved" in capsys.readouterr().err


def test_a_plain_model_is_written_nowhere_near_the_trained_one(folder, tmp_path):
    model, tokenizer, handle = gistkern.load(folder / "adapter")
    for wrong in ("adapter", "plain"):
        with pytest.raises(ValueError, match="holds what was trained, or its base"):
            gistkern.serving.save_plain(model, folder / wrong, tokenizer)
    with pytest.raises(ValueError, match="pass the PeftModel around it"):
        gistkern.serving.save_plain(handle.model, tmp_path / "new", tokenizer)
    assert not (tmp_path / "new").exists()
    assert handle_of(model) is handle, "nothing was merged or unpatched"


def test_4_bit_weights_are_not_merged(given, tmp_path, capsys):
    change = {"--plain-model": str(tmp_path / "plain")}
    with pytest.raises(SystemExit):
        main([*listed({**given, **change}), "--4bit"])
    assert "takes no 4-bit weights" in capsys.readouterr().err
    assert not os.path.exists(given["--out"])
