"""The launch plan, and that the sampler runs exactly it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from conftest import watch_iterations
from test_engine import BUSY, LABELS, SEEDS, SMALL, TIMED, draw, network, sampler
from torch import Tensor

from fpdm import engine, fixed_point
from fpdm.config import ModelConfig, SamplerConfig
from fpdm.plan import launches


def test_launch_plan() -> None:
    plan = launches([3, 1, 2], [1, 1, 1], 2, 1)
    assert [(x.op, x.step, x.count, x.start) for x in plan] == [
        ("tables", 0, 2, ()), ("encode", 0, 3, (0,)), ("iterate", 0, 3, ()), ("update", 0, 3, ()),
        ("encode", 1, 1, (1,)), ("iterate", 1, 1, ()), ("update", 1, 1, ()),
        ("tables", 2, 1, ()), ("encode", 2, 2, (1,)), ("iterate", 2, 2, ()), ("update", 2, 2, ()),
    ]  # fmt: skip
    assert [x.op for x in launches([0, 0], [2, 2], 1, 0)] == ["update"] * 2


def test_launch_plan_of_a_guidance_interval() -> None:
    """A branch that skipped a timestep has no solution to start from."""
    plan = launches([1] * 6, [1, 2, 2, 2, 1, 2], 9, 2)
    starts = [x.start for x in plan if x.op == "encode"]
    assert starts == [(0,), (1, 0), (2, 1), (2, 2), (2,), (2, 0)]
    assert {x.branches for x in plan if x.op == "tables"} == {2}
    assert [x.branches for x in plan if x.op == "update"] == [1, 2, 2, 2, 1, 2]


class Counted:
    """Applications of the block, and rows of every iteration, while the sampler runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.pre_post, self.rows = 0, watch_iterations(monkeypatch)
        iterate_forward = fixed_point.iterate_forward

        def outside(*args: Any, **kw: Any) -> Tensor:
            self.pre_post += 1
            return iterate_forward(*args, **kw)

        monkeypatch.setattr(fixed_point, "iterate_forward", outside)


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(steps=5, iters=3),
        SamplerConfig(steps=5, budget=37, allocation="increasing"),
        SamplerConfig(steps=4, budget=30, allocation="decreasing", method="ddpm"),
        SamplerConfig(steps=3, allocation="explicit", schedule=(14, 1, 7)),
        SamplerConfig(steps=5, budget=37),
    ],
)
def test_every_plan_entry_runs_once(config: SamplerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(), []
    times, blocks = model.modulation_fp, Counted(monkeypatch)

    def timed(t: Tensor, y: Tensor, **kw: Any) -> Tensor:
        seen.extend(t[:: len(LABELS)].tolist())
        return times(t, y, **kw)

    monkeypatch.setattr(model, "modulation_fp", timed)
    s = sampler(config, model)
    found = s.sample(LABELS, SEEDS)
    ks = [k for _, k in s.plan.steps]
    assert seen == [t for t, _ in s.plan.steps]
    assert blocks.pre_post + len(blocks.rows) == s.plan.blocks
    assert blocks.rows == [len(LABELS)] * sum(ks)
    if config.budget is not None:
        assert s.plan.blocks + s.plan.stranded == config.budget
    filled = (~found.stats.residual.isnan()).sum(dim=1)
    assert filled.tolist() == found.stats.iterations[:, 0].tolist() == [[k] * 7 for k in ks]


def test_random_budgets_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and rows that really run: exactly the plan's, and never more under a tolerance."""
    model, rng = network(), random.Random(0)
    blocks = Counted(monkeypatch)
    for _ in range(40):
        count = rng.randint(1, 6)
        budget = count * 3 + rng.randint(count, 5 * count)
        allocation: Any = rng.choice(["constant", "increasing", "decreasing", "adaptive"])
        tol = rng.choice([0.15, 0.4]) if allocation == "adaptive" or rng.random() < 0.3 else 0.0
        config = SamplerConfig(
            steps=count, budget=budget, allocation=allocation, tol=tol, batch=4,
            guidance=rng.choice([1.0, 2.0]), guidance_low=rng.choice([0.0, 0.5]),
        )  # fmt: skip
        s = sampler(config, model)
        blocks.pre_post = 0
        blocks.rows.clear()
        used = s.sample(LABELS[:4], SEEDS[:4]).stats.iterations
        assert blocks.pre_post == 3 * count
        full = sum(4 * k * b for (_, k), b in zip(s.plan.steps, s.plan.branches))
        assert used.sum() <= sum(blocks.rows)
        assert sum(blocks.rows) == full if not tol else used.sum() <= full
        for branch, total in enumerate(s.totals):
            assert used[:, branch].sum(0).max() <= total
        assert s.plan.blocks + s.plan.stranded == budget


@pytest.mark.parametrize("model", [SMALL, TIMED])
def test_tables_in_chunks(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    net, config = network(model), replace(BUSY, steps=7)
    whole = draw(config, model=net)
    row = 2 * 3 * (6 if model is SMALL else 6 * 4 + 2) * 16 * 4
    for count, expected in ((1, 7), (3, 3), (100, 1)):
        monkeypatch.setattr(engine, "TABLE_BYTES", count * row)
        s = sampler(config, net)
        assert sum(x.op == "tables" for x in s.launches) == expected
        assert (s.sample(LABELS, SEEDS).x - whole).abs().max() <= 1e-5
    monkeypatch.setattr(engine, "TABLE_BYTES", 1)
    assert sum(x.op == "tables" for x in sampler(config, net).launches) == 7


def test_vectors_of_the_run_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = network(), []
    modulation_pp = model.modulation_pp

    def counted(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        return modulation_pp(*args, **kw)

    monkeypatch.setattr(model, "modulation_pp", counted)
    monkeypatch.setattr(engine, "TABLE_BYTES", 1)
    sampler(replace(BUSY, batch=7), model).sample(LABELS, SEEDS)
    assert len(calls) == 1
