"""The comparison of layouts: what its grid holds, that training and reading agree, capacity, resuming, the page."""

import dataclasses
import functools
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

import compare
import compare_page
from compare_layouts import BUDGETS, CAPACITY, GIST_COUNTS, GRID, LAYOUTS, Configuration, draw_batch
from gistkern.training import GistDataCollator, Stage
from passkey.haystack import LANGUAGES
from passkey.niah import KEY_DIGITS, Haystack, dataset, train_tokenizer
from passkey.readers import GistReader

SMOKE = BUDGETS["smoke"]


@functools.cache
def english():
    return Haystack(train_tokenizer(), "en", False, random.Random(0))


def test_the_grid_holds_every_axis_once():
    assert len({cell.name for cell in GRID}) == len(GRID)
    plain = {(cell.layout, cell.gists) for cell in GRID if cell == Configuration(cell.layout, cell.gists)}
    assert plain == {(layout, gists) for layout in LAYOUTS for gists in GIST_COUNTS}
    for changed in ({"positions": "absolute"}, {"sink_tokens": 1}):
        assert {Configuration(layout, **changed) for layout in LAYOUTS} <= set(GRID)
    assert [cell.gists for cell in CAPACITY] == list(GIST_COUNTS)
    assert [cell.layout for cell in GRID[:3]] == list(LAYOUTS), "a grid cut short has compared the layouts"


@pytest.mark.parametrize("budget", [b for one in BUDGETS.values() for b in one.values()])
def test_every_stage_has_room_for_its_keys(budget):
    haystack = english()

    def longest(wordings, name=""):
        return max(len(haystack.encode(" " + text.format(key="01234", name=name))) for text in wordings)

    language = haystack.language
    named = sorted((longest(language.named_needles, name) for name in language.words["name"]), reverse=True)
    for stage in budget.stages:
        most = stage.keys[1]
        assert stage.tokens[0] >= max(longest(language.needles), sum(named[:most]) if most > 1 else 0)
    if budget.keys:
        assert min(budget.evaluate) >= sum(named[: max(budget.keys)])


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize(
    "configuration",
    [*GRID[:3], Configuration("segment-wise", 2, "absolute", 1), Configuration("hierarchical", 5, sink_tokens=1)],
    ids=lambda cell: cell.name,
)
def test_training_computes_what_is_read_from_the_gist_rows(configuration, keys):
    """The digit that the masked forward predicts first is the one that compress and generate say first."""
    handle = configuration.build(0)
    model = handle.model.eval()
    collate = GistDataCollator(0, handle, **configuration.compression)
    haystack = english()
    stage = Stage(steps=1, tokens=(150, 150), keys=(keys, keys))
    batch, answers = draw_batch(haystack, collate, stage, 800, random.Random(1))
    assert batch.pop("labels")[:, -KEY_DIGITS:].equal(answers)
    with torch.no_grad():
        trained = model(**batch, logits_to_keep=KEY_DIGITS + 1, use_cache=False).logits[:, 0]
    # the same samples once more, read as in evaluation
    haystack.rng = rng = random.Random(1)
    rng.randint(150, 150), rng.randint(keys, keys)
    samples = [haystack.draw(150, keys=keys)[1] for _ in answers]
    reader = GistReader(model, train_tokenizer(), configuration.compression, new_tokens=1)
    cache = reader.compress(samples)
    said = reader.ask(cache, samples)
    assert [train_tokenizer().decode([int(row.argmax())]) for row in trained] == said
    segments = 1 if configuration.layout == "single" else 2
    kept = segments if configuration.layout == "segment-wise" else 1
    rows = set(reader.compress(samples).gist_rows.tolist())
    assert rows == {kept * configuration.gists + configuration.sink_tokens}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_the_same_rows(layout):
    budget = SMOKE["one key"]
    _, training = compare.train(Configuration(layout), budget, 0)
    assert budget.rows <= training["rows"] < budget.rows + budget.step_rows
    assert len(training["stages_entered_at"]) == 2, "patience ends the first stage"


class Oracle:
    """Reads `right` of every context's keys, and says "00000" or what `otherwise` says about the rest."""

    def __init__(self, rows, right, otherwise):
        self.rows, self.right, self.otherwise = rows, right, otherwise

    def compress(self, samples):
        return SimpleNamespace(gist_rows=torch.tensor([self.rows] * len(samples)), clone=lambda: self)

    def ask(self, cache, samples):
        return [s.answer if list(s.keys.values()).index(s.answer) < self.right else self.otherwise(s) for s in samples]


