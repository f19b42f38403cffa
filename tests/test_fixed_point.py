"""The fixed-point layer: exact gradients, recompute modes, memory ledger, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, random_model, relative
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from bench import published as plain
from fpdm.block import BlockWeights
from fpdm.config import ModelConfig
from fpdm.fixed_point import (
    BlockSettings,
    iterate,
    s_jfb,
    unroll,
    unroll_backward,
    unroll_backward_,
)
from fpdm.model import FPDM
from fpdm.weights import PreparedWeights

SMALL = ModelConfig(input_size=4, hidden_size=8, num_heads=2, num_classes=3, in_channels=1)
MODES = ("none", "elementwise", "full")


def problem(
    d: int = 8, t: int = 3, b: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Random operands of the unrolled operator, weights and injection included."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    shapes = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes += [(2 * d, 2 * d), (2 * d,), (d, 2 * d), (d,)]
    params = [rand(*s, scale=0.7 / s[-1] ** 0.5 if len(s) > 1 else 0.1) for s in shapes]
    return {
        "x": rand(b, t, d), "i": rand(b, t, d), "mod": rand(b, 6 * d, scale=0.5), "params": params,
    }  # fmt: skip


def run(p: dict[str, Any], n: int, m: int, recompute: str, **kwargs: Any) -> Tensor:
    w1, b1, w2, b2 = p["params"][8:]
    a, e = w1.detach().chunk(2, dim=1)
    u = torch.nn.functional.linear(p["i"], e, b1).detach()
    weights = BlockWeights(*(q.detach() for q in p["params"][:8]), a, e, w2.detach(), b2.detach())
    settings = BlockSettings(2, "auto", recompute)
    out, _ = s_jfb(
        p["x"], p["i"], u, p["mod"], p["params"], weights, n, m, settings, **kwargs
    )  # fmt: skip
    return out


def operator_weights(p: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """What the operators take as ``weights``: the eight, A, E, W2, b2."""
    first, w1, w2, b2 = p["params"][:8], p["params"][8], p["params"][10], p["params"][11]
    found = [*first, *w1.chunk(2, dim=1), w2, b2]
    return [q.detach().to(dtype).contiguous() for q in found]


def addend(p: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """u = E i + b1."""
    e, b1 = p["params"][8].chunk(2, dim=1)[1], p["params"][9]
    return torch.nn.functional.linear(p["i"], e.to(dtype), b1.to(dtype)).detach()


def naive(p: dict[str, Any], n: int, m: int, detach_init: bool = True) -> Tensor:
    """Autograd through the concatenated map."""
    names = [f"block_fixed_point.{k}" for k in plain_keys()]
    w = dict(zip(names, p["params"][:8]))
    for key, value in zip(("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"), p["params"][8:]):
        w[f"block_fixed_point_projection_{key}"] = value
    # the modulation enters through a bias-only adaLN linear
    w["block_fixed_point.adaLN_modulation.1.weight"] = torch.eye(p["mod"].shape[1]).double()
    w["block_fixed_point.adaLN_modulation.1.bias"] = torch.zeros(p["mod"].shape[1]).double()
    x = p["x"]
    with torch.no_grad():
        for _ in range(n):
            x = apply_map(w, x, p)
    x = x.detach() if detach_init else x
    for _ in range(m):
        x = apply_map(w, x, p)
    return x


def apply_map(w: dict[str, Tensor], x: Tensor, p: dict[str, Any]) -> Tensor:
    real = torch.nn.functional.silu
    torch.nn.functional.silu = lambda v: v  # type: ignore[assignment]
    try:
        return plain.fixed_point_map(w, x, p["i"], p["mod"], 2)
    finally:
        torch.nn.functional.silu = real  # type: ignore[assignment]


def plain_keys() -> tuple[str, ...]:
    from fpdm.weights import BLOCK_KEYS

    return BLOCK_KEYS


def leaves(p: dict[str, Any]) -> list[Tensor]:
    return [p["x"], p["i"], p["mod"], *p["params"]]


def gradients(p: dict[str, Any], out: Tensor) -> list[Tensor | None]:
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return list(torch.autograd.grad((out * probe).sum(), leaves(p), allow_unused=True))


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize(
    ("n", "m", "detach"), [(0, 1, True), (2, 3, True), (0, 4, False), (3, 1, True)]
)
def test_unrolled_equals_autograd(recompute: str, n: int, m: int, detach: bool) -> None:
    p = problem()
    for leaf in leaves(p):
        leaf.requires_grad_()
    ours, want = run(p, n, m, recompute, detach_init=detach), naive(p, n, m, detach)
    assert relative(ours, want) <= 1e-12
    for index, (got, ref) in enumerate(zip(gradients(p, ours), gradients(p, want))):
        if ref is None:
            assert got is None or got.abs().max() == 0
        else:
            assert got is not None
            assert relative(got, ref) <= 1e-12, index


def test_detached_start_carries_no_gradient() -> None:
    """h gets gradient only through i; without detaching, x_0 = h gets some too."""
    for detach, expected in ((True, False), (False, True)):
        p = problem()
        p["x"].requires_grad_()
        p["i"].requires_grad_()
        grad_x, grad_i = torch.autograd.grad(
            run(p, 0, 2, "none", detach_init=detach).sum(), [p["x"], p["i"]], allow_unused=True
        )
        assert (grad_x is not None) == expected
        assert grad_i.abs().max() > 0


@pytest.mark.parametrize("recompute", MODES)
def test_gradcheck(recompute: str) -> None:
    p = problem(d=4, t=2, b=2)
    for leaf in leaves(p):
        leaf.requires_grad_()

    def fn(*flat: Tensor) -> Tensor:
        q = {"x": flat[0], "i": flat[1], "mod": flat[2], "params": list(flat[3:])}
        return run(q, 0, 2, recompute, detach_init=False)

    assert torch.autograd.gradcheck(fn, tuple(leaves(p)), fast_mode=True)


def test_gradcheck_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped term in an operator's backward is caught."""
    from fpdm.kernels import implementations, reference

    real = reference.adaln_backward

    def wrong(dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, ds: Tensor, da: Tensor) -> None:
        real(dy, z, scale * 1.01, dz, ds, da)

    monkeypatch.setattr(reference, "adaln_backward", wrong)
    implementations._operator_set.cache_clear()
    try:
        with pytest.raises(GradcheckError):
            test_gradcheck("none")
    finally:
        monkeypatch.undo()
        implementations._operator_set.cache_clear()


