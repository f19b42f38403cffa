"""The launch plan of a batch as data: what runs in which order, and on how many rows.

    tables    adaLN vectors of the next timesteps
    encode    h, its injection u, the start x*_0 of the iteration
    iterate   the solve: iterations in groups, or one by one while a residual is watched
    update    post blocks, guidance, the step to the next timestep

B samples, G = 2 branches where guided (conditional rows first, then null rows), else 1; n = G B
rows. The CPU executes the plan; fpdm.graphs captures its launches on a GPU and replays them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GROUP = 8  # most iterations in one launch


@dataclass(frozen=True)
class Launch:
    """``step``: row of the plan; ``count``: timesteps of a table, or k of a solve; ``branches``: G;
    ``start``: for every branch, how many earlier solutions its iteration may start from."""

    op: Literal["tables", "encode", "iterate", "update"]
    step: int
    count: int = 0
    branches: int = 1
    start: tuple[int, ...] = ()


def launches(
    ks: Sequence[int], branches: Sequence[int], table: int, keep: int
) -> tuple[Launch, ...]:
    """The launch plan: k and branches of every timestep in order, ``table`` timesteps per table,
    ``keep`` solutions kept for reuse. A branch that skips a timestep forgets its solutions. Under a
    DiT, k = 0, the whole network is part of the update."""
    plan: list[Launch] = []
    known = [0, 0]
    for step, (k, count) in enumerate(zip(ks, branches)):
        start = tuple(known[:count])
        if k and step % table == 0:
            plan.append(Launch("tables", step, min(table, len(ks) - step), max(branches)))
        if k:
            plan.append(Launch("encode", step, k, count, start))
            plan.append(Launch("iterate", step, k, count))
        plan.append(Launch("update", step, k, count))
        known = [min(keep, known[b] + 1) if b < count else 0 for b in range(2)]
    return tuple(plan)


def groups(k: int, captured: bool = True) -> list[int]:
    """k as launches of at most 8 iterations, largest first: every group but the last begins on the
    same one of two ping-pong buffers. ``captured``: of 8, 4, 2 and 1, so that few graphs serve
    every k."""
    sizes, size = [GROUP] * (k // GROUP), GROUP // 2
    if not captured:
        return sizes + ([k % GROUP] if k % GROUP else [])
    while size:
        sizes += [size] if k & size else []
        size //= 2
    return sizes


def bucket(rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least ``rows``: few shapes, and
    never more than half again as many rows as are needed."""
    power = 1 << max(0, rows - 1).bit_length()
    return max(1, power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power)


def reserves(ks: Sequence[int], branches: Sequence[int]) -> list[tuple[int, int]]:
    """Under allocation adaptive, what a sample must leave of its sum of k at every timestep, per
    branch: half of k, at least 1, for every later timestep that the branch runs."""
    found, kept = [], [0, 0]
    for k, count in zip(reversed(ks), reversed(branches)):
        found.append((kept[0], kept[1]))
        kept = [kept[b] + (max(1, k // 2) if b < count else 0) for b in range(2)]
    return found[::-1]


def most_iterations(ks: Sequence[int], limit: int) -> list[int]:
    """The most a sample can run at every timestep under allocation adaptive: everything but one
    iteration for each earlier timestep and ``reserves`` for the later ones, at most ``limit``."""
    kept = reserves(ks, [1] * len(ks))
    return [min(limit, sum(ks) - step - r) for step, (r, _) in enumerate(kept)]
