"""Short rows, single operators above all, timed in several fresh processes.

Where a baseline's intermediates lie is decided once per process, and with it how long one call
takes: the same within a process, up to 1.7 times apart between two. So a row holds the mean of the
middle half of processes, and ``ratios`` of each arm what every process found.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.against import Found, key
from bench.rows import OURS, Row

# as many as fit the seconds, and a middle needs three; rounds of each row in one
LEAST, SECONDS, ROUNDS = 3, 120.0, 5


def middle(values: list[float]) -> float:
    """The mean without the largest and the smallest quarter: an outlier does not move it, and
    between two modes it moves less than the median."""
    cut = max(1, len(values) // 4) if len(values) > 2 else 0
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def pool(found: list[Found], ceilings: dict[str, float]) -> Found:
    """One row of what each process found of it; the first without a time, where there is one."""
    for row in found:
        if "error" in row or OURS not in row["arms"]:
            return row
    arms: dict[str, Found] = {}
    for name in found[0]["arms"]:
        each = [row["arms"][name] for row in found if name in row["arms"]]
        arms[name] = {k: middle([arm[k] for arm in each]) for k in each[0]}
        arms[name]["ratios"] = [arm["ratio"] for arm in each]
    row = {**found[0], "arms": arms, "rounds": sum(row["rounds"] for row in found)}
    return row | machine.shares(row, arms[OURS]["median_s"], ceilings)


def measure(
    rows: list[Row], count: int, words: list[str], ceilings: dict[str, float]
) -> list[Found]:
    """``rows``, each pooled from at most ``count`` processes, which get the options ``words``.
    Raises RuntimeError when one of them writes no result."""
    names = "|".join(re.escape(row.name) for row in rows)
    chosen = ["--suite", *dict.fromkeys(row.suite for row in rows), "--row", f"^({names})$"]
    began = time.perf_counter()
    found: list[list[Found]] = []
    with tempfile.TemporaryDirectory(prefix="fpdm-bench-") as folder:
        for index in range(count):
            seconds = time.perf_counter() - began
            if index >= LEAST and seconds > SECONDS:
                break
            told = f"process {index + 1}/{count} {seconds:4.0f} s"
            print(f"[{told}] {len(rows)} short rows", flush=True)
            out = Path(folder) / f"{index}.json"
            command = [sys.executable, "-m", "bench", *chosen, *words, "--out", str(out)]
            done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
            if not out.is_file():
                told = done.stderr.strip()[-400:]
                raise RuntimeError(f"its process ended with {done.returncode}: {told}")
            found.append(json.loads(out.read_text())["rows"])
    # two suites may have a row of the same name
    return [pool([row for each in found for row in each if key(row) == (r.suite, r.name)], ceilings)
            for r in rows]  # fmt: skip
