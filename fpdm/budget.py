"""What a model costs, and how a budget becomes iterations per timestep (paper section 3.4).

    blocks per step = n_pre + k + n_post
    MACs per token and step = (n_pre + n_post)(12 D^2 + 2 T D) + 3 D^2 + k (16 D^2 + 2 T D)

Blocks are the paper's unit; by MACs an iteration is 1.32 of them at XL/2. 3 D^2 is the injection,
once per step (2 D^2 when folded: E W_p). Guidance doubles the MACs, not the blocks. A DiT costs
depth (12 D^2 + 2 T D) per token and step and has k = 0. The layers around the blocks (patches,
final, conditioning) are not counted. T tokens, D width, S steps, k iterations.

Allocations are named in sampling order: increasing spends most on the last, least noisy steps.
Under ``tol`` a plan is what a sample costs at most: it may stop earlier, and with allocation
adaptive spend the sum where its residuals need it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.steps import branches, timesteps

# of a timestep: counts are int64 tensors, and every iteration of a sample has its residual kept
MOST_ITERATIONS = 1 << 16


@dataclass(frozen=True)
class Plan:
    """steps: (t, k) in sampling order, t descending. stranded: blocks of the budget, fewer than S,
    that the constant allocation leaves unspent. blocks, macs: what an image costs. branches: 2 for
    every guided step, else 1. limit: the most iterations of a step (adaptive), else 0."""

    steps: tuple[tuple[int, int], ...]
    stranded: int
    blocks: int
    macs: int
    branches: tuple[int, ...]
    limit: int

    def mean(self) -> float:
        """Iterations per timestep."""
        return sum(k for _, k in self.steps) / len(self.steps)


@dataclass(frozen=True)
class Calibration:
    """What allocation learned knows: ``residual`` (S,K), the mean relative residual of some images
    after 1..K iterations at each of S ``timesteps``, sampled with ``reuse`` (see ``reuse_of``) and
    ``guidance``; ``weights``: digest of the model's."""

    timesteps: tuple[int, ...]
    residual: tuple[tuple[float, ...], ...]
    reuse: str
    guidance: float
    weights: str

    def curves(self, ts: Sequence[int]) -> list[list[float]]:
        """The residuals at timesteps ``ts``: log residual linear in t between those measured."""
        order = np.argsort(self.timesteps)
        known = np.asarray(self.timesteps, float)[order]
        logs = np.log(np.maximum(np.asarray(self.residual, float)[order], 1e-30))
        columns = [np.interp(ts, known, column) for column in logs.T]
        return np.exp(np.stack(columns, 1)).tolist()


def reuse_of(sampler: SamplerConfig) -> str:
    """Where ``sampler``'s iterations start, with its numbers: a calibration is of that."""
    numbers: tuple[float | None, ...] = ()
    if sampler.reuse == "blend":
        numbers = sampler.reuse_gamma, sampler.reuse_gamma_end
    elif sampler.reuse == "extrapolate":
        numbers = (sampler.reuse_rho,)
    return " ".join([sampler.reuse, *(f"{n:g}" for n in numbers if n is not None)])


def fixed_blocks(config: ModelConfig) -> int:
    """Blocks of a step beside the iterations: n_pre + n_post, or a DiT's depth."""
    return config.depth if config.kind == "dit" else config.pre_depth + config.post_depth


def blocks_per_step(config: ModelConfig, k: int) -> int:
    """n_pre + k + n_post; a DiT has depth, and k = 0."""
    return fixed_blocks(config) + k


def step_macs(config: ModelConfig, folded: bool) -> tuple[int, int]:
    """MACs of one sample and one evaluation: (everything but the iterations, one iteration)."""
    d, t = config.hidden_size, config.tokens
    fixed = fixed_blocks(config) * (12 * d * d + 2 * t * d)
    if config.kind == "dit":
        return t * fixed, 0
    return t * (fixed + (2 if folded else 3) * d * d), t * (16 * d * d + 2 * t * d)


def macs_per_sample(
    config: ModelConfig, k_list: Sequence[int], folded: bool, guidance: float
) -> int:
    """MACs of len(k_list) steps for one sample; twice under guidance other than 1."""
    fixed, iteration = step_macs(config, folded)
    total = len(k_list) * fixed + sum(k_list) * iteration
    return total * (1 if guidance == 1.0 else 2)


