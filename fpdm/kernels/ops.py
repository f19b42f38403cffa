"""Each operator registered once: schema, fake, autograd.

    linear_add_gelu(x, weight, addend)            gelu(x W^T + u), u a bias or a tensor
    adaln(z, shift, scale)                        LN(z)(1 + scale) + shift
    attention(qkv, heads)                         softmax(q k^T / sqrt K) v
    gate_residual_adaln(z, y, g, shift, scale)    z' = z + g y, LN(z')(1 + scale) + shift
    gate_residual(z, y, g)                        z + g y
    linear(x, weight, bias, weight_c, bias_c)     x W^T + b in the compute dtype, gradients for the
                                                  (float32) parameters in the parameters' dtype

Each takes the implementation's name last (``auto`` chooses, see fpdm.kernels.implementations). The
loop (fpdm.fixed_point) calls an operator set directly, with its own buffers; the registered forms
are for everything else and for tests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fpdm.kernels import direct
from fpdm.kernels.direct import call
from fpdm.kernels.implementations import resolve


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The operators choose their dtypes themselves: autocast must not choose again inside. Triton
    launches on the current device, so it is made the operands'."""
    if device.type != "cuda" and not torch.is_autocast_enabled(device.type):
        # nothing to turn off: small models call this 60 times a step
        return contextlib.nullcontext()
    return _no_autocast(device)


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here, torch.autocast(device.type, enabled=False):
        yield


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _define(
    name: str, schema: str, compute_at: int = 0, impl_at: int = -1, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    def register(fn: Callable[..., Any]) -> Any:
        @functools.wraps(fn)
        def body(*args: Any) -> Any:
            # the compute dtype is the weights' where there are some, else the vectors'
            compute = args[compute_at]
            with no_autocast(args[0].device):
                operators = resolve(args[impl_at], compute.device, compute.dtype)
                return fn(operators, *args[:impl_at])

        op = torch.library.custom_op(f"fpdm::{name}", body, mutates_args=mutates, schema=schema)
        return direct.body(op, body)

    return register


def _zeros(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=accumulator(like.dtype), device=like.device)


@_define(
    "linear",
    "(Tensor x, Tensor weight, Tensor bias, Tensor weight_c, Tensor bias_c, str impl, "
    "bool accumulate=False) -> Tensor",
    compute_at=3,
    impl_at=5,
)
def linear(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor, weight_c: Tensor, bias_c: Tensor
) -> Tensor:
    """x (...,I) -> (...,O) in weight_c's dtype; weight (O,I), bias (O,) are the parameters.

    With ``accumulate`` the backward adds to the ``.grad`` that both have, in place, see
    ``gradients_of``.
    """
    return ops.linear(x.to(weight_c.dtype).contiguous(), weight_c, bias_c)


@_define(
    "linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor weight_c, bool dx, bool dw, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    compute_at=3,
)
def linear_backward(
    ops: Any, dy: Tensor, x: Tensor, weight: Tensor, weight_c: Tensor, dx: bool, dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db); dW and db in the parameters' dtype. Empty where ``dx`` or ``dw`` is false."""
    dy = dy.to(weight_c.dtype).contiguous()
    dinput = ops.linear_dgrad(dy, weight_c).to(x.dtype) if dx else x.new_empty(0)
    if not dw:
        return dinput, weight.new_empty(0), weight.new_empty(0)
    dweight, dbias = _zeros(weight, weight.shape), _zeros(weight, weight.shape[:1])
    ops.linear_wgrad(dy, x.to(weight_c.dtype).contiguous(), dweight, dbias)
    return dinput, dweight.to(weight.dtype), dbias.to(weight.dtype)


@_define(
    "linear_backward_",
    "(Tensor(a!) dweight, Tensor(b!) dbias, Tensor dy, Tensor x, Tensor weight_c, bool dx, "
    "str impl) -> Tensor",
    compute_at=4,
    mutates=("dweight", "dbias"),
)
def linear_backward_(
    ops: Any, dweight: Tensor, dbias: Tensor, dy: Tensor, x: Tensor, weight_c: Tensor, dx: bool
) -> Tensor:
    """dx, empty where ``dx`` is false; dW and db are added to ``dweight`` and ``dbias``."""
    dy = dy.to(weight_c.dtype).contiguous()
    ops.linear_wgrad(dy, x.to(weight_c.dtype).contiguous(), dweight, dbias)
    return ops.linear_dgrad(dy, weight_c).to(x.dtype) if dx else x.new_empty(0)


@_define(
    "linear_add_gelu", "(Tensor x, Tensor weight, Tensor addend, str impl) -> (Tensor, Tensor)"
)
def linear_add_gelu(ops: Any, x: Tensor, weight: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(pre), pre), pre = x W^T + u.   x (B,T,I), weight (O,I), addend (O,) or (B,T,O)."""
    pre = x.new_empty(*x.shape[:-1], weight.shape[0])
    return ops.linear_add_gelu(x.contiguous(), weight, addend.contiguous(), pre=pre), pre


@_define(
    "linear_add_gelu_backward",
    "(Tensor dy, Tensor pre, Tensor x, Tensor weight, bool bias, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
def linear_add_gelu_backward(
    ops: Any, dy: Tensor, pre: Tensor, x: Tensor, weight: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, du)."""
    dpre = ops.gelu_backward(dy.contiguous(), pre)
    dweight = _zeros(weight, weight.shape)
    dbias = _zeros(weight, (weight.shape[0],)) if bias else None
    ops.linear_wgrad(dpre, x.contiguous(), dweight, dbias)
    du = dpre if dbias is None else dbias.to(dpre.dtype)
    return ops.linear_dgrad(dpre, weight), dweight.to(weight.dtype), du


@_define("adaln", "(Tensor z, Tensor shift, Tensor scale, str impl) -> Tensor", compute_at=2)
def adaln(ops: Any, z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(z)(1 + scale) + shift.   z (B,T,D), shift, scale (B,D)."""
    return ops.adaln(z.contiguous(), shift, scale)


@_define(
    "adaln_backward",
    "(Tensor dy, Tensor z, Tensor scale, str impl) -> (Tensor, Tensor, Tensor)",
    compute_at=2,
)
def adaln_backward(ops: Any, dy: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dshift, dscale)."""
    dz = z.new_zeros(z.shape)
    dshift, dscale = (_zeros(scale, scale.shape) for _ in range(2))
    ops.adaln_backward(dy.contiguous(), z.contiguous(), scale, dz, dshift, dscale)
    return dz, dshift.to(scale.dtype), dscale.to(scale.dtype)


@_define("attention", "(Tensor qkv, int heads, str impl) -> Tensor")
def attention(ops: Any, qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt K) v.   qkv (B,T,3D) packed as (3,H,K) -> (B,T,D)."""
    return ops.attention(qkv.contiguous(), heads)


@_define("attention_backward", "(Tensor dy, Tensor qkv, Tensor y, int heads, str impl) -> Tensor")
def attention_backward(ops: Any, dy: Tensor, qkv: Tensor, y: Tensor, heads: int) -> Tensor:
    """dqkv (B,T,3D)."""
    return ops.attention_backward(dy.contiguous(), qkv.contiguous(), y.contiguous(), heads)


@_define("gate_residual", "(Tensor z, Tensor y, Tensor gate, str impl) -> Tensor", compute_at=2)
def gate_residual(ops: Any, z: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """z + g y.   z, y (B,T,D), gate (B,D)."""
    return ops.gate_residual(z.contiguous(), y.contiguous(), gate)


@_define(
    "gate_residual_backward",
    "(Tensor dout, Tensor y, Tensor gate, str impl) -> (Tensor, Tensor)",
    compute_at=2,
)
def gate_residual_backward(
    ops: Any, dout: Tensor, y: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """(dy, dgate); dz is dout."""
    dgate = _zeros(gate, gate.shape)
    dy = ops.gate_residual_backward(dout.contiguous(), y.contiguous(), gate, dgate)
    return dy, dgate.to(gate.dtype)


@_define(
    "gate_residual_adaln",
    "(Tensor z, Tensor y, Tensor gate, Tensor shift, Tensor scale, str impl) -> (Tensor, Tensor)",
    compute_at=2,
)
def gate_residual_adaln(
    ops: Any, z: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(z', LN(z')(1 + scale) + shift), z' = z + g y."""
    return ops.gate_residual_adaln(z.contiguous(), y.contiguous(), gate, shift, scale)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, weight_c: Tensor, *_: Any) -> Tensor:
    return weight_c.new_empty(*x.shape[:-1], weight_c.shape[0])


@linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, weight_c: Tensor, dx: bool, dw: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if dw else 0)
    dbias = weight.new_empty(weight.shape[0] if dw else 0)
    return x.new_empty(x.shape if dx else 0), dweight, dbias


