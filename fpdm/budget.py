"""What a model costs, and how a budget becomes iterations per timestep (paper section 3.4).

    blocks per step = n_pre + k + n_post
    MACs per token and step = (n_pre + n_post)(12 D^2 + 2 T D) + 3 D^2 + k (16 D^2 + 2 T D)

Blocks are the paper's unit; by MACs an iteration is 1.32 of them at XL/2. 3 D^2 is the injection,
once per step (2 D^2 when folded: E W_p). Guidance doubles the MACs, not the blocks. A DiT costs
depth (12 D^2 + 2 T D) per token and step and has k = 0. The layers around the blocks (patches,
final, conditioning) are not counted. T tokens, D width, S steps, k iterations.

Allocations are named in sampling order: increasing spends most on the last, least noisy steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.steps import timesteps


@dataclass(frozen=True)
class Plan:
    """steps: (t, k) in sampling order, t descending. stranded: blocks of the budget, fewer than S,
    that the constant allocation leaves unspent. blocks, macs: what an image costs."""

    steps: tuple[tuple[int, int], ...]
    stranded: int
    blocks: int
    macs: int


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


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Integers in ratio of ``weights``, sum ``total``: largest remainder, then largest weight."""
    whole = sum(weights)
    shares = [total * w // whole for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), -weights[i]))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def allocate(total: int, steps: int, allocation: str) -> list[int]:
    """k per step in sampling order, each >= 1, from ``total`` >= ``steps`` iterations.

    constant     floor(total / S); the rest, fewer than S iterations, is stranded
    increasing   1 + (total - S) r_i / sum r with r linear from 0.5 to 1.5, sum exact
    decreasing   its mirror image
    """
    if allocation == "constant":
        return [total // steps] * steps
    ramp = [steps - 1 + 2 * i for i in range(steps)] if steps > 1 else [1]
    rising = [1 + extra for extra in apportion(total - steps, ramp)]
    return rising if allocation == "increasing" else rising[::-1]


def plan(
    model: ModelConfig, sampler: SamplerConfig, diffusion: DiffusionConfig, folded: bool = True
) -> Plan:
    """Timesteps and iterations of a run, from exactly one of

    iters         k per step; with increasing or decreasing the total S iters
    budget        blocks per image; constant gives k = floor(budget / S) - n_pre - n_post
    budget_macs   MACs per image, guidance included, of weights prepared with ``folded`` (samplers
                  fold): never exceeded. increasing and decreasing miss it by less than one
                  iteration, constant by less than one beyond what it strands
    schedule      k per step in sampling order, with allocation explicit

    A DiT takes none of them: its steps are its cost; a budget is accepted when the steps spend it.
    Raises ConfigError, one line, for none or several of these, for a budget that leaves a step
    without an iteration (naming the largest S that fits) and for what ``timesteps`` refuses.
    """
    ts = timesteps(diffusion.timesteps, sampler.steps, sampler.spacing, diffusion.zero_terminal_snr)
    if model.kind == "dit":
        _check_dit(model, sampler, folded)
        ks, stranded = [0] * len(ts), 0
    else:
        ks, stranded = _iterations(model, sampler, folded)
    return Plan(
        steps=tuple(zip(ts, ks)),
        stranded=stranded,
        blocks=sum(blocks_per_step(model, k) for k in ks),
        macs=macs_per_sample(model, ks, folded, sampler.guidance),
    )


def smoothing(config: ModelConfig, budget: int) -> list[tuple[int, int]]:
    """The (S, k) between which a budget of blocks can be smoothed over timesteps, k rising.

    More timesteps with fewer iterations, or the reverse (paper section 3.4, timestep smoothing):
    all pairs with S (n_pre + k + n_post) <= budget in which neither S nor k can grow. At 280 blocks
    and one pre and post block the paper's grid is among them. A DiT has one pair, k = 0. Empty
    when nothing fits. S is not limited by a schedule's T, which ``plan`` checks.
    """
    fixed = fixed_blocks(config)
    if config.kind == "dit":
        return [(budget // fixed, 0)] if budget >= fixed else []
    pairs = ((budget // (fixed + k), k) for k in range(1, budget - fixed + 1))
    return [(steps, k) for steps, k in pairs if budget // steps == fixed + k]


def _given(sampler: SamplerConfig) -> list[str]:
    """Names of the settings that decide the cost and were given."""
    names = [n for n in ("iters", "budget", "budget_macs") if getattr(sampler, n) is not None]
    return names + (["schedule"] if sampler.schedule else [])


def _iterations(model: ModelConfig, sampler: SamplerConfig, folded: bool) -> tuple[list[int], int]:
    """(k per step, stranded blocks) of an FPDM."""
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
    total = _total(model, sampler, folded)
    ks = allocate(total, steps, sampler.allocation)
    return ks, total - sum(ks)


def _total(model: ModelConfig, sampler: SamplerConfig, folded: bool) -> int:
    """Iterations per image that the given cost pays for, at least S."""
    steps = sampler.steps
    if sampler.iters is not None:
        return steps * sampler.iters
    if sampler.budget is not None:
        name, budget, fixed, one = "budget", sampler.budget, fixed_blocks(model), 1
    else:
        name, budget = "budget_macs", _whole(sampler.budget_macs)
        branches = macs_per_sample(model, [0], folded, sampler.guidance)
        fixed, one = branches, macs_per_sample(model, [1], folded, sampler.guidance) - branches
    total = (budget - steps * fixed) // one
    if total < steps:
        most = budget // (fixed + one)
        hint = f"at most {most} steps" if most > 0 else f"at least {fixed + one} (1 step)"
        raise ConfigError(
            f"sample.{name}: got {budget} for {steps} steps, expected {hint}, "
            "every step needing at least 1 iteration"
        )
    return total


def _whole(macs: float | None) -> int:
    """A MAC budget as an integer."""
    if macs is None or not math.isfinite(macs):
        raise ConfigError(f"sample.budget_macs: got {macs}, expected a finite number")
    return math.floor(macs)


def _check_dit(model: ModelConfig, sampler: SamplerConfig, folded: bool) -> None:
    """Refuses what a DiT has no use for, and budgets that its steps do not spend."""
    given, steps = _given(sampler), sampler.steps
    wrong = [name for name in given if name in ("iters", "schedule")]
    if sampler.allocation != "constant":
        wrong.append(f"allocation {sampler.allocation}")
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
        budget, exact = _whole(sampler.budget_macs), False
        one = macs_per_sample(model, [0], folded, sampler.guidance)
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
