"""Gated residual: z' = z + g y, alone, with the norms of the fixed-point map, or with adaLN behind.

    gate_residual        z' = z + g y;   per sample |z' - prev| and |z'| (L2 over T and D)
    gate_residual_adaln  z' = z + g y;   LN(z') (1 + scale) + shift, of z' as it is stored
    backward             dy = g dz',   dg += sum_t dz' y;   dz is dz'

Shapes: z, z', prev, dz' (B,T,D) contiguous in the residual dtype (float32, or y's); y, dy (B,T,D);
gate, shift, scale (B,D) in y's dtype and dg (B,D) float32, with any batch stride; norms (2,B)
float32. z' is one fused multiply-add rounded once, so both forms give the same bits.

Bytes, in U = B T D elements of one dtype: gate_residual 3 U (reads z, y, writes z'), 4 U with the
norms (reads prev), gate_residual_adaln 4 U (reads z, y, writes z' and y'), backward 3 U (reads dz',
y, writes dy). Partials of the sums add 0.03 U (backward, half precision) or less.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import rows
from fpdm.kernels.adaln import modulate
from fpdm.kernels.launch import FLOATS, cdiv, check, row_stride
from fpdm.kernels.reference import LN_EPS

# tokens per program of the backward
CHUNK = 64


@triton.jit(do_not_specialize=["T"])
def _gate_residual_forward(
    p_z, p_y, p_gate, p_out, p_prev, p_part, s_gate, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    # neighbours in memory run together: the pieces of a row first
    i_block, o_col = rows.piece(D, COLS)
    blocks = tl.cdiv(T, ROWS)
    i_b = (i_block // blocks).to(tl.int64)
    i_t = i_block % blocks * ROWS + tl.arange(0, ROWS)
    m = (i_t < T)[:, None] & (o_col < D)[None, :]
    o = (i_b * T + i_t)[:, None] * D + o_col[None, :]
    o_gate = (i_b * s_gate + i_t * 0)[:, None] + o_col[None, :]
    b_z = tl.load(p_z + o, mask=m, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate, mask=m, other=0.0).to(tl.float32)
    b_out = tl.fma(b_gate, b_y, b_z).to(p_out.dtype.element_ty)
    tl.store(p_out + o, b_out, mask=m)
    if NORMS:
        b_out = b_out.to(tl.float32)
        b_diff = b_out - tl.load(p_prev + o, mask=m, other=0.0).to(tl.float32)
        # (2, B, blocks, pieces)
        p_part += tl.program_id(0)
        tl.store(p_part, tl.sum(b_diff * b_diff))
        tl.store(p_part + tl.num_programs(0), tl.sum(b_out * b_out))


@triton.jit(do_not_specialize=["parts"])
def finish_norms(p_part, p_norms, s_norms, parts, BLOCK: tl.constexpr):
    """Roots of the sums of ``parts`` squares, a program for each sample and norm."""
    i_b, i_norm = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_in = p_part + (i_norm * tl.num_programs(0) + i_b) * parts
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, parts, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_in + o, mask=o < parts, other=0.0)
    tl.store(p_norms + i_norm * s_norms + i_b, tl.sqrt(tl.sum(b_sum)))


@triton.jit(do_not_specialize=["T"])
def _gate_residual_adaln_forward(
    p_z, p_y, p_gate, p_shift, p_scale, p_z_out, p_out, s_gate, s_shift, s_scale, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_row = i_t < T
    o_row = (i_b * T + i_t) * D
    b_z = rows.load(p_z + o_row, m_row, D, COLS)
    b_y = rows.load(p_y + o_row, m_row, D, COLS)
    b_gate = rows.load(rows.repeat(p_gate + i_b * s_gate, ROWS), m_row, D, COLS)
    b_new: tl.tuple = ()
    for j in tl.static_range(0, len(b_z)):
        b_sum = tl.fma(b_gate[j], b_y[j], b_z[j])
        b_new += (b_sum.to(p_z_out.dtype.element_ty).to(tl.float32),)
    rows.store(p_z_out + o_row, b_new, m_row, D, COLS)
    p_shift = rows.repeat(p_shift + i_b * s_shift, ROWS)
    p_scale = rows.repeat(p_scale + i_b * s_scale, ROWS)
    modulate(p_out + o_row, b_new, p_shift, p_scale, m_row, D, COLS, EPS)


@triton.jit(do_not_specialize=["T"])
def _gate_residual_backward(
    p_dout, p_y, p_gate, p_dy, p_part, s_gate, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tl.static_assert(CHUNK % ROWS == 0)
    i_chunk, o_col = rows.piece(D, COLS)
    n_chunks = tl.cdiv(T, CHUNK)
    i_b = (i_chunk // n_chunks).to(tl.int64)
    i_first = i_chunk % n_chunks * CHUNK
    m_col = o_col < D
    o_gate = i_b * s_gate + tl.zeros((ROWS, 1), tl.int32) + o_col[None, :]
    b_gate = tl.load(p_gate + o_gate, mask=m_col[None, :], other=0.0).to(tl.float32)
    b_dgate = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(i_first, tl.minimum(i_first + CHUNK, T), ROWS):
        i_t = i + tl.arange(0, ROWS)
        m = (i_t < T)[:, None] & m_col[None, :]
        o = (i_b * T + i_t)[:, None] * D + o_col[None, :]
        b_dout = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
        b_dgate += b_dout * b_y
        tl.store(p_dy + o, (b_gate * b_dout).to(p_dy.dtype.element_ty), mask=m)
    o_part = i_chunk.to(tl.int64) * D + o_col
    tl.store(p_part + o_part, tl.sum(b_dgate, 0), mask=m_col)


@functools.cache
def _blocks(t: int, d: int, norms: bool = False) -> tuple[dict[str, int], int, int]:
    """Tile of the kernels that need no whole row, rows a divisor of CHUNK; programs per sample over
    tokens and columns. Norms hold four operands: half the tile, or sm_80 spills a float32
    stream."""
    cols = rows.tile(d)["COLS"]
    most = 8 if norms else 16
    tile = {"D": d, "ROWS": min(max(128 * most // cols, 1), most), "COLS": cols}
    return tile, cdiv(t, tile["ROWS"]), cdiv(d, cols)


def gate_residual(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """z + gate y, optionally with residual norms: see ``reference.gate_residual``. Raises
    LaunchError."""
    b, t, d = z.shape
    out = torch.empty_like(z) if out is None else out
    residual, wants_norms = (torch.float32, y.dtype), prev is not None and norms is not None
    check(
        "gate_residual",
        z.device,
        (
            ("z", z, (b, t, d), residual),
            ("y", y, (b, t, d), FLOATS),
            ("gate", gate, (b, d), (y.dtype,)),
            ("prev", prev, (b, t, d), (z.dtype,)),
        ),
        (("out", out, (b, t, d), (z.dtype,)), ("norms", norms, (2, b), (torch.float32,))),
        may_alias=(("out", "z"),),
    )
    tile, blocks, pieces = _blocks(t, d, wants_norms)
    part = z.new_empty(2, b, blocks * pieces, dtype=torch.float32) if wants_norms else z
    if z.numel():
        _gate_residual_forward[(b * blocks * pieces,)](
            z, y, gate, out, prev if wants_norms else z, part, row_stride(gate), t,
            **tile, NORMS=wants_norms, num_warps=rows.WARPS,
        )  # fmt: skip
        if norms is not None and wants_norms:
            finish_norms[b, 2](part, norms, row_stride(norms), blocks * pieces, BLOCK=1024)
    return out


def gate_residual_adaln(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    z_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(z', adaLN of z'): see ``reference.gate_residual_adaln``. Raises LaunchError."""
    b, t, d = z.shape
    z_out = torch.empty_like(z) if z_out is None else z_out
    out = z.new_empty(b, t, d, dtype=scale.dtype) if out is None else out
    dtype = (y.dtype,)
    check(
        "gate_residual_adaln",
        z.device,
        (
            ("z", z, (b, t, d), (torch.float32, y.dtype)),
            ("y", y, (b, t, d), FLOATS),
            ("gate", gate, (b, d), dtype),
            ("shift", shift, (b, d), dtype),
            ("scale", scale, (b, d), dtype),
        ),
        (("z_out", z_out, (b, t, d), (z.dtype,)), ("out", out, (b, t, d), dtype)),
        may_alias=(("z_out", "z"),),
    )
    if z.numel():
        tile = rows.tile(d)
        _gate_residual_adaln_forward[(b * cdiv(t, tile["ROWS"]),)](
            z, y, gate, shift, scale, z_out, out,
            row_stride(gate), row_stride(shift), row_stride(scale), t,
            **tile, EPS=LN_EPS, num_warps=rows.WARPS,
        )  # fmt: skip
    return z_out, out


def gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, dgate: Tensor, out: Tensor | None = None
) -> Tensor:
    """dy = gate dout, dgate += sum_t dout y: see ``reference.gate_residual_backward``. Raises
    LaunchError."""
    b, t, d = y.shape
    out = torch.empty_like(y) if out is None else out
    check(
        "gate_residual_backward",
        y.device,
        (
            ("dout", dout, (b, t, d), (torch.float32, y.dtype)),
            ("y", y, (b, t, d), FLOATS),
            ("gate", gate, (b, d), (y.dtype,)),
        ),
        (("out", out, (b, t, d), (y.dtype,)), ("dgate", dgate, (b, d), (torch.float32,))),
    )
    if y.numel():
        part = rows.workspace(y, 1, CHUNK)
        tile, _, pieces = _blocks(t, d)
        _gate_residual_backward[(b * rows.chunks(t, CHUNK) * pieces,)](
            dout, y, gate, out, part, row_stride(gate), t,
            **tile, CHUNK=CHUNK, num_warps=rows.WARPS,
        )  # fmt: skip
        rows.accumulate(part, dgate)
    return out
