"""The launcher check: what it lets pass, and one planted fault for everything it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm.kernels import launch
from fpdm.kernels.launch import FLOATS, HALVES, LaunchError, aligned, check, row_stride
from fpdm.settings import UserError

B, T, D = 2, 3, 8
F32, F16 = torch.float32, torch.float16
CPU = torch.device("cpu")
Named = tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]


def z(name: str = "z", **fault: Any) -> Named:
    """A (B,T,D) operand."""
    return (
        name, fault.get("tensor", torch.zeros(B, T, D)), fault.get("shape", (B, T, D)),
        fault.get("dtypes", FLOATS),
    )  # fmt: skip


def vector(name: str, tensor: Tensor) -> Named:
    return name, tensor, (B, D), FLOATS


def chunks(dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    return torch.zeros(B, 6 * D, dtype=dtype).chunk(6, dim=-1)


def told(inputs: list[Named], outputs: list[Named], **options: Any) -> str:
    with pytest.raises(LaunchError) as error:
        check("op", options.pop("device", CPU), inputs, outputs, **options)
    assert isinstance(error.value, UserError)
    message = str(error.value)
    assert message.startswith("op: ")
    assert "\n" not in message
    assert ": got " in message
    assert ", expected " in message
    return message


def test_accepts_what_the_block_gives() -> None:
    s, a, g, *_ = chunks(F16)
    ds, da, dg, *_ = chunks()
    check("op", CPU, [z(), vector("s", s), vector("a", a), vector("g", g)], [z("out")])
    check("op", CPU, [z()], [z("dz"), vector("ds", ds), vector("da", da), vector("dg", dg)])


def test_accepts_other_views() -> None:
    one = torch.zeros(1, D).expand(B, D)
    check("op", CPU, [vector("row for all", one)], [z()])
    offset = torch.zeros(5 + B * T * D)[5:].view(B, T, D)
    check("op", CPU, [z(tensor=offset)], [z("out")])
    columns = torch.zeros(B, 2 * D)[:, :D]
    check("op", CPU, [], [vector("dW", columns)])
    check("op", CPU, [("bias", torch.zeros(D), (D,), FLOATS)], [z("out")])
    thin = torch.zeros(B, 6)[:, 2:3]
    check("op", CPU, [("width 1", thin, (B, 1), FLOATS)], [])
    single = torch.zeros(1, 6 * D).chunk(6, dim=-1)
    check("op", CPU, [], [(f"v{i}", v, (1, D), FLOATS) for i, v in enumerate(single)])


def test_skips_operands_that_are_not_given() -> None:
    check("op", CPU, [z(tensor=None)], [z("out"), z("norms", tensor=None)])


def test_batch_zero() -> None:
    empty = torch.zeros(0, T, D)
    operand = ("z", empty, (0, T, D), FLOATS)
    vectors = torch.zeros(0, 6 * D).chunk(6, dim=-1)
    named = [("v", v, (0, D), FLOATS) for v in vectors]
    check("op", CPU, [operand, *named], [("out", empty, (0, T, D), FLOATS)], align=16)


def test_device_dtype_shape() -> None:
    assert told([z()], [z("out")], device=torch.device("meta")) == ("op: z: got cpu, expected meta")
    half = z(tensor=torch.zeros(B, T, D), dtypes=HALVES)
    assert told([half], [z("out")]) == "op: z: got float32, expected float16 or bfloat16"
    assert told([z(shape=(B, T, 9))], []) == "op: z: got (2, 3, 8), expected (2, 3, 9)"
    assert told([], [z("out", shape=(B * T, D))]).startswith("op: out: got (2, 3, 8)")


def test_layout() -> None:
    turned = torch.zeros(B, D, T).transpose(1, 2)
    assert told([z(tensor=turned)], []) == "op: z: got strides (24, 1, 3), expected contiguous"
    gaps = torch.zeros(B, T, 2 * D)[..., :D]
    assert "expected contiguous" in told([z(tensor=gaps)], [])
    assert "unit stride in the last dimension" in told([vector("s", torch.zeros(D, B).t())], [])
    # rows of vectors and weights may lie apart, what a kernel walks over as one run may not
    spaced = torch.zeros(B, 2 * D)[:, :D]
    check("op", CPU, [vector("shift", spaced)], [vector("dshift", torch.zeros(B, D))])
    for name in ("x", "out", "norms"):
        assert "expected contiguous" in told([], [vector(name, spaced)])
    every_other = torch.zeros(2 * D)[::2]
    assert "expected contiguous" in told([("bias", every_other, (D,), FLOATS)], [])


@pytest.mark.parametrize("kept", [0, B * T * D - 1])
def test_storage_too_small(kept: int) -> None:
    freed = torch.zeros(B, T, D)
    freed.untyped_storage().resize_(4 * kept)
    missing = 4 * (B * T * D - kept)
    assert told([z(tensor=freed)], []) == (
        f"op: z: got {missing} bytes past the end of its storage, expected all elements inside"
    )


def test_strided_view_past_its_storage() -> None:
    last = chunks()[5]
    last.untyped_storage().resize_(4 * (B * 6 * D - 1))
    assert "got 4 bytes past the end" in told([vector("s", last)], [])
    first = chunks()[0]
    first.untyped_storage().resize_(4 * (7 * D))
    check("op", CPU, [vector("s", first)], [])


def test_alignment() -> None:
    off = torch.zeros(1 + B * T * D)[1:].view(B, T, D)
    check("op", CPU, [z(tensor=off)], [], align=4)
    assert (
        told([z(tensor=off)], [], align=16)
        == "op: z: got 4 bytes off, expected alignment to 16 bytes"
    )
    rows = torch.zeros(B, D + 1)[:, :D]
    assert "alignment to 16" in told([vector("s", rows)], [], align=16)
    odd = torch.zeros(B, T, 7)
    assert "12 bytes off" in told([("z", odd, (B, T, 7), FLOATS)], [], align=16)


def test_aligned() -> None:
    assert aligned([torch.zeros(B, T, D), None, *chunks()], 16)
    assert aligned([torch.zeros(1, 7)], 16)
    assert not aligned([torch.zeros(B, 7)], 16)
    assert not aligned([torch.zeros(B, T, D), torch.zeros(9)[1:]], 16)


def test_undeclared_alias() -> None:
    x = torch.zeros(B, T, D)
    message = "op: out: got memory shared with z, expected memory of its own"
    assert told([z(tensor=x)], [z("out", tensor=x)]) == message
    check("op", CPU, [z(tensor=x)], [z("out", tensor=x)], may_alias=[("out", "z")])
    assert told([z("y", tensor=x)], [z("out", tensor=x)], may_alias=[("out", "z")])


def test_two_outputs_in_one_buffer() -> None:
    x = torch.zeros(B, T, D)
    both = [z("pre", tensor=x), z("out", tensor=x)]
    assert "got memory shared with pre" in told([], both)
    check("op", CPU, [], both, may_alias=[("pre", "out")])


def test_partial_overlap_is_no_alias() -> None:
    flat = torch.zeros(1 + B * T * D)
    x, y = flat[:-1].view(B, T, D), flat[1:].view(B, T, D)
    message = told([z(tensor=x)], [z("out", tensor=y)], may_alias=[("out", "z")])
    assert (
        message == "op: out: got memory partly shared with z, expected the same view or none of it"
    )
    half = torch.zeros(0, dtype=F16).set_(x.untyped_storage(), 0, (B, T, D))
    assert "partly shared" in told([z(tensor=x)], [z("out", tensor=half)], may_alias=[("out", "z")])
    touching = torch.zeros(2 * B * T * D)
    before, after = touching.view(2, B, T, D).unbind(0)
    check("op", CPU, [z(tensor=before)], [z("out", tensor=after)])


def test_interleaved_rows() -> None:
    buffer = torch.zeros(B, 6 * D)
    left, right = buffer[:, :D], buffer[:, D - 1 : 2 * D - 1]
    assert "memory shared with left" in told([vector("left", left)], [vector("right", right)])
    assert "memory shared with right" in told([vector("right", right)], [vector("left", left)])
    check("op", CPU, [vector("left", left)], [vector("right", buffer[:, D : 2 * D])])
    # the last chunk of one row and the first of the next are neighbours
    check("op", CPU, [vector("first", left)], [vector("last", buffer[:, 5 * D :])])
    other_distance = torch.as_strided(buffer, (B, D), (2 * D, 1), D)
    assert "memory shared" in told([vector("left", left)], [vector("right", other_distance)])
    dense = buffer.view(-1)[: B * D].view(B, D)
    assert "memory shared" in told([vector("left", left)], [vector("out", dense)])


def test_output_that_overlaps_itself() -> None:
    one = torch.zeros(1, D).expand(B, D)
    assert told([], [vector("dgate", one)]) == (
        "op: dgate: got rows 0 bytes apart, expected at least 32 in an output"
    )
    sliding = torch.as_strided(torch.zeros(99), (B, D), (D - 1, 1))
    assert "rows 28 bytes apart" in told([], [vector("dgate", sliding)])
    check("op", CPU, [vector("gate", sliding)], [])


def test_row_stride() -> None:
    assert row_stride(chunks()[2]) == 6 * D
    assert row_stride(torch.zeros(1, D).expand(B, D)) == 0
    assert row_stride(torch.zeros(1, 6 * D)[:, D : 2 * D]) == 0


# field of ``launch._facts``, or None for where operands lie: (call that passes, call that must be
# refused and differs in it alone)
def remembered() -> dict[int | None, tuple[Any, Any]]:
    flat = np.zeros(3 * B * T * D, np.float32)
    size = B * T * D
    x, other, over = (
        torch.from_numpy(flat[i : i + size]).view(B, T, D) for i in (0, size, size // 2)
    )
    good = ([z(tensor=x)], [z("out", tensor=other)])
    turned = torch.from_numpy(flat).as_strided((B, T, D), (1, B, B * T))
    whole = torch.from_numpy(flat).as_strided((B, T, D), (T * D, D, 1))
    return {
        None: (good, ([z(tensor=x)], [z("out", tensor=over)])),
        1: (good, ([z(tensor=x.view(torch.int32))], [z("out", tensor=other)])),
        3: (good, ([z(tensor=x[:1])], [z("out", tensor=other)])),
        4: (([z(tensor=whole)], []), ([z(tensor=turned)], [])),
        7: (good, ([z(tensor=x, shape=(B, D, T))], [z("out", tensor=other)])),
        8: (good, ([z(tensor=x, dtypes=HALVES)], [z("out", tensor=other)])),
    }  # fmt: skip


@pytest.mark.parametrize("field", remembered())
def test_what_passed_is_remembered_with_all_that_it_depends_on(
    field: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call but for one thing is checked again, and refused; the plant forgets it."""
    good, bad = remembered()[field]
    monkeypatch.setattr(launch, "_passed", {})
    check("op", CPU, *good)
    told(*bad)
    facts = launch._facts

    def forgetful(operand: Named) -> tuple[object, ...]:
        found = facts(operand)
        return found if field is None else found[:field] + found[field + 1 :]

    monkeypatch.setattr(launch, "_passed", {})
    monkeypatch.setattr(launch, "_facts", forgetful)
    if field is None:
        monkeypatch.setattr(launch, "_placed", lambda *_: ())
    check("op", CPU, *good)
    check("op", CPU, *bad)


