"""The fixed-point layer: hoisting, the loop without gradient, the unrolled operator, S-JFB.

    u   = E i + b1                        once per timestep; i = W_p h + b_p, W1 = [A | E]
    x_0 = h or a given start;   x_{j+1} = f(x_j; u, c)
    S-JFB (paper section 3.3): n iterations that store nothing, detach, then m with gradient.
    JFB: m = 1. Multi-step JFB: m = M. Full unrolling: n = 0, m = k, detach_init=False.

``fpdm::iterate`` and ``fpdm::unroll`` / ``fpdm::unroll_backward(_)`` are opaque to autograd and to
torch.compile: m is an integer argument, what the backward needs is returned in stacked buffers
(ledger in fpdm.block), and the backward is analytic, built from ``step_backward``. Once
differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpdm import walk
from fpdm.block import BlockGrads, BlockWeights, forward_workspace, iterate_forward, saved_units
from fpdm.kernels import direct, ops
from fpdm.kernels.direct import call


@dataclass(frozen=True)
class SolveStats:
    """``residual`` (k,B) float32: |f(x_j) - x_j| / |f(x_j)| of iteration j and sample, Euclidean
    norms over tokens and width, those without gradient first; ``iterations``: k."""

    residual: Tensor
    iterations: int

    @classmethod
    def from_norms(cls, norms: Tensor) -> SolveStats:
        """From the (k,2,B) table of |f(x) - x| and |f(x)|."""
        tiny = torch.finfo(norms.dtype).tiny
        return cls((norms[:, 0] / norms[:, 1].clamp_min(tiny)).float(), norms.shape[0])


def _norm_table(x: Tensor, k: int, wanted: bool) -> Tensor:
    dtype = ops.accumulator(x.dtype)
    return x.new_empty((k if wanted else 0, 2, x.shape[0]), dtype=dtype)


@torch.library.custom_op(
    "fpdm::iterate",
    mutates_args=(),
    schema="(Tensor x, Tensor? u, Tensor mod, Tensor[] weights, SymInt n, int heads, str impl, "
    "bool norms) -> (Tensor, Tensor)",
)
def iterate(
    x: Tensor,
    u: Tensor | None,
    mod: Tensor,
    weights: Sequence[Tensor],
    n: int,
    heads: int,
    impl: str,
    norms: bool,
) -> tuple[Tensor, Tensor]:
    """n >= 1 applications of the block that keep nothing: (x_n, norms (n,2,B) or (0,2,B)).

    x (B,T,D) residual dtype; u (B,T,2D) or None (no injection); mod (B,6D) and weights in the
    compute dtype. Memory: two iterates and a workspace of 7 U, whatever n is.
    """
    table = _norm_table(x, n, norms)
    operators, w = ops.resolve(impl, x.device, mod.dtype), BlockWeights(*weights)
    with ops.no_autocast(x.device):
        x = x.contiguous()
        first = torch.empty_like(x)
        buffers = first, torch.empty_like(x) if n > 1 else x
        acts = forward_workspace(x, mod.dtype, "full")
        rows = table if norms else None
        return iterate_forward(operators, x, buffers, u, mod, w, heads, acts, n, rows), table


@iterate.register_fake
def _(
    x: Tensor, u: Any, mod: Tensor, weights: Any, n: int, heads: int, impl: str, norms: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _norm_table(x, n, norms)


def _kept_x(m: int, recompute: str) -> int:
    """Iterates kept beside the caller's x_0: x_1 .. x_{m-1}, unless they can be rebuilt."""
    return 0 if recompute == "elementwise" else m - 1


