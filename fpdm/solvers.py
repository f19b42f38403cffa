"""Solvers of x = f(x), per sample: Picard, Anderson, Broyden; and the contraction rate of f.

    picard    x <- x + b r                                     r = f(x) - x, damping b
    anderson  x <- x + b r - (dX + b dR) g                     g = argmin |r - dR g|^2 + ridge
    broyden   x <- x - b Z r,  Z = -1 + sum u v^T              Z ~ inverse Jacobian of r

dX, dR: the last ``window`` differences of x and of r. Sources: Walker & Ni 2011 (Anderson, type
II), Broyden 1965 with the Sherman-Morrison update. Every sample has its own history, coefficients
and restarts: none sees its batch-mates. Inner products and coefficients are float32 or wider,
whatever the iterate's dtype; histories have the iterate's. Nothing here waits for the device, but
for ``solve`` under a tolerance.

A solver is given x and f(x) and proposes the next point. It never evaluates f itself, so that the
caller may do that in a captured graph. ``solve`` is the plain loop; the sampler has one of its own,
on static buffers and with compaction, which decides by the same ``mark`` and ``proceed``
(fpdm.stopping).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fpdm import operands

LAG = {"cpu": 0, "cuda": 1}  # evaluations between a decision and its reading


class Solver(Protocol):
    """Proposes the next point from (x, f(x)); may keep a history with one row per sample."""

    def advance(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next point (B,...), in the shape and dtype of x, which are those of f(x). Called once
        per evaluation, always with the same samples in the same rows."""

    def select(self, rows: Tensor) -> None:
        """Keep only the samples ``rows`` (n,) int64, in that order."""


@dataclass(frozen=True)
class Solution:
    """What ``solve`` found for B samples in k evaluations of f.

    x            (B,...) in the iterate's dtype: f of the best iterate x_j that was evaluated, a
                 point one evaluation past it
    residual     (k,B) float32, float64 for float64: of every iterate x_j, by default
                 |f(x_j) - x_j| / |f(x_j)|; NaN from when the sample was done
    best         (B,) int64: the j of x
    evaluations  (B,) int64: how many a sample took until it was done, k where it never was
    """

    x: Tensor
    residual: Tensor
    best: Tensor
    evaluations: Tensor


def relative_residual(x: Tensor, fx: Tensor) -> Tensor:
    """|f(x) - x| / |f(x)| per sample, (B,) float32 (float64 for float64)."""
    wide = torch.promote_types(fx.dtype, torch.float32)
    norm = torch.linalg.vector_norm
    moved = norm((fx.to(wide) - x.to(wide)).flatten(1), dim=1)
    return moved / norm(fx.to(wide).flatten(1), dim=1).clamp_min(torch.finfo(wide).tiny)


def distance(x: Tensor, fx: Tensor) -> Tensor:
    """|f(x) - x| per sample, (B,) float32 (float64 for float64)."""
    return torch.linalg.vector_norm(_wide(fx) - _wide(x), dim=1)


def solve(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    solver: Solver,
    evaluations: int,
    residual: Callable[[Tensor, Tensor], Tensor] = relative_residual,
    tol: float | None = None,
) -> Solution:
    """At most ``evaluations`` >= 1 of ``f`` from x (B,...), fewer when every sample is done.

    A sample is done after the evaluation whose ``residual`` of x and f(x) is at most ``tol``; by
    default that is |f(x) - x| / |f(x)|. Without ``tol`` no sample is done before the last
    evaluation. The result of a sample is f of its best iterate, the one with the least residual,
    which with ``tol`` is the one that met it. f is always called on the whole batch, since it may
    depend on the row; for a sample that is done the call changes nothing. What a sample gets, and
    after how many evaluations, does not depend on its batch-mates beyond the rounding of f itself.

    A residual of NaN meets no tolerance. One below what rounding lets the iterate's dtype reach,
    about eps / 2, is not met either: the sample runs to the cap.

    Device: with ``tol`` the host reads after every evaluation how many samples go on. On a GPU it
    reads the number of the evaluation before: it waits for that one with another queued behind it,
    and launches one more than is needed. Without ``tol`` nothing waits, and the call can be
    captured in a CUDA graph if f can.

    Gradients are f's own business: under ``torch.no_grad()`` nothing is kept, and
    ``gradients.iterated`` attaches a gradient to the result.

    Raises ValueError for fewer than one evaluation, for a ``tol`` that is negative or NaN, for x
    without a dimension beside the samples' or not of floating point, and for a solver that is no
    new one.
    """
    evaluations = operands.whole("evaluations", evaluations, 1)
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol: got {tol}, expected none or a number of at least 0")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B,...), a sample to a row")
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected floating point")
    calls: int = getattr(solver, "calls", 0)
    known = all(callable(getattr(solver, name, None)) for name in ("advance", "select"))
    if isinstance(solver, type) or not known or calls:
        what = "one with the history of another solve" if calls else repr(solver)
        what = "a class" if isinstance(solver, type) else what
        raise ValueError(f"solver: got {what}, expected a new one, such as Anderson()")
    residuals, best = [], Best(x)
    done, count = torch.zeros_like(best.index, dtype=torch.bool), torch.zeros_like(best.index)
    left = count.new_full((1,), len(count))
    flag = Flag(left) if tol is not None else None
    for j in range(evaluations):
        before, fx = done.clone(), f(x)
        r = residual(x, fx).masked_fill(before, torch.nan)
        residuals.append(r)
        best.offer(fx, r)
        mark(done, count, r, evaluations, tol, left)
        if j + 1 == evaluations or (flag is not None and flag.read(j) == 0):
            break
        if flag is None:
            x = solver.advance(x, fx)
        else:
            # a copy: autograd keeps it, and ``mark`` writes into ``done`` again
            x = proceed(solver, best, x, fx, before, done.clone())
    return Solution(best.x, torch.stack(residuals), best.index, count)


