"""The generated cases themselves: coverage, that the reference passes, and that faults do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import operator_cases as oc
import pytest
import torch
from operator_cases import CAP, DTYPES, Case, fixed, generate, run_case, supported
from operator_specs import SPECS, attended
from torch import Tensor

from fpdm.kernels import reference
from fpdm.kernels.implementations import OPERATORS

ALL = DTYPES["reference"]
CASES = [*generate(480, ALL), *fixed(ALL)]


def thin(cases: list[Case]) -> dict[str, Counter[Any]]:
    """How many cases hold each value, by field."""
    fields = ("op", "dtype", "b", "t", "layout", "extreme", "residual", "f")
    found = {n: Counter(getattr(c, n) for c in cases) for n in fields}
    found["fresh"] = Counter(bool(c.fresh) for c in cases)
    found["alias"] = Counter(f"{c.op}: {c.alias}" for c in cases)
    found["form"] = Counter(f"{c.op}: {c.form}" for c in cases)
    found["d"] = Counter(c.d for c in cases if "attention" not in c.op)
    found["head size"] = Counter(c.d // c.heads for c in cases if "attention" in c.op)
    return found


def failures(operators: Any, cases: list[Case]) -> list[str]:
    return [line for case in cases for line in run_case(operators, case)]


def test_every_operator_has_cases() -> None:
    assert set(SPECS) == set(OPERATORS)


@pytest.mark.parametrize("impl", DTYPES)
def test_coverage(impl: str) -> None:
    """Every listed value in at least five of the short cases, every form and alias of an operator
    in at least one; no operand above the cap."""
    dtypes = DTYPES[impl]
    cases = generate(160 * len(dtypes), dtypes)
    assert all(supported(impl, c) for c in cases)
    largest = max(c.b * c.t * c.d * (3 if "attention" in c.op else 1) for c in cases)
    assert largest <= CAP
    found = thin(cases)
    wanted: dict[str, Any] = {
        "op": SPECS, "dtype": dtypes, "t": oc.TOKENS, "d": oc.WIDTHS, "b": (0, 1, 2, 3),
        "head size": oc.HEAD_SIZES, "layout": oc.LAYOUTS, "extreme": ("", *oc.EXTREMES),
        "fresh": (True, False), "residual": (None, torch.float32),
    }  # fmt: skip
    rare = {(k, v): found[k][v] for k, vs in wanted.items() for v in vs if found[k][v] < 5}
    assert not rare
    forms = {f"{op}: {form}" for op, spec in SPECS.items() for form in spec.forms}
    aliases = {f"{op}: {alias}" for op, spec in SPECS.items() for alias in spec.aliases}
    assert forms <= set(found["form"])
    assert aliases <= set(found["alias"])


@pytest.mark.parametrize("impl", DTYPES)
def test_extreme_sizes(impl: str) -> None:
    """The smallest and largest T and D (head size) together, as far as the cap goes, and
    the published sizes outside it."""
    cases = generate(160 * len(DTYPES[impl]), DTYPES[impl])
    pairs = {(c.t, c.d) for c in cases if "attention" not in c.op}
    assert {(1, 48), (1, 1152), (1024, 48)} <= pairs
    heads = {(c.t, c.d // c.heads) for c in cases if "attention" in c.op}
    assert {(1, 12), (1, 80), (1024, 12)} <= heads
    large = {(c.op, c.t, c.d) for c in fixed(DTYPES[impl])}
    rows = {op for op in SPECS if "linear" not in op and "attention" not in op}
    assert {(op, 256, 1152) for op in rows} <= large
    assert {("attention", 1024, 72), ("attention_backward", 1024, 72)} <= large


def test_cases_are_distinct_and_repeatable() -> None:
    assert len({str(c) + str(c.seed) for c in CASES[:480]}) == 480
    assert generate(480, ALL) == CASES[:480]
    case = next(c for c in CASES if c.extreme == "nan")
    first, again, clean = (oc.values_of(case), oc.values_of(case), oc.values_of(case, clean=True))
    assert all(torch.equal(first[n].nan_to_num(), again[n].nan_to_num()) for n in first)
    assert not torch.equal(first[case.where], clean[case.where])


@pytest.mark.parametrize("op", SPECS)
def test_reference(op: str) -> None:
    assert failures(reference, [c for c in CASES if c.op == op]) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_reference_uncapped(part: int) -> None:
    cases = generate(2000, ALL, cap=2**30, seed=1)
    assert failures(reference, cases[part * 500 :][:500]) == []


def wrong_epsilon(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    z, shift, scale = v["z"], v["shift"], v["scale"]
    xhat = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-5).to(scale.dtype)
    return torch.addcmul(shift.unsqueeze(1), xhat, scale.unsqueeze(1) + 1, out=v.get("out"))


def coarse(name: str) -> Callable[..., Any]:
    """``name`` rounded to the next coarser dtype on the way in."""

    def fault(real: Callable[..., Any], v: dict[str, Any]) -> Any:
        x = v[name]
        lower = {torch.float32: torch.float16, torch.float16: torch.bfloat16}
        rounded = x.to(lower.get(x.dtype, torch.float8_e4m3fn)).to(x.dtype)
        return real(**{**v, name: rounded})

    return fault


def half_sum(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """Accumulated in half precision."""
    name = next(n for n in ("dweight", "dshift", "dgate") if n in v)
    exact = torch.zeros_like(v[name])
    result = real(**{**v, name: exact})
    v[name].add_(exact.half().float())
    return result


def short_mask(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """The last key is forgotten."""
    qkv, heads = v["qkv"], v["heads"]
    b, t, width = qkv.shape
    q, k, value = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).float()
    p = (q @ k[..., : max(1, t - 1), :].mT * q.shape[-1] ** -0.5).softmax(-1)
    y = (p @ value[..., : max(1, t - 1), :]).transpose(1, 2).reshape(b, t, width // 3)
    return y.to(qkv.dtype) if "out" not in v else v["out"].copy_(y)


def long_mask(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """One key too many is read, with the weight that a masked score has."""
    qkv, out = v["qkv"], real(**v)
    if qkv.numel():
        beyond = qkv.as_strided((1,), (1,), qkv.storage_offset() + qkv.numel())
        out += 0 * beyond
    return out


def missing_store(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """The last row keeps what was in the buffer."""
    if "out" not in v:
        return real(**v)
    kept = v["out"][:, -1].clone()
    result = real(**v)
    v["out"][:, -1] = kept
    return result


def past_the_end(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    result = real(**v)
    for n in ("out", "dshift"):
        if n in v and v[n].numel():
            last = sum((s - 1) * d for s, d in zip(v[n].shape, v[n].stride()))
            v[n].as_strided((1,), (1,), v[n].storage_offset() + last + 1).zero_()
    return result


def overwritten(name: str) -> Callable[..., Any]:
    def fault(real: Callable[..., Any], v: dict[str, Any]) -> Any:
        v[name].zero_()
        return real(**v)

    return fault


def input_changed(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    result = real(**v)
    v["y"].mul_(2.0)
    return result


def leaking(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """Zero times everything else: only a bad sample tells."""
    result = real(**v)
    result.add_(0 * next(x for x in v.values() if isinstance(x, Tensor)).sum())
    return result


def next_vector(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    return real(**{**v, "scale": v["scale"].roll(1, 0)})


def own_buffer(real: Callable[..., Any], v: dict[str, Any]) -> Any:
    """The result is right, but elsewhere."""
    result = real(**v)
    return result.clone()


PLANTED: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "wrong epsilon": (("adaln",), wrong_epsilon),
    "coarse x": (("gelu", "linear", "linear_add_gelu"), coarse("x")),
    "coarse dy": (("gelu_backward", "adaln_backward", "linear_dgrad"), coarse("dy")),
    "coarse y": (("gate_residual", "gate_residual_backward"), coarse("y")),
    "coarse qkv": (("attention", "attention_backward"), coarse("qkv")),
    "half-precision sum": (
        ("linear_wgrad", "adaln_backward", "gate_residual_backward"), half_sum),
    "mask one short": (("attention",), short_mask),
    "mask one too long": (("attention",), long_mask),
    "missing store": (
        ("gelu", "adaln", "gate_residual", "attention_backward", "adaln_linear"), missing_store),
    "write past the end": (("gelu", "adaln", "attention", "adaln_backward"), past_the_end),
    "dz overwritten": (("adaln_backward",), overwritten("dz")),
    "dgate overwritten": (("gate_residual_backward",), overwritten("dgate")),
    "dweight overwritten": (("linear_wgrad",), overwritten("dweight")),
    "input changed": (("gate_residual", "attention_backward"), input_changed),
    "leak between samples": (
        ("gelu", "adaln", "attention", "gate_residual", "linear"), leaking),
    "vector of the next sample": (("adaln", "adaln_backward", "adaln_linear"), next_vector),
    "another buffer": (("gelu", "adaln", "linear_gate_residual"), own_buffer),
}  # fmt: skip


def broken(op: str, fault: Callable[..., Any]) -> SimpleNamespace:
    """The reference with one faulty operator."""
    real = getattr(reference, op)
    return SimpleNamespace(**{op: lambda **given: fault(real, given)})


@pytest.mark.parametrize("dtype", ALL, ids=oc.dtype_name)
@pytest.mark.parametrize(
    ("fault", "op"), [(fault, op) for fault, (ops, _) in PLANTED.items() for op in ops]
)
def test_planted_fault_is_caught(fault: str, op: str, dtype: torch.dtype) -> None:
    if fault == "wrong epsilon" and dtype != torch.float32:
        pytest.skip("1e-5 for 1e-6 is below half precision's rounding")
    mine = [c for c in CASES if c.op == op and c.dtype == dtype]
    assert failures(broken(op, PLANTED[fault][1]), mine)


def test_oracle_attention_is_torch_s() -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    torch.testing.assert_close(
        attended(qkv.view(2, 5, 24), 2), want.transpose(1, 2).reshape(2, 5, 8)
    )
