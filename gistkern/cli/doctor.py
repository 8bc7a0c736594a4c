"""What works on this machine: versions, devices, backends, and a verdict. Exit status 1 if something is broken.

    gistkern doctor                              # add --json for programs
    gistkern doctor --model NAME --tokens 32000  # instead: what reading such a context takes, and which cards hold it
    gistkern doctor --model NAME --tokens 6000 --train --4bit

The second form calculates from the model's configuration alone (docs/guides/memory.md says how far off it is).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gistkern.cli.parser import at_least
from gistkern.cli.source import look_for
from gistkern.progress import announce
from gistkern.tables import as_text, nbytes_said

if TYPE_CHECKING:
    from gistkern.memory import Needs, Plan

__all__ = ["add_arguments", "run"]

# of `gistkern.memory.OPTIMIZERS`, which takes seconds to import; a test compares them
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--json", action="store_true", help="machine-readable")
    memory = parser.add_argument_group("memory, calculated")
    memory.add_argument("--model", help="folder or hub name; only its config.json is read")
    memory.add_argument("--tokens", type=at_least(1), help="of a context")
    memory.add_argument("--gists", type=at_least(1), default=10, help="gist tokens of a context or segment (10)")
    memory.add_argument("--segment-length", type=at_least(1), help="tokens of a segment; a context is one by default")
    memory.add_argument("--4bit", dest="four_bit", action="store_true", help="weights as bitsandbytes loads them")
    memory.add_argument("--batch", type=at_least(1), default=1, help="contexts read or trained on together (1)")
    memory.add_argument("--train", action="store_true", help="a training step too")
    memory.add_argument("--lora", type=at_least(0), default=16, metavar="RANK", help="16; 0 trains all weights")
    memory.add_argument("--tail", type=at_least(1), default=64, help="tokens of question and answer (64)")
    memory.add_argument("--optim", choices=_OPTIMIZERS, default="adamw_torch_fused", help="of TrainingArguments")
    memory.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="of activations; by default with --4bit"
    )


def run(given: argparse.Namespace) -> None:
    """Print one of the two reports."""
    announce("looking at versions, devices and backends" if not given.model else f"reading what {given.model} is")
    if given.model or given.tokens:
        if not (given.model and given.tokens):
            raise ValueError("--model and --tokens go together: whose memory, and for how long a context?")
        _memory(given)
        return
    from gistkern.doctor import report

    facts = report()
    if given.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
        _print_verdict(facts["verdict"])
    if not facts["verdict"]["usable"]:
        sys.exit(1)


def _print_facts(facts: dict[str, Any]) -> None:
    print(f"gistkern {facts['gistkern']}, Python {facts['python']}, {facts['platform']}\n")
    packages = [
        [name, version or "not installed", _range(facts["tested"].get(name))]
        for name, version in facts["packages"].items()
    ]
    print(as_text(["package", "version", "tested"], packages, left=(0, 1, 2), wraps=(2,)))
    backends = [
        [row["name"], row["device"], "yes" if row["usable"] else f"no: {row['reason']}", row["what"]]
        for row in facts["backends"]
    ]
    print(f"\n{as_text(['backend', 'on', 'usable', 'what'], backends, left=range(4), wraps=(2, 3))}\n")
    devices = [
        [key, f"{value:,}" if key == "memory" else str(value)] for one in facts["devices"] for key, value in one.items()
    ]
    extension = facts["extension"]
    if extension["loaded"]:
        compiled = extension["cuda_archs"]
        cuda = f"CUDA kernels for {compiled}" if compiled else "no CUDA kernels (built without nvcc)"
        what = f"{extension['file']}: CPU kernels for {extension['instruction_set']}, {cuda}"
    else:
        what = f"not loaded: {extension['reason']}"
    tiles = facts["tuned_configs"] or "as shipped (GISTKERN_CONFIGS names no file)"
    rows = [*devices, ["extension", what], ["tile configs", tiles]]
    print(f"{as_text(['machine', ''], rows, left=(0, 1), wraps=(1,))}\n")


def _range(tested: dict[str, Any] | None) -> str:
    """What stands behind a version."""
    if tested is None or tested["within"] is None:
        return ""
    versions = f"{tested['oldest']} to {tested['newest']}"
    return versions if tested["within"] else f"NOT TESTED: {versions} are"


def _print_verdict(verdict: dict[str, Any]) -> None:
    print("verdict: " + ("usable" if verdict["usable"] else "BROKEN"))
    for line in verdict["broken"]:
        print(f"  broken      {line}")
    print(f"  CPU calls   {_served(verdict['cpu'])}")
    print(f"  GPU calls   {'no GPU that torch sees' if verdict['gpu'] is None else _served(verdict['gpu'])}")
    for line in verdict["missing"]:
        print(f"  missing     {line['what']}\n              -> {line['install']}")
    untested = ", ".join(verdict["untested"])
    print(f"  versions    {f'not tested: {untested}' if untested else 'in the tested range'}")


def _served(names: list[str]) -> str:
    first, *others = names or ["nothing"]
    return f"served by {first}" + (f"; what it cannot, by {', then '.join(others)}" if others else "")


def _memory(given: argparse.Namespace) -> None:
    if given.train and given.four_bit and not given.lora:
        raise ValueError("4-bit weights cannot be trained: with --4bit --lora is at least 1")
    look_for(given.model)
    from transformers import AutoConfig

    from gistkern.memory import Plan, needs

    plan = Plan(
        tokens=given.tokens,
        gists=given.gists,
        segment_length=given.segment_length,
        four_bit=given.four_bit,
        batch=given.batch,
        lora=given.lora,
        tail=given.tail,
        optimizer=given.optim,
        checkpointing=given.checkpointing,
    )
    try:
        config = AutoConfig.from_pretrained(given.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the configuration of {given.model} (a base model's, of no adapter): {error}"
        ) from error
    from gistkern.hf.refusals import refuse

    try:
        refuse(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given.model}: {error}") from error
    found = needs(config, plan, given.train)
    if given.json:
        print(json.dumps(_plain(found, plan), indent=2))
    else:
        _print_needs(given.model, found, plan)


def _plain(found: Needs, plan: Plan) -> dict[str, Any]:
    from gistkern.memory import CARDS

    training = found.training._asdict() if found.training else None
    sizes = {name: value for name, value in asdict(found).items() if name != "training"}
    fits = {f"{card} GB": found.fits(card) for card in CARDS}
    return {"plan": asdict(plan), **sizes, "training": training, "peaks": found.peaks, "fits": fits}


def _print_needs(model: str, found: Needs, plan: Plan) -> None:
    from gistkern.memory import CARDS, RESERVE

    kind = "4-bit layers" if plan.four_bit else "bfloat16"
    print(f"{model}, calculated: {found.parameters:,} parameters, {plan.batch} x {plan.tokens:,} tokens")
    rows = {
        f"weights, {kind}": found.weights,
        f"full cache of {plan.tokens:,} tokens": found.full_cache,
        f"gist cache, {found.gist_rows:,} rows ({found.full_cache / found.gist_cache:,.0f}x less)": found.gist_cache,
        "peak of a plain prefill, weights and cache in it": found.prefill_peak,
        "peak of compress, weights and cache in it": found.compress_peak,
    }
    if found.training:
        what = f"LoRA of rank {plan.lora}" if plan.lora else "all weights"
        trained = f"{found.training.trainable_parameters:,} parameters"
        rows[f"peak of a training step, {what}, {trained}"] = found.training.total
    sizes = [[name, f"{size / 1e9:,.3f} GB" if size >= 1e8 else nbytes_said(size)] for name, size in rows.items()]
    print(f"\n{as_text(['', 'calculated'], sizes)}")
    fits = {card: found.fits(card) for card in CARDS}
    ways = list(fits[CARDS[0]])
    cards = [[f"{card} GB", *("yes" if fits[card][way] else "no" for way in ways)] for card in CARDS]
    print(f"\nfits a card of, with {RESERVE / 1e9:g} GB kept for the driver and fragments:\n")
    print(as_text(["", *ways], cards))
