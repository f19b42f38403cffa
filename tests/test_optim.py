from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from conftest import TINY, random_model
from interpreter import INSIDE, outside, run_inside
from torch import Tensor

from fpdm import optim
from fpdm.config import ConfigError, OptimConfig, UserError
from fpdm.optim import AdamWEMA, LossScaler, learning_rate
from fpdm.weights import PreparedWeights

# onepass: with its Triton kernel in the interpreter, and here with the same in plain PyTorch
IMPLS = ("auto", "fused", "foreach", "single", "onepass")
# the interpreter rounds to bfloat16 by cutting off
HALF = torch.float16 if INSIDE else torch.bfloat16
FULL = OptimConfig(lr=1e-2, weight_decay=0.1, ema_decay=0.9, beta2=0.99)


pytestmark = pytest.mark.usefixtures("one_thread")


@outside
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_interpreter():
    run_inside(__file__, "-k", "onepass")


def plain_pass(w, g, a, v, e, copy, scalars):
    """fpdm.kernels.adamw.adamw_."""
    c, b1, r1, b2, r2, eps, shrink, lr, root, rest = scalars
    g = c * g
    a.mul_(b1).add_(r1 * g)
    v.mul_(b2).add_(r2 * g * g)
    w.mul_(shrink).sub_(lr * a / (v.sqrt() / root + eps))
    e.add_(rest * (w - e))
    if copy is not None:
        copy.copy_(w)


@pytest.fixture(autouse=True)
def _one_pass(request, monkeypatch):
    asked = getattr(request.node, "callspec", None)
    if INSIDE:
        # fewer programs, which is what the interpreter's time goes by
        monkeypatch.setattr("fpdm.kernels.adamw.BLOCK", 2**14)
    elif asked and asked.params.get("impl") == "onepass":
        monkeypatch.setattr(optim, "_one_pass_on", lambda device: plain_pass)


