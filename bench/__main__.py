"""``python -m bench``: time rows against their baselines, compare, render.

    python -m bench                       every row, into bench/results/<machine>/bench.json
    python -m bench --suite operators --row adaln --rounds 31
    python -m bench --against FILE        a result, or a commit that holds one
    python -m bench --against FILE --compare    the result that is there, measuring nothing
    python -m bench --count               memory and cost model, into bench/results/counted.json
    python -m bench --count fpdm-b-4 --batch 32 --m 6    of any preset, recipe or YAML: a table
    python -m bench --render              report.html and the tables of the READMEs from the JSON

Each row is one process state: arms in turn, round by round; results are written after every row.
Short rows on a CPU are timed in several fresh processes, see bench/processes.py.
``--against`` says how many ratios agree within 15 %, and which rows got slower, see
bench/against.py: one that did by more than ``--tolerance`` is measured again, up to twice; it exits
with 1 when one stays slower.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import (
    against,
    counted,
    gpu_rows,
    machine,
    page,
    processes,
    report,
    rows,
    suites,
    summary,
    timing,
)
from bench.against import Found
from bench.memory import LiveBytes
from fpdm.cli import run_main
from fpdm.config import ConfigError
from fpdm.kernels import implementations
from fpdm.kernels.launch import dtype_name

RESULTS = machine.ROOT / "bench" / "results"
Measured = Callable[[list[rows.Row]], list[Found]]
SUITES = ("operators", "iteration", "network", "sampler", "training", "optimizer", "third party",
          "data")  # fmt: skip
# what only a measurement uses, and what only a comparison does beside it
MEASURING = ("suite", "row", "skip", "rounds", "processes", "threads", "strict")
COMPARING = ("against", "tolerance")
# suites whose peak memory is measured
MEASURED = ("network", "sampler", "training")


def peak_bytes(fn: Callable[[], object]) -> int:
    """Memory that one call needs beyond what was there: the allocator's on a GPU, counted on a
    CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as mode:
        fn()
    return mode.peak


