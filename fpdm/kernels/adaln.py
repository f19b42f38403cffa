"""adaLN: y = LN(z) (1 + scale) + shift per token, LN over D without affine, eps 1e-6.

    forward   xhat = (z - mean) rstd,   y = xhat (1 + scale) + shift
    backward  g = dy (1 + scale),   dz += rstd (g - mean(g) - xhat mean(g xhat))
              dshift += sum_t dy,   dscale += sum_t dy xhat

Shapes: z, y, dy, dz (B,T,D) contiguous, z and dz in the residual dtype (float32, or y's); shift,
scale (B,D) in y's dtype; dshift, dscale (B,D) float32; vectors with any batch stride.

Bytes, in U = B T D elements of one dtype: forward 2 U (reads z, writes y), backward 4 U (reads dy,
z, dz, writes dz; statistics are computed again) + 0.5 U for the partials of the two sums over
tokens, which take 0.25 U of workspace in half precision (fpdm.kernels.rows).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import rows
from fpdm.kernels.launch import FLOATS, cdiv, check, row_stride
from fpdm.kernels.reference import LN_EPS

# tokens per program of the backward: 32 would leave a second round of programs mostly idle
CHUNK = 16


@triton.jit
def modulate(
    p_out, b_z, p_shift, p_scale, m_row,
    D: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Stores adaLN of the float32 rows ``b_z`` at ``p_out``; pointers are (ROWS,)."""
    b_shift = rows.load(p_shift, m_row, D, COLS, WIDE=False)
    b_scale = rows.load(p_scale, m_row, D, COLS, WIDE=False)
    b_c, b_rstd = rows.centre(b_z, D, COLS, EPS)
    b_y: tl.tuple = ()
    for j in tl.static_range(0, len(b_c)):
        b_factor = b_scale[j].to(tl.float32) + 1.0
        b_y += (b_c[j] * b_rstd * b_factor + b_shift[j].to(tl.float32),)
    rows.store(p_out, b_y, m_row, D, COLS)


