"""The benchmarks: baselines that compute something else are refused, and what is measured is what is written."""

import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bench import pages
from bench.fill import filled, places
from bench.measured import baselines, context_parallel, flex, report, sections, timing
from bench.measured.attention import PASSES, attention_case
from bench.measured.baselines import BASELINES, Baseline, runs_of
from bench.measured.case import OURS, Case, measured
from bench.measured.decoding import compaction_case, decoding_case, queued_calls
from bench.measured.grid import GRIDS
from bench.measured.layouts import layout_case
from bench.measured.memory import peak_bytes
from bench.measured.models import compressing_case, model_decoding_case, models
from bench.measured.timing import interleaved, ratio
from bench.shapes import LAYOUTS, layout_of
from gistkern import GistLayout, gist_attention

DOCS = Path(__file__).parents[2] / "docs"
SMALL = "2 heads, D 64"
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.xdist_group("bench"),  # one report serves several tests
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling FlexAttention takes minutes; its own Python path computes the same."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_baseline_of_every_layout_is_checked_and_called(layout, passes):
    case = attention_case(layout, 601, SMALL, passes)
    assert set(case.calls) | set(case.not_measured) == {OURS, "matmul", *BASELINES}
    assert {"sdpa dense", "causal"} < set(case.calls)
    # 4 D per pair forward, 2.5 times that backward
    pairs = int(layout_of(layout, 601).dense().sum()) * 2
    assert case.work == {"forward": 4, "backward": 10, "both": 14}[passes] * 64 * pairs


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if baseline.masked][:4])
def test_a_baseline_that_sees_too_much_is_refused(monkeypatch, name, passes):
    wrong = dataclasses.replace(BASELINES["causal"], masked=True)
    monkeypatch.setitem(BASELINES, name, wrong)
    part = "dq" if passes == "backward" else "output"
    with pytest.raises(AssertionError, match=f"{name}, {part}"):
        attention_case("64/4", 200, SMALL, passes, only=[name])


def test_a_wrong_gradient_is_refused(monkeypatch):
    def plan(layout):
        return lambda q, k, v: gist_attention(q, k, v.detach() + 0 * v, layout)

    monkeypatch.setitem(BASELINES, "sdpa dense", Baseline("no gradient of v", plan))
    attention_case("64/4", 200, SMALL, "forward", only=["sdpa dense"])
    with pytest.raises(AssertionError, match="sdpa dense, dv"):
        attention_case("64/4", 200, SMALL, "both", only=["sdpa dense"])


def test_masks_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(timing, "LARGEST_ON_CPU", 1000)
    case = attention_case("64/4", 200, SMALL)
    assert set(case.calls) == {OURS, "sdpa per segment", "causal", "matmul"}
    assert case.not_measured["sdpa dense"].startswith("its mask would take")
    assert case.not_measured["flex permuted"].startswith("making its block mask would take")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "sliding"])
def test_runs_see_what_the_layout_says(layout):
    whole = layout_of(layout, 700)
    seen = torch.zeros_like(whole.dense()[0])
    for run in runs_of(whole):
        for row in range(run.begin, run.end):
            seen[row, run.gist_begin : run.gist_end] = True
            seen[row, whole.num_compact + run.local_begin : whole.num_compact + row + 1] = True
    assert torch.equal(seen, whole.dense()[0])


def test_runs_of_a_batch_are_refused():
    layout = layout_of("64/4", 100)
    with pytest.raises(ValueError, match="one batch row"):
        runs_of(GistLayout.stack([layout, layout]))


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """What flash_attn_varlen_func documents: sequences side by side, causal from the lower right corner."""
    assert causal
    bounds = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    assert (bounds[0][-1], bounds[1][-1]) == (len(q), len(k))
    lengths = [[b - a for a, b in itertools.pairwise(one)] for one in bounds]
    assert (max(lengths[0]), max(lengths[1])) == (max_seqlen_q, max_seqlen_k)
    out = []
    pieces = q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1])
    for rows, keys, values in zip(*pieces, strict=True):
        mask = torch.ones(len(rows), len(keys), dtype=torch.bool).tril(len(keys) - len(rows))
        one = (t.transpose(0, 1)[None] for t in (rows, keys, values))
        out.append(F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "sliding"])
