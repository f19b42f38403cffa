"""AdamW, the moving average and the compute-dtype copy in one pass over flat buffers (Triton).

    g <- c g;   a <- b1 a + (1-b1) g;   v <- b2 v + (1-b2) g^2
    w <- w (1 - lr wd) - (lr / (1-b1^t)) a / (sqrt(v) / sqrt(1-b2^t) + eps)
    e <- e + (1-d) (w - e);   copy <- w

All (N,) float32 and contiguous; ``copy`` (N,) in a half dtype, or None. Bytes per parameter:
20 read, 16 written, 2 for the copy; the library's passes (unscale 8, AdamW 28, average 12, cast 6)
move 54.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import toolchain
from fpdm.kernels.launch import cdiv

BLOCK = 1024


@triton.jit
def adamw_kernel(
    p_w, p_g, p_a, p_v, p_e, p_copy, n, c, b1, r1, b2, r2, eps, shrink, lr, root, rest,
    HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_g = tl.load(p_g + o_n, mask=m_n, other=0.0) * c
    b_a = tl.load(p_a + o_n, mask=m_n, other=0.0) * b1 + b_g * r1
    b_v = tl.load(p_v + o_n, mask=m_n, other=0.0) * b2 + b_g * b_g * r2
    b_w = tl.load(p_w + o_n, mask=m_n, other=0.0)
    b_e = tl.load(p_e + o_n, mask=m_n, other=0.0)
    b_w = b_w * shrink - lr * b_a / (tl.sqrt_rn(b_v) / root + eps)
    tl.store(p_a + o_n, b_a, mask=m_n)
    tl.store(p_v + o_n, b_v, mask=m_n)
    tl.store(p_w + o_n, b_w, mask=m_n)
    tl.store(p_e + o_n, b_e + rest * (b_w - b_e), mask=m_n)
    if HAS_COPY:
        tl.store(p_copy + o_n, b_w.to(p_copy.dtype.element_ty), mask=m_n)


def unavailable(device: torch.device) -> str | None:
    """None when the kernel can run on ``device``, else the reason."""
    if device.type == "cuda":
        return "; ".join(toolchain.missing()) or None
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"needs a cuda device, got {device.type}"


def adamw_(
    w: Tensor, g: Tensor, a: Tensor, v: Tensor, e: Tensor, copy: Tensor | None, scalars: list[float]
) -> None:
    """The module's equations, in place; ``scalars``: c, b1, 1-b1, b2, 1-b2, eps, 1 - lr wd,
    lr / (1-b1^t), sqrt(1-b2^t), 1-d."""
    grid = (cdiv(w.numel(), BLOCK),)
    # a launch goes to the current device
    with torch.cuda.device(w.device) if w.is_cuda else contextlib.nullcontext():
        adamw_kernel[grid](
            w, g, a, v, e, w if copy is None else copy, w.numel(), *scalars,
            HAS_COPY=copy is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
