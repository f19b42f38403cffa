"""Implicit and phantom gradients against the exact gradient of a converged contraction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_model
from runs import small
from torch import Tensor
from torch.autograd import forward_ad

from fpdm import solvers
from fpdm.config import FixedPointConfig
from fpdm.gradients import Gradient, _solve_in_backward, iterated
from fpdm.model import FPDM
from fpdm.train import Trainer
from fpdm.weights import PreparedWeights

Map = Callable[[Tensor], Tensor]
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
    "wrong",
    [{"kind": "implict"}, {"iters": 0}, {"iters": 2.5}, {"damping": 0.0}, {"damping": 1.5}],
)
def test_a_gradient_that_does_not_exist_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^gradient[.a-z]*: got .*, expected "):
        Gradient(**wrong)


def test_a_gradient_by_its_name_alone_is_refused(contraction: FPDM) -> None:
    match = r"^gradient: got 'implicit', expected such as Gradient\('implicit'\)"
    with pytest.raises(ValueError, match=match):
        run(contraction, 2, 1, gradient="implicit")
    with pytest.raises(ValueError, match=match):
        iterated(torch.cos, torch.ones(1, 2), 1, 1, "implicit")  # type: ignore[arg-type]


def test_fewer_than_no_iterations_are_refused() -> None:
    for n, m, told in ((-1, 1, "n: got -1, expected at least 0"), (2, -1, "m: got -1"),
                       (1, 2.0, "m: got 2.0, expected an integer")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            iterated(torch.cos, torch.ones(1, 2), n, m)  # type: ignore[arg-type]


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


@pytest.fixture
def maps(contraction: FPDM) -> tuple[Map, Map, list[Tensor]]:
    """f by the operators and in plain PyTorch, and what both depend on, beginning with x."""
    g = torch.Generator().manual_seed(4)
    x, h, mod = (
        torch.randn(*size, generator=g).double().requires_grad_()
        for size in ((2, 16, 48), (2, 16, 48), (2, 6 * 48))
    )
    inside = ("block_fixed_point.attn", "block_fixed_point.mlp", "block_fixed_point_proj")
    inside += ("block_pre_projection",)
    params = [p for name, p in contraction.named_parameters() if name.startswith(inside)]
    assert len(params) == 14
    fast, plain = (contraction.fixed_point_map(h, mod, plain=plain) for plain in (False, True))
    return fast, plain, [x, h, mod, *params]


def test_the_plain_map_is_the_map(maps: tuple[Map, Map, list[Tensor]]) -> None:
    fast, plain, leaves = maps
    a, b = fast(leaves[0]), plain(leaves[0])
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    seen = torch.randn(a.shape, generator=torch.Generator().manual_seed(5)).double()
    for ours, theirs in zip(*(torch.autograd.grad((z * seen).sum(), leaves) for z in (b, a))):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fold", [False, True])
def test_the_plain_map_in_half_precision(fold: bool) -> None:
    """Another order of rounding, the same dtypes: products in bfloat16, the iterate in float32."""
    model = random_model(TINY, residual_dtype="float32")
    assert isinstance(model, FPDM)
    weights = PreparedWeights(model, torch.bfloat16, fold=fold)
    h, t, y = torch.randn(2, 16, 48), torch.tensor([7, 800]), torch.tensor([1, 10])
    with torch.no_grad():
        mod = model.modulation(t, y, weights=weights)
        fast = model.fixed_point_map(h, mod, weights=weights)(h)
    plain = model.fixed_point_map(h, mod, weights=weights, plain=True)(h)
    assert plain.dtype == fast.dtype == torch.float32
    assert (plain - fast).norm() < 0.02 * fast.norm()
    # gradients too where the operators have none
    plain.sum().backward()
    assert model.block_pre_projection.weight.grad is not None


def test_the_plain_map_has_every_derivative(maps: tuple[Map, Map, list[Tensor]]) -> None:
    """Products with the Jacobian and the Hessian, against central differences."""
    fast, plain, (x, *_) = maps
    x = x.detach()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(6)).double()

    def slope(f: Map, size: float = 1e-5) -> Tensor:
        return ((f(x + size * v) - f(x - size * v)) / (2 * size)).detach()

    def loss(z: Tensor) -> Tensor:
        return plain(z).pow(3).sum()

    def gradient(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(fast(z).pow(3).sum(), z)[0]

    push, hessian = slope(fast), slope(gradient)
    func, functional = torch.func, torch.autograd.functional
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(plain(forward_ad.make_dual(x, v))).tangent
    for found in (dual, func.jvp(plain, (x,), (v,))[1], functional.jvp(plain, x, v)[1]):
        torch.testing.assert_close(found, push, rtol=1e-6, atol=1e-7)
    for found in (func.jvp(func.grad(loss), (x,), (v,))[1], functional.hvp(loss, x, v)[1]):
        torch.testing.assert_close(found, hessian, rtol=1e-6, atol=1e-5)

    def few(z: Tensor) -> Tensor:
        return plain(z)[:, 0, :3]

    torch.testing.assert_close(func.jacfwd(few)(x), func.jacrev(few)(x), rtol=1e-9, atol=1e-12)
    both = func.vmap(plain)(torch.stack([x, x + v]))
    torch.testing.assert_close(both[1], fast(x + v), rtol=1e-9, atol=1e-12)


def test_a_penalty_on_the_jacobian_trains(
    contraction: FPDM, maps: tuple[Map, Map, list[Tensor]]
) -> None:
    """|J^T v|^2 (Bai, Koltun & Kolter 2021): its gradient, against differences in each operand's
    direction of what the operators' first derivative gives."""
    _, plain, leaves = maps
    x, h, mod = leaves[:3]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).double()
    (g,) = torch.autograd.grad(plain(x), x, v, create_graph=True)
    # biases of the last products do not enter J
    grads = torch.autograd.grad(g.square().sum(), leaves, materialize_grads=True)

    def penalty() -> float:
        fast = contraction.fixed_point_map(h, mod)
        return torch.autograd.grad(fast(x), x, v)[0].square().sum().item()

    assert sum(bool(grad.any()) for grad in grads) == len(leaves) - 1
    for leaf, grad in zip(leaves, grads):
        found = []
        step = 1e-5 * grad / grad.norm().clamp_min(1e-300)
        for way in (1, -2, 1):
            with torch.no_grad():
                leaf.add_(way * step)
            found.append(penalty())
        slope = (found[0] - found[1]) / 2e-5
        assert slope == pytest.approx(grad.norm().item(), rel=1e-5, abs=1e-6)


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
