"""Context parallelism over processes of this machine: bytes on the wire, memory and work of every rank.

    python -m bench.measured.context_parallel         # 1, 2 and 4 gloo processes, into docs/evidence/context-parallel.*

One training step (forward and backward) of a model with random weights on one context. What the ranks send goes through
the loopback device, whose bytes the kernel counts: that is the wire. Times are not reported: the ranks share two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from bench.calculated.scale import ring_bytes
from bench.markdown import table
from bench.measured.memory import ENVIRONMENT, resident, start_peak
from bench.measured.models import MODELS
from bench.rows import write_report
from bench.shapes import SEGMENTS
from gistkern import GistLayout, patch_llama
from gistkern.distributed import count_traffic, split_layout
from gistkern.hf.context_parallel import row_cost

__all__ = ["main", "page", "step_on_this_rank"]

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence"
MODEL = "SmolLM2-135M, 4 of 30 layers"
RANKS = (1, 2, 4)
ROWS = 8192
SCHEMES = ("64/4", "512/8")


def step_on_this_rank(scheme: str) -> dict[str, Any]:
    """One step of the group's model on one context: what this rank received, held and computed."""
    torch.manual_seed(0)
    raw, gists = SEGMENTS[scheme]
    group = dist.group.WORLD
    handle = patch_llama(
        LlamaForCausalLM(LlamaConfig(**MODELS[MODEL], max_position_embeddings=131072)),
        num_gist_tokens=gists,
        sink_tokens=0,
        context_parallel=group if dist.get_world_size() > 1 else None,
    )
    config = handle.model.config
    segment = [*range(1, raw + 1), *handle.gist_token_ids]
    ids = torch.tensor([segment * (ROWS // len(segment))])

    def step() -> None:
        handle.model(ids, labels=ids.clamp(max=raw), use_cache=False).loss.backward()

    step()  # threads, buffers of gloo, and gradients that stay
    gc.collect()
    dist.barrier()
    wire = _loopback()
    dist.barrier()  # none begins before all have read the counter
    before = start_peak()
    with count_traffic() as traffic:
        step()
    peak = resident("VmHWM") - before
    dist.barrier()
    wire = _loopback() - wire
    layout = GistLayout.from_input_ids(ids, handle.gist_token_ids, sink_tokens=0)
    shards = split_layout(layout, dist.get_world_size(), row_cost(handle.inner))
    return {
        "rows": ids.shape[1],
        "work": shards[dist.get_rank()].work,
        "gist rows": ids.shape[1] // len(segment) * gists,
        "received": traffic.received,
        "peak bytes": peak,
        "wire bytes of all ranks": wire,
        "ring attention would receive": config.num_hidden_layers
        * ring_bytes(ids.shape[1], dist.get_world_size(), config.num_key_value_heads, config.head_dim, 4, True),
    }


def _loopback() -> int:
    """Bytes that processes of this machine have received from one another."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def _worker(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for scheme in SCHEMES:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, step_on_this_rank(scheme))
        found[scheme] = every
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def measured() -> dict[str, Any]:
    """The report over all numbers of processes."""
    report: dict[str, Any] = {
        "grade": "measured",
        "command": "python -m bench.measured.context_parallel",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": MODEL,
        "runs": [],
    }
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            subprocess.run(
                [*command, "-m", "bench.measured.context_parallel", "--worker", str(out)],
                check=True,
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            )
            for scheme, every in json.loads(out.read_text()).items():
                report["runs"].append({"scheme": scheme, "ranks": ranks, "by rank": every})
    return report


def page(report: dict[str, Any]) -> str:
    """docs/evidence/context-parallel.md."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines, whole, excess = [], {}, []
    for run in report["runs"]:
        every, ranks = run["by rank"], run["ranks"]
        peaks = [one["peak bytes"] for one in every]
        whole.setdefault(run["scheme"], max(peaks))
        received = [sum(one["received"].values()) for one in every]
        wire, ring = every[0]["wire bytes of all ranks"], every[0]["ring attention would receive"]
        if ranks > 1:
            excess.append(wire / sum(received))
        lines.append(
            [
                run["scheme"],
                f"{every[0]['rows']:,}",
                f"{every[0]['gist rows']:,}",
                ranks,
                ", ".join(f"{size:,}" for size in received) if ranks > 1 else "",
                f"{sum(received):,}" if ranks > 1 else "",
                f"{wire:,}" if ranks > 1 else "",
                f"{ring * ranks:,}" if ranks > 1 else "",
                ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks),
                f"{max(peaks) / whole[run['scheme']]:.2f}",
                f"{sum(one['work'] for one in every) / ranks / max(one['work'] for one in every):.2f}",
            ]
        )
    head = ["segments", "rows", "gist rows", "ranks", "received, by rank (counted)", "of all", "on the wire"]
    head += [
        "ring attention, of all (calculated)",
        "peak of a step, MiB, by rank",
        "largest, of one process's",
        "balance",
    ]
    return f"""# Context parallelism, measured

Grade **measured**: `{report["command"]}` on {report["machine"]}, {versions}, gloo. One training step,
forward and backward, of {report["model"]} (random weights, fp32) on one context, shared by several
processes of one machine.

*Counted* are the bytes that `gistkern.distributed.count_traffic` notes where a rank receives rows; *on the wire* is
what the kernel's counter of the loopback device grew by in the same step, all ranks together, packet headers and gloo's
own protocol included. *Peak* is the growth of a process's resident set over the step, weights and their gradients not
counted. *Balance* is the mean over the largest work of a rank, as `split_layout` counts it.

{table(head, lines)}

The wire carries {min(excess):.2f} to {max(excess):.2f} times the counted bytes. Half of these are the backward's, and
an all-reduce, which moves twice what a reduce-scatter has to, would make it 1.5: that is what gloo seems to do for it.
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _worker(given.worker)
        return
    report = measured()
    write_report(EVIDENCE / "context-parallel.json", report)
    (EVIDENCE / "context-parallel.md").write_text(page(report))


if __name__ == "__main__":
    main()
