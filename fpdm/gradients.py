"""Gradients of a fixed point: S-JFB's, by the implicit function theorem, and phantom gradients.

    implicit   x* = f(x*):  dL/dp = w^T df/dp,  w = g + J^T w,  g = dL/dx*,  J = df/dx at x*;
               of the w that were tried, the one with the least |g + J^T w - w|
    phantom    x <- (1 - b) x + b f(x), m times, differentiated as it stands

Sources: Bai, Kolter & Koltun 2019 (implicit), Geng et al. 2021 (phantom, "On Training Implicit
Models"). The implicit one is exact at a fixed point only, and solves one more fixed-point problem
in the backward; the phantom one is a truncated, damped unrolling. ``iterated`` has all of them for
any map f (``FPDM.fixed_point_map`` is one), from wherever a solver has led:

    with torch.no_grad():
        x = solvers.solve(f, x, solvers.Anderson(), 20).x
    x = iterated(f, x, 0, 1, Gradient("implicit"))

``iterated_block`` runs them on the operators of the fixed-point block: implicit and phantom ones
apply it once at a time, so they are for study rather than for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fpdm import fixed_point, operands, solvers
from fpdm.block import BlockWeights, modulation
from fpdm.fixed_point import BlockSettings, iterate, unroll
from fpdm.kernels import reference
from fpdm.kernels.direct import call, refusal, refuse_transformed
from fpdm.kernels.ops import no_autocast

KINDS = ("unroll", "implicit", "phantom")


@dataclass(frozen=True)
class Gradient:
    """How the m iterations are differentiated: ``unroll`` is S-JFB.

    ``iters``: evaluations of J^T that ``implicit`` spends on w (Anderson), at least 1. ``damping``:
    the b of ``phantom``, 0 < b <= 1. Raises ValueError for other values.
    """

    kind: Literal["unroll", "implicit", "phantom"] = "unroll"
    iters: int = 10
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"gradient: got {self.kind!r}, expected {', '.join(KINDS)}")
        operands.whole("gradient.iters", self.iters, 1)
        operands.damping("gradient.damping", self.damping)


S_JFB = Gradient()


def _check(gradient: Gradient) -> None:
    if not isinstance(gradient, Gradient):
        raise ValueError(f"gradient: got {gradient!r}, expected such as Gradient('implicit')")


def iterated(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    n: int,
    m: int,
    gradient: Gradient = S_JFB,
    detach_init: bool = True,
    constant: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (B,...) after x <- f(x), n >= 0 times without gradient and m >= 0 times with.

    ``f`` is any map that autograd differentiates in x and in what else it uses; its result has the
    shape and dtype of x. The gradient of the result reaches both as ``gradient`` says; x itself
    only with ``detach_init=False`` (never with ``implicit``).

        unroll     through the m applications
        phantom    through m damped ones, x <- (1 - b) x + b f(x)
        implicit   n + m - 1 applications carry none, the last one carries w, solved for in the
                   backward: x is to be near a fixed point. J is that of ``constant``, by default of
                   f: the same map with everything but x detached spares the backward its gradients

    With gradients disabled all n + m run plainly. Raises ValueError for negative n or m, for a
    ``gradient`` that is none, and for m = 0 with implicit and phantom when gradients are on.
    """
    _check(gradient)
    n, m = operands.whole("n", n, 0), operands.whole("m", m, 0)
    grad = torch.is_grad_enabled()
    if grad and m < 1 and gradient.kind != "unroll":
        raise ValueError(f"iters: got {m}, expected at least 1 with the {gradient.kind} gradient")
    if grad and gradient.kind == "implicit":
        n, m = n + m - 1, 1
    with torch.no_grad():
        for _ in range(n):
            x = f(x)
    if grad and gradient.kind == "implicit":
        x = f(x.detach())
        _solve_in_backward(x, constant or f, gradient.iters)
        return x
    x = x.detach() if detach_init else x
    for _ in range(m):
        fx = f(x)
        x = torch.lerp(x, fx, gradient.damping) if grad and gradient.kind == "phantom" else fx
    return x


