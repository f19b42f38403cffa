"""Attention: y = softmax(q k^T / sqrt(K)) v per head, not causal, on packed qkv, in Triton.

    forward   s = q k^T / sqrt(K),   e = exp(s - max s),   l = sum e,   y = e v / l
    backward  p = e / l,   delta = sum dy y,   ds = p (dy v^T - delta)
              dq = ds k / sqrt(K),   dk = ds^T q / sqrt(K),   dv = p^T dy

Shapes: qkv, dqkv (B,T,3D) packed as (3,H,K), y, dy (B,T,D), one dtype, contiguous; nothing is
permuted or copied. Scores, sums and accumulators are float32; e, p and ds are rounded to the
operands' dtype for the tensor cores. A head is cut into powers of two of at least 16 columns: 72 is
64 + 16, so 80 columns of work, never 96 or 128.

No log-sum-exp is kept: the backward finds max s and l again (one of its 8 products and of its 3
passes of exp), then dq per block of queries and dk, dv per block of keys, in a fixed order without
atomics. Workspace: 16 bytes per row and head, 0.11 U at K = 72 in half precision (U = B T D
elements).

Floor at B = 64, H = 16, T = 256, K = 72, half precision, U = 37.7 MB, at 790 TFLOP/s and 4.3 TB/s
(H200); measured times are in bench/NOTES.md:

    forward    2 products, 21 GFLOP, 27 us    reads 3 U, writes 1 U: 35 us
    backward   8 products, 86 GFLOP, 109 us   reads 9 U, writes 3 U: 105 us

float32 keeps its precision (input_precision="ieee"): the products are FMAs on the CUDA cores, at
most 1/15 of that rate.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import attention_routes, reference
from fpdm.kernels.attention_routes import WIDEST
from fpdm.kernels.implementations import plainly
from fpdm.kernels.launch import FLOATS, LaunchError, cdiv, check
from fpdm.kernels.rows import power

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(
    p_x, o_row, m_row,
    K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The columns of rows at ``p_x`` + ``o_row``, in parts of MAIN and TAIL, zero outside."""
    b_main = _part(p_x, o_row, m_row, 0, MAIN, K, EVEN)
    return (b_main, _part(p_x, o_row, m_row, MAIN, TAIL, K, EVEN)) if TAIL else (b_main,)


