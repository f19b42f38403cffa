"""FPDM under the schedulers of diffusers: they step, the engine predicts.

    scheduler = make_scheduler(DPMSolverMultistepScheduler, diffusion)
    scheduler.set_timesteps(20)
    denoise = Denoiser(model, diffusion, SamplerConfig(iters=4), scheduler.timesteps, labels)
    x = denoise.noise(seeds) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = denoise(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample

A ``Denoiser`` is one loop's model: everything of ``SamplerConfig`` but how to step holds, among it
guidance and its interval, iterations per timestep by any allocation, tolerance, solver and reuse of
solutions from one timestep to the next. Schedulers that evaluate the model once per timestep fit:
DDIM, DDPM, DPM-Solver++, UniPC, Euler. Nothing here imports diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fpdm.budget import Calibration
from fpdm.config import ConfigError, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler, check_labels, check_seeds
from fpdm.kernels import ops
from fpdm.model import FPDM, DiT
from fpdm.noise import SAMPLE_INIT, as_keys, normals
from fpdm.run import Run, SampleStats
from fpdm.weights import PreparedWeights
from fpdm.workspace import Workspace

PREDICTION = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}


def make_scheduler(kind: type, diffusion: Diffusion, **settings: Any) -> Any:
    """A diffusers scheduler of class ``kind`` on the schedule that the model was trained on:
    linear betas, zero terminal SNR if so, prediction type, trailing spacing, no clipping.

    ``settings`` are further arguments of ``kind``. DDIMScheduler steps by T // S: take an S that
    divides T. Schedulers that work in log-SNR put 2^-24 for a last abar of 0.

    Raises ConfigError for a class that cannot represent the schedule, for settings that it does not
    have, and for leading spacing under zero terminal SNR.
    """
    c = diffusion.config
    schedule: dict[str, Any] = {
        "num_train_timesteps": c.timesteps, "beta_start": c.beta_start, "beta_end": c.beta_end,
        "beta_schedule": "linear", "prediction_type": PREDICTION[c.prediction],
        "timestep_spacing": "trailing",
    }  # fmt: skip
    if c.zero_terminal_snr:
        schedule["rescale_betas_zero_snr"] = True
    known = set(inspect.signature(kind).parameters)
    lacking = [name for name in schedule if name not in known]
    if lacking:
        raise ConfigError(
            f"scheduler: got {kind.__name__}, expected one with {' and '.join(lacking)}, such as "
            "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
        )
    wrong = sorted(set(settings) - known)
    if wrong:
        raise ConfigError(f"scheduler: got {wrong[0]}, which {kind.__name__} does not have")
    if c.zero_terminal_snr and settings.get("timestep_spacing") == "leading":
        raise ConfigError(
            "scheduler: got leading spacing with zero terminal SNR, expected trailing or linspace"
        )
    plain = {"clip_sample": False} if "clip_sample" in known else {}
    return kind(**plain | schedule | settings)


class Denoiser:
    """The model's prediction along the ``timesteps`` of one loop, for ``labels`` (B,).

    ``denoise(x, t)`` -> (B,C,h,w) of the dtype of x (B,C,h,w): what a scheduler's ``step`` takes.
    Timesteps are asked for in their order; the first of them begins a new loop, as it must after a
    call that was interrupted. ``config`` as for
    ``Sampler``, without ``steps``, ``spacing``, ``method`` and ``eta``, which are the scheduler's;
    ``weights`` and ``calibration`` too. ``stats`` of the loop so far.

    Raises ConfigError for timesteps that are not descending integers, a timestep out of order, and
    for what ``Sampler`` refuses.
    """

    def __init__(
        self,
        model: FPDM | DiT,
        diffusion: Diffusion,
        config: SamplerConfig,
        timesteps: Sequence[int] | Tensor,
        labels: Sequence[int] | Tensor,
        weights: PreparedWeights | None = None,
        calibration: Calibration | None = None,
    ):
        self.timesteps = _descending(timesteps, diffusion.config.timesteps)
        config = replace(config, method="ddim", eta=0.0)
        self.sampler = Sampler(
            model, diffusion, config, weights, calibration, timesteps=self.timesteps
        )
        c, batch = model.config, self.sampler.batch
        self.labels = check_labels(labels, c.num_classes)
        if not self.labels:
            raise ConfigError("labels: got none, expected at least one")
        self.shape = (len(self.labels), c.in_channels, c.input_size, c.input_size)
        starts = range(0, len(self.labels), batch)
        self.parts = [slice(start, min(start + batch, len(self.labels))) for start in starts]
        # one each: their solutions live until the loop is over, in inference mode or out of it
        with torch.inference_mode(False):
            self.workspaces = [
                Workspace.allocate(c, self.sampler.sizes(p.stop - p.start)) for p in self.parts
            ]
        self.runs: list[Run] = []
        self.position = 0
        self.stats: SampleStats | None = None

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Start noise (B,C,h,w) fp32 of ``seeds``, that of ``Sampler`` for the same ones."""
        keys = as_keys(check_seeds(seeds, len(self.labels))).to(self.sampler.device)
        return normals(keys, 0, 0, SAMPLE_INIT, self.shape[1:])

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        """The prediction at x (B,C,h,w) and timestep ``t``."""
        if tuple(x.shape) != self.shape:
            raise ConfigError(f"x: got shape {tuple(x.shape)}, expected {self.shape}")
        s = self.sampler
        # what a loop keeps can be written by a later call, whose mode and stream may be others
        with torch.inference_mode(False), torch.no_grad(), ops.no_autocast(s.device):
            s.wait(self._kept())
            try:
                self._advance(float(t), x)
                out = self._predict(x)
            finally:
                s.mark()
        self.position += 1
        return torch.cat(out)[:, : self.shape[1]].to(x.dtype)

    def _predict(self, x: Tensor) -> list[Tensor]:
        """Of every part; what interrupts it ends the loop."""
        try:
            return [run.predict(x[p], self.position) for run, p in zip(self.runs, self.parts)]
        except BaseException:
            # some parts are a timestep ahead by now: asked again they would go on from there
            self.runs = []
            raise

    def _kept(self) -> list[Tensor]:
        """What outlives a call."""
        stats = [self.stats.residual, self.stats.iterations] if self.stats is not None else []
        return stats + [buffer for w in self.workspaces for buffer in w.tensors()]

    def _advance(self, t: float, x: Tensor) -> None:
        """Check that ``t`` comes next, or begin."""
        first = self.timesteps[0]
        if t == first:
            return self._begin(x)
        following = self.timesteps[self.position : self.position + 1] if self.runs else []
        if following != [t]:
            told = "".join(f"{value} or " for value in following)
            raise ConfigError(f"t: got {t:g}, expected {told}{first}, which begins a loop")
        return None

    def _begin(self, x: Tensor) -> None:
        s = self.sampler
        self.position, self.stats = 0, s.statistics(len(self.labels), True)
        self.runs = [
            Run(
                s, workspace, s.graphs, self.labels[part], [0] * (part.stop - part.start),
                self.stats[part], x[part], None,
            )
            for workspace, part in zip(self.workspaces, self.parts)
        ]  # fmt: skip


def _descending(timesteps: Sequence[int] | Tensor, total: int) -> list[int]:
    """Timesteps as a list of integers."""
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    found = [int(value) for value in values]
    good = found == values and all(a > b for a, b in zip([total, *found], [*found, -1]))
    if not good or not found:
        told = ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if values[4:] else "")
        raise ConfigError(
            f"timesteps: got {told or 'none'}, expected integers {total - 1}..0, descending (one "
            "evaluation each, and no sigmas)"
        )
    return found
