"""The trainer's captured micro-batches without a GPU: recorded, and replayed on static buffers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from recorder import RecordingBackend
from torch import Tensor

from fpdm import graphs
from fpdm.batches import Draws
from fpdm.config import Config, ConfigError
from fpdm.diffusion import Diffusion
from fpdm.microstep import MicroStep
from fpdm.optim import AdamWEMA
from fpdm.recipes import RECIPES
from fpdm.weights import PreparedWeights

SMALL = replace(RECIPES["digits"].model, hidden_size=16, num_heads=2)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=2)
CPU = torch.device("cpu")
PAIRS = [(0, 1), (2, 1), (0, 1), (2, 2), (2, 1), (0, 1), (2, 2), (2, 1), (0, 1), (2, 2)]


class Bench:
    """A micro-step on the CPU beside all that it works on; ``mode`` of train.graphs."""

    def __init__(
        self, mode: str, monkeypatch: pytest.MonkeyPatch, config: Config, **execution: Any
    ):
        self.model = random_model(config.model, impl="reference", **execution)
        self.diffusion = Diffusion(config.diffusion)
        dtype = microstep_dtype(config)
        self.weights = PreparedWeights(self.model, dtype, accumulate=True)
        self.optimizer = AdamWEMA(self.model, config.optim, self.weights)
        self.backend = RecordingBackend(self.statics)
        monkeypatch.setattr(graphs, "backend_for", lambda device: self.backend)
        config = replace(config, train=replace(config.train, graphs=mode))
        self.step = MicroStep(self.model, self.diffusion, self.weights, config, CPU)

    def statics(self) -> Iterator[Tensor]:
        yield from self.optimizer.flat.values()
        yield self.optimizer.buffer
        yield from self.weights.copies.values()
        yield from self.model.buffers()
        yield self.diffusion._tables
        if self.step.held is not None:
            yield from self.step.held.tensors()

    def run(self, number: int, n: int, m: int, batch: int = 3) -> tuple[Tensor, Tensor]:
        """(rows, gradients) of a micro-batch of its own."""
        g = torch.Generator().manual_seed(number)
        x0, noise = (torch.randn(batch, 1, 8, 8, generator=g) for _ in range(2))
        t, y = (torch.randint(0, top, (batch,), generator=g) for top in (1000, 11))
        self.optimizer.zero_grad()
        rows = self.step(x0, Draws(t, noise, y), n, m, 0.5 + number)
        return rows, self.optimizer.gradients.clone()


def microstep_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def small(**train: Any) -> Config:
    config = RECIPES["digits"]
    fixed = replace(config.fixed_point, n_max=2, m_max=2)
    return replace(
        config, model=SMALL, fixed_point=fixed, train=replace(config.train, **train)
    )  # fmt: skip


CASES: dict[str, tuple[Config, dict[str, Any]]] = {
    "plain": (small(), {}),
    "half": (small(precision="bf16"), {"residual_dtype": "float32"}),
    "elementwise": (small(), {"recompute": "elementwise", "chunks": 2}),
    "full": (small(), {"recompute": "full"}),
    "phantom": (
        replace(small(), fixed_point=replace(small().fixed_point, gradient="phantom")), {}),
    "dit": (replace(small(), model=DIT), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_replays_are_eager_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and every gradient bit for bit, over inputs, scales and (n, m); a graph per pair."""
    config, execution = CASES[case]
    ours = Bench("on", monkeypatch, config, **execution)
    usual = Bench("off", monkeypatch, config, **execution)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (n, m) in enumerate(PAIRS):
            for a, b in zip(ours.run(number, n, m), usual.run(number, n, m)):
                assert torch.equal(a, b)
    assert usual.step.graphs is None
    assert ours.step.graphs is not None
    pairs = 1 if case == "dit" else len(set(PAIRS))
    assert ours.step.graphs.captures == ours.backend.alive == pairs
    assert ours.step.graphs.replays == len(PAIRS) - pairs
    ours.step.release()
    assert ours.backend.alive == 0


