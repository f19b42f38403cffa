"""Forward process and training losses (paper section 2; Nichol & Dhariwal 2021 for the variance).

    x_t = a x_0 + s eps          a = sqrt(abar_t), s = sqrt(1 - abar_t)
    v   = a eps - s x_0          x_0 = a x_t - s v          eps = s x_t + a v

Betas are linear. Zero terminal SNR (Lin et al.) shifts and scales a so that a_{T-1} = 0 exactly and
a_0 stays. The learned variance lies between beta and the posterior's
beta~ = beta (1 - abar_{t-1}) / (1 - abar_t):

    log sigma^2 = f log beta + (1 - f) log beta~,   f = (u + 1) / 2

u the last C output channels, not clamped. log beta~ at t = 0, where beta~ is 0, is its value at
t = 1. B batch, C channels, T timesteps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpdm.config import ConfigError, DiffusionConfig

Array = NDArray[np.float64]

BIN = 1.0 / 255.0
MIN_PROBABILITY = 1e-12


def linear_betas(config: DiffusionConfig) -> Array:
    """The T betas, float64; with ``zero_terminal_snr`` rescaled, the last exactly 1.

    a'_t = (a_t - a_{T-1}) a_0 / (a_0 - a_{T-1});  beta'_t = 1 - (a'_t / a'_{t-1})^2.

    Raises ConfigError for betas whose a underflows before that.
    """
    betas: Array = np.linspace(
        config.beta_start, config.beta_end, config.timesteps, dtype=np.float64
    )
    if not config.zero_terminal_snr:
        return betas
    a = np.sqrt(np.cumprod(1.0 - betas))
    if a[-2] <= a[-1]:
        raise _no_signal(config, "before the last")
    abar: Array = ((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2
    return 1.0 - abar / np.append(1.0, abar[:-1])


def _no_signal(config: DiffusionConfig, where: str) -> ConfigError:
    return ConfigError(
        f"diffusion.beta_start, beta_end: got {config.beta_start}, {config.beta_end}, expected "
        f"less: no signal is left {where} of {config.timesteps} timesteps"
    )


def log_posterior_variance(betas: Array, abar: Array) -> Array:
    """log beta~ (N,), float64, of any chain of retained timesteps; index 0 repeats index 1.

    A chain of one timestep has no index 1 and gets log beta, unused: its only step adds no noise.
    """
    if len(betas) == 1:
        return np.log(betas)
    tail = betas[1:] * (1.0 - abar[:-1]) / (1.0 - abar[1:])
    return np.log(np.append(tail[0], tail))


class Diffusion:
    """Schedule, targets and losses of one ``DiffusionConfig``.

    betas, alphas_cumprod, log_beta_tilde: float64 (T,) NumPy arrays, the exact schedule. What the
    methods need per timestep is gathered from float32 tables on ``device``; nothing synchronises.

    Raises ConfigError for betas that leave nothing of x_0 where it is divided by a.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu"):
        self.config = config
        self.betas = linear_betas(config)
        self.alphas_cumprod: Array = np.cumprod(1.0 - self.betas, dtype=np.float64)
        if config.prediction == "eps" and self.alphas_cumprod[-1] < np.finfo(np.float32).tiny:
            # x_0 = (x - s eps) / a, in float32
            raise _no_signal(config, "at the last")
        self.log_beta_tilde = log_posterior_variance(self.betas, self.alphas_cumprod)
        abar, beta = self.alphas_cumprod, self.betas
        previous = np.append(1.0, abar[:-1])
        keep, jacobian = self._x0_coefficients()
        mean = np.sqrt(previous) * beta / (1.0 - abar) * jacobian
        self._tables = torch.from_numpy(
            np.stack(
                [
                    np.sqrt(abar),
                    np.sqrt(1.0 - abar),
                    self._prediction_weight(),
                    self.log_beta_tilde,
                    np.log(beta) - self.log_beta_tilde,
                    mean**2 * np.exp(-self.log_beta_tilde),
                    keep,
                    jacobian,
                ]
            )
        ).to(device, torch.float32)

    def _x0_coefficients(self) -> tuple[Array, Array]:
        """x_0 = keep x_t + jacobian prediction: (a, -s) under v, (1, -s) / a under eps, (0, 1)."""
        a, s = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        if self.config.prediction == "v":
            return a, -s
        if self.config.prediction == "eps":
            return 1.0 / a, -s / a
        return np.zeros_like(a), np.ones_like(a)

    def _prediction_weight(self) -> Array:
        """w jacobian^2 as g / {v: 1, eps: abar, x0: 1 - abar}, g = w (1 - abar): never 0 / 0."""
        abar, gamma = self.alphas_cumprod, self.config.min_snr_gamma
        g = {
            "v_mse": np.ones_like(abar),
            "p2": abar * np.sqrt(1.0 - abar),
            "min_snr": np.minimum(abar, gamma * (1.0 - abar)),
            "eps_mse": abar,
        }[self.config.loss_weight]
        if self.config.prediction == "v":
            return g
        return g / (abar if self.config.prediction == "eps" else 1.0 - abar)

    def _at(self, t: Tensor, dim: int) -> list[Tensor]:
        """The tables' rows at t (B,), each (B,1,...) of ``dim`` dimensions."""
        return list(self._tables[:, t].view(len(self._tables), -1, *[1] * (dim - 1)))

    def weight(self, t: Tensor) -> Tensor:
        """Weight (B,) fp32 of the squared prediction error at t (B,) int64.

        The weight w of the squared x_0 error, moved into the space of the prediction, where it is
        finite:

            v_mse     w = SNR + 1               1 under v
            p2        w = SNR sqrt(1 - abar)    abar sqrt(1 - abar) under v; the published weight
            min_snr   w = min(SNR, gamma)       min(abar, gamma (1 - abar)) under v
            eps_mse   w = SNR                   abar under v, 1 under eps

        With zero terminal SNR, ``p2`` and ``min_snr`` (``eps_mse`` too) give the terminal step zero
        weight, and the prediction there zero gradient; p2 leaves 0.3 % of its weight to t >= 700.
        ``v_mse`` does train the step that sampling starts from.
        """
        return self._tables[2, t]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = a x_0 + s noise; x0, noise (B,C,h,w), t (B,) int64."""
        a, s = self._at(t, x0.dim())[:2]
        return a * x0 + s * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the first C channels should be, (B,C,h,w): v = a noise - s x_0, noise, or x_0."""
        if self.config.prediction == "x0":
            return x0
        if self.config.prediction == "eps":
            return noise
        a, s = self._at(t, x0.dim())[:2]
        return a * noise - s * x0

    def losses(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Per-sample losses, fp32 (B,), of output (B,2C,h,w) at x_t = ``q_sample(x0, t, noise)``.

        mse = weight(t) mean |prediction - target|^2 = mean w |x_0 error|^2. See ``weight``: under
        p2 and min_snr the terminal step of a zero-SNR schedule has none, and no gradient.
        vb  = KL(q(x_{t-1} | x_t, x_0) || p) in bits, mean over the C h w dimensions; at t = 0 the
        negative log-likelihood of x_0 in bins of 2/255 under the Gaussian. The mean is detached, so
        that vb trains only the variance; its coefficient is ``vb_weight`` per sampled t.
        loss = mse + vb_weight vb.

        Raises ValueError for shapes that do not fit.

        With e the prediction error, d = log beta - log beta~, q = (d mu / d prediction)^2 / beta~:
        KL = (f d + exp(-f d) - 1 + q e^2 exp(-f d)) / 2, of which q is finite at any SNR.
        """
        c = x0.shape[1]
        if output.shape != (x0.shape[0], 2 * c, *x0.shape[2:]) or x_t.shape != x0.shape:
            raise ValueError(
                f"output, x_t: got {tuple(output.shape)}, {tuple(x_t.shape)}, expected twice the "
                f"channels of x0 and the shape of x0, {tuple(x0.shape)}"
            )
        output = output.float()
        error = output[:, :c] - self.target(x0, t, noise)
        _, _, _, log_tilde, d, q, keep, jacobian = self._at(t, x0.dim())
        fd = d * (output[:, c:] + 1.0) / 2.0
        frozen = error.detach()
        kl = 0.5 * (fd + torch.expm1(-fd) + q * frozen.square() * torch.exp(-fd))
        distance = x0 - (keep * x_t + jacobian * output[:, :c].detach())
        nll = _binned_nll(x0, distance, 0.5 * (log_tilde + fd))
        first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
        vb = torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)
        mse = self.weight(t) * error.square().flatten(1).mean(1)
        return {"loss": mse + self.config.vb_weight * vb, "mse": mse, "vb": vb}


def _cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function, tanh form, as published: off by at most 5e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _binned_nll(x0: Tensor, distance: Tensor, log_sigma: Tensor) -> Tensor:
    """-log P(bin of x_0), nats, under N(x_0 - distance, sigma^2), with P >= 1e-12.

    The bin is x_0 - 1/255 .. x_0 + 1/255; those of -1 and 1 reach to infinity, as for 8-bit images.
    """
    precision = torch.exp(-log_sigma)
    upper, lower = _cdf(precision * (distance + BIN)), _cdf(precision * (distance - BIN))
    inner = torch.where(x0 > 0.999, 1.0 - lower, upper - lower)
    return -torch.where(x0 < -0.999, upper, inner).clamp_min(MIN_PROBABILITY).log()
