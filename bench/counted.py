"""What is counted and not measured: the memory ledger and the cost model, as JSON for the tables.

``python -m bench --count`` writes bench/results/counted.json; no machine is in it, only the commit.
"""

from __future__ import annotations

from typing import Any

from bench import cost, machine, memory
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.recipes import MODEL_PRESETS

BATCH, M = 64, 12
# the (n, m) of the training rows of bench.gpu_rows
STEP = (5, 6)
# GB in the paper, Tab. 1, of a training step at batch 64
PAPER = {"fpdm-xl-2": 10.2, "dit-xl-2": 25.2}


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
