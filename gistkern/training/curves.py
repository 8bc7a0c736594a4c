"""The curves of a run: loss, accuracy and the stages of its curriculum, drawn from log.jsonl into curves.png."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["curves_of", "write_curves"]

LOG, PICTURE = "log.jsonl", "curves.png"
# what is drawn of accuracy: the entry's name, what it is called, and whether it is held out
_ACCURACY = {
    "exact": ("answers, whole", False),
    "token_accuracy": ("answers, token by token", False),
    "eval_generation_exact": ("held out, exact", True),
    "eval_generation_f1": ("held out, F1", True),
}
_POINTS = 30  # of a smooth curve, about: each is the mean of so large a part of the run


def write_curves(folder: str | os.PathLike) -> Path | None:
    """Draw the log of a run.

    Parameters
    ----------
    folder : path-like
        Of a run: holds the log.jsonl of `GistCallback`, and gets curves.png.

    Returns
    -------
    Path or None
        Of the picture; None where matplotlib is missing (it comes with ``gistkern[train]``).

    Raises
    ------
    ValueError
        If the log is missing, is no JSON, or holds no step with a loss.

    Examples
    --------
    >>> import json, pathlib
    >>> lines = [{"step": step, "loss": 3.0 / step, "exact": step / 9} for step in range(1, 10)]
    >>> _ = pathlib.Path("log.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
    >>> print(write_curves("."))
    curves.png
    """
    try:
        import matplotlib
    except ImportError:
        return None
    from gistkern.layout.picture import STYLE, save

    entries, picture = _entries(Path(folder) / LOG), Path(folder) / PICTURE
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (loss, accuracy) = pyplot.subplots(2, figsize=(7.2, 5.6), sharex=True)
        _draw_loss(loss, entries)
        _draw_accuracy(accuracy, entries)
        _draw_stages((loss, accuracy), entries)
        accuracy.set_xlabel("step")
        save(figure, picture)
    return picture


def curves_of(folder: Path) -> tuple[str, str]:
    """`write_curves` for a run that has ended, which no picture that is missing may spoil: without an error.

    Parameters
    ----------
    folder : Path
        Of the run.

    Returns
    -------
    tuple of str
        The picture's name, empty if there is none; and a line that says where it is, or why there is none.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("log.jsonl").write_text('{"step": 1, "loss": 2.0}')
    >>> curves_of(Path("."))
    ('curves.png', 'curves: curves.png')
    """
    try:
        picture = write_curves(folder)
    except ValueError as error:
        return "", str(error)
    if picture is None:
        return "", f"no {PICTURE}: it needs matplotlib (pip install 'gistkern[train]')"
    return picture.name, f"curves: {picture}"


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"no curves can be drawn of {path}: {error}") from error
    if not any("loss" in entry for entry in found):
        raise ValueError(f"no curves can be drawn of {path}: none of its {len(found)} lines has a loss")
    return found


def _of(entries: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what some entries hold."""
    pairs = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Of each value, the mean of those around it, twice; as many on both sides, also at the ends."""
    half = len(values) // (2 * _POINTS)
    reach = [min(half, place, len(values) - 1 - place) for place in range(len(values))]
    for _ in range(2):
        values = np.array([values[place - far : place + far + 1].mean() for place, far in enumerate(reach)])
    return values


def _draw_loss(axis: Any, entries: Sequence[dict[str, Any]]) -> None:
    from gistkern.layout.picture import COLORS

    steps, losses = _of(entries, "loss")
    finite = losses[np.isfinite(losses)]
    logarithmic = len(finite) and 0 < finite.min() < finite.max() / 30
    smooth = np.exp(_smooth(np.log(losses))) if logarithmic else _smooth(losses)
    axis.plot(steps, losses, color=COLORS["blue"], alpha=0.25, lw=1)
    axis.plot(steps, smooth, color=COLORS["blue"], label="training", marker="o" if len(steps) < 3 else "")
    held, values = _of(entries, "eval_loss")
    if len(held):
        axis.plot(held, values, color=COLORS["red"], marker="o", label="held out")
    axis.set(ylabel="loss", yscale="log" if logarithmic else "linear")
    axis.legend(loc="upper right")


def _draw_accuracy(axis: Any, entries: Sequence[dict[str, Any]]) -> None:
    from gistkern.layout.picture import COLORS

    colors = [COLORS[name] for name in ("blue", "green", "red", "orange")]
    for color, (name, (said, held)) in zip(colors, _ACCURACY.items(), strict=True):
        steps, values = _of(entries, name)
        if held and len(steps):
            axis.plot(steps, values, color=color, marker="o", label=said)
        elif len(steps):
            axis.plot(steps, _smooth(values), color=color, label=said, marker="o" if len(steps) < 3 else "")
    axis.set(ylim=(-0.03, 1.05), ylabel="share right")
    axis.grid(axis="y", color=COLORS["faint"])
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="best")


def _draw_stages(axes: Sequence[Any], entries: Sequence[dict[str, Any]]) -> None:
    """A line where a stage ends, and above the first axis the stage's number, from 0."""
    from gistkern.layout.picture import COLORS

    steps, stages = _of(entries, "stage")
    starts = [0, *(np.flatnonzero(np.diff(stages)) + 1)] if len(stages) else []
    for start in starts:
        for axis in axes if start else ():
            axis.axvline((steps[start - 1] + steps[start]) / 2, color=COLORS["gray"], ls=":", lw=1)
        place = (steps[start], 1.02), axes[0].get_xaxis_transform()
        name = f"stage {stages[start]:.0f}" if not start else f"{stages[start]:.0f}"
        axes[0].annotate(name, place[0], xycoords=place[1], color=COLORS["gray"], size=9)
