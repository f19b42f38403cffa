"""The model under diffusers' schedulers: the same images as our own sampler, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_model, relative
from recorder import RecordingBackend
from torch import Tensor

from fpdm import classifier, engine, graphs
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.pretrained import load_source
from fpdm.schedulers import Denoiser, make_scheduler

diffusers = pytest.importorskip("diffusers")

SMALL = ModelConfig(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=2)
LABELS, SEEDS = [0, 4, 1, 1, 3], [5, 0, 2**63, 7, 8]
BUSY = SamplerConfig(
    steps=10, budget=10 * 2 + 37, allocation="increasing", reuse="full", guidance=2.5, batch=3
)


def loop(denoise: Denoiser, scheduler: Any, seeds: Any = SEEDS) -> Tensor:
    x = denoise.noise(seeds) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = denoise(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
    return x


def both(
    config: SamplerConfig, model: Any, kind: str = "DDIMScheduler", **schedule: Any
) -> tuple[Tensor, Tensor, Denoiser, Sampler]:
    """Images of a scheduler and of our sampler."""
    diffusion = Diffusion(DiffusionConfig(**schedule))
    scheduler = make_scheduler(getattr(diffusers, kind), diffusion)
    scheduler.set_timesteps(config.steps)
    denoise = Denoiser(model, diffusion, config, scheduler.timesteps, LABELS)
    sampler = Sampler(model, diffusion, config)
    return loop(denoise, scheduler), sampler.sample(LABELS, SEEDS).x, denoise, sampler


CASES: dict[str, dict[str, Any]] = {
    "busy": {},
    "interval": {"guidance_low": 0.25, "guidance_high": 0.65, "reuse": "extrapolate"},
    "blend": {"reuse": "blend", "reuse_gamma_end": 0.9, "guidance_rescale": 0.5},
    "schedule": {
        "budget": None, "allocation": "explicit", "schedule": (5, 1, 2, 3, 1, 1, 2, 4, 1, 2)
    },
    "tolerance": {"budget": None, "iters": 6, "tol": 0.2, "allocation": "adaptive"},
    "unguided": {"guidance": 1.0, "reuse": "none", "steps": 25, "budget": 25 * 4},
    "alone": {"invariant": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ddim_equals_the_sampler(case: str) -> None:
    """Guidance, reuse and k per timestep, in batches of three and two."""
    config = replace(BUSY, **CASES[case])
    found, wanted, denoise, sampler = both(config, random_model(SMALL))
    assert list(denoise.timesteps) == [t for t, _ in sampler.plan.steps]
    assert denoise.sampler.plan == sampler.plan
    assert relative(found, wanted) <= 2e-6
    assert denoise.stats is not None
    assert denoise.stats.iterations.shape == (config.steps, 1 + (config.guidance != 1), 5)
    if not config.tol:
        assert denoise.stats.iterations[:, 0, 0].tolist() == [k for _, k in sampler.plan.steps]


def test_the_comparison_bites() -> None:
    model = random_model(SMALL)
    _, wanted, *_ = both(BUSY, model)
    for changes in ({"reuse": "none"}, {"guidance": 2.0}, {"allocation": "decreasing"}):
        assert relative(both(replace(BUSY, **changes), model)[0], wanted) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_dit_and_other_predictions(prediction: str) -> None:
    dit = replace(BUSY, budget=None, allocation="constant", reuse="none")
    found, wanted, *_ = both(dit, random_model(DIT), prediction=prediction)
    assert relative(found, wanted) <= 2e-6


def test_eps_prediction() -> None:
    plain = {"prediction": "eps", "zero_terminal_snr": False, "loss_weight": "eps_mse"}
    found, wanted, *_ = both(BUSY, random_model(SMALL), **plain)
    assert relative(found, wanted) <= 1e-5


def test_dpm_solver_equals_the_sampler() -> None:
    """At zero SNR their first step is another: from an abar of 2^-24 instead of 0."""
    model, config = random_model(SMALL), replace(BUSY, method="dpmpp_2m")
    found, wanted, *_ = both(config, model, "DPMSolverMultistepScheduler", zero_terminal_snr=False)
    assert relative(found, wanted) <= 2e-6
    found, wanted, *_ = both(config, model, "DPMSolverMultistepScheduler")
    assert 1e-4 < relative(found, wanted) <= 1e-2


@pytest.mark.parametrize(
    "kind",
    [
        "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
        "DDPMScheduler",
    ],
)  # fmt: skip
def test_digits_by_other_schedulers(kind: str) -> None:
    """What they draw with the shipped model is read as its label."""
    source = load_source(None)
    scheduler = make_scheduler(getattr(diffusers, kind), source.diffusion)
    scheduler.set_timesteps(20)
    config = SamplerConfig(budget=100, guidance=1.5, reuse="full")
    labels = [i % 10 for i in range(30)]
    denoise = Denoiser(source.model, source.diffusion, config, scheduler.timesteps, labels)
    torch.manual_seed(0)  # the noise of ddpm
    x = loop(denoise, scheduler, range(30)).clamp(-1, 1)
    with torch.no_grad():
        features = classifier.features(x, classifier.shipped())
        read = classifier.logits(features, classifier.shipped()).argmax(dim=1)
    assert (read == torch.tensor(labels)).double().mean() >= 0.9
    wrong = torch.tensor(labels).roll(1)
    assert (read == wrong).double().mean() < 0.2


def test_a_second_loop_begins_anew() -> None:
    diffusion = Diffusion(DiffusionConfig())
    scheduler = make_scheduler(diffusers.DDIMScheduler, diffusion)
    scheduler.set_timesteps(10)
    denoise = Denoiser(random_model(SMALL), diffusion, BUSY, scheduler.timesteps, LABELS)
    whole = loop(denoise, scheduler)
    assert torch.equal(loop(denoise, scheduler), whole)
    # left in the middle
    x = denoise.noise(SEEDS)
    for t in scheduler.timesteps[:4]:
        denoise(x, t)
    assert torch.equal(loop(denoise, scheduler), whole)
    assert denoise(x.double(), 999).dtype == torch.float64


@pytest.mark.parametrize("changes", [{}, {"budget": None, "iters": 6, "tol": 0.2}])
@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_inference_mode_may_come_and_go(modes: tuple[bool, ...], changes: dict[str, Any]) -> None:
    """While a denoiser is made, in a loop's first timestep, between timesteps and between loops."""
    model, diffusion = random_model(SMALL), Diffusion(DiffusionConfig())
    config = replace(BUSY, allocation="constant", reuse="extrapolate", **changes)
    timesteps = [999, 700, 300, 50]

    def predictions(made: bool, *called: bool) -> list[Tensor]:
        with torch.inference_mode(made):
            denoise = Denoiser(model, diffusion, replace(config, steps=4), timesteps, LABELS)
            x, found = denoise.noise(SEEDS), []
        for mode, t in zip(called, 3 * timesteps):
            with torch.inference_mode(mode):
                found.append(denoise(x, t))
                assert not found[-1].requires_grad
        return found

    usual = predictions(*[False] * 13)
    mixed = predictions(modes[0], *modes, *modes[::-1], *modes[::-1], *modes, *modes, *modes)
    assert len(mixed) == len(usual) == 12
    assert all(torch.equal(a, b) for a, b in zip(mixed, usual))


