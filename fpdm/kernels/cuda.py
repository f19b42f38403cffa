"""The operators on csrc/cuda, for Volta first: float16 and float32, GEMMs from the library.

Each function checks its operands, chooses an instantiation (fpdm.kernels.cuda_kernels) and hands
the fields of its parameter struct to a backend: the driver of a GPU, or the tests' stand-in on the
CPU. Equations and structs are in csrc/cuda, semantics in fpdm.kernels.reference.

Sums over tokens are taken over runs of RUN tokens and then over the runs in order, whatever the
batch and the device: results do not depend on them, and nothing is atomic. Workspace: float32
partial sums of 1/RUN of an activation per sum; attention_backward 3 floats per token and head.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fpdm.kernels import cuda_driver, reference
from fpdm.kernels import cuda_kernels as ck
from fpdm.kernels.cuda_driver import Argument, Driver, Launcher
from fpdm.kernels.cuda_kernels import Kernel
from fpdm.kernels.implementations import plainly
from fpdm.kernels.launch import (
    LaunchError,
    Operand,
    aligned,
    cdiv,
    check,
    dtype_name,
    library,
    row_stride,
)
from fpdm.kernels.reference import linear, linear_dgrad, linear_wgrad

DTYPES = (torch.float16, torch.float32)
RUN = 32  # tokens per partial sum
FORWARD_RUN = 8  # tokens per block where no sum crosses tokens
COLUMNS = 8  # neighbouring elements of a thread
MULTIPROCESSORS = 80  # of a V100
LOG2_E = 1 / math.log(2)
_ELEMENT = {torch.float16: ck.HALF, torch.float32: ck.FLOAT}
_backend: Launcher = Driver()

__all__ = [
    "adaln", "adaln_backward", "adaln_linear", "attention", "attention_backward",
    "gate_residual", "gate_residual_adaln", "gate_residual_backward", "gelu", "gelu_backward",
    "library", "linear", "linear_add_gelu", "linear_dgrad", "linear_gate_residual",
    "linear_gate_residual_adaln", "linear_wgrad", "prepare", "unavailable",
]  # fmt: skip


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None when these kernels can run on ``device`` in ``dtype``, else every reason."""
    reasons = cuda_driver.missing(device)
    if dtype is not None and dtype not in DTYPES:
        got = dtype_name(dtype)
        reasons.append(f"got {got}, expected a compute dtype of float16 or float32")
    return "; ".join(reasons) or None


def prepare(device: torch.device) -> None:
    """Loads every kernel, as must be done before a CUDA graph is captured."""
    if isinstance(_backend, Driver):
        _backend.prepare(device)


def _elements(r: Tensor, c: Tensor) -> tuple[str, str]:
    return _ELEMENT[r.dtype], _ELEMENT[c.dtype]


def _vectors(width: int, *operands: Tensor | None) -> bool:
    """Whether 16-byte accesses fit: rows of whole groups of COLUMNS, on aligned addresses."""
    return width % COLUMNS == 0 and aligned(operands, 16)


def _stream(c: torch.dtype) -> tuple[torch.dtype, ...]:
    """dtypes that an operand of the residual stream may have beside compute dtype ``c``."""
    return (torch.float32,) if c == torch.float32 else (c, torch.float32)


def _row_block(op: str, device: torch.device, width: int) -> tuple[str, int]:
    """Block that owns whole rows: its constant in columns.cuh, and how many threads it needs."""
    needed = cdiv(width, COLUMNS * 32) * 32
    for name in ck.BLOCKS:
        most = _backend.entry(ck.adaln_backward(ck.FLOAT, ck.FLOAT, name, True), device).threads
        if needed <= most:
            return name, needed
    raise LaunchError(f"{op}: got D = {width}, expected at most {COLUMNS * most}")


def _column_block(kernel: Kernel, device: torch.device, width: int) -> tuple[int, int]:
    """(threads, blocks along a row) where rows may be cut anywhere."""
    threads = min(_backend.entry(kernel, device).threads, cdiv(width, COLUMNS * 32) * 32)
    return threads, cdiv(width, COLUMNS * threads)


def _linear_launch(kernel: Kernel, threads: int, arguments: list[Argument], like: Tensor) -> None:
    """One thread per piece of work."""
    most = _backend.entry(kernel, like.device).threads
    _backend.launch(kernel, (cdiv(threads, most), 1), most, arguments, like.device)


