"""Solvers of x = f(x), per sample: Picard, Anderson, Broyden; and the contraction rate of f.

    picard    x <- x + b r                                     r = f(x) - x, damping b
    anderson  x <- x + b r - (dX + b dR) g                     g = argmin |r - dR g|^2 + ridge
    broyden   x <- x - b Z r,  Z = -1 + sum u v^T              Z ~ inverse Jacobian of r

dX, dR: the last ``window`` differences of x and of r. Sources: Walker & Ni 2011 (Anderson, type
II), Broyden 1965 with the Sherman-Morrison update. Every sample has its own history, coefficients
and restarts: none sees its batch-mates. Inner products and coefficients are float32 or wider,
whatever the iterate's dtype; histories have the iterate's. Nothing here waits for the device.

A solver is told x and f(x) and proposes the next point; who evaluates f, and how often, is the
caller's affair, so a captured graph may do it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Solver(Protocol):
    """Proposes the next point from (x, f(x)); may keep a history with one row per sample."""

    def advance(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next point (B,...), from x and f(x) of the same shape."""

    def select(self, rows: Tensor) -> None:
        """Keep only the samples ``rows`` (indices), in that order."""


@dataclass(frozen=True)
class Solution:
    """x (B,...): f of the best iterate that was evaluated. residual (k,B) float32:
    |f(x_j) - x_j| / |f(x_j)|. best (B,) int64: the j of x."""

    x: Tensor
    residual: Tensor
    best: Tensor


def relative_residual(x: Tensor, fx: Tensor) -> Tensor:
    """|f(x) - x| / |f(x)| per sample, (B,) float32 (float64 for float64)."""
    wide = torch.promote_types(fx.dtype, torch.float32)
    norm = torch.linalg.vector_norm
    moved = norm((fx.to(wide) - x.to(wide)).flatten(1), dim=1)
    return moved / norm(fx.to(wide).flatten(1), dim=1).clamp_min(torch.finfo(wide).tiny)


def solve(f: Callable[[Tensor], Tensor], x: Tensor, solver: Solver, evaluations: int) -> Solution:
    """``evaluations`` >= 1 of ``f`` from x (B,...); a sample's result is f of its best iterate.

    Raises ValueError for fewer than one evaluation.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations: got {evaluations}, expected at least 1")
    residuals, keeper = [], Best(x)
    for j in range(evaluations):
        fx = f(x)
        residuals.append(relative_residual(x, fx))
        keeper.offer(fx, residuals[-1])
        if j + 1 < evaluations:
            x = solver.advance(x, fx)
    return Solution(keeper.x, torch.stack(residuals), keeper.index)


class Best:
    """The f(x) with the smallest relative residual so far, per sample; the later one of equals, and
    any finite one before a NaN."""

    def __init__(self, like: Tensor):
        b, device = like.shape[0], like.device
        self.x = torch.empty_like(like)
        self.residual = torch.full((b,), torch.inf, dtype=torch.float32, device=device)
        self.index = torch.full((b,), -1, dtype=torch.int64, device=device)
        self.count = 0

    def offer(self, fx: Tensor, residual: Tensor) -> None:
        """Takes the samples of ``fx`` that are no worse than what is held."""
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
    """x + b (f(x) - x); b = 1 is the plain iteration."""

    def __init__(self, damping: float = 1.0):
        self.damping = damping

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
    Memory: 2 window + 2 iterates.
    """

    delay, patience, fall = 2, 2, 0.95

    def __init__(
        self, window: int = 3, damping: float = 1.0, ridge: float = 1e-6, restart: float = 2.0
    ):
        self.window, self.damping, self.ridge, self.restart = window, damping, ridge, restart
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
    times its smallest so far forgets its updates. Memory: 2 window + 2 iterates.
    """

    def __init__(self, window: int = 8, damping: float = 1.0, restart: float = 2.0):
        self.window, self.damping, self.restart = window, damping, restart
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
    """Largest |eigenvalue| of df/dx at x per sample, (B,), by power iteration on J^T.

    ``f`` must be differentiable by autograd, as ``FPDM.fixed_point_map`` is. The estimate is the
    geometric mean of the growth over the last half of the iterations, so that a pair of complex
    eigenvalues does not make it swing. Below 1 the plain iteration converges near x; the iterations
    it needs grow as 1 / -log of it.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator).to(x)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        fx = f(leaf)
    growth = []
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (x.dim() - 1))
        (v,) = torch.autograd.grad(fx, leaf, v, retain_graph=True)
        growth.append(torch.linalg.vector_norm(v.flatten(1), dim=1))
    return torch.stack(growth[iterations // 2 :]).log().mean(0).exp()
