"""csrc/cpu on the generated cases, whatever the number of threads. How it is built, loaded and how
exact its GELU is: test_native_build.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operator_cases import (
    DTYPES,
    Case,
    execute,
    fixed,
    generate,
    odd_attention,
    run_case,
    values_of,
)
from operator_specs import SPECS

from fpdm.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.native is None, reason=f"csrc/cpu: {cpu.unavailable(torch.device('cpu'), None)}"
)
KINDS = DTYPES["cpu"]
CASES = [*generate(320, KINDS), *fixed(KINDS), *odd_attention(KINDS)]
MANY = generate(2000, KINDS, 2**22, seed=1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    assert run_case(cpu, case) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many(part: int) -> None:
    """2,000 cases, none of which the limit cuts."""
    assert [line for case in MANY[part::8] for line in run_case(cpu, case)] == []


def bits(case: Case) -> dict[str, bytes]:
    found, _ = execute(cpu, case, values_of(case))
    return {n: x.contiguous().view(torch.uint8).numpy().tobytes() for n, x in found.items()}


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads(op: str) -> None:
    mine = [c for c in CASES if c.op == op]
    torch.set_num_threads(1)
    wanted = [bits(c) for c in mine]
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        for case, want in zip(mine, wanted):
            assert bits(case) == want, (str(case), n)


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.usefixtures("threads")
def test_a_thousand_repeats(op: str) -> None:
    """With 8 threads; the next thing may lie in the caches or not, the bits are the same."""
    torch.set_num_threads(8)
    mine = [c for c in CASES if c.op == op and c.b > 1 and 7 <= c.t <= 64][:4]
    wanted = [bits(c) for c in mine]
    for i in range(1000):
        assert bits(mine[i % 4]) == wanted[i % 4]


def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the native kernels are given: the vectors of the first sample for all."""
    mine = [c for c in CASES if c.op == "adaln"]
    monkeypatch.setattr(cpu, "row_stride", lambda t: 0)
    assert any(run_case(cpu, c) for c in mine)