def _add_columns(partial: Tensor, *sums: Tensor) -> None:
    """sums[v] (B,D) += sum over runs of partial (B,runs,V,D), V of one or two."""
    b, runs, vectors, d = partial.shape
    first, second = sums[0], sums[-1]
    arguments: list[Argument] = [
        partial, first, second, row_stride(first), row_stride(second), b, runs, vectors, d,
    ]  # fmt: skip
    _linear_launch(ck.REDUCE_COLUMNS, b * vectors * d, arguments, partial)


def _adaln(
    op: str,
    z: Tensor,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    z_out: Tensor | None = None,
) -> None:
    b, t, d = z.shape
    dtype, stream = (scale.dtype,), _stream(scale.dtype)
    check(
        op,
        z.device,
        (
            ("scale", scale, (b, d), DTYPES),
            ("shift", shift, (b, d), dtype),
            ("z", z, (b, t, d), stream),
            ("y", y, (b, t, d), dtype),
            ("gate", gate, (b, d), dtype),
        ),
        (("z_out", z_out, (b, t, d), (z.dtype,)), ("out", out, (b, t, d), dtype)),
        may_alias=(("z_out", "z"),),
    )
    if not z.numel():
        return
    block, threads = _row_block(op, z.device, d)
    fits = _vectors(d, z, y, gate, shift, scale, z_out, out)
    kernel = ck.adaln(*_elements(z, scale), block, fits, y is not None)
    arguments: list[Argument] = [
        z, y, gate, shift, scale, z_out, out,
        0 if gate is None else row_stride(gate), row_stride(shift), row_stride(scale),
        t, d, FORWARD_RUN, 1.0 / d,
    ]  # fmt: skip
    _backend.launch(kernel, (b * cdiv(t, FORWARD_RUN), 1), threads, arguments, z.device)


