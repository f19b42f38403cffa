"""Prepared weights: equal to a fresh model bit for bit after everything that changes parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY, TINY_DIT, random_model, relative
from torch import Tensor, nn

from fpdm.config import ModelConfig, OptimConfig
from fpdm.model import FPDM, DiT
from fpdm.optim import AdamWEMA
from fpdm.weights import PreparedWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=g)
    return x, torch.tensor([10, 900]), torch.tensor([1, 10])


def outputs(model: FPDM | DiT, prepared: PreparedWeights) -> tuple[Tensor, Tensor]:
    """With the prepared weights, and with fresh ones of an equal model."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        ours = model(*inputs(), weights=prepared)
        want = fresh(*inputs(), weights=PreparedWeights(fresh, prepared.dtype, prepared.folded))
    return ours, want


@pytest.mark.parametrize("config", [TINY, TINY_DIT])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold", [False, True])
def test_refresh_after_every_change(config: ModelConfig, dtype: torch.dtype, fold: bool) -> None:
    impls = ("fused", "foreach", "single") if config is TINY else ("auto",)
    for impl in impls:
        model = random_model(config)
        prepared = PreparedWeights(model, dtype, fold)
        before, _ = outputs(model, prepared)
        optimiser = AdamWEMA(model, OptimConfig(impl=impl, lr=1e-2, ema_decay=0.5), prepared)  # type: ignore[arg-type]
        out = model(*inputs()).square().mean()
        out.backward()
        optimiser.step(1e-2)
        ours, want = outputs(model, prepared)
        assert torch.equal(ours, want)
        assert not torch.equal(ours, before)
        with optimiser.swapped():
            ours, want = outputs(model, prepared)
            assert torch.equal(ours, want)
        ours, want = outputs(model, prepared)
        assert torch.equal(ours, want)
        model.load_state_dict(random_model(config, seed=8).state_dict())
        ours, want = outputs(model, prepared)
        assert torch.equal(ours, want)


def test_staleness_is_seen() -> None:
    """Without a refresh the prepared copies are stale: the equality above can fail."""
    model = random_model(TINY)
    prepared = PreparedWeights(model, torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    ours, want = outputs(model, prepared)
    assert not torch.equal(ours, want)
    prepared.refresh()
    ours, want = outputs(model, prepared)
    assert torch.equal(ours, want)


def test_refresh_writes_in_place() -> None:
    model = random_model(TINY)
    prepared = PreparedWeights(model, torch.bfloat16, fold=True)
    addresses = {k: v.data_ptr() for k, v in prepared.copies.items()}
    prepared.refresh()
    assert addresses == {k: v.data_ptr() for k, v in prepared.copies.items()}


def test_folding_is_exact() -> None:
    """E (W_p h + b_p) + b1 = (E W_p) h + (E b_p + b1), in float64 to 1e-12."""
    model = random_model(TINY).double()
    x, t, y = inputs()
    with torch.no_grad():
        plain = model(x.double(), t, y)
        folded = model(x.double(), t, y, weights=PreparedWeights(model, torch.float64, fold=True))
    assert relative(folded, plain) <= 1e-12


def test_folding_refuses_gradients() -> None:
    model = random_model(TINY)
    with pytest.raises(ValueError, match="fold=False"):
        model(*inputs(), weights=PreparedWeights(model, torch.float32, fold=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_reach_float32_parameters(dtype: torch.dtype) -> None:
    model = random_model(TINY)
    model(*inputs(), weights=PreparedWeights(model, dtype)).float().square().mean().backward()
    half = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    model(*inputs()).square().mean().backward()
    for got, param in zip(half, model.parameters()):
        assert got is not None
        assert param.grad is not None
        assert got.dtype == torch.float32
        assert relative(got, param.grad) <= 0.1


def test_autocast_equals_prepared() -> None:
    model = random_model(TINY)
    with torch.no_grad():
        prepared = model(*inputs(), weights=PreparedWeights(model, torch.bfloat16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(*inputs())
    assert torch.equal(prepared, cast)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Lora(nn.Linear):
    def __init__(self, inner: nn.Linear):
        super().__init__(inner.in_features, inner.out_features)
        self.load_state_dict(inner.state_dict())
        self.down = nn.Parameter(torch.zeros(2, inner.in_features))


def wrap(model: Any) -> None:
    model.block_fixed_point.mlp.fc1 = nn.Sequential(model.block_fixed_point.mlp.fc1, nn.Dropout())


def adapt(model: Any) -> None:
    model.block_fixed_point.attn.qkv = Lora(model.block_fixed_point.attn.qkv)


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.spectral_norm(model.block_pre_projection)


CHANGED: list[tuple[Callable[[Any], None], str]] = [
    (wrap, r"\(extra: block_fixed_point.mlp.fc1.0.weight, .*; missing: block_fixed_point.mlp.fc1."),
    (adapt, r"\(extra: block_fixed_point.attn.qkv.down\)"),
    (parametrize, r"extra: .*original; missing: block_pre_projection.weight"),
]


@pytest.mark.parametrize(("change", "told"), CHANGED)
def test_other_parameters_are_refused(change: Callable[[Any], None], told: str) -> None:
    """By the model, by weights prepared from it, and by those prepared before; not ignored."""
    model = random_model(TINY)
    before = PreparedWeights(model, torch.bfloat16)
    change(model)
    match = f"model: got other parameters .*{told}.*, expected those that it was made with"
    with pytest.raises(ValueError, match=match):
        model(*inputs())
    with pytest.raises(ValueError, match=match):
        PreparedWeights(model, torch.float32)
    with pytest.raises(ValueError, match=match):
        before.refresh()


def test_a_submodule_of_another_class_is_refused() -> None:
    """Whose parameters have the same names, when weights are prepared."""
    model = random_model(TINY)
    fine = copy.deepcopy(model)
    assert isinstance(model, FPDM)
    width = TINY.hidden_size
    model.block_fixed_point.attn.proj = Doubled(width, width)
    with pytest.raises(ValueError, match=r"attn.proj: got Doubled, expected the Linear that it"):
        PreparedWeights(model, torch.float32)
    PreparedWeights(fine, torch.float32)


class Larger(FPDM):
    def __init__(self) -> None:
        super().__init__(TINY)
        self.head = nn.Linear(3, 2)


def test_a_subclass_may_hold_more() -> None:
    model = Larger()
    PreparedWeights(model, torch.float32)
    assert model(*inputs(), weights=PreparedWeights(model, torch.bfloat16)).shape == (2, 8, 8, 8)
    assert model(*inputs()).shape == (2, 8, 8, 8)