def test_varlen_plans_attend_as_we_do(layout):
    whole = layout_of(layout, 650)
    q, k, v = torch.randn(1, 4, 650, 16), *torch.randn(2, 1, 2, 650, 16)
    torch.testing.assert_close(baselines.flash_varlen(whole, varlen)(q, k, v), gist_attention(q, k, v, whole))


def test_gpu_packages_say_why_they_do_not_serve():
    layout = layout_of("64/4", 100)
    assert BASELINES["flash-attn 2"].why_not(layout, 4) == "flash_attn needs a GPU"
    assert decoding_case(3, 2, 1, SMALL).not_measured == {"sdpa cuDNN": "needs a GPU"}


def test_decoding_counts_the_bytes_of_its_rows():
    case = decoding_case(10, 6, 3, SMALL)
    assert set(case.calls) == {OURS, "sdpa", "copy"}
    assert case.work == 2 * 3 * 2 * (10 + 7) * 64 * 4  # k and v, samples, heads, rows, dims, fp32


def test_what_is_queued_can_be_called_and_decoding_agrees():
    found = queued_calls(SMALL, "cpu")
    assert list(found) == ["forward", "both", "decoding"]
    for calls in found.values():
        ours, operators, theirs = (call() for call in calls.values())
        assert [t.shape for t in ours] == [t.shape for t in theirs]
        torch.testing.assert_close(ours, operators, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("layout", "rows"), [("64/4", 300), ("512/8", 1100), ("one segment", 90)])
def test_layouts_and_masks_are_the_same_rule(layout, rows):
    assert set(layout_case(layout, rows).calls) == {OURS, "dense mask", "block mask"}


def test_a_mask_of_another_rule_is_refused(monkeypatch):
    monkeypatch.setattr(
        "bench.measured.layouts._dense", lambda ids: torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    )
    with pytest.raises(AssertionError, match="another rule"):
        layout_case("64/4", 100)


def test_compaction_gathers_what_indexing_does():
    case = compaction_case("64/4", 300, SMALL)
    gists = layout_of("64/4", 300).num_compact
    assert case.work == 2 * 2 * 2 * gists * 64 * 4  # read and write, k and v


def test_models_hold_the_bytes_of_their_rows():
    case = model_decoding_case("tiny", 300, 4)
    row = 2 * 2 * 2 * 8 * 4  # k and v, layers, heads, dims, fp32
    assert case.facts == {"gist rows": 10, "gist bytes": 4 * 10 * row, "full bytes": 4 * 300 * row}
    weights = sum(p.nbytes for p in models("tiny", "cpu")[1].parameters())
    assert case.work == {OURS: weights + 4 * 10 * row, "DynamicCache": weights + 4 * 300 * row}
    for name in (OURS, "DynamicCache"):
        call = case.calls[name]
        first = call()
        assert first.shape == (4, 1, 1000)
        assert torch.equal(call(), first), "a step leaves its cache as it was"
    assert set(compressing_case("tiny", 600, 200, 400).calls) == {OURS, "compress, one segment", "plain prefill"}


def test_caches_that_do_not_fit_are_not_filled(monkeypatch):
    monkeypatch.setattr(timing, "LARGEST_ON_CPU", 1000)
    case = model_decoding_case("tiny", 300, 4)
    assert set(case.calls) == {OURS, "copy"}
    assert case.not_measured["DynamicCache"].startswith("its cache would take")


def test_rounds_are_interleaved_and_ratios_are_of_one_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = interleaved(calls, 3)
    assert "".join(called) == "ba" + "ab" + "ba" + "ab", "a warm-up round, and another beginning for every round"
    assert [len(one) for one in seconds.values()] == [3, 3]
    found = ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b", 10)
    assert found == {"median": 20, "min": 10, "max": 30}


def test_slow_calls_get_fewer_rounds_but_never_less_than_three(monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", -1.0)
    assert len(interleaved({"a": list}, 9)["a"]) == 3
    assert len(interleaved({"a": list}, 2)["a"]) == 2


def test_short_calls_are_repeated_and_their_limit_is_not():
    called = []
    case = Case("cpu", {OURS: lambda: called.append("a"), "peak": lambda: called.append("b")}, {}, "peak", 3, 2, 5)
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: next(clock))
        found = measured(case, 3)
    assert (called.count("a"), called.count("b")) == (4 * 5, 4)
    # equal times for five calls of work 3 and one of work 2
    assert found["of_limit"][OURS]["median"] == 7.5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ImportError("no such library")])
