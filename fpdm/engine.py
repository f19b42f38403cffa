"""The sampling engine: a plan of (timestep, iterations), a list of launches, one loop to walk it.

    x_S ~ N(0, I) from the sample's seed;  for every (t, k) of the plan:
        h = Pre(x);  x*_0 from h and the reused solution;  x*_k = f^k(x*_0);  o = Final(Post(x*_k))
        o = guide(o[cond], o[null]);  x = step(x, o, z)                     z from the sample's seed

Shapes: x (B,C,h,w) fp32; h, x* (G B,T,D) with G = 2 branches under guidance (cond first), else 1.
Reuse (paper section 3.4) starts the next timestep from earlier solutions x*_1 (latest) and x*_2:

    none          h
    full          x*_1
    blend         h + gamma (x*_1 - h)
    extrapolate   x*_1 + rho (x*_1 - x*_2)        h in the first timestep, x*_1 in the second

Everything a run changes lives in a ``_Run``; the sampler and the model stay as they were, so
samplers may share a model and threads a sampler. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fpdm import budget, steps
from fpdm.config import ConfigError, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.model import FPDM, DiT, Modulation
from fpdm.noise import SAMPLE_INIT, SAMPLE_STEP, as_keys, normals
from fpdm.weights import PreparedWeights

TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Launch:
    """One entry of the launch plan. ``step`` is a row of the plan; ``count`` is the number of
    timesteps of a modulation table, or the iterations k of a solve."""

    op: Literal["tables", "encode", "iterate", "update"]
    step: int
    count: int = 0


@dataclass(frozen=True)
class SampleStats:
    """``residual`` (S,K,B) fp32 = |x_{j+1} - x_j| / |x_{j+1}| of the conditional branch, per
    timestep, iteration and sample; NaN beyond a timestep's k; K = 0 for a DiT and without
    statistics."""

    plan: budget.Plan
    residual: Tensor


@dataclass(frozen=True)
class Samples:
    """x (B,C,h,w) fp32 and what its making cost."""

    x: Tensor
    stats: SampleStats


def launches(ks: Sequence[int], table: int) -> tuple[Launch, ...]:
    """The launch plan of one batch: k of every timestep in order, ``table`` timesteps per table.
    Under a DiT, k = 0, the whole network is part of the update."""
    plan: list[Launch] = []
    for step, k in enumerate(ks):
        if k and step % table == 0:
            plan.append(Launch("tables", step, min(table, len(ks) - step)))
        if k:
            plan += [Launch("encode", step), Launch("iterate", step, k)]
        plan.append(Launch("update", step))
    return tuple(plan)


def initial_iterate(config: SamplerConfig, h: Tensor, solutions: Sequence[Tensor]) -> Tensor:
    """x*_0 (B,T,D) from h and the latest solutions, newest first, as the module's table says."""
    if config.reuse == "none" or not solutions:
        return h
    if config.reuse == "blend":
        return torch.lerp(h, solutions[0], config.reuse_gamma)
    if config.reuse == "extrapolate" and len(solutions) > 1:
        return torch.lerp(solutions[0], solutions[1], -config.reuse_rho)
    return solutions[0]


def check_labels(labels: Sequence[int] | Tensor, num_classes: int) -> list[int]:
    """Labels as integers in 0..num_classes-1; ConfigError names the first that is not."""
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ConfigError(f"labels: got {value!r}, expected integers 0..{num_classes - 1}")
        if not 0 <= value < num_classes:
            raise ConfigError(f"labels: got {value}, expected 0..{num_classes - 1}")
    return [int(value) for value in values]


def check_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """``count`` seeds, integers in [0, 2^64); ConfigError names the first that is not."""
    values = list(seeds)
    if len(values) != count:
        raise ConfigError(f"seeds: got {len(values)} for {count} labels, expected one per label")
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < 2**64:
            raise ConfigError(f"seeds: got {value!r}, expected integers 0..2^64 - 1")
    return [int(value) for value in values]


