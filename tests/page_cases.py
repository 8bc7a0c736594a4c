"""How a page of the documentation is read: its blocks, and who runs each of them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"python", "bash", "json", "yaml", "text", "toml"}
_BLOCK = re.compile(
    r"^( *)(?:<!-- (?:(?P<who>run by|not run): (?P<how>[^>]*?)|(?P<printed>printed)) -->\n\s*)?"
    r"```(?P<kind>[^\n]*)\n(?P<text>.*?)^ *```",
    re.S | re.M,
)


class Block(NamedTuple):
    """A fenced block."""

    kind: str  # its language
    text: str
    line: int
    runner: str  # a test file that runs it instead of the page's own test, or ""
    reason: str  # why nothing can run it here, or ""
    printed: bool = False  # whether it is what the block of Python before it prints


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, top to bottom."""
    text, found = page.read_text("utf-8"), []
    for match in _BLOCK.finditer(text):
        who = {match["who"]: match["how"]} if match["who"] else {}
        body = re.sub(rf"^{match[1]}", "", match["text"], flags=re.M)
        line = text[: match.start("kind")].count("\n") + 1
        kind, printed = match["kind"].split(" ")[0], bool(match["printed"])
        found.append(Block(kind, body, line, who.get("run by", ""), who.get("not run", ""), printed))
    return found


def commands(text: str) -> list[str]:
    """The command lines of a block: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def prose(page: Path) -> int:
    """The words of a page without its blocks, tables, comments and link targets."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.S)
    return sum(len(line.split()) for line in text.splitlines() if not line.lstrip().startswith(("|", ":::")))
