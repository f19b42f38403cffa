"""Device code of the fused GEMMs (fpdm.kernels.gemm): one block of x W^T, its prologues and
epilogues.

A program computes BLOCK_M x BLOCK_N results, one block or several in turn, BLOCK_K products at a
time; the sum starts from the addend. Row m belongs to sample m // T. N, K and T are constants of
the model, so only M is a run-time size, and masks vanish where blocks divide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fpdm.kernels import rows
from fpdm.kernels.mlp import sigmoid


@triton.jit
def _place(
    i_tile, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """First row and column of block ``i_tile``: GROUP blocks of rows share a column."""
    n_cols = tl.cdiv(N, BLOCK_N)
    i_first = i_tile // (GROUP * n_cols) * GROUP
    n_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - i_first, GROUP)
    i_in = i_tile % (GROUP * n_cols)
    return (i_first + i_in % n_rows) * BLOCK_M, i_in // n_rows * BLOCK_N


@triton.jit
def _operand(
    p_x, s_x, i_row, i_k, n_rows, K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_K) of a matrix (n_rows, K) from row i_row, column i_k; columns beyond K are 0,
    rows beyond the last are anything."""
    if TMA:
        b_x = p_x.load([i_row, i_k])
    else:
        o_row = tl.minimum(tl.arange(0, BLOCK), n_rows - 1 - i_row)[:, None]
        o_k = i_k + tl.arange(0, BLOCK_K)[None, :]
        p_block = p_x + i_row.to(tl.int64) * s_x + (o_row * s_x + o_k)
        if K % BLOCK_K == 0:
            b_x = tl.load(p_block)
        else:
            b_x = tl.load(p_block, mask=o_k < K, other=0.0)
    return b_x


