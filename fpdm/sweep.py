"""Quality against iterations per timestep at a fixed budget of blocks (paper section 4.3, Fig. 4).

    python -m fpdm.evaluate SOURCE --sweep [--budgets 140,280,560] [--ks 1,2,3,...] [--seeds 3]

A budget buys S = floor(budget / (n_pre + k + n_post)) timesteps of k iterations; whatever is left
is stranded and reported. Points whose S is more than the schedule's timesteps, or less than one, do
not exist; they are named. Every point is one set of 898 digits per seed; rows are written as they
are known, beside those of other sweeps with the same settings, and a second run of the same command
continues. The means over the seeds are printed at the end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from fpdm import figures
from fpdm.budget import fixed_blocks
from fpdm.config import ConfigError, ModelConfig, SamplerConfig
from fpdm.files import atomic_write

# between one pre and one post block, all but 1 divide the budgets: nothing is stranded
KS = (1, 2, 3, 5, 8, 12, 18, 26, 33)
BUDGETS = (140, 280, 560)


@dataclass(frozen=True)
class Point:
    """S timesteps of k iterations out of a budget of blocks, ``stranded`` of them unspent."""

    budget: int
    k: int
    steps: int
    stranded: int

    def config(self, base: SamplerConfig) -> SamplerConfig:
        """``base`` with this point's cost."""
        return replace(
            base, steps=self.steps, iters=self.k, budget=None, budget_macs=None, schedule=(),
            allocation="constant",
        )  # fmt: skip


def points(
    model: ModelConfig, budgets: Sequence[int], ks: Sequence[int], timesteps: int
) -> list[Point]:
    """Every point that exists, once. Raises ConfigError for a DiT, and when there is none."""
    if model.kind == "dit":
        raise ConfigError("--sweep: got a dit, expected an fpdm model: a DiT has no iterations")
    found = []
    for budget in dict.fromkeys(budgets):
        for k in dict.fromkeys(ks):
            steps, stranded = divmod(budget, fixed_blocks(model) + k)
            if k >= 1 and 1 <= steps <= timesteps:
                found.append(Point(budget, k, steps, stranded))
    if not found:
        raise ConfigError(
            f"--sweep: got budgets {list(budgets)} and k {list(ks)}, expected a point with 1 to "
            f"{timesteps} timesteps"
        )
    return found


def _integers(name: str, text: str | None, default: Sequence[int]) -> list[int]:
    try:
        return list(default) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name}: got {text!r}, expected integers like 1,2,3") from None


def asked(
    model: ModelConfig, options: Mapping[str, str | None], timesteps: int
) -> tuple[list[Point], int]:
    """Points and number of seeds from ``budgets``, ``ks``, ``seeds`` as typed; which points do not
    exist is printed. Raises ConfigError."""
    budgets = _integers("budgets", options["budgets"], BUDGETS)
    ks = _integers("ks", options["ks"], KS)
    seeds = _integers("seeds", options["seeds"], [3])
    if len(seeds) != 1 or seeds[0] < 1:
        raise ConfigError(f"--seeds: got {options['seeds']}, expected how many, at least 1")
    found = points(model, budgets, ks, timesteps)
    exist = {(p.budget, p.k) for p in found}
    absent = [f"{b} x {k}" for b in budgets for k in ks if (b, k) not in exist]
    if absent:
        print(
            f"left out: got {', '.join(dict.fromkeys(absent))} (budget x k), expected k at least 1 "
            f"and 1 to {timesteps} timesteps"
        )
    return found, seeds[0]


def _earlier(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in ``path``, none where there is no such file. Raises ConfigError for those of other
    settings, for a file of something else, and for a picture that no rows belong to."""
    if not path.exists():
        if path.with_suffix(".png").exists():
            raise ConfigError(
                f"--out: got {path.parent}, which holds sweep.png and no sweep.json, expected "
                "another directory"
            )
        return []
    try:
        old = json.loads(path.read_bytes())
        rows, known = sorted(old["rows"], key=_key), old["settings"]
        table(rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--out: got {path}, which is damaged, expected rows of a sweep or another directory"
        ) from error
    if rows and known != settings:
        raise ConfigError(
            f"--out: got {path.parent}, whose sweep.json has {len(rows)} rows of another model or "
            "other settings; expected another directory"
        )
    return rows


def _text(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """As JSON with a line for every row."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{\n "settings": {json.dumps(settings)},\n "rows": [\n{lines}\n ]\n}}\n'


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Frechet distance and accuracy, means over the seeds: a line per k, a column per budget."""
    budgets, ks = (sorted({row[name] for row in rows}) for name in ("budget", "k"))
    lines = ["   k" + "".join(f"{f'{budget} blocks':>16}" for budget in budgets)]
    for k in ks:
        line = f"{k:4d}"
        for budget in budgets:
            found = [row for row in rows if (row["budget"], row["k"]) == (budget, k)]
            frechet, accuracy = (
                np.mean([row[name] for row in found]) if found else np.nan
                for name in ("frechet", "accuracy")
            )
            line += f"{frechet:10.3f}{accuracy:6.3f}" if found else f"{'-':>10}{'-':>6}"
        lines.append(line)
    return [*lines, "Frechet distance and accuracy, means over the seeds"]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def _add(
    path: Path, settings: dict[str, Any], new: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """``new`` rows beside those in ``path``, which others may be adding to. Returns all of them."""
    rows: list[dict[str, Any]] = []

    def merge(file: BinaryIO) -> None:
        # read where other writers wait for this one's end
        found = {_key(row): row for row in [*new, *_earlier(path, settings)]}
        rows.extend(found[key] for key in sorted(found))
        file.write(_text(settings, rows).encode())

    atomic_write(path, merge)
    return rows


def _key(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["budget"], row["k"], row["seed"]


def run(
    wanted: Sequence[Point],
    seeds: Sequence[int],
    measure: Callable[[Point, int], dict[str, float]],
    out: Path,
    settings: dict[str, Any],
    references: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """``measure(point, seed)`` for all of them, into ``out``/sweep.json and sweep.png, which shows
    the Frechet distances ``references`` too.

    Rows that another run with the same settings has written, or writes meanwhile, are kept. Raises
    ConfigError where there are some of others.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.json"
    rows = _add(path, settings)
    known = {_key(row) for row in rows}
    todo = [(p, seed) for p in wanted for seed in seeds if (p.budget, p.k, seed) not in known]
    done, total = 0, sum(p.budget - p.stranded for p, _ in todo)
    began = time.perf_counter()
    with tqdm(total=total, unit="block", desc="sweep", disable=None if todo else True) as bar:
        for point, seed in todo:
            row = {"budget": point.budget, "k": point.k, "steps": point.steps, "seed": seed,
                   "stranded": point.stranded, **measure(point, seed)}  # fmt: skip
            rows = _add(path, settings, [row])
            done += point.budget - point.stranded
            bar.update(point.budget - point.stranded)
            left = _duration((time.perf_counter() - began) * (total / done - 1))
            with tqdm.external_write_mode(sys.stdout):
                print(
                    f"{point.budget} blocks: {point.steps:>3} x k = {point.k:<3} seed {seed}  "
                    f"Frechet {row['frechet']:.3f}  accuracy {row['accuracy']:.4f}"
                    + (f"  about {left} left" if done < total else ""), flush=True,
                )  # fmt: skip
    print("\n".join(table(rows)))
    if figures.plot_sweep(rows, out / "sweep.png", references):
        print(f"wrote {out}/sweep.json and sweep.png")
    return rows
