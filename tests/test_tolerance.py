"""``solvers.solve`` under a tolerance: who is done, when, and what it changes for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_solvers import MAKERS
from torch import Tensor

from fpdm import solvers


@pytest.mark.parametrize("name", MAKERS)
def test_a_tolerance_ends_each_sample_on_its_own(name: str) -> None:
    """Contractions of 0.1 to 0.9: evaluations differ, and are the first that meet the tolerance."""
    f, exact = spread(6, 12)
    start, tol = torch.zeros_like(exact), 1e-6
    free = solvers.solve(f, start, MAKERS[name](), 200)
    calls: list[Tensor] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return f(x)

    found = solvers.solve(counted, start, MAKERS[name](), 200, tol=tol)
    used = found.evaluations
    first = (free.residual <= tol).to(torch.uint8).argmax(0)
    assert torch.equal(used, first + 1)
    assert torch.equal(found.best, first)
    assert len(used.unique()) > 2
    assert len(calls) == len(found.residual) == int(used.max())
    for sample, k in enumerate(used.tolist()):
        mine = found.residual[:, sample]
        assert torch.equal(mine[:k], free.residual[:k, sample])
        assert mine[k - 1] <= tol
        assert mine[k:].isnan().all()
        assert torch.equal(found.x[sample], f(calls[k - 1])[sample])
        # it stays where it is
        assert all(torch.equal(x[sample], found.x[sample]) for x in calls[k:])


def spread(b: int, n: int) -> tuple[Callable[..., Tensor], Tensor]:
    """As ``linear_map``, with |M| from 0.1 to 0.9 over the samples."""
    g = torch.Generator().manual_seed(5)
    m = torch.randn(b, n, n, generator=g, dtype=torch.float64)
    m *= (torch.linspace(0.1, 0.9, b) / torch.linalg.matrix_norm(m, 2)).view(-1, 1, 1)
    c = torch.randn(b, n, generator=g, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - m, c)
    return lambda x: (m @ x.unsqueeze(-1)).squeeze(-1) + c, exact


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lag", [0, 1])
def test_under_a_tolerance_a_sample_does_not_see_its_batch_mates(
    name: str, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone as among others, whose map breaks down once it is done, however late the host reads."""
    monkeypatch.setitem(solvers.LAG, "cpu", lag)
    f, exact = spread(4, 10)
    start = torch.zeros_like(exact)
    together = solvers.solve(f, start, MAKERS[name](), 100, tol=1e-7)
    assert len(together.evaluations.unique()) > 2
    assert (together.evaluations < 100).all()
    for sample, k in enumerate(together.evaluations.tolist()):

        def alone(x: Tensor, s: int = sample) -> Tensor:
            return f(x.expand(4, -1))[s : s + 1]

        one = solvers.solve(alone, start[:1], MAKERS[name](), 100, tol=1e-7)
        torch.testing.assert_close(one.x[0], together.x[sample], rtol=1e-10, atol=1e-10)
        assert int(one.evaluations) == k
        calls = 0

        def breaks_down(x: Tensor, s: int = sample, after: int = k) -> Tensor:
            nonlocal calls
            calls += 1
            y = f(x)
            y[s] = torch.where(torch.tensor(calls > after), torch.nan, y[s])
            return y

        broken = solvers.solve(breaks_down, start, MAKERS[name](), 100, tol=1e-7)
        assert torch.equal(broken.x, together.x)
        assert torch.equal(broken.evaluations, together.evaluations)
        assert torch.equal(broken.best, together.best)


