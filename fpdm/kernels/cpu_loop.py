"""The fixed-point iteration on the processor as one call: csrc/cpu/loop.cpp and unroll.cpp.

    iterate           x_{j+1} = f(x_j), k times; equation and intermediates: fpdm.block
    solve             as often as every sample needs; who is done: fpdm.stopping
    unroll            m iterations that keep what their backward reads: fpdm.walk
    unroll_backward   that backward

All are the same kernels in the same order as ``step_forward`` and ``step_backward`` on
``fpdm.kernels.cpu``, so results are the same bits. What is saved is the host's part between two
kernels, some 15 to 25 microseconds each, which a small model notices: its kernels take 10 to 50. A
signal is seen within a tenth of a second or one iteration, whichever is longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpdm.kernels import cpu
from fpdm.kernels.cpu import address
from fpdm.kernels.launch import LaunchError, Operand, check, head_width, row_stride

if TYPE_CHECKING:
    from fpdm.block import Activations, BlockGrads, BlockWeights, Scratch
    from fpdm.walk import Kept

INTEGERS = (torch.int64,)


def loops(residual: torch.dtype, compute: torch.dtype) -> bool:
    """Whether these loops run for iterates of dtype ``residual`` and products in ``compute``: one
    dtype, whose products csrc/cpu computes itself."""
    return residual == compute and compute in cpu.CODES and compute not in cpu.LIBRARY_PRODUCTS


def _present(op: str, named: dict[str, Tensor | None]) -> None:
    # the check passes over what is not given, and a kernel would read address 0
    for name, value in named.items():
        if value is None:
            raise LaunchError(f"{op}: {name}: got none, expected a tensor")


def _products(d: int) -> dict[str, tuple[int, int]]:
    """(O,I) of the weights of A W2 qkv proj fc1 fc2, in the order of csrc/cpu/block.h."""
    return {
        "a": (2 * d, d), "w2": (d, 2 * d),
        "qkv": (3 * d, d), "proj": (d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d),
    }  # fmt: skip


def _sizes(op: str, x: Tensor, heads: int) -> list[int]:
    head_width(op, x.shape[-1], heads)
    return [*x.shape, cpu.CODES[x.dtype], heads]


def _addends(u: Tensor | None, mod: Tensor) -> list[int]:
    return [address(u), mod.data_ptr(), row_stride(mod)]


def _weights(
    op: str, w: BlockWeights, d: int, injected: bool, dtype: torch.dtype, plain: bool = False
) -> tuple[list[Operand], list[int]]:
    """Weights as operands; and their addresses, row distances and biases, in the order of
    ``_products``. ``plain``: packed weights are refused."""
    given = [(w.inj_a, None), (w.inj_w2, w.inj_b2), *zip(w[0:8:2], w[1:8:2])]
    operands: list[Operand] = []
    addresses: list[int] = []
    for (name, (o, i)), (weight, bias) in zip(_products(d).items(), given):
        if not injected and name in ("a", "w2"):
            addresses += [0, 0, 0]
            continue
        _present(op, {name: weight} | ({} if name == "a" else {f"{name} bias": bias}))
        assert weight is not None
        stride, operand = cpu.weight_operand(weight, o, i, name)
        shape = (o, i) if plain else operand[2]
        operands += [(name, weight, shape, (dtype,)), (f"{name} bias", bias, (o,), (dtype,))]
        addresses += [weight.data_ptr(), stride, address(bias)]
    return operands, addresses


def _iteration(
    op: str, x: Tensor, z: tuple[Tensor, Tensor], u: Tensor | None, w: BlockWeights,
    acts: Activations, norms: Tensor | None, count: int,
) -> tuple[list[Operand], list[Operand], list[int], list[int]]:  # fmt: skip
    """Inputs, outputs, the weights' addresses with distances, and those of the buffers."""
    b, t, d = x.shape
    _present(op, {"wide": acts.h, "y": acts.y1, "o": acts.o})
    dtype = (x.dtype,)
    weights, addresses = _weights(op, w, d, u is not None, x.dtype)
    outputs: list[Operand] = [
        ("even", z[0], x.shape, dtype),
        ("odd", z[1], x.shape, dtype),
        ("wide", acts.h, (b, t, 4 * d), dtype),
        ("y", acts.y1, x.shape, dtype),
        ("o", acts.o, x.shape, dtype),
        ("norms", norms, (count, 2, b), (torch.float32,)),
    ]
    buffers = [address(v) for v in (x, *z, acts.h, acts.y1, acts.o, norms)]
    return [("x", x, x.shape, dtype), *weights], outputs, addresses, buffers


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
    inputs, outputs, *addresses = _iteration("iterate", x, buffers, u, w, acts, norms, k)
    inputs += [("u", u, (b, t, 2 * d), (x.dtype,)), ("mod", mod, (b, 6 * d), (x.dtype,))]
    check("iterate", cpu.here.device, inputs, outputs, {("odd", "x")})
    cpu.native.iterate(_sizes("iterate", x, heads), _addends(u, mod), *addresses, k)
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
    inputs, outputs, *addresses = _iteration("solve", x, buffers, u, w, acts, norms[None], 1)
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
    check("solve", cpu.here.device, inputs, outputs, {("odd", "x")})
    told = (*slots.values(), watch.used, watch.result, residual)
    return cpu.native.solve(
        _sizes("solve", x, heads), _addends(u, mod), *addresses, most,
        [address(v) for v in told], r, tol,
    )  # fmt: skip