def test_an_optimizer_step_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written in place: a graph reads the new ones."""
    config = small(precision="bf16")
    ours, usual = (Bench(mode, monkeypatch, config) for mode in ("on", "off"))
    for number in range(6):
        for b in (ours, usual):
            b.run(number, 1, 2)
            b.optimizer.step(1e-2)
    assert ours.step.graphs is not None
    assert ours.step.graphs.replays == 5
    assert torch.equal(ours.optimizer.flat["w"], usual.optimizer.flat["w"])


def test_another_batch_size_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    for number, batch in enumerate((3, 3, 3, 2, 2, 2, 3, 3)):
        for a, b in zip(ours.run(number, 1, 1, batch), usual.run(number, 1, 1, batch)):
            assert torch.equal(a, b)
    assert ours.backend.alive == 1
    assert ours.step.graphs is not None
    assert ours.step.graphs.captures == 3


def test_statistics_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Bench("on", monkeypatch, small())
    x0, noise = torch.randn(2, 3, 1, 8, 8)
    draws = Draws(torch.tensor([1, 2, 3]), noise, torch.tensor([1, 2, 3]))
    for _ in range(4):
        rows = ours.step(x0, draws, 1, 1, 1.0, stats=True)
    assert ours.backend.alive == 0
    assert (rows[3] > 0).all()


@pytest.mark.parametrize("fault", ["scale", "noise", "gradient"])
def test_work_on_passing_buffers_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number or tensor of one micro-batch in a graph: refused, or the results differ."""
    kept: dict[int, Tensor] = {}
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    run = MicroStep._run

    def planted(self: Any, x0: Any, d: Any, n: int, m: int, scale: Any, stats: bool) -> Tensor:
        if self is ours.step and fault == "scale":
            scale = float(scale.detach().numpy())
        if self is ours.step and fault == "noise":
            d = Draws(d.t, kept.setdefault(0, d.noise.clone()), d.y)
        if self is ours.step and fault == "gradient":
            for p in self.model.parameters():
                p.grad = None
        return run(self, x0, d, n, m, scale, stats)

    monkeypatch.setattr(MicroStep, "_run", planted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, AssertionError)):  # noqa: PT012
            for number in range(5):
                for a, b in zip(ours.run(number, 1, 1), usual.run(number, 1, 1)):
                    assert torch.equal(a, b)


def test_a_failed_capture_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    ours.backend.fail = 1
    with pytest.warns(UserWarning, match="capture failed, everything runs eagerly"):  # noqa: PT031
        for number in range(4):
            for a, b in zip(ours.run(number, 1, 1), usual.run(number, 1, 1)):
                assert torch.equal(a, b)
    assert ours.backend.alive == 0


def test_on_needs_a_device_that_captures() -> None:
    config = small(graphs="on")
    model = random_model(config.model)
    weights = PreparedWeights(model, torch.float32)
    with pytest.raises(ConfigError, match=r"train\.graphs: got on, expected auto or off on cpu"):
        MicroStep(model, Diffusion(config.diffusion), weights, config, CPU)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer with recorded micro-batches writes what it writes without."""
    from fpdm.train import Trainer

    found = {}
    for mode in ("off", "on"):
        config = small(
            out=str(tmp_path), name=mode, steps=24, batch=8, accumulate=2, log_every=5,
            save_every=0, grid_every=0, grid_per_class=1, graphs=mode,
        )  # fmt: skip
        execution = replace(config.execution, impl="reference")
        trainer = Trainer(replace(config, execution=execution))

        def statics(t: Any = trainer) -> Iterator[Tensor]:
            yield from (*t.optimizer.flat.values(), t.optimizer.buffer, t.diffusion._tables)
            yield from (*t.model.buffers(), *t.prepared.copies.values())
            yield from t.micro.held.tensors()

        backend = RecordingBackend(statics)
        monkeypatch.setattr(graphs, "backend_for", lambda device, b=backend: b)
        monkeypatch.setattr(trainer, "_grid", lambda: None)
        trainer.run()
        found[mode] = trainer.directory.metrics.read_text(), trainer.optimizer.flat["w"].clone()
        if mode == "on":
            assert trainer.micro.graphs.replays > 20
    assert found["on"][0] == found["off"][0]
    assert torch.equal(found["on"][1], found["off"][1])
