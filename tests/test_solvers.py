"""Solvers: exact on linear maps, samples isolated, restarts, and the trained digits model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm import solvers
from fpdm.config import DiffusionConfig
from fpdm.data import Digits
from fpdm.diffusion import Diffusion
from fpdm.model import FPDM
from fpdm.weights import PreparedWeights

MAKERS: dict[str, Callable[[], solvers.Solver]] = {
    "picard": solvers.Picard,
    "damped": lambda: solvers.Picard(0.7),
    "anderson": solvers.Anderson,
    "broyden": solvers.Broyden,
}


def linear_map(b: int, n: int, norm: float, seed: int = 0) -> tuple[Callable[..., Tensor], Tensor]:
    """x -> M x + c with |M| = norm per sample, float64, and its fixed point (b, n)."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(b, n, n, generator=g, dtype=torch.float64)
    m *= norm / torch.linalg.matrix_norm(m, 2).view(-1, 1, 1)
    c = torch.randn(b, n, generator=g, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - m, c)

    def f(x: Tensor) -> Tensor:
        return (m @ x.unsqueeze(-1)).squeeze(-1) + c

    return f, exact


@pytest.mark.parametrize("name", MAKERS)
def test_all_agree_at_convergence(name: str) -> None:
    f, exact = linear_map(5, 24, 0.8)
    found = solvers.solve(f, torch.zeros_like(exact), MAKERS[name](), 150)
    torch.testing.assert_close(found.x, exact, rtol=1e-9, atol=1e-9)
    assert found.residual.shape == (150, 5)
    assert found.residual[-1].max() < 1e-9


def test_anderson_ends_a_linear_problem_in_as_many_steps_as_dimensions() -> None:
    f, exact = linear_map(3, 4, 0.9)
    exactly = solvers.Anderson(window=6, ridge=0.0)
    found = solvers.solve(f, torch.zeros_like(exact), exactly, 4 + 1 + exactly.delay)
    torch.testing.assert_close(found.x, exact, rtol=1e-8, atol=1e-8)
    plain = solvers.solve(f, torch.zeros_like(exact), solvers.Picard(), 7)
    assert (plain.x - exact).abs().max() > 1e-3


