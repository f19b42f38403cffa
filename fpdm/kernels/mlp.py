"""The MLP's nonlinearity: tanh GELU, its derivative, and the addend of the injection.

    a = sqrt(2/pi) (x + 0.044715 x^3),   s = 1/(1 + exp(-2a)) = (1 + tanh a)/2
    gelu       y = x s
    backward   dx = dy (s + x s(1-s) 2a'),   a' = sqrt(2/pi) (1 + 3 0.044715 x^2);   total += dx
    add_gelu   pre = x W^T + u,   y = gelu(pre)

With e = exp(-2|a|) <= 1 nothing overflows: s is 1/(1+e) or e/(1+e), and s(1-s) = e/(1+e)^2 without
cancellation. x = -inf gives NaN, as plain PyTorch does.

Bytes, in N = elements of x: gelu 2 N, backward 3 N (with a float32 total 7 N, where a sum of its
own would take 5 N more). For ``linear_add_gelu`` behind the GEMM's own
operands: a bias rides in the library's epilogue (GEMM writes N, gelu 2 N: 3 N). A tensor addend in
addmm is copied into the output first and read again (3 N, and gelu 2 N, and the GEMM's write: 6 N);
the product alone and one pass that adds and applies GELU is 4 N, 5 N where pre is kept. GELU is
taken of pre as it is stored, so by these kernels an iteration with and without gradient is one map;
by cuBLASLt's epilogue, which the table may choose where nothing is kept, but for that rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import rows
from fpdm.kernels.launch import FLOATS, cdiv, check
from fpdm.kernels.reference import linear

BLOCK = 1024


@triton.jit
def sigmoid(b_x):
    """(s, s(1-s)) at 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    # exp(-2|a|) as a power of two: 2 sqrt(2/pi) log2(e) = 2.3022082
    b_a = b_x * tl.fma(0.10294324 * b_x, b_x, 2.3022082)
    b_e = tl.exp2(-tl.abs(b_a))
    b_r = 1.0 / (1.0 + b_e)
    return tl.where(b_a >= 0, b_r, b_e * b_r), b_e * b_r * b_r


@triton.jit
def _gelu_forward(p_x, p_out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_s, _ = sigmoid(b_x)
    tl.store(p_out + o, (b_x * b_s).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _add_gelu_forward(p_x, p_u, p_pre, p_out, n, BLOCK: tl.constexpr, KEEP: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_pre = (b_x + tl.load(p_u + o, mask=m, other=0.0).to(tl.float32)).to(p_out.dtype.element_ty)
    if KEEP:
        tl.store(p_pre + o, b_pre, mask=m)
    b_s, _ = sigmoid(b_pre.to(tl.float32))
    tl.store(p_out + o, (b_pre.to(tl.float32) * b_s).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _gelu_backward(p_dy, p_x, p_dx, p_total, n, BLOCK: tl.constexpr):
    """p_total None: no total."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
    b_s, b_slope = sigmoid(b_x)
    # 2 a' = 1.5957691 + 0.21406445 x^2
    # from the left: the slope is 0 before the square overflows
    b_slope = b_slope * b_x * tl.fma(0.21406445 * b_x, b_x, 1.5957691)
    b_dx = (b_dy * (b_s + b_slope)).to(p_dx.dtype.element_ty)
    tl.store(p_dx + o, b_dx, mask=m)
    if p_total is not None:
        b_total = tl.load(p_total + o, mask=m, other=0.0)
        tl.store(p_total + o, b_total + b_dx.to(tl.float32), mask=m)


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Tanh GELU: see ``reference.gelu``. Raises LaunchError."""
    out = torch.empty_like(x) if out is None else out
    check(
        "gelu",
        x.device,
        (("x", x, x.shape, FLOATS),),
        (("out", out, x.shape, (x.dtype,)),),
        may_alias=(("out", "x"),),
    )
    if n := x.numel():
        _gelu_forward[(cdiv(n, BLOCK),)](x, out, n, BLOCK=BLOCK, num_warps=rows.WARPS)
    return out


def linear_add_gelu(
    x: Tensor, weight: Tensor, addend: Tensor, pre: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """gelu(x W^T + u): see ``reference.linear_add_gelu``. Raises LaunchError."""
    shape, dtype = (*x.shape[:-1], weight.shape[0]), (weight.dtype,)
    product = pre if pre is not None else out if out is not None else x.new_empty(shape)
    keep = pre is not None and (out is None or out.data_ptr() != pre.data_ptr())
    out = out if out is not None else torch.empty_like(product) if keep else product
    bias = addend.dim() == 1
    check(
        "linear_add_gelu",
        x.device,
        (("x", x, x.shape, dtype), ("addend", addend, shape[-1:] if bias else shape, dtype)),
        (("pre", product, shape, dtype), ("out", out, shape, dtype)),
        may_alias=(("pre", "out"),),
    )
    linear(x, weight, addend if bias else None, out=product)
    if bias:
        return gelu(product, out=out)
    if n := product.numel():
        _add_gelu_forward[(cdiv(n, BLOCK),)](
            product, addend, product, out, n, BLOCK=BLOCK, KEEP=keep, num_warps=rows.WARPS
        )
    return out


def gelu_backward(
    dy: Tensor, x: Tensor, out: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """dx = dy gelu'(x), total += dx: see ``reference.gelu_backward``. Raises LaunchError."""
    out = torch.empty_like(dy) if out is None else out
    dtype = (x.dtype,)
    check(
        "gelu_backward",
        x.device,
        (("dy", dy, x.shape, dtype), ("x", x, x.shape, FLOATS)),
        (("out", out, x.shape, dtype), ("total", total, x.shape, (torch.float32,))),
        may_alias=(("out", "dy"),),
    )
    if n := x.numel():
        _gelu_backward[(cdiv(n, BLOCK),)](dy, x, out, total, n, BLOCK=BLOCK, num_warps=rows.WARPS)
    return out
