"""``python -m bench``: time rows against their baselines, compare, render.

    python -m bench                       every row, into bench/results/<machine>/bench.json
    python -m bench --suite operators --row adaln --rounds 31
    python -m bench --against FILE        a result, or a commit that holds one
    python -m bench --count               memory and cost model, into bench/results/counted.json
    python -m bench --render              report.html and the README tables from the JSON

Each row is one process state: arms in turn, round by round; results are written after every row.
``--against`` compares, row by row, our time over the first baseline's of the same run, so that a
slower machine is not a slower program, and by the best rounds, which other programs disturb least.
A row that got slower by more than ``--tolerance`` is measured again, up to twice; it exits with 1
when one stays slower.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import counted, gpu_rows, machine, page, report, rows, suites, timing
from bench.memory import LiveBytes
from fpdm.cli import run_main
from fpdm.config import ConfigError
from fpdm.kernels import ops

RESULTS = machine.ROOT / "bench" / "results"
# single calls: how fast one is depends on where its memory happens to lie, so they are timed in
# several places
PLACES = {"operators": 3, "iteration": 3}
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
    dtype = rows.dtype_name(arms.dtype)
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
    if row.suite in ("operators", "iteration") and torch.cuda.is_available():
        # a single one takes the host longer than the device
        times, uncaptured = timing.device_times(alive, rounds or row.rounds)
        found["missing"] |= uncaptured
    else:
        times = timed(row, alive, rounds or row.rounds)
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
    if torch.cuda.is_available() and arms.images:
        found["joules_per_image"] = joules(alive[rows.OURS], ours.median) / arms.images
    if arms.bytes:
        found["copy_share"] = arms.bytes / ours.median / ceilings["copy"]
    if arms.flops:
        found["gemm_share"] = arms.flops / ours.median / machine.gemm_ceiling(ceilings, dtype)
    for name, fn in alive.items():
        # inside a compiled function nothing is seen
        if row.suite in MEASURED and "compiled" not in name and "frozen" not in name:
            found["arms"][name]["peak_bytes"] = peak_bytes(fn)
    return found


def timed(row: rows.Row, alive: dict[str, timing.Arm], rounds: int) -> dict[str, timing.Times]:
    """Times of the arms, pooled over as many buildings of the row as its suite asks for."""
    places = PLACES.get(row.suite, 1)
    # all alive, so that each has memory of its own
    others = [row.build().run for _ in range(places - 1)]
    each = -(-rounds // places)
    found = [
        timing.interleave(arms, each, seconds=row.seconds / places)
        for arms in (alive, *({n: run[n] for n in alive} for run in others))
    ]
    return {n: timing.Times(tuple(t for x in found for t in x[n].rounds)) for n in alive}


def joules(fn: Callable[[], object], seconds: float) -> float:
    """Of one call that takes ``seconds``: over 2 s of them, as the counter is read 10 times a
    second."""
    count = max(1, round(2 / seconds))
    timing.synchronize()
    before = machine.joules() or 0.0
    for _ in range(count):
        fn()
    timing.synchronize()
    return ((machine.joules() or 0.0) - before) / count


def told(fn: Callable[[], object], dtype: torch.dtype) -> dict[str, str]:
    """Which implementation ran our operators in one call. Raises ImplError for another than the
    announced one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.reset_counters()
    fn()
    impl = ops.choose("auto", device, dtype)
    return {"impl": impl, "ran": line} if (line := ops.ran(impl)) else {}


def chosen(args: argparse.Namespace) -> list[rows.Row]:
    """The rows asked for. Raises ConfigError when there are none."""
    known = gpu_rows.rows() if torch.cuda.is_available() else suites.cpu_rows()
    found = [r for r in known if r.suite in (args.suite or r.suite)]
    found = [r for r in found if re.search(args.row or "", r.name)]
    found = [r for r in found if not (args.skip and re.search(args.skip, r.name))]
    if not found:
        suites_ = ", ".join(sorted({r.suite for r in known}))
        raise ConfigError(
            f"rows: got none for {args.suite} {args.row!r}, expected one of {suites_}"
        )
    return found


def baseline(source: str, name: str) -> dict[str, Any]:
    """A result: a JSON file, or the committed one of a commit. Raises ConfigError."""
    path = Path(source)
    text = path.read_text() if path.is_file() else ""
    if not text:
        text = machine.git("show", f"{source}:bench/results/{name}/bench.json")
    if not text:
        raise ConfigError(
            f"--against: got {source!r}, expected a JSON file or a commit with "
            f"bench/results/{name}/bench.json"
        )
    return json.loads(text)


