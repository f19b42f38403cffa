"""The sampler against published numbers, a naive loop, and itself in other batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    TINY_DIT,
    extra_model,
    random_model,
    relative,
    tiny_dit,
    tiny_model,
    worst_relative,
)
from torch import Tensor

from fpdm import steps
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.run import initial_iterate
from fpdm.weights import PreparedWeights

SMALL = ModelConfig(
    input_size=4,
    in_channels=2,
    hidden_size=16,
    num_heads=2,
    num_classes=5,
    pre_depth=1,
    post_depth=2,
)
TIMED = replace(SMALL, pre_post_timestep_conditioning=True)
DIT = ModelConfig(
    kind="dit", input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5,
    pre_depth=0, post_depth=0, depth=2,
)  # fmt: skip
BUSY = SamplerConfig(
    method="ddpm", steps=4, iters=2, reuse="extrapolate", guidance=2.5, batch=3, spacing="linspace"
)
LABELS, SEEDS = [0, 4, 1, 1, 3, 2, 0], [5, 0, 2**63, 2**64 - 1, 7, 8, 9]


def network(config: ModelConfig = SMALL) -> Any:
    return random_model(config)


def sampler(config: SamplerConfig, model: Any = None, **diffusion: Any) -> Sampler:
    return Sampler(model or network(), Diffusion(DiffusionConfig(**diffusion)), config)


def draw(config: SamplerConfig, labels: Any = LABELS, seeds: Any = SEEDS, **kw: Any) -> Tensor:
    return sampler(config, **kw).sample(labels, seeds).x


# published numbers

GOLDEN = SamplerConfig(steps=10, iters=3, spacing="linspace", batch=4)
PUBLISHED: dict[str, tuple[SamplerConfig, dict[str, Any]]] = {
    "sample.ddim10": (GOLDEN, {}),
    "sample.ddim10_reuse": (replace(GOLDEN, reuse="full"), {}),
    "sample.ddpm10": (replace(GOLDEN, method="ddpm"), {}),
    "sample.eps_linear_ddim10": (GOLDEN, {"prediction": "eps", "zero_terminal_snr": False}),
}


def published_sample(golden: dict[str, Tensor], name: str, fold: bool, **changes: Any) -> float:
    config, diffusion = PUBLISHED[name]
    model = tiny_model(golden)
    weights = PreparedWeights(model, torch.float32, fold=fold)
    s = Sampler(model, Diffusion(DiffusionConfig(**diffusion)), replace(config, **changes), weights)
    y = golden["y"]
    noise = golden["sample.ddpm10_noise"] if config.method == "ddpm" else None
    found = s.sample(y, range(len(y)), noise=golden["sample.z"], step_noise=noise)
    return worst_relative(found.x, golden[name])


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_samples(tiny: dict[str, Tensor], name: str, fold: bool) -> None:
    assert published_sample(tiny, name, fold) <= 5e-6


def test_published_samples_bite(tiny: dict[str, Tensor]) -> None:
    assert published_sample(tiny, "sample.ddim10", True, spacing="trailing") > 1e-3
    assert published_sample(tiny, "sample.ddim10_reuse", True, reuse="none") > 1e-4
    assert published_sample(tiny, "sample.ddim10", True, iters=2) > 1e-4
    turned = dict(tiny)
    turned["sample.ddpm10_noise"] = tiny["sample.ddpm10_noise"].flip(0)
    assert published_sample(turned, "sample.ddpm10", True) > 1e-3


def test_published_guidance_and_reuse(extra: dict[str, Tensor]) -> None:
    model = extra_model(extra)
    weights = PreparedWeights(model, torch.float32, fold=True)
    n = len(extra["x"])
    x = torch.cat([extra["x"], extra["x"]])
    y = torch.cat([extra["y"], torch.full((n,), EXTRA_NULL)])
    config = SamplerConfig(iters=2, reuse="full")
    solutions: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for t in (999, 500):
            mod = model.modulation(torch.full((2 * n,), t), y, weights=weights)
            h = model.encode(x, mod, weights=weights)
            z, _ = model.iterate(initial_iterate(config, h, solutions), h, mod, 2, weights=weights)
            out = model.decode(z, mod, weights=weights)
            assert worst_relative(out, extra[f"cfg_reuse.t{t}"]) <= 5e-6
            solutions = (z,)
    guided = steps.guide(out[:n], out[n:], 4.0, 1)
    expected = extra["cfg_reuse.guided500"]
    assert worst_relative(guided, expected[: len(guided)]) <= 5e-6


EXTRA_NULL = 5


def test_published_guidance(tiny: dict[str, Tensor]) -> None:
    model = tiny_model(tiny)
    x = torch.cat([tiny["x"][:2], tiny["x"][:2]])
    with torch.no_grad():
        out = model(x, torch.full((4,), 500), tiny["cfg.y"], iters=4)
    expected = tiny["cfg.out_scale4"][:2]
    assert worst_relative(steps.guide(out[:2], out[2:], 4.0, 3), expected) <= 5e-6
    assert worst_relative(steps.guide(out[:2], out[2:], 4.0), expected) > 1e-3


# a naive loop


def naive(model: Any, s: Sampler, labels: list[int], noise: Tensor) -> Tensor:
    """DDIM of one image at a time, both branches apart, straight from the formulas in float64."""
    config, classes = s.config, model.config.num_classes
    model = model.double()
    abar = torch.as_tensor(s.diffusion.alphas_cumprod, dtype=torch.float64)
    plan = list(s.plan.steps)
    images = []
    for label, x in zip(labels, noise.double()):
        x = x[None]
        past: dict[int, list[Tensor]] = {label: [], classes: []}
        for row, (t, k) in enumerate(plan):
            outs = []
            guided = config.guidance != 1
            guided &= config.guidance_low <= t / 999 <= config.guidance_high
            if not guided:
                past[classes] = []
            gamma = config.reuse_gamma
            if config.reuse_gamma_end is not None:
                gamma = t / 999 * gamma + (1 - t / 999) * config.reuse_gamma_end
            for y in [label, classes] if guided else [label]:
                args = (x, torch.tensor([t]), torch.tensor([y]))
                if model.config.kind == "dit":
                    outs.append(model(*args))
                    continue
                init, old = None, past[y]
                if config.reuse == "blend" and old:
                    mod = model.modulation(args[1], args[2])
                    h = model.encode(x, mod)
                    init = h + gamma * (old[-1] - h)
                elif config.reuse == "extrapolate" and len(old) > 1:
                    init = old[-1] + config.reuse_rho * (old[-1] - old[-2])
                elif config.reuse in ("full", "extrapolate") and old:
                    init = old[-1]
                found = model.solve(*args, iters=k, init=init)
                old.append(found.solution)
                outs.append(found.output)
            v = outs[0][:, : model.config.in_channels]
            if guided:
                null = outs[1][:, : model.config.in_channels]
                mixed = null + config.guidance * (v - null)
                ratio = v.flatten().std() / mixed.flatten().std()
                v = (1 - config.guidance_rescale + config.guidance_rescale * ratio) * mixed
            a = abar[t]
            x0 = a.sqrt() * x - (1 - a).sqrt() * v
            eps = (1 - a).sqrt() * x + a.sqrt() * v
            prev = abar[plan[row + 1][0]] if row + 1 < len(plan) else torch.tensor(1.0)
            x = prev.sqrt() * x0 + (1 - prev).sqrt() * eps
        images.append(x[0])
    model.float()
    return torch.stack(images)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("reuse", ["none", "full", "blend", "extrapolate"])
@pytest.mark.parametrize("config", [SMALL, TIMED])
@torch.no_grad()
def test_naive_loop(config: ModelConfig, reuse: Any, guidance: float) -> None:
    model = network(config)
    s = sampler(SamplerConfig(steps=3, iters=2, reuse=reuse, guidance=guidance, batch=2), model)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = s.sample([4, 0, 2], [0, 1, 2], noise=noise).x
    assert worst_relative(found, naive(model, s, [4, 0, 2], noise)) < 2e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_low": 0.3, "guidance_high": 0.7},
        {"guidance_high": 0.5, "guidance_rescale": 0.7},
        {"guidance_rescale": 1.0, "reuse": "blend", "reuse_gamma_end": 0.9},
        {"guidance_low": 0.5, "reuse": "blend", "reuse_gamma": 0.0, "reuse_gamma_end": 1.0},
    ],
)
@torch.no_grad()
def test_naive_loop_of_guidance_and_schedules(changes: dict[str, Any]) -> None:
    """Steps 999 799 599 399 199: guidance ends, begins, and ends and begins again."""
    config = SamplerConfig(steps=5, iters=2, reuse="extrapolate", guidance=3.0, batch=2)
    model = network()
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    s = sampler(replace(config, **changes), model)
    assert len(set(s.plan.branches)) == (
        2 if {"guidance_low", "guidance_high"} & set(changes) else 1
    )
    found = s.sample([4, 0, 2], [0, 1, 2], noise=noise).x
    assert worst_relative(found, naive(model, s, [4, 0, 2], noise)) < 2e-5
    # every one of the changes matters
    for name in changes:
        less = sampler(replace(config, **{k: v for k, v in changes.items() if k != name}), model)
        other = less.sample([4, 0, 2], [0, 1, 2], noise=noise).x
        assert worst_relative(other, found) > 1e-4


@torch.no_grad()
def test_naive_loop_of_a_dit(tiny: dict[str, Tensor]) -> None:
    model = network(DIT)
    s = sampler(SamplerConfig(steps=3, guidance=2.0, batch=2), model)
    assert [k for _, k in s.plan.steps] == [0, 0, 0]
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = s.sample([4, 0, 2], [0, 1, 2], noise=noise)
    assert found.stats.residual.shape == (3, 0, 3)
    assert worst_relative(found.x, naive(model, s, [4, 0, 2], noise)) < 2e-5
    published = sampler(SamplerConfig(steps=2), tiny_dit(tiny))
    assert published.model.config == TINY_DIT
    assert published.sample([0], [0]).x.isfinite().all()


# guidance and reuse


def test_guidance_one_is_conditional(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    rows: list[int] = []
    encode = model.encode

    def counted(x: Tensor, mod: Any, **kw: Any) -> Tensor:
        rows.append(len(x))
        return encode(x, mod, **kw)

    monkeypatch.setattr(model, "encode", counted)
    config = replace(BUSY, guidance=1.0)
    plain = draw(config, LABELS[:3], SEEDS[:3], model=model)
    assert rows == [3] * 4
    near = draw(replace(config, guidance=1.0 + 1e-7), LABELS[:3], SEEDS[:3], model=model)
    assert rows[4:] == [6] * 4
    assert (near - plain).abs().max() < 1e-4
    far = draw(replace(config, guidance=2.0), LABELS[:3], SEEDS[:3], model=model)
    assert (far - plain).abs().max() > 1e-2


@pytest.mark.parametrize("channels", [None, 1])
def test_guidance_touches_predictions_only(
    channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sampler(replace(BUSY, guidance_channels=channels))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    guide = steps.guide

    def watched(cond: Tensor, null: Tensor, *args: Any) -> Tensor:
        out = guide(cond, null, *args)
        seen.append((cond.clone(), null.clone(), out.clone()))
        return out

    monkeypatch.setattr(steps, "guide", watched)
    s.sample(LABELS[:3], SEEDS[:3])
    assert len(seen) == 4
    guided = 2 if channels is None else channels
    for cond, null, out in seen:
        assert relative(out[:, :guided], (null + 2.5 * (cond - null))[:, :guided]) < 1e-6
        assert torch.equal(out[:, guided:], cond[:, guided:])
        assert not torch.equal(out[:, guided - 1], cond[:, guided - 1])


def test_reuse_identities() -> None:
    base = replace(BUSY, reuse="none")
    none, full = draw(base), draw(replace(base, reuse="full"))
    assert not torch.equal(none, full)
    blend = replace(base, reuse="blend")
    assert torch.equal(draw(replace(blend, reuse_gamma=0.0)), none)
    assert torch.equal(draw(replace(blend, reuse_gamma=1.0)), full)
    assert not torch.equal(draw(replace(blend, reuse_gamma=0.5)), full)
    extrapolate = replace(base, reuse="extrapolate")
    assert torch.equal(draw(replace(extrapolate, reuse_rho=0.0)), full)
    assert not torch.equal(draw(replace(extrapolate, reuse_rho=0.5)), full)


# the ends of the ranges


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("how", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_finite_at_zero_signal(spacing: Any, how: tuple[Any, float], prediction: str) -> None:
    for count in (1, 2, 3, 10):
        config = SamplerConfig(
            method=how[0], eta=how[1], steps=count, iters=1, spacing=spacing, guidance=2.0
        )
        s = sampler(config, prediction=prediction)
        assert s.plan.steps[0][0] == 999
        assert s.diffusion.alphas_cumprod[999] == 0
        assert s.sample(LABELS[:2], SEEDS[:2]).x.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: Any) -> None:
    exact = draw(replace(BUSY, method="ddim", guidance=1.0))
    half = draw(replace(BUSY, method="ddim", guidance=1.0, dtype=dtype))
    assert half.dtype == torch.float32
    assert 0 < relative(half, exact) < 0.1


def test_empty_and_tensor_labels() -> None:
    assert draw(BUSY, [], []).shape == (0, 2, 4, 4)
    assert torch.equal(draw(BUSY, torch.tensor(LABELS)), draw(BUSY))


@pytest.mark.parametrize(
    ("labels", "seeds", "words"),
    [
        ([-1], [0], "labels: got -1, expected integers 0..4"),
        ([0, 5], [0, 1], "labels: got 5, expected integers 0..4"),
        ([torch.tensor(3.7)], [0], "labels: got tensor(3.7"),
        (None, [0], "labels: got None, expected integers 0..4"),
        (torch.tensor(3), [0], "labels: got tensor(3), expected integers 0..4"),
        ([0], 1, "seeds: got 1, expected integers 0..2^64 - 1"),
        ([1.0], [0], "labels: got 1.0, expected integers 0..4"),
        ([math.nan], [0], "labels: got nan, expected integers"),
        ([True], [0], "labels: got True, expected integers"),
        (torch.tensor([0.5]), [0], "labels: got 0.5, expected integers"),
        ([0], torch.tensor([-1]), "seeds: got -1, expected"),
        ([0], [-1], "seeds: got -1, expected integers 0..2^64 - 1"),
        ([0], [2**64], f"seeds: got {2**64}, expected integers"),
        ([0], [0.5], "seeds: got 0.5, expected integers"),
        ([0, 1], [0], "seeds: got 1 for 2 labels, expected one per label"),
    ],
)
def test_bad_labels_and_seeds(labels: Any, seeds: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        draw(BUSY, labels, seeds)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_channels": 3}, "sample.guidance_channels: got 3, expected 1..2"),
        ({"spacing": "leading"}, "leading"),
        ({"steps": 1001}, "1001"),
        ({"iters": None, "budget": 5}, "5"),
        ({"iters": None}, "iters"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        sampler(replace(BUSY, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_and_seeds_in_any_form() -> None:
    forms = ([0, 3], torch.tensor([0, 3]), list(torch.tensor([0, 3])), np.array([0, 3]))
    found = [draw(BUSY, labels, seeds) for labels in forms for seeds in forms]
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_compiled_model_is_its_model() -> None:
    model, diffusion = network(), Diffusion(DiffusionConfig())
    compiled: Any = torch.compile(model)
    found = Sampler(compiled, diffusion, BUSY).sample(LABELS, SEEDS).x
    assert torch.equal(found, draw(BUSY, model=model))


def test_noise_that_a_step_does_not_add_is_not_looked_at() -> None:
    plain = replace(BUSY, method="ddim", eta=0.0)
    given = torch.full((BUSY.steps, len(LABELS), 2, 4, 4), math.nan)
    found = sampler(plain).sample(LABELS, SEEDS, step_noise=given).x
    assert torch.equal(found, draw(plain))


def test_release_within_a_call_is_refused() -> None:
    s = sampler(BUSY)
    with pytest.raises(ConfigError, match="release: got it within a call"):
        s.sample(LABELS, SEEDS, progress=lambda n: s.release())
    s.release()
    assert s.sample(LABELS, SEEDS).x.isfinite().all()


def test_out_of_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"

    def full(*operands: Any) -> None:
        raise RuntimeError(told)

    s = sampler(BUSY)
    monkeypatch.setattr(s, "_workspace", full)
    with pytest.raises(ConfigError, match=r"sample.batch: got \d+, expected less: out of memory"):
        s.sample(LABELS, SEEDS)
    told = "anything else"
    with pytest.raises(RuntimeError, match="anything else"):
        s.sample(LABELS, SEEDS)


def test_bad_noise_and_weights() -> None:
    s, model = sampler(BUSY), network()
    other = PreparedWeights(random_model(SMALL), torch.float32, fold=True)
    with pytest.raises(ConfigError, match="weights: got those of another model"):
        Sampler(model, s.diffusion, BUSY, other)
    wrong: Any = "digits"
    with pytest.raises(ConfigError, match="model: got str, expected an FPDM or a DiT"):
        Sampler(wrong, s.diffusion, BUSY)
    with pytest.raises(
        ConfigError, match=r"^noise: got shape \(1, 2, 4, 5\), expected \(1, 2, 4, 4\)"
    ):
        s.sample([0], [0], noise=torch.zeros(1, 2, 4, 5))
    with pytest.raises(ConfigError, match=r"^step_noise: got shape"):
        s.sample([0], [0], step_noise=torch.zeros(3, 1, 2, 4, 4))
    with pytest.raises(ConfigError, match=r"expected the weights' torch.bfloat16"):
        Sampler(model, s.diffusion, BUSY, PreparedWeights(model, torch.bfloat16))
