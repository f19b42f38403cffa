"""Who is done: per-sample stopping inside a solve, and compaction of those that go on.

    r_j = |f(x_j) - x_j| / |f(x_j)|          done after iteration j if r_j <= tol or j + 1 = cap

What a sample returns is f(x_j) of the iteration that ended it, the first whose residual met the
tolerance, and k = j + 1 counts it; with a solver (fpdm.solvers) it is the f(x) of its best residual
so far. A residual that is NaN meets no tolerance. With allocation adaptive the cap is what a
sample has left of the plan's sum of k, but for half of k for every later timestep: hard timesteps
may borrow from later ones and easy ones leave more, and the sum is never exceeded.

The device decides and freezes: a slot that is done keeps its iterate whatever else is launched, so
when the host learns of it changes results by no more than the rounding of other shapes. On a CPU
the host reads at once, and takes the slots that go on to the front whenever one is done: nothing
is carried along, so nothing needs freezing; with csrc/cpu a solve is one call that does the same
(``cpu_loop.solve``). On a GPU it reads the flag of iteration j - 1 after it
has launched iteration j (``solvers.Flag``), so that it waits for nothing without work behind it,
and compacts in buckets (``plan.bucket``), few shapes for few graphs: those of a bucket that are
done are carried along until the next smaller one. A solve of so few slots that compaction saves
nothing (``LOOP_ROWS``) is one launch under graphs=on, where torch captures conditional WHILE nodes
(2.14): the device repeats the iteration until no slot goes on, and the host learns nothing. Not
measured yet, so graphs=auto leaves it alone. Two branches of a sample stop apart: each is a
fixed-point problem of its own.

n slots, R rows of the batch, all tensors of ``workspace.Watch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpdm.solvers import Best, Solver, mark, proceed
from fpdm.workspace import Watch

LOOP_ROWS = 2  # most slots of a loop that ends on the device: more are worth compacting


def begin(w: Watch, n: int, k: Tensor, reserve: Tensor, limit: int) -> None:
    """All of n slots go on, up to ``k`` (1,) iterations, or where there is a ``limit`` (allocation
    adaptive) up to what the bank holds beyond ``reserve`` (n,), but at most the limit."""
    torch.arange(n, out=w.rows[:n])
    torch.arange(n, out=w.place[:n])
    w.left.fill_(n)
    w.count[:n].zero_()
    w.done[:n].zero_()
    cap = (w.bank[:n] - reserve).clamp_max(limit) if limit else k.expand(n)
    w.cap[:n].copy_(cap)


def decide(
    w: Watch, n: int, r: Tensor, tol: float, src: Tensor, dst: Tensor, out: Tensor | None
) -> None:
    """After an iteration from ``src`` to ``dst`` (n,T,D) with residuals r (n,): mark the slots that
    are done now, and freeze those that were before. ``out``, one of the two, receives the iterates;
    None where no slot was done before: they are in ``dst``."""
    before = None if out is None else w.done[:n].clone()
    _mark(w, n, r, tol)
    if before is not None and out is not None:
        out.copy_(torch.where(before.view(-1, 1, 1), src, dst))


def _mark(w: Watch, n: int, r: Tensor, tol: float) -> None:
    mark(w.done[:n], w.count[:n], r, w.cap[:n], tol or None, w.left)


def propose(
    w: Watch, n: int, r: Tensor, tol: float, src: Tensor, dst: Tensor, solver: Solver, best: Best
) -> None:
    """``decide`` for a solver: ``dst`` = f(src) becomes its next point, or where a slot is done now
    the best f(x) so far."""
    before = w.done[:n].clone()
    best.offer(dst, r)
    _mark(w, n, r, tol)
    # copies: a solver may keep what it is given, and these buffers are written again
    dst.copy_(proceed(solver, best, src.clone(), dst.clone(), before, w.done[:n]))


def collect(w: Watch, slots: Tensor, z: Tensor) -> None:
    """Write what the ``slots`` (m,) int64 hold, iterates z (n,T,D) and counts, to ``result`` and
    ``used`` of their rows."""
    rows = w.rows[slots]
    w.result.index_copy_(0, rows, z[slots])
    w.used.index_copy_(0, rows, w.count[slots])


def compact(w: Watch, n: int, m: int, z: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Take the slots that go on to the first m of n, with their rows of ``z`` and ``others``;
    returns which slots stayed (m,)."""
    order = torch.argsort(w.done[:n].to(torch.uint8), stable=True)
    collect(w, order[m:], z)
    stay = order[:m]
    for buffer in (z, *others, w.done):
        buffer[:m] = buffer.index_select(0, stay)
    w.slots[:, :m] = w.slots.index_select(1, stay)
    return stay
