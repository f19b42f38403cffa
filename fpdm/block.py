"""One transformer block, forward and backward, for pre blocks, post blocks and the loop alike.

    z  = W2 gelu(A x + u) + b2                    only with injection; otherwise z = x
    z' = z + g1 Proj(Attn(Qkv(adaLN(z, s1, a1))))
    f  = z' + g2 Fc2(gelu(Fc1(adaLN(z', s2, a2))))

Shapes: x, z (B,T,D); u (B,T,2D); modulation (B,6D) = (s1, a1, g1, s2, a2, g2), shift scale gate
twice. Source: paper section 3.2 and DiT's adaLN-Zero block; u hoists the injected half of W1 = [A |
E].

What one iteration keeps for its backward, in units of U = B T D elements (z, z', x in the residual
dtype, the rest in the compute dtype); x of the first iteration is the caller's:

    recompute     saves                                               U   recomputes
    none          x z z'  pre a  y1 qkv o p  y2 h gelu(h) r          23   LN statistics, softmax
    elementwise   z       pre       qkv o p     h         r          13   x z' y1 y2, both GELUs
    full          x                                                   1   the whole forward

Without injection pre and a do not exist and z is x. The element-wise ledger keeps p and r instead
of z' and the next x: both follow from them by one fused multiply-add, bit for bit, without a GEMM.
``full`` recomputes the forward bit for bit, with one exception: where the forward took cuBLASLt's
GELU, which stores neither h nor pre, theirs is one rounding more (fpdm.kernels.cublaslt).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# widths in units of D of everything one iteration produces, in the order of ``Activations``;
# csrc/cpu/unroll.cpp has them too
WIDTHS = {
    "pre": 2, "a": 2, "z": 1, "y1": 1, "qkv": 3, "o": 1, "p": 1, "z2": 1, "y2": 1, "h": 4, "gh": 4,
    "r": 1,
}  # fmt: skip
RESIDUAL = ("z", "z2")
INJECTED = ("pre", "a", "z")
SAVED = {
    "none": ("z", "z2", "pre", "a", "y1", "qkv", "o", "p", "y2", "h", "gh", "r"),
    "elementwise": ("z", "pre", "qkv", "o", "p", "h", "r"),
    "full": (),
}


class BlockWeights(NamedTuple):
    """Weights of one block in the compute dtype, (out,in) as torch's Linear has them: qkv (3D,D),
    proj (D,D), fc1 (4D,D), fc2 (D,4D), each with its bias. Only with injection, W1 = [A | E]:
    inj_a, inj_e (2D,D), views of W1, inj_w2 (D,2D) and its bias; b1 is in u."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    inj_a: Tensor | None = None
    inj_e: Tensor | None = None
    inj_w2: Tensor | None = None
    inj_b2: Tensor | None = None


class BlockGrads(NamedTuple):
    """Sums of the parameters' gradients in the parameters' shapes, W1 (2D,2D) whole: float32, or
    float64 for float64 parameters. Gradients are added to them."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    inj_w1: Tensor | None = None
    inj_b1: Tensor | None = None
    inj_w2: Tensor | None = None
    inj_b2: Tensor | None = None


@dataclass
class Activations:
    """What one application of the block produces, (B,T,width D) with the widths of ``WIDTHS``;
    z and z2 (z') in the residual dtype, the rest in the compute dtype; None where it was not
    kept. The names are the ledger's: y2 = adaLN(z'), h and gh before and after the second GELU."""

    pre: Tensor | None = None
    a: Tensor | None = None
    z: Tensor | None = None
    y1: Tensor | None = None
    qkv: Tensor | None = None
    o: Tensor | None = None
    p: Tensor | None = None
    z2: Tensor | None = None
    y2: Tensor | None = None
    h: Tensor | None = None
    gh: Tensor | None = None
    r: Tensor | None = None

    def __getitem__(self, rows: slice) -> Activations:
        """The samples ``rows`` of each."""
        mine = (getattr(self, f.name) for f in fields(self))
        return Activations(*(None if t is None else t[rows] for t in mine))

    def update(self, other: Activations) -> Activations:
        """These, with the gaps filled from ``other``."""
        return Activations(*(mine if (mine := getattr(self, f.name)) is not None
                             else getattr(other, f.name) for f in fields(self)))  # fmt: skip


def saved_names(recompute: str, injected: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names kept per iteration: (in the residual dtype, in the compute dtype)."""
    names = [n for n in SAVED[recompute] if injected or n not in INJECTED]
    return (
        tuple(n for n in names if n in RESIDUAL),
        tuple(n for n in names if n not in RESIDUAL),
    )