def run_row(row: rows.Row, rounds: int | None, ceilings: dict[str, float]) -> dict[str, Any]:
    """Times, ratios and counts of one row; baselines that fail are named with their reason.

    Raises ImplError when our operators ran on another implementation than the announced one."""
    arms = row.build()
    dtype = dtype_name(arms.dtype)
    found: dict[str, Any] = {
        "suite": row.suite, "name": row.name, "dtype": dtype, "flops": arms.flops,
        "bytes": arms.bytes, "images": arms.images, **arms.facts, "arms": {},
        "missing": {name: why for name, why in arms.run.items() if isinstance(why, str)},
    }  # fmt: skip
    alive = {name: fn for name, fn in arms.run.items() if not isinstance(fn, str)}
    if rows.OURS not in alive:
        return found
    for name in [n for n in alive if n != rows.OURS]:
        try:
            alive[name]()
        except Exception as error:
            found["missing"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            del alive[name]
    found |= told(alive[rows.OURS], arms.dtype)
    times, uncaptured, cold = timed(row, alive, rounds)
    found["missing"] |= uncaptured
    if rows.OURS not in times:
        return found
    ours = times[rows.OURS]
    found["rounds"] = len(ours.rounds)
    found["arms"] = {
        name: {
            "median_s": t.median,
            "best_s": t.best,
            "spread": t.spread,
            "ratio": timing.ratio(t, ours),
        }
        for name, t in times.items()
    }
    for name, seconds in cold.items():
        found["arms"][name]["cold_s"] = seconds
    if row.suite != "data":
        # reading data leaves a GPU idle
        found |= machine.under_load(alive[rows.OURS], ours.median, arms.images)
    found |= machine.shares(found, ours.median, ceilings)
    if row.suite in MEASURED:
        for name, size in peaks(row, alive).items():
            found["arms"][name]["peak_bytes"] = size
    return found


def timed(
    row: rows.Row, arms: dict[str, timing.Arm], rounds: int | None
) -> tuple[dict[str, timing.Times], dict[str, str], dict[str, float]]:
    """Times of every arm, why one has none, and with a cold L2 cache, where that is measured."""
    if row.replayed and torch.cuda.is_available():
        times, missing = timing.device_times(arms, rounds or row.rounds)
        cold = timing.cold_times({n: arms[n] for n in times}, rounds or row.rounds)
        return times, missing, cold
    # a number of rounds that was asked for is kept to
    known = 0.0 if rounds else timing.KNOWN
    # every arm ran once by now
    return timing.interleave(arms, rounds or row.rounds, row.seconds, known, True), {}, {}


def peaks(row: rows.Row, arms: dict[str, timing.Arm]) -> dict[str, int]:
    """``peak_bytes`` of every arm that tells them."""
    replayed = torch.cuda.is_available() and row.suite in ("sampler", "training")
    found: dict[str, int] = {}
    for name, fn in arms.items():
        # inside a compiled function nothing is seen, and a replay allocates nothing
        if "compiled" in name or "frozen" in name or (replayed and name == rows.OURS):
            continue
        found[name] = peak_bytes(fn)
    if replayed and rows.LAUNCHED in found:
        # the graphs' pool holds what the launches need
        found[rows.OURS] = found[rows.LAUNCHED]
    return found


def told(fn: Callable[[], object], dtype: torch.dtype) -> dict[str, str]:
    """Which implementation ran our operators in one call. Raises ImplError for another than the
    announced one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    implementations.reset_counters()
    fn()
    impl = implementations.choose("auto", device, dtype)
    return {"impl": impl, "ran": line} if (line := implementations.ran(impl)) else {}


def chosen(args: argparse.Namespace) -> list[rows.Row]:
    """The rows asked for. Raises ConfigError when there are none."""
    known = gpu_rows.rows() if torch.cuda.is_available() else suites.cpu_rows()
    found = [r for r in known if not args.suite or r.suite in args.suite]
    found = [r for r in found if re.search(args.row or "", r.name)]
    found = [r for r in found if not (args.skip and re.search(args.skip, r.name))]
    if not found:
        suites_ = ", ".join(sorted({r.suite for r in known}))
        asked = {"--suite": " ".join(args.suite or ()), "--row": args.row, "--skip": args.skip}
        got = " ".join(f"{name} {value}" for name, value in asked.items() if value)
        raise ConfigError(f"rows: got none for {got}, expected rows of the suites {suites_}")
    return found


def measure(args: argparse.Namespace, path: Path, old: dict[str, Any] | None) -> dict[str, Any]:
    """Runs the rows and writes the file after each, after short ones together."""
    wanted = chosen(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # where a file of this machine lies tells a reader nothing
    asked = (Path(word).name if Path(word).is_absolute() else word for word in args.words)
    result = machine.facts(" ".join(("python -m bench", *asked)))
    ceilings = machine.ceilings(device)
    result |= {"ceilings": ceilings, "rows": []}
    began, company = time.perf_counter(), machine.Others()

    def run(some: list[rows.Row], measured: Measured) -> None:
        def attempt(these: list[rows.Row]) -> list[Found]:
            return attempted(these, measured, args.strict)

        found = attempt(some)
        if old is not None:
            found = against.confirm(
                old, found, lambda places: attempt([some[i] for i in places]), args.tolerance
            )
        result["rows"] += found
        result["seconds"] = time.perf_counter() - began
        result["others"] = company.share()
        write(path, result)

    pooled = [r for r in wanted if r.pooled and pools(args)]
    if pooled:
        words = ["--processes", "1", "--rounds", str(args.rounds or processes.ROUNDS)]
        words += ["--threads", str(torch.get_num_threads())]
        run(pooled, lambda some: processes.measure(some, args.processes, words, ceilings))
    others = [r for r in wanted if r not in pooled]
    for index, row in enumerate(others):
        seconds = time.perf_counter() - began
        print(f"[{index + 1}/{len(others)} {seconds:4.0f} s] {row.suite}: {row.name}", flush=True)
        run([row], lambda some: [run_row(r, args.rounds, ceilings) for r in some])
    return result


def pools(args: argparse.Namespace) -> bool:
    """Whether short rows are timed in processes of their own; a GPU replays them instead."""
    return args.processes > 1 and not torch.cuda.is_available()


def attempted(some: list[rows.Row], measured: Measured, strict: bool) -> list[Found]:
    """What ``measured`` finds of the rows, or the rows with the error that it ended with. With
    ``strict`` an error is raised, RuntimeError where a row only tells of it."""
    others = machine.Others()
    try:
        found = measured(some)
        share = others.share()
        found = [row if share is None else {**row, "others": share} for row in found]
    except Exception as error:
        if strict:
            raise
        told = f"{type(error).__name__}: {error}"[:500]
        return [{"suite": r.suite, "name": r.name, "arms": {}, "missing": {}, "error": told}
                for r in some]  # fmt: skip
    failed = [row["error"] for row in found if "error" in row]
    if failed and strict:
        raise RuntimeError(failed[0])
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with an end of line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def render(path: Path, whole: bool) -> None:
    """The page beside the result; with ``whole`` of every committed one, bench/results/README.md,
    and the README's tables. Raises ConfigError."""
    counted, paths = report.load(RESULTS)[1], [path]
    if whole:
        paths = sorted(RESULTS.glob("*/bench.json"))
    if not all(p.is_file() for p in paths):
        raise ConfigError(f"--render: got no {path}, expected a result; run python -m bench")
    for p in paths:
        target = p.with_name("report.html")
        target.write_text(page.page(json.loads(p.read_text()), counted))
        print("wrote", target)
    if whole:
        (RESULTS / "README.md").write_text(report.document(*report.load(RESULTS)))
        print("wrote", RESULTS / "README.md")
        readme = machine.ROOT / "README.md"
        if (text := summary.readme(readme.read_text(), RESULTS)) is not None:
            readme.write_text(text)
            print("wrote", readme)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--suite", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    p.add_argument("--row", help="rows whose name this regular expression is found in")
    p.add_argument("--skip", help="without the rows whose name this one is found in")
    p.add_argument("--rounds", type=int, help="instead of each row's own")
    p.add_argument("--out", type=Path, help="JSON file (bench/results/<machine>/bench.json)")
    p.add_argument("--against", help="JSON file or commit")
    p.add_argument("--compare", action="store_true", help="what is in --out, without measuring it")
    p.add_argument("--tolerance", type=float, default=0.12, help="slower by more is told: 0.12")
    p.add_argument("--processes", type=int, default=15, help="of short rows on a CPU: to 15")
    p.add_argument("--threads", type=int, help="of torch")
    p.add_argument("--strict", action="store_true", help="a failing row ends the run")
    p.add_argument("--render", action="store_true", help="only write reports and tables")
    counted.add_options(p)
    return p


def refuse(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that the mode would ignore."""
    counted.refuse(args)
    unused: tuple[str, ...] = () if args.against else ("tolerance",)
    mode = "--against"
    if args.compare:
        unused, mode = MEASURING, "a measurement"
    if args.count is not None or args.render:
        unused, mode = (*MEASURING, *COMPARING, "compare"), "a measurement"
    if args.count is not None:
        unused += ("render",)
    defaults = parser()
    for name in unused:
        if (got := getattr(args, name)) != defaults.get_default(name):
            told = " ".join(got) if isinstance(got, list) else got
            raise ConfigError(f"--{name}: got {told}, expected it with {mode} only")


def main(argv: list[str]) -> int:
    """The command; see the module."""
    args = parser().parse_args(argv)
    args.words = argv
    refuse(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.out or RESULTS / machine.name() / "bench.json"
    if args.count is not None:
        found = counted.count(counted.asked(args)) if args.count else counted.collect()
        if args.count:
            print(counted.told(found))
        if args.out or not args.count:
            path = args.out or RESULTS / "counted.json"
            write(path, found)
            print("wrote", path)
        return 0
    if args.render:
        render(path, args.out is None)
        return 0
    if args.compare and not args.against:
        raise ConfigError("--compare: got no --against, expected a JSON file or a commit")
    old = against.load(args.against, machine.name()) if args.against else None
    if args.compare:
        result = against.load(str(path), machine.name())
    else:
        result = measure(args, path, old)
        print(report.table(result))
        print("wrote", path)
        for line in report.disturbed(result):
            print(line)
    lines = [] if old is None else against.slower(old, result, args.tolerance)
    if old is not None:
        print("\n".join([*against.agreement(old, result), *(lines or ["no row got slower"])]))
    return 1 if lines or any("error" in r for r in result["rows"]) else 0


if __name__ == "__main__":
    # modules are never garbage: to look through them before a short row takes longer than the row
    gc.freeze()
    sys.exit(run_main("bench", main))
