"""What the README says of the results: first what a user gains, then a few rows a machine and the
memory of a training step.

A function of the committed JSON alone, like the whole tables (bench/report.py), to which it leads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import cost, report
from bench.rows import OURS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GAIN_BEGIN, GAIN_END = "<!-- gain:begin -->", "<!-- gain:end -->"
# of the times on a GPU
GRAPHS = (
    "Ours are CUDA graphs, as the engine and the trainer run them, eager PyTorch launches its "
    "kernels: at batch 1 and 8 that is most of the difference, and the host's. torch.compile is "
    "max-autotune of block, map and final layer, at batch 1 replayed as one CUDA graph, in "
    "training launched or replayed, whichever was faster. The memory below is of a step that is "
    "launched; graphs hold as much again."
)
SUITES = ("network", "sampler", "training")
# of the memory rows, the published architecture
PLAIN = "published bf16 eager"
# the columns: a baseline's time over ours
BASELINES = {
    "published eager": ("published eager",),
    "published compiled": (
        "published compiled",
        "published compiled, replayed",
        "published, map compiled",
    ),
    "compiled, frozen": ("published frozen",),
    "eager float32": ("published eager float32",),
    report.LIBRARY: (report.LIBRARY,),
}


def headlines(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each suite and model the row of most work, in half precision where there is one; of the
    sampler one a batch; and the same of the rows against torch.compile alone."""
    best: dict[tuple[str, ...], dict[str, Any]] = {}

    def rank(row: dict[str, Any]) -> tuple[bool, int]:
        return row["dtype"].endswith("16"), row["flops"]

    for row in result["rows"]:
        if row["suite"] in SUITES and report.reason(row) is None:
            model, batch = row["name"].split(" ")[:2]
            kind = "compiled" if row["name"].endswith(" compiled") else ""
            key = (row["suite"], model, batch if row["suite"] == "sampler" else "", kind)
            if key not in best or rank(row) > rank(best[key]):
                best[key] = row
    return sorted(best.values(), key=lambda row: SUITES.index(row["suite"]))