def saved_units(recompute: str, injected: bool) -> tuple[int, int]:
    """Units of U kept per iteration beside x: (residual dtype, compute dtype)."""
    residual, compute = saved_names(recompute, injected)
    return sum(WIDTHS[n] for n in residual), sum(WIDTHS[n] for n in compute)


@cache
def slot_offsets(recompute: str, injected: bool) -> tuple[int, ...]:
    """Where an iteration's slot keeps each of ``Activations``, in units of U from the start of the
    residual buffer (z, z2) or the compute one; -1: not kept."""
    found = dict.fromkeys(WIDTHS, -1)
    for names in saved_names(recompute, injected):
        offset = 0
        for name in names:
            found[name] = offset
            offset += WIDTHS[name]
    return tuple(found.values())


def slot_views(
    residual: Tensor, compute: Tensor, recompute: str, injected: bool, shape: torch.Size
) -> Activations:
    """One iteration's slots of the two stacked buffers, as (B,T,width) views."""
    b, t, d = shape
    acts = Activations()
    for name, offset in zip(WIDTHS, slot_offsets(recompute, injected)):
        if offset >= 0:
            flat, width = residual if name in RESIDUAL else compute, d * WIDTHS[name]
            view = flat[offset * b * t * d :][: b * t * width].view(b, t, width)
            setattr(acts, name, view)
    return acts


def forward_workspace(x: Tensor, dtype: torch.dtype, recompute: str) -> Activations:
    """Buffers for what an iteration does not keep; the next iteration uses them again.

    ``none`` keeps everything and needs none. ``elementwise``: 5 U (a and gelu(h) share 4).
    ``full``, and the loop without gradient: 7 U (the GELUs overwrite their inputs). The caller puts
    z', and under ``full`` z too, into the buffer that receives f(x). The sharing is chosen so that
    no fused operator writes its result over its own operand.
    """
    b, t, d = x.shape
    unit = b * t * d
    flat = x.new_empty({"none": 0, "elementwise": 5, "full": 7}[recompute] * unit, dtype=dtype)

    def take(start: int, width: int) -> Tensor:
        return flat[start * unit : (start + width) * unit].view(b, t, width * d)

    if recompute == "none":
        return Activations()
    if recompute == "elementwise":
        small = take(4, 1)
        return Activations(a=take(0, 2), y1=small, y2=small, gh=take(0, 4))
    small, other, heads = take(4, 1), take(5, 1), take(6, 1)
    return Activations(
        pre=take(0, 2), a=take(0, 2), y1=small, qkv=take(0, 3), o=heads, p=other, y2=small,
        h=take(0, 4), gh=take(0, 4), r=other,
    )  # fmt: skip


def modulation(mod: Tensor) -> tuple[Tensor, ...]:
    """(B,6D) -> s1, a1, g1, s2, a2, g2, strided views (B,D)."""
    return mod.chunk(6, dim=-1)


