"""The pictures of the documentation: drawn from what is committed, small enough, nothing cut off, no long legends."""

import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.legend import Legend

from bench.pictures.__main__ import PICTURES
from gistkern.layout.picture import save

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"


def test_every_committed_picture_has_code_that_draws_it():
    assert {path.stem for path in FOLDER.iterdir()} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_the_committed_data(name):
    figure = PICTURES[name]()
    drawn = io.BytesIO()
    legends = [len(legend.get_texts()) for legend in figure.findobj(Legend)]
    save(figure, drawn)
    assert max(legends, default=0) <= 8
    drawn.seek(0)
    found, committed = pyplot.imread(drawn), pyplot.imread(FOLDER / f"{name}.png")
    height, width, _ = found.shape
    assert width <= 1600
    assert height <= 1200
    frame = [found[0], found[-1], found[:, 0], found[:, -1]]
    assert all((edge == 1).all() for edge in frame), "something is cut off: it reaches the picture's edge"
    # another version of matplotlib may set a letter elsewhere by a hair
    assert found.shape == committed.shape, "run python -m bench.pictures"
    assert np.abs(found - committed).mean() < 0.01, "run python -m bench.pictures"


def test_a_picture_is_the_same_whenever_it_is_drawn():
    twice = [io.BytesIO(), io.BytesIO()]
    for file in twice:
        save(PICTURES["segments"](), file)
    assert twice[0].getvalue() == twice[1].getvalue()
