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
SUITES = ("network", "sampler", "training")
# the columns: a baseline's time over ours
BASELINES = {
    "published eager": ("published eager",),
    "published compiled": ("published compiled", "published, map compiled"),
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


def _line(row: dict[str, Any]) -> list[str]:
    arms = row["arms"]
    ratios = [
        next((f"{arms[a]['ratio']:.2f}x" for a in names if a in arms), "")
        for names in BASELINES.values()
    ]
    mine, theirs = (report.peak(arms.get(a, {})) for a in (OURS, "published eager"))
    memory = f"{mine}, {theirs}" if theirs else mine
    # that is the baseline, not ours
    name = row["name"].removesuffix(" compiled")
    return [f"{row['suite']}, {name}", report.duration(arms[OURS]["median_s"]), *ratios, memory,
            row.get("commit", "")]  # fmt: skip


def machine_table(result: dict[str, Any]) -> str:
    """The headline rows of one machine, under what it is."""
    head = ["", "fpdm", *BASELINES, "peak: fpdm, published", "commit"]
    lines = [_line(row) for row in headlines(result)]
    # a baseline that no row has is no column
    kept = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines)]
    table = report.markdown([head[i] for i in kept], [[line[i] for i in kept] for line in lines])
    note = f" {result['note']}" if "note" in result else ""
    return f"**{report.place(result)}**, commit {result['commit']}.{note}\n\n{table}\n"


def gain(results: list[dict[str, Any]], counted: dict[str, Any] | None) -> str:
    """How many times faster than the published architecture, eager and compiled, the work of each
    suite and batch is: on a GPU where one was measured; and the memory of a training step."""
    result = sorted(results, key=lambda r: not r.get("gpu"))[0]
    rows = [row for row in headlines(result) if row["suite"] in ("sampler", "training")]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        model, batch, dtype = row["name"].split(" ")[:3]
        line = found.setdefault((row["suite"], f"{model} {dtype}, batch {batch[1:]}"), {})
        for column in ("published eager", "published compiled"):
            arms = [row["arms"][arm] for arm in BASELINES[column] if arm in row["arms"]]
            if arms:
                line[column] = f"{arms[0]['ratio']:.2f}x"
    verbs = {"sampler": "sampling", "training": "training"}
    body = [
        [f"{verbs[suite]}, {what}", line.get("published eager", "not measured"),
         line.get("published compiled", "not measured")]
        for (suite, what), line in found.items()
    ]  # fmt: skip
    device = next((d["name"] for d in result["devices"].values() if isinstance(d, dict)),
                  result["processor"]["name"])  # fmt: skip
    head = [f"{device}: times as fast as the published code", "in eager PyTorch",
            "under torch.compile"]  # fmt: skip
    text = report.markdown(head, body) + "\n"
    if counted is None:
        return text
    gb = {(row["model"], row["arm"]): f"{row['total']:.1f}" for row in counted["memory"]}
    ours = [gb["fpdm-xl-2", f"fpdm {kept}"] for kept in cost.RECOMPUTE]
    paper = counted["paper_gb"]
    return text + (
        f"\nA training step of XL/2, batch {counted['batch']}, n = m = {counted['m']}, with all "
        f"its state: {ours[0]} GB, or {ours[1]} or {ours[2]} GB where more is recomputed. The "
        f"published code: {gb['fpdm-xl-2', 'published bf16 eager']} GB; DiT: "
        f"{gb['dit-xl-2', 'published bf16 eager']} GB (in the paper {paper['fpdm-xl-2']} and "
        f"{paper['dit-xl-2']}, both partly recomputed).\n"
    )


def memory_table(counted: dict[str, Any]) -> str:
    """Totals of a training step by what is recomputed, beside the paper's."""
    totals: dict[str, dict[str, float]] = {}
    for row in counted["memory"]:
        totals.setdefault(row["model"], {})[row["arm"]] = row["total"]
    arms = list(dict.fromkeys(row["arm"] for row in counted["memory"]))
    chunks = {row["chunks"] for row in counted["memory"]}
    body = [
        [model, *(f"{found[arm]:.1f}" for arm in arms), f"{counted['paper_gb'][model]}"]
        for model, found in totals.items()
    ]
    return (
        f"Memory of a training step in GB with all state, batch {counted['batch']}, n = m = "
        f"{counted['m']}, bf16, counted storage by storage without allocating it "
        f"(`bench/memory.py`), what is recomputed in `execution.chunks={max(chunks)}`, without "
        "graphs, which hold as much beside it. The paper's code recomputes DiT and the pre and "
        f"post blocks, not the iterations:\n\n{report.markdown(['', *arms, 'the paper'], body)}\n"
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
        "written plainly; *gemm + attention* the library's products alone with nothing between "
        "them, below `1.00x` where we are slower than that. A row names model, batch B, dtype, "
        "timesteps S, iterations k, and in training n without gradient, m with it and what is "
        "recomputed; over several draws of (n, m) it is the time of all of them. Shown are the "
        "largest rows of each model; every row, single operators, spreads, commands and shares of "
        "the ceilings: [bench/results](bench/results/README.md).\n"
    ]
    parts += [machine_table(r) for r in sorted(results, key=lambda r: not r.get("gpu"))]
    if counted is not None:
        parts.append(memory_table(counted))
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
