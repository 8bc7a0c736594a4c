"""Draw the pictures of masks and tiles: `python -m bench.pictures.mask`."""

from bench.fill import DOCS
from bench.pictures import tiles
from gistkern import GistLayout
from gistkern.layout.picture import save_png

HERE = DOCS / "pictures"

PICTURES = {
    "segments": (GistLayout.from_segments([12, 12, 12], 3, tail=6), "segments, each closed by three gists"),
    "one-segment": (GistLayout.from_segments([30], 4, tail=8), "one context, four gists, a question"),
    "sliding": (GistLayout.sliding(48, window=10, stride=7), "sliding window with a gist every seven tokens"),
    "hierarchical": (
        GistLayout.hierarchical([9, 9, 9], 2, 4, tail=6),
        "segment gists, then a summary that replaces them",
    ),
}


def main() -> None:
    """Write every picture."""
    HERE.mkdir(exist_ok=True)
    for name, (layout, title) in PICTURES.items():
        save_png(layout, HERE / f"{name}.png", title=title)
    tiles.draw(HERE / "tiles.png")


if __name__ == "__main__":
    main()
