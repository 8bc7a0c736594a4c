"""Which model families are taken and which are refused: a table of the rows that decide it."""

from collections import defaultdict

from bench.markdown import table
from gistkern.hf.families import FAMILIES
from gistkern.hf.refusals import REFUSALS


def tables() -> dict[str, str]:
    """What the page marks as ``families``."""
    kinds = defaultdict(list)
    for row in FAMILIES.values():
        kinds[row.attention].append(f"`{row.model_type}`" + (f" (transformers {row.since})" if row.since else ""))
    rows = [(f"**{kind}**", ", ".join(names)) for kind, names in kinds.items()]
    rows += [
        (f"refused: {row.feature}, {row.why}", ", ".join(f"`{name}`" for name in row.model_types)) for row in REFUSALS
    ]
    return {"families": table(("attention", "model types"), rows, text_columns=2)}