def test_broyden_ends_a_linear_problem_in_twice_as_many() -> None:
    f, exact = linear_map(3, 4, 0.9)
    solver = solvers.Broyden(window=20, restart=1e9)
    found = solvers.solve(f, torch.zeros_like(exact), solver, 2 * 4 + 3)
    torch.testing.assert_close(found.x, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", MAKERS)
def test_a_solver_returns_the_best_it_evaluated(name: str) -> None:
    """An expanding map: every step is worse than the one before."""
    f, exact = linear_map(2, 6, 3.0)
    start = exact + 1e-3
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(f(x))
        return seen[-1]

    found = solvers.solve(watched, start, MAKERS[name](), 6)
    for sample in range(2):
        j = int(found.residual[:, sample].argmin())
        assert torch.equal(found.x[sample], seen[j][sample])
        assert int(found.best[sample]) == j


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_stays_alone(name: str, bad: float) -> None:
    f, exact = linear_map(3, 8, 0.8)
    clean = solvers.solve(f, torch.zeros_like(exact), MAKERS[name](), 12)

    def poisoned(x: Tensor) -> Tensor:
        y = f(x)
        y[1] = bad
        return y

    dirty = solvers.solve(poisoned, torch.zeros_like(exact), MAKERS[name](), 12)
    for sample in (0, 2):
        assert torch.equal(clean.x[sample], dirty.x[sample])
        assert torch.equal(clean.residual[:, sample], dirty.residual[:, sample])


@pytest.mark.parametrize("name", MAKERS)
def test_a_sample_does_not_see_its_batch_mates(name: str) -> None:
    f, exact = linear_map(4, 10, 0.8)
    together = solvers.solve(f, torch.zeros_like(exact), MAKERS[name](), 9)
    for sample in range(4):

        def alone(x: Tensor, s: int = sample) -> Tensor:
            return f(x.expand(4, -1))[s : s + 1]

        one = solvers.solve(alone, torch.zeros(1, 10).double(), MAKERS[name](), 9)
        torch.testing.assert_close(one.x[0], together.x[sample], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_finished_samples_can_be_dropped(name: str) -> None:
    f, exact = linear_map(4, 10, 0.8)
    rows = torch.tensor([3, 1])
    whole, part = MAKERS[name](), MAKERS[name]()
    x = torch.zeros_like(exact)
    for _ in range(5):
        y = whole.advance(x, f(x))
        assert torch.equal(part.advance(x, f(x)), y)
        x = y
    part.select(rows)
    small = x[rows]
    for _ in range(4):
        x = whole.advance(x, f(x))
        full = torch.zeros_like(exact)
        full[rows] = small
        small = part.advance(small, f(full)[rows])
        torch.testing.assert_close(small, x[rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_a_growing_residual_forgets_the_history(name: str) -> None:
    """The map changes under the solver: a step from the old history alone would be wrong."""
    (f, _), (other, exact) = linear_map(1, 6, 0.5), linear_map(1, 6, 0.5, seed=3)
    solver = MAKERS[name]()
    x = torch.zeros(1, 6, dtype=torch.float64)
    for _ in range(20):
        x = solver.advance(x, f(x))
    fx = other(x)
    assert torch.allclose(solver.advance(x, fx), fx)
    assert (fx - exact).norm() > 1e-3


def test_half_precision_keeps_its_dtype() -> None:
    f, exact = linear_map(2, 16, 0.7)
    for name, make in MAKERS.items():
        x = torch.zeros(2, 4, 4, dtype=torch.bfloat16)
        found = solvers.solve(
            lambda v: f(v.double().flatten(1)).view(2, 4, 4).bfloat16(), x, make(), 20
        )
        assert found.x.dtype == torch.bfloat16
        error = (found.x.double().flatten(1) - exact).norm() / exact.norm()
        assert error < 0.02, name


def test_spectral_radius() -> None:
    angle = torch.tensor(0.7)
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]).double()
    block = torch.zeros(2, 6, 6, dtype=torch.float64)
    block[:, :2, :2] = 0.9 * rotation
    block[0, 2:, 2:] = torch.diag(torch.tensor([0.5, 0.2, 0.1, -0.3]).double())
    block[1, 2:, 2:] = torch.diag(torch.tensor([1.2, 0.2, 0.1, -0.3]).double())
    g = torch.Generator().manual_seed(1)
    change = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    m = change @ block @ change.T

    def f(x: Tensor) -> Tensor:
        return (m @ x.unsqueeze(-1)).squeeze(-1)

    found = solvers.spectral_radius(f, torch.zeros(2, 6, dtype=torch.float64), 60)
    torch.testing.assert_close(found, torch.tensor([0.9, 1.2]).double(), rtol=1e-3, atol=0)


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="evaluations: got 0"):
        solvers.solve(lambda x: x, torch.zeros(1, 2), solvers.Picard(), 0)
    with pytest.raises(ValueError, match="got 'newton', expected picard, anderson or broyden"):
        solvers.make("newton", 3, 1.0)


TIMESTEPS = (999, 900, 800, 700, 600, 500, 400, 300, 200, 50)
EVALUATIONS = 24


@pytest.fixture(scope="module")
def paths() -> dict[str, Tensor]:
    """Smallest residual so far (10 timesteps, evaluations, 64 samples) on the trained digits."""
    model = FPDM.from_pretrained("fpdm/assets/digits_export")
    weights = PreparedWeights(model, torch.float32)
    diffusion = Diffusion(DiffusionConfig(beta_end=0.006))
    x0, y = Digits("reference").batch(np.arange(64))
    g = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in ("picard", "anderson", "broyden")}
    with torch.no_grad():
        for t in TIMESTEPS:
            times = torch.full((64,), t)
            x = diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=g))
            mod = model.modulation(times, y, weights=weights)
            h = model.encode(x, mod, weights=weights)

            def f(z: Tensor, h: Tensor = h, mod: object = mod) -> Tensor:
                return model.iterate(z, h, mod, 1, weights=weights)[0]

            for name in found:
                run = solvers.solve(f, h, MAKERS[name](), EVALUATIONS)
                found[name].append(run.residual.cummin(0).values)
    return {name: torch.stack(runs) for name, runs in found.items()}


def test_anderson_needs_fewer_evaluations_than_picard(paths: dict[str, Tensor]) -> None:
    """Mean residual of 1e-4: earlier at 8 of 10 timesteps or more."""
    count = {name: (run.mean(2) >= 1e-4).sum(1) for name, run in paths.items()}
    assert int((count["anderson"] < count["picard"]).sum()) >= 8, count


def test_anderson_is_no_worse_at_equal_evaluations(paths: dict[str, Tensor]) -> None:
    ratio = paths["anderson"] / paths["picard"]
    assert (ratio <= 1.0).double().mean() >= 0.95
    assert ratio.max() <= 1.1