def _kept(k: Kept) -> tuple[list[Operand], list[int]]:
    """Iterates and slots as operands; and the addresses of x_0, the iterates and the slots, then
    ``Kept.layout``."""
    b, t, d = k.x.shape
    dtype, units = (k.x.dtype,), b * t * d
    between = 0 if k.recompute == "elementwise" else k.m - 1
    operands: list[Operand] = [
        ("xs", k.xs, (between, b, t, d), dtype),
        ("residual", k.residual.view(-1), (k.m * k.layout[0] * units,), dtype),
        ("compute", k.compute.view(-1), (k.m * k.layout[1] * units,), dtype),
    ]
    return operands, [*(address(v) for v in (k.x, k.xs, k.residual, k.compute)), *k.layout]


def unroll(
    k: Kept,
    part: slice,
    w: BlockWeights,
    heads: int,
    work: Activations,
    between: list[Tensor],
    out: Tensor,
    table: Tensor,
) -> None:
    """The m iterations of a part of the batch (fpdm.walk): slots and iterates of ``k``, ``out``
    (B,T,D) and ``table`` (m or 0,2,B) are written in its rows. Everything is of one dtype, but for
    the norms; ``work`` and ``between`` are the part's."""
    b, t, d = k.x.shape
    rows, dtype = (part.stop - part.start, t, d), (k.x.dtype,)
    weights, addresses = _weights("unroll", w, d, k.injected, k.x.dtype)
    slots, kept = _kept(k)
    needed: dict[str, Tensor | None] = {"u": k.u} if k.injected else {}
    if k.recompute != "none":
        needed |= {"wide": work.gh, "y": work.y1}
    if k.recompute == "full":
        needed["o"] = work.o
    z = [between[j] if j < len(between) else None for j in range(2)]
    if k.recompute == "elementwise":
        needed |= dict(list(zip(("even", "odd"), z))[: k.m - 1])
    _present("unroll", needed)
    inputs: list[Operand] = [("x", k.x, k.x.shape, dtype), *weights]
    inputs += [("mod", k.mod, (b, 6 * d), dtype)]
    # without injection nothing would say whose u it is
    inputs += [("u", k.u, (b, t, 2 * d) if k.injected else (0,), dtype)]
    outputs: list[Operand] = [
        *slots,
        ("wide", work.gh, (*rows[:2], 4 * d), dtype),
        ("y", work.y1, rows, dtype),
        ("o", work.o, rows, dtype),
        ("even", z[0], rows, dtype),
        ("odd", z[1], rows, dtype),
        ("out", out, k.x.shape, dtype),
        ("norms", table, (len(table), 2, b), (torch.float32,)),
    ]
    check("unroll", cpu.here.device, inputs, outputs)
    cpu.native.unroll(
        _sizes("unroll", k.x, heads), _addends(k.u, k.mod), addresses, k.m, kept,
        [part.start, rows[0]], [address(v) for v in (work.gh, work.y1, work.o, *z, out, table)],
    )  # fmt: skip