@linear_backward_.register_fake
def _(dweight: Tensor, dbias: Tensor, dy: Tensor, x: Tensor, w: Tensor, dx: bool, i: str) -> Tensor:
    return x.new_empty(x.shape if dx else 0)


@linear_add_gelu.register_fake
def _(x: Tensor, weight: Tensor, addend: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@linear_add_gelu_backward.register_fake
def _(
    dy: Tensor, pre: Tensor, x: Tensor, weight: Tensor, bias: bool, impl: str
) -> tuple[Tensor, ...]:
    du = pre.new_empty(weight.shape[0]) if bias else pre.new_empty(pre.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), du


@adaln.register_fake
def _(z: Tensor, shift: Tensor, scale: Tensor, impl: str) -> Tensor:
    return scale.new_empty(z.shape)


@adaln_backward.register_fake
def _(dy: Tensor, z: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@attention.register_fake
def _(qkv: Tensor, heads: int, impl: str) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@attention_backward.register_fake
def _(dy: Tensor, qkv: Tensor, y: Tensor, heads: int, impl: str) -> Tensor:
    return qkv.new_empty(qkv.shape)


@gate_residual.register_fake
def _(z: Tensor, y: Tensor, gate: Tensor, impl: str) -> Tensor:
    return z.new_empty(z.shape)


@gate_residual_backward.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@gate_residual_adaln.register_fake
def _(
    z: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(z.shape)


def _setup(ctx: Any, impl: str, *saved: Tensor) -> None:
    ctx.impl = impl
    ctx.save_for_backward(*saved)


def gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that exist, to be added to; none unless all do, dense, as float32 or wider."""
    # while torch.compile traces, parameters are no leaves
    found = [g for p in params if p.is_leaf and (g := p.grad) is not None]
    wide = all(g.dtype == accumulator(g.dtype) and g.is_contiguous() for g in found)
    return found if wide and len(found) == len(params) else []


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, weight_c, _, impl = inputs[:6]
    accumulate = inputs[6:] == (True,)
    _setup(ctx, impl, x, weight, weight_c, *((bias,) if accumulate else ()))


def _linear_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, weight_c, *biases = ctx.saved_tensors
    wants_x, *wanted = ctx.needs_input_grad[:3]
    wants_w, none = any(wanted), (None,) * 4
    if sums := gradients_of([weight, *biases]) if biases and all(wanted) else []:
        dx = call(linear_backward_, *sums, dy, x, weight_c, wants_x, ctx.impl)
        return (dx if wants_x else None, None, None, *none)
    dx, dw, db = call(linear_backward, dy, x, weight, weight_c, wants_x, wants_w, ctx.impl)
    return (dx if wants_x else None, *((dw, db) if wants_w else (None, None)), *none)


def _linear_add_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, addend, impl = inputs
    # of the addend only its graph is wanted, see direct.autograd
    _setup(ctx, impl, output[1], x, weight, addend)
    ctx.mark_non_differentiable(output[1])
    ctx.bias = addend.dim() == 1


def _linear_add_gelu_grad(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    pre, x, weight, _ = ctx.saved_tensors
    return *call(linear_add_gelu_backward, dy, pre, x, weight, ctx.bias, ctx.impl), None


def _adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup(ctx, inputs[3], inputs[0], inputs[2])


def _adaln_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *call(adaln_backward, dy, *ctx.saved_tensors, ctx.impl), None


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup(ctx, inputs[2], inputs[0], output)
    ctx.heads = inputs[1]


def _attention_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return call(attention_backward, dy, *ctx.saved_tensors, ctx.heads, ctx.impl), None, None


def _gate_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup(ctx, inputs[3], inputs[1], inputs[2])


def _gate_residual_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (dout, *call(gate_residual_backward, dout, *ctx.saved_tensors, ctx.impl), None)


def _gate_residual_adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, y, gate, _, scale, impl = inputs
    _setup(ctx, impl, output[0], y, gate, scale)


def _gate_residual_adaln_grad(ctx: Any, dz2: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    z2, y, gate, scale = ctx.saved_tensors
    dz, dshift, dscale = call(adaln_backward, dout, z2, scale, ctx.impl)
    dz = dz + dz2
    dy, dgate = call(gate_residual_backward, dz, y, gate, ctx.impl)
    return dz, dy, dgate, dshift, dscale, None


direct.autograd(linear, _linear_grad, _linear_setup)
direct.autograd(linear_add_gelu, _linear_add_gelu_grad, _linear_add_gelu_setup)
direct.autograd(adaln, _adaln_grad, _adaln_setup)
direct.autograd(attention, _attention_grad, _attention_setup)
direct.autograd(gate_residual, _gate_residual_grad, _gate_residual_setup)
direct.autograd(gate_residual_adaln, _gate_residual_adaln_grad, _gate_residual_adaln_setup)