def step_forward(
    ops: Any,
    x: Tensor,
    u: Tensor | None,
    mod: Tensor,
    w: BlockWeights,
    heads: int,
    acts: Activations,
    out: Tensor,
    norms: Tensor | None = None,
    kept: Collection[str] = (),
) -> Tensor:
    """f(x) into ``out``, which is returned; every intermediate into the buffers of ``acts``.

    ``ops`` is an operator set (kernels.implementations.resolve). x, out (B,T,D) residual dtype; u
    (B,T,2D), or None without injection, and mod (B,6D) in the compute dtype; ``norms`` (2,B)
    receives |f(x) - x| and |f(x)| per sample. ``out`` may share memory with acts.z and acts.z2,
    never with x. ``kept`` names the buffers that a backward will read: a fused operator need
    not fill the others.
    """
    s1, a1, g1, s2, a2, g2 = modulation(mod)
    z = x
    if u is not None:
        ops.linear_add_gelu(x.to(w.qkv.dtype), w.inj_a, u, pre=acts.pre, out=acts.a)
        z = ops.linear(acts.a, w.inj_w2, w.inj_b2, out=acts.z)
    ops.adaln_linear(z, s1, a1, w.qkv, w.qkv_bias, y=acts.y1, out=acts.qkv, keep="y1" in kept)
    ops.attention(acts.qkv, heads, out=acts.o)
    z2, _ = ops.linear_gate_residual_adaln(
        acts.o, w.proj, w.proj_bias, z, g1, s2, a2,
        p=acts.p, z_out=acts.z2, out=acts.y2, keep="p" in kept,
    )  # fmt: skip
    ops.linear_add_gelu(acts.y2, w.fc1, w.fc1_bias, pre=acts.h, out=acts.gh)
    return ops.linear_gate_residual(
        acts.gh, w.fc2, w.fc2_bias, z2, g2,
        p=acts.r, out=out, prev=x, norms=norms, keep="r" in kept,
    )  # fmt: skip


def has_loop(ops: Any, residual: torch.dtype, compute: torch.dtype) -> bool:
    """Whether the operators iterate, solve and unroll in one call each (fpdm.kernels.cpu_loop) for
    iterates of dtype ``residual`` and operators of dtype ``compute``."""
    return hasattr(ops, "loops") and ops.loops(residual, compute)


def iterate_forward(
    ops: Any,
    x: Tensor,
    buffers: tuple[Tensor, Tensor],
    u: Tensor | None,
    mod: Tensor,
    w: BlockWeights,
    heads: int,
    acts: Activations,
    k: int,
    norms: Tensor | None = None,
) -> Tensor:
    """f^k(x), k >= 0, keeping nothing: x_1, x_3, ... in the first of ``buffers``, x_2, x_4, ... in
    the second, which may be x; one call where the operators have such a loop.

    ``acts`` are those of ``forward_workspace`` in ``full``; norms (k,2,B) as in ``step_forward``.
    """
    if k and has_loop(ops, x.dtype, mod.dtype):
        return ops.iterate(x, buffers, u, mod, w, heads, acts, k, norms)
    for j in range(k):
        acts.z = acts.z2 = buffers[j % 2]
        x = step_forward(
            ops, x, u, mod, w, heads, acts, buffers[j % 2], None if norms is None else norms[j]
        )
    return x


@dataclass
class Scratch:
    """The backward's working set: 4 U and two of 1 U in the compute dtype, 1 U in the residual
    dtype; independent of the number of iterations."""

    f: Tensor
    d0: Tensor
    d1: Tensor
    e: Tensor

    @classmethod
    def like(cls, x: Tensor, dtype: torch.dtype) -> Scratch:
        """Allocated for iterates like ``x`` (B,T,D) and compute ``dtype``."""
        b, t, d = x.shape
        d0, d1 = (x.new_empty(b, t, d, dtype=dtype) for _ in range(2))
        return cls(x.new_empty(b * t * 4 * d, dtype=dtype), d0, d1, torch.empty_like(x))

    def wide(self, width: int) -> Tensor:
        """The first of the 4 U as (B,T,width D)."""
        b, t, d = self.d0.shape
        return self.f[: b * t * d * width].view(b, t, d * width)


def next_iterate(ops: Any, z: Tensor, acts: Activations, mod: Tensor, out: Tensor) -> Tensor:
    """f(x) (B,T,D) again into ``out``, from z (B,T,D) and the p and r of ``acts`` that the
    element-wise ledger keeps: (z + g1 p) + g2 r, bit for bit."""
    _, _, g1, _, _, g2 = modulation(mod)
    ops.gate_residual(z, acts.p, g1, out=out)
    return ops.gate_residual(out, acts.r, g2, out=out)