class Sampler:
    """Samples of ``model`` under ``diffusion`` as ``config`` asks.

    ``weights`` (compute dtype ``config.dtype``) are prepared and folded here unless given. Casts
    and folds are a snapshot: when the model's parameters change in any way, ``weights.refresh()``
    or a new Sampler is due. A sample is a function of its seed and label:
    whatever its batch or shard to rounding, and bit for bit with ``config.invariant``, which runs
    every sample alone (its two branches together) at the cost of the batch's efficiency. Raises
    ConfigError for settings that cannot be met.
    """

    def __init__(
        self,
        model: FPDM | DiT,
        diffusion: Diffusion,
        config: SamplerConfig,
        weights: PreparedWeights | None = None,
    ):
        channels = model.config.in_channels
        if (config.guidance_channels or 1) > channels:
            raise ConfigError(
                f"sample.guidance_channels: got {config.guidance_channels}, expected 1..{channels}"
            )
        self.model, self.diffusion, self.config = model, diffusion, config
        self.device, self.dtype = model.pos_embed.device, getattr(torch, config.dtype)
        self.weights = weights or PreparedWeights(model, self.dtype, fold=True)
        if self.weights.dtype != self.dtype:
            raise ConfigError(
                f"sample.dtype: got {self.dtype}, expected the weights' {self.weights.dtype}"
            )
        folded = self.weights.folded or model.config.kind == "dit"
        self.plan = budget.plan(model.config, config, diffusion.config, folded)
        timesteps = [t for t, _ in self.plan.steps]
        self.timesteps = torch.tensor(timesteps, device=self.device)
        self.table = steps.build_table(diffusion, timesteps, config.method, config.eta)
        self.rows = self.table.rows(self.device)
        self.guided = config.guidance != 1.0
        self.batch = 1 if config.invariant else config.batch
        self.launches = launches([k for _, k in self.plan.steps], self._table_steps())

    def _table_steps(self) -> int:
        """Timesteps whose modulations fit in TABLE_BYTES, at least one."""
        c = self.model.config
        width = 6 * c.hidden_size
        if c.pre_post_timestep_conditioning:
            width = (6 * (1 + c.pre_depth + c.post_depth) + 2) * c.hidden_size
        row_bytes = self.batch * (2 if self.guided else 1) * width * self.dtype.itemsize
        return max(1, min(len(self.plan.steps), TABLE_BYTES // row_bytes))

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int],
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
        stats: bool = True,
    ) -> Samples:
        """One image per (label, seed).

        noise (B,C,h,w) replaces the start noise, step_noise (S,B,C,h,w) the noise of every step.
        ``progress`` is called with the number of samples that were advanced by one timestep
        (launched, not necessarily finished). Without ``stats`` no residual is computed. Raises
        ConfigError for bad labels, seeds or shapes.
        """
        y = check_labels(labels, self.model.config.num_classes)
        keys = check_seeds(seeds, len(y))
        c = self.model.config
        shape = (len(y), c.in_channels, c.input_size, c.input_size)
        _check_shape("noise", noise, shape)
        _check_shape("step_noise", step_noise, (len(self.plan.steps), *shape))
        kmax = max(k for _, k in self.plan.steps) if stats else 0
        x = torch.empty(shape, device=self.device)
        residual = torch.full((len(self.plan.steps), kmax, len(y)), math.nan, device=self.device)
        for start in range(0, len(y), self.batch):
            part = slice(start, min(start + self.batch, len(y)))
            run = _Run(
                self, y[part], keys[part], residual[:, :, part],
                None if noise is None else noise[part],
                None if step_noise is None else step_noise[:, part],
            )  # fmt: skip
            x[part] = run.execute(progress)
        return Samples(x, SampleStats(self.plan, residual))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")


