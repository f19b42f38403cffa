"""Costs by hand; plans for thousands of random budgets: exact, never exceeded, every k >= 1."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from fpdm import budget as module
from fpdm.budget import (
    Calibration,
    Plan,
    apportion,
    blocks_per_step,
    greedy,
    macs_per_sample,
    plan,
    step_macs,
)
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig

XL = ModelConfig()
SMALL = ModelConfig(input_size=8, hidden_size=64, num_heads=4, pre_depth=2, post_depth=3)
BARE = ModelConfig(input_size=8, hidden_size=32, num_heads=2, pre_depth=0, post_depth=0)
DIT = ModelConfig(kind="dit", depth=28, pre_depth=0, post_depth=0)
DIFFUSION = DiffusionConfig()
# paper, figures 4 and 6: k -> S at 280 blocks, one pre and one post block
PAPER = {1: 93, 2: 70, 3: 56, 5: 40, 6: 35, 8: 28, 12: 20, 18: 14, 26: 10, 33: 8, 38: 7, 54: 5,
         68: 4}  # fmt: skip


def make(model: ModelConfig = XL, **settings: Any) -> Plan:
    return plan(model, SamplerConfig(**settings), DIFFUSION)


def ks(p: Plan) -> list[int]:
    return [k for _, k in p.steps]


def gemm_macs(config: ModelConfig, k: int, folded: bool) -> int:
    """One evaluation for one sample, GEMM by GEMM: (rows, inner, columns)."""
    t, d = config.tokens, config.hidden_size
    block = [(t, d, 3 * d), (t, d, t), (t, t, d), (t, d, d), (t, d, 4 * d), (t, 4 * d, d)]
    if config.kind == "dit":
        gemms = block * config.depth
    else:
        iteration = [(t, d, 2 * d), (t, 2 * d, d), *block]  # A x, W2
        inject = [(t, d, 2 * d)] if folded else [(t, d, d), (t, d, 2 * d)]  # E W_p, or W_p then E
        gemms = block * (config.pre_depth + config.post_depth) + inject + iteration * k
    return sum(math.prod(gemm) for gemm in gemms)


@pytest.mark.parametrize("config", [XL, SMALL, BARE, DIT])
@pytest.mark.parametrize("folded", [True, False])
def test_macs_gemm_by_gemm(config: ModelConfig, folded: bool) -> None:
    counts = [0, 0] if config.kind == "dit" else [3, 1, 8]
    want = sum(gemm_macs(config, k, folded) for k in counts)
    assert macs_per_sample(config, counts, folded, 1.0) == want
    assert macs_per_sample(config, counts, folded, 4.0) == 2 * want
    assert macs_per_sample(config, counts, folded, 0.0) == 2 * want
    assert macs_per_sample(config, counts, folded, 1.0) != want + 1


def test_macs_in_numbers() -> None:
    """XL/2: a block is 16 515 072 MACs per token, an iteration 21 823 488 = 1.32 of it."""
    d, t = 1152, 256
    block, iteration = 12 * d * d + 2 * t * d, 16 * d * d + 2 * t * d
    assert (block, iteration) == (16_515_072, 21_823_488)
    assert macs_per_sample(DIT, [0], False, 1.0) == t * 28 * block
    assert macs_per_sample(XL, [8], False, 1.0) == t * (2 * block + 3 * d * d + 8 * iteration)
    assert round(iteration / block, 2) == 1.32


def test_blocks() -> None:
    assert blocks_per_step(XL, 8) == 10
    assert blocks_per_step(SMALL, 1) == 6
    assert blocks_per_step(DIT, 0) == 28


def test_paper_grid() -> None:
    for k, s in PAPER.items():
        assert ks(make(steps=s, budget=280)) == [k] * s
    # not in the grid: 280 / 6 blocks leaves four stranded
    assert make(steps=46, budget=280).stranded == 4


def shape_faults(k: list[int], s: SamplerConfig, curves: Any) -> dict[str, bool]:
    """How the iterations of an allocation are not spread as promised."""
    extra = sum(k) - s.steps
    if s.allocation == "constant":
        return {"order": len(set(k)) > 1}
    if s.allocation == "explicit":
        return {"order": tuple(k) != s.schedule}
    if s.allocation == "adaptive":
        return {"order": max(k) - min(k) > 1}
    if s.allocation == "learned":
        # no iteration of one step would have done more at another
        hulls = [module._hull_gains(curve) + [0.0] * (max(k) + 1) for curve in curves]
        least = min((h[n - 2] for h, n in zip(hulls, k) if n > 1), default=math.inf)
        return {"order": any(h[n - 1] > least for h, n in zip(hulls, k))}
    rising = k if s.allocation == "increasing" else k[::-1]
    quota = [extra * (0.5 + i / max(s.steps - 1, 1)) / s.steps for i in range(s.steps)]
    off = s.steps > 1 and any(abs(v - 1 - q) > 1 + 1e-9 for v, q in zip(rising, quota))
    return {"order": rising != sorted(k), "shape": off}


def faults(p: Plan, model: ModelConfig, s: SamplerConfig) -> list[str]:
    """Promises that a plan breaks."""
    k, fixed = ks(p), model.pre_depth + model.post_depth
    apart, one = step_macs(model, True)
    macs = sum(b * (apart + n * one) for b, n in zip(p.branches, k))
    most, least = one * max(p.branches), one * min(p.branches)
    constant = s.allocation == "constant"
    curves = CALIBRATION.curves([t for t, _ in p.steps])
    broken = {
        "length": len(k) != s.steps,
        "least": min(k) < 1,
        "descending": any(a <= b for (a, _), (b, _) in zip(p.steps, p.steps[1:])),
        "blocks": p.blocks != sum(k) + s.steps * fixed,
        "macs": p.macs != macs,
        "branches": (set(p.branches) <= {1}) != (s.guidance == 1.0),
        "stranded": not 0 <= p.stranded < (s.steps if constant else 1),
        "limit": (p.limit > 0) != (s.allocation == "adaptive"),
    } | shape_faults(k, s, curves)
    if s.budget is not None:
        broken["total"] = p.blocks + p.stranded != s.budget
    if s.budget_macs is not None:
        broken["exceeded"] = p.macs > s.budget_macs
        broken["missed"] = p.macs + (p.stranded + 1) * most <= s.budget_macs
        if most == least:
            broken["macs of one"] = p.macs != macs_per_sample(model, k, True, s.guidance)
    if s.iters is not None:
        broken["total"] = sum(k) != s.iters * s.steps
    return [name for name, bad in broken.items() if bad]


CALIBRATION = Calibration(
    timesteps=(0, 300, 600, 999),
    residual=tuple(
        tuple(scale * rate**k * (1.3 if k % 3 == 1 else 1.0) for k in range(12))
        for scale, rate in ((1.0, 0.5), (0.8, 0.7), (1.1, 0.6), (1.0, 0.9))
    ),
    reuse="none", guidance=1.0, weights="0123",
)  # fmt: skip
ALLOCATIONS: list[Any] = [
    "constant", "increasing", "decreasing", "explicit", "adaptive", "learned",
]  # fmt: skip


def draw(rng: random.Random, longest: int = 1000) -> tuple[ModelConfig, SamplerConfig]:
    """A model and a budget that fits: from one iteration per step to hundreds."""
    model = rng.choice([XL, SMALL, BARE])
    steps = min(longest, rng.choice([1, 2, 3, rng.randint(1, 60), rng.randint(1, 1000)]))
    kind = rng.choice(["iters", "budget", "budget_macs"])
    iterations = rng.randint(steps, steps * rng.choice([1, 2, 40]))
    guidance, low = rng.choice([(1.0, 0.0), (4.0, 0.0), (4.0, 0.0), (4.0, rng.random())])
    value: float = {
        "iters": max(1, iterations // steps),
        "budget": iterations + steps * (model.pre_depth + model.post_depth),
        "budget_macs": 0,
    }[kind]
    if kind == "budget_macs":
        cost = macs_per_sample(model, [iterations] + [0] * (steps - 1), True, guidance)
        value = float(cost) * rng.choice([1.0, 1.0 + 0.001 * rng.random()])
    settings: dict[str, Any] = {kind: value}
    allocation: Any = rng.choice(ALLOCATIONS)
    if allocation == "adaptive":
        settings["tol"] = 0.1
    if allocation == "explicit":
        settings = {"schedule": tuple(rng.randint(1, 40) for _ in range(steps))}
    return model, SamplerConfig(
        steps=steps, guidance=guidance, guidance_low=low, allocation=allocation, **settings
    )


def planned(model: ModelConfig, sampler: SamplerConfig) -> Plan:
    return plan(model, sampler, DIFFUSION, calibration=CALIBRATION)


def test_thousands_of_budgets() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(10_000):
        model, sampler = draw(rng, longest=1000 if rng.random() < 0.02 else 30)
        assert faults(planned(model, sampler), model, sampler) == [], (model, sampler)
        seen.add((sampler.allocation, sampler.budget is None, sampler.budget_macs is None))
    # explicit has its own cost
    assert len(seen) == 5 * 3 + 1


@pytest.mark.parametrize("fault", ["round", "published", "reversed", "one more"])
def test_faulty_allocations_are_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def shares(total: int, weights: list[int], more: int = 0) -> list[int]:
        exact = [total * w / sum(weights) for w in weights]
        if fault == "round":
            return [round(x) for x in exact]
        if fault == "published":  # ceil for the first entries while the sum allows, floor after
            floors = [math.floor(x) for x in exact]
            up = next(
                j for j in range(len(exact), -1, -1)
                if sum(map(math.ceil, exact[:j])) + sum(floors[j:]) <= total
            )  # fmt: skip
            return [math.ceil(x) for x in exact[:up]] + floors[up:]
        right = apportion(total, weights)
        return right[::-1] if fault == "reversed" else [right[0] + 1, *right[1:]]

    monkeypatch.setattr(module, "apportion", shares)
    rng, caught = random.Random(0), set()
    for _ in range(300):
        model, sampler = draw(rng, longest=60)
        caught.update(faults(planned(model, sampler), model, sampler))
    assert caught & {"round": {"total", "stranded"}, "reversed": {"order"}}.get(
        fault, {"total", "stranded", "exceeded", "order"}
    )


@pytest.mark.parametrize("allocation", ["increasing", "decreasing"])
def test_what_remainders_leave_is_spent(allocation: Any) -> None:
    """One iteration more in all may move several to guided steps, which a budget does not pay for:
    those in between go where the remainders of the smaller total lead."""
    rng, spent = random.Random(0), 0
    for _ in range(1500):
        steps = rng.randint(4, 40)
        cost = macs_per_sample(XL, [rng.randint(steps, 40 * steps)] + [0] * (steps - 1), True, 4.0)
        s = SamplerConfig(
            steps=steps, guidance=4.0, allocation=allocation, budget_macs=float(cost),
            guidance_low=rng.random() / 2, guidance_high=0.5 + rng.random() / 2,
        )  # fmt: skip
        try:
            p = planned(XL, s)
        except ConfigError:  # too little, or no timestep in the interval
            continue
        assert faults(p, XL, s) == [], s
        plain = module.allocate(sum(ks(p)), steps, allocation)
        spent += plain != ks(p)
    assert spent


def test_apportion() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(2, [1, 3]) == apportion(2, [3, 1])[::-1] == [0, 2]  # 0.5, 1.5
    assert apportion(0, [1, 2]) == [0, 0]
    assert apportion(7, [3, 2, 1]) == [4, 2, 1]  # 3.5, 2.33, 1.17


def test_allocations_by_hand() -> None:
    base: dict[str, Any] = {"steps": 3, "budget": 3 * 2 + 12}
    assert ks(make(**base)) == [4, 4, 4]
    assert ks(make(**base, allocation="increasing")) == [2, 4, 6]  # 1 + (1.5, 3, 4.5)
    assert ks(make(**base, allocation="decreasing")) == [6, 4, 2]
    assert ks(make(steps=3, iters=4, allocation="increasing")) == [2, 4, 6]
    assert ks(make(steps=4, iters=2, allocation="increasing")) == [1, 2, 2, 3]
    assert ks(make(steps=4, iters=9, allocation="increasing")) == [5, 8, 10, 13]
    assert ks(make(steps=4, iters=9, allocation="decreasing")) == [13, 10, 8, 5]
    assert ks(make(steps=3, iters=4)) == [4, 4, 4]
    assert ks(make(steps=1, iters=9, allocation="decreasing")) == [9]
    assert ks(make(steps=3, schedule=(5, 1, 2), allocation="explicit")) == [5, 1, 2]
    p = make(steps=3, budget=20)
    assert (ks(p), p.stranded, p.blocks) == ([4, 4, 4], 2, 18)
    assert [t for t, _ in p.steps] == [999, 666, 332]


def test_folding_and_guidance_change_what_a_mac_budget_buys() -> None:
    macs = float(macs_per_sample(XL, [8] * 28, True, 1.0))
    sampler = SamplerConfig(steps=28, budget_macs=macs)
    assert ks(plan(XL, sampler, DIFFUSION)) == [8] * 28
    assert ks(plan(XL, sampler, DIFFUSION, folded=False)) == [7] * 28
    guided = replace(sampler, guidance=4.0)
    assert ks(plan(XL, guided, DIFFUSION)) == [3] * 28
    assert plan(XL, replace(guided, budget_macs=2 * macs), DIFFUSION).macs == 2 * macs
    assert ks(plan(XL, replace(sampler, budget_macs=macs - 1), DIFFUSION)) == [7] * 28


def test_guidance_interval_by_hand() -> None:
    """Steps 999 666 332; the middle one is guided."""
    base: dict[str, Any] = {"steps": 3, "guidance": 4.0, "guidance_low": 0.4, "guidance_high": 0.9}
    assert make(**base, iters=2).branches == (1, 2, 1)
    fixed, one = step_macs(XL, True)
    exact = 4 * fixed + 8 * one
    assert make(**base, iters=2).macs == exact
    assert ks(make(**base, budget_macs=float(exact))) == [2, 2, 2]
    assert ks(make(**base, budget_macs=float(exact - 1))) == [1, 1, 1]
    assert make(**base, budget_macs=float(exact - 1)).stranded == 1
    assert ks(make(**base, budget_macs=float(exact), allocation="increasing")) == [1, 2, 3]
    with pytest.raises(ConfigError, match="at most 3 steps, every step needing"):
        make(**base | {"steps": 4}, budget_macs=float(4 * (fixed + one)))


def test_greedy_is_optimal_on_convex_curves() -> None:
    rng = random.Random(3)
    for _ in range(30):
        curves = []
        for _ in range(rng.randint(1, 4)):
            drops = sorted((rng.random() for _ in range(6)), reverse=True)
            curves.append([sum(drops[j:]) for j in range(7)])
        for total in range(len(curves), 7 * len(curves) + 1):
            found = greedy(total, curves)
            assert sum(found) == total
            spent = sum(curve[k - 1] for k, curve in zip(found, curves))
            exact = min(
                sum(curve[k - 1] for k, curve in zip(combination, curves))
                for combination in itertools.product(range(1, 8), repeat=len(curves))
                if sum(combination) == total
            ) if total <= 12 else spent  # fmt: skip
            assert spent <= exact + 1e-12


def test_greedy_by_hand() -> None:
    # a plateau does not hide what comes behind it: 1 1 0 falls by 1/2 each
    assert greedy(5, [[1.0, 1.0, 0.0], [1.0, 0.6, 0.3]]) == [3, 2]
    assert greedy(3, [[1.0, 1.0, 0.0], [1.0, 0.3, 0.2]]) == [1, 2]
    # residuals that rise, and iterations beyond what was measured
    assert greedy(4, [[0.1, 0.5, 0.9], [1.0, 0.9, 0.8]]) == [1, 3]
    assert greedy(11, [[1.0, 0.5], [1.0, 0.2]]) == [6, 5]
    assert greedy(2, [[1.0], [2.0]]) == [1, 1]
    # equal steps share
    assert greedy(6, [[1.0, 0.5, 0.25]] * 3) == [2, 2, 2]


def test_learned() -> None:
    curves = CALIBRATION.curves([999, 600, 450, 0])
    assert curves[0] == pytest.approx(CALIBRATION.residual[3])
    assert curves[2] == pytest.approx(
        [math.sqrt(a * b) for a, b in zip(CALIBRATION.residual[1], CALIBRATION.residual[2])]
    )
    sampler = SamplerConfig(steps=4, iters=7, allocation="learned")
    found = ks(planned(XL, sampler))
    assert sum(found) == 28
    # the slowest to converge, the noisiest here, gets most
    assert found[0] == max(found) > 7
    with pytest.raises(ConfigError, match=r"got learned without a calibration, expected one"):
        plan(XL, sampler, DIFFUSION)
    with pytest.raises(ConfigError, match=r"got learned with reuse none, expected .*reuse=full"):
        planned(XL, replace(sampler, reuse="full"))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_dit(spacing: Any) -> None:
    free = make(DIT, steps=10, spacing=spacing)
    assert (ks(free), free.stranded, free.blocks) == ([0] * 10, 0, 280)
    assert make(DIT, steps=10, budget=280, spacing=spacing) == free
    assert make(DIT, steps=10, budget_macs=float(free.macs), spacing=spacing) == free
    assert make(DIT, steps=10, budget_macs=1.09 * free.macs, spacing=spacing) == free
    assert make(DIT, steps=10, guidance=4.0).macs == 2 * free.macs


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (XL, {}, "got no cost, expected exactly one of iters, budget, budget_macs, schedule"),
        (XL, {"iters": 3, "budget": 280}, "got iters and budget, expected exactly one"),
        (XL, {"iters": 3, "schedule": (1,)}, "got iters and schedule, expected exactly one"),
        (XL, {"budget": 280, "budget_macs": 1e15}, "got budget and budget_macs, expected"),
        (XL, {"schedule": (1, 2)}, "allocation: got constant with schedule, expected explicit"),
        (XL, {"iters": 2, "allocation": "explicit"}, "allocation: got explicit with iters"),
        (
            XL,
            {"schedule": (1, 2), "allocation": "explicit", "steps": 3},
            "schedule: got 2 entries, the least 1, expected 3 entries",
        ),
        (
            XL,
            {"schedule": (1, 0, 2), "allocation": "explicit", "steps": 3},
            "schedule: got 3 entries, the least 0, expected 3 entries .* each at least 1",
        ),
        (XL, {"steps": 94, "budget": 280}, "got 280 for 94 steps, expected at most 93 steps"),
        (XL, {"steps": 4, "budget": 2}, r"got 2 for 4 steps, expected at least 3 \(1 step\)"),
        (XL, {"steps": 4, "budget_macs": 2.5e10}, "budget_macs: got .* expected at most 1 steps"),
        (XL, {"steps": 4, "budget_macs": 9.0}, "budget_macs: got 9 for 4 steps, expected at least"),
        (XL, {"steps": 4, "budget_macs": math.inf}, "got inf, expected a finite number"),
        (XL, {"steps": 1001, "iters": 2}, "sample.steps: got 1001, expected 1..1000"),
        (XL, {"spacing": "leading", "iters": 2}, "got leading with zero terminal SNR"),
        (
            XL,
            {"iters": 10**30},
            f"got {10**30} iterations in a timestep from iters, expected at most",
        ),
        (XL, {"steps": 1, "budget": 70000}, "got 69998 iterations in a timestep from budget"),
        (
            XL,
            {"iters": 3, "max_iters": 70000, "allocation": "adaptive", "tol": 0.1},
            "got 70000 iterations",
        ),
        (DIT, {"iters": 8}, "got iters for a DiT, which has no iterations"),
        (DIT, {"schedule": (1,), "steps": 1}, "got schedule for a DiT"),
        (DIT, {"allocation": "increasing"}, "got allocation increasing for a DiT"),
        (DIT, {"reuse": "full"}, "got reuse full for a DiT"),
        (DIT, {"solver": "anderson", "damping": 0.5}, "got solver anderson and damping for a DiT"),
        (DIT, {"budget": 280, "budget_macs": 1e15}, "got budget and budget_macs for a DiT"),
        (DIT, {"steps": 9, "budget": 280}, "got 280 with sample.steps=9 .* sample.steps=10"),
        (DIT, {"steps": 10, "budget": 281}, "a multiple of 28, such as 280 with sample.steps=10"),
        (DIT, {"steps": 10, "budget": 27}, "a multiple of 28, such as 28 with sample.steps=1"),
        (DIT, {"steps": 10, "budget_macs": 1e12}, r"expected sample\.steps=8"),
        (DIT, {"steps": 10, "budget_macs": 1e3}, "expected at least 118380036096"),
    ],
)
def test_refusals(model: ModelConfig, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make(model, **settings)
    assert "\n" not in str(caught.value)


def test_the_named_number_of_steps_fits() -> None:
    """The largest S of the refusal works, one more does not."""
    rng, seen = random.Random(1), 0
    for _ in range(300):
        model = rng.choice([XL, SMALL, BARE])
        settings: dict[str, Any] = {"budget": rng.randint(1, 500)}
        if rng.random() < 0.5:
            settings = {"budget_macs": 10 ** rng.uniform(6, 12)}
        try:
            make(model, steps=1000, **settings)
        except ConfigError as error:
            found = re.search(r"at most (\d+) steps", str(error))
            if found is None:
                continue
            most = int(found[1])
            assert min(ks(make(model, steps=most, **settings))) >= 1
            with pytest.raises(ConfigError):
                make(model, steps=most + 1, **settings)
            seen += 1
    assert seen > 100