def mark(
    done: Tensor, count: Tensor, r: Tensor, cap: int | Tensor, tol: float | None, left: Tensor
) -> None:
    """After an evaluation with residuals r (n,), in place: one more in ``count`` (n,) int64 where a
    sample was not done before, ``done`` (n,) bool where r <= tol or the ``cap`` is reached, and in
    ``left`` (1,) int64 how many go on. Without ``tol`` only the cap ends a sample."""
    count.add_(~done)
    ended = count >= cap
    done.logical_or_(ended if tol is None else (r <= tol) | ended)
    torch.sum(~done, dim=0, keepdim=True, out=left)


def proceed(
    solver: Solver, best: Best, x: Tensor, fx: Tensor, before: Tensor, done: Tensor
) -> Tensor:
    """The next point (n,...): the solver's where a sample goes on, the best f(x) so far where it is
    ``done`` (n,) now, x where it was ``before`` (n,)."""
    ahead = solver.advance(x, fx)
    ahead = torch.where(_rows(done, x), best.x, ahead)
    return torch.where(_rows(before, x), x, ahead)


class Flag:
    """Reads ``left`` (1,) int64, the samples that go on, on the host: ``LAG`` evaluations late, so
    that on a GPU the host waits for nothing without work behind it in the queue."""

    def __init__(self, left: Tensor):
        self.left, self.lag = left, LAG.get(left.device.type, 0)
        pinned = left.is_cuda
        # not the default device, which may be another
        with torch.device("cpu"):
            self.host = [torch.empty(1, dtype=left.dtype, pin_memory=pinned) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if pinned else []

    def read(self, j: int) -> int | None:
        """Samples that go on after evaluation j - lag; None while there is no such evaluation."""
        self.host[j % 2].copy_(self.left, non_blocking=bool(self.events))
        if self.events:
            self.events[j % 2].record(torch.cuda.current_stream(self.left.device))
        if j < self.lag:
            return None
        ready = (j - self.lag) % 2
        if self.events:
            self.events[ready].synchronize()
        return int(self.host[ready])


class Best:
    """Per sample the f(x) with the smallest residual so far: the later of two equal ones, and any
    finite one rather than a NaN."""

    def __init__(self, like: Tensor):
        b, device = like.shape[0], like.device
        wide = torch.promote_types(like.dtype, torch.float32)
        self.x = torch.empty_like(like)
        self.residual = torch.full((b,), torch.inf, dtype=wide, device=device)
        self.index = torch.full((b,), -1, dtype=torch.int64, device=device)
        self.count = 0

    def offer(self, fx: Tensor, residual: Tensor) -> None:
        """Takes the samples of fx (B,...) whose ``residual`` (B,) is no worse than what is held."""
        better = (residual <= self.residual) | (self.index < 0)
        self.x = torch.where(_rows(better, fx), fx, self.x)
        self.residual = torch.where(better, residual.nan_to_num(torch.inf), self.residual)
        self.index = self.index.masked_fill(better, self.count)
        self.count += 1

    def select(self, rows: Tensor) -> None:
        """Keep only the samples ``rows``."""
        self.x, self.residual, self.index = self.x[rows], self.residual[rows], self.index[rows]


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def _wide(x: Tensor) -> Tensor:
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))


