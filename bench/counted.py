"""What is counted and not measured: the memory ledger and the cost model, as JSON for the tables.

``python -m bench --count`` writes bench/results/counted.json; no machine is in it, only the commit.
"""

from __future__ import annotations

import re
from typing import Any

from bench import cost, machine, memory, operators, suites
from bench.rows import DIGITS, OURS, S2, XL
from fpdm import budget
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.recipes import MODEL_PRESETS

BATCH, M = 64, 12
# the (n, m) of the training rows of bench.gpu_rows
STEP = (5, 6)
# GB in the paper, Tab. 1, of a training step at batch 64
PAPER = {"fpdm-xl-2": 10.2, "dit-xl-2": 25.2}
# the models that rows are named by
LABELS = {"digits": DIGITS, "S/2": S2, "XL/2": XL}


def flops(row: dict[str, Any]) -> int | None:
    """FLOPs of one call of ours, by the row's name, and of several draws of (n, m) by its facts:
    what was counted when it was measured may be an older count. None where nothing says them."""
    found = re.fullmatch(r"(\S+) B(\d+) \w+ (.*)", row["name"])
    if found is None or found[1] not in LABELS:
        return None
    config, batch, what = LABELS[found[1]], int(found[2]), found[3]
    if row["suite"] == "operators":
        return operators.flops(what, config, batch)
    if row["suite"] == "iteration":
        parts = cost.iteration(config, batch)
        each = dict(zip(operators.PARTS, cost.products(parts)))
        return each[what].flops if what in each else cost.flops(parts)
    if row["suite"] == "network" and (k := re.match(r"k=(\d+)", what)):
        return suites.network_flops(config, batch, int(k[1]))
    if row["suite"] == "sampler" and (g := re.match(r"S=(\d+) k=(\d+) guidance ([\d.]+)", what)):
        each_k = [int(g[2])] * int(g[1])
        return 2 * batch * budget.macs_per_sample(config, each_k, True, float(g[3]))
    if row["suite"] == "training":
        one = re.match(r"n=(\d+) m=(\d+) ", what)
        draws = row.get("draws") or ([(int(one[1]), int(one[2]))] if one else [])
        return sum(cost.training_flops(config, batch, n, m) for n, m in draws) or None
    return None


def recount(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """``row`` with the FLOPs that are counted today, and its shares of the ceilings of its run."""
    count = flops(row)
    if count is None or OURS not in row["arms"]:
        return row
    # the oldest rows tell their dtype in the name alone
    row = {**row, "dtype": row.get("dtype", row["name"].split(" ")[2]), "flops": count}
    return row | machine.shares(row, row["arms"][OURS]["median_s"], ceilings)


def curve(config: ModelConfig, batch: int) -> dict[str, list[list[float]]]:
    """GB of a training step against m, n = 0: [m, total] by arm."""
    ms = (1, 4, 8, 12)
    found: dict[str, list[list[float]]] = {}
    for mode in cost.RECOMPUTE:
        execution = ExecutionConfig(recompute=mode, chunks=1 if mode == "none" else 4)
        totals = [memory.training(config, batch, execution, 0, m).total for m in ms]
        found[f"recompute {mode}"] = [[m, t / memory.GB] for m, t in zip(ms, totals)]
    # the published loop is linear in m
    ends = [memory.plain(config, batch, 0, m).total for m in (ms[0], ms[-1])]
    found["published, bf16 eager"] = [[m, t / memory.GB] for m, t in zip((ms[0], ms[-1]), ends)]
    return found


def network(config: ModelConfig, batch: int) -> list[dict[str, Any]]:
    """Parts of one iteration by the count: FLOPs, bytes and launches of every style."""
    return [
        {"style": style, "name": p.name, "kind": p.kind, "flops": p.flops, "bytes": p.bytes,
         "launches": p.launches}
        for style in cost.STYLES for p in cost.iteration(config, batch, 2, style)
    ]  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything; half a minute on one core."""
    config = MODEL_PRESETS["fpdm-xl-2"]
    return {
        "commit": machine.commit(),
        "batch": BATCH,
        "m": M,
        "paper_gb": PAPER,
        "memory": memory.table(BATCH, M),
        "curve": curve(config, BATCH),
        "devices": [vars(d) for d in cost.DEVICES.values()],
        "model": {str(b): cost.predictions(config, b) for b in (1, BATCH)},
        "n_m": STEP,
        "training": cost.training_predictions(config, BATCH, *STEP),
        "parts": network(config, BATCH),
    }