def _sums(grads: BlockGrads | None, d: int, injected: bool) -> tuple[list[Operand], list[int]]:
    """Accumulators, and addresses with distances in the order of the weights; 0: frozen."""
    if grads is None:
        return [], [0] * 18
    half = None if grads.inj_w1 is None else grads.inj_w1[:, :d]
    given = [(half, None), (grads.inj_w2, grads.inj_b2), *zip(grads[0:8:2], grads[1:8:2])]
    operands: list[Operand] = []
    addresses: list[int] = []
    for (name, (o, i)), (weight, bias) in zip(_products(d).items(), given):
        if injected or name not in ("a", "w2"):
            _present("unroll_backward", {f"d{name}": weight})
        operands += [(f"d{name}", weight, (o, i), cpu.FLOAT)]
        operands += [(f"d{name} bias", bias, (o,), cpu.FLOAT)]
        addresses += [
            address(weight),
            0 if weight is None else weight.stride(0),
            address(bias),
        ]
    return operands, addresses


def unroll_backward(
    k: Kept,
    part: slice,
    w: BlockWeights,
    heads: int,
    grads: BlockGrads | None,
    input_grad: bool,
    g: Tensor,
    dmod: Tensor,
    du: Tensor | None,
    s: Scratch,
    again: Kept | None,
) -> None:
    """The m iterations of a part of the batch from the last to the first (fpdm.walk): ``g`` (b,T,D)
    becomes the gradient with respect to x_0, if ``input_grad``; those of the weights, of the
    modulation ``dmod`` (b,6D) and of the addend ``du`` (b,T,2D) are added, in float32. ``again``
    keeps what is recomputed in full."""
    b, t, d = k.x.shape
    rows, dtype = (part.stop - part.start, t, d), (k.x.dtype,)
    weights, addresses = _weights("unroll_backward", w, d, k.injected, k.x.dtype, plain=True)
    slots, kept = _kept(k)
    sums, added = _sums(grads, d, k.injected)
    needed = {"du": du} if k.injected else {}
    if k.recompute == "full":
        needed |= {"again": None if again is None else again.compute}
        needed |= {"u": k.u} if k.injected else {}
    _present("unroll_backward", needed)
    inputs: list[Operand] = [("x", k.x, k.x.shape, dtype), *weights, *slots]
    inputs += [("u", k.u, (b, t, 2 * d), dtype), ("mod", k.mod, (b, 6 * d), dtype)]
    outputs: list[Operand] = [
        *sums,
        ("dmod", dmod, (rows[0], 6 * d), cpu.FLOAT),
        ("du", du, (*rows[:2], 2 * d), cpu.FLOAT),
        ("wide", s.f, (4 * g.numel(),), dtype),
        *((name, v, rows, dtype) for name, v in (("d0", s.d0), ("d1", s.d1), ("e", s.e))),
        ("g", g, rows, dtype),
    ]
    anew: list[int] = []
    if again is not None:
        slots, anew = _kept(again)
        outputs += [(f"again {o[0]}", *o[1:]) for o in slots]
    check("unroll_backward", cpu.here.device, inputs, outputs)
    cpu.native.unroll_backward(
        _sizes("unroll_backward", k.x, heads), _addends(k.u, k.mod), addresses, k.m, kept,
        [part.start, rows[0]], [*added, dmod.data_ptr(), row_stride(dmod), address(du)],
        [address(v) for v in (s.f, s.d0, s.d1, s.e, g)], anew, input_grad,
    )  # fmt: skip