def step_backward(
    ops: Any,
    g: Tensor,
    z: Tensor,
    mod: Tensor,
    w: BlockWeights,
    heads: int,
    acts: Activations,
    grads: BlockGrads | None,
    dmod: Tensor,
    s: Scratch,
) -> Tensor:
    """Gradient with respect to z (x without injection), in place of ``g`` (B,T,D) in the residual
    dtype, the gradient with respect to f(x); ``g`` is returned.

    z (B,T,D), mod (B,6D) and ``w`` as in ``step_forward``; ``s`` is overwritten. Accumulates
    parameter gradients into ``grads`` (None: frozen weights) and modulation gradients into ``dmod``
    (B,6D). ``acts`` is what the ledger kept; the gaps are recomputed here, each just before its
    use. ``injection_backward`` goes on from z to x.
    """
    s1, a1, g1, s2, a2, g2 = modulation(mod)
    ds1, da1, dg1, ds2, da2, dg2 = modulation(dmod)
    _mlp_backward(ops, g, z, (g1, s2, a2, g2), (ds2, da2, dg2), w, acts, grads, s)
    dp = ops.gate_residual_backward(g, acts.p, g1, dg1, out=s.d0)
    if grads is not None:
        ops.linear_wgrad(dp, acts.o, grads.proj, grads.proj_bias)
    do = ops.linear_dgrad(dp, w.proj, out=s.d1)
    dqkv = ops.attention_backward(do, acts.qkv, acts.o, heads, out=s.wide(3))
    if grads is not None:
        y1 = acts.y1 if acts.y1 is not None else ops.adaln(z, s1, a1, out=s.d1)
        ops.linear_wgrad(dqkv, y1, grads.qkv, grads.qkv_bias)
    dy1 = ops.linear_dgrad(dqkv, w.qkv, out=s.d0)
    ops.adaln_backward(dy1, z, a1, g, ds1, da1)
    return g


def _mlp_backward(
    ops: Any,
    g: Tensor,
    z: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    dvectors: tuple[Tensor, Tensor, Tensor],
    w: BlockWeights,
    acts: Activations,
    grads: BlockGrads | None,
    s: Scratch,
) -> None:
    """The half f = z' + g2 MLP(adaLN(z')): ``g`` becomes the gradient with respect to z'."""
    g1, s2, a2, g2 = vectors
    ds2, da2, dg2 = dvectors
    dr = ops.gate_residual_backward(g, acts.r, g2, dg2, out=s.d0)
    if grads is not None:
        gh = acts.gh if acts.gh is not None else ops.gelu(acts.h, out=s.wide(4))
        ops.linear_wgrad(dr, gh, grads.fc2, grads.fc2_bias)
    dgh = ops.linear_dgrad(dr, w.fc2, out=s.wide(4))
    dh = ops.gelu_backward(dgh, acts.h, out=dgh)
    z2 = acts.z2 if acts.z2 is not None else ops.gate_residual(z, acts.p, g1, out=s.e)
    if grads is not None:
        y2 = acts.y2 if acts.y2 is not None else ops.adaln(z2, s2, a2, out=s.d1)
        ops.linear_wgrad(dh, y2, grads.fc1, grads.fc1_bias)
    dy2 = ops.linear_dgrad(dh, w.fc1, out=s.d0)
    ops.adaln_backward(dy2, z2, a2, g, ds2, da2)


def injection_backward(
    ops: Any,
    g: Tensor,
    x: Tensor,
    w: BlockWeights,
    acts: Activations,
    grads: BlockGrads | None,
    s: Scratch,
    du: Tensor,
    wants_dx: bool = True,
) -> Tensor:
    """The part z = W2 gelu(A x + u) + b2: ``g`` (B,T,D) becomes the gradient with respect to x.

    Accumulates the gradient of the addend u into ``du`` (B,T,2D). x may be in ``s.e``.
    """
    dtype = w.qkv.dtype
    dz = g if g.dtype == dtype else s.d0.copy_(g)
    if grads is not None:
        a = acts.a if acts.a is not None else ops.gelu(acts.pre, out=s.wide(2))
        ops.linear_wgrad(dz, a, grads.inj_w2, grads.inj_b2)
    da = ops.linear_dgrad(dz, w.inj_w2, out=s.wide(2))
    dpre = ops.gelu_backward(da, acts.pre, out=da, total=du)
    if grads is not None and grads.inj_w1 is not None:
        xc = x if x.dtype == dtype else s.d1.copy_(x)
        ops.linear_wgrad(dpre, xc, grads.inj_w1[:, : x.shape[-1]], None)
    return ops.linear_dgrad(dpre, w.inj_a, out=g) if wants_dx else g
