"""Tables from the JSON of ``python -m bench``, for the terminal and for bench/results/README.md: no
number is typed.

The document is a function of the committed JSON alone: bench/results/<machine>/bench.json for what
is measured, bench/results/counted.json for what is counted. The README's few rows are
bench/summary.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import cost
from bench.against import WITHIN
from bench.counted import PAPER
from bench.rows import OURS
from bench.timing import Times
from fpdm.recipes import MODEL_PRESETS

LIBRARY = "gemm + attention"
# suite: title, what its first column says
TABLES = {
    "network": "One evaluation of the network, without gradient",
    "sampler": "Images from noise",
    "training": "Forward and backward of a training step",
    "optimizer": "Optimiser step",
}
HEAD = ["suite", "row", "fpdm (median, IQR)", "baselines, times ours (IQR between processes)",
        "of the ceiling", "peak"]  # fmt: skip
PREDICTED = [
    "one evaluation, or training step",
    "arm",
    "predicted",
    "measured",
    "measured over predicted",
]


# of the processors, that other programs may take before a row's times say little
QUIET = 0.1


def duration(seconds: float) -> str:
    """With a unit, three digits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def reason(row: dict[str, Any]) -> str | None:
    """Why a row has no time of ours, or None."""
    if "error" in row:
        return "failed: " + row["error"][:80]
    return None if OURS in row["arms"] else "not measured: " + row["missing"].get(OURS, "")


def ours(row: dict[str, Any]) -> str:
    """Our time and its spread."""
    arm = row["arms"][OURS]
    return f"{duration(arm['median_s'])} ±{arm['spread']:.0%}"


def peak(arm: dict[str, Any]) -> str:
    """Peak memory of an arm beyond what was there before the call."""
    return _size(arm.get("peak_bytes"))


def _size(count: int | None) -> str:
    """Bytes with a unit, three digits; nothing for None."""
    if count is None:
        return ""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def times(arm: dict[str, Any]) -> str:
    """An arm's time over ours; from several processes also their range, where a quarter of them lie
    more than 15 % from it."""
    ratio, each = arm["ratio"], arm.get("ratios", [])
    apart = sum(max(r / ratio, ratio / r) > 1 + WITHIN for r in each)
    between = f" ({min(each):.2f} to {max(each):.2f})" if apart and 4 * apart >= len(each) else ""
    return f"{ratio:.2f}x{between}"


def _between(arm: dict[str, Any]) -> str:
    """Interquartile range of the ratios between processes, where there are several."""
    return f" ±{Times(tuple(arm['ratios'])).spread:.0%}" if "ratios" in arm else ""


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row under ``HEAD``."""
    why = reason(row)
    if why is not None:
        return [row["suite"], row["name"], "", why, "", ""]
    others = [
        f"{name} {times(arm)}{_between(arm)}" for name, arm in row["arms"].items() if name != OURS
    ] + [f"{name}: {why}" for name, why in row["missing"].items()]
    shares = [f"GEMM {row['gemm_share']:.0%}"] if "gemm_share" in row else []
    shares += [f"copy {row['copy_share']:.0%}"] if "copy_share" in row else []
    return [row["suite"], row["name"], ours(row), "; ".join(others), ", ".join(shares),
            peak(row["arms"][OURS])]  # fmt: skip


def floor(row: dict[str, Any]) -> str:
    """How much of our time the floor is, the larger of FLOPs over the GEMM ceiling and bytes over
    the copy ceiling, and how long; of a row without counted bytes, FLOPs alone."""
    kinds = (("gemm_share", "GEMM"), ("copy_share", "copy"))
    shares = [(row[key], name) for key, name in kinds if key in row]
    if not shares:
        return ""
    share, ceiling = max(shares)
    return f"{share:.0%} ({ceiling}, {duration(share * row['arms'][OURS]['median_s'])})"


def cold(arm: dict[str, Any]) -> str:
    """An arm's time with a cold L2 cache."""
    return duration(arm["cold_s"]) if "cold_s" in arm else ""


def throttled(row: dict[str, Any]) -> str:
    """What held the GPU's clock down while our arm ran, and in how many readings of NVML."""
    found = row.get("nvml", {}).get("throttled")
    if found is None:
        return ""
    return ", ".join(f"{reason} {share:.0%}" for reason, share in found.items()) or "no"