def test_gradcheck_of_the_layer() -> None:
    """The whole model in fp64 with respect to its input, n = 0 and m = 2, full unrolling."""
    model = random_model(SMALL).double()
    assert isinstance(model, FPDM)
    t, y = torch.tensor([7, 800]), torch.tensor([0, 3])
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    fn = lambda v: model(v, t, y, 2, detach_init=False)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x,), fast_mode=True)


def test_frozen_weights_and_modulation() -> None:
    p = problem()
    p["i"].requires_grad_()
    out = run(p, 1, 2, "elementwise")
    (grad,) = torch.autograd.grad(out.sum(), [p["i"]])
    q = problem()
    for leaf in leaves(q):
        leaf.requires_grad_()
    want = torch.autograd.grad(run(q, 1, 2, "elementwise").sum(), [q["i"]])[0]
    assert torch.equal(grad, want)


def test_bad_operands_are_refused() -> None:
    p = problem(dtype=torch.float32)
    first = operator_weights(p, torch.float32)[:8]
    with pytest.raises(ValueError, match="m: got 2, expected 1 without injection"):
        unroll(
            p["x"], None, None, p["mod"], p["params"][:8], first, 2, 2, "auto", "none", 1, False,
            False,
        )  # fmt: skip
    model = random_model(TINY)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2])
    for bad, word in (
        ((x.view(2, 4, 4, 16), t, y), "x: got"), ((x, t[:1], y), "t: got"),
        ((x, t, y.float()), "y: got"), ((x.long(), t, y), "x: got"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            model(*bad)
    with pytest.raises(ValueError, match="init: got"):
        model(x, t, y, init=torch.zeros(2, 5, 48))
    assert model(x[:0], t[:0], y[:0]).shape == (0, 8, 8, 8)


def test_second_derivative_is_refused() -> None:
    p = problem()
    p["i"].requires_grad_()
    (grad,) = torch.autograd.grad(run(p, 0, 1, "none").square().sum(), [p["i"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_modes_agree_bitwise() -> None:
    """Recomputing gives the same bits as keeping."""
    found = []
    for recompute in MODES:
        p = problem(d=16, t=5, dtype=torch.float32)
        for leaf in leaves(p):
            leaf.requires_grad_()
        out = run(p, 1, 3, recompute)
        grads = torch.autograd.grad(out.sum(), [p["i"], p["mod"], *p["params"]])
        found.append([out, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_loop_equals_unrolled(k: int) -> None:
    p = problem(dtype=torch.float32)
    with torch.no_grad():
        free = run(p, 0, k, "none")
    p["i"].requires_grad_()
    assert torch.equal(free, run(p, 0, k, "none").detach())
    assert torch.equal(p["x"], problem(dtype=torch.float32)["x"])


def test_residuals() -> None:
    model = random_model(TINY)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 600, 999]), torch.tensor([1, 2, 10])
    solutions = []
    with torch.no_grad():
        for k in (1, 2, 3):
            _, z, stats = model.solve(x, t, y, k)
            solutions.append(z)
    assert stats.iterations == 3
    for j in (1, 2):
        diff = (solutions[j] - solutions[j - 1]).flatten(1).norm(dim=1)
        want = diff / solutions[j].flatten(1).norm(dim=1)
        torch.testing.assert_close(stats.residual[j], want, rtol=1e-4, atol=1e-7)
    with_grad = model.solve(x, t, y, 2, no_grad_iters=1).stats
    torch.testing.assert_close(with_grad.residual, stats.residual, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recompute", MODES)
def test_backward_in_chunks(recompute: str) -> None:
    """The gradients and norms of the whole batch, whatever the parts; more parts than samples are
    fine."""
    p = problem(b=3)
    for leaf in leaves(p):
        leaf.requires_grad_()
    weights, u = operator_weights(p, torch.float64), addend(p, torch.float64)
    found = []
    for chunks in (1, 2, 5):
        args = (p["x"], p["i"], u, p["mod"], p["params"], weights, 3, 2, "auto", recompute)
        out, norms, *_ = unroll(*args, chunks, True, False)
        found.append((*torch.autograd.grad(out.square().sum(), leaves(p)), norms))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def backward_into(
    accumulate: bool, start: float | None = 0.0, frozen: str = ""
) -> tuple[FPDM, dict[str, Tensor]]:
    """A model after a backward with ``accumulate``, and the gradients that it had before it."""
    model = random_model(SMALL)
    assert isinstance(model, FPDM)
    for name, param in model.named_parameters():
        param.grad = None if start is None else torch.full_like(param, start)
        param.requires_grad_(name != frozen)
    before = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    weights = PreparedWeights(model, torch.float32, accumulate=accumulate)
    x, t, y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), *PAIRS
    model(x, t, y, 3, 1, weights=weights).square().sum().backward()
    return model, before


PAIRS = torch.tensor([5, 600]), torch.tensor([1, 3])


@pytest.mark.parametrize("frozen", ["", "block_fixed_point.attn.qkv.weight"])
@pytest.mark.parametrize("start", [0.0, 1.0, None])
def test_gradients_accumulate_in_place(start: float | None, frozen: str) -> None:
    """The same sums as through autograd, in the tensors that were there; from zero bit for bit."""
    ours, before = backward_into(True, start, frozen)
    usual, _ = backward_into(False, start, frozen)
    for (name, a), b in zip(ours.named_parameters(), usual.parameters()):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad, name
            continue
        assert start is None or a.grad is before[name]
        if start:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("kind", ["strided", "half"])
def test_gradients_that_cannot_be_added_to(kind: str) -> None:
    """Such a block goes through autograd."""
    model, found = random_model(SMALL), []
    for accumulate in (False, True):
        for name, q in model.named_parameters():
            q.grad = torch.zeros_like(q)
            if name == "block_fixed_point.attn.qkv.weight" and kind == "strided":
                q.grad = torch.zeros_like(q.t()).t()
        if kind == "half":
            model.bfloat16()
        weights = PreparedWeights(model, next(model.parameters()).dtype, accumulate=accumulate)
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        model(x, *PAIRS, 2, 1, weights=weights).float().square().sum().backward()
        found.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("recompute", MODES)
def test_opcheck(recompute: str) -> None:
    p = problem(d=8, t=3, dtype=torch.float32)
    for leaf in leaves(p):
        leaf.requires_grad_()
    u, weights = addend(p, torch.float32), operator_weights(p, torch.float32)
    args = (p["x"], p["i"], u, p["mod"], p["params"], weights, 2, 2, "auto", recompute, 1, True)
    torch.library.opcheck(unroll, (*args, False))
    with torch.no_grad():
        out, _, *saved = unroll(*args, False)
    plain = [q.detach() for q in p["params"]]
    operands = (out, p["x"].detach(), p["i"].detach(), u, p["mod"].detach(), weights, *saved)
    how = (2, 2, "auto", recompute, 1, True)
    torch.library.opcheck(unroll_backward, (plain, *operands, *how))
    sums = [torch.zeros_like(q) for q in plain]
    torch.library.opcheck(unroll_backward_, (sums, *operands, *how))
    torch.library.opcheck(
        iterate, (p["x"].detach(), u, p["mod"].detach(), weights, 2, 2, "auto", True)
    )


def graphs_for_every_m(backend: str, recompute: str) -> int:
    torch._dynamo.reset()
    model = random_model(SMALL, recompute=recompute)
    prepared = PreparedWeights(model, torch.float32)
    count = 0

    def counting(gm: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([5, 600]), torch.tensor([1, 3])
    for m in range(1, 13):
        model.zero_grad()
        out = compiled(x, t, y, m, weights=prepared)
        out.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        want = model(x, t, y, m, weights=prepared)
        want.square().sum().backward()
        # inductor sums in another order: float32 rounding, measured in L2
        assert relative(out, want) <= 1e-5
        for got, param in zip(grads, model.parameters()):
            assert param.grad is not None
            assert relative(got, param.grad) <= 1e-4
    return count


def test_compile_fullgraph_few_graphs() -> None:
    assert graphs_for_every_m("aot_eager", "elementwise") <= 3


@pytest.mark.slow
@pytest.mark.parametrize("recompute", MODES)
def test_compile_inductor_few_graphs(recompute: str) -> None:
    assert graphs_for_every_m("inductor", recompute) <= 3
