"""The comparison of layouts: what its grid holds, that training and reading agree, capacity, going on."""

import functools
import json
import random
import re

import pytest
import torch
import yaml

import compare
import passkey.settings
from gistkern.training import Share, Stage
from passkey.data import PasskeyData
from passkey.models import patched
from passkey.niah import KEY_DIGITS, Haystack, dataset, train_tokenizer
from passkey.readers import Reader

GRID = yaml.safe_load(compare.GRID.read_text("utf-8"))
LAYOUTS, COUNTS = ("single", "segment-wise", "hierarchical"), (1, 2, 5, 10, 25)


@functools.cache
def settings_of(name):
    return passkey.settings.settings_of(name, GRID[name], "the grid")


def test_the_grid_holds_every_axis_once_and_names_say_what_changes():
    changes = {(f"-{one}" if one else ""): one for one in ("", "absolute", "sink")}
    names = {f"{layout}-{gists}" for layout in LAYOUTS for gists in COUNTS}
    names |= {f"{layout}-10{change}" for layout in LAYOUTS for change in changes}
    assert set(GRID) == names | {f"single-{gists}-keys" for gists in COUNTS}
    assert list(GRID)[:3] == [f"{layout}-10" for layout in LAYOUTS], "a grid cut short has compared the layouts"
    base = settings_of("single-10")
    for name in GRID:
        settings, (layout, gists, *change) = settings_of(name), re.split(r"-(?=\d)|(?<=\d)-", name)
        assert settings.gists["num_gist_tokens"] == int(gists)
        assert (settings.segments.segment_length is None) == (layout == "single")
        assert settings.gists["num_segment_gist_tokens"] == (8 if layout == "hierarchical" else 0)
        assert settings.gists["positions"] == ("absolute" if change == ["absolute"] else "gist_first")
        assert settings.gists["sink_tokens"] == (1 if change == ["sink"] else 0)
        assert (settings.curriculum == base.curriculum) == (change != ["keys"])
        assert (settings.model, settings.optimizer, settings.data) == (base.model, base.optimizer, base.data)


@functools.cache
def english():
    return Haystack(train_tokenizer(), "en", False, random.Random(0))


@pytest.mark.parametrize("name", ["single-10", "single-1-keys"])
def test_every_stage_has_room_for_its_keys(name):
    haystack = english()

    def longest(wordings, name=""):
        return max(len(haystack.encode(" " + text.format(key="01234", name=name))) for text in wordings)

    language = haystack.language
    named = sorted((longest(language.named_needles, name) for name in language.words["name"]), reverse=True)
    settings = settings_of(name)
    wanted = [(stage.tokens[0], stage.keys[1]) for stage in settings.curriculum.stages]
    for tokens, most in wanted + [(row.tokens, row.keys) for row in settings.evaluation]:
        assert tokens >= max(longest(language.needles), sum(named[:most]) if most > 1 else 0)


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize(
    "name", ["single-10", "segment-wise-10", "hierarchical-10", "segment-wise-10-absolute", "hierarchical-10-sink"]
)
def test_training_computes_what_is_read_from_the_gist_rows(name, keys):
    """The digit that the masked forward predicts first is the one that compress and generate say first."""
    settings = settings_of(name)
    model, handle, tokenizer = patched(settings)
    model.eval()
    data = PasskeyData(settings, settings.curriculum.made(), handle, tokenizer)
    stage = Stage(steps=1, tokens=(150, 150), keys=(keys, keys), batch_size=4)
    drawn, samples = [], []
    (haystack,) = data.haystacks["en"]
    draw = haystack.draw
    haystack.draw = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    batch = data.batch(stage, random.Random(1), Share())
    samples = [sample for _, sample in drawn]
    assert len(samples) == 4
    labels = batch.pop("labels")
    answers = [train_tokenizer().decode(row[-KEY_DIGITS:].tolist()) for row in labels]
    assert answers == [sample.answer for sample in samples]
    with torch.no_grad():
        trained = model(**batch, logits_to_keep=KEY_DIGITS + 1, use_cache=False).logits[:, 0]
    length = settings.segments.segment_length
    compression = {} if length is None else vars(settings.segments)
    reader = Reader(model, train_tokenizer(), compression, new_tokens=1)
    cache = reader.compress(samples)
    rows = set(cache.gist_rows.tolist())
    assert [train_tokenizer().decode([int(row.argmax())]) for row in trained] == reader.ask(cache, samples)
    kept = 2 if name.startswith("segment-wise") else 1
    assert rows == {kept * 10 + handle.sink_tokens}