def adaln(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """LN(z)(1 + scale) + shift: see ``reference.adaln``. Raises LaunchError."""
    out = torch.empty_like(z, dtype=scale.dtype) if out is None else out
    _adaln("adaln", z, shift, scale, out)
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
    """z' = z + gate y and its adaln: see ``reference.gate_residual_adaln``. Raises LaunchError."""
    z_out = torch.empty_like(z) if z_out is None else z_out
    out = torch.empty_like(z, dtype=scale.dtype) if out is None else out
    _adaln("gate_residual_adaln", z, shift, scale, out, y, gate, z_out)
    return z_out, out


def adaln_backward(
    dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, dshift: Tensor, dscale: Tensor
) -> None:
    """dz, dshift, dscale += gradients: see ``reference.adaln_backward``. Raises LaunchError."""
    op, (b, t, d), dtype, wide = "adaln_backward", z.shape, (scale.dtype,), (torch.float32,)
    check(
        op,
        z.device,
        (
            ("scale", scale, (b, d), DTYPES),
            ("dy", dy, (b, t, d), dtype),
            ("z", z, (b, t, d), _stream(scale.dtype)),
        ),
        (
            ("dz", dz, (b, t, d), (z.dtype,)),
            ("dshift", dshift, (b, d), wide),
            ("dscale", dscale, (b, d), wide),
        ),
    )
    if not z.numel():
        return
    runs = cdiv(t, RUN)
    partial = z.new_empty(b, runs, 2, d, dtype=torch.float32)
    block, threads = _row_block(op, z.device, d)
    fits = _vectors(d, dy, z, scale, dz, partial)
    kernel = ck.adaln_backward(*_elements(z, scale), block, fits)
    arguments: list[Argument] = [dy, z, scale, dz, partial, row_stride(scale), t, d, RUN, 1.0 / d]
    _backend.launch(kernel, (b * runs, 1), threads, arguments, z.device)
    _add_columns(partial, dshift, dscale)


def gate_residual(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """z + gate y and its norms: see ``reference.gate_residual``. Raises LaunchError."""
    (b, t, d), wide = z.shape, (torch.float32,)
    out = torch.empty_like(z) if out is None else out
    prev, norms = (None, None) if prev is None or norms is None else (prev, norms)
    check(
        "gate_residual",
        z.device,
        (
            ("gate", gate, (b, d), DTYPES),
            ("z", z, (b, t, d), _stream(gate.dtype)),
            ("y", y, (b, t, d), (gate.dtype,)),
            ("prev", prev, (b, t, d), (z.dtype,)),
        ),
        (("out", out, (b, t, d), (z.dtype,)), ("norms", norms, (2, b), wide)),
        may_alias=(("out", "z"),),
    )
    if not z.numel():
        return out
    fits = _vectors(d, z, y, gate, prev, out)
    kernel = ck.gate_residual(*_elements(z, gate), fits, norms is not None)
    run = FORWARD_RUN if norms is None else RUN
    threads, columns = _column_block(kernel, z.device, d)
    blocks = b * cdiv(t, run)
    partial = None if norms is None else z.new_empty(blocks, columns, 2, dtype=torch.float32)
    arguments: list[Argument] = [z, y, gate, prev, out, partial, row_stride(gate), t, d, run]
    _backend.launch(kernel, (blocks, columns), threads, arguments, z.device)
    if norms is not None:
        arguments = [partial, norms, norms.stride(0), b, blocks * columns // b]
        _linear_launch(ck.REDUCE_NORMS, b * 32, arguments, z)
    return out


def gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, dgate: Tensor, out: Tensor | None = None
) -> Tensor:
    """dy = gate dout; dgate += sum_t dout y: see ``reference.gate_residual_backward``. Raises
    LaunchError."""
    b, t, d = y.shape
    out = torch.empty_like(y) if out is None else out
    check(
        "gate_residual_backward",
        y.device,
        (
            ("gate", gate, (b, d), DTYPES),
            ("dout", dout, (b, t, d), _stream(gate.dtype)),
            ("y", y, (b, t, d), (gate.dtype,)),
        ),
        (("out", out, (b, t, d), (y.dtype,)), ("dgate", dgate, (b, d), (torch.float32,))),
        may_alias=(("out", "dout"),),
    )
    if not y.numel():
        return out
    runs = cdiv(t, RUN)
    partial = y.new_empty(b, runs, 1, d, dtype=torch.float32)
    kernel = ck.gate_residual_backward(
        *_elements(dout, gate), _vectors(d, dout, y, gate, out, partial)
    )
    threads, columns = _column_block(kernel, y.device, d)
    arguments: list[Argument] = [dout, y, gate, out, partial, row_stride(gate), t, d, RUN]
    _backend.launch(kernel, (b * runs, columns), threads, arguments, y.device)
    _add_columns(partial, dgate)
    return out


def _gelu(
    form: str, x: Tensor, out: Tensor, other: Tensor | None = None, pre: Tensor | None = None
) -> None:
    kernel = ck.gelu(
        form, _ELEMENT[x.dtype], aligned((x, other, pre, out), 16) and not x.numel() % 8
    )
    arguments: list[Argument] = [x, other, pre, out, x.numel()]
    if x.numel():
        _linear_launch(kernel, cdiv(x.numel(), COLUMNS), arguments, x)


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Tanh GELU: see ``reference.gelu``. Raises LaunchError."""
    out = torch.empty_like(x) if out is None else out
    check(
        "gelu",
        x.device,
        (("x", x, x.shape, DTYPES),),
        (("out", out, x.shape, (x.dtype,)),),
        may_alias=(("out", "x"),),
    )
    _gelu("gelu", x, out)
    return out


def gelu_backward(
    dy: Tensor, x: Tensor, out: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """dx = dy gelu'(x), total += dx: see ``reference.gelu_backward``. Raises LaunchError."""
    out, dtype = torch.empty_like(dy) if out is None else out, (x.dtype,)
    check(
        "gelu_backward",
        x.device,
        (("x", x, x.shape, DTYPES), ("dy", dy, x.shape, dtype)),
        (("out", out, x.shape, dtype), ("total", total, x.shape, (torch.float32,))),
        may_alias=(("out", "dy"),),
    )
    _gelu("gelu_backward", x, out, other=dy, pre=total)
    return out


def linear_add_gelu(
    x: Tensor, weight: Tensor, addend: Tensor, pre: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """gelu(x W^T + u): see ``reference.linear_add_gelu``. Raises LaunchError.

    A bias rides in the GEMM; a tensor is added by the kernel that applies GELU.
    """
    shape, dtype = (*x.shape[:-1], weight.shape[0]), (weight.dtype,)
    out = x.new_empty(shape) if out is None else out
    product = out if pre is None else pre
    bias = addend.dim() == 1
    check(
        "linear_add_gelu",
        x.device,
        (("x", x, x.shape, dtype), ("addend", addend, shape[-1:] if bias else shape, DTYPES)),
        (("pre", product, shape, dtype), ("out", out, shape, dtype)),
        may_alias=(("pre", "out"),),
    )
    linear(x, weight, addend if bias else None, out=product)
    if bias:
        _gelu("gelu", product, out)
    else:
        kept = None if product.data_ptr() == out.data_ptr() else product
        _gelu("add_gelu", product, out, other=addend, pre=kept)
    return out


def _head_size(op: str, qkv: Tensor, heads: int) -> int:
    width = qkv.shape[-1]
    if heads < 1 or width % (3 * heads):
        raise LaunchError(f"{op}: qkv: got width {width}, expected a multiple of 3 x {heads} heads")
    return width // (3 * heads)


def _lacks(op: str, head: int) -> bool:
    """Whether no kernel has heads of this size, of which a warning tells."""
    if head in ck.HEAD_SIZES:
        return False
    plainly(op, f"head size {head}", f"one of {', '.join(map(str, ck.HEAD_SIZES))}")
    return True


def _attention(form: str, qkv: Tensor, head: int, heads: int, extra: tuple[Argument, ...]) -> None:
    """Launches one of the attention kernels: blocks of rows of one head."""
    b, t, _ = qkv.shape
    if qkv.dtype == torch.float32:
        kernel = ck.scalar_attention(form, head)
    else:
        kernel = ck.attention(form, head, ck.SMALL)
        # larger blocks read keys and values less often, where they fit and still fill the device
        if head in ck.LARGE_HEADS and b * heads * cdiv(t, 32 * ck.LARGE[0]) >= MULTIPROCESSORS:
            large = ck.attention(form, head, ck.LARGE)
            fits = _backend.entry(large, qkv.device).smem <= _backend.shared_limit(qkv.device)
            kernel = large if fits else kernel
    entry = _backend.entry(kernel, qkv.device)
    scale = 1 / math.sqrt(head)
    scales = (LOG2_E * scale,) if form == "attention" else (LOG2_E * scale, scale)
    grid = (b * heads * cdiv(t, entry.rows), 1)
    _backend.launch(kernel, grid, entry.threads, (*extra, t, heads, *scales), qkv.device)


def attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v: see ``reference.attention``, which runs head sizes that no kernel
    has. Raises LaunchError."""
    (b, t, width), op = qkv.shape, "attention"
    out = qkv.new_empty(b, t, width // 3) if out is None else out
    head = _head_size(op, qkv, heads)
    packed: Operand = ("qkv", qkv, (b, t, width), DTYPES)
    result: Operand = ("out", out, (b, t, width // 3), (qkv.dtype,))
    check(op, qkv.device, (packed,), (result,), align=_alignment(qkv, head))
    if _lacks(op, head):
        return reference.attention(qkv, heads, out)
    if qkv.numel():
        _attention(op, qkv, head, heads, (qkv, out))
    return out


def attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, heads: int, out: Tensor | None = None
) -> Tensor:
    """Gradient with respect to qkv: see ``reference.attention_backward``. Raises LaunchError."""
    (b, t, width), op, dtype = qkv.shape, "attention_backward", (qkv.dtype,)
    out = torch.empty_like(qkv) if out is None else out
    head, narrow = _head_size(op, qkv, heads), (b, t, width // 3)
    check(
        op,
        qkv.device,
        (
            ("qkv", qkv, (b, t, width), DTYPES),
            ("dy", dy, narrow, dtype),
            ("y", y, narrow, dtype),
        ),
        (("out", out, (b, t, width), dtype),),
        align=_alignment(qkv, head),
    )
    if _lacks(op, head):
        return reference.attention_backward(dy, qkv, y, heads, out)
    if qkv.numel():
        statistics = qkv.new_empty(b, heads, 3, t, dtype=torch.float32)
        for form in ("attention_dq", "attention_dkv"):
            _attention(form, qkv, head, heads, (dy, qkv, y, out, statistics))
    return out


def _alignment(qkv: Tensor, head: int) -> int:
    """Bytes that addresses must be multiples of: the tensor-core kernels read whole rows."""
    if qkv.dtype == torch.float32 or head not in ck.HEAD_SIZES:
        return qkv.element_size()
    return 16 if head % 8 == 0 else 8


def adaln_linear(
    z: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    out: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """adaln, then the library's GEMM: see ``reference.adaln_linear``. Raises LaunchError."""
    return cast(Tensor, linear(adaln(z, shift, scale, out=y), weight, bias, out=out))


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
) -> Tensor:
    """The library's GEMM, then gate_residual: see ``reference.linear_gate_residual``."""
    return gate_residual(z, linear(x, weight, bias, out=p), gate, out=out, prev=prev, norms=norms)


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
) -> tuple[Tensor, Tensor]:
    """A GEMM, then gate_residual_adaln: see ``reference.linear_gate_residual_adaln``."""
    p = linear(x, weight, bias, out=p)
    return gate_residual_adaln(z, p, gate, shift, scale, z_out=z_out, out=out)
