"""The model card of a finished run, and what the command says at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gistkern import __version__
from gistkern.tables import as_markdown, as_text, nbytes_said
from gistkern.training.answering import cells
from gistkern.training.base import Base
from gistkern.training.curves import curves_of
from gistkern.training.finetune import Finetuning, Outcome

__all__ = ["write_card"]

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")

_CARD = """---
{front}
---

# Gist tokens for {base}

Trained by gistkern: a context is read once and kept as {kept}, and questions
about it are answered from those rows alone.

```python
import gistkern

model, tokenizer, handle = gistkern.load({folder!r})
context = open("document.txt").read()
print(gistkern.ask(model, tokenizer, context, {question!r}))
```

`gistkern.load` needs the base model: it is found by the name above, or passed as `base=`. By the shell:

```bash
{commands}
```

## Numbers

{numbers}

## Training

{facts}

{curves}Settings: training.json, every log entry: log.jsonl.

Versions: {versions}.
"""


def write_card(output: Path, base: Base, settings: Finetuning, outcome: Outcome, about: Mapping[str, Any]) -> str:
    """Write README.md and curves.png into `output`; returns what to print: what was saved, numbers, what is next."""
    what = f"a LoRA adapter of rank {base.lora} and the gist rows" if base.lora else "the whole model and its gist rows"
    commands = [
        f"gistkern compress FOLDER --model {output} --out {output}-store",
        f'gistkern ask {output}-store NAME "question"',
    ]
    best = _best(outcome)
    curves, drawn = curves_of(output)
    facts = {
        "trained": f"{outcome.parameters:,} parameters: {what}; {best}",
        **about,
        "gist tokens": _kept(base, settings),
        "positions": base.positions,
        "objectives": ", ".join(f"{name} {value:g}" for name, value in asdict(settings.objectives).items() if value),
        "chat": settings.role or "no",
        "weights": "4 bits (NF4)" if base.four_bit else str(base.computed_in()).removeprefix("torch."),
    }
    (output / "README.md").write_text(
        _CARD.format(
            front=_front(base),
            base=base.name,
            kept=_kept(base, settings),
            folder=str(output),
            question="Who signed it?",
            commands="\n".join(commands),
            numbers=_numbers(base, outcome, as_markdown),
            facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
            curves=f"![loss and accuracy by step]({curves})\n\n" if curves else "",
            versions=", ".join(f"{name} {found}" for name, found in _versions().items()),
        ),
        "utf-8",
    )
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    said = [f"saved {output}: {what}, {nbytes_said(size)}; {best}", "", _numbers(base, outcome, as_text), "", drawn]
    return "\n".join([*said, "next:", *map("  ".__add__, commands)])


def _front(base: Base) -> str:
    """What the hub reads of a card."""
    tags = ["gistkern", *(["lora", "peft"] if base.lora else [])]
    lines = [f"base_model: {json.dumps(base.name)}", f"library_name: {'peft' if base.lora else 'transformers'}"]
    return "\n".join([*lines, "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"])


def _kept(base: Base, settings: Finetuning) -> str:
    gists = f"{base.gists} gist token{'s' * (base.gists != 1)}"
    if settings.segment_length is None:
        return gists
    overlap = f", {settings.segment_overlap} of them again" if settings.segment_overlap else ""
    if base.segment_gists:
        return f"{gists} that summarize {base.segment_gists} for each {settings.segment_length} tokens{overlap}"
    return f"{gists} for each {settings.segment_length} tokens{overlap}"


def _best(outcome: Outcome) -> str:
    if outcome.best is None:
        return f"after {outcome.steps} steps"
    return f"step {outcome.best} of {outcome.steps}, which answered best"


def _numbers(base: Base, outcome: Outcome, drawn: Callable[..., str]) -> str:
    if not outcome.numbers:
        return "None: no rows were held out. `gistkern eval` measures."
    full = "the base model with the whole context" if base.lora else "the trained model with the whole context"
    return (
        f"{drawn(*cells(outcome.numbers, adapter=base.lora > 0))}\n\n"
        f"Greedy answers to held-out rows: from gist rows, by {full},\nand by the trained model without any."
    )


def _versions() -> dict[str, str]:
    found = {"gistkern": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
