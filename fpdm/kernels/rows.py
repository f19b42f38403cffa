"""What the Triton row kernels share: a row in registers, its moments, sums over tokens.

A program takes ROWS tokens of one sample, walks their D columns in pieces of COLS and keeps all
pieces in registers. With ROWS COLS = 512 and four warps a row of D >= 128 belongs to one warp: its
sums are shuffles, without shared memory or barriers, and the published widths (384, 768, 1024,
1152) waste no lane. Arithmetic is float32, whatever the dtype in memory. Tiles are a function of D
alone: nothing is tuned at run time.

Sums over tokens are deterministic: a program sums ``chunk`` tokens and writes float32 partials (B,
chunks, n, D), ``accumulate`` adds them in order. Workspace: 4 n / (chunk size) U, size the bytes of
an element: 0.125 n U in half precision for 16 tokens. ``add_column_sums`` does the same over all
rows of a matrix (the gradient of a bias).

Names: i_ index, o_ offsets, m_ mask, p_ pointer, s_ stride, b_ block of values.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels.launch import cdiv, next_power_of_2, row_stride

WARPS = 4


@functools.cache
def tile(width: int) -> dict[str, int]:
    """ROWS and COLS for rows of ``width``: at most 16 pieces, 512 values in all up to D = 8192; at
    most 16 rows, which divide every chunk of tokens that a program sums."""
    cols = min(max(128, next_power_of_2(cdiv(width, 16))), power(width))
    return {"D": width, "ROWS": min(max(512 // cols, 1), 16), "COLS": cols}


def shared_tile(width: int) -> dict[str, int]:
    """The same for a kernel that also keeps sums over tokens of every column: a long row is shared
    by two warps, since one would need so many registers that few fit a multiprocessor."""
    found = tile(width)
    if found["ROWS"] < 2 or cdiv(width, found["COLS"]) < 6:
        return found
    return found | {"ROWS": found["ROWS"] // 2, "COLS": 2 * found["COLS"]}


def power(n: int) -> int:
    """The least power of two that is at least n, and that a block may have: 16."""
    return max(next_power_of_2(n), 16)


@triton.jit
def piece(D: tl.constexpr, COLS: tl.constexpr):
    """(block of rows, columns) of this program in a grid that walks the pieces of a row first."""
    pieces: tl.constexpr = (D + COLS - 1) // COLS
    i = tl.program_id(0)
    return i // pieces, i % pieces * COLS + tl.arange(0, COLS)


@triton.jit
def load(
    p_x, m_row, D: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr = True, LAST: tl.constexpr = False,
):  # fmt: skip
    """The pieces of the rows that begin at ``p_x`` (ROWS,), zero outside: a tuple of blocks.

    WIDE: float32, else as in memory, so that what waits takes half the registers. LAST tells the
    cache, and keeps the compiler from merging this load with an earlier one.
    """
    o_col = tl.arange(0, COLS)
    p = p_x[:, None] + o_col[None, :]
    m = m_row[:, None]
    b_x: tl.tuple = ()
    for j in tl.static_range(0, (D + COLS - 1) // COLS):
        if (j + 1) * COLS > D:
            m = m & (o_col < D - j * COLS)[None, :]
        if LAST:
            b_piece = tl.load(p + j * COLS, mask=m, other=0.0, eviction_policy="evict_first")
        else:
            b_piece = tl.load(p + j * COLS, mask=m, other=0.0)
        b_x += (b_piece.to(tl.float32) if WIDE else b_piece,)
    return b_x


@triton.jit
def zeros(D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The pieces of rows of zeros."""
    b_x: tl.tuple = ()
    for _ in tl.static_range(0, (D + COLS - 1) // COLS):
        b_x += (tl.zeros((ROWS, COLS), tl.float32),)
    return b_x


@triton.jit
def store(p_x, b_x, m_row, D: tl.constexpr, COLS: tl.constexpr):
    """Stores the pieces of the rows that begin at ``p_x`` (ROWS,), rounded to memory's dtype."""
    o_col = tl.arange(0, COLS)
    p = p_x[:, None] + o_col[None, :]
    m = m_row[:, None]
    for j in tl.static_range(0, len(b_x)):
        if (j + 1) * COLS > D:
            m = m & (o_col < D - j * COLS)[None, :]
        tl.store(p + j * COLS, b_x[j].to(p_x.dtype.element_ty), mask=m)


@triton.jit
def repeat(p_x, ROWS: tl.constexpr):
    """One vector for all rows: (ROWS,) pointers. As wide as a row, it needs no change of layout."""
    return p_x + tl.zeros((ROWS,), tl.int32)


@triton.jit
def row_sum(b_x):
    """Sum over all pieces and columns: (ROWS,)."""
    b_sum = b_x[0]
    for j in tl.static_range(1, len(b_x)):
        b_sum += b_x[j]
    return tl.sum(b_sum, 1)


@triton.jit
def subtract(b_x, b_mean, D: tl.constexpr, COLS: tl.constexpr):
    """x - mean (ROWS, 1) of the float32 rows, zero outside D."""
    o_col = tl.arange(0, COLS)
    b_c: tl.tuple = ()
    for j in tl.static_range(0, len(b_x)):
        b_diff = b_x[j] - b_mean
        if (j + 1) * COLS > D:
            b_diff = tl.where((j * COLS + o_col < D)[None, :], b_diff, 0.0)
        b_c += (b_diff,)
    return b_c


@triton.jit
def moments(b_x, D: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of the float32 rows, zero outside D: (ROWS, 1) each.

    The pass over the centred values also finds what the rounded mean missed, which a row of equal
    values would show times 1/sqrt(eps).
    """
    b_mean = (row_sum(b_x) * (1.0 / D))[:, None]
    b_c = subtract(b_x, b_mean, D, COLS)
    b_square: tl.tuple = ()
    for j in tl.static_range(0, len(b_c)):
        b_square += (b_c[j] * b_c[j],)
    b_missed = row_sum(b_c) * (1.0 / D)
    b_var = row_sum(b_square) * (1.0 / D) - b_missed * b_missed
    b_var = tl.maximum(b_var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return b_mean + b_missed[:, None], tl.rsqrt(b_var + EPS)[:, None]


@triton.jit
def centre(b_x, D: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr):
    """(x - mean, zero outside the row; 1/sqrt(var + eps) (ROWS, 1)): passes over registers."""
    b_mean, b_rstd = moments(b_x, D, COLS, EPS)
    return subtract(b_x, b_mean, D, COLS), b_rstd


@triton.jit
def partial_sums(p_part, b_sums, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Stores the sums over rows of each (ROWS, COLS) piece at ``p_part`` (D,)."""
    b_rows: tl.tuple = ()
    for j in tl.static_range(0, len(b_sums)):
        b_rows += (tl.broadcast_to(tl.sum(b_sums[j], 0)[None, :], (ROWS, COLS)),)
    # stored by the first row of threads: no change of layout
    store(repeat(p_part, ROWS), b_rows, tl.arange(0, ROWS) == 0, D, COLS)


@triton.jit(do_not_specialize=["chunks"])
def _accumulate(
    p_part, p_first, p_second, s_first, s_second, chunks,
    D: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    i_b, i_sum = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_col = o_col < D
    p_out = tl.where(i_sum == 0, p_first + i_b * s_first, p_second + i_b * s_second)
    p_in = p_part + (i_b * chunks * SUMS + i_sum) * D + o_col
    b_sum = tl.zeros((COLS,), tl.float32)
    for _ in range(0, chunks):
        b_sum += tl.load(p_in, mask=m_col, other=0.0)
        p_in += SUMS * D
    b_sum += tl.load(p_out + o_col, mask=m_col, other=0.0)
    tl.store(p_out + o_col, b_sum, mask=m_col)


def chunks(tokens: int, chunk: int) -> int:
    """Programs per sample in a kernel that sums ``chunk`` tokens each."""
    return cdiv(tokens, chunk)


def workspace(like: Tensor, sums: int, chunk: int) -> Tensor:
    """Partials of ``sums`` sums over the tokens of ``like`` (B,T,D): (B, chunks, sums, D)."""
    b, t, d = like.shape
    return like.new_empty(b, chunks(t, chunk), sums, d, dtype=torch.float32)


def accumulate(part: Tensor, *outs: Tensor) -> None:
    """Adds the partials, chunk after chunk, to one or two accumulators (B,D)."""
    b, n, sums, d = part.shape
    first, second = outs[0], outs[-1]
    shape = _accumulate_tile(d)
    _accumulate[b, cdiv(d, shape["COLS"]), sums](
        part, first, second, row_stride(first), row_stride(second), n,
        **shape, SUMS=sums, num_warps=1,
    )  # fmt: skip


@functools.cache
def _accumulate_tile(width: int) -> dict[str, int]:
    return {"D": width, "COLS": min(128, power(width))}


@triton.jit(do_not_specialize=["n"])
def _column_sums(
    p_x, p_part, n, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr
):
    tl.static_assert(CHUNK % ROWS == 0)
    i_chunk, o_col = piece(D, COLS)
    i_first = i_chunk * CHUNK
    m_col = o_col < D
    b_sum = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(i_first, tl.minimum(i_first + CHUNK, n), ROWS):
        o_row = i + tl.arange(0, ROWS)
        m = (o_row < n)[:, None] & m_col[None, :]
        p = p_x + o_row.to(tl.int64)[:, None] * D + o_col[None, :]
        b_sum += tl.load(p, mask=m, other=0.0).to(tl.float32)
    tl.store(p_part + i_chunk.to(tl.int64) * D + o_col, tl.sum(b_sum, 0), mask=m_col)


@triton.jit(do_not_specialize=["n"])
def _add_rows(p_part, p_out, n, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    o_col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < D
    b_sum = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(0, n, ROWS):
        o_row = i + tl.arange(0, ROWS)
        m = (o_row < n)[:, None] & m_col[None, :]
        b_sum += tl.load(p_part + o_row[:, None] * D + o_col[None, :], mask=m, other=0.0)
    b_out = tl.load(p_out + o_col, mask=m_col, other=0.0)
    tl.store(p_out + o_col, b_out + tl.sum(b_sum, 0), mask=m_col)


def add_column_sums(x: Tensor, out: Tensor) -> None:
    """out (D,) float32 += sum over the rows of x (N,D), contiguous. Bytes: N D of x, and partials
    of 1/128 of that in half precision."""
    n, d = x.shape
    if not x.numel():
        return
    cols, chunk = min(128, power(d)), 256
    part = x.new_empty(cdiv(n, chunk), d, dtype=torch.float32)
    _column_sums[(len(part) * cdiv(d, cols),)](
        x, part, n, D=d, ROWS=64, COLS=cols, CHUNK=chunk, num_warps=WARPS
    )
    narrow = min(32, cols)
    _add_rows[(cdiv(d, narrow),)](part, out, len(part), D=d, ROWS=64, COLS=narrow, num_warps=WARPS)