class Picard:
    """x + b (f(x) - x) with damping b, 0 < b <= 1; b = 1 is the plain iteration. Keeps nothing.
    Raises ValueError for another b."""

    def __init__(self, damping: float = 1.0):
        self.damping = operands.damping("damping", damping)

    def advance(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next point."""
        return fx if self.damping == 1.0 else torch.lerp(x, fx, self.damping)

    def select(self, rows: Tensor) -> None:
        """No history."""


class Anderson:
    """Type-II Anderson acceleration with ``window`` differences.

    The ridge is relative to the diagonal of dR^T dR. A sample whose |r| exceeds ``restart`` times
    its smallest so far forgets its history and takes a plain step from there. So does one whose |r|
    has not fallen to ``fall`` of its last mark for ``patience`` calls, until it does: where the
    map creeps along a slow manifold, combinations of past steps keep a sample there that plain
    steps carry out. The first ``delay`` steps are plain too: one difference alone predicts little.
    Memory: 2 window + 2 iterates. Raises ValueError for a window below 1, and for a damping that is
    not above 0 and at most 1.
    """

    delay, patience, fall = 2, 2, 0.95

    def __init__(
        self, window: int = 3, damping: float = 1.0, ridge: float = 1e-6, restart: float = 2.0
    ):
        self.window = operands.whole("window", window, 1)
        self.damping = operands.damping("damping", damping)
        self.ridge, self.restart = ridge, restart
        self.calls = 0

    def _start(self, r: Tensor, dtype: torch.dtype) -> None:
        b, n = r.shape
        self.dx, self.dr = (r.new_zeros(b, self.window, n, dtype=dtype) for _ in range(2))
        self.gram = r.new_zeros(b, self.window, self.window)
        self.valid = torch.zeros(b, self.window, dtype=torch.bool, device=r.device)
        self.smallest, self.mark = (r.new_full((b,), torch.inf) for _ in range(2))
        self.stale = torch.zeros(b, dtype=torch.int64, device=r.device)

    def _remember(self, x: Tensor, r: Tensor) -> None:
        """Differences to the last call, in the oldest slot, and their inner products."""
        slot = (self.calls - 1) % self.window
        self.dx[:, slot] = x - self.x
        self.dr[:, slot] = r - self.r
        row = torch.einsum("bwn,bn->bw", self.dr.to(r.dtype), self.dr[:, slot].to(r.dtype))
        self.gram[:, slot], self.gram[:, :, slot] = row, row
        self.valid[:, slot] = True

    def advance(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next point."""
        flat, r = _wide(x), _wide(fx) - _wide(x)
        size = torch.linalg.vector_norm(r, dim=1)
        if self.calls == 0:
            self._start(r, x.dtype)
        else:
            self._remember(flat, r)
        fell = size < self.fall * self.mark
        self.mark = torch.where(fell, size, self.mark)
        self.stale = torch.where(fell, 0, self.stale + 1)
        usable = (size <= self.restart * self.smallest) & (self.stale < self.patience)
        self.valid &= usable.unsqueeze(1)
        self.smallest = torch.minimum(self.smallest, size)
        self.x, self.r, self.calls = flat, r, self.calls + 1
        plain = fx if self.damping == 1.0 else torch.lerp(x, fx, self.damping)
        if self.calls <= self.delay:
            return plain
        g = self._coefficients(r)
        back = torch.einsum("bw,bwn->bn", g, self.dx.to(r.dtype))
        back += self.damping * torch.einsum("bw,bwn->bn", g, self.dr.to(r.dtype))
        return (_wide(plain) - back).view_as(x).to(x.dtype)

    def _coefficients(self, r: Tensor) -> Tensor:
        """g (B,W): the ridge regression of r on the valid differences, zero for the others."""
        both = self.valid.unsqueeze(1) & self.valid.unsqueeze(2)
        a = self.gram.masked_fill(~both, 0.0).double()
        diagonal = a.diagonal(dim1=1, dim2=2)
        # an unused slot or one without a difference: 1 on the diagonal, 0 on the right
        dead = diagonal <= 0
        a.diagonal(dim1=1, dim2=2).copy_(torch.where(dead, 1.0, diagonal * (1 + self.ridge)))
        rhs = torch.einsum("bwn,bn->bw", self.dr.to(r.dtype), r).double()
        rhs = rhs.masked_fill(dead | ~self.valid, 0.0)
        # equilibrated: differences shrink by orders of magnitude within one window
        scale = a.diagonal(dim1=1, dim2=2).rsqrt()
        a = a * scale.unsqueeze(1) * scale.unsqueeze(2)
        g = torch.linalg.solve_ex(a, (rhs * scale).unsqueeze(2))[0].squeeze(2) * scale
        return g.to(r.dtype)

    def select(self, rows: Tensor) -> None:
        """Keep only the samples ``rows``."""
        if self.calls:
            for name in ("dx", "dr", "gram", "valid", "smallest", "mark", "stale", "x", "r"):
                setattr(self, name, getattr(self, name)[rows])


class Broyden:
    """Good Broyden with at most ``window`` rank-one updates of Z = -1; a full memory starts anew.

    A sample whose update would divide by almost nothing skips it; one whose |r| exceeds ``restart``
    times its smallest so far forgets its updates. Memory: 2 window + 2 iterates. Raises ValueError
    as Anderson.
    """

    def __init__(self, window: int = 8, damping: float = 1.0, restart: float = 2.0):
        self.window = operands.whole("window", window, 1)
        self.damping = operands.damping("damping", damping)
        self.restart = restart
        self.calls = 0
        # of the last call; empty before the first
        self.x = self.r = torch.empty(0)

    def advance(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next point."""
        flat, r = _wide(x), _wide(fx) - _wide(x)
        size = torch.linalg.vector_norm(r, dim=1)
        if self.calls == 0:
            b, n = r.shape
            self.u, self.v = (r.new_zeros(b, self.window, n, dtype=x.dtype) for _ in range(2))
            self.smallest = r.new_full((b,), torch.inf)
        else:
            self._update(flat - self.x, r - self.r, (self.calls - 1) % self.window)
        fine = (size <= self.restart * self.smallest).view(-1, 1, 1)
        self.u *= fine
        self.v *= fine
        self.smallest = torch.minimum(self.smallest, size)
        self.x, self.r, self.calls = flat, r, self.calls + 1
        step = self._apply(self.u, self.v, r)
        return (flat - self.damping * step).view_as(x).to(x.dtype)

    @staticmethod
    def _apply(u: Tensor, v: Tensor, y: Tensor) -> Tensor:
        """(-1 + sum u v^T) y."""
        inner = torch.einsum("bwn,bn->bw", v.to(y.dtype), y)
        return torch.einsum("bw,bwn->bn", inner, u.to(y.dtype)) - y

    def _update(self, s: Tensor, y: Tensor, slot: int) -> None:
        if slot == 0:
            self.u.zero_()
            self.v.zero_()
        zy = self._apply(self.u, self.v, y)
        sz = self._apply(self.v, self.u, s)
        below = torch.einsum("bn,bn->b", sz, y)
        size = torch.linalg.vector_norm(sz, dim=1) * torch.linalg.vector_norm(y, dim=1)
        usable = (below.abs() > 1e-6 * size).unsqueeze(1)
        scale = torch.where(usable, 1 / below.unsqueeze(1), 0.0)
        self.u[:, slot] = torch.where(usable, (s - zy) * scale, 0.0)
        self.v[:, slot] = torch.where(usable, sz, 0.0)

    def select(self, rows: Tensor) -> None:
        """Keep only the samples ``rows``."""
        if self.calls:
            for name in ("u", "v", "smallest", "x", "r"):
                setattr(self, name, getattr(self, name)[rows])


def make(name: str, window: int, damping: float) -> Solver:
    """The solver called picard, anderson or broyden. Raises ValueError for another name."""
    if name == "picard":
        return Picard(damping)
    if name == "anderson":
        return Anderson(window, damping)
    if name == "broyden":
        return Broyden(window, damping)
    raise ValueError(f"solver: got {name!r}, expected picard, anderson or broyden")


def spectral_radius(
    f: Callable[[Tensor], Tensor], x: Tensor, iterations: int = 30, seed: int = 0
) -> Tensor:
    """Largest |eigenvalue| of df/dx at x (B,...) per sample, by power iteration on J^T; (B,) in the
    dtype of x.

    ``f`` must be differentiable by autograd, as ``FPDM.fixed_point_map`` is; every iteration is one
    backward through one evaluation of it. The estimate is the geometric mean of the growth over the
    last half of the ``iterations``, so that a pair of complex eigenvalues does not make it swing.
    ``seed`` draws the first vector. Below 1 the plain iteration converges near x; the iterations it
    needs grow as 1 / -log of it. 0 where J is 0.

    Raises ValueError for fewer than one iteration.
    """
    iterations = operands.whole("iterations", iterations, 1)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator).to(x)
    with torch.inference_mode(False), torch.enable_grad():
        # a copy, as x may be an inference tensor
        leaf = x.detach().clone().requires_grad_()
        fx = f(leaf)
        growth = []
        for _ in range(iterations):
            size = torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (x.dim() - 1))
            v = v / size.clamp_min(torch.finfo(v.dtype).tiny)
            (v,) = torch.autograd.grad(fx, leaf, v, retain_graph=True)
            growth.append(torch.linalg.vector_norm(v.flatten(1), dim=1))
    return torch.stack(growth[iterations // 2 :]).log().mean(0).exp()
