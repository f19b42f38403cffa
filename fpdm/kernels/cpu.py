"""The operators on the processor: csrc/cpu through pybind11, float32 and bfloat16.

Signatures, aliasing and accumulation are those of ``fpdm.kernels.reference``, which states the
equations. Products run in csrc/cpu too, with what follows them fused: bias, GELU, gate, residual.
Sums have a fixed order, whatever the number of threads. FPDM_CPU_ISA names an instruction set
(portable, avx2, avx512, avx512_bf16) instead of the best one; one that cannot be had is an error.
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from fpdm.kernels import reference
from fpdm.kernels.launch import Operand, check, head_width, row_stride
from fpdm.settings import one_line

try:
    from fpdm.kernels import _cpu as native  # type: ignore[attr-defined]

    _missing = None
except ImportError as error:
    native, _missing = None, one_line(error)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
DEVICE = torch.device("cpu")
CODES = {torch.float32: 0, torch.bfloat16: 1}
DTYPES = tuple(CODES)
FLOAT = (torch.float32,)


def _library_products() -> frozenset[torch.dtype]:
    """Dtypes whose products are left to the library: all without wide vectors, and bfloat16 where
    the processor has AMX tiles, which csrc/cpu does not use."""
    if native is None or native.isa == "portable":
        return frozenset(CODES)
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return frozenset({torch.bfloat16} if tiles else ())


LIBRARY_PRODUCTS = _library_products()
# without wide vectors; with AMX tiles too, the sums over tokens are csrc/cpu's
LIBRARY_WGRADS = frozenset(CODES if native is None or native.isa == "portable" else ())


def library(dtype: torch.dtype | None) -> tuple[str, ...]:
    """Operators in ``dtype`` that are the library's alone, and counted as such; None: in all."""
    asked = frozenset(CODES if dtype is None else (dtype,))
    products = ("linear", "linear_dgrad") if asked <= LIBRARY_PRODUCTS else ()
    return (*products, *(("linear_wgrad",) if asked <= LIBRARY_WGRADS else ()))


def unmet() -> str | None:
    """Why FPDM_CPU_ISA, an explicit request, cannot be met; None where it is met, or absent."""
    asked = os.environ.get("FPDM_CPU_ISA")
    if native is not None or not asked:
        return None
    if asked not in ISAS:
        return f"FPDM_CPU_ISA: got {asked!r}, expected one of {', '.join(ISAS)}"
    if _missing and "FPDM_CPU_ISA" in _missing:
        return _missing
    return f"FPDM_CPU_ISA: got {asked}, expected none where csrc/cpu cannot be loaded: {_missing}"


class _Here(threading.local):
    """Of a thread of Python's: it takes torch.set_num_threads over when torch is first asked there.
    OpenMP knows nothing of it, and would start as many threads as there are cores."""

    def __init__(self) -> None:
        torch.get_num_threads()
        self.device = DEVICE