def test_other_addresses_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layouts elsewhere pass without being read again, overlaps at equal distances too."""
    for _ in range(2):
        both = torch.zeros(2, B, T, D)
        check("op", CPU, [z(tensor=both[0])], [z("out", tensor=both[1])])
        check("op", CPU, [], [vector(f"v{i}", v) for i, v in enumerate(chunks())])
        check("op", CPU, [z(tensor=both[0])], [z("out", tensor=both[0])], (("out", "z"),))
        monkeypatch.setattr(launch, "_check", None)


def test_memory_of_what_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass counts for its operator, aliases and alignment only; the memory is bounded."""
    passed: dict[Any, Any] = {}
    monkeypatch.setattr(launch, "_passed", passed)
    x, odd = torch.zeros(B, T, D), torch.zeros(1 + B * T * D)[1:].view(B, T, D)
    check("op", CPU, [z(tensor=x)], [z("out", tensor=x)], may_alias=(("out", "z"),))
    assert "memory shared" in told([z(tensor=x)], [z("out", tensor=x)])
    check("op", CPU, [z(tensor=odd)], [])
    assert "bytes off" in told([z(tensor=odd)], [], align=16)
    # an output is not an input
    row = torch.zeros(1, D).expand(B, D)
    check("op", CPU, [vector("row", row)], [])
    assert "bytes apart" in told([], [vector("row", row)])
    assert len(passed) == 3
    monkeypatch.setattr(launch, "REMEMBERED", 3)
    for n in range(9):
        check(f"op {n}", CPU, [z(tensor=x)], [])
    assert len(passed) <= 3