def change(old: dict[str, Any], row: dict[str, Any]) -> tuple[float, str] | None:
    """(how many times longer ours takes over the first baseline than in ``old``, that baseline), by
    the best rounds; None where the two have nothing in common."""
    known = next((r for r in old["rows"] if (r["suite"], r["name"]) == key(row)), None)
    names = [n for n in row["arms"] if n != rows.OURS and known and n in known["arms"]]
    if known is None or not names:
        return None
    was, now = (
        r["arms"][rows.OURS]["best_s"] / r["arms"][names[0]]["best_s"] for r in (known, row)
    )
    return now / was, names[0]


def key(row: dict[str, Any]) -> tuple[str, str]:
    """What identifies a row."""
    return row["suite"], row["name"]


def slower(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """Rows in which our time over the first baseline's grew by more than ``tolerance``."""
    found = ((row, change(old, row)) for row in new["rows"])
    return [
        f"{row['suite']}: {row['name']}: {grown[0]:.2f} times slower against {grown[1]}"
        for row, grown in found if grown and grown[0] > 1 + tolerance
    ]  # fmt: skip


def confirm(
    old: dict[str, Any], row: dict[str, Any], again: Callable[[], dict[str, Any]], tolerance: float
) -> dict[str, Any]:
    """``row``, or where it got slower than ``old`` a second or third measurement of it: a slowdown
    stays, another program's burst does not."""
    for _ in range(2):
        grown = change(old, row)
        if grown is None or grown[0] <= 1 + tolerance:
            break
        row = min(row, again(), key=lambda r: (change(old, r) or grown)[0])
    return row


def measure(args: argparse.Namespace, path: Path, old: dict[str, Any] | None) -> dict[str, Any]:
    """Runs the rows and writes the file after each."""
    wanted = chosen(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = machine.facts("python -m bench " + " ".join(args.words))
    result |= {"ceilings": machine.ceilings(device), "rows": []}
    began = time.perf_counter()
    for index, row in enumerate(wanted):
        seconds = time.perf_counter() - began
        print(f"[{index + 1}/{len(wanted)} {seconds:4.0f} s] {row.suite}: {row.name}", flush=True)
        run = functools.partial(run_row, row, args.rounds, result["ceilings"])
        try:
            found = run()
            result["rows"].append(confirm(old, found, run, args.tolerance) if old else found)
        except Exception as error:
            if args.strict:
                raise
            failed = {"suite": row.suite, "name": row.name, "arms": {}, "missing": {}}
            result["rows"].append({**failed, "error": f"{type(error).__name__}: {error}"[:500]})
        result["seconds"] = time.perf_counter() - began
        write(path, result)
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with an end of line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def render(path: Path, whole: bool) -> None:
    """The page beside the result; with ``whole`` of every committed one, and the README's tables.
    Raises ConfigError."""
    counted, paths = report.load(RESULTS)[1], [path]
    if whole:
        paths = sorted(RESULTS.glob("*/bench.json"))
    if not all(p.is_file() for p in paths):
        raise ConfigError(f"--render: got no {path}, expected a result; run python -m bench")
    for p in paths:
        target = p.with_name("report.html")
        target.write_text(page.page(json.loads(p.read_text()), counted))
        print("wrote", target)
    readme = machine.ROOT / "README.md"
    text = report.readme(readme.read_text(), RESULTS) if whole else None
    if text is not None:
        readme.write_text(text)
        print("wrote", readme)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser("bench", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--suite", nargs="+", help="operators network sampler training optimizer data")
    p.add_argument("--row", help="rows whose name this regular expression is found in")
    p.add_argument("--skip", help="without the rows whose name this one is found in")
    p.add_argument("--rounds", type=int, help="instead of each row's own")
    p.add_argument("--out", type=Path, help="JSON file (bench/results/<machine>/bench.json)")
    p.add_argument("--against", help="JSON file or commit")
    p.add_argument("--tolerance", type=float, default=0.12, help="slower by more is told: 0.12")
    p.add_argument("--threads", type=int, help="of torch")
    p.add_argument("--strict", action="store_true", help="a failing row ends the run")
    p.add_argument("--count", action="store_true", help="only count memory and the cost model")
    p.add_argument("--render", action="store_true", help="only write report and README tables")
    return p


def main(argv: list[str]) -> int:
    """The command; see the module."""
    args = parser().parse_args(argv)
    args.words = argv
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.out or RESULTS / machine.name() / "bench.json"
    if args.count:
        write(RESULTS / "counted.json", counted.collect())
        print("wrote", RESULTS / "counted.json")
        return 0
    if args.render:
        render(path, args.out is None)
        return 0
    old = baseline(args.against, machine.name()) if args.against else None
    result = measure(args, path, old)
    print(report.table(result))
    print("wrote", path)
    lines = [] if old is None else slower(old, result, args.tolerance)
    if old is not None:
        print("\n".join(lines) or "no row got slower")
    return 1 if lines or any("error" in r for r in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(run_main("bench", main))