class _Run:
    """One batch on its way: everything that changes while the launch plan is walked."""

    def __init__(
        self,
        sampler: Sampler,
        labels: list[int],
        seeds: list[int],
        residual: Tensor,
        start: Tensor | None,
        step_noise: Tensor | None,
    ):
        self.s, self.count = sampler, len(labels)
        c, device = sampler.model.config, sampler.device
        self.keys = as_keys(seeds).to(device)
        self.shape = (c.in_channels, c.input_size, c.input_size)
        null = [c.num_classes] * (self.count if sampler.guided else 0)
        self.y = torch.tensor(labels + null, dtype=torch.int64, device=device)
        self.residual = residual
        self.stats = residual.shape[1] > 0
        if start is None:
            start = normals(self.keys, 0, 0, SAMPLE_INIT, self.shape)
        self.x = start.to(device, torch.float32)
        # from the host once, before the first launch
        self.step_noise = None if step_noise is None else step_noise.to(device, torch.float32)
        self.solutions: tuple[Tensor, ...] = ()
        self.run_mod: Modulation | None = None
        self.table: list[Modulation] = []
        self.mod: Any = None
        self.z = self.h = self.x

    def execute(self, progress: Callable[[int], object] | None = None) -> Tensor:
        """Walk the launch plan; returns x_0 (B,C,h,w)."""
        for launch in self.s.launches:
            getattr(self, launch.op)(launch)
            if progress is not None and launch.op == "update":
                progress(self.count)
        return self.x

    @property
    def fpdm(self) -> FPDM:
        """The model; a DiT's launch plan asks for none of its parts."""
        assert isinstance(self.s.model, FPDM)
        return self.s.model

    def inputs(self) -> Tensor:
        """x for every branch (G B,C,h,w)."""
        return torch.cat([self.x, self.x]) if self.s.guided else self.x

    def tables(self, launch: Launch) -> None:
        """adaLN vectors of ``count`` timesteps at once: rows (timestep, branch, sample)."""
        model, weights, n = self.fpdm, self.s.weights, launch.count
        t = self.s.timesteps[launch.step : launch.step + n].repeat_interleave(len(self.y))
        y = self.y.repeat(n)
        if model.config.pre_post_timestep_conditioning:
            rows = model.modulation(t, y, weights=weights)
            self.table = [_rows(rows, i * len(self.y), len(self.y)) for i in range(n)]
            return
        if self.run_mod is None:
            self.run_mod = model.modulation_pp(self.y, weights=weights)
        vectors = model.modulation_fp(t, y, weights=weights).view(n, len(self.y), -1)
        self.table = [self.run_mod._replace(fp=v) for v in vectors]

    def encode(self, launch: Launch) -> None:
        """h, and the start of the iteration."""
        self.mod = self.table.pop(0)
        self.h = self.fpdm.encode(self.inputs(), self.mod, weights=self.s.weights)
        self.z = initial_iterate(self.s.config, self.h, self.solutions)

    def iterate(self, launch: Launch) -> None:
        """k iterations; the solution is kept for the next timesteps."""
        self.z, stats = self.fpdm.iterate(
            self.z, self.h, self.mod, launch.count, stats=self.stats, weights=self.s.weights
        )
        if stats is not None:
            self.residual[launch.step, : launch.count] = stats.residual[:, : self.count]
        keep = {"none": 0, "extrapolate": 2}.get(self.s.config.reuse, 1)
        self.solutions = (self.z, *self.solutions)[:keep]

    def update(self, launch: Launch) -> None:
        """Prediction, guidance and the step to the next timestep."""
        s = self.s
        if isinstance(s.model, FPDM):
            out = s.model.decode(self.z, self.mod, weights=s.weights).float()
        else:
            t = s.timesteps[launch.step].expand(len(self.y))
            out = s.model(self.inputs(), t, self.y, weights=s.weights).float()
        if s.guided:
            cond, null = out.chunk(2)
            out = steps.guide(cond, null, s.config.guidance, s.config.guidance_channels)
        z = None
        if self.step_noise is not None:
            z = self.step_noise[launch.step]
        elif s.table.random[launch.step]:
            z = normals(self.keys, launch.step, 0, SAMPLE_STEP, self.shape)
        self.x = steps.step(self.x, out, s.rows[launch.step], z)


def _rows(mod: Modulation, start: int, count: int) -> Modulation:
    """Rows start..start+count of every table."""
    part = slice(start, start + count)
    fp = None if mod.fp is None else mod.fp[part]
    return Modulation([v[part] for v in mod.pre], fp, [v[part] for v in mod.post], mod.final[part])