def apportion(total: int, weights: Sequence[int], more: int = 0) -> list[int]:
    """Integers in ratio of ``weights``, sum ``total``: largest remainder, then largest weight;
    ``more`` on top in the same order."""
    whole = sum(weights)
    shares = [total * w // whole for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), -weights[i]))
    for i in range(total - sum(shares) + more):
        shares[order[i % len(order)]] += 1
    return shares


def allocate(
    total: int, steps: int, allocation: str, curves: Sequence[Sequence[float]] = (), more: int = 0
) -> list[int]:
    """k per step in sampling order, each >= 1, from ``total`` >= ``steps`` iterations; increasing
    and decreasing with ``more`` where the next ones would go if total stayed.

    constant     floor(total / S); the rest, fewer than S iterations, is stranded
    increasing   1 + (total - S) r_i / sum r with r linear from 0.5 to 1.5, sum exact
    decreasing   its mirror image
    adaptive     total / S, sum exact: what a sample spends on average at most (fpdm.stopping)
    learned      ``greedy`` on the residual ``curves`` (S,K) of a calibration, sum exact
    """
    if allocation == "constant":
        return [total // steps] * steps
    if allocation == "adaptive":
        return apportion(total, [1] * steps)
    if allocation == "learned":
        return greedy(total, curves)
    ramp = [steps - 1 + 2 * i for i in range(steps)] if steps > 1 else [1]
    rising = [1 + extra for extra in apportion(total - steps, ramp, more)]
    return rising if allocation == "increasing" else rising[::-1]


def greedy(total: int, curves: Sequence[Sequence[float]]) -> list[int]:
    """k per step, each >= 1, sum ``total``: one iteration after another goes where the residual
    falls most, on the convex hull of its running minimum (S,K), so that a plateau does not hide
    what comes behind it. That minimises the sum of the hulls. Ties, and iterations beyond K, go
    where k is least, then to the earlier step."""
    gains = [
        (-gain, k, step)
        for step, curve in enumerate(curves)
        for k, gain in enumerate(_hull_gains(curve), 1)
    ]
    ks = [1] * len(curves)
    for _, _, step in sorted(gains)[: total - len(ks)]:
        ks[step] += 1
    rest = apportion(total - sum(ks), [1] * len(ks))
    return [k + extra for k, extra in zip(ks, rest)]


def _hull_gains(curve: Sequence[float]) -> list[float]:
    """How much the lower convex hull of a curve's running minimum falls from each point to the
    next, never rising."""
    low = list(itertools.accumulate(curve, min))
    gains: list[float] = []
    while len(gains) + 1 < len(low):
        here = len(gains)
        slopes = [(low[here] - low[k]) / (k - here) for k in range(here + 1, len(low))]
        best = max(range(len(slopes)), key=lambda i: (slopes[i], i))
        # rounding must not turn the order of one curve's gains
        slope = min([slopes[best], *gains[-1:]])
        gains += [slope] * (best + 1)
    return gains


def plan(
    model: ModelConfig,
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    folded: bool = True,
    calibration: Calibration | None = None,
    given: Sequence[int] = (),
) -> Plan:
    """Timesteps and iterations of a run, from exactly one of

    iters         k per step; with any other allocation than constant the total S iters
    budget        blocks per image; constant gives k = floor(budget / S) - n_pre - n_post
    budget_macs   MACs per image, guidance included, of weights prepared with ``folded`` (samplers
                  fold): never exceeded. Missed by less than one iteration of a step (both
                  branches), by constant beyond what it strands
    schedule      k per step in sampling order, with allocation explicit

    A DiT takes none of them: its steps are its cost; a budget is accepted when the steps spend it.
    ``given``: ``sampler.steps`` timesteps in place of those of ``sampler.spacing``.

    Raises ConfigError, one line, for none or several of these, for a budget that leaves a step
    without an iteration (naming the largest S that fits) or a step more than ``MOST_ITERATIONS``,
    for allocation learned without a fitting ``calibration`` and for what ``timesteps`` refuses.
    """
    cost = _Cost(model, sampler, diffusion, folded, tuple(given))
    ts, counts = cost.timesteps(sampler.steps)
    if sampler.guidance != 1.0 and max(counts) == 1:
        told = ", ".join(f"{t / max(diffusion.timesteps - 1, 1):.3g}" for t in ts[:8])
        raise ConfigError(
            f"sample.guidance_low, guidance_high: got {sampler.guidance_low:g} and "
            f"{sampler.guidance_high:g}, expected an interval with one of the timesteps' t/(T-1): "
            f"{told}{', ...' if len(ts) > 8 else ''}"
        )
    limit = 0
    if model.kind == "dit":
        _check_dit(model, sampler, cost.macs(counts, [0] * len(ts)))
        ks, stranded = [0] * len(ts), 0
    else:
        curves = _curves(sampler, ts, calibration)
        ks, stranded = _iterations(cost, counts, curves)
        if sampler.allocation == "adaptive":
            limit = sampler.max_iters or 2 * -(-sum(ks) // len(ks))
    if max(limit, *ks) > MOST_ITERATIONS:
        raise ConfigError(
            f"sample: got {max(limit, *ks)} iterations in a timestep from "
            f"{', '.join(_given(sampler))}, expected at most {MOST_ITERATIONS}"
        )
    return Plan(
        steps=tuple(zip(ts, ks)),
        stranded=stranded,
        blocks=sum(blocks_per_step(model, k) for k in ks),
        macs=cost.macs(counts, ks),
        branches=tuple(counts),
        limit=limit,
    )


def _given(sampler: SamplerConfig) -> list[str]:
    """Names of the settings that decide the cost and were given."""
    names = [n for n in ("iters", "budget", "budget_macs") if getattr(sampler, n) is not None]
    return names + (["schedule"] if sampler.schedule else [])


@dataclass(frozen=True)
class _Cost:
    """What plans of these settings cost."""

    model: ModelConfig
    sampler: SamplerConfig
    diffusion: DiffusionConfig
    folded: bool
    given: tuple[int, ...]

    def timesteps(self, steps: int) -> tuple[list[int], list[int]]:
        """(t, branches) of every step."""
        s, total = self.sampler, self.diffusion.timesteps
        ts = list(self.given)
        if len(ts) != steps:
            ts = timesteps(total, steps, s.spacing, self.diffusion.zero_terminal_snr)
        return ts, branches(ts, total, s.guidance, s.guidance_low, s.guidance_high)

    def macs(self, counts: Sequence[int], ks: Sequence[int]) -> int:
        """MACs of one image: ``counts`` branches and k iterations at every step."""
        fixed, iteration = step_macs(self.model, self.folded)
        return sum(count * (fixed + k * iteration) for count, k in zip(counts, ks))

    def most_steps(self, budget: int) -> int:
        """The largest S whose steps can all have one iteration within ``budget`` MACs, 0 if
        none."""
        one = sum(step_macs(self.model, self.folded))
        s = self.sampler
        if s.guidance == 1.0 or (s.guidance_low, s.guidance_high) == (0.0, 1.0):
            return budget // (one if s.guidance == 1.0 else 2 * one)
        fits = (n for n in range(self.diffusion.timesteps, 0, -1)
                if one * sum(self.timesteps(n)[1]) <= budget)  # fmt: skip
        return next(fits, 0)


def _curves(
    sampler: SamplerConfig, ts: Sequence[int], calibration: Calibration | None
) -> list[list[float]]:
    """What allocation learned allocates by; nothing for the others."""
    if sampler.allocation != "learned":
        return []
    if calibration is None:
        raise ConfigError(
            "sample.allocation: got learned without a calibration, expected one "
            "(python -m fpdm.sample SOURCE --calibrate IMAGES)"
        )
    if calibration.reuse != reuse_of(sampler):
        raise ConfigError(
            f"sample.allocation: got learned with reuse {calibration.reuse}, expected one with "
            f"sample.reuse={reuse_of(sampler)} (--calibrate IMAGES learns again)"
        )
    return calibration.curves(ts)


def _iterations(
    cost: _Cost, counts: Sequence[int], curves: Sequence[Sequence[float]]
) -> tuple[list[int], int]:
    """(k per step, stranded blocks) of an FPDM."""
    sampler = cost.sampler
    given, steps = _given(sampler), sampler.steps
    if len(given) != 1:
        raise ConfigError(
            f"sample: got {' and '.join(given) or 'no cost'}, "
            "expected exactly one of iters, budget, budget_macs, schedule"
        )
    if (sampler.allocation == "explicit") != (given == ["schedule"]):
        raise ConfigError(
            f"sample.allocation: got {sampler.allocation} with {given[0]}, "
            "expected explicit with schedule, and only with it"
        )
    if sampler.schedule:
        ks = list(sampler.schedule)
        if len(ks) != steps or min(ks) < 1:
            raise ConfigError(
                f"sample.schedule: got {len(ks)} entries, the least {min(ks)}, "
                f"expected {steps} entries (sample.steps), each at least 1"
            )
        return ks, 0
    if sampler.budget_macs is not None:
        return _spend_macs(cost, counts, curves)
    total = _total(cost.model, sampler)
    ks = allocate(total, steps, sampler.allocation, curves)
    return ks, total - sum(ks)


def _total(model: ModelConfig, sampler: SamplerConfig) -> int:
    """Iterations per image that ``iters`` or ``budget`` pays for, at least S."""
    steps = sampler.steps
    if sampler.budget is None:
        return steps * (sampler.iters or 0)
    fixed = fixed_blocks(model)
    total = sampler.budget - steps * fixed
    if total < steps:
        raise _too_small("budget", sampler.budget, steps, sampler.budget // (fixed + 1), fixed + 1)
    return total


def _spend_macs(
    cost: _Cost, counts: Sequence[int], curves: Sequence[Sequence[float]]
) -> tuple[list[int], int]:
    """(k per step, stranded blocks): the most iterations whose allocation the budget pays for."""
    sampler, steps = cost.sampler, cost.sampler.steps
    budget = _whole(sampler.budget_macs)
    fixed, one = step_macs(cost.model, cost.folded)

    def shares(total: int) -> list[int]:
        return allocate(total, steps, sampler.allocation, curves)

    left = budget - cost.macs(counts, [1] * steps)
    if left < 0:
        least = (fixed + one) * max(cost.timesteps(1)[1])
        raise _too_small("budget_macs", budget, steps, cost.most_steps(budget), least)
    # all steps alike: exact. Otherwise what the allocation gives guided steps decides
    low, high = steps + left // (one * max(counts)), steps + left // (one * min(counts))
    while low < high:
        middle = (low + high + 1) // 2
        if cost.macs(counts, shares(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    while cost.macs(counts, shares(low)) > budget:
        low -= 1
    ks = shares(low)
    if sampler.allocation == "constant":
        unspent = (budget - cost.macs(counts, ks)) // (one * max(counts))
        return ks, min(unspent, steps - 1)
    if sampler.allocation in ("increasing", "decreasing"):
        # one iteration more in all may move several to guided steps: by remainders of this total
        for more in range(1, steps + 1):
            longer = allocate(low, steps, sampler.allocation, more=more)
            if cost.macs(counts, longer) > budget:
                break
            ks = longer
    return ks, 0


def _too_small(name: str, budget: int, steps: int, most: int, least: int) -> ConfigError:
    hint = f"at most {most} steps" if most > 0 else f"at least {least} (1 step)"
    return ConfigError(
        f"sample.{name}: got {budget} for {steps} steps, expected {hint}, "
        "every step needing at least 1 iteration"
    )


def _whole(macs: float | None) -> int:
    """A MAC budget as an integer."""
    if macs is None or not math.isfinite(macs):
        raise ConfigError(f"sample.budget_macs: got {macs}, expected a finite number")
    return math.floor(macs)


def _check_dit(model: ModelConfig, sampler: SamplerConfig, macs: int) -> None:
    """Refuses what a DiT has no use for, and budgets that its steps, of ``macs``, do not spend."""
    given, steps = _given(sampler), sampler.steps
    wrong = [name for name in given if name in ("iters", "schedule")]
    if sampler.allocation != "constant":
        wrong.append(f"allocation {sampler.allocation}")
    wrong += [
        name if name in ("tol", "damping") else f"{name} {getattr(sampler, name)}"
        for name, idle in (("tol", 0.0), ("solver", "picard"), ("damping", 1.0), ("reuse", "none"))
        if getattr(sampler, name) != idle
    ]
    if wrong or len(given) > 1:
        raise ConfigError(
            f"sample: got {' and '.join(wrong or given)} for a DiT, which has no iterations, "
            "expected steps, and at most one of budget and budget_macs"
        )
    if not given:
        return
    if sampler.budget is not None:
        budget, one, exact = sampler.budget, model.depth, True
    else:
        # where guidance covers some of the steps only, their average
        budget, one, exact = _whole(sampler.budget_macs), -(-macs // steps), False
    fits, rest = divmod(budget, one)
    if steps == fits and not (exact and rest):
        return
    hint = f"sample.steps={fits}" if fits else f"at least {one}"
    if exact and rest:
        hint = f"a multiple of {one}, such as {one * max(fits, 1)} with sample.steps={max(fits, 1)}"
    raise ConfigError(
        f"sample.{given[0]}: got {budget} with sample.steps={steps} for a DiT of {one} per step, "
        f"expected {hint}"
    )
