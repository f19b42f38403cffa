"""What is counted and not measured: the memory ledger and the cost model, as JSON for the tables.

``python -m bench --count`` writes bench/results/counted.json; no machine is in it, only the commit.
``python -m bench --count MODEL`` prints the same of any preset, recipe or YAML file: nothing is
allocated, so that any size can be asked for.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench import cost, machine, memory, operators, suites
from bench.rows import DIGITS, OURS, S2, XL
from fpdm import budget
from fpdm.config import ConfigError, ExecutionConfig, ModelConfig
from fpdm.recipes import MODEL_PRESETS, RECIPES, load_config

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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# by what a row of the table is called, of a step's memory
KINDS = {
    "parameters": "weights, float32", "gradients": "gradients", "optimizer": "AdamW's two moments",
    "average": "EMA", "copies": "weights in the compute dtype",
}  # fmt: skip
# and of the tensors of fpdm.block's ledger
TENSORS = {
    "x": "iterates", "z": "injected", "z2": "after attention", "pre": "before the injection's GELU",
    "a": "after it", "y1": "adaLN", "qkv": "of attention", "o": "its result", "p": "projected",
    "y2": "adaLN", "h": "before the MLP's GELU", "gh": "after it", "r": "the MLP's result",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A training step to count, in each of the settings ``executions``."""

    name: str
    model: ModelConfig
    batch: int
    n: int
    m: int
    precision: str
    executions: tuple[ExecutionConfig, ...]
    devices: tuple[str, ...]


def add_options(p: argparse.ArgumentParser) -> None:
    """``--count`` and what goes with it."""
    about = "only count memory and the cost model; of a preset, recipe or YAML file: a table"
    p.add_argument("--count", nargs="?", const="", metavar="MODEL", help=about)
    group = p.add_argument_group("with --count MODEL")
    group.add_argument("--batch", type=int, help="samples of a micro-batch (the recipe's, or 64)")
    group.add_argument("--n", type=int, help="iterations without gradient (the recipe's largest)")
    group.add_argument("--m", type=int, help="iterations with gradient (the recipe's largest)")
    group.add_argument("--precision", choices=DTYPES, help="(the recipe's, of a preset bf16)")
    group.add_argument("--recompute", nargs="+", choices=cost.RECOMPUTE,
                       help="what the backward computes again (the recipe's, or each)")  # fmt: skip
    group.add_argument("--chunks", type=int, help="parts of the batch (the recipe's, or 1 and 4)")
    group.add_argument("--device", nargs="+", choices=cost.DEVICES, help="(each)")


GIVEN = ("batch", "n", "m", "precision", "recompute", "chunks", "device")


