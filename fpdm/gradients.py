"""Gradients of a fixed point beside S-JFB: by the implicit function theorem, and phantom gradients.

    implicit   x* = f(x*):  dL/dp = w^T df/dp,  w = g + J^T w,  g = dL/dx*,  J = df/dx at x*;
               of the w that were tried, the one with the least |g + J^T w - w|
    phantom    x <- (1 - b) x + b f(x), m times, differentiated as it stands

Sources: Bai, Kolter & Koltun 2019 (implicit), Geng et al. 2021 (phantom, "On Training Implicit
Models"). The implicit one is exact at a fixed point only, and solves one more fixed-point problem
in the backward; the phantom one is a truncated, damped unrolling. Both run on the same operators as
S-JFB, one application at a time, so they are for study rather than for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fpdm import fixed_point, solvers
from fpdm.block import BlockWeights
from fpdm.fixed_point import Settings, iterate, unroll


@dataclass(frozen=True)
class Gradient:
    """How the m iterations are differentiated: ``unroll`` is S-JFB. ``iters``: evaluations of J^T
    that ``implicit`` spends on w (Anderson); ``damping``: b of ``phantom``."""

    kind: Literal["unroll", "implicit", "phantom"] = "unroll"
    iters: int = 10
    damping: float = 0.5


@dataclass(frozen=True)
class _Map:
    """One application of the block, differentiable in x and in everything else."""

    i: Tensor | None
    u: Tensor | None
    mod: Tensor
    params: Sequence[Tensor]
    weights: Sequence[Tensor]
    settings: Settings
    norms: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.settings
        out, table, *_ = unroll(
            x, self.i, self.u, self.mod, list(self.params), list(self.weights), 1, s.heads, s.impl,
            s.recompute, s.chunks, self.norms, s.accumulate,
        )  # fmt: skip
        return out, table

    def constant(self) -> _Map:
        """The same map of x alone."""
        i = None if self.i is None else self.i.detach()
        params = [p.detach() for p in self.params]
        return replace(self, i=i, mod=self.mod.detach(), params=params)


def solve(
    x: Tensor,
    i: Tensor | None,
    u: Tensor | None,
    mod: Tensor,
    params: Sequence[Tensor],
    weights: BlockWeights,
    n: int,
    m: int,
    settings: Settings,
    gradient: Gradient,
    detach_init: bool = True,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``fixed_point.solve`` with another gradient: (x_{n+m}, norms (n+m or 0,2,B)).

    ``implicit``: n + m - 1 iterations without gradient, then one that carries it. ``phantom``: n
    without, m damped ones with. Raises ValueError for m < 1 when gradients are on.
    """
    if gradient.kind == "unroll" or not torch.is_grad_enabled():
        return fixed_point.solve(
            x, i, u, mod, params, weights, n, m, settings, detach_init, norms
        )  # fmt: skip
    if m < 1:
        raise ValueError(f"iters: got {m}, expected at least 1 with the {gradient.kind} gradient")
    flat = [w for w in weights if w is not None]
    constant = None if u is None else u.detach()
    f = _Map(i, constant, mod, params, flat, settings, norms)
    free = n if gradient.kind == "phantom" else n + m - 1
    tables = []
    if free:
        x, table = iterate(
            x.detach(), constant, mod.detach(), flat, free, settings.heads, settings.impl, norms
        )
        tables.append(table)
    x = x.detach() if detach_init or free else x
    if gradient.kind == "implicit":
        x, table = f(x.detach())
        _solve_in_backward(x, f.constant(), gradient.iters)
        tables.append(table)
        return x, torch.cat(tables)
    for _ in range(m):
        fx, table = f(x)
        x = torch.lerp(x, fx, gradient.damping)
        tables.append(table)
    return x, torch.cat(tables)


def _solve_in_backward(x: Tensor, f: _Map, iters: int) -> None:
    """Replaces the gradient g that reaches x by the w of w = g + J^T w, J at x."""
    point = x.detach().requires_grad_()
    fx, _ = f(point)

    def implicit(g: Tensor) -> Tensor:
        def step(w: Tensor) -> Tensor:
            return g + torch.autograd.grad(fx, point, w, retain_graph=True)[0]

        # not relative: where J is no contraction, that would choose the w that has grown most
        return solvers.solve(step, g, solvers.Anderson(), iters, solvers.distance).x

    x.register_hook(implicit)
