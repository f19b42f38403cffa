"""Solvers: exact on linear maps, samples isolated, restarts, and the trained digits model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm import solvers
from fpdm.config import DiffusionConfig, SamplerConfig
from fpdm.data import Digits
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.model import FPDM
from fpdm.noise import SAMPLE_INIT, as_keys, normals
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
    for tol in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"tol: got (-1\.0|nan), expected none or"):
            solvers.solve(lambda x: x, torch.zeros(1, 2), solvers.Picard(), 1, tol=tol)
    with pytest.raises(ValueError, match="got 'newton', expected picard, anderson or broyden"):
        solvers.make("newton", 3, 1.0)


def test_a_solver_that_cannot_serve_is_refused() -> None:
    x, f = torch.ones(2, 3), torch.cos
    used = solvers.Anderson()
    solvers.solve(f, x, used, 3)
    for bad, told in (
        (used, "one with the history of another solve"),
        (solvers.Anderson, "a class"),
        ("anderson", "'anderson'"),
    ):
        with pytest.raises(ValueError, match=f"solver: got {told}, expected a new one"):
            solvers.solve(f, x, bad, 3)  # type: ignore[arg-type]
    for kind in (solvers.Anderson, solvers.Broyden):
        with pytest.raises(ValueError, match="window: got 0, expected at least 1"):
            kind(window=0)
        with pytest.raises(ValueError, match=r"window: got 2.5, expected an integer"):
            kind(window=2.5)
    for kind in (solvers.Picard, solvers.Anderson, solvers.Broyden):
        for b in (0.0, 5.0, -1, float("nan"), "half"):
            with pytest.raises(ValueError, match=f"damping: got {b!r}, expected a number above 0"):
                kind(damping=b)
    for wrong, told in ((2.0, "2.0, expected an integer"), (0, "0, expected at least 1")):
        with pytest.raises(ValueError, match=f"evaluations: got {told}"):
            solvers.solve(f, x, solvers.Picard(), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: got torch.int64, expected floating point"):
        solvers.solve(f, x.long(), solvers.Picard(), 3)
    with pytest.raises(ValueError, match=r"x: got shape \(4,\), expected \(B,...\)"):
        solvers.solve(f, torch.ones(4), solvers.Picard(), 3)
    with pytest.raises(ValueError, match="iterations: got 0, expected at least 1"):
        solvers.spectral_radius(f, x, 0)


def test_the_spectral_radius_of_a_constant_is_zero() -> None:
    found = solvers.spectral_radius(lambda v: 0.0 * v, torch.ones(2, 3), 6)
    assert found.tolist() == [0.0, 0.0]


def test_the_spectral_radius_takes_what_inference_mode_made() -> None:
    with torch.inference_mode():
        found = solvers.spectral_radius(lambda v: 0.5 * v, torch.ones(2, 3), 6)
    torch.testing.assert_close(found, torch.full((2,), 0.5))


# the trained digits model

TIMESTEPS = (999, 900, 800, 700, 600, 500, 400, 300, 200, 50)
SAMPLES = 64
EVALUATIONS = 32


class Trained:
    """Fixed-point problems of the shipped model: digits of the reference half, noised."""

    def __init__(self) -> None:
        self.model = FPDM.from_pretrained("fpdm/assets/digits_export")
        self.weights = PreparedWeights(self.model, torch.float32)
        x0, self.y = Digits("reference").batch(np.arange(SAMPLES))
        diffusion, g = Diffusion(DiffusionConfig(beta_end=0.006)), torch.Generator().manual_seed(0)
        self.x = torch.stack(
            [
                diffusion.q_sample(
                    x0, torch.full((SAMPLES,), t), torch.randn(x0.shape, generator=g)
                )
                for t in TIMESTEPS
            ]
        )

    def problem(self, rows: list[tuple[int, int]]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """f and its start h for (timestep's index, digit's index), one row of the batch each."""
        which, digits = (list(column) for column in zip(*rows))
        t, x = torch.tensor(TIMESTEPS)[which], self.x[which, digits]
        mod = self.model.modulation(t, self.y[digits], weights=self.weights)
        h = self.model.encode(x, mod, weights=self.weights)
        return self.model.fixed_point_map(h, mod, weights=self.weights), h

    def path(self, maker: Callable[[], solvers.Solver], rows: list[tuple[int, int]]) -> Tensor:
        """Smallest residual so far (EVALUATIONS, rows)."""
        with torch.no_grad():
            found = solvers.solve(*self.problem(rows), maker(), EVALUATIONS)
        return found.residual.cummin(0).values


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def paths(trained: Trained) -> dict[str, Tensor]:
    """(10 timesteps, evaluations, 64 samples)."""
    rows = [[(t, i) for i in range(SAMPLES)] for t in range(len(TIMESTEPS))]
    return {
        name: torch.stack([trained.path(MAKERS[name], part) for part in rows])
        for name in ("picard", "anderson")
    }


def test_anderson_needs_fewer_evaluations_than_picard(paths: dict[str, Tensor]) -> None:
    """Mean residual of 1e-4: earlier at 8 of 10 timesteps or more."""
    count = {name: (run.mean(2) >= 1e-4).sum(1) for name, run in paths.items()}
    assert int((count["anderson"] < count["picard"]).sum()) >= 8, count


def test_anderson_is_no_worse_at_equal_evaluations(paths: dict[str, Tensor]) -> None:
    ratio = paths["anderson"] / paths["picard"]
    assert (ratio <= 1.0).double().mean() >= 0.95
    assert ratio.max() <= 1.1


def test_anderson_leaves_a_slow_manifold(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digit 11 at t = 300 creeps at a residual of 3e-2; without the plain steps it would stay."""
    row = [(TIMESTEPS.index(300), 11)]
    plain, found = (trained.path(MAKERS[name], row) for name in ("picard", "anderson"))
    assert plain[8] < 1.5 * plain[24]
    assert found[-1] <= 1.1 * plain[-1]
    monkeypatch.setattr(solvers.Anderson, "patience", 10**9)
    assert trained.path(solvers.Anderson, row)[-1] > 3 * plain[-1]


