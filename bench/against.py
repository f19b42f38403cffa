"""One result against an older one: what got slower, what is measured again, how many ratios agree.

Our time over the first baseline's of the same run is compared, so that a slower machine is not a
slower program, and by the best rounds, which other programs disturb least. A row of several
processes has to have grown by its ratio too: of one process a best round says most, of eleven the
pairs do. How well two runs of one program agree is told by the ratios themselves, those of every
baseline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import machine
from bench.rows import OURS
from fpdm.config import ConfigError

Found = dict[str, Any]
# of two runs, that a ratio may differ and still agree
WITHIN = 0.15


def load(source: str, name: str) -> Found:
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


def key(row: Found) -> tuple[str, str]:
    """What identifies a row."""
    return row["suite"], row["name"]


def change(old: Found, row: Found) -> tuple[float, str] | None:
    """(how many times longer ours takes over the first baseline than in ``old``, that baseline), by
    the best rounds, or the ratio of several processes where that is less; None where the two have
    nothing in common."""
    known = next((r for r in old["rows"] if key(r) == key(row)), None)
    names = [n for n in row["arms"] if n != OURS and known and n in known["arms"]]
    if known is None or not names:
        return None
    was, now = (r["arms"][names[0]] for r in (known, row))
    best = [r["arms"][OURS]["best_s"] / r["arms"][names[0]]["best_s"] for r in (known, row)]
    longer = best[1] / best[0]
    if "ratios" in was and "ratios" in now:
        longer = min(longer, was["ratio"] / now["ratio"])
    return longer, names[0]


def grown(old: Found, row: Found) -> float:
    """``change``, 1 where there is none."""
    found = change(old, row)
    return 1.0 if found is None else found[0]


def slower(old: Found, new: Found, tolerance: float) -> list[str]:
    """Rows in which our time over the first baseline's grew by more than ``tolerance``."""
    found = ((row, change(old, row)) for row in new["rows"])
    return [
        f"{row['suite']}: {row['name']}: {told[0]:.2f} times slower against {told[1]}"
        for row, told in found if told and told[0] > 1 + tolerance
    ]  # fmt: skip


def confirm(
    old: Found, found: list[Found], again: Callable[[list[int]], list[Found]], tolerance: float
) -> list[Found]:
    """``found``, with a second or third measurement of the rows that got slower than in ``old``: a
    slowdown stays, another program's burst does not. ``again`` measures the rows of its places."""
    found = list(found)
    for _ in range(2):
        suspects = [i for i, row in enumerate(found) if grown(old, row) > 1 + tolerance]
        for i, row in zip(suspects, again(suspects) if suspects else []):
            # a row that failed this time has no arms and would look unchanged
            if "error" not in row:
                found[i] = min(found[i], row, key=lambda r: grown(old, r))
    return found


def agreement(old: Found, new: Found) -> list[str]:
    """How many ratios to a baseline are within 15 % of those of ``old``, and the others."""
    known = {key(row): row["arms"] for row in old["rows"]}
    pairs = [
        (f"{row['suite']}: {row['name']}: {name}", known[key(row)][name], arm)
        for row in new["rows"] if key(row) in known
        for name, arm in row["arms"].items() if name != OURS and name in known[key(row)]
    ]  # fmt: skip
    lines = [
        f"{what} {now['ratio']:.2f}x, was {was['ratio']:.2f}x"
        for what, was, now in pairs
        if max(was["ratio"] / now["ratio"], now["ratio"] / was["ratio"]) > 1 + WITHIN
    ]
    return [f"{len(pairs) - len(lines)} of {len(pairs)} ratios agree within {WITHIN:.0%}", *lines]