@triton.jit
def _part(
    p_x, o_row, m_row,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    o_col = FIRST + tl.arange(0, WIDTH)
    p = p_x + o_row[:, None] + o_col[None, :]
    m = (o_col < K)[None, :]
    if not EVEN:
        m = m & m_row[:, None]
    return tl.load(p) if EVEN and FIRST + WIDTH <= K else tl.load(p, mask=m, other=0.0)


@triton.jit
def _store(
    p_x, o_row, m_row, b_x,
    K: tl.constexpr, MAIN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    for j in tl.static_range(0, len(b_x)):
        o_col = j * MAIN + tl.arange(0, b_x[j].shape[1])
        p = p_x + o_row[:, None] + o_col[None, :]
        m = (o_col < K)[None, :]
        if not EVEN:
            m = m & m_row[:, None]
        tl.store(p, b_x[j].to(p_x.dtype.element_ty), mask=m)


@triton.jit
def _outer(b_a, b_b):
    """a b^T over all parts."""
    b_s = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision="ieee")
    for j in tl.static_range(1, len(b_a)):
        b_s = tl.dot(b_a[j], tl.trans(b_b[j]), b_s, input_precision="ieee")
    return b_s


@triton.jit
def _inner(b_p, b_x, b_acc):
    """acc + p x, for each part."""
    b_main = tl.dot(b_p, b_x[0], b_acc[0], input_precision="ieee")
    return (
        (b_main,)
        if len(b_x) == 1
        else (b_main, tl.dot(b_p, b_x[1], b_acc[1], input_precision="ieee"))
    )


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    b_main = tl.zeros((ROWS, MAIN), tl.float32)
    return (b_main, tl.zeros((ROWS, TAIL), tl.float32)) if TAIL else (b_main,)


@triton.jit
def _scaled(b_x, b_factor):
    b_main = b_x[0] * b_factor
    return (b_main,) if len(b_x) == 1 else (b_main, b_x[1] * b_factor)


@triton.jit
def _row_dot(b_a, b_b):
    b_sum = tl.sum(b_a[0].to(tl.float32) * b_b[0].to(tl.float32), 1)
    for j in tl.static_range(1, len(b_a)):
        b_sum += tl.sum(b_a[j].to(tl.float32) * b_b[j].to(tl.float32), 1)
    return b_sum


@triton.jit
def _place(T, ROWS: tl.constexpr, H: tl.constexpr):
    """Of this program: sample (int64), head, tokens."""
    blocks = tl.cdiv(T, ROWS)
    i_pair = tl.program_id(0) // blocks
    o_t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    return (i_pair // H).to(tl.int64), i_pair % H, o_t


@triton.jit
def _scores(b_q, b_k, m_k, EVEN: tl.constexpr):
    """q k^T; -inf for the keys that are not there."""
    b_s = _outer(b_q, b_k)
    if not EVEN:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _exp(b_s, b_m, K: tl.constexpr):
    """exp((s - m) / sqrt(K)); the difference first: it is exact, so that no e passes 1."""
    return tl.exp2((b_s - b_m) * (LOG2E * K**-0.5))


@triton.jit
def _online(b_s, b_m, b_l, K: tl.constexpr):
    """(e, factor for what was summed before, max, sum) with these scores included."""
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    # a block may hold nothing but -inf before a finite score comes
    b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_e = _exp(b_s, b_ref[:, None], K)
    b_keep = _exp(b_m, b_ref, K)
    return b_e, b_keep, b_new, b_l * b_keep + tl.sum(b_e, 1)


@triton.jit(do_not_specialize=["T"])
def _attention_forward(
    p_qkv, p_out, T,
    H: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = H * K
    i_b, i_h, o_q = _place(T, M, H)
    m_q = o_q < T
    p_q = p_qkv + i_b * T * (3 * D) + i_h * K
    b_q = _load(p_q, o_q * (3 * D), m_q, K, MAIN, TAIL, EVEN)
    b_acc = _zeros(M, MAIN, TAIL)
    b_m = tl.full((M,), float("-inf"), tl.float32)
    b_l = tl.zeros((M,), tl.float32)
    for i in tl.range(0, T, N, num_stages=STAGES):
        o_k = i + tl.arange(0, N)
        m_k = o_k < T
        b_k = _load(p_q + D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
        b_e, b_keep, b_m, b_l = _online(_scores(b_q, b_k, m_k, EVEN), b_m, b_l, K)
        b_v = _load(p_q + 2 * D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
        b_acc = _inner(b_e.to(b_v[0].dtype), b_v, _scaled(b_acc, b_keep[:, None]))
    p_out += i_b * T * D + i_h * K
    _store(p_out, o_q * D, m_q, _scaled(b_acc, (1.0 / b_l)[:, None]), K, MAIN, EVEN)


@triton.jit(do_not_specialize=["T"])
def _attention_backward_q(
    p_dy, p_qkv, p_y, p_dqkv, p_rows, T,
    H: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dq of M queries, and what ``_attention_backward_kv`` needs of each: max s, -log2 l, delta."""
    D: tl.constexpr = H * K
    i_b, i_h, o_q = _place(T, M, H)
    m_q = o_q < T
    p_q = p_qkv + i_b * T * (3 * D) + i_h * K
    o_y = i_b * T * D + i_h * K
    b_q = _load(p_q, o_q * (3 * D), m_q, K, MAIN, TAIL, EVEN)
    b_dy = _load(p_dy + o_y, o_q * D, m_q, K, MAIN, TAIL, EVEN)
    b_delta = _row_dot(b_dy, _load(p_y + o_y, o_q * D, m_q, K, MAIN, TAIL, EVEN))
    b_m = tl.full((M,), float("-inf"), tl.float32)
    b_l = tl.zeros((M,), tl.float32)
    for i in tl.range(0, T, N, num_stages=STAGES):
        o_k = i + tl.arange(0, N)
        m_k = o_k < T
        b_k = _load(p_q + D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
        _, _, b_m, b_l = _online(_scores(b_q, b_k, m_k, EVEN), b_m, b_l, K)
    b_acc = _zeros(M, MAIN, TAIL)
    b_inverse = (1.0 / b_l)[:, None]
    for i in tl.range(0, T, N, num_stages=STAGES):
        o_k = i + tl.arange(0, N)
        m_k = o_k < T
        b_k = _load(p_q + D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
        b_v = _load(p_q + 2 * D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
        # normalised before it is rounded: e alone is up to T times p
        b_p = _exp(_scores(b_q, b_k, m_k, EVEN), b_m[:, None], K) * b_inverse
        b_ds = b_p * (_outer(b_dy, b_v) - b_delta[:, None])
        b_acc = _inner(b_ds.to(b_k[0].dtype), b_k, b_acc)
    p_dq = p_dqkv + i_b * T * (3 * D) + i_h * K
    b_acc = _scaled(b_acc, K**-0.5)
    _store(p_dq, o_q * (3 * D), m_q, b_acc, K, MAIN, EVEN)
    p_rows += ((i_b * H + i_h) * T + o_q) * 4
    tl.store(p_rows, b_m, mask=m_q)
    tl.store(p_rows + 1, -tl.log2(b_l), mask=m_q)
    tl.store(p_rows + 2, b_delta, mask=m_q)


@triton.jit(do_not_specialize=["T"])
def _attention_backward_kv(
    p_dy, p_qkv, p_dqkv, p_rows, T,
    H: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys, M queries at a time. Scores are transposed: keys in rows, so that p and
    ds go from one dot to the next in registers."""
    D: tl.constexpr = H * K
    i_b, i_h, o_k = _place(T, N, H)
    m_k = o_k < T
    p_q = p_qkv + i_b * T * (3 * D) + i_h * K
    p_dy += i_b * T * D + i_h * K
    p_rows += (i_b * H + i_h) * T * 4
    b_k = _load(p_q + D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
    b_v = _load(p_q + 2 * D, o_k * (3 * D), m_k, K, MAIN, TAIL, EVEN)
    b_dk = _zeros(N, MAIN, TAIL)
    b_dv = _zeros(N, MAIN, TAIL)
    for i in tl.range(0, T, M, num_stages=STAGES):
        o_q = i + tl.arange(0, M)
        m_q = o_q < T
        b_q = _load(p_q, o_q * (3 * D), m_q, K, MAIN, TAIL, EVEN)
        b_dy = _load(p_dy, o_q * D, m_q, K, MAIN, TAIL, EVEN)
        b_m, b_minus, b_delta = _row_numbers(p_rows, o_q, m_q, M, EVEN)
        # the maximum was summed in another kernel: huge scores may pass it by rounding. A NaN that
        # is lost here is in l
        b_s = tl.minimum(_outer(b_k, b_q), b_m[None, :])
        b_p = tl.exp2((b_s - b_m[None, :]) * (LOG2E * K**-0.5) + b_minus[None, :])
        if not EVEN:
            # 0 times an infinite key is no probability
            b_p = tl.where(m_q[None, :], b_p, 0.0)
        b_dv = _inner(b_p.to(b_dy[0].dtype), b_dy, b_dv)
        b_ds = b_p * (_outer(b_v, b_dy) - b_delta[None, :])
        b_dk = _inner(b_ds.to(b_q[0].dtype), b_q, b_dk)
    p_dk = p_dqkv + i_b * T * (3 * D) + i_h * K + D
    _store(p_dk, o_k * (3 * D), m_k, _scaled(b_dk, K**-0.5), K, MAIN, EVEN)
    _store(p_dk + D, o_k * (3 * D), m_k, b_dv, K, MAIN, EVEN)


@triton.jit
def _row_numbers(p_rows, o_q, m_q, M: tl.constexpr, EVEN: tl.constexpr):
    """(max, -log2 l, delta) of each row, four floats apart: one wide load, where three narrow ones
    would be repeated by every thread that holds the column."""
    p = p_rows + o_q[:, None] * 4 + tl.arange(0, 4)[None, :]
    b = tl.load(p) if EVEN else tl.load(p, mask=m_q[:, None], other=0.0)
    b_first, b_second = tl.split(tl.reshape(b, (M, 2, 2)))
    b_m, b_delta = tl.split(b_first)
    b_minus, _ = tl.split(b_second)
    return b_m, b_minus, b_delta


@functools.cache
def parts(head_size: int) -> dict[str, int]:
    """MAIN and TAIL columns of a head: powers of two, at least 16; no tail where one part does."""
    main = max(16, 1 << (head_size.bit_length() - 1))
    tail = power(head_size - main) if head_size > main else 0
    if tail == main:
        main, tail = 2 * main, 0
    return {"K": head_size, "MAIN": main, "TAIL": tail}


@functools.cache
def tiles(
    tokens: int, head_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Kernel -> (warps, M, N, ...): M queries by N keys at a time, STAGES of them in flight.

    On sm_90 in half precision as swept on an H200 (bench/NOTES.md, 2026-11-26). float32 runs on the
    CUDA cores, whose operands pass through registers: smaller tiles.
    """
    half, hopper, narrow = dtype != torch.float32, capability == (9, 0), head_size <= 80
    size = min(64 if half else 32, power(tokens))
    one = {"M": size, "N": size, "STAGES": 2 if half else 1}
    columns = dict(one)
    if not hopper:
        # it holds the operands of dk and dv in registers too: at 64 + 32 columns they spill
        columns["M"] = min(16 if 80 < head_size <= 96 else 32, size)
    elif half and narrow:
        columns["STAGES"] = 3
    warps = (4, 4, 4) if half and narrow else (8, 8, 8 if half else 4)
    queries = dict(one)
    if not (half or narrow):
        # the sums of 32 rows of 128 columns spill
        queries["M"], columns["M"], columns["N"] = 16, 16, 16
    names = ("forward", "backward_q", "backward_kv")
    return {
        name: (w, tile | {"EVEN": tokens % max(tile["M"], tile["N"]) == 0})
        for name, w, tile in zip(names, warps, (one, queries, columns))
    }


def _capability(device: torch.device) -> tuple[int, int]:
    # the interpreter takes the path of the newest device that is tuned for
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _split(op: str, qkv: Tensor, heads: int) -> tuple[int, int, int, int]:
    """B, T, D, K. Raises LaunchError."""
    if qkv.dim() != 3:
        raise LaunchError(f"{op}: qkv: got {qkv.dim()} dimensions, expected (B,T,3D)")
    b, t, width = qkv.shape
    if width % 3:
        raise LaunchError(f"{op}: qkv: got a width of {width}, expected 3D")
    if heads < 1 or width % (3 * heads):
        raise LaunchError(f"{op}: heads: got {heads}, expected a divisor of {width // 3}")
    if t * width >= 2**31:
        raise LaunchError(f"{op}: qkv: got {t * width} elements a sample, expected under 2^31")
    return b, t, width // 3, width // (3 * heads)


def attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v: see ``reference.attention``. Raises LaunchError, and ImplError
    where the route that FPDM_ATTENTION names cannot run."""
    b, t, d, size = _split("attention", qkv, heads)
    out = qkv.new_empty(b, t, d) if out is None else out
    inputs = (("qkv", qkv, (b, t, 3 * d), FLOATS),)
    check("attention", qkv.device, inputs, (("out", out, (b, t, d), (qkv.dtype,)),))
    if not qkv.numel():
        return out
    name, _ = attention_routes.route(t, size, qkv.dtype, qkv.device)
    if name != attention_routes.OURS:
        return attention_routes.run(name, qkv, heads, out)
    warps, tile = tiles(t, size, qkv.dtype, _capability(qkv.device))["forward"]
    _attention_forward[(b * heads * cdiv(t, tile["M"]),)](
        qkv, out, t, H=heads, **parts(size), **tile, num_warps=warps
    )
    return out


def attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, heads: int, out: Tensor | None = None
) -> Tensor:
    """dqkv: see ``reference.attention_backward``, which runs heads wider than ``WIDEST``. Raises
    LaunchError."""
    b, t, d, size = _split("attention_backward", qkv, heads)
    out = torch.empty_like(qkv) if out is None else out
    small, wide = ((b, t, d), (qkv.dtype,)), ((b, t, 3 * d), (qkv.dtype,))
    inputs = (("dy", dy, *small), ("qkv", qkv, wide[0], FLOATS), ("y", y, *small))
    check("attention_backward", qkv.device, inputs, (("out", out, *wide),))
    if not qkv.numel():
        return out
    if size > WIDEST:
        plainly("attention_backward", f"head size {size}", f"at most {WIDEST}")
        return reference.attention_backward(dy, qkv, y, heads, out)
    numbers = qkv.new_empty(b, heads, t, 4, dtype=torch.float32)
    found = tiles(t, size, qkv.dtype, _capability(qkv.device))
    warps, tile = found["backward_q"]
    _attention_backward_q[(b * heads * cdiv(t, tile["M"]),)](
        dy, qkv, y, out, numbers, t, H=heads, **parts(size), **tile, num_warps=warps
    )
    warps, tile = found["backward_kv"]
    _attention_backward_kv[(b * heads * cdiv(t, tile["N"]),)](
        dy, qkv, out, numbers, t, H=heads, **parts(size), **tile, num_warps=warps
    )
    return out