def test_the_digits_stop_one_by_one(trained: Trained) -> None:
    """The shipped model under a tolerance: the same images' solutions, for fewer evaluations."""
    rows = [(t, 0) for t in range(len(TIMESTEPS))]
    with torch.no_grad():
        f, h = trained.problem(rows)
        exact = solvers.solve(f, h, solvers.Anderson(), 40).x
        found = solvers.solve(f, h, solvers.Anderson(), 40, tol=1e-3)
    assert found.residual.nan_to_num(1.0).amin(0).max() <= 1e-3
    assert agree({"tol": found}, exact)
    used = found.evaluations
    assert torch.equal((~found.residual.isnan()).sum(0), used)
    assert len(found.residual) == used.max() <= 20
    assert len(used.unique()) > 1


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_a_solve_takes_what_the_sampler_takes(trained: Trained, name: str) -> None:
    """One decides as the other: evaluations of a loop of one's own are the sampler's iterations."""
    labels, tol = [3, 7, 1], 1e-3
    config = SamplerConfig(steps=1, iters=40, tol=tol, guidance=1.0, solver=name)  # type: ignore[arg-type]
    sampler = Sampler(trained.model, Diffusion(DiffusionConfig(beta_end=0.006)), config)
    theirs = sampler.sample(labels, [0, 1, 2]).stats.iterations.flatten()
    x = normals(as_keys([0, 1, 2]), 0, 0, SAMPLE_INIT, (1, 8, 8))
    with torch.no_grad():
        mod = trained.model.modulation(torch.full((3,), 999), torch.tensor(labels))
        h = trained.model.encode(x, mod)
        f = trained.model.fixed_point_map(h, mod)
        solver = solvers.make(name, config.window, config.damping)
        ours = solvers.solve(f, h, solver, 40, tol=tol)
    assert torch.equal(ours.evaluations, theirs)
    assert len(theirs.unique()) > 1


def agree(runs: dict[str, solvers.Solution], exact: Tensor) -> bool:
    """Errors are residuals, but for the slowest contraction of these problems and rounding."""

    def size(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.double().flatten(1), dim=1)

    return all(
        bool((size(run.x - exact) <= (20 * least(run) + 1e-5) * size(exact)).all())
        for run in runs.values()
    )


def least(run: solvers.Solution) -> Tensor:
    return run.residual.nan_to_num(torch.inf).amin(0)


def test_solvers_agree_on_the_digits(trained: Trained) -> None:
    """Two digits at every timestep: one fixed point, and the best iterate of those evaluated."""
    rows = [(t, i) for t in range(len(TIMESTEPS)) for i in (0, 1)]
    runs, evaluated = {}, []
    with torch.no_grad():
        f, h = trained.problem(rows)

        def watched(z: Tensor) -> Tensor:
            evaluated.append(f(z))
            return evaluated[-1]

        exact = solvers.solve(f, h, solvers.Anderson(), 100).x
        for name, maker in MAKERS.items():
            evaluated.clear()
            run = runs[name] = solvers.solve(watched, h, maker(), 60)
            seen = torch.stack(evaluated)
            assert torch.equal(run.best, 59 - run.residual.flip(0).argmin(0)), name
            assert torch.equal(run.x, seen[run.best, torch.arange(len(rows))]), name
            assert run.residual.amin(0).max() <= 1e-3, name
        assert agree(runs, exact)
        # another map has another fixed point
        other = solvers.solve(lambda z: f(z) + 0.01 * h, h, solvers.Anderson(), 60)
        assert not agree({"other": other}, exact)