# columns that are left out where no row has anything to say in them, of rows with a time of ours:
# what NVML tells
Cells = dict[str, Callable[[dict[str, Any]], str]]
NVML: Cells = {
    "joules an image": lambda r: f"{r['joules_per_image']:.3g}" if "joules_per_image" in r else "",
    "SM clock": lambda r: f"{r['nvml']['sm_mhz']:.0f} MHz" if "sm_mhz" in r.get("nvml", ()) else "",
    "throttled": throttled,
    "memory in use": lambda r: _size(r.get("nvml", {}).get("memory_used")),
}
# the file that a row of a composed result is from
RUN: Cells = {"run": lambda r: r.get("source", "")}
OF_A_SUITE: Cells = {"of the floor": floor, "peak": lambda r: peak(r["arms"][OURS]), **NVML, **RUN}
OF_ALL: Cells = {"cold L2": lambda r: cold(r["arms"][OURS]), **NVML, **RUN}


def _kept(cells: Cells, rows: list[dict[str, Any]]) -> Cells:
    return {name: cell for name, cell in cells.items() if any(cell(r) for r in rows)}


def every_row(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all suites together."""
    kept = _kept(OF_ALL, [r for r in result["rows"] if reason(r) is None])
    body = [
        [*cells_of(r), *(cell(r) if reason(r) is None else "" for cell in kept.values())]
        for r in result["rows"]
    ]
    return [*HEAD, *kept], body


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in (header, *rows)]
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Every row of a result, and its ceilings."""
    return f"{aligned(*every_row(result))}\nceilings: {ceilings(result)}"


def ceilings(result: dict[str, Any]) -> str:
    """What rates of one run are held against."""
    units = {"copy": "GB/s"}
    return ", ".join(
        f"{k} {v / 1e9:.0f} {units.get(k, 'GFLOP/s')}" for k, v in result["ceilings"].items()
    )


def origin(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The run of a row: commit, command, ceilings. Of a composed result (bench.compose) that is the
    raw file which the row names."""
    return result["sources"][row["source"]] if "source" in row else result


def commits(result: dict[str, Any]) -> str:
    """Which one, or those of a composed result, in words."""
    return f"commit{'s' if ', ' in result['commit'] else ''} {result['commit']}"


def sources(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one line a raw file of a composed result, as the file says."""
    lines = []
    for name, run in result["sources"].items():
        others = f"{run['others']:.0%}" if "others" in run else "not measured"
        rates = ceilings(run) if "ceilings" in run else ""
        commit, command = run.get("commit", "not written down"), run["command"].strip()
        lines.append([name, commit, others, rates, command])
    head = ["file", "commit", "other programs' part of the processors", "ceilings", "command"]
    return head, lines


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def suite_table(result: dict[str, Any], suite: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one suite, a column for every baseline and measure that a row has."""
    rows = [r for r in result["rows"] if r["suite"] == suite and reason(r) is None]
    names = list(dict.fromkeys(n for r in rows for n in r["arms"] if n != OURS))
    kept = _kept(OF_A_SUITE, rows)
    lines = []
    for r in rows:
        cells = [r["name"], ours(r)]
        cells += [times(r["arms"][n]) if n in r["arms"] else "" for n in names]
        lines.append([*cells, *(cell(r) for cell in kept.values())])
    return [suite, "fpdm", *names, *kept], lines


def operator_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Operators by settings: our time, and how many times longer the plain operator takes; beside
    it with a cold L2 cache where that was measured."""
    rows = [r for r in result["rows"] if r["suite"] == "operators" and reason(r) is None]
    cells: dict[str, dict[str, str]] = {}
    for r in rows:
        setting, _, name = r["name"].rpartition(" ")
        plain = times(r["arms"]["plain PyTorch"])
        line = cells.setdefault(name, {})
        line[setting] = f"{ours(r).split(' ±')[0]}, {plain}"
        if told := cold(r["arms"][OURS]):
            theirs = r["arms"]["plain PyTorch"]["cold_s"] / r["arms"][OURS]["cold_s"]
            line[f"{setting}, cold L2"] = f"{told}, {theirs:.2f}x"
    settings = list(dict.fromkeys(column for line in cells.values() for column in line))
    body = [[name, *(found.get(s, "") for s in settings)] for name, found in cells.items()]
    return ["operator", *settings], body


def several(result: dict[str, Any]) -> str:
    """What the operators' ratios are of, where they come from several processes; and of which run,
    in a composed result."""
    rows = [r for r in result["rows"] if r["suite"] == "operators"]
    counts = {len(a["ratios"]) for r in rows for a in r["arms"].values() if "ratios" in a}
    runs = dict.fromkeys(r["source"] for r in rows if "source" in r)
    if not counts:
        return f" ({', '.join(runs)})" if runs else ""
    return (
        f", the mean of the middle half of {max(counts)} processes (in brackets their range, where "
        "a quarter of them lie more than 15 % away: where a baseline's intermediates lie is "
        "decided once a process)"
    )


def unmeasured(result: dict[str, Any]) -> list[str]:
    """One line a row or baseline that did not run, with its reason."""
    suites = {r["suite"] for r in result["rows"]}
    lines: dict[str, None] = {f"{s}: not run": None for s in TABLES if s not in suites}
    for r in result["rows"]:
        if "error" in r:
            lines[f"{r['suite']}, {r['name']}: failed: {r['error']}"] = None
        for name, why in r["missing"].items():
            lines[f"{r['suite']}, {r['name'] if name == OURS else name}: {why}"] = None
    return list(lines)


def company(result: dict[str, Any]) -> str:
    """How OpenMP waited and what else ran on the machine, where it was written down."""
    load, others = result.get("load"), result.get("others")
    told = "".join(f"; {k}={v}" for k, v in result.get("openmp", {}).items())
    told += f"; load average before it {load:.1f}" if load is not None else ""
    return told + (
        f"; other programs took {others:.0%} of the processors" if others is not None else ""
    )


def disturbed(result: dict[str, Any]) -> list[str]:
    """Rows in whose time other programs took more than ``QUIET`` of the processors."""
    return [
        f"{row['suite']}, {row['name']}: other programs took {row['others']:.0%} of the processors"
        for row in result["rows"] if row.get("others", 0) > QUIET
    ]  # fmt: skip


def measured_memory(rows: list[dict[str, Any]]) -> str:
    """Peaks of bench.gpu's part memory: the allocator's, everything included."""
    known = [r for r in rows if "peak_gb" in r]
    body = [
        [
            r["model"],
            r.get("recompute") or r["arm"],
            str(r.get("chunks", "")),
            f"{r['state_gb']:.2f}" if "state_gb" in r else "",
            f"{r['peak_gb']:.2f}",
        ]
        for r in known
    ]
    first = rows[0]
    return (
        f"Peak memory of a training step in GB by the allocator, with all state, at batch "
        f"{first['batch']}, n = {first['n']}, m = {first['m']} (the paper: {PAPER['fpdm-xl-2']}, "
        f"DiT {PAPER['dit-xl-2']}):\n\n"
        f"{markdown(['model', 'recompute', 'chunks', 'state', 'peak'], body)}\n"
    )


def replays(rows: list[dict[str, Any]]) -> str:
    """What CUDA graphs gain in training: bench.gpu's part replays."""
    body = [
        [f"{r['recipe']} B{r['batch']} {r['precision']} n={r['n']} m={r['m']} "
         f"{r.get('recompute', 'none')}" + (f", {r['chunks']} chunks" if "chunks" in r else ""),
         duration(r["off_ms"] / 1e3), duration(r["on_ms"] / 1e3),
         f"{r['launched_over_replayed']:.2f}x"]
        for r in rows if "on_ms" in r
    ]  # fmt: skip
    head = ["micro-batch", "kernel by kernel", "as one graph", "launched over replayed"]
    return f"A training micro-batch, `train.graphs` off and on:\n\n{markdown(head, body)}\n"


def predictions(result: dict[str, Any]) -> list[list[str]]:
    """Of the rows of XL/2 in half precision on a device of the cost model, as predicted and as
    measured: one evaluation of the network, the whole sampler's time over its timesteps; one
    training step."""
    device = next((d for n, d in cost.DEVICES.items() if n.lower() in result["machine"]), None)
    lines = []
    for row in result["rows"]:
        modelled = None if reason(row) is not None else _modelled(row["name"])
        if device is None or modelled is None:
            continue
        count, parts = modelled
        for arm in (a for a in parts if a in row["arms"]):
            want, got = cost.seconds(parts[arm], device), row["arms"][arm]["median_s"] / count
            cells = [f"{row['suite']} {row['name']}", arm, duration(want), duration(got)]
            lines.append([*cells, f"{got / want:.2f}"])
    return lines


def _modelled(name: str) -> tuple[int, dict[str, list[cost.Part]]] | None:
    """How many evaluations or steps the row of this name does, and the parts of one by arm; None
    where the cost model does not know it."""
    config = MODEL_PRESETS["fpdm-xl-2"]
    start = r"XL/2 B(\d+) \w+16 "
    if found := re.fullmatch(start + r"(?:S=(\d+) )?k=(\d+)(?: guidance (\S+))?", name):
        guided = float(found[4] or 1) != 1.0
        shape = config, int(found[1]) * (2 if guided else 1), int(found[3])
        library = cost.network(*shape)
        plain = cost.network(*shape, style="published")
        arms = {OURS: library, LIBRARY: cost.products(library), "published eager": plain}
        return int(found[2] or 1), arms
    if found := re.fullmatch(start + r"n=(\d+) m=(\d+) (none|elementwise|full)", name):
        batch, n, m = (int(found[i]) for i in (1, 2, 3))
        mode = next(r for r in cost.RECOMPUTE if r == found[4])
        library = cost.training(config, batch, n, m, recompute=mode)
        least = cost.products(cost.training(config, batch, n, m))
        return 1, {OURS: library, LIBRARY: least}
    return None


def place(result: dict[str, Any]) -> str:
    """The machine in words: its GPU if it has one, and its processor."""
    cpu = result["processor"]
    where = f"{cpu.get('name')}, {cpu.get('threads')} of {cpu.get('cores')} cores"
    for found in result["devices"].values():
        if isinstance(found, dict):
            where = f"{found['name']} ({found['memory_gib']} GiB), host {where}"
    return where


def remarks(result: dict[str, Any]) -> str:
    """How its rows are to be read: the ``note`` that the README shows too, and ``details``."""
    return " ".join(result[key] for key in ("note", "details") if key in result)


def machine_section(result: dict[str, Any]) -> str:
    """What one machine measured, on what, against what."""
    v = result["versions"]
    extra = f" and triton {v['triton']}" if result.get("gpu") and "triton" in v else ""
    parts = [
        f"## {result['machine']}\n",
        f"{place(result)}; Python {v['python']}, torch {v['torch']}{extra}; "
        f"{commits(result)}; `{result['command'].strip()}`{company(result)}. ",
    ]
    if "sources" in result:
        head, lines = sources(result)
        # a stroke would end the cell
        lines = [[*line[:-1], f"`{line[-1]}`".replace("|", "\\|")] for line in lines]
        parts[-1] += (
            "Each row is of one of these runs, as its file says, and stands against the ceilings "
            f"of that run:\n\n{markdown(head, lines)}\n"
        )
    else:
        parts[-1] += f"Ceilings measured in the same run: {ceilings(result)}.\n"
    if told := remarks(result):
        parts.append(f"{told}\n")
    for suite, title in TABLES.items():
        head, lines = suite_table(result, suite)
        if lines:
            parts.append(f"{title}:\n\n{markdown(head, lines)}\n")
    head, lines = operator_table(result)
    if lines:
        parts.append(
            f"Operators, and plain PyTorch's time over ours{several(result)}:\n\n"
            f"{markdown(head, lines)}\n"
        )
    lines = predictions(result)
    if lines:
        parts.append(
            "The cost model (below) beside what was measured. It knows nothing of the host, which "
            "bounds at batch 1 whatever is not replayed as a graph, here all but fpdm:\n\n"
            f"{markdown(PREDICTED, lines)}\n"
        )
    if "memory" in result:
        parts.append(measured_memory(result["memory"]))
    if "replays" in result:
        parts.append(replays(result["replays"]))
    gone = unmeasured(result)
    if gone:
        parts.append(f"Not measured there: {'; '.join(gone)}.\n")
    return "\n".join(parts)


def counted_section(counted: dict[str, Any]) -> str:
    """Memory by the ledger, beside the paper's, and the cost model's predictions."""
    kinds = ("parameters", "gradients", "optimizer", "average", "copies", "saved")
    lines = []
    for r in counted["memory"]:
        work = max(r["forward"], r["backward"])
        lines.append([r["model"], r["arm"], *(f"{r[k]:.1f}" for k in kinds), f"{work:.1f}",
                      f"**{r['total']:.1f}**"])  # fmt: skip
    for model, size in counted["paper_gb"].items():
        lines.append([model, "the paper, Tab. 1", *[""] * len(kinds), "", f"**{size}**"])
    lines.sort(key=lambda line: not line[0].startswith("fpdm"))
    head = ["model", "", *kinds, "working set", "total"]
    memory = (
        f"Memory of one training step in GB at batch {counted['batch']}, n = m = {counted['m']}, "
        f"bf16: counted storage by storage on fake tensors (`bench/memory.py`, commit "
        f"{counted['commit']}), without a library's workspaces. The paper's code recomputes DiT "
        f"and the pre and post blocks, not the iterations.\n\n{markdown(head, lines)}\n"
    )
    batches = list(counted["model"])
    names = [n for n in counted["model"][batches[0]][0] if n != "device"]
    lines = [
        [str(row["device"]), batch, *(f"{row[n]:.1f}" for n in names)]
        for batch in batches for row in counted["model"][batch]
    ]  # fmt: skip
    n, m = counted["n_m"]
    kept = [name for name in counted["training"][0] if name != "device"]
    steps = [
        [str(row["device"]), *(f"{row[name]:.1f}" for name in kept)] for row in counted["training"]
    ]
    return memory + (
        "\n**A model, not a measurement**: microseconds per sample and iteration of XL/2 in half "
        "precision, from counted FLOPs, bytes, launches and waves of tiles, and each device's "
        f"rates (`bench/cost.py`).\n\n{markdown(['device', 'batch', *names], lines)}\n\n"
        f"The same model's milliseconds of a training step at batch {counted['batch']}, n = {n}, "
        f"m = {m}, without optimiser, by what the backward recomputes.\n\n"
        f"{markdown(['device', *kept], steps)}"
    )


def document(results: list[dict[str, Any]], counted: dict[str, Any] | None) -> str:
    """Every table: what is measured, on what, against what; what is not says so."""
    parts = [
        "# Results\n",
        "Written by `python -m bench --render` from the JSON beside it; `report.html` of each "
        "machine shows the same as pictures. What each attempt taught: `bench/NOTES.md`.\n",
        "Baselines run in the same process as ours, in turn, round by round; `2.00x` means that "
        "the baseline takes twice our time. *gemm + attention* is the library's products alone, "
        "with nothing between them; *published* is the published architecture written plainly; "
        "DiT has the blocks of its preset (S/2: 12), else as many as ours evaluates. A row names "
        "model, batch B, dtype, timesteps S and iterations k, in training n without gradient and m "
        "with it and what is recomputed; ± is the interquartile range over the median. The floor "
        "is the larger of FLOPs over the GEMM ceiling and bytes over the copy ceiling; rows from "
        "before bytes were counted have that of FLOPs. Peak memory is what the call needs beyond "
        "weights, counted by live storages on a CPU.\n",
    ]
    parts += [machine_section(r) for r in results]
    if not results:
        parts.append("Not measured yet on a quiet machine.\n")
    if not any(r.get("gpu") for r in results):
        parts.append("On a GPU, V100 or newer: not measured.\n")
    if counted is not None:
        parts.append("## Counted\n\n" + counted_section(counted))
    return "\n".join(parts)


def load(results: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Every machine's result below ``results``, and what is counted."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*/bench.json"))]
    counted = results / "counted.json"
    return found, json.loads(counted.read_text()) if counted.is_file() else None