@triton.jit
def _add_product(b_acc, b_x, b_w):
    """b_acc + x w^T, float32. Without tensor cores products are added one after the other: BLOCK_K
    of them to a sum of their own, as the error of one chain grows with the root of K."""
    if b_x.dtype == tl.float32:
        # not as a sum, which the compiler makes a chain of again
        b_acc = tl.fma(tl.dot(b_x, b_w.T, input_precision="ieee"), 1.0, b_acc)
    else:
        b_acc = tl.dot(b_x, b_w.T, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def _product(
    p_x, p_w, s_x, s_w, i_row, i_col, b_acc, M, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x W^T of one block added to ``b_acc``, float32."""
    for i_k in tl.range(0, K, BLOCK_K):
        b_x = _operand(p_x, s_x, i_row, i_k, M, K, BLOCK_M, BLOCK_K, TMA)
        b_w = _operand(p_w, s_w, i_col, i_k, N, K, BLOCK_N, BLOCK_K, TMA)
        b_acc = _add_product(b_acc, b_x, b_w)
    return b_acc


@triton.jit
def _bias(p_bias, i_col, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the sum of a block starts from: no load of it is left for the epilogue."""
    o_n = i_col + tl.arange(0, BLOCK_N)
    b_bias = tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    return tl.broadcast_to(b_bias[None, :], (BLOCK_M, BLOCK_N))


@triton.jit
def _where(i_row, i_col, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(offset of the block, offsets inside it, mask) in a matrix (M, N)."""
    o_row = tl.arange(0, BLOCK_M)[:, None]
    o_col = tl.arange(0, BLOCK_N)[None, :]
    m = (i_row + o_row < M) & (i_col + o_col < N)
    return i_row.to(tl.int64) * N + i_col, o_row * N + o_col, m


@triton.jit
def _vector(p_v, s_v, i_row, o_col, M, WIDTH: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Columns ``o_col`` of each row's modulation vector, float32: (1, ...) where all rows of a
    block belong to one sample, else (BLOCK_M, ...)."""
    if T % BLOCK_M == 0:
        p_row = p_v + (i_row // T).to(tl.int64) * s_v
        b_v = tl.load(p_row + o_col[None, :], mask=(o_col < WIDTH)[None, :], other=0.0)
    else:
        o_m = i_row + tl.arange(0, BLOCK_M)
        p_row = p_v + (o_m // T).to(tl.int64)[:, None] * s_v
        m = (o_m < M)[:, None] & (o_col < WIDTH)[None, :]
        b_v = tl.load(p_row + o_col[None, :], mask=m, other=0.0)
    return b_v.to(tl.float32)


@triton.jit
def statistics(
    p_z, p_stats, M, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr
):
    """(2, M): mean and 1/sqrt(var + eps) of each row, in the arithmetic of the adaLN kernel."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_m = o_m < M
    b_z = rows.load(p_z + o_m.to(tl.int64) * D, m_m, D, COLS)
    b_mean, b_rstd = rows.moments(b_z, D, COLS, EPS)
    tl.store(p_stats + o_m, tl.reshape(b_mean, (ROWS,)), mask=m_m)
    tl.store(p_stats + M + o_m, tl.reshape(b_rstd, (ROWS,)), mask=m_m)


@triton.jit
def adaln_linear(
    p_z, p_stats, p_shift, p_scale, p_w, p_bias, p_y, p_out, s_w, s_shift, s_scale, M,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """p_y None: y is not kept. With TMA p_z and p_w are descriptors."""
    n_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLAT):
        i_row, i_col = _place(i_tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        o_row = tl.arange(0, BLOCK_M)
        m_row = i_row + o_row < M
        b_mean = tl.load(p_stats + i_row + o_row, mask=m_row, other=0.0)[:, None]
        b_rstd = tl.load(p_stats + M + i_row + o_row, mask=m_row, other=0.0)[:, None]
        b_acc = _bias(p_bias, i_col, N, BLOCK_M, BLOCK_N)
        for i_k in tl.range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            b_z = _operand(p_z, K, i_row, i_k, M, K, BLOCK_M, BLOCK_K, TMA).to(tl.float32)
            b_w = _operand(p_w, s_w, i_col, i_k, N, K, BLOCK_N, BLOCK_K, TMA)
            b_scale = _vector(p_scale, s_scale, i_row, o_k, M, K, T, BLOCK_M) + 1.0
            b_shift = _vector(p_shift, s_shift, i_row, o_k, M, K, T, BLOCK_M)
            b_y = ((b_z - b_mean) * b_rstd * b_scale + b_shift).to(p_shift.dtype.element_ty)
            if K % BLOCK_K != 0:
                # not 0 there by itself, and perhaps Inf, which times 0 is NaN
                b_y = tl.where((o_k < K)[None, :], b_y, 0.0)
            if p_y is not None:
                m_y = (m_row & (i_col == 0))[:, None] & (o_k < K)[None, :]
                p_block = p_y + i_row.to(tl.int64) * K + (o_row[:, None] * K + o_k[None, :])
                tl.store(p_block, b_y, mask=m_y)
            b_acc = _add_product(b_acc, b_y, b_w)
        i_base, o, m = _where(i_row, i_col, M, N, BLOCK_M, BLOCK_N)
        tl.store(p_out + i_base + o, b_acc.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def linear_add_gelu(
    p_x, p_w, p_addend, p_pre, p_out, s_w, M, N: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """p_pre None: the pre-activation is not kept. With TMA p_x and p_w are descriptors."""
    n_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLAT):
        i_row, i_col = _place(i_tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        i_base, o, m = _where(i_row, i_col, M, N, BLOCK_M, BLOCK_N)
        if BIAS:
            b_acc = _bias(p_addend, i_col, N, BLOCK_M, BLOCK_N)
        else:
            b_acc = tl.load(p_addend + i_base + o, mask=m, other=0.0).to(tl.float32)
        b_acc = _product(
            p_x, p_w, K, s_w, i_row, i_col, b_acc, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )  # fmt: skip
        b_pre = b_acc.to(p_out.dtype.element_ty)
        if p_pre is not None:
            tl.store(p_pre + i_base + o, b_pre, mask=m)
        b_s, _ = sigmoid(b_pre.to(tl.float32))
        tl.store(p_out + i_base + o, (b_pre.to(tl.float32) * b_s).to(b_pre.dtype), mask=m)


@triton.jit
def _gated(
    b_p, i_row, i_col, p_z, p_gate, p_p, p_out, p_prev, s_gate, M,
    N: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Epilogue of COLS columns: stores; sums over columns of (out - prev)^2 and out^2."""
    i_base, o, m = _where(i_row, i_col, M, N, BLOCK_M, COLS)
    if p_p is not None:
        tl.store(p_p + i_base + o, b_p, mask=m)
    b_gate = _vector(p_gate, s_gate, i_row, i_col + tl.arange(0, COLS), M, N, T, BLOCK_M)
    b_z = tl.load(p_z + i_base + o, mask=m, other=0.0).to(tl.float32)
    b_out = tl.fma(b_gate, b_p.to(tl.float32), b_z).to(p_out.dtype.element_ty)
    tl.store(p_out + i_base + o, b_out, mask=m)
    b_moved = 0.0
    b_size = 0.0
    if p_prev is not None:
        b_new = b_out.to(tl.float32)
        if N % (2 * COLS) != 0:
            # columns beyond N repeat the last weight: perhaps Inf, which times a gate of 0 is NaN
            b_new = tl.where(m, b_new, 0.0)
        b_diff = b_new - tl.load(p_prev + i_base + o, mask=m, other=0.0).to(tl.float32)
        b_moved = tl.sum(b_diff * b_diff, 1)
        b_size = tl.sum(b_new * b_new, 1)
    return b_moved, b_size


@triton.jit
def linear_gate_residual(
    p_x, p_w, p_bias, p_z, p_gate, p_p, p_out, p_prev, p_sums, s_w, s_gate, M,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """p_p None: the product is not kept; p_prev None: no norms, else p_sums is (2, M, blocks of
    columns). With TMA p_x and p_w are descriptors."""
    n_cols = tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    n_tiles = tl.cdiv(M, BLOCK_M) * n_cols
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLAT):
        i_row, i_col = _place(i_tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        b_acc = _bias(p_bias, i_col, N, BLOCK_M, BLOCK_N)
        b_acc = _product(
            p_x, p_w, K, s_w, i_row, i_col, b_acc, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )  # fmt: skip
        b_p = b_acc.to(p_bias.dtype.element_ty)
        # z and prev of a whole block beside the sum would not fit the registers
        b_p = tl.permute(tl.reshape(b_p, (BLOCK_M, 2, HALF)), (0, 2, 1))
        b_first, b_second = tl.split(b_p)
        b_moved, b_size = _gated(
            b_first, i_row, i_col, p_z, p_gate, p_p, p_out, p_prev, s_gate, M,
            N, T, BLOCK_M, HALF,
        )  # fmt: skip
        b_more, b_larger = _gated(
            b_second, i_row, i_col + HALF, p_z, p_gate, p_p, p_out, p_prev, s_gate, M,
            N, T, BLOCK_M, HALF,
        )  # fmt: skip
        if p_prev is not None:
            o_row = tl.arange(0, BLOCK_M)
            m_row = i_row + o_row < M
            p_row = p_sums + i_row.to(tl.int64) * n_cols + (o_row * n_cols + i_col // BLOCK_N)
            tl.store(p_row, b_moved + b_more, mask=m_row)
            tl.store(p_row + tl.cast(M, tl.int64) * n_cols, b_size + b_larger, mask=m_row)
