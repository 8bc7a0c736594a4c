"""The curves of a run: everything that a log holds is drawn, and what cannot be drawn is said."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from training_cases import arguments, make_features, patched

from gistkern.training import GistDataCollator, GistTrainer, write_curves
from gistkern.training.curves import _smooth, curves_of


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, which stay open to be looked at."""
    found = []
    monkeypatch.setattr(pyplot, "close", found.append)
    yield found
    monkeypatch.undo()
    pyplot.close("all")


def write(folder, entries):
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def curves(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def test_the_log_of_a_real_run_is_drawn(tmp_path, drawn):
    model, handle, segments = patched("segments")
    asked = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}
    GistTrainer(
        model,
        arguments(tmp_path, **asked),
        data_collator=GistDataCollator(0, handle, **segments),
        train_dataset=make_features(16),
        eval_dataset=make_features(4, seed=1),
    ).train()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    picture = write_curves(tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    loss, accuracy = drawn[0].axes
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5]
    assert curves(loss)["training"][0] == steps
    held = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    assert held
    assert curves(loss)["held out"] == tuple(map(list, zip(*held, strict=True)))
    assert curves(accuracy)["answers, whole"][0] == steps


def test_stages_are_divided_where_they_end(tmp_path, drawn):
    stages = [0, 0, 0, 1, 1, 2]
    write(tmp_path, [{"step": 10 + n, "loss": 9.0 - n, "exact": n / 6, "stage": s} for n, s in enumerate(stages)])
    write_curves(tmp_path)
    loss, accuracy = drawn[0].axes
    for axis in (loss, accuracy):
        assert [line.get_xdata()[0] for line in axis.get_lines() if line.get_linestyle() == ":"] == [12.5, 14.5]
    assert [text.get_text() for text in loss.texts] == ["stage 0", "1", "2"]
    assert loss.get_yscale() == "linear"


def test_losses_of_many_sizes_are_drawn_on_a_logarithmic_scale(tmp_path, drawn):
    write(tmp_path, [{"step": step, "loss": 10.0**-step} for step in range(4)])
    write_curves(tmp_path)
    assert drawn[0].axes[0].get_yscale() == "log"


def test_a_smooth_curve_keeps_ends_constants_and_slopes():
    rng = np.random.default_rng(3)
    noisy = rng.normal(size=400)
    assert (_smooth(noisy)[[0, -1]] == noisy[[0, -1]]).all()
    np.testing.assert_allclose(_smooth(np.full(90, 0.3)), 0.3)
    np.testing.assert_allclose(_smooth(np.arange(200.0)), np.arange(200.0))
    assert _smooth(noisy).std() < noisy.std() / 2
    assert (_smooth(noisy[:20]) == noisy[:20]).all(), "a short run is drawn as it is"


@pytest.mark.parametrize("text", ["", "{", '{"step": 1, "eval_loss": 2.0}\n'])
def test_a_log_without_losses_is_refused_and_ends_no_run(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"no curves can be drawn of .*log.jsonl"):
        write_curves(tmp_path)
    name, line = curves_of(tmp_path)
    assert not name
    assert "no curves can be drawn" in line
    assert "\n" not in line


def test_without_matplotlib_a_run_says_so(tmp_path, monkeypatch):
    write(tmp_path, [{"step": 1, "loss": 1.0}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_curves(tmp_path) is None
    assert curves_of(tmp_path) == ("", "no curves.png: it needs matplotlib (pip install 'gistkern[train]')")
    assert not (tmp_path / "curves.png").exists()