@triton.jit(do_not_specialize=["T"])
def _adaln_forward(
    p_z, p_shift, p_scale, p_out, s_shift, s_scale, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_row = i_t < T
    o_row = (i_b * T + i_t) * D
    b_z = rows.load(p_z + o_row, m_row, D, COLS)
    p_shift = rows.repeat(p_shift + i_b * s_shift, ROWS)
    p_scale = rows.repeat(p_scale + i_b * s_scale, ROWS)
    modulate(p_out + o_row, b_z, p_shift, p_scale, m_row, D, COLS, EPS)


@triton.jit
def _row_gradient(
    p_dy, p_z, p_scale, p_dz, b_dshift, b_dscale, m_row,
    D: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """dz of the rows at these (ROWS,) pointers; the two sums over tokens, these rows added."""
    b_z = rows.load(p_z, m_row, D, COLS)
    b_dy = rows.load(p_dy, m_row, D, COLS, WIDE=False)
    b_scale = rows.load(p_scale, m_row, D, COLS, WIDE=False)
    b_dz = rows.load(p_dz, m_row, D, COLS, WIDE=False)
    b_c, b_rstd = rows.centre(b_z, D, COLS, EPS)
    b_g: tl.tuple = ()
    b_gc: tl.tuple = ()
    for j in tl.static_range(0, len(b_c)):
        b_g += (b_dy[j].to(tl.float32) * (b_scale[j].to(tl.float32) + 1.0),)
        b_gc += (b_g[j] * b_c[j],)
    b_mean = (rows.row_sum(b_g) * (1.0 / D))[:, None]
    b_slope = (rows.row_sum(b_gc) * (1.0 / D))[:, None] * b_rstd
    # again, from the cache: kept in float32 they would not leave room for two warps a scheduler
    b_dy = rows.load(p_dy, m_row, D, COLS, WIDE=False, LAST=True)
    b_scale = rows.load(p_scale, m_row, D, COLS, WIDE=False, LAST=True)
    b_new: tl.tuple = ()
    b_ds: tl.tuple = ()
    b_da: tl.tuple = ()
    for j in tl.static_range(0, len(b_c)):
        b_dyj = b_dy[j].to(tl.float32)
        b_xhat = b_c[j] * b_rstd
        b_ds += (b_dshift[j] + b_dyj,)
        b_da += (b_dscale[j] + b_dyj * b_xhat,)
        b_g = b_dyj * (b_scale[j].to(tl.float32) + 1.0)
        b_new += (b_dz[j].to(tl.float32) + b_rstd * (b_g - b_mean - b_xhat * b_slope),)
    rows.store(p_dz, b_new, m_row, D, COLS)
    return b_ds, b_da


@triton.jit(do_not_specialize=["T"])
def _adaln_backward(
    p_dy, p_z, p_scale, p_dz, p_part, s_scale, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(CHUNK % ROWS == 0)
    n_chunks = tl.cdiv(T, CHUNK)
    i_b = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_first = tl.program_id(0) % n_chunks * CHUNK
    p_scale = rows.repeat(p_scale + i_b * s_scale, ROWS)
    b_dshift = rows.zeros(D, ROWS, COLS)
    b_dscale = rows.zeros(D, ROWS, COLS)
    for i in range(i_first, tl.minimum(i_first + CHUNK, T), ROWS):
        i_t = i + tl.arange(0, ROWS)
        m_row = i_t < T
        o_row = (i_b * T + i_t) * D
        b_dshift, b_dscale = _row_gradient(
            p_dy + o_row, p_z + o_row, p_scale, p_dz + o_row, b_dshift, b_dscale, m_row,
            D, COLS, EPS,
        )  # fmt: skip
    p_part += tl.program_id(0).to(tl.int64) * (2 * D)
    rows.partial_sums(p_part, b_dshift, D, ROWS, COLS)
    rows.partial_sums(p_part + D, b_dscale, D, ROWS, COLS)


def adaln(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """LN(z) (1 + scale) + shift: see ``reference.adaln``. Raises LaunchError."""
    b, t, d = z.shape
    out = z.new_empty(b, t, d, dtype=scale.dtype) if out is None else out
    dtype = (scale.dtype,)
    check(
        "adaln",
        z.device,
        (
            ("z", z, (b, t, d), (torch.float32, scale.dtype)),
            ("shift", shift, (b, d), dtype),
            ("scale", scale, (b, d), FLOATS),
        ),
        (("out", out, (b, t, d), dtype),),
    )
    if z.numel():
        tile = rows.tile(d)
        _adaln_forward[(b * cdiv(t, tile["ROWS"]),)](
            z, shift, scale, out, row_stride(shift), row_stride(scale), t,
            **tile, EPS=LN_EPS, num_warps=rows.WARPS,
        )  # fmt: skip
    return out


def adaln_backward(
    dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, dshift: Tensor, dscale: Tensor
) -> None:
    """dz, dshift, dscale += gradients: see ``reference.adaln_backward``. Raises LaunchError."""
    b, t, d = z.shape
    residual, wide = (z.dtype,), (torch.float32,)
    check(
        "adaln_backward",
        z.device,
        (
            ("dy", dy, (b, t, d), (scale.dtype,)),
            ("z", z, (b, t, d), (torch.float32, scale.dtype)),
            ("scale", scale, (b, d), FLOATS),
        ),
        (
            ("dz", dz, (b, t, d), residual),
            ("dshift", dshift, (b, d), wide),
            ("dscale", dscale, (b, d), wide),
        ),
    )
    if not z.numel():
        return
    part = rows.workspace(z, 2, CHUNK)
    # the two sums over tokens beside a longer row would spill
    warps = rows.WARPS if d <= 4096 else 2 * rows.WARPS
    _adaln_backward[(b * rows.chunks(t, CHUNK),)](
        dy, z, scale, dz, part, row_stride(scale), t,
        **rows.shared_tile(d), CHUNK=CHUNK, EPS=LN_EPS, num_warps=warps,
    )  # fmt: skip
    rows.accumulate(part, dshift, dscale)