# what every check before a native call reads its device from: once per thread that costs more
here = _Here()


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run: another device, another dtype, or an installation without compiler."""
    if device.type != "cpu":
        return f"device: got {device.type}, expected cpu"
    if (reason := unmet()) is not None:
        return reason
    if native is None:
        return (
            f"csrc/cpu cannot be loaded: {_missing}; it is built where a C++17 compiler is: "
            "pip install --no-build-isolation --no-deps -e ."
        )
    if dtype is not None and dtype not in CODES:
        return f"dtype: got {str(dtype).removeprefix('torch.')}, expected float32 or bfloat16"
    return None


def _count(x: Tensor) -> int:
    """Rows of an activation."""
    width = x.shape[-1]
    return x.numel() // width if width else 0


def address(x: Tensor | None) -> int:
    """Address of ``x``; 0 for None."""
    return 0 if x is None else x.data_ptr()


def _vectors(
    z: Tensor, dtype: torch.dtype, **named: Tensor
) -> tuple[tuple[int, int, int, int, int], list[Operand]]:
    """Sizes and dtype codes of a row operator, and the operands that are (B,D)."""
    b, t, d = z.shape
    sizes = (b, t, d, CODES.get(z.dtype, -1), CODES.get(dtype, -1))
    return sizes, [(name, v, (b, d), (dtype,)) for name, v in named.items()]


def _panels(o: int, i: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Shape of a packed (O,I) weight."""
    pair = native.pair if dtype == torch.bfloat16 else 1
    return -(-o // native.columns), -(-i // pair), native.columns, pair


def pack(weight: Tensor, out: Tensor | None = None) -> Tensor | None:
    """W (O,I) as the forward products read it, panels (O/c,I/p,c,p) with zeros behind the end: they
    take it in place of W and need not pack it in every call, which at few rows is most of their
    time. None where that cannot be had: products left to the library, widened bfloat16, and tensors
    without memory of their own, such as fake ones."""
    dtype = weight.dtype
    widened = dtype == torch.bfloat16 and native.pair == 1
    if type(weight) is not Tensor or dtype in LIBRARY_PRODUCTS or widened:
        return None
    o, i = weight.shape
    shape = _panels(o, i, dtype)
    out = weight.new_empty(shape) if out is None else out
    inputs: list[Operand] = [("weight", weight, (o, i), DTYPES)]
    check("pack", here.device, inputs, [("out", out, shape, (dtype,))])
    native.pack(CODES[dtype], o, i, weight.data_ptr(), weight.stride(0), out.data_ptr())
    return out


def weight_operand(weight: Tensor, o: int, i: int, name: str = "weight") -> tuple[int, Operand]:
    """Distance between rows of a weight (O,I), or the code for a packed one; and the operand."""
    if weight.dim() == 4:
        return native.packed, (name, weight, _panels(o, i, weight.dtype), DTYPES)
    return weight.stride(0), (name, weight, (o, i), DTYPES)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y = x W^T + b."""
    if weight.dtype in LIBRARY_PRODUCTS:
        return reference.linear(x, weight, bias, out)
    x, dtype = x.contiguous(), weight.dtype
    o, i = weight.shape[0] if bias is None else bias.shape[0], x.shape[-1]
    shape = (*x.shape[:-1], o)
    out = x.new_empty(shape) if out is None else out
    stride, operand = weight_operand(weight, o, i)
    if bias is None:
        # O of a packed weight is known by its bias alone: without one it must be a plain (O,I)
        operand = ("weight", weight, (o, i), DTYPES)
    operands: list[Operand] = [("x", x, x.shape, (dtype,)), operand, ("bias", bias, (o,), (dtype,))]
    check("linear", here.device, operands, [("out", out, shape, DTYPES)])
    native.linear(
        CODES[dtype], CODES[out.dtype], True, _count(out), o, i, x.data_ptr(), weight.data_ptr(),
        stride, address(bias), out.data_ptr(),
    )  # fmt: skip
    return out


def linear_dgrad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx = dy W."""
    if weight.dtype in LIBRARY_PRODUCTS:
        return reference.linear_dgrad(dy, weight, out)
    dy, dtype = dy.contiguous(), weight.dtype
    o, i = weight.shape
    shape = (*dy.shape[:-1], i)
    out = dy.new_empty(shape) if out is None else out
    operands: list[Operand] = [
        ("dy", dy, (*dy.shape[:-1], o), (dtype,)),
        ("weight", weight, (o, i), DTYPES),
    ]
    check("linear_dgrad", here.device, operands, [("out", out, shape, DTYPES)])
    native.linear(
        CODES[dtype], CODES[out.dtype], False, _count(out), i, o, dy.data_ptr(), weight.data_ptr(),
        weight.stride(0), 0, out.data_ptr(),
    )  # fmt: skip
    return out


def linear_wgrad(dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    """dW += dy^T x, db += sum dy, in float32."""
    if dy.dtype in LIBRARY_WGRADS:
        reference.linear_wgrad(dy, x, dweight, dbias)
        return
    dy, x = dy.contiguous(), x.contiguous()
    o, i = dy.shape[-1], x.shape[-1]
    inputs: list[Operand] = [
        ("dy", dy, (*x.shape[:-1], o), DTYPES),
        ("x", x, x.shape, (dy.dtype,)),
    ]
    outputs: list[Operand] = [("dweight", dweight, (o, i), FLOAT), ("dbias", dbias, (o,), FLOAT)]
    check("linear_wgrad", here.device, inputs, outputs)
    native.wgrad(
        CODES[dy.dtype], _count(dy), o, i, dy.data_ptr(), x.data_ptr(), dweight.data_ptr(),
        dweight.stride(0), address(dbias),
    )  # fmt: skip


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Tanh GELU."""
    out = torch.empty_like(x) if out is None else out
    outputs: list[Operand] = [("out", out, x.shape, (x.dtype,))]
    check("gelu", here.device, [("x", x, x.shape, DTYPES)], outputs, {("out", "x")})
    native.gelu(CODES[x.dtype], x.numel(), x.data_ptr(), out.data_ptr())
    return out


def gelu_backward(
    dy: Tensor, x: Tensor, out: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """dx = dy gelu'(x);  total += dx."""
    out = torch.empty_like(x) if out is None else out
    inputs: list[Operand] = [("dy", dy, x.shape, (x.dtype,)), ("x", x, x.shape, DTYPES)]
    outputs: list[Operand] = [("out", out, x.shape, (x.dtype,))]
    outputs.append(("total", total, x.shape, (torch.float32,)))
    check("gelu_backward", here.device, inputs, outputs, {("out", "dy"), ("out", "x")})
    native.gelu_backward(
        CODES[x.dtype], x.numel(), dy.data_ptr(), x.data_ptr(), out.data_ptr(), address(total)
    )
    return out


def _pre_activation(x: Tensor, weight: Tensor, addend: Tensor, pre: Tensor | None) -> Tensor:
    if addend.dim() == 1:
        return reference.linear(x, weight, addend, pre)
    pre = torch.empty_like(addend) if pre is None else pre
    u, x, flat = (t.view(-1, t.shape[-1]) for t in (addend, x, pre))
    torch.addmm(u, x, weight.t(), out=flat)
    return pre


def linear_add_gelu(
    x: Tensor, weight: Tensor, addend: Tensor, pre: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """gelu(x W^T + u)."""
    if weight.dtype in LIBRARY_PRODUCTS:
        return gelu(_pre_activation(x, weight, addend, pre), out)
    dtype, o, i = weight.dtype, addend.shape[-1], x.shape[-1]
    shape = (*x.shape[:-1], o)
    out = x.new_empty(shape) if out is None else out
    is_bias = addend.dim() == 1
    stride, operand = weight_operand(weight, o, i)
    if pre is not None and pre.data_ptr() == out.data_ptr():
        pre = None
    inputs: list[Operand] = [
        ("x", x, x.shape, (dtype,)),
        operand,
        ("addend", addend, (o,) if is_bias else shape, (dtype,)),
    ]
    outputs: list[Operand] = [("pre", pre, shape, (dtype,)), ("out", out, shape, (dtype,))]
    check("linear_add_gelu", here.device, inputs, outputs)
    u = addend.data_ptr()
    native.linear_add_gelu(
        CODES[dtype], _count(out), o, i, x.data_ptr(), weight.data_ptr(), stride,
        u if is_bias else 0, 0 if is_bias else u, address(pre), out.data_ptr(),
    )  # fmt: skip
    return out


def adaln(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """LN(z) (1 + scale) + shift."""
    out = torch.empty_like(z, dtype=scale.dtype) if out is None else out
    sizes, vectors = _vectors(z, scale.dtype, shift=shift, scale=scale)
    inputs: list[Operand] = [("z", z, z.shape, DTYPES), *vectors]
    outputs: list[Operand] = [("out", out, z.shape, (scale.dtype,))]
    check("adaln", here.device, inputs, outputs, {("out", "z")})
    native.adaln(
        *sizes, z.data_ptr(), shift.data_ptr(), row_stride(shift), scale.data_ptr(),
        row_stride(scale), out.data_ptr(),
    )  # fmt: skip
    return out


def adaln_backward(
    dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, dshift: Tensor, dscale: Tensor
) -> None:
    """dz += LN'(dy (1 + scale)); dshift += sum_t dy; dscale += sum_t dy LN(z)."""
    sizes, vectors = _vectors(z, scale.dtype, scale=scale)
    shape, vector = z.shape, scale.shape
    inputs: list[Operand] = [
        ("dy", dy, shape, (scale.dtype,)),
        ("z", z, shape, DTYPES),
        *vectors,
    ]
    outputs: list[Operand] = [
        ("dz", dz, shape, (z.dtype,)),
        ("dshift", dshift, vector, FLOAT),
        ("dscale", dscale, vector, FLOAT),
    ]
    check("adaln_backward", here.device, inputs, outputs)
    native.adaln_backward(
        *sizes, dy.data_ptr(), z.data_ptr(), scale.data_ptr(), row_stride(scale), dz.data_ptr(),
        dshift.data_ptr(), row_stride(dshift), dscale.data_ptr(), row_stride(dscale),
    )  # fmt: skip


def gate_residual(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """z + gate y, with |out - prev| and |out| per sample into ``norms``."""
    out = torch.empty_like(z) if out is None else out
    if prev is None or norms is None:
        prev = norms = None
    sizes, vectors = _vectors(z, y.dtype, gate=gate)
    inputs: list[Operand] = [
        ("z", z, z.shape, DTYPES),
        ("y", y, z.shape, DTYPES),
        *vectors,
        ("prev", prev, z.shape, (z.dtype,)),
    ]
    outputs: list[Operand] = [
        ("out", out, z.shape, (z.dtype,)),
        ("norms", norms, (2, z.shape[0]), FLOAT),
    ]
    check("gate_residual", here.device, inputs, outputs, {("out", "z")})
    native.gate_residual(
        *sizes, z.data_ptr(), y.data_ptr(), gate.data_ptr(), row_stride(gate), out.data_ptr(),
        address(prev), address(norms),
    )  # fmt: skip
    return out


def gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, dgate: Tensor, out: Tensor | None = None
) -> Tensor:
    """dy = gate dout; dgate += sum_t dout y."""
    out = torch.empty_like(y) if out is None else out
    sizes, vectors = _vectors(dout, y.dtype, gate=gate)
    inputs: list[Operand] = [
        ("dout", dout, dout.shape, DTYPES),
        ("y", y, dout.shape, DTYPES),
        *vectors,
    ]
    outputs: list[Operand] = [
        ("dgate", dgate, gate.shape, FLOAT),
        ("out", out, dout.shape, (y.dtype,)),
    ]
    check("gate_residual_backward", here.device, inputs, outputs, {("out", "dout"), ("out", "y")})
    native.gate_residual_backward(
        *sizes, dout.data_ptr(), y.data_ptr(), gate.data_ptr(), row_stride(gate), dgate.data_ptr(),
        row_stride(dgate), out.data_ptr(),
    )  # fmt: skip
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
    """z' = z + gate y;  LN(z') (1 + scale) + shift."""
    z_out = torch.empty_like(z) if z_out is None else z_out
    out = torch.empty_like(z, dtype=scale.dtype) if out is None else out
    sizes, vectors = _vectors(z, y.dtype, gate=gate, shift=shift, scale=scale)
    inputs: list[Operand] = [("z", z, z.shape, DTYPES), ("y", y, z.shape, DTYPES), *vectors]
    outputs: list[Operand] = [
        ("z_out", z_out, z.shape, (z.dtype,)),
        ("out", out, z.shape, (y.dtype,)),
    ]
    check("gate_residual_adaln", here.device, inputs, outputs, {("z_out", "z"), ("out", "y")})
    native.gate_residual_adaln(
        *sizes, z.data_ptr(), y.data_ptr(), gate.data_ptr(), row_stride(gate), shift.data_ptr(),
        row_stride(shift), scale.data_ptr(), row_stride(scale), z_out.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return z_out, out


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
    """y W^T + b, y = adaln(z)."""
    if weight.dtype in LIBRARY_PRODUCTS:
        return reference.linear(adaln(z, shift, scale, y), weight, bias, out)
    dtype, o, d = weight.dtype, bias.shape[0], z.shape[-1]
    shape = (*z.shape[:-1], o)
    stride, operand = weight_operand(weight, o, d)
    y = torch.empty_like(z, dtype=dtype) if y is None else y
    out = z.new_empty(shape, dtype=dtype) if out is None else out
    sizes, vectors = _vectors(z, dtype, shift=shift, scale=scale)
    inputs: list[Operand] = [
        ("z", z, z.shape, DTYPES),
        *vectors,
        operand,
        ("bias", bias, (o,), (dtype,)),
    ]
    outputs: list[Operand] = [("y", y, z.shape, (dtype,)), ("out", out, shape, (dtype,))]
    check("adaln_linear", here.device, inputs, outputs)
    native.adaln_linear(
        *sizes, z.data_ptr(), shift.data_ptr(), row_stride(shift), scale.data_ptr(),
        row_stride(scale), o, weight.data_ptr(), stride, bias.data_ptr(), y.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def _linear_gate(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    gate: Tensor,
    p: Tensor | None,
    z_out: Tensor,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    y: Tensor | None = None,
) -> None:
    dtype, d, i = weight.dtype, z.shape[-1], x.shape[-1]
    stride, operand = weight_operand(weight, d, i)
    named = {"gate": gate}
    if modulation is not None:
        named["shift"], named["scale"] = modulation
    sizes, vectors = _vectors(z, dtype, **named)
    inputs: list[Operand] = [
        ("x", x, (*z.shape[:-1], i), (dtype,)),
        operand,
        ("bias", bias, (d,), (dtype,)),
        ("z", z, z.shape, DTYPES),
        *vectors,
        ("prev", prev, z.shape, (z.dtype,)),
    ]
    outputs: list[Operand] = [
        ("p", p, z.shape, (dtype,)),
        ("out", z_out, z.shape, (z.dtype,)),
        ("norms", norms, (2, z.shape[0]), FLOAT),
        ("y", y, z.shape, (dtype,)),
    ]
    check(op, here.device, inputs, outputs, {("out", "z")})
    strided = [n for v in named.values() for n in (v.data_ptr(), row_stride(v))]
    native.linear_gate(
        *sizes, i, x.data_ptr(), weight.data_ptr(), stride, bias.data_ptr(),
        z.data_ptr(), *strided[:2], address(p), z_out.data_ptr(), address(prev), address(norms),
        *(strided[2:] or (0, 0, 0, 0)), address(y),
    )  # fmt: skip


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
    """z + g p, p = x W^T + b, with norms as in ``gate_residual``."""
    if weight.dtype in LIBRARY_PRODUCTS:
        return gate_residual(z, reference.linear(x, weight, bias, p), gate, out, prev, norms)
    out = torch.empty_like(z) if out is None else out
    if prev is None or norms is None:
        prev = norms = None
    p = p if keep else None
    _linear_gate("linear_gate_residual", x, weight, bias, z, gate, p, out, prev, norms)
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
) -> tuple[Tensor, Tensor]:
    """z' = z + g p, p = x W^T + b;  LN(z') (1 + scale) + shift."""
    if weight.dtype in LIBRARY_PRODUCTS:
        p = reference.linear(x, weight, bias, p)
        return gate_residual_adaln(z, p, gate, shift, scale, z_out, out)
    z_out = torch.empty_like(z) if z_out is None else z_out
    out = torch.empty_like(z, dtype=scale.dtype) if out is None else out
    p = p if keep else None
    _linear_gate(
        "linear_gate_residual_adaln", x, weight, bias, z, gate, p, z_out,
        modulation=(shift, scale), y=out,
    )  # fmt: skip
    return z_out, out


def attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v per head."""
    b, t, width = qkv.shape
    d = width // 3
    head = head_width("attention", d, heads)
    out = qkv.new_empty(b, t, d) if out is None else out
    outputs: list[Operand] = [("out", out, (b, t, d), (qkv.dtype,))]
    check("attention", here.device, [("qkv", qkv, (b, t, 3 * d), DTYPES)], outputs)
    native.attention(CODES[qkv.dtype], b, t, heads, head, qkv.data_ptr(), out.data_ptr())
    return out


def attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, heads: int, out: Tensor | None = None
) -> Tensor:
    """Gradient with respect to qkv; y is not needed."""
    b, t, width = qkv.shape
    d = width // 3
    head = head_width("attention_backward", d, heads)
    out = torch.empty_like(qkv) if out is None else out
    inputs: list[Operand] = [
        ("dy", dy, (b, t, d), (qkv.dtype,)),
        ("qkv", qkv, (b, t, 3 * d), DTYPES),
    ]
    check("attention_backward", here.device, inputs, [("out", out, qkv.shape, (qkv.dtype,))])
    native.attention_backward(
        CODES[qkv.dtype], b, t, heads, head, dy.data_ptr(), qkv.data_ptr(), out.data_ptr()
    )
    return out