def test_what_a_machine_refuses_is_named_and_the_rest_is_measured(monkeypatch, error):
    def plan(layout):
        def refuse(q, k, v):
            raise error

        return refuse

    monkeypatch.setitem(BASELINES, "sdpa dense", Baseline("refuses", plan))
    case = attention_case("64/4", 200, SMALL, only=["sdpa dense", "causal"])
    assert set(case.calls) == {OURS, "causal", "matmul"}
    assert case.not_measured == {"sdpa dense": f"{type(error).__name__}: {error}"}


def test_measured_names_the_slower_and_the_limit():
    calls = {OURS: list, "other": list, "peak": list}
    case = Case("cpu", calls, {"x": "why"}, "peak", 2, 4)
    found = measured(case, 2)
    assert set(found["slower_than_ours"]) == {"other"}
    assert set(found["of_limit"]) == {OURS, "other"}
    assert found["not_measured"] == {"x": "why"}


@pytest.mark.slow
def test_peak_memory_counts_a_mask_that_is_kept():
    case = "attention", "512/8", 3000, SMALL, "forward", "cpu"
    dense, ours = (peak_bytes(case, name) for name in ("sdpa dense", OURS))
    assert dense - ours > 4 * 3000**2 * 0.9


@pytest.fixture(scope="module")
def small_report():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _small_report(monkeypatch)


