"""Sampling chains against diffusers' schedulers, and DPM-Solver++(2M) against its own equations.

A chain is run in float64 with a network that is a fixed nonlinear function of (x, t). diffusers
steps by 1000 // S, so only divisors of 1000 have the same timesteps. Its zero-SNR schedule ends at
abar = 2^-24 instead of 0: it is compared with ours at that value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch

from fpdm.config import DiffusionConfig
from fpdm.diffusion import Diffusion
from fpdm.steps import StepTable, build_table, timesteps

Array = np.ndarray
START = np.random.default_rng(0).standard_normal((2, 3, 4, 4))


def network(x: Array, t: int) -> Array:
    """v (2,3,4,4) float64."""
    return np.tanh(0.7 * x + 0.3 * math.sin(0.01 * t)) + 0.2 * np.roll(x, 1, -1)


def make(zero_snr: bool) -> Diffusion:
    return Diffusion(DiffusionConfig(prediction="v", zero_terminal_snr=zero_snr))


def nudged(d: Diffusion) -> Diffusion:
    """Our zero-SNR schedule with diffusers' last abar."""
    d.alphas_cumprod = d.alphas_cumprod.copy()
    d.alphas_cumprod[-1] = 2.0**-24
    return d


def chain(table: StepTable) -> Array:
    """x_0 by the table's rows in float64."""
    x, history = START, np.zeros_like(START)
    for t, row in zip(table.timesteps, table.coefficients):
        v = network(x, t)
        x, history = row[0] * x + row[1] * v + row[5] * history, row[6] * x + row[7] * v
    return x


def relative(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def peer(scheduler: object, steps: int) -> tuple[list[int], Array]:
    """Timesteps and x_0 of a diffusers scheduler, in float64."""
    s = scheduler
    s.set_timesteps(steps)  # type: ignore[attr-defined]
    times = [int(t) for t in s.timesteps]  # type: ignore[attr-defined]
    x = torch.from_numpy(START)
    for t in times:
        v = torch.from_numpy(network(x.numpy(), t))
        x = s.step(v, t, x).prev_sample  # type: ignore[attr-defined]
    return times, x.numpy()


@pytest.mark.parametrize("steps", [10, 20, 25, 40, 50])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_equals_diffusers(steps: int, zero_snr: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    d = make(zero_snr)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    # its schedule is float32; the chain is what is compared
    np.testing.assert_allclose(scheduler.alphas_cumprod, d.alphas_cumprod, rtol=2e-4, atol=1e-6)
    scheduler.alphas_cumprod = torch.from_numpy(d.alphas_cumprod)
    table = build_table(d, timesteps(1000, steps, "trailing", zero_snr), "ddim", 0.0)
    times, wanted = peer(scheduler, steps)
    assert times == list(table.timesteps)
    assert relative(chain(table), wanted) <= 1e-5


@pytest.mark.parametrize("steps", [10, 20, 28])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_dpm_solver_equals_diffusers(steps: int, zero_snr: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    d = nudged(make(True)) if zero_snr else make(False)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", prediction_type="v_prediction", algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", lower_order_final=True,
        timestep_spacing="trailing", final_sigmas_type="zero", rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    abar = torch.from_numpy(d.alphas_cumprod)
    scheduler.alphas_cumprod = abar
    scheduler.set_timesteps(steps)
    # its sigmas are float32 too: the same timesteps, from the float64 schedule
    kept = scheduler.timesteps.numpy()
    sigma = torch.sqrt((1 - abar) / abar)[kept]
    table = build_table(d, kept.tolist(), "dpmpp_2m", 0.0)
    scheduler.set_timesteps = lambda n: None
    scheduler.sigmas = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    times, wanted = peer(scheduler, steps)
    assert times == list(table.timesteps)
    if 1000 % steps == 0:
        assert times == timesteps(1000, steps, "trailing", zero_snr)
    assert relative(chain(table), wanted) <= 1e-5


def by_its_equations(d: Diffusion, times: list[int]) -> Array:
    """Algorithm 2 of Lu et al. (2022) in lambda = log(alpha / sigma), with 50 digits and limits.

    No table and no e^-h identity: lambda is -inf at zero SNR and +inf at the end.
    """
    with mpmath.workdps(50):
        one = mpmath.mpf(1)

        def parts(abar: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
            a, s = mpmath.sqrt(abar), mpmath.sqrt(one - mpmath.mpf(abar))
            if a == 0:
                return a, s, mpmath.ninf
            return a, s, mpmath.inf if s == 0 else mpmath.log(a) - mpmath.log(s)

        nodes = [parts(float(d.alphas_cumprod[t])) for t in times] + [parts(1.0)]
        x, before, last = START, None, None
        for n, t in enumerate(times):
            (a, s, lam), (a_p, s_p, lam_p) = nodes[n], nodes[n + 1]
            x0 = float(a) * x - float(s) * network(x, t)
            h = lam_p - lam
            direction = x0
            if before is not None and n < len(times) - 1 and not mpmath.isinf(last):
                direction = x0 + float(h / (2 * last)) * (x0 - before)
            shrink = float(a_p) if mpmath.isinf(h) else float(-a_p * mpmath.expm1(-h))
            x = float(s_p / s) * x + shrink * direction
            before, last = x0, h
    return x


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 35, 93])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_dpm_solver_by_its_equations(steps: int, zero_snr: bool, spacing: str) -> None:
    d = make(zero_snr)
    times = timesteps(1000, steps, spacing, zero_snr)
    found = chain(build_table(d, times, "dpmpp_2m", 0.0))
    assert np.isfinite(found).all()
    assert relative(found, by_its_equations(d, times)) <= 1e-9


FAULTS: dict[str, Callable[[Array], None]] = {
    "no history": lambda c: c[:, 5].fill(0.0),
    "history in the last step": lambda c: c[-1].__setitem__(5, 1e-3),
    "first order after zero SNR": lambda c: c[1].__setitem__(5, -1e-3),
    "another x_0": lambda c: c[:, 6].__imul__(1.001),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_equations_bite(fault: str) -> None:
    d = make(True)
    times = timesteps(1000, 28, "trailing", True)
    table = build_table(d, times, "dpmpp_2m", 0.0)
    FAULTS[fault](table.coefficients)
    assert relative(chain(table), by_its_equations(d, times)) > 1e-6


def test_second_order_pays() -> None:
    """20 steps of 2M are nearer to 1000 DDIM steps than 20 DDIM steps are."""
    d = make(False)
    limit = chain(build_table(d, timesteps(1000, 1000, "trailing", False), "ddim", 0.0))
    errors = [
        relative(chain(build_table(d, timesteps(1000, 20, "trailing", False), m, 0.0)), limit)
        for m in ("dpmpp_2m", "ddim")
    ]
    assert errors[0] < 0.5 * errors[1]
