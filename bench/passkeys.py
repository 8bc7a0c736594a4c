"""Tables of docs/results.md from committed passkey reports: answers, swaps, both caches side by side."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.fill import RESULTS
from bench.markdown import columns, measured_on, table

Row = Mapping[str, Any]
TINY = [f"tiny-seed{seed}" for seed in range(3)]
PRETRAINED = "smollm2-seed0"
COMMANDS = {
    "tiny-seed0": "python examples/train_niah.py --preset tiny --seed N",
    PRETRAINED: "python examples/train_niah.py --preset smollm2; "
    "python examples/eval_niah.py --checkpoint runs/smollm2 --output runs/smollm2 --full 10",
    "tiny-leak": "python examples/train_niah.py --leak",
    "vllm": "python examples/serve.py vllm --output runs/serving",
}
LANGUAGES = {"en": "English", "ko": "Korean"}


def report(name: str) -> dict[str, Any]:
    """A committed report."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def tables() -> dict[str, str]:
    """All of them, by the names of their places."""
    tiny, pretrained = [report(name) for name in TINY], report(PRETRAINED)
    made = {f"measured on, {name}": _measured_on(name) for name in COMMANDS}
    every = list(zip(*(one["rows"] for one in tiny), strict=True))
    made["tiny"] = _seeds(every, lambda row: row["wordings"] == "training")
    made["smollm2"] = _pretrained(pretrained, lambda row: row["wordings"] == "training")
    made["tiny, held-out wordings"] = _seeds(every, lambda row: row["wordings"] != "training", "")
    made["smollm2, held-out wordings"] = _pretrained(pretrained, lambda row: row["wordings"] != "training", "")
    made["eviction"] = _eviction(report("smollm2-kvpress"), pretrained)
    made["leak"] = _leak(report("tiny-leak"))
    runs = {
        **dict(zip(TINY, tiny, strict=True)),
        PRETRAINED: pretrained,
        "smollm2-mean-seed0": report("smollm2-mean-seed0"),
    }
    made["swap"] = _swap(runs)
    made["both caches"] = _both_caches({name: run for name, run in runs.items() if name in (*TINY, PRETRAINED)})
    served = report("vllm")
    asked = served["requests"]
    right = [f"{served['right'][engine]} of {asked}" for engine in ("transformers", "vllm")]
    engines = [["transformers, `GistStore` and `generate`", right[0], ""]]
    engines += [["vLLM, the same weights unpatched", right[1], f"{served['same']} of {asked}"]]
    made["vllm"] = table(["engine", "right answers", "same answer as transformers"], engines, 3)
    return made


def _measured_on(name: str) -> str:
    found = report(name)["environment"]
    threads = f"{found['machine']}, {found['threads']} thread" + "s" * (found["threads"] > 1)
    return measured_on({"grade": "measured", "command": COMMANDS[name], **found, "machine": threads})


def answered(row: Row) -> str:
    """The percentage of exact answers, and its interval of 95 %."""
    return f"{100 * row['exact']:.1f} ({100 * row['wilson_low']:.1f} to {100 * row['wilson_high']:.1f})"


def _questions(row: Row) -> str:
    return LANGUAGES[row["language"]] + ", real prose" * (row["filler"] == "prose")


def _anchor(row: Row, prefix: str) -> str:
    """What other pages link to: the English row of a ratio."""
    linked = prefix and row["language"] == "en" and (row["filler"] == "prose") == (prefix == "smollm2")
    return f'<a id="{prefix}-{row["ratio"]:.0f}x"></a>' if linked else ""


def _sizes(prefix: str) -> dict[str, str | Callable[[Any], Any]]:
    return {
        "questions": lambda row: _anchor(row[0], prefix) + _questions(row[0]),
        "tokens (ratio)": lambda row: f"{row[0]['tokens']:,} ({row[0]['ratio']:,.0f}x)",
        "kB kept": lambda row: f"{row[0]['gist_kv_bytes'] / 1e3:,.0f} of {row[0]['full_kv_bytes'] / 1e3:,.0f}",
        "n": lambda row: row[0]["n"],
    }


def _seeds(rows: Iterable[tuple[Row, ...]], kept: Callable[[Row], bool], prefix: str = "tiny") -> str:
    seeds = {f"seed {seed}": lambda row, seed=seed: answered(row[seed]) for seed in range(3)}
    return columns((row for row in rows if kept(row[0])), _sizes(prefix) | seeds)


def _pretrained(run: Row, kept: Callable[[Row], bool], prefix: str = "smollm2") -> str:
    full = {"base model, whole context": lambda row: f"{row[1]['exact'] * row[1]['n']:.0f} of {row[1]['n']}"}
    gist = {"from gist rows": lambda row: answered(row[0])}
    pairs = zip(run["rows"], run["full_context"], strict=True)
    return columns((pair for pair in pairs if kept(pair[0])), _sizes(prefix) | gist | full)


def _eviction(run: Row, trained: Row) -> str:
    """Exact answers by method and rows kept; in brackets the digits."""
    rows = {(row["method"], row["gist_tokens"]): row for row in run["rows"]}
    counts = sorted({kept for _, kept in rows})
    (ours,) = [row for row in trained["rows"] if same_questions(row, run["rows"][0])]
    rows["gist", ours["gist_tokens"]] = ours
    named = {"gist": "gist rows of the trained model", "full": "full cache", **run["methods"]}

    def cell(row: Row | None) -> str:
        return f"{row['exact']:.0%} ({row['digit']:.0%})" if row else "-"

    lines = ([text, *(cell(rows.get((name, kept))) for kept in counts)] for name, text in named.items())
    heads = [f"{kept:,} rows, {ours['tokens'] / kept:.0f}x" for kept in counts]
    return table(["method", *heads], lines)


def same_questions(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("language", "tokens", "filler", "wordings"))


def _leak(run: Row) -> str:
    seen = {row["language"]: row for row in run["context_visible"]}
    cells = {
        "questions": lambda row: LANGUAGES[row["language"]],
        "tokens": "tokens",
        "n": "n",
        "with the context in sight": lambda row: f"{100 * seen[row['language']]['exact']:.1f}",
        "from the gist rows alone": answered,
    }
    return columns(run["rows"], cells)


def _swap(runs: Mapping[str, Row]) -> str:
    said = ("answers_of_the_swapped_cache", "answers_of_the_own_context")
    lines = [[name, run["swap"]["n"], *(f"{run['swap'][key]:.0%}" for key in said)] for name, run in runs.items()]
    return table(["run", "n", "says the other's key", "says its own"], lines)


def _both_caches(runs: Mapping[str, Row]) -> str:
    lines = []
    for name, run in runs.items():
        sides = run["side_by_side"]
        gist, full = sides["gist"], sides["full"]

        def beside(key: str, unit: float | None = None, gist: Row = gist, full: Row = full) -> str:
            values = f"{gist[key] / unit:.2f} / {full[key] / unit:.2f} = " if unit else ""
            return f"{values}{gist[key] / full[key]:.2f}"

        cells = [beside("time_to_first_token_s", 1), beside("decode_tokens_per_s"), beside("prefill_peak_bytes", 1e6)]
        cells += [beside("decode_peak_bytes"), f"{gist['total_s'][-1] / full['total_s'][-1]:.2f}"]
        lines.append([name, f"{sides['tokens']:,}", *cells])
    head = ["run", "tokens", "first token, s", "decoding speed", "peak of reading, MB", "peak of decoding"]
    return table([*head, "time of 8 questions"], lines)
