"""Context parallelism over processes of this machine: bytes on the wire, memory and work of every rank.

    python -m bench.measured.context_parallel    # 1, 2 and 4 gloo processes, into docs/results/context-parallel.json

One training step (forward and backward) of a model with random weights on one context. What the ranks send goes through
the loopback device, whose bytes the kernel counts: that is the wire. Times are not reported: the ranks share two cores.
"""

import argparse
import gc
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from bench.calculated.scale import ring_bytes
from bench.fill import RESULTS, fill_results
from bench.markdown import columns, measured_on
from bench.measured.memory import ENVIRONMENT, resident, start_peak
from bench.measured.models import MODELS
from bench.rows import write_report
from bench.shapes import SEGMENTS
from gistkern import GistLayout, patch_llama
from gistkern.distributed import count_traffic, split_layout
from gistkern.hf.context_parallel import row_cost

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


def _worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found = {}
    for scheme in SCHEMES:
        found[scheme] = [None] * ranks
        dist.all_gather_object(found[scheme], step_on_this_rank(scheme))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured() -> dict[str, Any]:
    """The report over all numbers of processes."""
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": "1"})  # of the processes, which are started afresh
    runs = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_worker, (ranks, folder), ranks)
            found = json.loads(Path(folder, "found.json").read_text())
            runs += [{"scheme": scheme, "ranks": ranks, "by rank": every} for scheme, every in found.items()]
    return {
        "grade": "measured",
        "command": "python -m bench.measured.context_parallel",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": MODEL,
        "runs": runs,
    }


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Its tables of docs/results.md."""
    runs = report["runs"]
    alone = {run["scheme"]: run["by rank"][0]["peak bytes"] for run in runs if run["ranks"] == 1}

    def of_all(run: dict[str, Any], key: str) -> list[int]:
        return [one[key] for one in run["by rank"]]

    cells = {
        "segments": "scheme",
        "rows": lambda run: run["by rank"][0]["rows"],
        "gist rows": lambda run: run["by rank"][0]["gist rows"],
        "ranks": "ranks",
        "received (counted)": lambda run: sum(sum(one.values()) for one in of_all(run, "received")),
        "on the wire": lambda run: run["by rank"][0]["wire bytes of all ranks"],
        "ring attention (calculated)": lambda run: sum(of_all(run, "ring attention would receive")),
        "peak, MiB, largest rank": lambda run: round(max(of_all(run, "peak bytes")) / 2**20),
        "of one process's": lambda run: f"{max(of_all(run, 'peak bytes')) / alone[run['scheme']]:.2f}",
        "balance": lambda run: f"{sum(of_all(run, 'work')) / run['ranks'] / max(of_all(run, 'work')):.2f}",
    }
    return {"measured on": measured_on(report), "ranks": columns(runs, cells)}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    report = measured()
    path = RESULTS / "context-parallel.json"
    write_report(path, report)
    fill_results(path, tables(report))


if __name__ == "__main__":
    main()
