"""Three GEMMs with their glue fused, in Triton: x W^T with a prologue or an epilogue; and which
route every product takes.

    adaln_linear           y W^T + b,   y = LN(z) (1 + scale) + shift
    linear_add_gelu        gelu(pre),   pre = x W^T + u, u a bias or a tensor
    linear_gate_residual   z + g p,     p = x W^T + b, optionally |out - prev|, |out| per sample

Shapes as in fpdm.kernels.reference; M = B T rows, row m belongs to sample m // T. Products are
summed in float32. y, pre and p are rounded to the compute dtype whether or not they are kept, with
the arithmetic of the element-wise kernels: what a backward rebuilds from them is what the forward
had, bit for bit; but for cuBLASLt's GELU, which rounds no pre where none is kept. The norms are
sums of squares per row and block of columns, added in one order.

Bytes of activations beside x, W and the result, in U = B T D, N U the width of pre:

                           fused                           library + glue
    adaln_linear           2 (z, and z for the statistics) 3 (z, y written and read)
    linear_add_gelu        0, N with a tensor addend       2 N, 3 N with a tensor addend
    linear_gate_residual   1 (z)                           3 (z, p written and read)

and what is kept is written on top (y 1, pre N, p 1), where the library has written it already.

``fused``: None asks the committed table (fpdm.kernels.gemm_table); True runs these kernels with
their first tile, a ``Tile`` with that one; False runs the library's GEMM and the glue kernels. The
library is torch's, or cuBLASLt past torch where that measured faster (fpdm.kernels.cublaslt).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fpdm.kernels import cublaslt, gemm_kernels, mlp, reference, rows
from fpdm.kernels.adaln import adaln
from fpdm.kernels.gate_residual import finish_norms, gate_residual, gate_residual_adaln
from fpdm.kernels.gemm_table import Choice, Tile, choice, tiles
from fpdm.kernels.launch import FLOATS, aligned, cdiv, check, row_stride
from fpdm.kernels.reference import LN_EPS

# blocks of rows that walk over the columns together, so that both operands stay in the L2 cache
GROUP = 8


def architecture() -> int:
    """What Triton compiles for: 80, 90 ...; the interpreter takes every path of the newest."""
    if triton.knobs.runtime.interpret:
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        # fewer than blocks, so that a persistent program walks over several
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(
    op: str, x: Tensor, weight: Tensor, tile: Tile | None
) -> tuple[tuple[int], Any, Any, dict[str, Any]]:
    """Grid, the two operands as the kernel takes them, and its constants; x (M,K), weight (N,K)."""
    (m, k), n = x.shape, weight.shape[0]
    if tile is None:
        tile = tiles(op, m, n, weight.dtype, architecture())[0]
    blocks = cdiv(m, tile.m) * cdiv(n, tile.n)
    operands: tuple[Any, Any] = (x, weight)
    tma = tile.tma and aligned((x, weight), 16)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        )
    constants = {
        "N": n, "K": k, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP,
        "TMA": tma, "FLAT": tile.persistent, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (min(blocks, _processors(x.device)) if tile.persistent else blocks,)
    return grid, *operands, constants


# what the argument ``fused`` may be: see the module
Fused = bool | Tile | None


def _route(op: str, x: Tensor, weight: Tensor, keep: bool, fused: Fused) -> Choice:
    """The route, the tile (None: the first candidate) and cuBLASLt's algorithm."""
    if isinstance(fused, Tile):
        return Choice("fused", "asked for", fused)
    if fused is not None:
        return Choice("fused" if fused else "library", "asked for")
    m, (n, k) = x.numel() // max(x.shape[-1], 1), weight.shape
    return choice(op, m, n, k, weight.dtype, x.device, keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x W^T + b: see ``reference.linear``; by torch, or past it where the table says so."""
    found = _route("linear", x, weight, False, None)
    if found.route == "cublaslt":
        y = cublaslt.attempt(x, weight, bias, out, algorithm=found.algorithm)
        if y is not None:
            return y
    return reference.linear(x, weight, bias, out=out)


def adaln_linear(
    z: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    out: Tensor | None = None,
    keep: bool = True,
    fused: Fused = None,
) -> Tensor:
    """LN(z) (1 + scale) + shift, times W^T, plus b: see ``reference.adaln_linear``.

    z (B,T,D), weight (O,D) -> (B,T,O). Fused: one GEMM, after a kernel for the statistics. Raises
    LaunchError.
    """
    found = _route("adaln_linear", z, weight, keep and y is not None, fused)
    if found.route == "library":
        return linear(adaln(z, shift, scale, out=y), weight, bias, out=out)
    y = y if keep else None
    (b, t, d), n, dtype = z.shape, weight.shape[0], (weight.dtype,)
    out = z.new_empty(b, t, n, dtype=weight.dtype) if out is None else out
    inputs = (
        ("z", z, (b, t, d), (torch.float32, weight.dtype)),
        ("shift", shift, (b, d), dtype),
        ("scale", scale, (b, d), dtype),
        ("weight", weight, (n, d), FLOATS),
        ("bias", bias, (n,), dtype),
    )
    check(
        "adaln_linear",
        z.device,
        inputs,
        (("y", y, (b, t, d), dtype), ("out", out, (b, t, n), dtype)),
    )
    if z.numel():
        flat, cut = z.view(-1, d), rows.tile(d)
        stats = z.new_empty(2, b * t, dtype=torch.float32)
        gemm_kernels.statistics[(cdiv(b * t, cut["ROWS"]),)](
            z, stats, b * t, **cut, EPS=LN_EPS, num_warps=rows.WARPS
        )
        grid, p_z, p_w, constants = _plan("adaln_linear", flat, weight, found.tile)
        gemm_kernels.adaln_linear[grid](
            p_z, stats, shift, scale, p_w, bias, y, out, row_stride(weight), row_stride(shift),
            row_stride(scale), b * t, T=t, **constants,
        )  # fmt: skip
    return out


def linear_add_gelu(
    x: Tensor,
    weight: Tensor,
    addend: Tensor,
    pre: Tensor | None = None,
    out: Tensor | None = None,
    fused: Fused = None,
) -> Tensor:
    """gelu(x W^T + u), u a bias (O,) or a tensor (B,T,O): see ``reference.linear_add_gelu``.

    ``pre`` is written unless it is None or ``out`` itself. The table may also choose cuBLASLt's
    epilogue (no ``pre``), which does not round the pre-activation. Raises LaunchError.
    """
    kept = pre
    if pre is not None and out is not None and pre.data_ptr() == out.data_ptr():
        kept = None
    op = "linear_bias_gelu" if addend.dim() == 1 else "linear_add_gelu"
    found = _route(op, x, weight, kept is not None, fused)
    if found.route == "cublaslt":
        y = cublaslt.attempt(x, weight, addend, out, True, found.algorithm)
        if y is not None:
            return y
    if found.route != "fused":
        return mlp.linear_add_gelu(x, weight, addend, pre=pre, out=out)
    (b, t, k), n, dtype = x.shape, weight.shape[0], (weight.dtype,)
    out = x.new_empty(b, t, n) if out is None else out
    bias = addend.dim() == 1
    inputs = (
        ("x", x, (b, t, k), dtype),
        ("weight", weight, (n, k), FLOATS),
        ("addend", addend, (n,) if bias else (b, t, n), dtype),
    )
    check(
        "linear_add_gelu",
        x.device,
        inputs,
        (("pre", kept, (b, t, n), dtype), ("out", out, (b, t, n), dtype)),
    )
    if x.numel():
        grid, p_x, p_w, constants = _plan(op, x.view(-1, k), weight, found.tile)
        gemm_kernels.linear_add_gelu[grid](
            p_x, p_w, addend, kept, out, row_stride(weight), b * t, BIAS=bias, **constants
        )
    return out


def linear_gate_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    gate: Tensor,
    p: Tensor | None = None,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
    keep: bool = True,
    fused: Fused = None,
) -> Tensor:
    """z + g (x W^T + b): see ``reference.linear_gate_residual``. Raises LaunchError."""
    found = _route("linear_gate_residual", x, weight, keep and p is not None, fused)
    if found.route == "library":
        p = linear(x, weight, bias, out=p)
        return gate_residual(z, p, gate, out=out, prev=prev, norms=norms)
    p = p if keep else None
    (b, t, k), d, dtype = x.shape, weight.shape[0], (weight.dtype,)
    residual = (z.dtype,)
    out = torch.empty_like(z) if out is None else out
    prev = None if norms is None else prev
    norms = None if prev is None else norms
    inputs = (
        ("x", x, (b, t, k), dtype),
        ("weight", weight, (d, k), FLOATS),
        ("bias", bias, (d,), dtype),
        ("z", z, (b, t, d), (torch.float32, weight.dtype)),
        ("gate", gate, (b, d), dtype),
        ("prev", prev, (b, t, d), residual),
    )
    outputs = (
        ("p", p, (b, t, d), dtype),
        ("out", out, (b, t, d), residual),
        ("norms", norms, (2, b), (torch.float32,)),
    )
    check("linear_gate_residual", x.device, inputs, outputs, may_alias=(("out", "z"),))
    if x.numel():
        grid, p_x, p_w, constants = _plan("linear_gate_residual", x.view(-1, k), weight, found.tile)
        parts = t * cdiv(d, constants["BLOCK_N"])
        sums = None if norms is None else z.new_empty(2, b, parts, dtype=torch.float32)
        gemm_kernels.linear_gate_residual[grid](
            p_x, p_w, bias, z, gate, p, out, prev, sums, row_stride(weight), row_stride(gate),
            b * t, T=t, **constants,
        )  # fmt: skip
        if norms is not None:
            finish_norms[(b, 2)](sums, norms, row_stride(norms), parts, BLOCK=1024)
    return out


def linear_gate_residual_adaln(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    p: Tensor | None = None,
    z_out: Tensor | None = None,
    out: Tensor | None = None,
    keep: bool = True,
    fused: Fused = None,
) -> tuple[Tensor, Tensor]:
    """z' = z + g (x W^T + b);  adaln(z'): see ``reference.linear_gate_residual_adaln``.

    Fused: the GEMM with its epilogue, then the adaLN kernel. Raises LaunchError.
    """
    found = _route("linear_gate_residual_adaln", x, weight, keep and p is not None, fused)
    if found.route == "library":
        p = linear(x, weight, bias, out=p)
        return gate_residual_adaln(z, p, gate, shift, scale, z_out=z_out, out=out)
    tile = found.tile or True
    z_new = linear_gate_residual(x, weight, bias, z, gate, p, z_out, keep=keep, fused=tile)
    return z_new, adaln(z_new, shift, scale, out=out)