def test_streams_are_told_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call waits for what was launched before it, on whichever stream; what a loop keeps is
    held for the stream of every call."""

    class Event:
        waits = 0

        def wait(self) -> None:
            self.waits += 1

    events: list[Event] = []
    held: list[set[int]] = []

    def now(device: torch.device) -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(engine, "_now", now)
    monkeypatch.setattr(
        engine, "_hold", lambda buffers: held.append({b.data_ptr() for b in buffers})
    )
    config = replace(BUSY, steps=2, budget=None, iters=2, allocation="constant")
    denoise = Denoiser(random_model(SMALL), Diffusion(DiffusionConfig()), config, [999, 9], LABELS)
    assert len(events) == 1
    for n, t in enumerate([999, 9, 999], 1):
        denoise(denoise.noise(SEEDS), t)
        assert [e.waits for e in events] == [1] * n + [0]
    buffers = {b.data_ptr() for w in denoise.workspaces for b in w.tensors()}
    assert all(buffers <= kept for kept in held)
    with pytest.raises(ConfigError):
        denoise(denoise.noise(SEEDS), 400)
    assert [e.waits for e in events] == [1] * 4 + [0]
    assert denoise.stats is not None
    assert denoise.stats.residual.data_ptr() in held[-1]


def test_replays_equal_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured launches read static buffers only, those of their own part of the batch."""
    model, diffusion = random_model(SMALL, impl="reference"), Diffusion(DiffusionConfig())
    scheduler = make_scheduler(diffusers.DDIMScheduler, diffusion)
    scheduler.set_timesteps(10)
    args = diffusion, replace(BUSY, graphs="on"), scheduler.timesteps, LABELS

    def statics() -> list[Tensor]:
        s = denoise.sampler
        buffers = [t for w in denoise.workspaces for t in w.tensors()]
        weights = [*s.weights.params.values(), *s.weights.copies.values(), model.pos_embed]
        return [*buffers, s.timesteps, s.counts, s.reserves, s.rows, *weights]

    monkeypatch.setattr(graphs, "backend_for", lambda device: RecordingBackend(statics))
    denoise = Denoiser(model, *args)
    eager = Denoiser(model, diffusion, replace(BUSY, graphs="off"), *args[2:])
    for seeds in (SEEDS, SEEDS[::-1]):
        assert torch.equal(loop(denoise, scheduler, seeds), loop(eager, scheduler, seeds))
    cache = denoise.sampler.graphs
    assert cache is not None
    assert 0 < cache.captures < cache.replays


