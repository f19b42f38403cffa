"""The one check that every launcher runs before it hands pointers to a kernel.

A kernel sees addresses, not tensors: what torch would refuse, it would read or write. The check
reads metadata only: no synchronisation, no allocation. It knows no implementation, so Triton,
csrc/cuda and csrc/cpu share it. What passed is remembered by everything that it depends on, since
the same operands come back step after step: 4 instead of 40 microseconds, in a loop whose kernels
take 20 to 100. They seldom have the same addresses, which count only where bytes may be shared.

Layout rule of all operators: an operand is contiguous, except that the rows of a two-dimensional
vector or weight may lie at any distance (a chunk of (B,6D), one vector expanded over the batch, a
column slice of a weight), with unit stride inside a row. What is named in ``DENSE`` is contiguous
in two dimensions too: kernels walk over it as one run of elements.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fpdm.settings import UserError

DENSE = frozenset(
    ("x", "y", "z", "p", "pre", "out", "z_out", "prev", "total", "addend", "norms",
     "dy", "dz", "dout")
)  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
# name, tensor (None: not given), expected shape, accepted dtypes
Operand = tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]
# first and one past the last byte, row distance and row width in bytes (0: one dense run), and the
# tensor with its name
Span = tuple[int, int, int, int, Tensor | None, str]


# what has passed ``check``. Key: all that it reads except addresses. Value: the operands' extents
# in bytes, and the alignments and overlaps that it accepted. Emptied when full
_passed: dict[tuple[object, ...], tuple[tuple[int, ...], set[tuple[object, ...]]]] = {}
REMEMBERED = 2048


class LaunchError(UserError):
    """An operand that a kernel cannot take: one line with operator, operand, got and expected."""


def check(
    op: str,
    device: torch.device,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    may_alias: Collection[tuple[str, str]] = (),
    align: int = 1,
) -> None:
    """Raises LaunchError unless every operand is what a kernel may be given.

    Checked: device, dtype, shape, layout (see above), that all elements lie inside the storage,
    addresses and row distances in multiples of ``align`` bytes, that no output overlaps itself or
    another operand. ``may_alias`` lists pairs (output, other) that may be the very same view.
    Accumulators are outputs. An operand whose tensor is None is skipped.
    """
    key = (op, device, align, *may_alias, *map(_facts, inputs), None, *map(_facts, outputs))
    starts = [0 if o[1] is None else o[1].data_ptr() for o in (*inputs, *outputs)]
    known = _passed.get(key)
    if known is not None and _placed(starts, known[0], len(inputs), align) in known[1]:
        return
    extents = _check(op, device, inputs, outputs, may_alias, align)
    if len(_passed) >= REMEMBERED or (known is not None and len(known[1]) >= REMEMBERED):
        _passed.clear()
    places = _passed.setdefault(key, (extents, set()))[1]
    places.add(_placed(starts, extents, len(inputs), align))


def _placed(
    starts: Sequence[int], extents: Sequence[int], inputs: int, align: int
) -> tuple[object, ...]:
    """What the check reads of the addresses: their remainders, and (output, other, distance) of
    every pair whose bytes may be shared."""
    found: list[object] = [s % align for s in starts] if align > 1 else []
    for i in range(inputs, len(starts)):
        start, extent = starts[i], extents[i]
        for j in range(i):
            distance = starts[j] - start
            if -extents[j] < distance < extent:
                found.append((i, j, distance))
    return tuple(found)


def _facts(operand: Operand) -> tuple[object, ...]:
    """All that the check reads of an operand but its address, and what is expected of it."""
    name, t, shape, dtypes = operand
    if t is None:
        return (name,)
    return (
        name, t.dtype, t.device, t.shape, t.stride(), t.storage_offset(),
        t.untyped_storage().nbytes(), shape, dtypes,
    )  # fmt: skip


def _check(
    op: str,
    device: torch.device,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    may_alias: Collection[tuple[str, str]],
    align: int,
) -> tuple[int, ...]:
    """The check itself. Returns bytes from first to last of every operand, 0 where not given."""
    spans = [_span(op, device, align, o) for o in inputs]
    for operand in outputs:
        span = _span(op, device, align, operand)
        start, end, distance, width, _, name = span
        if distance < width:
            _refuse(op, name, f"rows {distance} bytes apart", f"at least {width} in an output")
        for other in spans:
            if start < other[1] and other[0] < end and _overlap(span, other):
                _allow(op, span, other, may_alias)
        spans.append(span)
    return tuple(end - start for start, end, *_ in spans)


def aligned(tensors: Iterable[Tensor | None], align: int) -> bool:
    """Whether addresses and row distances of all are multiples of ``align`` bytes, so that a
    launcher may choose its vectorised kernel."""
    return all(t is None or not _misalignment(t, align) for t in tensors)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, callable in kernels too, takes 20 us a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def library(dtype: torch.dtype | None) -> tuple[str, ...]:
    """Operators of a GPU's sets that are the library's in every ``dtype``, and counted as such."""
    return "linear", "linear_dgrad", "linear_wgrad"


def head_width(op: str, d: int, heads: int) -> int:
    """Width of a head. Raises LaunchError unless ``heads`` divide d: kernels divide by them."""
    if heads < 1 or d % heads:
        raise LaunchError(f"{op}: heads: got {heads}, expected a divisor of the width {d}")
    return d // heads


def row_stride(t: Tensor) -> int:
    """Elements between the rows of a (B,D) operand; 0 where one row serves all, and for B <= 1."""
    return t.stride(0) if t.shape[0] > 1 else 0


def _span(op: str, device: torch.device, align: int, operand: Operand) -> Span:
    name, t, shape, dtypes = operand
    if t is None:
        return 0, 0, 0, 0, t, name
    if t.device != device:
        _refuse(op, name, str(t.device), str(device))
    if t.dtype not in dtypes:
        _refuse(op, name, _dtypes((t.dtype,)), _dtypes(dtypes))
    if t.shape != shape:
        _refuse(op, name, str(tuple(t.shape)), str(tuple(shape)))
    size, count, distance, width = t.element_size(), t.numel(), 0, 0
    if count == 0:
        return 0, 0, 0, 0, t, name
    extent = count
    if not t.is_contiguous():
        whole = len(shape) != 2 or name in DENSE
        if whole or (t.stride(1) != 1 and shape[1] > 1):
            what = "contiguous" if whole else "unit stride in the last dimension"
            _refuse(op, name, f"strides {t.stride()}", what)
        distance, width = t.stride(0) * size, shape[1] * size
        extent = (shape[0] - 1) * t.stride(0) + shape[1]
    room = t.untyped_storage().nbytes() - (t.storage_offset() + extent) * size
    if room < 0:
        _refuse(op, name, f"{-room} bytes past the end of its storage", "all elements inside")
    if align > 1 and (off := _misalignment(t, align)):
        _refuse(op, name, f"{off} bytes off", f"alignment to {align} bytes")
    start = t.data_ptr()
    return start, start + extent * size, distance, width, t, name


def _misalignment(t: Tensor, align: int) -> int:
    if t.is_contiguous():
        distance = t.shape[-1] if t.numel() > t.shape[-1] else 0
    else:
        distance = t.stride(0)
    return t.data_ptr() % align or distance * t.element_size() % align


def _overlap(a: Span, b: Span) -> bool:
    """Whether two operands whose byte ranges intersect share a byte; rows at equal distances may
    interleave, as the chunks of one (B,6D) do. What cannot be told apart counts as shared."""
    if not (a[3] and a[2] == b[2]):
        return True
    shift = (b[0] - a[0]) % a[2]
    return shift < a[3] or shift + b[3] > a[2]


def _allow(op: str, out: Span, other: Span, may_alias: Collection[tuple[str, str]]) -> None:
    a, b = out[4], other[4]
    assert a is not None
    assert b is not None
    declared = (out[5], other[5]) in may_alias or (other[5], out[5]) in may_alias
    if not declared:
        _refuse(op, out[5], f"memory shared with {other[5]}", "memory of its own")
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    if not (same and a.dtype == b.dtype):
        _refuse(op, out[5], f"memory partly shared with {other[5]}", "the same view or none of it")


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _dtypes(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(dtype_name, dtypes))


def _refuse(op: str, name: str, got: str, expected: str) -> NoReturn:
    raise LaunchError(f"{op}: {name}: got {got}, expected {expected}")