def _fastest(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arm of a row that comes closest to ours: a compiled step may be replayed or launched."""
    return min((row["arms"][n] for n in names if n in row["arms"]), default=None,
               key=lambda arm: arm["ratio"])  # fmt: skip


def _line(row: dict[str, Any], commit: str) -> list[str]:
    arms = row["arms"]
    best = [_fastest(row, names) for names in BASELINES.values()]
    ratios = [f"{arm['ratio']:.2f}x" if arm else "" for arm in best]
    mine, theirs = (report.peak(arms.get(a, {})) for a in (OURS, "published eager"))
    memory = f"{mine}, {theirs}" if mine and theirs else mine
    # that is the baseline, not ours
    name = row["name"].removesuffix(" compiled")
    return [f"{row['suite']}, {name}", report.duration(arms[OURS]["median_s"]), *ratios, memory,
            commit]  # fmt: skip


def machine_table(result: dict[str, Any]) -> str:
    """The headline rows of one machine, under what it is."""
    head = ["", "fpdm", *BASELINES, "peak: fpdm, published", "commit"]
    composed = "sources" in result
    lines = [
        _line(row, report.origin(result, row)["commit"] if composed else "")
        for row in headlines(result)
    ]
    # a baseline that no row has is no column
    kept = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines)]
    table = report.markdown([head[i] for i in kept], [[line[i] for i in kept] for line in lines])
    note = f" {result['note']}" if "note" in result else ""
    return f"**{report.place(result)}**, {report.commits(result)}.{note}\n\n{table}\n"


def gain(results: list[dict[str, Any]], counted: dict[str, Any] | None) -> str:
    """How many times faster than the published architecture, eager and compiled, the work of each
    suite and batch is: on a GPU where one was measured; and the memory of a training step."""
    result = sorted(results, key=lambda r: not r.get("gpu"))[0]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for row in headlines(result) if row["suite"] in ("sampler", "training")):
        model, batch, dtype = row["name"].split(" ")[:3]
        found.setdefault((row["suite"], f"{model} {dtype}, batch {batch[1:]}"), []).append(row)
    verbs = {"sampler": "sampling", "training": "training"}
    body = [[f"{verbs[suite]}, {what}", *_gains(result, rows)]
            for (suite, what), rows in found.items()]  # fmt: skip
    head = [f"{_device(result)}: times as fast as the published architecture written plainly", "",
            "in eager PyTorch", "under torch.compile"]  # fmt: skip
    several = any("](" in cell for line in body for cell in line)
    return (
        f"{report.markdown(head, body)}\n\n"
        "What is compared with is a plain rewrite, `bench/published.py`, not its authors' files. S "
        "timesteps of k iterations; of a training step, forward and backward of n iterations "
        "without gradient and m with it."
        + (" Where a line names runs, its two ratios are of two rows." if several else "")
        + (f" {GRAPHS}" if result.get("gpu") else "")
        + "\n"
        + (f"\n{_step_memory(result, counted)}" if counted is not None else "")
    )


def _device(result: dict[str, Any]) -> str:
    found = (d["name"] for d in result["devices"].values() if isinstance(d, dict))
    return next(found, result["processor"]["name"])


def _gains(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Ratios to the eager and the compiled baseline, of one row where one has both; else each says
    what it is of."""
    columns = [BASELINES[name] for name in ("published eager", "published compiled")]
    both = [row for row in rows if all(_fastest(row, names) for names in columns)]
    cells, used = [], []
    for names in columns:
        row = next((row for row in both or rows if _fastest(row, names)), None)
        found = _fastest(row, names) if row else None
        cells.append(f"{found['ratio']:.2f}x" if found else "not measured")
        used += [row] if row else []
    if len(used) == 2 and used[0] is not used[1]:
        cells = [f"{cell} ({_of(result, row)})" for cell, row in zip(cells, used)]
    return [" / ".join(dict.fromkeys(map(_work, used))), *cells]


def _work(row: dict[str, Any]) -> str:
    """What a row does beside model, batch and dtype."""
    if "draws" not in row:
        return " ".join(row["name"].removesuffix(" compiled").split(" ")[3:])
    few = len(row["draws"]) <= 3
    pairs = ", ".join(f"({n}, {m})" for n, m in row["draws"])
    return f"(n, m) = {pairs}" if few else f"{len(row['draws'])} draws of (n, m)"


def _of(result: dict[str, Any], row: dict[str, Any]) -> str:
    """What a ratio is of: its work, and the run of a composed result."""
    draws = [_work(row)] if "draws" in row else []
    source = row.get("source")
    folder = f"bench/results/{result['machine']}"
    return ", ".join([*draws, *([f"[{source}]({folder}/{source})"] if source else [])])


def _step_memory(result: dict[str, Any], counted: dict[str, Any]) -> str:
    """A training step's memory as counted, and by the allocator where it was measured."""
    gb = {(row["model"], row["arm"]): f"{row['total']:.1f}" for row in counted["memory"]}
    ours = [gb["fpdm-xl-2", f"fpdm {kept}"] for kept in cost.RECOMPUTE]
    paper = counted["paper_gb"]
    text = (
        f"A training step of XL/2, batch {counted['batch']}, n = m = {counted['m']}, with all its "
        f"state. Counted: {ours[0]} GB, or {ours[1]} or {ours[2]} where more is recomputed; the "
        f"rewrite {gb['fpdm-xl-2', PLAIN]}; DiT, written the same way, {gb['dit-xl-2', PLAIN]} "
        f"(the paper: {paper['fpdm-xl-2']} and {paper['dit-xl-2']}, both partly recomputed). "
        "Measured by the allocator"
    )
    if not (peaks := measured_peaks(result, counted)):
        return f"{text}: not yet.\n"
    mine = [peaks.get(("fpdm-xl-2", f"fpdm {kept}"), "not measured") for kept in cost.RECOMPUTE]
    plain = [peaks.get((model, PLAIN), "not measured") for model in ("fpdm-xl-2", "dit-xl-2")]
    return (
        f"{text} of the {_device(result)}: {', '.join(mine)}; the rewrite {plain[0]}; that DiT "
        f"{plain[1]}.\n"
    )


def measured_peaks(result: dict[str, Any], counted: dict[str, Any]) -> dict[tuple[str, str], str]:
    """GB by the allocator of the steps that are counted, by (model, arm)."""
    chunks = {(row["model"], row["arm"]): row["chunks"] for row in counted["memory"]}
    found = {}
    for row in result.get("memory", ()):
        key = row["model"], f"{row['arm']} {row.get('recompute', '')}".strip()
        step = row["batch"], row["n"], row["m"]
        same = step == (counted["batch"], counted["m"], counted["m"])
        if same and "peak_gb" in row and row.get("chunks", 1) == chunks.get(key):
            found[key] = f"{row['peak_gb']:.1f}"
    return found


def memory_table(counted: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Totals of a training step by what is recomputed, beside what was measured of them and the
    paper's."""
    totals: dict[str, dict[str, float]] = {}
    for row in counted["memory"]:
        totals.setdefault(row["model"], {})[row["arm"]] = row["total"]
    arms = list(dict.fromkeys(row["arm"] for row in counted["memory"]))
    chunks = {row["chunks"] for row in counted["memory"]}
    body = [
        [f"{model}, counted", *(f"{found[arm]:.1f}" for arm in arms),
         f"{counted['paper_gb'][model]}"]
        for model, found in totals.items()
    ]  # fmt: skip
    for result in results:
        if peaks := measured_peaks(result, counted):
            body += [
                [f"{model}, measured, {_device(result)}",
                 *(peaks.get((model, arm), "not measured") for arm in arms), ""]
                for model in totals
            ]  # fmt: skip
    body.sort(key=lambda line: list(totals).index(line[0].split(",")[0]))
    return (
        f"Memory of a training step in GB with all state, batch {counted['batch']}, n = m = "
        f"{counted['m']}, bf16: counted storage by storage without allocating it "
        "(`bench/memory.py`), and the allocator's peak where it was measured, with a library's "
        f"workspaces. Where something is recomputed, `execution.chunks={max(chunks)}`; without "
        "graphs, which hold as much beside it. "
        "The paper's code recomputes DiT and the pre and post blocks, not the iterations:\n\n"
        f"{report.markdown(['', *arms, 'the paper'], body)}\n"
    )


def gaps(results: list[dict[str, Any]]) -> str:
    """What was not measured of the summary's suites, by reason; V100 while there is none."""
    gone: dict[tuple[str, str], list[str]] = {}
    for r in results:
        for row in (row for row in r["rows"] if row["suite"] in SUITES):
            for name, why in row["missing"].items():
                what = f"{row['suite']}, {row['name'] if name == OURS else name}", why
                if r["machine"] not in gone.setdefault(what, []):
                    gone[what].append(r["machine"])
    lines = [f"{what} ({', '.join(where)}): {why}" for (what, why), where in gone.items()]
    if not any("v100" in r["machine"] for r in results):
        lines.append("anything on a V100")
    if not any(r.get("gpu") for r in results):
        lines.append("anything on a GPU")
    return f"Not measured: {'; '.join(lines)}.\n"


def section(results: list[dict[str, Any]], counted: dict[str, Any] | None) -> str:
    """What is measured, on what, against what; what is not says so."""
    parts = [
        "Our time, and each baseline's over it: at `2.00x` a baseline takes twice as long. All "
        "arms of a row ran in one process, in turn. *Published* is the published architecture "
        "written plainly (`bench/published.py`, not its authors' files); *gemm + attention* the "
        "library's products alone with nothing between them, below `1.00x` where we are slower "
        "than that. A row names model, batch B, dtype, timesteps S, iterations k, and in training "
        "n without gradient, m with it and what is recomputed; over several draws of (n, m) it is "
        "the time of all of them. Shown is of each suite and model the row of most work, in half "
        "precision where there is one, of the sampler one a batch, and the same against "
        "torch.compile; every row, single operators, spreads, commands and shares of the ceilings: "
        "[bench/results](bench/results/README.md).\n"
    ]
    parts += [machine_table(r) for r in sorted(results, key=lambda r: not r.get("gpu"))]
    if counted is not None:
        parts.append(memory_table(counted, results))
    return "\n".join([*parts, gaps(results)])


def readme(text: str, results: Path) -> str | None:
    """``text`` with what lies between its markers written again; None when it has none."""
    loaded = report.load(results)
    for begin, end, written in ((GAIN_BEGIN, GAIN_END, gain), (BEGIN, END, section)):
        if begin not in text or end not in text:
            return None
        head, rest = text.split(begin, 1)
        _, tail = rest.split(end, 1)
        text = f"{head}{begin}\n{written(*loaded)}{end}{tail}"
    return text
