"""One batch on its way: the same image whatever runs beside it, and what a run counts."""

from __future__ import annotations

import pickle
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_model, relative
from test_engine import BUSY, DIT, LABELS, SEEDS, SMALL, TIMED, draw, network, sampler
from torch import Tensor

from fpdm import engine, run
from fpdm.config import ModelConfig, SamplerConfig
from fpdm.engine import Sampler

UNLOOPED = replace(BUSY, iters=None, reuse="none")  # for a DiT


def test_same_image_in_every_batch_and_shard() -> None:
    alone = torch.cat([draw(BUSY, [y], [s]) for y, s in zip(LABELS, SEEDS)])
    for batch in (1, 3, 32):
        assert (draw(replace(BUSY, batch=batch)) - alone).abs().max() <= 1e-4
    for shards in (2, 3):
        for i in range(shards):
            part = draw(BUSY, LABELS[i::shards], SEEDS[i::shards])
            assert (part - alone[i::shards]).abs().max() <= 1e-4
    assert (alone[2] - alone[3]).abs().max() > 0.1  # same label, other seed


def test_slot_keyed_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = torch.cat([draw(BUSY, [y], [s]) for y, s in zip(LABELS, SEEDS)])
    as_keys = run.as_keys
    monkeypatch.setattr(run, "as_keys", lambda seeds: as_keys(range(len(seeds))))
    assert (draw(BUSY) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("model", [SMALL, TIMED, DIT])
def test_invariant_is_bitwise(model: ModelConfig) -> None:
    config = replace(BUSY if model is not DIT else UNLOOPED, invariant=True)
    net = network(model)
    labels, seeds = LABELS[:4], SEEDS[:4]
    alone = torch.cat([draw(config, [y], [s], model=net) for y, s in zip(labels, seeds)])
    for batch in (3, 32):
        assert torch.equal(draw(replace(config, batch=batch), labels, seeds, model=net), alone)
    order = [3, 0, 2, 1]
    shuffled = draw(config, [labels[i] for i in order], [seeds[i] for i in order], model=net)
    assert torch.equal(shuffled, alone[order])


@pytest.mark.parametrize("most", [1, 2, 7])
def test_adaptive_where_no_residual_reaches_the_tolerance(most: int) -> None:
    """All run to what their plan and ``max_iters`` allow, as with a tolerance that could be met."""
    changes: dict[str, Any] = {"allocation": "adaptive", "iters": 3, "max_iters": most}
    with pytest.warns(UserWarning, match="those samples run to their cap"):
        tight = sampler(replace(BUSY, dtype="bfloat16", tol=1e-4, **changes))
    ran = tight.sample(LABELS, SEEDS).stats.iterations
    usual = sampler(replace(BUSY, tol=1e-6, **changes)).sample(LABELS, SEEDS).stats.iterations
    assert torch.equal(ran, usual)
    assert ran.max() == min(most, 7)
    assert ran.sum(0).max() <= 12


@pytest.mark.parametrize(
    ("tol", "iterate", "told"),
    [(3e-3, "compute", True), (3e-3, "float32", False), (1e-3, "float32", True)],
)
def test_rounding_is_warned_of(tol: float, iterate: str, told: bool) -> None:
    """Half of bfloat16's eps, 3.9e-3, and half of that where the iterate is float32."""
    model = random_model(SMALL, residual_dtype=iterate)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sampler(replace(BUSY, dtype="bfloat16", tol=tol), model)
    assert any("run to their cap" in str(w.message) for w in found) == told


def test_two_samplers_in_two_threads() -> None:
    model = network()
    first, second = sampler(BUSY, model), sampler(replace(BUSY, reuse="full", method="ddim"), model)
    jobs = [(first, LABELS, SEEDS), (second, LABELS[::-1], SEEDS), (first, LABELS[::-1], SEEDS)]
    solo = [s.sample(y, k).x for s, y, k in jobs]
    wrong: list[int] = []

    def work(i: int) -> None:
        s, y, k = jobs[i]
        wrong.extend(i for _ in range(4) if not torch.equal(s.sample(y, k).x, solo[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Leaky(run.Run):
    """A run that keeps its solutions where others find them."""

    shared: Any = None

    def __init__(self, sampler: Sampler, workspace: Any, *args: Any):
        Leaky.shared = Leaky.shared or workspace.solutions
        workspace.solutions = Leaky.shared
        super().__init__(sampler, workspace, *args)


@pytest.mark.parametrize("kind", [run.Run, Leaky])
def test_interleaved_runs(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler(BUSY)
    solo, other = s.sample(LABELS[:3], SEEDS[:3]).x, s.sample(LABELS[3:6], SEEDS[3:6]).x
    monkeypatch.setattr(engine, "Run", kind)
    mixed: list[Tensor] = []

    def between(_: int) -> None:
        if not mixed:
            mixed.append(s.sample(LABELS[3:6], SEEDS[3:6]).x)

    found = s.sample(LABELS[:3], SEEDS[:3], progress=between).x
    unharmed = torch.equal(found, solo) and torch.equal(mixed[0], other)
    assert unharmed == (kind is not Leaky)


def attributes(model: Any) -> dict[str, Any]:
    """Attributes of every module; of containers (hooks among them) also the length."""
    return {
        name: {k: len(v) if isinstance(v, (dict, list, set)) else None for k, v in vars(m).items()}
        for name, m in model.named_modules()
    }


def test_nothing_stays_on_the_model() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = attributes(model)
    pickle.dumps(model)
    s = sampler(BUSY, model)
    s.sample(LABELS, SEEDS)
    pickle.dumps(model)
    del s
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert attributes(model) == names
    copied = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(v, before[k]) for k, v in copied.state_dict().items())


def test_what_stays_on_a_model_is_seen() -> None:
    model = network()
    names = attributes(model)
    handle = model.blocks_pre[0].register_load_state_dict_post_hook(lambda module, keys: None)
    assert attributes(model) != names
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(model)
    handle.remove()
    assert attributes(model) == names


def test_residuals_are_those_of_the_model() -> None:
    model = network()
    s = sampler(SamplerConfig(steps=1, iters=4, batch=2), model)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    stats = s.sample([1, 2, 3], [0, 0, 0], noise=noise).stats
    t = torch.full((3,), s.plan.steps[0][0])
    with torch.no_grad():
        found = model.solve(noise, t, torch.tensor([1, 2, 3]), iters=4)
    assert found.stats is not None
    assert relative(stats.residual[0], found.stats.residual) < 1e-4


@pytest.mark.parametrize("model", [SMALL, DIT])
def test_without_residuals(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler(BUSY if model is SMALL else UNLOOPED, network(model))
    usual = s.sample(LABELS, SEEDS)
    found = s.sample(LABELS, SEEDS, stats=False)
    assert torch.equal(found.x, usual.x)
    assert found.stats.residual.shape == (4, 0, 7)
    assert usual.stats.residual.shape == (4, 2 if model is SMALL else 0, 7)
    assert torch.equal(found.stats.iterations, usual.stats.iterations)
    # nothing is computed: no iteration is asked for norms
    asked: list[bool] = []
    if model is SMALL:
        iterate_forward = run.iterate_forward

        def watched(*args: Any) -> Any:
            asked.append(args[-1] is not None)
            return iterate_forward(*args)

        monkeypatch.setattr(run, "iterate_forward", watched)
        s.sample([0], [0], stats=False)
        s.sample([0], [0])
        assert asked == [False] * 4 + [True] * 4


def test_step_noise_is_copied_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler(BUSY)
    noise = torch.randn(4, 7, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    usual = s.sample(LABELS, SEEDS, step_noise=noise).x
    copied: list[int] = []
    to = Tensor.to

    def watched(self: Tensor, *args: Any, **kw: Any) -> Tensor:
        if self.dtype == torch.float64:
            copied.append(self.dim())
        return to(self, *args, **kw)

    double = noise.double()
    monkeypatch.setattr(Tensor, "to", watched)
    assert torch.equal(s.sample(LABELS, SEEDS, step_noise=double).x, usual)
    assert copied == [5] * 3
    assert not torch.equal(s.sample(LABELS, SEEDS, step_noise=double.flip(0)).x, usual)