@dataclass(frozen=True)
class _Map:
    """One application of the block, differentiable in x and in everything else; ``tables`` collects
    its norms."""

    i: Tensor | None
    u: Tensor | None
    mod: Tensor
    params: Sequence[Tensor]
    weights: Sequence[Tensor]
    settings: BlockSettings
    norms: bool
    tables: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        s = self.settings
        out, table, *_ = call(
            unroll, x, self.i, self.u, self.mod, list(self.params), list(self.weights), 1, s.heads,
            s.impl, s.recompute, s.chunks, self.norms, s.accumulate,
        )  # fmt: skip
        self.tables.append(table)
        return out

    def constant(self) -> _Map:
        """The same map of x alone."""
        i = None if self.i is None else self.i.detach()
        params = [p.detach() for p in self.params]
        return replace(self, i=i, mod=self.mod.detach(), params=params, tables=[])


def iterated_block(
    x: Tensor,
    i: Tensor | None,
    u: Tensor | None,
    mod: Tensor,
    params: Sequence[Tensor],
    weights: BlockWeights,
    n: int,
    m: int,
    settings: BlockSettings,
    gradient: Gradient,
    detach_init: bool = True,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``fixed_point.s_jfb``, whose operands these are, with another gradient: (x_{n+m} (B,T,D),
    norms (n+m or 0,2,B)).

    ``implicit``: n + m - 1 iterations without gradient, then one that carries it. ``phantom``: n
    without, m damped ones with. Raises ValueError for m < 1 when gradients are on, and for a
    ``gradient`` that is none.
    """
    _check(gradient)
    # what carries no gradient is detached, and that drops tangents without a word
    refuse_transformed(x, mod)
    if gradient.kind == "unroll" or not torch.is_grad_enabled():
        return fixed_point.s_jfb(
            x, i, u, mod, params, weights, n, m, settings, detach_init, norms
        )  # fmt: skip
    flat = [w for w in weights if w is not None]
    constant = None if u is None else u.detach()
    f = _Map(i, constant, mod, params, flat, settings, norms)
    if gradient.kind == "implicit" and m > 1:
        n, m = n + m - 1, 1
    if n:
        x, table = call(
            iterate, x.detach(), constant, mod.detach(), flat, n, settings.heads, settings.impl,
            norms,
        )  # fmt: skip
        f.tables.append(table)
    x = iterated(f, x, 0, m, gradient, detach_init, f.constant())
    return x, torch.cat(f.tables)


def plain_map(
    h: Tensor, mod: Tensor, params: Sequence[Tensor], dtype: torch.dtype, heads: int
) -> Callable[[Tensor], Tensor]:
    """f of x* = f(x*) in plain PyTorch operations: derivatives of every order, in x, h, ``mod`` and
    ``params``, by autograd, forward mode and torch.func.

    h (B,T,D) is injected, mod (B,6D); ``params`` in their own dtype: W_p and b_p, then those of
    ``fixed_point.s_jfb``. Products are taken in ``dtype``, the iterate x (B,T,D) keeps its own. The
    same numbers as the operators', to rounding, and several times their memory.
    """

    def f(x: Tensor) -> Tensor:
        with no_autocast(x.device):
            w_p, b_p, *block, w1, b1, w2, b2 = (p.to(dtype) for p in params)
            qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = block
            s1, a1, g1, s2, a2, g2 = modulation(mod)
            a, e = w1.chunk(2, dim=1)
            u = reference.linear(reference.linear(h.to(dtype), w_p, b_p), e, b1)
            hidden = reference.gelu(reference.linear(x.to(dtype), a, None) + u)
            z = reference.linear(hidden, w2, b2).to(x.dtype)
            heads_of = reference.adaln_linear(z, s1, a1, qkv, qkv_bias)
            attended = reference.attention(heads_of, heads)
            z, y = reference.linear_gate_residual_adaln(attended, proj, proj_bias, z, g1, s2, a2)
            hidden = reference.gelu(reference.linear(y, fc1, fc1_bias))
            return reference.linear_gate_residual(hidden, fc2, fc2_bias, z, g2)

    return f


def _solve_in_backward(x: Tensor, f: Callable[[Tensor], Tensor], iters: int) -> None:
    """Replaces the gradient g that reaches x by the w of w = g + J^T w, J at x."""
    if not x.requires_grad:
        return
    point = x.detach().requires_grad_()
    fx = f(point)

    def implicit(g: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise refusal("create_graph=True with the implicit gradient")

        def step(w: Tensor) -> Tensor:
            return g + torch.autograd.grad(fx, point, w, retain_graph=True)[0]

        # not relative: where J is no contraction, that would choose the w that has grown most
        return solvers.solve(step, g, solvers.Anderson(), iters, solvers.distance).x

    x.register_hook(implicit)
