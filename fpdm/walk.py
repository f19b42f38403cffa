"""The m unrolled iterations, forward and backward, for the batch or a part of it.

    x_{j+1} = f(x_j; u, c);   g <- J_f(x_j)^T g, j = m - 1 .. 0, every parameter's gradient added up

``fpdm::unroll`` and its backward (fpdm.fixed_point) are these walks from part to part. Either is
one call where the operators have it (fpdm.kernels.cpu_loop), the same kernels in the same order.
What an iteration keeps and what is recomputed from it: the ledger of fpdm.block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpdm.block import (
    SAVED,
    Activations,
    BlockGrads,
    BlockWeights,
    Scratch,
    forward_workspace,
    has_loop,
    injection_backward,
    next_iterate,
    saved_units,
    slot_offsets,
    slot_views,
    step_backward,
    step_forward,
)
from fpdm.kernels import ops


class Kept(NamedTuple):
    """Operands and what is kept for the backward, of the whole batch: x_0 (B,T,D), i (B,T,D), u
    (B,T,2D), mod (B,6D), x_1 .. x_{m-1} (m-1 or 0,B,T,D), and m slots in the residual and in the
    compute dtype."""

    x: Tensor
    i: Tensor | None
    u: Tensor | None
    mod: Tensor
    xs: Tensor
    residual: Tensor
    compute: Tensor
    recompute: str

    @property
    def m(self) -> int:
        """Iterations."""
        return len(self.compute)

    @property
    def layout(self) -> tuple[int, ...]:
        """Units of a slot in the residual and in the compute dtype, then ``slot_offsets``."""
        saved = saved_units(self.recompute, self.injected)
        return *saved, *slot_offsets(self.recompute, self.injected)

    @property
    def injected(self) -> bool:
        """Whether the block has an injection; u may have been dropped, i not."""
        return self.i is not None


class BlockRun(NamedTuple):
    """How forward and backward run, the same for every part of the batch: the operator set ``ops``
    (fpdm.kernels.implementations.resolve), weights ``w`` in the compute dtype, ``heads``, the
    accumulators of the parameters' gradients (None: frozen weights), and whether dL/dx_0 is
    wanted."""

    ops: Any
    w: BlockWeights
    heads: int
    grads: BlockGrads | None = None
    input_grad: bool = False


class _Part(NamedTuple):
    """The samples of a part."""

    x: Tensor
    u: Tensor | None
    mod: Tensor
    xs: Tensor
    slots: list[Activations]
    recompute: str

    @classmethod
    def of(cls, k: Kept, part: slice) -> _Part:
        u = None if k.u is None else k.u[part]
        slots = [
            slot_views(residual, compute, k.recompute, k.injected, k.x.shape)[part]
            for residual, compute in zip(k.residual, k.compute)
        ]
        return cls(k.x[part], u, k.mod[part], k.xs[:, part], slots, k.recompute)


def parts(batch: int, chunks: int) -> list[slice]:
    """The batch in ``chunks`` runs of samples."""
    size = max(1, -(-batch // chunks))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def forward(run: BlockRun, k: Kept, part: slice, out: Tensor, table: Tensor) -> None:
    """The m iterations of a part: what they keep into ``k``, x_m into its rows of ``out`` (B,T,D),
    the norms into those of ``table`` (m or 0,2,B)."""
    x = k.x[part]
    work = forward_workspace(x, k.mod.dtype, k.recompute)
    between = [torch.empty_like(x) for _ in range(min(k.m - 1, 2))] if not len(k.xs) else []
    if has_loop(run.ops, x.dtype, k.mod.dtype):
        run.ops.unroll(k, part, run.w, run.heads, work, between, out, table)
    else:
        _forward(run, _Part.of(k, part), work, between, out[part], table[:, :, part])


def _forward(
    run: BlockRun, k: _Part, work: Activations, between: list[Tensor], out: Tensor, table: Tensor
) -> None:
    m, src = len(k.slots), k.x
    norms = table.new_empty(table.shape[1:]) if len(table) else None
    for j, slot in enumerate(k.slots):
        dst = out if j == m - 1 else (k.xs[j] if len(k.xs) else between[j % 2])
        acts = slot.update(work)
        if k.recompute != "none":
            acts.z2 = dst
        if k.recompute == "full":
            acts.z = dst
        names = SAVED[k.recompute]
        step_forward(run.ops, src, k.u, k.mod, run.w, run.heads, acts, dst, norms, names)
        if norms is not None:
            table[j] = norms
        src = dst


def backward(run: BlockRun, k: Kept, part: slice, g: Tensor, dmod: Tensor, di: Tensor) -> None:
    """The m iterations of a part from the last to the first: ``g`` (b,T,D) becomes dx_0, ``di``
    (b,T,D) is written where there is an injection, ``dmod`` (b,6D) added to."""
    scratch = Scratch.like(g, k.mod.dtype)
    du = None
    if k.injected:
        b, t, d = g.shape
        du = g.new_zeros(b, t, 2 * d, dtype=ops.accumulator(k.mod.dtype))
    if has_loop(run.ops, k.x.dtype, k.mod.dtype):
        run.ops.unroll_backward(
            k, part, run.w, run.heads, run.grads, run.input_grad, g, dmod, du, scratch,
            # nothing holds it afterwards
            _again(g, k.mod, k.injected) if k.recompute == "full" else None,
        )  # fmt: skip
    else:
        _backward(run, _Part.of(k, part), g, dmod, du, scratch)
    if k.i is not None and du is not None:
        _injection_gradients(run, k.i[part], du, di, scratch)


def _backward(
    run: BlockRun, k: _Part, g: Tensor, dmod: Tensor, du: Tensor | None, scratch: Scratch
) -> None:
    for j in range(len(k.slots) - 1, -1, -1):
        _step(run, k, j, g, dmod, du, scratch)


def _step(
    run: BlockRun, k: _Part, j: int, g: Tensor, dmod: Tensor, du: Tensor | None, scratch: Scratch
) -> None:
    """Iteration j. Apart from the loop: what it recomputed in full is gone before the next does."""
    acts = k.slots[j]
    if k.recompute == "full":
        acts = _forward_again(run, _iterate_before(run, k, j, scratch), k, scratch)
    z = k.x if acts.z is None else acts.z
    step_backward(run.ops, g, z, k.mod, run.w, run.heads, acts, run.grads, dmod, scratch)
    if du is not None:
        # rebuilt only now: until here its buffer held z'
        x = _iterate_before(run, k, j, scratch)
        wants_dx = j > 0 or run.input_grad
        injection_backward(run.ops, g, x, run.w, acts, run.grads, scratch, du, wants_dx)


def _iterate_before(run: BlockRun, k: _Part, j: int, scratch: Scratch) -> Tensor:
    """x_j: given, kept, or rebuilt from what iteration j - 1 kept."""
    if j == 0:
        return k.x
    if k.recompute != "elementwise":
        return k.xs[j - 1]
    before = k.slots[j - 1]
    assert before.z is not None
    return next_iterate(run.ops, before.z, before, k.mod, scratch.e)


def _again(x: Tensor, mod: Tensor, injected: bool) -> Kept:
    """Room for one iteration that is recomputed: what the element-wise ledger keeps of it."""
    residual, compute = saved_units("elementwise", injected)
    slots = x.new_empty(1, residual * x.numel()), mod.new_empty(1, compute * x.numel())
    return Kept(
        x, x if injected else None, None, mod, x.new_empty(0, *x.shape), *slots, "elementwise"
    )


def _forward_again(run: BlockRun, x: Tensor, k: _Part, s: Scratch) -> Activations:
    again = _again(x, k.mod, k.u is not None)
    kept = _Part.of(again, slice(None)).slots[0]
    work = Activations(a=s.wide(2), y1=s.d0, z2=s.e, y2=s.d0, gh=s.wide(4))
    acts, names = kept.update(work), SAVED["elementwise"]
    step_forward(run.ops, x, k.u, k.mod, run.w, run.heads, acts, s.e, None, names)
    return kept


def _injection_gradients(run: BlockRun, i: Tensor, du: Tensor, di: Tensor, s: Scratch) -> None:
    """Through u = E i + b1: ``di``, and dE, db1 into the accumulators."""
    wide = du if du.dtype == i.dtype else s.wide(2).copy_(du)
    grads = run.grads
    if grads is not None and grads.inj_w1 is not None and grads.inj_b1 is not None:
        run.ops.linear_wgrad(wide, i, grads.inj_w1[:, i.shape[-1] :], grads.inj_b1)
    run.ops.linear_dgrad(wide, run.w.inj_e, out=di)