@torch.library.custom_op(
    "fpdm::unroll",
    mutates_args=(),
    schema="(Tensor x, Tensor? i, Tensor? u, Tensor mod, Tensor[] params, Tensor[] weights, "
    "SymInt m, int heads, str impl, str recompute, int chunks, bool norms, bool accumulate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def unroll(
    x: Tensor,
    i: Tensor | None,
    u: Tensor | None,
    mod: Tensor,
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    m: int,
    heads: int,
    impl: str,
    recompute: str,
    chunks: int,
    norms: bool,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m >= 1 applications of the block with gradient.

    Returns (x_m, norms (m,2,B) or (0,2,B), and what the backward needs: iterates (m-1 or 0,B,T,D),
    residual-dtype buffer (m, .), compute-dtype buffer (m, .)). The gradient reaches x, i, mod and
    ``params`` (the block's eight parameters and W1, b1, W2, b2, in their own dtype); ``weights``
    are their compute-dtype copies and ``u`` is E i + b1, computed by the caller. Both are constants
    to autograd; the backward carries the gradient of u on to i, E and b1. Forward and backward take
    the batch in ``chunks`` parts, one after another, which divides their working sets. Raises
    ValueError for i without u or u without i, for m < 1, and for m > 1 without injection.

    With ``accumulate`` the backward adds the gradients of ``params`` to their existing ``.grad`` in
    place and returns none to autograd, which saves a second buffer of their size.
    """
    b, t, d = x.shape
    injected, unit = u is not None, b * t * d
    if injected != (i is not None):
        given, other = ("u", "i") if injected else ("i", "u")
        raise ValueError(f"{other}: got none with {given}, expected both or neither")
    if m < 1 or (not injected and m != 1):
        expected = "at least 1" if injected else "1 without injection (pre and post blocks)"
        raise ValueError(f"m: got {m}, expected {expected}")
    nr, nc = saved_units(recompute, injected)
    xs = x.new_empty(_kept_x(m, recompute), b, t, d)
    residual, compute = x.new_empty(m, nr * unit), mod.new_empty(m, nc * unit)
    table, out = _norm_table(x, m, norms), x.new_empty(x.shape)
    operators, w = ops.resolve(impl, x.device, mod.dtype), BlockWeights(*weights)
    kept = walk.Kept(x.contiguous(), i, u, mod, xs, residual, compute, recompute)
    run = walk.BlockRun(operators, w, heads)
    with ops.no_autocast(x.device):
        # what keeps everything has no working set to divide
        for part in walk.parts(b, 1 if recompute == "none" else chunks):
            walk.forward(run, kept, part, out, table)
    return out, table, xs, residual, compute


@unroll.register_fake
def _(
    x: Tensor,
    i: Any,
    u: Any,
    mod: Tensor,
    params: Any,
    weights: Any,
    m: int,
    heads: int,
    impl: str,
    recompute: str,
    chunks: int,
    norms: bool,
    accumulate: bool,
) -> tuple[Tensor, ...]:
    b, t, d = x.shape
    nr, nc = saved_units(recompute, u is not None)
    return (
        x.new_empty(x.shape),
        _norm_table(x, m, norms),
        x.new_empty(_kept_x(m, recompute), b, t, d),
        x.new_empty(m, nr * b * t * d),
        mod.new_empty(m, nc * b * t * d),
    )


_BACKWARD = (
    "Tensor g, Tensor x, Tensor? i, Tensor? u, Tensor mod, Tensor[] weights, Tensor xs, "
    "Tensor residual, Tensor compute, SymInt m, int heads, str impl, str recompute, int chunks, "
    "bool input_grad"
)


@torch.library.custom_op(
    "fpdm::unroll_backward",
    mutates_args=(),
    schema=f"(Tensor[] params, {_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def unroll_backward(
    params: Sequence[Tensor], *operands: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx_0, di, dmod, dparams) of ``unroll``, given ``params`` to find gradients of (none: frozen
    weights) and the operands of ``_backward``."""
    sums = [torch.zeros_like(p, dtype=ops.accumulator(p.dtype)) for p in params]
    found = _backward(sums, *operands)
    return *found, [d.to(p.dtype) for d, p in zip(sums, params)]


@unroll_backward.register_fake
def _(params: Sequence[Tensor], *operands: Any) -> tuple[Any, ...]:
    return *_backward_shapes(*operands), [p.new_empty(p.shape) for p in params]


@torch.library.custom_op(
    "fpdm::unroll_backward_",
    mutates_args=("sums",),
    schema=f"(Tensor(a!)[] sums, {_BACKWARD}) -> (Tensor, Tensor, Tensor)",
)
def unroll_backward_(sums: Sequence[Tensor], *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_0, di, dmod) of ``unroll``; the gradients of its parameters are added to ``sums``."""
    return _backward(sums, *operands)


@unroll_backward_.register_fake
def _(sums: Sequence[Tensor], *operands: Any) -> tuple[Tensor, ...]:
    return _backward_shapes(*operands)


def _backward(
    sums: Sequence[Tensor],
    g: Tensor,
    x: Tensor,
    i: Tensor | None,
    u: Tensor | None,
    mod: Tensor,
    weights: Sequence[Tensor],
    xs: Tensor,
    residual: Tensor,
    compute: Tensor,
    m: int,
    heads: int,
    impl: str,
    recompute: str,
    chunks: int,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_0, di, dmod); dx_0 is empty without ``input_grad``, di without injection.

    Every weight gradient of the m iterations accumulates in its buffer of ``sums``, float32
    (float64 for float64 parameters), and dE = (sum_j dpre_j)^T i is one GEMM after the loop. u is
    read again only to recompute in full, and may be None otherwise.
    """
    if len(compute) != m:
        raise ValueError(f"m: got {m}, expected {len(compute)}, as many as are kept")
    dmod = torch.zeros(mod.shape, dtype=ops.accumulator(mod.dtype), device=mod.device)
    kept = walk.Kept(x.contiguous(), i, u, mod, xs, residual, compute, recompute)
    operators, grads = ops.resolve(impl, x.device, mod.dtype), BlockGrads(*sums) if sums else None
    run = walk.BlockRun(operators, BlockWeights(*weights), heads, grads, input_grad)
    dx = x.new_empty(x.shape if input_grad else 0)
    di = x.new_empty(0) if i is None else torch.empty_like(i)
    with ops.no_autocast(x.device):
        for part in walk.parts(len(x), chunks):
            # overwritten on the way, and g is the caller's
            mine = dx[part] if input_grad else x.new_empty(x[part].shape)
            walk.backward(run, kept, part, mine.copy_(g[part]), dmod[part], di[part])
    return dx, di, dmod.to(mod.dtype)


def _backward_shapes(g: Tensor, x: Tensor, i: Any, u: Any, mod: Tensor, *rest: Any) -> Any:
    return (
        x.new_empty(x.shape if rest[-1] else 0),
        x.new_empty(0) if i is None else i.new_empty(i.shape),
        mod.new_empty(mod.shape),
    )


def _unroll_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, i, u, mod, params, weights, m, heads, impl, recompute, chunks, _, accumulate = inputs
    _, table, xs, residual, compute = output
    ctx.mark_non_differentiable(table, xs, residual, compute)
    ctx.set_materialize_grads(False)
    # 2 U that nothing but a full recomputation reads again
    u = u if recompute == "full" else None
    ctx.save_for_backward(x, i, u, mod, xs, residual, compute, *params, *weights)
    ctx.counts = (len(params), accumulate, m, heads, impl, recompute, chunks)


def _unroll_grad(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count, accumulate, *settings = ctx.counts
    x, i, u, mod, xs, residual, compute, *rest = ctx.saved_tensors
    params, weights = rest[:count], rest[count:]
    nothing = [None] * len(params), [None] * len(weights)
    if g is None:
        return (None, None, None, None, *nothing, *[None] * 7)
    wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    operands = (g, x, i, u, mod, weights, xs, residual, compute, *settings, wants_x)
    dparams = nothing[0]
    if sums := ops.gradients_of(params) if accumulate and all(wanted) else []:
        dx, di, dmod = call(unroll_backward_, sums, *operands)
    else:
        dx, di, dmod, found = call(unroll_backward, params if any(wanted) else [], *operands)
        dparams = found or dparams
    return (
        dx if wants_x else None,
        di if i is not None else None,
        None,
        dmod,
        dparams,
        nothing[1],
        *[None] * 7,
    )


for _op in (iterate, unroll, unroll_backward, unroll_backward_):
    direct.body(_op, _op._init_fn)
direct.autograd(unroll, _unroll_grad, _unroll_setup)


@dataclass(frozen=True)
class BlockSettings:
    """How a block runs: ``heads`` of attention; ``impl`` and ``recompute`` as in ExecutionConfig;
    ``chunks``, the parts of the batch that the m iterations walk one after the other;
    ``accumulate``, whether their backward adds to the parameters' ``.grad`` in place (see
    ``weights.WeightView``)."""

    heads: int
    impl: str
    recompute: str
    chunks: int = 1
    accumulate: bool = False


def s_jfb(
    x: Tensor,
    i: Tensor | None,
    u: Tensor | None,
    mod: Tensor,
    params: Sequence[Tensor],
    weights: BlockWeights,
    n: int,
    m: int,
    settings: BlockSettings,
    detach_init: bool = True,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """S-JFB (paper section 3.3): x_{j+1} = f(x_j; u, c), n times without gradient, then m with.

    x         (B,T,D) the first iterate x_0, in the residual dtype: that of the stream from block to
              block, the compute dtype unless ``residual_dtype`` keeps it in float32
    i         (B,T,D) the injection W_p h + b_p in the compute dtype; None: a block without one
    u         (B,T,2D) E i + b1 in the compute dtype; None: a block without injection. A constant:
              its gradient reaches i, and E and b1 of ``params``, in the backward. u without i
              means folded weights, which work only without gradient
    mod       (B,6D) the block's adaLN vectors for its timesteps, in the compute dtype
    params    the parameters in their own dtype, in the order of ``block.BlockGrads``: eight of the
              block, with injection also W1, b1, W2, b2. They receive the gradient
    weights   their copies in the compute dtype, which the operators read
    n, m      at least 0; with m = 0, or gradients disabled, all n + m run in the loop that keeps
              nothing. Without injection (pre and post blocks) n = 0, m = 1

    The iterate that enters the m iterations is detached (``detach_init``), also when n = 0.
    Returns (x_{n+m} (B,T,D), and with ``norms`` |f(x) - x| and |f(x)| of every iteration and
    sample, (n+m,2,B) float32 or float64, else (0,2,B)).

    Raises ValueError for u without i or the reverse when gradients are on, LaunchError (UserError)
    for operands that the chosen implementation cannot take, ImplError where it cannot run.
    """
    flat = [w for w in weights if w is not None]
    constant = None if u is None else u.detach()
    graph = torch.is_grad_enabled() and m > 0
    tables = []
    free = n if graph else n + m
    if free:
        with torch.no_grad():
            x, table = call(
                iterate,
                x.detach(),
                constant,
                mod.detach(),
                flat,
                free,
                settings.heads,
                settings.impl,
                norms,
            )
        tables.append(table)
    if graph:
        x, table, *_ = call(
            unroll, x.detach() if detach_init else x, i, constant, mod, list(params), flat, m,
            settings.heads, settings.impl, settings.recompute, settings.chunks, norms,
            settings.accumulate,
        )  # fmt: skip
        tables.append(table)
    return x, torch.cat(tables) if tables else _norm_table(x, 0, norms)
