"""``python -m bench.pictures [NAME ...]``: draw all pictures of the documentation, or some, into docs/pictures."""

import sys
from collections.abc import Callable
from typing import Any

from bench.fill import DOCS
from bench.pictures import answers, front, layouts
from gistkern.layout.picture import save

PICTURES: dict[str, Callable[[], Any]] = {**layouts.PICTURES, **answers.PICTURES, **front.PICTURES}


def main(names: list[str]) -> None:
    """Draw them."""
    for name in names or PICTURES:
        save(PICTURES[name](), DOCS / "pictures" / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
