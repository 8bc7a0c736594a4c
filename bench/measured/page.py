"""docs/benchmarks.md from the report of bench.measured.report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.markdown import table
from bench.measured import decoding
from bench.measured.baselines import BASELINES
from bench.measured.case import OURS
from bench.measured.models import FULL, PREFILL
from bench.measured.queueing import SDPA
from bench.measured.targets import aims
from bench.measured.timing import PATIENCE

__all__ = ["page"]

NONE = "not measured"
FEW = 4

_INTRO = """# Benchmarks

Grade **measured**: `{command}` on {device} ({machine}{instructions}), {threads},
{versions}. Medians of {rounds} rounds ({twice} in decoding), of fewer where they took longer than {patience:.0f}
seconds and the table says so; smallest and largest in brackets. Within a round every call follows the other, in one
process, every round begins with another one, and every number is a ratio of two of them: *2.0* in a column means that
it takes twice as long as gistkern on the same inputs. Every baseline is checked equal to ours before anything is timed,
except causal SDPA, which ignores the mask. What no one measured says "not measured", and below each table why. Layouts
have one sink row, models none.

*Of peak* is the share of the speed of matrix products in the same rounds that a call reaches, counting the operations
on the pairs that the mask lets see each other and no others; *of copy* the same for the bytes of keys and values,
against a copy of 256 MiB (small caches are read from the processor's own, hence shares above 1)."""

_ON_GPU = """Attention, compaction and decoding ops are timed on the device, behind work that empties its caches and
lasts while the host queues the call, decoding ops as replayed CUDA graphs; whole models and layouts by the host's
clock, as a user waits for them."""

_ATTENTION = """## Attention

One layer, batch size 1, fp32 on a CPU and bf16 on a GPU; *backward* are the gradients of q, k and v of a forward made
before, *both* one after the other. Layouts: raw tokens per segment / gists per segment; *one segment* is a causal text
without gists; *hierarchical* are segments of 256 with 8 gists and a summary of 10; *packed* are ragged documents in one
row; *sliding* is a window of 512 with a gist every 64 tokens. Masks, indices and block masks are made once, outside the
clock, as for all layers of a model."""

_GROWTH = """## Growth with the rows

Forward, {heads}: time as a multiple of ours for 512/8 at {first:,} rows; medians of {rounds} rounds, whose widest
spread is {spread}. In 512/8 every segment sees the gists of all earlier ones, so its pairs grow faster than its rows;
hierarchical segments do not see each other's."""

_COMPACTION = """## Compaction: the op

Gathering the gist rows of a layer's keys and values out of a prefill. `compress` below holds it too."""

_DECODING = """## Decoding: the op

One query row per sample over gist rows and an uncompressed tail, {heads} heads. The baselines read one contiguous
buffer of the same rows, SDPA with the query heads of a key head as its query rows (so that it reads a key once)."""

_QUEUEING = """## Queueing a call

Microseconds that the host takes to queue one call, {heads} heads, beside SDPA. They are hidden where the device works
longer than that for each call (the other tables), and are all there is to see where it does not."""

_MODELS = """## Decoding: the model

One step of a whole model with random weights, over a GistCache of {rows} gist rows and over transformers' DynamicCache
of the whole context (the same weights, unpatched, SDPA). *Tokens per second* are ours by DynamicCache's; of copy is the
share of the copy's speed at which a step reads its weights and its cache."""

_COMPRESSING = """## Compressing

Reading a context: `compress` in segments of 512, as one segment, and the plain prefill that fills a DynamicCache.
Ratios to `compress` in segments."""

_LAYOUTS = """## Making the layout

Once per batch, from the token ids: a `GistLayout`, a dense boolean mask, and FlexAttention's block mask."""

_MEMORY = """## Peak memory

Of one call above its inputs (on a CPU in a process of its own); a mask that a baseline keeps counts."""


def page(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page of a report; `pictures` are paths by section, ``report["notes"]`` what whoever measured has to say."""
    threads = "one thread" if report["threads"] == 1 else f"{report['threads']} threads"
    facts = {
        **report,
        "threads": threads,
        "twice": 2 * report["rounds"],
        "patience": PATIENCE,
        "instructions": f", {report['instruction_set']} kernels" if report["instruction_set"] else "",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    }
    on_gpu = [] if report["instruction_set"] else [_ON_GPU]
    notes = "\n".join(f"- {note}" for note in report.get("notes", []))
    parts = [_INTRO.format(**facts), *on_gpu, *([notes] if notes else []), "## Aims", _aims(report)]
    for name, section in _SECTIONS.items():
        if report.get(name):
            parts += section(report[name])
            parts += [f"![{name}]({pictures[name]})"] if name in pictures else []
    return "\n\n".join(parts) + "\n"


def _aims(report: Mapping[str, Any]) -> str:
    said = {True: "met", False: "**missed**", None: NONE}
    found = aims(report)
    rows = table(["aim", "found", ""], [[aim.wanted, aim.found, said[aim.met]] for aim in found])
    missed = [f"- {aim.wanted}: {aim.why}." for aim in found if aim.met is False and aim.why]
    return "\n\n".join([rows, *(["Why some are missed:\n\n" + "\n".join(missed)] if missed else [])])


def _attention(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["layout", "rows", "heads", "pass", "ours, of peak", *(b.title for b in BASELINES.values()), "rounds"]
    lines = [
        [
            row["layout"],
            f"{row['rows']:,}",
            row["heads"],
            row["pass"],
            _spread(row["of_limit"][OURS]),
            *(_slower(row, name) for name in BASELINES),
            row["rounds"],
        ]
        for row in rows
    ]
    return [_ATTENTION, table(head, lines), *_reasons(rows, "layout", "pass", "rows")]


def _growth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes = sorted({row["rows"] for row in rows})
    series = dict.fromkeys((row["layout"], row["name"]) for row in rows)
    lines = []
    for layout, name in series:
        title = "gistkern" if name == OURS else BASELINES[name].title
        cells = {r["rows"]: r for r in rows if (r["layout"], r["name"]) == (layout, name)}
        lines.append([layout, title, *(_short(cells[size].get("time")) for size in sizes)])
        if name == OURS:
            first = cells[sizes[0]]["visible_pairs"]
            pairs = [f"{cells[size]['visible_pairs'] / first:.1f}" for size in sizes]
            lines.append([layout, "visible pairs, of those at the fewest rows", *pairs])
    widest = max(((r["time"]["max"] - r["time"]["min"]) / r["time"]["median"] for r in rows if "time" in r), default=0)
    facts = {"heads": rows[0]["heads"], "rounds": rows[0]["rounds"], "spread": f"{widest:.0%} of the median"}
    text = _GROWTH.format(first=sizes[0], **facts)
    named = [{**row, "not_measured": {row["name"]: why} if (why := row.get("not_measured")) else {}} for row in rows]
    head = ["layout", "", *(f"{size:,}" for size in sizes)]
    return [text, table(head, lines), *_reasons(named, "rows")]


def _decoding(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sizes = ("gist rows", "tail rows", "batch")
    head = [*sizes, "ours, of copy", "SDPA, of copy", *decoding.BASELINES.values()]
    lines = [
        [
            *(f"{row[size]:,}" for size in sizes),
            _spread(row["of_limit"][OURS]),
            _spread(row["of_limit"].get("sdpa")),
            *(_slower(row, name) for name in decoding.BASELINES),
        ]
        for row in rows
    ]
    return [_DECODING.format(heads=rows[0]["heads"]), table(head, lines), *_reasons(rows)]


def _compaction(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["layout", "rows", "heads", "ours, of copy", "indexing"]
    lines = [
        [row["layout"], f"{row['rows']:,}", row["heads"], _spread(row["of_limit"][OURS]), _slower(row, "indexing")]
        for row in rows
    ]
    return [_COMPACTION, table(head, lines), *_reasons(rows)]


def _queueing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [[row["call"], _spread(row[OURS]), _spread(row[SDPA])] for row in rows]
    return [_QUEUEING.format(heads=rows[0]["heads"]), table(["call", "gistkern", "SDPA"], lines)]


def _models(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["model", "context", "batch", "bytes, GistCache", "DynamicCache", "of it", "tokens per second"]
    lines = [
        [
            row["model"],
            f"{row['context']:,}",
            row["batch"],
            f"{row['gist bytes']:,}",
            f"{row['full bytes']:,}",
            f"1/{row['full bytes'] / row['gist bytes']:.1f}",
            _slower(row, FULL),
            *(_spread(row["of_limit"].get(name)) for name in (OURS, FULL)),
            row["rounds"],
        ]
        for row in rows
    ]
    head += ["ours, of copy", "DynamicCache, of copy", "rounds"]
    return [_MODELS.format(rows=rows[0]["gist rows"]), table(head, lines), *_reasons(rows, "model", "context", "batch")]


def _compressing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("compress, one segment", PREFILL)
    lines = [
        [row["model"], f"{row['tokens']:,}", *(_slower(row, name) for name in names), row["rounds"]] for row in rows
    ]
    return [_COMPRESSING, table(["model", "tokens", *names, "rounds"], lines), *_reasons(rows)]


def _layouts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("dense mask", "block mask")
    lines = [[row["layout"], f"{row['rows']:,}", *(_slower(row, name) for name in names)] for row in rows]
    return [_LAYOUTS, table(["layout", "rows", *names], lines), *_reasons(rows)]


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        ours = next(r["peak bytes"] for r in rows if r["case"] == row["case"] and r["name"] == OURS)
        title = "gistkern" if row["name"] == OURS else row["name"]
        what = ", ".join(str(part) for part in row["case"][1:-1])
        if "peak bytes" in row:
            lines.append([what, title, f"{row['peak bytes']:,}", f"{row['peak bytes'] / max(ours, 1):.1f}"])
        else:
            lines.append([what, title, f"{NONE}: {row['not_measured']}", ""])
    return [_MEMORY, table(["case", "", "bytes", "of ours"], lines)]


_SECTIONS = {
    "attention": _attention,
    "growth": _growth,
    "compaction": _compaction,
    "decoding": _decoding,
    "queueing": _queueing,
    "models": _models,
    "compressing": _compressing,
    "layouts": _layouts,
    "memory": _memory,
}


def _reasons(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[str]:
    """Why cells are empty, each reason once; `keys` name the rows for which it holds, where they are few."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        place = ", ".join(f"{row[key]:,} {key}" if isinstance(row[key], int) else row[key] for key in keys)
        for name, reason in row["not_measured"].items():
            found.setdefault((name, reason), []).append(place)
    lines = []
    for (name, reason), places in found.items():
        named = "; ".join(dict.fromkeys(places)) if len(places) <= min(FEW, len(rows) - 1) else ""
        lines.append(f"- {name}: {reason}" + (f" ({named})" if named else ""))
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def _slower(row: Mapping[str, Any], name: str) -> str:
    return _spread(row["slower_than_ours"].get(name))


def _spread(value: Mapping[str, float] | None) -> str:
    if value is None:
        return NONE
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _short(value: Mapping[str, float] | None) -> str:
    return NONE if value is None else f"{value['median']:.1f}"