def gradients(optimizer: AdamWEMA, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for p in optimizer.params.values():
        assert p.grad is not None
        p.grad.copy_(torch.randn(p.shape, generator=generator))


def oracle(params: dict[str, Tensor], config: OptimConfig, steps: int) -> tuple[dict, dict]:
    """The module's equations in float64."""
    w = {k: p.detach().double() for k, p in params.items()}
    a = {k: torch.zeros_like(p) for k, p in w.items()}
    v, e = {k: t.clone() for k, t in a.items()}, {k: t.clone() for k, t in w.items()}
    for t in range(1, steps + 1):
        generator = torch.Generator().manual_seed(t)
        for k, p in params.items():
            g = torch.randn(p.shape, generator=generator).double()
            a[k] = config.beta1 * a[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g * g
            first, second = a[k] / (1 - config.beta1**t), v[k] / (1 - config.beta2**t)
            w[k] = w[k] * (1 - config.lr * config.weight_decay)
            w[k] = w[k] - config.lr * first / (second.sqrt() + config.eps)
            decay = config.ema_decay
            if config.ema_warmup:
                decay = min(decay, (1 + t) / (10 + t))
            e[k] = e[k] + (1 - decay) * (w[k] - e[k])
    return w, e


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("warmup", [False, True])
def test_step_equals_the_equations_in_float64(impl, warmup):
    model = random_model(TINY)
    config = OptimConfig(**{**vars(FULL), "impl": impl, "ema_warmup": warmup})
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = AdamWEMA(model, config)
    for t in range(1, 6):
        gradients(optimizer, t)
        optimizer.step(config.lr)
    w, e = oracle(start, config, 5)
    for k, p in model.named_parameters():
        # 5 steps of at most lr each, a few roundings of the weight (below 4) per step
        assert (p.detach().double() - w[k]).abs().max() < 5 * 4 * 2**-23
        assert (optimizer.ema[k].double() - e[k]).abs().max() < 5 * 4 * 2**-23
    wrong, _ = oracle(start, OptimConfig(**{**vars(config), "eps": 1e-2}), 5)
    assert max((p.detach() - wrong[k]).abs().max() for k, p in model.named_parameters()) > 1e-5


def forward(model, weights) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return model(x, torch.tensor([3, 900]), torch.tensor([1, 10]), iters=2, weights=weights)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("fold", [False, True])
@torch.no_grad()
def test_prepared_weights_are_never_stale(impl, dtype, fold):
    model = random_model(TINY)
    prepared = PreparedWeights(model, dtype, fold)
    optimizer = AdamWEMA(model, OptimConfig(**{**vars(FULL), "impl": impl}), prepared)

    def same_as_fresh() -> bool:
        fresh = random_model(TINY, seed=9)
        fresh.load_state_dict(model.state_dict())
        again = PreparedWeights(fresh, dtype, fold)
        return torch.equal(forward(model, prepared), forward(fresh, again))

    gradients(optimizer, 1)
    optimizer.step(1e-2)
    assert same_as_fresh()
    raw = forward(model, prepared)
    with optimizer.swapped():
        assert same_as_fresh()
        assert not torch.equal(forward(model, prepared), raw)
        with pytest.raises(RuntimeError):
            optimizer.state()
    assert torch.equal(forward(model, prepared), raw)
    saved = {g: {k: t.clone() for k, t in named.items()} for g, named in optimizer.state().items()}
    gradients(optimizer, 2)
    optimizer.step(1e-2)
    optimizer.load_state(saved)
    assert same_as_fresh()
    assert torch.equal(forward(model, prepared), raw)


@torch.no_grad()
def test_a_stale_fold_would_be_seen(monkeypatch):
    model = random_model(TINY)
    prepared = PreparedWeights(model, HALF, fold=True)
    optimizer = AdamWEMA(model, FULL, prepared)
    monkeypatch.setattr(PreparedWeights, "fold", lambda self: None)
    gradients(optimizer, 1)
    optimizer.step(1e-2)
    stale = forward(model, prepared)
    monkeypatch.undo()
    prepared.refresh()
    assert not torch.equal(forward(model, prepared), stale)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_parameters_stay_and_their_copies_follow_a_load(impl):
    """They lie behind the trained ones in the flat copies, where no step reaches."""
    frozen = "x_embedder.proj.weight"

    def made(seed: int) -> tuple[Any, PreparedWeights, AdamWEMA]:
        model = random_model(TINY, seed)
        model.get_parameter(frozen).requires_grad_(False)
        prepared = PreparedWeights(model, HALF)
        config = OptimConfig(**{**vars(FULL), "impl": impl, "ema_warmup": True})
        return model, prepared, AdamWEMA(model, config, prepared)

    def copies_follow(model: Any, prepared: PreparedWeights) -> None:
        for name, p in model.named_parameters():
            assert torch.equal(prepared.get(name), p.detach().to(HALF)), name

    model, prepared, optimizer = made(0)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for t in (1, 2):
        gradients(optimizer, t)
        optimizer.step(FULL.lr)
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == set(before) - {frozen} == set(optimizer.params)
    w, e = oracle({k: before[k] for k in optimizer.params}, optimizer.config, 2)
    for k, p in optimizer.params.items():
        assert (p.detach().double() - w[k]).abs().max() < 2 * 4 * 2**-23
        assert (optimizer.ema[k].double() - e[k]).abs().max() < 2 * 4 * 2**-23
    copies_follow(model, prepared)
    with optimizer.swapped():
        copies_follow(model, prepared)
    other, copies, loaded = made(4)
    loaded.load_state(optimizer.state())
    copies_follow(other, copies)
    for one in (optimizer, loaded):
        gradients(one, 3)
        one.step(FULL.lr)
    copies_follow(other, copies)
    for k, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(k)), k


def test_a_stale_copy_would_be_seen():
    model = random_model(TINY)
    prepared = PreparedWeights(model, HALF)
    optimizer = AdamWEMA(model, FULL, prepared=None)
    gradients(optimizer, 1)
    optimizer.step(1e-2)
    stale = forward(model, prepared)
    prepared.refresh()
    assert not torch.equal(forward(model, prepared), stale)


@pytest.mark.parametrize("impl", IMPLS)
def test_state_round_trip_is_bit_exact(impl):
    def run(optimizer: AdamWEMA, first: int, last: int) -> None:
        for t in range(first, last):
            gradients(optimizer, t)
            optimizer.step(1e-2, 0.5)

    config = OptimConfig(**{**vars(FULL), "impl": impl, "ema_warmup": True})
    one = AdamWEMA(random_model(TINY), config)
    run(one, 0, 6)
    saved = {g: {k: t.clone() for k, t in named.items()} for g, named in one.state().items()}
    run(one, 6, 9)
    two = AdamWEMA(random_model(TINY, seed=4), config)
    two.load_state(saved)
    run(two, 6, 9)
    for group, named in one.state().items():
        for name, t in named.items():
            assert torch.equal(t, two.state()[group][name]), name
    three = AdamWEMA(random_model(TINY, seed=4), config)
    three.load_state({**saved, "optim": {k: t * 0 for k, t in saved["optim"].items()}})
    run(three, 6, 9)
    name = "block_fixed_point.attn.qkv.weight"
    assert not torch.equal(one.params[name], three.params[name])


def test_a_state_that_does_not_fit_changes_nothing():
    optimizer = AdamWEMA(random_model(TINY), FULL)
    before = {k: p.detach().clone() for k, p in optimizer.params.items()}
    groups = {g: dict(named) for g, named in optimizer.state().items()}
    name = "final_layer.linear.bias"
    groups["ema"] = {**groups["ema"], name: torch.zeros(3)}
    groups["model"] = {k: t + 1 for k, t in groups["model"].items()}
    del groups["optim"][f"exp_avg.{name}"]
    with pytest.raises(UserError, match=rf"ema/{name}: got \(3,\).*exp_avg.{name} is missing"):
        optimizer.load_state(groups)
    assert all(torch.equal(p, before[k]) for k, p in optimizer.params.items())


def test_gradients_lie_in_one_buffer_and_the_tail_is_no_part_of_the_norm():
    model = random_model(TINY)
    optimizer = AdamWEMA(model, FULL)
    x = torch.randn(2, 4, 8, 8)
    model(x, torch.tensor([3, 9]), torch.tensor([1, 2]), iters=1).square().sum().backward()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    optimizer.tail.fill_(1e6)
    assert optimizer.grad_norm() == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0
    assert float(optimizer.tail.sum()) == 0
    offset = optimizer.buffer.data_ptr() % 64
    assert all(p.grad.data_ptr() % 64 == offset for p in model.parameters())


def backward(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    model(x, torch.tensor([3, 9]), torch.tensor([1, 2]), iters=1).square().sum().backward()


def dropped(optimizer: AdamWEMA) -> None:
    """What a loop that knows nothing of the buffer does."""
    optimizer.model.zero_grad()
    backward(optimizer.model)


def replaced(optimizer: AdamWEMA) -> None:
    optimizer.zero_grad()
    backward(optimizer.model)
    for p in optimizer.params.values():
        p.grad = p.grad.clone()
    optimizer.gradients.zero_()


def missing(optimizer: AdamWEMA) -> None:
    """No gradient for one parameter: zero, not what the buffer held before."""
    dropped(optimizer)
    optimizer.params["final_layer.linear.bias"].grad = None


def detached_steps(change: Any, impl: str) -> tuple[list[float], AdamWEMA]:
    """Norms and state of three steps with the gradients that ``change`` leaves."""
    optimizer = AdamWEMA(random_model(TINY), OptimConfig(**{**vars(FULL), "impl": impl}))
    norms = []
    for t in range(3):
        gradients(optimizer, t)
        change(optimizer)
        norms.append(optimizer.grad_norm())
        optimizer.step(1e-2, 0.5)
    return norms, optimizer


def usual(optimizer: AdamWEMA) -> None:
    optimizer.zero_grad()
    backward(optimizer.model)


def usual_without_one(optimizer: AdamWEMA) -> None:
    usual(optimizer)
    optimizer.params["final_layer.linear.bias"].grad.zero_()


PAIRS = [(dropped, usual), (replaced, usual), (missing, usual_without_one)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("change", "expected"), PAIRS)
def test_gradients_that_left_the_buffer_come_back(change, expected, impl):
    norms, optimizer = detached_steps(change, impl)
    wanted, other = detached_steps(expected, impl)
    assert norms == wanted
    assert min(norms) > 0
    for name, p in optimizer.params.items():
        assert torch.equal(p, other.params[name]), name
        assert torch.equal(p.grad, other.params[name].grad), name
    optimizer.model.zero_grad()
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0
    backward(optimizer.model)
    begin, end = optimizer.gradients.data_ptr(), optimizer.tail.data_ptr()
    assert all(begin <= p.grad.data_ptr() < end for p in optimizer.params.values())


@pytest.mark.parametrize(("change", "expected"), PAIRS)
def test_gradients_outside_the_buffer_would_be_seen(change, expected, monkeypatch):
    wanted, other = detached_steps(expected, "auto")
    allocate = AdamWEMA._allocate

    def attached_once(self: AdamWEMA) -> None:
        allocate(self)
        self._attach = lambda: None  # type: ignore[method-assign]

    monkeypatch.setattr(AdamWEMA, "_allocate", attached_once)
    norms, optimizer = detached_steps(change, "auto")
    same = all(torch.equal(p, other.params[name]) for name, p in optimizer.params.items())
    assert norms != wanted or not same


@outside
def test_one_pass_needs_its_kernel():
    with pytest.raises(ConfigError, match="got onepass, which cannot run on cpu: "):
        AdamWEMA(random_model(TINY), OptimConfig(impl="onepass"))


def test_half_precision_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"got torch\.bfloat16, expected torch\.float32"):
        AdamWEMA(random_model(TINY).bfloat16(), FULL)


def test_learning_rate():
    constant = OptimConfig(lr=2.0)
    assert [learning_rate(constant, s, 9) for s in (0, 8)] == [2.0, 2.0]
    c = OptimConfig(lr=2.0, lr_final=1.0, warmup_steps=4)
    assert [learning_rate(c, s, 13) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(c, 4, 13) == 2.0
    assert learning_rate(c, 8, 13) == pytest.approx(1.5)
    assert learning_rate(c, 12, 13) == pytest.approx(1.0)
    assert learning_rate(c, 50, 13) == pytest.approx(1.0)


def test_loss_scaler():
    s = LossScaler(scale=8.0, interval=3, floor=2.0)
    for found, scale in [(1, 4.0), (0, 4.0), (0, 4.0), (0, 8.0), (0, 8.0), (1, 4.0), (1, 2.0)]:
        s.update(bool(found))
        assert s.scale == scale
    assert s.floor_hits == 0
    s.update(True)
    s.update(False)
    s.update(True)
    assert (s.scale, s.floor_hits, s.good) == (2.0, 2, 0)
    for _ in range(3):
        s.update(False)
    assert (s.scale, s.floor_hits) == (4.0, 0)


def test_the_scale_neither_dies_nor_grows_without_end():
    s = LossScaler(scale=65536.0, interval=1, floor=1.0)
    for _ in range(2000):
        s.update(True)
    assert s.scale == 1.0
    for _ in range(2000):
        s.update(False)
    assert s.scale == 2.0**40


def test_one_pass_knows_another_layout(monkeypatch):
    """A parameter frozen after the weights were prepared: every copy stays its own."""
    monkeypatch.setattr(optim, "_one_pass_on", lambda device: plain_pass)
    model = random_model(TINY)
    prepared = PreparedWeights(model, HALF)
    model.x_embedder.proj.weight.requires_grad_(False)
    optimizer = AdamWEMA(model, OptimConfig(impl="onepass"), prepared)
    gradients(optimizer, 1)
    optimizer.step(1e-2)
    for name, p in model.named_parameters():
        assert torch.equal(prepared.get(name), p.detach().to(HALF)), name
