"""Implicit and phantom gradients against the exact gradient of a converged contraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_model
from runs import small
from torch import Tensor

from fpdm import solvers
from fpdm.config import FixedPointConfig
from fpdm.gradients import Gradient, _solve_in_backward, iterated
from fpdm.model import FPDM
from fpdm.train import Trainer

NAMES = (
    "block_fixed_point.attn.qkv.weight", "block_fixed_point.mlp.fc2.bias",
    "block_fixed_point.adaLN_modulation.1.weight", "block_pre_projection.weight",
    "block_fixed_point_projection_fc1.weight", "blocks_pre.0.mlp.fc1.weight",
    "t_embedder.mlp.0.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def contraction() -> FPDM:
    """A float64 model whose map shrinks distances: its injection MLP passes on half of x."""
    model = random_model(TINY).double()
    assert isinstance(model, FPDM)
    with torch.no_grad():
        model.block_fixed_point_projection_fc2.weight.mul_(0.2)
    return model


def run(model: FPDM, iters: int, free: int, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=g).double()
    t, y = torch.tensor([7, 800]), torch.tensor([1, 10])
    found = model.solve(x, t, y, iters, free, **kwargs)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(found.output.square().sum(), [params[n] for n in NAMES])
    assert found.stats is not None
    return dict(zip(NAMES, grads)), found.stats.residual


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items())


@pytest.fixture(scope="module")
def exact(contraction: FPDM) -> dict[str, Tensor]:
    """Full unrolling of a solve that has converged."""
    grads, residual = run(contraction, 60, 0, detach_init=False)
    assert residual[-1].max() < 1e-13
    return grads


def test_implicit_gradient_is_exact(contraction: FPDM, exact: dict[str, Tensor]) -> None:
    found, residual = run(contraction, 1, 60, gradient=Gradient("implicit", 40))
    assert residual.shape == (61, 2)
    assert worst(found, exact) < 1e-9


def test_the_implicit_gradient_has_no_derivative(contraction: FPDM) -> None:
    x, t, y = torch.randn(1, 4, 8, 8).double(), torch.tensor([7]), torch.tensor([1])
    found = contraction.solve(x, t, y, 2, gradient=Gradient("implicit")).output.sum()
    with pytest.raises(NotImplementedError, match="got create_graph=True with the implicit"):
        torch.autograd.grad(found, contraction.block_pre_projection.weight, create_graph=True)


def test_a_map_that_is_no_contraction_does_not_blow_the_gradient_up() -> None:
    """The solve for w diverges there; what it found first is kept."""
    g = torch.Generator().manual_seed(0)
    j = torch.randn(8, 64, 64, generator=g).double()
    j *= 1.3 / torch.linalg.eigvals(j).abs().amax(1).view(-1, 1, 1)
    x = torch.zeros(8, 64, 1).double().requires_grad_()
    point = 1.0 * x
    _solve_in_backward(point, lambda v: j @ v, 80)
    cotangent = torch.randn(8, 64, 1, generator=g).double()
    (w,) = torch.autograd.grad(point, x, cotangent)

    def missed(v: Tensor) -> Tensor:
        return (cotangent + j.mT @ v - v).flatten(1).norm(dim=1)

    # w is one evaluation past the best iterate, which at first is g
    assert (missed(w) <= 2 * missed(cotangent)).all()


def test_too_few_backward_iterations_would_be_seen(
    contraction: FPDM, exact: dict[str, Tensor]
) -> None:
    errors = [
        worst(run(contraction, 1, 60, gradient=Gradient("implicit", k))[0], exact)
        for k in (1, 4, 12)
    ]
    assert errors[0] > 1e-3
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_phantom_gradient_approaches_the_exact_one(
    contraction: FPDM, exact: dict[str, Tensor], damping: float
) -> None:
    short, long = (
        worst(run(contraction, m, 60, gradient=Gradient("phantom", damping=damping))[0], exact)
        for m in (2, 40)
    )
    assert long < 1e-6
    assert short > 1e-3


def test_phantom_with_full_steps_is_the_unrolled_gradient(contraction: FPDM) -> None:
    ours, _ = run(contraction, 3, 2, gradient=Gradient("phantom", damping=1.0))
    unrolled, _ = run(contraction, 3, 2)
    assert worst(ours, unrolled) < 1e-12


def test_without_gradients_it_is_the_plain_solve(contraction: FPDM) -> None:
    x, t, y = torch.randn(1, 4, 8, 8).double(), torch.tensor([5]), torch.tensor([2])
    with torch.no_grad():
        plain = contraction.solve(x, t, y, 4)
        other = contraction.solve(x, t, y, 4, gradient=Gradient("implicit"))
    assert torch.equal(plain.output, other.output)


def test_no_iteration_with_gradient_is_refused(contraction: FPDM) -> None:
    with pytest.raises(ValueError, match="iters: got 0, expected at least 1 with the implicit"):
        run(contraction, 0, 3, gradient=Gradient("implicit"))


@pytest.mark.parametrize(
    "wrong", [{"kind": "implict"}, {"iters": 0}, {"damping": 0.0}, {"damping": 1.5}]
)
def test_a_gradient_that_does_not_exist_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^gradient: got .*, expected "):
        Gradient(**wrong)


def test_fewer_than_no_iterations_are_refused() -> None:
    for n, m in ((-1, 1), (2, -1)):
        with pytest.raises(ValueError, match=f"n, m: got {n}, {m}, expected at least 0"):
            iterated(torch.cos, torch.ones(1, 2), n, m)


KINDS = (Gradient(), Gradient("implicit", 40), Gradient("phantom", damping=0.7))


@pytest.mark.parametrize("gradient", KINDS, ids=lambda g: g.kind)
def test_any_map_has_them(gradient: Gradient) -> None:
    """x = tanh(W x + b), |W| = 1/2, against (1 - J)^-1; one plain iteration is not enough."""
    g = torch.Generator().manual_seed(0)
    w, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((6, 6), (6,)))
    w = (w / (2 * torch.linalg.matrix_norm(w, 2))).requires_grad_()
    start, seen = torch.zeros(3, 6, dtype=torch.float64), torch.randn(3, 6, generator=g).double()

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ w.T + b)

    def grad(n: int, m: int, how: Gradient) -> Tensor:
        return torch.autograd.grad((iterated(f, start, n, m, how) * seen).sum(), w)[0]

    with torch.no_grad():
        x = iterated(f, start, 60, 0, gradient)
        slope = 1 - f(x) ** 2
        back = torch.eye(6) - w.T * slope.unsqueeze(1)
        wanted = (torch.linalg.solve(back, seen.unsqueeze(2)).squeeze(2) * slope).T @ x
    torch.testing.assert_close(grad(60, 60, gradient), wanted, rtol=1e-9, atol=1e-12)
    assert (grad(60, 1, Gradient()) - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("gradient", KINDS, ids=lambda g: g.kind)
def test_the_models_map_is_what_its_solve_iterates(contraction: FPDM, gradient: Gradient) -> None:
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([7, 800]), torch.tensor([1, 10])
    mod = contraction.modulation(t, y)
    h = contraction.encode(x, mod)
    ours = iterated(contraction.fixed_point_map(h, mod), h, 3, 2, gradient)
    theirs = contraction.solve(x, t, y, 2, 3, gradient=gradient).solution
    assert torch.equal(ours, theirs)
    weight = contraction.blocks_pre[0].mlp.fc1.weight
    a, b = (torch.autograd.grad(z.square().sum(), weight)[0] for z in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_the_spectral_radius_of_a_model(contraction: FPDM) -> None:
    """Against the eigenvalues of its Jacobian by differences, a column of it to a sample."""
    x, t, y = torch.randn(1, 4, 8, 8).double(), torch.tensor([7]), torch.tensor([1])
    with torch.no_grad():
        mod = contraction.modulation(t, y)
        h, vectors = contraction.encode(x, mod), contraction.modulation_fp(t, y)
        z, _ = contraction.iterate(h, h, mod, 20)
        one, n = contraction.fixed_point_map(h, mod), z.numel()
        many = contraction.fixed_point_map(h.expand(n, -1, -1), vectors.expand(n, -1))
        moved = many(z + 1e-6 * torch.eye(n).view(n, *z.shape[1:]))
        jacobian = (moved - one(z)).view(n, n).T / 1e-6
    radius = solvers.spectral_radius(one, z, 100)
    torch.testing.assert_close(
        radius[0], torch.linalg.eigvals(jacobian).abs().max(), rtol=0.02, atol=0
    )


def test_the_trainer_takes_them(tmp_path: Path) -> None:
    """Each trains, to finite weights that are not S-JFB's."""
    found = {}
    for kind in ("unroll", "implicit", "phantom"):
        fixed = FixedPointConfig(n_max=1, m_min=2, m_max=2, gradient=kind)  # type: ignore[arg-type]
        trainer = Trainer(small(tmp_path / kind, steps=3, log_every=1, fixed_point=fixed))
        trainer.run()
        found[kind] = trainer.model.block_pre_projection.weight.detach().clone()
        assert found[kind].isfinite().all()
    assert not torch.equal(found["implicit"], found["unroll"])
    assert not torch.equal(found["phantom"], found["unroll"])
