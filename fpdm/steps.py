"""Sampling steps: which timesteps, the affine map from one to the next, guidance.

Everything is a linear combination of x_t, the prediction and a normal z with float64 coefficients:

    x_0 = a x_t - s v,  eps = s x_t + a v      under v-prediction
    x_0 = (x_t - s eps) / a                    under eps-prediction, which never meets abar = 0
    eps = (x_t - a x_0) / s                    under x0-prediction

    DDIM   x_p = a_p x_0 + sqrt(1 - abar_p - sigma^2) eps + sigma z
           sigma = eta sqrt((1 - abar_p) / (1 - abar)) sqrt(1 - abar / abar_p)
    DDPM   x_p = (a_p beta x_0 + sqrt(1 - beta) (1 - abar_p) x_t) / (1 - abar) + sigma z
           log sigma^2 = f log beta + (1 - f) log beta~,  f = (u + 1) / 2 not clamped
    DPM-Solver++(2M)  x_p = (s_p / s) x_t + a_p (1 - e^-h) (x_0 + (x_0 - x_0') h / (2 h'))
           e^-h = a s_p / (s a_p);  x_0', h' of the step before    (Lu et al. 2022, algorithm 2)

a = sqrt(abar), s = sqrt(1 - abar); p is the next retained timestep, abar_p = 1 after the last, and
beta = 1 - abar / abar_p. The last step adds no noise. Nothing divides by a unless the prediction is
eps, so zero terminal SNR is an ordinary row: there e^-h = 0, and the next h / h' is 0. The first
and the last step of 2M are of first order. S steps, B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpdm.config import ConfigError
from fpdm.diffusion import Diffusion, log_posterior_variance

Array = NDArray[np.float64]

COLUMNS = (
    "x", "prediction", "noise", "log_std", "log_std_slope", "history", "x0_x", "x0_prediction",
)  # fmt: skip
METHODS = ("ddim", "ddpm", "dpmpp_2m")


def timesteps(total: int, steps: int, spacing: str, zero_terminal_snr: bool) -> list[int]:
    """S of the timesteps 0..T-1, descending, all different.

    trailing   round_half_even(T - i T/S) - 1, i = 0..S-1, in exact fractions: T-1 is in, 0 is not
    linspace   c = 0, (T-1)/(S-1), ... added up in float64, rounded half to even, 0 and T-1 both in:
               the published rule. Adding up matters: np.linspace differs
    leading    i floor(T/S): 0 is in, T-1 usually not

    S = 1 is [T-1] in all of them. Raises ConfigError for S outside 1..T, an unknown spacing, and
    leading under zero terminal SNR, which would start from noise at a timestep that has signal.
    """
    if not 1 <= steps <= total:
        raise ConfigError(f"sample.steps: got {steps}, expected 1..{total}")
    if spacing not in ("trailing", "linspace", "leading"):
        raise ConfigError(f"sample.spacing: got {spacing}, expected trailing, linspace or leading")
    if spacing == "leading" and zero_terminal_snr:
        raise ConfigError(
            "sample.spacing: got leading with zero terminal SNR, expected trailing or linspace "
            "(sampling must start at the last timestep)"
        )
    if steps == 1:
        return [total - 1]
    if spacing == "trailing":
        return [round(Fraction(total * (steps - i), steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (total // steps) for i in reversed(range(steps))]
    kept, position, stride = [], 0.0, (total - 1) / (steps - 1)
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return kept[::-1]


def branches(
    timesteps: Sequence[int], total: int, guidance: float, low: float, high: float
) -> list[int]:
    """Branches of every timestep: 2 where guidance acts, low <= t / (T-1) <= high, else 1, the
    conditional one (Kynkaanniemi et al. 2024, in t instead of sigma)."""
    if guidance == 1.0:
        return [1] * len(timesteps)
    return [2 if low * (total - 1) <= t <= high * (total - 1) else 1 for t in timesteps]


@dataclass(frozen=True)
class StepTable:
    """Coefficients of every step in sampling order.

    timesteps: S descending indices of the training schedule (what the network is told).
    coefficients (S,8) float64, columns ``COLUMNS``, all finite. The noise's standard deviation is
    noise exp(log_std + log_std_slope u); its three numbers are 0 where the step adds none.
    history multiplies the x_0 of the step before; the last two make this step's x_0.
    random: S booleans, whether the step wants normals. multistep: whether any wants the history.
    """

    timesteps: tuple[int, ...]
    coefficients: Array
    random: tuple[bool, ...]

    @property
    def multistep(self) -> bool:
        """Whether ``step`` is to be given the x_0 of the step before."""
        return bool(self.coefficients[:, 5].any())

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """The coefficients, float32 (S,8) on ``device``; a row of it goes to ``step``."""
        return torch.from_numpy(self.coefficients).to(device, torch.float32)


def build_table(
    diffusion: Diffusion, timesteps: Sequence[int], method: str, eta: float
) -> StepTable:
    """Coefficients for descending ``timesteps`` of ``diffusion``.

    ``method`` ddim (``eta`` 0..1; stochastic above 0, 1 has DDPM's posterior variance), ddpm
    (learned variance, on the betas of the retained timesteps; eta must be 0) or dpmpp_2m (eta 0).
    Raises ConfigError otherwise.
    """
    last = diffusion.config.timesteps
    if not timesteps or any(a <= b for a, b in zip([last, *timesteps], [*timesteps, -1])):
        raise ConfigError(f"timesteps: got {list(timesteps)}, expected {last - 1}..0, descending")
    if method not in METHODS:
        raise ConfigError(f"sample.method: got {method}, expected one of {', '.join(METHODS)}")
    if not 0.0 <= eta <= 1.0 or (eta and method != "ddim"):
        raise ConfigError(f"sample.eta: got {eta} with {method}, expected 0, or up to 1 with ddim")
    abar = diffusion.alphas_cumprod[np.asarray(timesteps)]
    previous = np.append(abar[1:], 1.0)
    x0, eps = _from_prediction(abar, diffusion.config.prediction)
    spread, history = np.zeros((3, len(abar))), np.zeros(len(abar))
    if method == "dpmpp_2m":
        affine, history = _second_order(abar, previous, x0)
    elif method == "ddim":
        sigma = eta * np.sqrt((1.0 - previous) / (1.0 - abar) * (1.0 - abar / previous))
        # never below 0 for eta <= 1 but for rounding
        direction = np.sqrt(np.maximum(1.0 - previous - sigma**2, 0.0))
        affine = np.sqrt(previous) * x0 + direction * eps
        spread[0] = sigma
    else:
        beta = 1.0 - abar / previous
        affine = np.sqrt(previous) * beta / (1.0 - abar) * x0
        affine[0] += np.sqrt(1.0 - beta) * (1.0 - previous) / (1.0 - abar)
        # the chain of retained timesteps runs forward in time
        log_tilde = log_posterior_variance(beta[::-1], abar[::-1])[::-1]
        log_beta = np.log(beta)
        spread = np.stack(
            [np.ones_like(beta), (log_beta + log_tilde) / 4.0, (log_beta - log_tilde) / 4.0]
        )
        spread[:, -1] = 0.0
    coefficients = np.concatenate([affine, spread, history[None], x0]).T.copy()
    random = tuple(bool(value) for value in coefficients[:, 2])
    return StepTable(tuple(int(t) for t in timesteps), coefficients, random)


def _second_order(abar: Array, previous: Array, x0: Array) -> tuple[Array, Array]:
    """DPM-Solver++(2M): (x, prediction) coefficients (2,S) and those of the x_0 before, (S,)."""
    a, s, a_p, s_p = (np.sqrt(v) for v in (abar, 1.0 - abar, previous, 1.0 - previous))
    decay = a * s_p / (s * a_p)
    with np.errstate(divide="ignore"):
        h = -np.log(decay)
    ratio = np.zeros_like(h)
    # h is infinite in the last step, which is of first order, and at zero SNR, after which h/h' = 0
    ratio[1:-1] = np.where(np.isinf(h[:-2]), 0.0, h[1:-1] / h[:-2])
    direction = a_p * (1.0 - decay)
    affine = direction * (1.0 + ratio / 2.0) * x0
    affine[0] += s_p / s
    return affine, -direction * ratio / 2.0


def _from_prediction(abar: Array, prediction: str) -> tuple[Array, Array]:
    """x_0 and eps as combinations of (x_t, prediction): two arrays (2,S)."""
    a, s = np.sqrt(abar), np.sqrt(1.0 - abar)
    zero, one = np.zeros_like(a), np.ones_like(a)
    if prediction == "v":
        return np.stack([a, -s]), np.stack([s, a])
    if prediction == "eps":
        return np.stack([1.0 / a, -s / a]), np.stack([zero, one])
    return np.stack([zero, one]), np.stack([1.0 / s, -a / s])


def step(
    x: Tensor,
    output: Tensor,
    row: Tensor | Sequence[float],
    noise: Tensor | None,
    history: Tensor | None = None,
) -> Tensor:
    """x at the next timestep, fp32 (B,C,h,w), from x (B,C,h,w) and output (B,2C,h,w).

    ``row`` is a row of ``StepTable.rows`` (stays on the device, no synchronisation) or of its
    coefficients; ``noise`` (B,C,h,w) normals, ignored by steps that add none, or None for none;
    ``history`` (B,C,h,w) the ``denoised`` of the step before, for a multistep table.
    """
    c = x.shape[1]
    keep, predict, spread, log_std, slope, before, *_ = row
    mean = keep * x.float() + predict * output[:, :c].float()
    if history is not None:
        mean = mean + before * history
    if noise is None:
        return mean
    return mean + spread * torch.exp(log_std + slope * output[:, c:].float()) * noise


def denoised(x: Tensor, output: Tensor, row: Tensor | Sequence[float]) -> Tensor:
    """x_0 (B,C,h,w) fp32 as predicted at this step; arguments as for ``step``."""
    return row[-2] * x.float() + row[-1] * output[:, : x.shape[1]].float()


@dataclass(frozen=True)
class Guidance:
    """What ``guide`` is told: ``scale``; ``channels`` that are guided, the first of C; ``rescale``,
    the share phi of the rescaled result."""

    scale: float
    channels: int
    rescale: float


def guide(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Tensor:
    """Classifier-free guidance, (B,2C,h,w): g = uncond + scale (cond - uncond) on prediction
    channels, then (1 - phi) g + phi g std(cond) / std(g), phi = ``rescale``, std per sample over
    the guided channels and positions (Lin et al. 2024, section 3.4); a single number has no std and
    is not rescaled.

    All C of them, or the first ``channels`` (3 is the published habit at C = 4); the other channels
    and the variance are cond's. Guiding v, eps or x_0 is the same, each being affine in the others;
    rescaling is not. Exactly cond at scale 1. Raises ConfigError for channels outside 1..C.
    """
    c = cond.shape[1] // 2
    guided = c if channels is None else channels
    if not 1 <= guided <= c:
        raise ConfigError(f"sample.guidance_channels: got {guided}, expected 1..{c}")
    mixed = torch.lerp(uncond[:, :guided], cond[:, :guided], scale)
    if rescale and mixed.shape[1:].numel() > 1:
        wanted, found = (t.std((1, 2, 3), keepdim=True) for t in (cond[:, :guided], mixed))
        ratio = wanted / found.clamp_min(torch.finfo(found.dtype).tiny)
        mixed = torch.lerp(mixed, mixed * ratio, rescale)
    return torch.cat([mixed, cond[:, guided:]], 1)