def test_timesteps_out_of_order() -> None:
    denoise = Denoiser(
        random_model(SMALL), Diffusion(DiffusionConfig()), SamplerConfig(iters=1), [999, 400], [1]
    )
    x = torch.zeros(1, 2, 4, 4)
    for t, words in ((400, "t: got 400, expected 999, which begins a loop"), (999, ""),
                     (399.5, "t: got 399.5, expected 400 or 999, which"), (400, ""),
                     (400, "t: got 400, expected 999, which")):  # fmt: skip
        if not words:
            denoise(x, torch.tensor(t))
            continue
        with pytest.raises(ConfigError, match=words):
            denoise(x, torch.tensor(t))
    with pytest.raises(ConfigError, match=r"x: got shape \(2, 2, 4, 4\), expected \(1, 2, 4, 4\)"):
        denoise(torch.zeros(2, 2, 4, 4), 999)


@pytest.mark.parametrize("part", [0, 1])
def test_an_interrupted_loop_begins_again(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts before the interruption are a timestep ahead: the same call again is refused."""
    config = SamplerConfig(iters=2, batch=2, reuse="full")
    args = random_model(SMALL), Diffusion(DiffusionConfig()), config, [999, 600, 200], [0, 1, 2]
    denoise, x = Denoiser(*args), torch.ones(3, 2, 4, 4)
    whole = [denoise(x, t) for t in (999, 600, 200)]
    denoise(x, 999)
    predict = denoise.runs[part].predict

    def interrupted(*operands: Any) -> None:
        predict(*operands)
        raise KeyboardInterrupt

    denoise.runs[part].predict = interrupted  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        denoise(x, 600)
    with pytest.raises(ConfigError, match="t: got 600, expected 999, which begins a loop"):
        denoise(x, 600)
    assert all(torch.equal(denoise(x, t), y) for t, y in zip((999, 600, 200), whole))


@pytest.mark.parametrize(
    ("timesteps", "labels", "words"),
    [
        ([999, 999, 400], [1], "timesteps: got 999, 999, 400, expected integers 999..0, desc"),
        ([1000, 3], [1], "timesteps: got 1000, 3, expected integers 999..0"),
        (torch.tensor([999.0, 400.5]), [1], "timesteps: got 999, 400.5, expected integers"),
        ([9, 8, 7, 6, 5, 4], [5], "labels: got 5, expected integers 0..4"),
        ([], [1], "timesteps: got none, expected"),
        ([999], [], "labels: got none, expected at least one"),
    ],
)
def test_bad_loops(timesteps: Any, labels: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        Denoiser(
            random_model(SMALL), Diffusion(DiffusionConfig()), SamplerConfig(iters=1), timesteps,
            labels,
        )  # fmt: skip
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("PNDMScheduler", {}, "got PNDMScheduler, expected one with rescale_betas_zero_snr, such"),
        ("DDIMScheduler", {"solver_order": 2}, "got solver_order, which DDIMScheduler does not"),
        ("DDIMScheduler", {"timestep_spacing": "leading"}, "got leading spacing with zero"),
    ],
)
def test_bad_schedulers(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        make_scheduler(getattr(diffusers, kind), Diffusion(DiffusionConfig()), **settings)
    assert "\n" not in str(error.value)


def test_a_budget_of_the_loop() -> None:
    """Impossible ones name the steps that fit, as everywhere."""
    with pytest.raises(ConfigError, match="got 8 for 3 steps, expected at most 2 steps"):
        Denoiser(
            random_model(SMALL), Diffusion(DiffusionConfig()), SamplerConfig(budget=8),
            [999, 500, 1], [1],
        )  # fmt: skip