def small_grid(monkeypatch):
    """What is measured in seconds."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    # the others are rehearsed by test_gpu_script.py
    monkeypatch.setitem(GRIDS, "cpu", dataclasses.replace(GRIDS["rehearsal"], queueing=(), generating=(), training=()))


def _small_report(monkeypatch):
    small_grid(monkeypatch)
    # a process of its own for each: test_peak_memory starts real ones
    monkeypatch.setattr(sections, "peak_bytes", lambda case, name: 5 if name == OURS else "no backward on CPU")
    *_, last = report.measure(2, list(sections.SECTIONS))
    return last


def test_a_report_fills_a_page(small_report, tmp_path):
    path, page = tmp_path / "docs" / "results" / "cpu.json", tmp_path / "docs" / "results.md"
    report.write(small_report, path)
    written = page.read_text()
    anchors = re.findall(r'<a id="([^"]+)">', written)
    assert "attention-cpu-512-8-600-2-heads-d-64-forward" in anchors
    assert len(set(anchors)) == len(anchors)
    text = re.sub(r'<a id="[^"]+"></a>', "", written)
    row = json.loads(path.read_text())["attention"][0]
    cells = [row["slower_than_ours"][name]["median"] for name in ("sdpa dense", "sdpa per segment")]
    assert f"| 512/8 | 600 | 2 heads, D 64 | forward | {row['of_limit'][OURS]['median']:.2f} |" in text
    assert f"| {cells[0]:.2f} | {cells[1]:.2f} |" in text
    assert "| sliding | 900 | 2 heads, D 64 | forward |" in text
    assert "| 512/8 | 600 | 2 heads, D 64 | backward |" not in text, "the page shows forward and both"
    bytes_ = small_report["models"][1]
    assert f"| tiny | 300 | 2 | {bytes_['gist bytes']:,} | {bytes_['full bytes']:,} |" in text
    assert "| 64/4, 300, 2 heads, D 64, both | ours | 5 | 1.0 |" in text
    # what whoever measured writes around the tables stays, and so do the tables of another device
    other = "<!-- table: attention, gpu -->\nfaster\n<!-- end -->\n"
    mine = "Mine.\n\n" + written.replace("## growth, cpu", "## Growing") + other
    page.write_text(mine)
    report.write(small_report, path)
    assert page.read_text() == mine


def test_tables_stand_in_their_places_and_those_without_come_last():
    page = "before\n<!-- table: one -->\nold\n<!-- end -->\nafter\n"
    found = filled(page, {"one": "new", "two": "another"})
    assert found.startswith("before\n<!-- table: one -->\nnew\n<!-- end -->\nafter\n")
    assert found.endswith("\n## two\n\n<!-- table: two -->\nanother\n<!-- end -->\n")
    assert places(found) == ["one", "two"]
    assert filled(found, {"two": "another"}) == found


def test_why_nothing_was_measured_is_kept(small_report):
    forward = {row["layout"]: row["not_measured"] for row in small_report["attention"] if row["pass"] == "forward"}
    assert forward["sliding"]["sdpa per segment"] == "the local window moves with every row"
    assert forward["512/8"]["flash-attn 2"] == "flash_attn needs a GPU"
    growth = {(row["name"], row["rows"]): row.get("not_measured") for row in small_report["growth"]}
    assert growth["sdpa dense", 1600] == "only up to 800 rows"
    (peak,) = [row for row in small_report["memory"] if row["name"] == "flex"]
    assert peak["not_measured"] == "no backward on CPU"


def test_growth_is_relative_to_our_shortest(small_report):
    first = small_report["growth"][0]
    assert (first["name"], first["rows"]) == (OURS, 400)
    assert first["time"] == {"median": 1, "min": 1, "max": 1}
    assert first["visible_pairs"] == int(layout_of("512/8", 400).dense().sum())


def test_regressions_are_beyond_tolerance_and_spread():
    recorded = {name: {"median": 10.0, "min": 7.0, "max": 12.0} for name in ("lost", "noisy", "kept", "gone")}
    again = {name: {"median": now, "max": 99.0} for name, now in (("lost", 6.0), ("noisy", 7.5), ("kept", 9.0))}
    assert [one.split()[0] for one in report.lost(recorded, again)] == ["lost", "gone"]


def test_the_guard_says_what_has_regressed(small_report, monkeypatch, tmp_path, capsys):
    """Against a report that is measured again to the digit, and against one whose rows were better."""
    now, path = copy.deepcopy(small_report), tmp_path / "recorded.json"
    monkeypatch.setattr(report, "beside", lambda section, *_: now[section])
    recorded = copy.deepcopy(small_report)

    def run():
        path.write_text(json.dumps(recorded))
        with pytest.raises(SystemExit) as left:
            report.check(path, 1)
        return left.value.code, capsys.readouterr().out

    assert run() == (0, "nothing has regressed\n")
    for value in recorded["decoding"][0]["slower_than_ours"].values():
        value.update({key: number * 1e9 for key, number in value.items()})
    recorded["compaction"][0]["slower_than_ours"]["another"] = {"median": 3.0, "min": 2.0, "max": 4.0}
    recorded["layouts"].clear()
    recorded["device"] = "another"
    code, out = run()
    assert code == 1
    assert "decoding, 10, 4, 2, 2 heads, D 64: sdpa took" in out
    assert "another took 3.00 times our time when recorded, is not measured any more" in out
    assert len(out.splitlines()) == 3
    assert "recorded on another" in out


def test_the_committed_ranks_received_what_the_wire_carried():
    found = json.loads((DOCS / "results" / "context-parallel.json").read_text())
    shared = [run for run in found["runs"] if run["ranks"] > 1]
    assert {(run["scheme"], run["ranks"]) for run in shared} == set(itertools.product(context_parallel.SCHEMES, (2, 4)))
    for run in shared:
        counted = sum(sum(one["received"].values()) for one in run["by rank"])
        first = run["by rank"][0]
        assert counted <= first["wire bytes of all ranks"] < first["ring attention would receive"]


RESULTS = (DOCS / "results.md").read_text()


def test_the_tables_of_the_results_are_those_of_the_reports():
    made = pages.results()
    assert sorted(places(RESULTS)) == sorted(made), "a table without a place, or a place without one"
    assert filled(RESULTS, made) == RESULTS, "run python -m bench.pages"


def test_every_report_of_attention_is_on_the_page():
    measured_ = {path for path in (DOCS / "results").glob("*.json") if "attention" in json.loads(path.read_text())}
    assert measured_ <= set(pages.MEASURED)


def test_what_other_pages_quote_can_be_linked():
    headings = re.findall(r"^#+ (.*)$", RESULTS, re.MULTILINE)
    anchors = {re.sub("[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a id="([^"]+)">', RESULTS))
    quoted = "attention-cpu attention-h100 compare decoding-cpu held-out leak memory-h100 smollm2-299x smollm2-kvpress"
    quoted += " swap time-to-first-token tiny-50x tiny-299x tiny-610x tiny-1210x vllm"
    linked = re.findall(r"docs/results\.md#([\w-]+)", (DOCS.parent / "README.md").read_text())
    assert {*quoted.split(), *linked} <= anchors


def test_a_gist_cache_holds_the_bytes_of_its_rows_and_no_more():
    rows = json.loads((DOCS / "results" / "cpu.json").read_text())["models"]
    assert rows
    assert all(row["gist bytes"] * row["context"] == row["full bytes"] * row["gist rows"] for row in rows)
