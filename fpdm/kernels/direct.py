"""Calls of our custom operators that go past the dispatcher where nobody listens to it.

torch.library leads a call through the dispatcher, back into Python and to its autograd formula.
``call`` runs the same body, saved tensors and backward as one autograd.Function instead: 55 us less
a call, forward or backward, which is more than many kernels of a small model take. Whoever has to
see an operator as such still does: torch.compile and export, dispatch modes (fake tensors, make_fx,
counters), torch.jit.trace and tensor subclasses get the operator itself.

The operators have first derivatives by torch.autograd and no others. Whatever asks for more is
refused here, as torch would answer some of it with zeros: a derivative of a derivative when it is
taken, forward mode and the transforms of torch.func at the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)
_bodies: dict[Any, Callable[..., Any]] = {}
_functions: dict[Any, Any] = {}


def body(op: Any, fn: Callable[..., Any]) -> Any:
    """Notes that the custom operator ``op`` computes ``fn``; returns ``op``."""
    _bodies[op] = fn
    return op


def refusal(got: str) -> NotImplementedError:
    """That the operators are once differentiable, where ``got`` was asked for."""
    return NotImplementedError(
        f"fpdm's operators: got {got}, expected first derivatives by torch.autograd "
        "(once_differentiable); FPDM.fixed_point_map(h, mod, plain=True) has all of them"
    )


class _Once(torch.autograd.Function):
    """The first ``count`` of ``tensors``, which depend on the others: differentiating refuses."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise refusal("a derivative of their derivative")


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward``, with results that know what they depend on and refuse a second derivative."""

    def formula(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            lengths, flat = _flat(backward(ctx, *grads))
        sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
        return _nested(lengths, _Once.apply(len(flat), *flat, *sources))

    return formula


def autograd(op: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Registers ``op``'s autograd formula for both ways of calling it; once differentiable.

    ``setup`` saves every tensor that a gradient depends on, or one that carries its graph.
    """
    backward = _once(backward)
    op.register_autograd(backward, setup_context=setup)
    fn = _bodies[op]

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: Sequence[int], *flat: Any) -> Any:
            inputs = _nested(lengths, flat)
            output = fn(*inputs)
            ctx.lengths = lengths
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            flat = ctx.needs_input_grad
            ctx.needs_input_grad = _nested(ctx.lengths, flat[1:])
            try:
                found = backward(ctx, *grads)
            finally:
                # a graph that is kept comes here again
                ctx.needs_input_grad = flat
            return None, *_flat(found)[1]

    _functions[op] = Direct


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``, past the dispatcher where only its result is wanted. Raises
    NotImplementedError under forward mode and under the transforms of torch.func."""
    if torch.compiler.is_compiling() or op not in _bodies:
        if forward_ad._current_level >= 0:
            # traced, a tensor does not tell
            raise refusal("forward mode")
        return op(*args)
    lengths, flat = _flat(args)
    tensors = [t for t in flat if isinstance(t, Tensor)]
    refuse_transformed(*tensors)
    if watched(tensors):
        return op(*args)
    if op in _functions and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _functions[op].apply(lengths, *flat)
    return _bodies[op](*args)


def refuse_transformed(*tensors: Tensor) -> None:
    """Raises NotImplementedError for a tensor of forward mode or inside a transform."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    inside = torch._C._functorch
    for t in tensors:
        if inside.is_gradtrackingtensor(t) or inside.is_batchedtensor(t):
            raise refusal("a tensor inside torch.func's grad, vjp, jvp or vmap")
        if forward_ad.unpack_dual(t).tangent is not None:
            raise refusal("forward mode")


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody beside eager autograd must see the operators that run on ``tensors``."""
    return (
        is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or any(type(t) not in _PLAIN for t in tensors)
    )


def _flat(args: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """Lengths of the lists among ``args`` (-1: none), and everything in one list."""
    lengths: list[int] = []
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            lengths.append(len(arg))
            flat.extend(arg)
        else:
            lengths.append(-1)
            flat.append(arg)
    return tuple(lengths), flat


def _nested(lengths: Sequence[int], flat: Sequence[Any]) -> tuple[Any, ...]:
    """What ``_flat`` was given."""
    found, start = [], 0
    for length in lengths:
        if length < 0:
            found.append(flat[start])
            start += 1
        else:
            found.append(list(flat[start : start + length]))
            start += length
    return tuple(found)
