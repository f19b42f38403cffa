"""The Triton operators under the interpreter: generated cases, planted faults, the optimiser.

float32 and float16: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import violation
from interpreter import inside, larger_tiles, outside, planted, run_inside
from operator_cases import (
    DTYPES,
    Case,
    Zone,
    fixed,
    fused_rows,
    generate,
    odd_attention,
    run_case,
)
from operator_specs import infinite_key
from torch import Tensor

from fpdm.kernels import implementations

pytest.importorskip("triton")
HALF = DTYPES["triton"]
CASES = [*generate(320, HALF), *fixed(HALF), *odd_attention(HALF)]
FUSED = [*(c for c in CASES if c.op in implementations.FUSED), *fused_rows(HALF)]


@outside
@pytest.mark.parametrize(
    "tests",
    ["test_cases and not attention", "test_fused",
     "not test_fused and not test_many and (attention or not test_cases)"],
)  # fmt: skip
def test_interpreter(tests: str) -> None:
    run_inside(__file__, "-k", tests)


@outside
@pytest.mark.slow
def test_interpreter_many() -> None:
    run_inside(__file__, "-m", "slow", "-k", "test_many")


def operators(impl: str = "triton") -> Any:
    return implementations.resolve(impl, "cpu", torch.float32)


@inside
def test_attention_of_an_infinite_key() -> None:
    assert infinite_key(operators(), HALF) == []


@inside
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    larger_tiles(case.t, monkeypatch)
    assert run_case(operators(), case) == []


@inside
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    larger_tiles(case.t, monkeypatch)
    assert run_case(operators("triton-fused"), case) == []


@inside
@pytest.mark.slow
@pytest.mark.parametrize("case", generate(2000, HALF, 2**22, seed=1), ids=str)
def test_many(case: Case) -> None:
    """2,000 cases, none of which the limit cuts."""
    assert run_case(operators(), case) == []


# module, kernel, a line of it, the same with a fault, the operator that must fail
PLANTED = {
    "epsilon": (
        "rows", "centre", "+ EPS)[:, None]", "+ 10 * EPS)[:, None]", "adaln"),
    "half-precision intermediate": (
        "rows", "load", "b_piece.to(tl.float32)", "b_piece.to(tl.float16).to(tl.float32)", "adaln"),
    "mask one key short": (
        "attention", "_attention_forward", "m_k = o_k < T\n", "m_k = o_k < T - 1\n", "attention"),
    "mask one key too long": (
        "attention", "_attention_forward", "m_k = o_k < T\n", "m_k = o_k <= T\n", "attention"),
    "mask one query short": (
        "attention", "_attention_backward_kv", "m_q = o_q < T\n", "m_q = o_q < T - 1\n",
        "attention_backward"),
    "store left out": (
        "gate_residual", "_gate_residual_forward", "tl.store(p_out + o, b_out, mask=m)",
        "tl.store(p_out + o, b_out, mask=m & (o_col < D - 1)[None, :])", "gate_residual"),
    "store past the end": (
        "mlp", "_gelu_forward", "m = o < n\n", "m = o <= n\n", "gelu"),
    "accumulator overwritten": (
        "rows", "_accumulate", "b_sum += tl.load(p_out + o_col, mask=m_col, other=0.0)", "pass",
        "adaln_backward"),
    "vector of the first sample": (
        "adaln", "_adaln_forward", "p_scale + i_b * s_scale", "p_scale", "adaln"),
    "column sums one row short": (
        "rows", "_column_sums", "(o_row < n)[:, None]", "(o_row < n - 1)[:, None]",
        "linear_wgrad"),
    "partial sums one row short": (
        "rows", "_add_rows", "(o_row < n)[:, None]", "(o_row < n - 1)[:, None]", "linear_wgrad"),
    "bias gradient overwritten": (
        "rows", "_add_rows", "b_out + tl.sum(b_sum, 0)", "tl.sum(b_sum, 0)", "linear_wgrad"),
    "total overwritten": (
        "mlp", "_gelu_backward", "b_total + b_dx.to(tl.float32)", "b_dx.to(tl.float32)",
        "gelu_backward"),
    "total before the derivative": (
        "mlp", "_gelu_backward", "b_total + b_dx.to(tl.float32)", "b_total + b_dy",
        "gelu_backward"),
    "norms with columns beyond the last": (
        "gemm_kernels", "linear_gate_residual", "b_new = tl.where(m, b_new, 0.0)", "pass",
        "linear_gate_residual"),
}  # fmt: skip


@inside
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the real kernels: one changed line, and the cases of its operator fail."""
    module, kernel, line, faulty, op = PLANTED[fault]
    real, copy = planted(module, line, faulty, tmp_path)
    impl, cases = ("triton-fused", FUSED) if module == "gemm_kernels" else ("triton", CASES)
    cases = [c for c in cases if c.op == op and c.t <= 64]
    monkeypatch.setattr(real, kernel, getattr(copy, kernel))
    assert any(run_case(operators(impl), case) for case in cases)


@inside
@pytest.mark.parametrize("copy", [None, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 1024, 3001])
def test_one_pass_adamw(n: int, copy: torch.dtype | None) -> None:
    """The contract for every buffer, and nothing outside of them is written."""
    from fpdm.kernels import adamw

    generator = torch.Generator().manual_seed(n)
    values = {k: torch.randn(n, generator=generator) for k in ("w", "g", "a", "v", "e")}
    values["v"].square_()
    zones = {k: Zone.of(torch.float32, n, i) for i, k in enumerate(values)}
    if copy:
        zones["copy"] = Zone.of(copy, n, len(zones))
    views = {k: zone.view((n,), (1,), 0, k != "g") for k, zone in zones.items()}
    for k, x in values.items():
        views[k].copy_(x)
    for zone in zones.values():
        zone.seal()
    step = {"c": 0.5, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "wd": 0.1, "lr": 1e-2, "d": 0.999, "t": 3}
    adamw.adamw_(*(views.get(k) for k in ("w", "g", "a", "v", "e", "copy")), scalars(**step))
    assert [line for zone in zones.values() if (line := zone.damage())] == []
    low, oracle = ({k: x.to(d) for k, x in values.items()} for d in (torch.float32, torch.float64))
    low, oracle = plain_adamw(low, **step), plain_adamw(oracle, **step)
    for k in ("w", "a", "v", "e"):
        assert violation(views[k], low[k], oracle[k], torch.float32) is None, k
    if copy:
        assert torch.equal(views["copy"], views["w"].to(copy))


def scalars(
    c: float, b1: float, b2: float, eps: float, wd: float, lr: float, d: float, t: int
) -> list[float]:
    """As fpdm.optim gives them."""
    return [c, b1, 1 - b1, b2, 1 - b2, eps, 1 - lr * wd, lr / (1 - b1**t),
            math.sqrt(1 - b2**t), 1 - d]  # fmt: skip


def plain_adamw(
    x: dict[str, Tensor], c: float, b1: float, b2: float, eps: float, wd: float, lr: float,
    d: float, t: int,
) -> dict[str, Tensor]:  # fmt: skip
    g = c * x["g"]
    a, v = b1 * x["a"] + (1 - b1) * g, b2 * x["v"] + (1 - b2) * g * g
    w = (1 - lr * wd) * x["w"] - lr * (a / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return {"w": w, "a": a, "v": v, "e": d * x["e"] + (1 - d) * w}


@inside
def test_bfloat16_is_refused_here() -> None:
    with pytest.raises(
        implementations.ImplError, match="dtype: got bfloat16, expected float32, float16"
    ):
        implementations.resolve("triton", "cpu", torch.bfloat16)
