"""The generated cases themselves: coverage, that the reference passes, and that faults do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import operator_cases as oc
import pytest
import torch
from operator_cases import Case, generate, run_case, thin
from torch import Tensor

from fpdm.kernels import reference
from fpdm.kernels.ops import OPERATORS

HALF = (torch.float32, torch.float16, torch.bfloat16)
CASES = [*generate(320, HALF, oc.CAP), *oc.fixed(HALF)]


def failures(module: Any, cases: list[Case]) -> list[str]:
    return [line for case in cases for line in run_case(module, case)]


def test_every_operator_has_cases() -> None:
    assert set(oc.SPECS) == set(OPERATORS)


@pytest.mark.parametrize("dtypes", [HALF, HALF[:2], HALF[::2]])
def test_coverage(dtypes: tuple[torch.dtype, ...]) -> None:
    """Every listed value in at least five of the short cases; the smallest and the largest sizes
    together; no case above the cap."""
    cases = generate(320, dtypes, oc.CAP)
    assert len(cases) >= 300
    assert max(c.b * c.t * c.d * (3 if "attention" in c.op else 1) for c in cases) <= oc.CAP
    found = thin(cases)
    wanted = {
        "op": tuple(oc.SPECS), "dtype": dtypes, "t": oc.TOKENS, "d": oc.WIDTHS, "b": (0, 1, 2, 3),
        "head size": oc.HEAD_SIZES, "layout": oc.LAYOUTS, "alias": (True, False),
        "residual": (None, torch.float32), "extreme": ("", "nan", "inf", "-inf", "constant"),
    }  # fmt: skip
    rare = {(k, v): found[k][v] for k, vs in wanted.items() for v in vs if found[k][v] < 5}
    assert not rare
    if torch.float16 in dtypes:
        assert found["extreme"]["65504"] >= 5
    large = list(oc.fixed(dtypes))
    for t, d in ((1, 48), (256, 1152), (1024, 1152)):
        assert any((c.t, c.d) == (t, d) for c in large)


def test_reference() -> None:
    assert failures(reference, CASES) == []


@pytest.mark.slow
def test_reference_many() -> None:
    assert failures(reference, generate(2000, HALF, 2**22, seed=1)) == []


def broken(**replaced: Any) -> SimpleNamespace:
    """The reference with some operators replaced."""
    return SimpleNamespace(**{n: getattr(reference, n) for n in OPERATORS} | replaced)


def wrong_eps(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor) -> None:
    xhat = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-5).to(scale.dtype)
    torch.addcmul(shift.unsqueeze(1), xhat, scale.unsqueeze(1) + 1, out=out)


def half_intermediate(x: Tensor, out: Tensor) -> None:
    coarse = torch.bfloat16 if x.dtype != torch.bfloat16 else torch.float8_e4m3fn
    reference.gelu(x.to(coarse).to(x.dtype), out=out)


def short_mask(qkv: Tensor, heads: int, out: Tensor) -> None:
    """The last key is forgotten."""
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).float()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if t > 1:
        scores[..., -1] = -torch.inf
    out.copy_((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, width // 3))


def missing_store(z: Tensor, y: Tensor, gate: Tensor, out: Tensor, **kw: Any) -> None:
    if out.shape[1] > 1:
        whole = reference.gate_residual(z, y, gate, **kw)
        out[:, :-1] = whole[:, :-1]
        return
    reference.gate_residual(z, y, gate, out=out, **kw)


def past_the_end(x: Tensor, out: Tensor) -> None:
    reference.gelu(x, out=out)
    if out.numel():
        flat = out.as_strided((out.numel() + 1,), (1,), out.storage_offset())
        flat[-1] = 0.0


def overwrites(dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, ds: Tensor, dc: Tensor) -> None:
    dz.zero_()
    reference.adaln_backward(dy, z, scale, dz, ds, dc)


def scribbles(dout: Tensor, y: Tensor, gate: Tensor, dgate: Tensor, out: Tensor) -> None:
    reference.gate_residual_backward(dout, y, gate, dgate, out=out)
    y.mul_(2.0)


def leaks(x: Tensor, out: Tensor) -> None:
    reference.gelu(x, out=out)
    out += 0.0 * x.sum()


def next_sample(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor) -> None:
    reference.adaln(z, shift.roll(1, 0), scale, out=out)


PLANTED: dict[str, dict[str, Any]] = {
    "wrong epsilon": {"adaln": wrong_eps},
    "half-precision intermediate": {"gelu": half_intermediate},
    "mask off by one": {"attention": short_mask},
    "missing store": {"gate_residual": missing_store},
    "write past the end": {"gelu": past_the_end},
    "accumulator overwritten": {"adaln_backward": overwrites},
    "input changed": {"gate_residual_backward": scribbles},
    "batch-mate leaks": {"gelu": leaks},
    "vector of the next sample": {"adaln": next_sample},
}


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planted_faults_are_caught(fault: str, dtype: torch.dtype) -> None:
    """Each, by the cases of its operator in that dtype."""
    if fault == "wrong epsilon" and dtype != torch.float32:
        pytest.skip("1e-5 for 1e-6 is below half precision's rounding")
    (op,) = PLANTED[fault]
    mine = [c for c in CASES if c.op == op and c.dtype == dtype]
    assert failures(broken(**PLANTED[fault]), mine)