def test_the_host_reads_a_flag_once_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late where it would wait, which costs one evaluation; never without a tolerance."""
    f, exact = spread(3, 8)
    start, reads = torch.zeros_like(exact), []
    read = solvers.Flag.read

    def watched(self: solvers.Flag, j: int) -> int | None:
        reads.append(read(self, j))
        return reads[-1]

    monkeypatch.setattr(solvers.Flag, "read", watched)
    solvers.solve(f, start, solvers.Picard(), 9)
    assert reads == []
    at_once = solvers.solve(f, start, solvers.Picard(), 90, tol=1e-4)
    assert len(reads) == len(at_once.residual)
    assert reads[-1] == 0
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    late = solvers.solve(f, start, solvers.Picard(), 90, tol=1e-4)
    assert len(late.residual) == len(at_once.residual) + 1
    assert late.residual[-1].isnan().all()
    assert torch.equal(late.x, at_once.x)
    assert torch.equal(late.evaluations, at_once.evaluations)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_gpu_stops_where_a_cpu_does(name: str) -> None:
    f, exact = spread(6, 12)
    start = torch.zeros_like(exact)
    want = solvers.solve(f, start, MAKERS[name](), 200, tol=1e-6)
    found = solvers.solve(lambda x: f(x.cpu()).cuda(), start.cuda(), MAKERS[name](), 200, tol=1e-6)
    assert torch.equal(found.evaluations.cpu(), want.evaluations)
    assert len(found.residual) == int(want.evaluations.max()) + 1
    torch.testing.assert_close(found.x.cpu(), want.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("evaluations", "tol"), [(7, None), (7, 0.0), (7, 1e-30), (1, 1e-30)])
def test_the_cap_counts(evaluations: int, tol: float | None) -> None:
    f, exact = spread(3, 8)
    found = solvers.solve(f, torch.zeros_like(exact), solvers.Picard(), evaluations, tol=tol)
    assert found.evaluations.tolist() == [evaluations] * 3
    assert found.residual.shape == (evaluations, 3)
    assert not found.residual.isnan().any()


def test_the_flag_lies_on_the_host() -> None:
    """Whatever device new tensors are made on."""
    left = torch.ones(1, dtype=torch.int64)
    with torch.device("meta"):
        flag = solvers.Flag(left)
    assert flag.read(0) == 1


def test_a_residual_of_nan_meets_no_tolerance() -> None:
    f, exact = spread(3, 8)

    def poisoned(x: Tensor) -> Tensor:
        y = f(x)
        y[1] = torch.nan
        return y

    found = solvers.solve(poisoned, torch.zeros_like(exact), solvers.Picard(), 80, tol=1e-3)
    assert int(found.evaluations[1]) == 80
    assert found.evaluations[::2].max() < 80


def test_a_fixed_point_is_one_evaluation_away() -> None:
    """Zero is a tolerance: met where x = f(x) exactly."""
    x = torch.ones(2, 3)
    found = solvers.solve(lambda v: v.clone(), x, solvers.Anderson(), 50, tol=0.0)
    assert found.evaluations.tolist() == [1, 1]
    assert torch.equal(found.x, x)


def test_the_plain_iteration_can_be_differentiated_through() -> None:
    """The gradient of a sample is that of the evaluations it took, unrolled."""
    f, exact = spread(6, 12)
    offset = torch.zeros_like(exact).requires_grad_()
    start = torch.zeros_like(exact)
    found = solvers.solve(lambda x: f(x) + offset, start, solvers.Picard(), 50, tol=1e-3)
    (grad,) = torch.autograd.grad(found.x.sum(), offset)
    for sample, k in enumerate(found.evaluations.tolist()):
        x = start
        for _ in range(k):
            x = f(x) + offset
        (expected,) = torch.autograd.grad(x[sample].sum(), offset)
        torch.testing.assert_close(grad[sample], expected[sample])


def no_freeze(solver: Any, best: Any, x: Tensor, fx: Tensor, before: Tensor, done: Tensor) -> Any:
    return solver.advance(x, fx)


def one_for_all(done: Tensor, count: Tensor, r: Tensor, *rest: Any) -> None:
    MARK(done, count, r.nan_to_num(0.0).max().expand(len(r)), *rest)


def counts_on(done: Tensor, count: Tensor, r: Tensor, *rest: Any) -> None:
    MARK(done, count, r, *rest)
    count.fill_(int(count.max()))


MARK = solvers.mark


@pytest.mark.parametrize(
    ("name", "fault"), [("proceed", no_freeze), ("mark", one_for_all), ("mark", counts_on)]
)
def test_planted_faults_of_the_tolerance_are_seen(
    name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, name, fault)
    with pytest.raises(AssertionError):
        test_a_tolerance_ends_each_sample_on_its_own("picard")