def test_capacity_asks_every_key_and_counts_guesses_out():
    samples = list(dataset(train_tokenizer(), "en", 200, 40, keys=4))
    named = LANGUAGES["en"].named_question
    whole = compare.capacity(Oracle(10, 4, None), samples, named)
    assert (whole["exact"], whole["digits_per_row"]) == (1.0, pytest.approx(4 * KEY_DIGITS / 10))
    half = compare.capacity(Oracle(5, 2, lambda s: "x"), samples, named)
    assert half["exact"] == 0.5
    assert half["digits_per_row"] == pytest.approx(4 * KEY_DIGITS / 5 * (0.5 - 0.1) / 0.9)
    rng = random.Random(0)
    guess = compare.capacity(Oracle(10, 0, lambda _: f"{rng.randrange(10**5):05}"), samples, named)
    assert guess["low"] < 0 < guess["high"]
    assert guess["exact"] < 0.05


def test_a_single_key_is_asked_for_without_a_name():
    sample = next(dataset(train_tokenizer(), "en", 100, 1))
    assert compare._asked(sample, 0, "{name}?") == sample
    several = next(dataset(train_tokenizer(), "en", 200, 1, keys=3))
    asked = [compare._asked(several, place, "{name}?") for place in range(3)]
    assert {one.question: one.answer for one in asked} == {f"{name}?": key for name, key in several.keys.items()}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A smoke run of three configurations, one of them for capacity."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--budget", "smoke", "--seeds", "0", "--runs", str(folder / "runs"), "--out", str(folder / "all.json")]
    only = [word for name in ("single-10", "segment-wise-10", "single-1-keys") for word in ("--only", name)]
    compare.main([*arguments, *only])
    return folder, [*arguments, *only]


def test_finished_configurations_are_not_run_again(grid, monkeypatch, capsys):
    folder, arguments = grid
    before = json.loads((folder / "all.json").read_text())
    monkeypatch.setattr(compare, "run_one", lambda *_: pytest.fail("it ran again"))
    compare.main(arguments)
    assert json.loads((folder / "all.json").read_text()) == before
    compare.main([*arguments, "--only", "single-1", "--list"])
    listed = dict(re.findall(r"^(\S+) .* (finished|to run)$", capsys.readouterr().out, re.M))
    assert listed["single-10"] == "finished"
    assert listed["single-1"] == "to run"


def test_the_report_names_what_ran_and_what_did_not(grid):
    folder, _ = grid
    report = json.loads((folder / "all.json").read_text())
    assert [one["name"] for one in report["results"]] == ["single-10", "segment-wise-10", "single-1-keys"]
    assert len(report["not_run"]) == len(GRID) - 3
    single, wise, keys = report["results"]
    assert [row["ratio"] for row in single["rows"]] == [6, 20]
    assert [row["gist_tokens"] for row in wise["rows"]] == [10, 30]
    assert [(row["keys"], row["contexts"], row["gist_rows"]) for row in keys["capacity"]] == [(1, 3, 1), (2, 3, 1)]
    text = (folder / "all.md").read_text()
    assert re.search(r"^- seed 0: hierarchical-10, single-1,", text.split("## Not run")[1], re.M)
    assert "## Layouts" in text
    assert "## Positions" not in text, "no other scheme was run: nothing to compare"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"


def test_results_of_another_budget_are_refused(grid, capsys, monkeypatch):
    _, arguments = grid
    monkeypatch.setattr(compare, "run_one", lambda *_: pytest.fail("it ran"))
    changed = {**SMOKE, "one key": dataclasses.replace(SMOKE["one key"], rows=4000)}
    monkeypatch.setitem(BUDGETS, "smoke", changed)
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments)
    assert "was run with another budget" in capsys.readouterr().err


def test_an_unknown_configuration_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--only", "double-10"])
    assert "invalid choice: 'double-10'" in capsys.readouterr().err


def test_seeds_are_pooled_by_length():
    def result(seed, exact):
        return {"seed": seed, "rows": [{"tokens": 100, "gist_tokens": 10, "ratio": 10.0, "n": 50} | exact]}

    (row,) = compare_page.pooled([result(0, {"exact": 1.0, "digit": 1.0}), result(1, {"exact": 0.5, "digit": 0.8})])
    assert (row["n"], row["exact"], row["digit"]) == (100, 0.75, pytest.approx(0.9))
    assert row["seeds"] == {0: 1.0, 1: 0.5}
    assert 0.65 < row["low"] < 0.75 < row["high"] < 0.83


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="holds no results: run examples/compare"):
        compare_page.page({"results": [], "environments": [], "not_run": [], "command": "x"}, {})