def refuse(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that nothing would use."""
    for name in GIVEN:
        if not args.count and getattr(args, name) is not None:
            raise ConfigError(
                f"--{name}: got {getattr(args, name)}, expected it with --count MODEL"
            )


def asked(args: argparse.Namespace) -> Asked:
    """What the options ask for. Raises ConfigError."""
    name, known = args.count, args.count in MODEL_PRESETS
    if not known and name not in RECIPES and not name.endswith((".yaml", ".yml")):
        expected = ", ".join((*MODEL_PRESETS, *RECIPES))
        raise ConfigError(f"--count: got {name}, expected a YAML file or one of {expected}")
    # presets are of the paper's run
    config = load_config("imagenet256", ["--preset", name]) if known else load_config(name)
    model, given = config.model, config.execution
    looped = model.kind == "fpdm"
    for option, least in (("batch", 1), ("n", 0), ("m", 1), ("chunks", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ConfigError(f"--{option}: got {value}, expected at least {least}")
        if value is not None and option in ("n", "m") and not looped:
            raise ConfigError(f"--{option}: got {value}, expected a model with iterations")
    batch = args.batch or (BATCH if known else config.train.batch // config.train.accumulate)
    n = config.fixed_point.n_max if args.n is None else args.n
    m = args.m or config.fixed_point.m_max
    own = () if known or args.recompute else (given,)
    executions = own or tuple(
        replace(given, recompute=mode) for mode in args.recompute or cost.RECOMPUTE
    )
    # a preset's as in bench.memory.table
    executions = tuple(
        replace(e, chunks=args.chunks or (
            min(4, batch) if known and e.recompute != "none" else e.chunks))
        for e in executions
    )  # fmt: skip
    precision = args.precision or ("bf16" if known else config.train.precision)
    return Asked(name, model, batch, n if looped else 0, m if looped else 0, precision, executions,
                 tuple(args.device or cost.DEVICES))  # fmt: skip


def parts(a: Asked, style: cost.Style, mode: cost.Recompute = "none") -> dict[str, list[cost.Part]]:
    """The parts of one iteration, or block of a DiT, without gradient and, in the library style, of
    the forward and backward of a step."""
    size = DTYPES[a.precision].itemsize
    if a.model.kind == "fpdm":
        one = cost.iteration(a.model, a.batch, size, style)
        return {"one": one, "step": cost.training(a.model, a.batch, a.n, a.m, size, mode)}
    # a network of one block and no iteration, without its injection
    block = replace(a.model, kind="fpdm", depth=0, pre_depth=1)
    _, *one = cost.network(block, a.batch, 0, size, style)
    back = cost.iteration_backward(block, a.batch, size, mode, injected=False)
    return {"one": one, "step": [*one, *back] * a.model.depth}


def count(a: Asked) -> dict[str, Any]:
    """Memory by kind, one iteration by part, and predicted times, as JSON."""
    dtype, unit = DTYPES[a.precision], memory.GB
    rows = []
    for e in a.executions:
        found = memory.training(a.model, a.batch, e, a.n, a.m, dtype)
        loop, blocks = memory.kept(a.model, a.batch, e, a.m, dtype)
        rest = found.saved - sum(loop.values()) - sum(blocks.values())
        kinds = {"iterations": loop, "blocks": blocks}
        rows.append({
            "arm": f"fpdm {e.recompute}", "chunks": e.chunks, **found.row(), "rest": rest / unit,
            **{k: {t: b / unit for t, b in sizes.items()} for k, sizes in kinds.items()},
        })  # fmt: skip
    published = memory.plain(a.model, a.batch, a.n, a.m, dtype).row()
    rows.append({"arm": f"published {a.precision} eager", "chunks": 1, **published})
    ours = parts(a, "library")
    result = {**asdict(a), "commit": machine.commit(), "memory": rows, "predicted": predicted(a),
              "one": [vars(p) for p in ours["one"]]}  # fmt: skip
    return {**result, "step_flops": cost.flops(ours["step"])}


def predicted(a: Asked) -> list[dict[str, Any]]:
    """Seconds of one iteration by style, and of a step by what is recomputed, on each device: none
    in float32, whose rates are not known."""
    rows: list[dict[str, Any]] = []
    for device in (cost.DEVICES[name] for name in a.devices if a.precision != "fp32"):
        styles = {s: cost.seconds(parts(a, s)["one"], device) for s in cost.STYLES}
        modes = dict.fromkeys(e.recompute for e in a.executions)
        steps = {m: cost.seconds(parts(a, "library", m)["step"], device) for m in modes}
        rows.append({"device": device.name, "one": styles, "step": steps})
    return rows


def told(found: dict[str, Any]) -> str:
    """``count`` as tables."""
    from bench.report import aligned, duration

    looped = found["model"]["kind"] == "fpdm"
    one = "iteration" if looped else "block"
    steps = f", n = {found['n']}, m = {found['m']}" if looped else ""
    unit, head, lines = _memory(found, looped)
    pieces = [
        [p["name"], p["kind"], f"{p['flops'] / 1e9:.2f}", f"{p['bytes'] / 1e6:.1f}",
         str(p["launches"])]
        for p in found["one"]
    ]  # fmt: skip
    whole = [sum(p[k] for p in found["one"]) for k in ("flops", "bytes", "launches")]
    pieces.append(["all", "", f"{whole[0] / 1e9:.2f}", f"{whole[1] / 1e6:.1f}", str(whole[2])])
    text = [
        f"{found['name']}, batch {found['batch']}{steps}, {found['precision']}: memory of a "
        f"training step in {unit}, counted storage by storage, nothing allocated",
        aligned(head, lines),
        f"\none {one} without gradient; a training step has {found['step_flops'] / 1e12:.3g} TFLOP",
        aligned(["part", "kind", "GFLOP", "MB", "launches"], pieces),
    ]
    times = [
        [r["device"], *(duration(r["one"][s]) for s in cost.STYLES),
         *(duration(s) for s in r["step"].values())]
        for r in found["predicted"]
    ]  # fmt: skip
    if not times:
        return "\n".join([*text, "\nno times: the devices' rates are of half precision"])
    modes = [f"step, {mode}" for mode in found["predicted"][0]["step"]]
    head = ["device", *(f"{one}, {style}" for style in cost.STYLES), *modes]
    note = "\npredicted by the cost model, not measured; steps without optimiser, in one chunk"
    return "\n".join([*text, note, aligned(head, times)])


def _memory(found: dict[str, Any], looped: bool) -> tuple[str, list[str], list[list[str]]]:
    """Unit, header and lines of the ledger, a column an arm."""
    rows = found["memory"]
    unit, scale = ("GB", 1.0) if max(r["total"] for r in rows) >= 1 else ("MB", 1e3)

    def line(name: str, sizes: list[float | None]) -> list[str]:
        return [name, *("" if size is None else f"{scale * size:.3f}" for size in sizes)]

    # all tensors that an arm keeps, of the iterations, else of the blocks
    loop = "iterations" if looped else "blocks"
    names = dict.fromkeys(name for r in rows for name in r.get(loop, {}))
    lines = [line(kind, [r[key] for r in rows]) for key, kind in KINDS.items()]
    for n in names:
        sizes = [r.get(loop, {}).get(n) for r in rows]
        lines.append(line(f"kept, {loop}: {n}, {TENSORS[n]}", sizes))
    if looped:
        sums = [sum(r["blocks"].values()) if "blocks" in r else None for r in rows]
        lines.append(line("kept, blocks before and after", sums))
    lines += [
        line("kept, the rest", [r.get("rest") for r in rows]),
        line("kept in all", [r["saved"] for r in rows]),
        line("workspace of the forward", [r["forward"] for r in rows]),
        line("workspace of the backward", [r["backward"] for r in rows]),
        line("at the worst moment", [r["total"] for r in rows]),
    ]
    arms = [r["arm"] + (f", {r['chunks']} chunks" if r["chunks"] > 1 else "") for r in rows]
    return unit, ["", *arms], lines
