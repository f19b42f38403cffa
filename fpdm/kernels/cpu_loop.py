"""The fixed-point iteration on the processor as one call: csrc/cpu/loop.cpp.

    iterate   x_{j+1} = f(x_j), k times; equation and intermediates: fpdm.block
    solve     as often as every sample needs; who is done: fpdm.stopping

Both are the same kernels in the same order as ``step_forward`` on ``fpdm.kernels.cpu``, so results
are the same bits. What is saved is the host's part between two kernels, some 15 microseconds each,
which a small model notices: its kernels take 10 to 50. A signal is seen within a tenth of a second
or one iteration, whichever is longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpdm.kernels import cpu
from fpdm.kernels.launch import LaunchError, Operand, check, head_width, row_stride

if TYPE_CHECKING:
    from fpdm.block import Activations, BlockWeights

INTEGERS = (torch.int64,)


def loops(residual: torch.dtype, compute: torch.dtype) -> bool:
    """Whether iterates and products of these dtypes can be had: one dtype, products in csrc/cpu."""
    return residual == compute and compute in cpu.CODES and compute not in cpu.LIBRARY_PRODUCTS


def _present(op: str, named: dict[str, Tensor | None]) -> None:
    # the check passes over what is not given, and a kernel would read address 0
    for name, value in named.items():
        if value is None:
            raise LaunchError(f"{op}: {name}: got none, expected a tensor")


def _operands(
    op: str, x: Tensor, buffers: tuple[Tensor, Tensor], u: Tensor | None, mod: Tensor,
    w: BlockWeights, acts: Activations, norms: Tensor | None, count: int,
) -> tuple[list[Operand], list[Operand], list[int], list[int]]:  # fmt: skip
    """Inputs, outputs, addresses of the buffers, and of the weights with their distances."""
    b, t, d = x.shape
    _present(op, {"wide": acts.h, "y": acts.y1, "o": acts.o})
    dtype = (x.dtype,)
    inputs: list[Operand] = [("x", x, x.shape, dtype)]
    named = {
        "a": (w.inj_a, None, 2 * d, d), "w2": (w.inj_w2, w.inj_b2, d, 2 * d),
        "qkv": (w.qkv, w.qkv_bias, 3 * d, d), "proj": (w.proj, w.proj_bias, d, d),
        "fc1": (w.fc1, w.fc1_bias, 4 * d, d), "fc2": (w.fc2, w.fc2_bias, d, 4 * d),
    }  # fmt: skip
    weights: list[int] = []
    for name, (weight, bias, o, i) in named.items():
        if u is None and name in ("a", "w2"):
            weights += [0, 0, 0]
            continue
        _present(op, {name: weight} | ({} if name == "a" else {f"{name} bias": bias}))
        assert weight is not None
        stride, operand = cpu.weight_operand(weight, o, i, name)
        inputs += [(*operand[:3], dtype), (f"{name} bias", bias, (o,), dtype)]
        weights += [weight.data_ptr(), stride, 0 if bias is None else bias.data_ptr()]
    outputs: list[Operand] = [
        ("even", buffers[0], x.shape, dtype),
        ("odd", buffers[1], x.shape, dtype),
        ("wide", acts.h, (b, t, 4 * d), dtype),
        ("y", acts.y1, x.shape, dtype),
        ("o", acts.o, x.shape, dtype),
        ("norms", norms, (count, 2, b), (torch.float32,)),
    ]
    given = (x, *buffers, u, mod, acts.h, acts.y1, acts.o, norms)
    return inputs, outputs, [0 if v is None else v.data_ptr() for v in given], weights


def _sizes(op: str, x: Tensor, heads: int) -> list[int]:
    code = cpu.CODES[x.dtype]
    head_width(op, x.shape[-1], heads)
    return [*x.shape, code, code, heads]


def iterate(
    x: Tensor,
    buffers: tuple[Tensor, Tensor],
    u: Tensor | None,
    mod: Tensor,
    w: BlockWeights,
    heads: int,
    acts: Activations,
    k: int,
    norms: Tensor | None = None,
) -> Tensor:
    """f^k(x), in the first of ``buffers`` for odd k, else in the second, which may be x.

    x (B,T,D), u (B,T,2D) or None, mod (B,6D), weights plain or packed, all of one dtype; of
    ``acts`` h, y1 and o are written. ``norms`` (k,2,B) receives |f(x_j) - x_j| and |f(x_j)|.
    """
    b, t, d = x.shape
    inputs, outputs, addresses, weights = _operands(
        "iterate", x, buffers, u, mod, w, acts, norms, k
    )
    inputs += [("u", u, (b, t, 2 * d), (x.dtype,)), ("mod", mod, (b, 6 * d), (x.dtype,))]
    check("iterate", cpu.DEVICE, inputs, outputs, {("odd", "x")})
    cpu.native.iterate(_sizes("iterate", x, heads), addresses, row_stride(mod), weights, k)
    return buffers[(k + 1) % 2]


def solve(
    x: Tensor,
    buffers: tuple[Tensor, Tensor],
    u: Tensor | None,
    mod: Tensor,
    w: BlockWeights,
    heads: int,
    acts: Activations,
    most: int,
    watch: Any,
    tol: float,
    norms: Tensor,
    residual: Tensor | None,
) -> int:
    """Iterations until every slot is done, at most ``most``: ``watch`` (workspace.Watch) tells who,
    and receives the result and iterations of every row. Returns slots times iterations that ran.

    Operands as in ``iterate``, but the rows of u and mod are moved with their slots; norms (2,B)
    is overwritten by every iteration, ``residual`` (K,R) receives |f(x_j) - x_j| / |f(x_j)|.
    """
    b, t, d = x.shape
    inputs, outputs, addresses, weights = _operands(
        "solve", x, buffers, u, mod, w, acts, norms[None], 1
    )
    # an iteration writes a row of the table
    table = None if residual is None else residual[:most]
    r = len(watch.result)
    slots = {name: getattr(watch, name)[:b] for name in ("rows", "count", "cap", "place")}
    outputs += [
        ("u", u, (b, t, 2 * d), (x.dtype,)),
        ("mod", mod, (b, 6 * d), (x.dtype,)),
        *((name, slot, (b,), INTEGERS) for name, slot in slots.items()),
        ("used", watch.used, (r,), INTEGERS),
        ("result", watch.result, (r, t, d), (x.dtype,)),
        ("residual", table, (most, r), (torch.float32,)),
    ]
    check("solve", cpu.DEVICE, inputs, outputs, {("odd", "x")})
    told = (*slots.values(), watch.used, watch.result, residual)
    return cpu.native.solve(
        _sizes("solve", x, heads), addresses, row_stride(mod), weights, most,
        [0 if v is None else v.data_ptr() for v in told], r, tol,
    )  # fmt: skip