def test_digits_per_row_count_guesses_out():
    row = {"keys": 4, "digit": 1.0, "gist_tokens": 10}
    assert compare.digits_per_row(row) == pytest.approx(4 * KEY_DIGITS / 10)
    assert compare.digits_per_row({**row, "digit": 0.1}) == 0
    assert compare.digits_per_row({**row, "digit": 0.5, "gist_tokens": 5}) == pytest.approx(20 / 5 * 0.4 / 0.9)


def test_each_of_several_keys_is_asked_for_by_its_name():
    for sample in dataset(train_tokenizer(), "en", 200, 3, keys=3):
        (name,) = (name for name, key in sample.keys.items() if key == sample.answer)
        assert name in sample.question


SMALL = """
_: &short
  like: compare
  curriculum: {patience: 1.0, stages: [{steps: 2, batch_size: 2, tokens: [42, 56]}]}
  evaluation: [{language: en, tokens: 60, samples: 4}, {language: en, tokens: 200, samples: 4}]
wise: {<<: *short, segments: {segment_length: 96, segment_overlap: 24}}
keys:
  <<: *short
  evaluation: [{language: en, tokens: 60, samples: 3, keys: 1}, {language: en, tokens: 90, samples: 3, keys: 2}]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of two configurations, one of them for capacity."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "grid.yaml").write_text(SMALL)
    arguments = ["--grid", str(folder / "grid.yaml"), "--runs", str(folder)]
    compare.main([*arguments, "--only", "wise", "--only", "keys"])
    return folder, arguments


def test_a_configuration_is_a_row_of_the_report(small):
    folder, _ = small
    keys, wise = json.loads((folder / "compare.json").read_text())["results"]
    assert (keys["name"], wise["name"]) == ("keys", "wise")
    assert [(row["tokens"], row["gist_tokens"]) for row in wise["rows"]] == [(60, 10), (200, 30)]
    assert [(row["keys"], row["n"], row["gist_tokens"]) for row in keys["rows"]] == [(1, 3, 10), (2, 3, 10)]
    assert all(row["digits_per_row"] == compare.digits_per_row(row) for row in keys["rows"])
    assert wise["training"]["steps"] == 2
    lines = (folder / "compare.json").read_text().splitlines()
    assert len([line for line in lines if line.startswith(' {"name"')]) == 2


def test_what_is_finished_is_not_run_again(small, monkeypatch, capsys):
    folder, arguments = small
    compare.main([*arguments, "--list"])
    listed = dict(re.findall(r"^(\S+) .* (finished|to run)$", capsys.readouterr().out, re.M))
    assert listed == {"_": "to run", "wise": "finished", "keys": "finished"}
    before = json.loads((folder / "compare.json").read_text())["results"]
    for name in ("passkey.training.PasskeyTrainer", "evaluation.evaluate_run"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("it ran again"))
    compare.main([*arguments, "--only", "wise"])
    assert json.loads((folder / "compare.json").read_text())["results"] == before


def test_results_of_other_settings_are_refused(small, tmp_path, capsys):
    folder, _ = small
    (tmp_path / "grid.yaml").write_text(SMALL.replace("steps: 2", "steps: 3"))
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--grid", str(tmp_path / "grid.yaml"), "--runs", str(folder), "--only", "wise"])
    assert "wise-seed0 is a run of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (SMALL, ["--only", "double"], "no configuration 'double': expected one of _, wise, keys"),
        ("one: {like: compare, gists: {num_gits: 3}}", [], "num_gits"),
        ("[1, 2]", [], "must be a mapping"),
        ("a: [", [], "grid.yaml: while parsing"),
    ],
)
def test_a_grid_that_is_none(tmp_path, capsys, text, arguments, message):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--grid", str(tmp_path / "grid.yaml"), "--runs", str(tmp_path / "runs"), *arguments])
    assert message in capsys.readouterr().err
