"""The settings of a run and of a sampler, with their defaults, as frozen dataclasses.

A ``Config`` is a whole run. Presets, recipes and the reading of files and command lines are in
fpdm.recipes. The comment on a field is its text in ``--help``. Dimensions: B batch, T tokens,
D width, H heads, C channels, n iterations without gradient, m iterations with gradient,
k iterations, S sampling steps. This module imports neither torch nor, until YAML is read, yaml.

A field declared with ``needs(default, mode)`` does something in that mode only; given while the
mode is off, it is refused (``settings.used``). A resumed run may change what ``RESUME_FREE`` names,
and settings whose mode is off before and after; any other change makes another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fpdm import settings
from fpdm.settings import ConfigError, Settings, UserError, needs

__all__ = [
    "Config", "ConfigError", "DataConfig", "DiffusionConfig", "ExecutionConfig", "FixedPointConfig",
    "ModelConfig", "OptimConfig", "SamplerConfig", "TrainConfig", "UserError", "diff", "from_dict",
    "to_dict", "to_yaml",
]  # fmt: skip

Recompute = Literal["none", "elementwise", "full"]
Impl = Literal["auto", "reference", "triton", "triton-fused", "cuda", "cpu"]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Architecture: for kind=dit ``depth`` blocks; for kind=fpdm ``pre_depth`` blocks, the
    fixed-point block, iterated, and ``post_depth`` blocks."""

    section: ClassVar[str] = "model"

    kind: Literal["fpdm", "dit"] = "fpdm"  # fpdm: fixed point; dit: the baseline
    input_size: int = 32  # height and width of what the model sees
    patch_size: int = 2  # p; T = (input_size / p)^2
    in_channels: int = 4  # C, channels of an image or latent
    hidden_size: int = 1152  # D, width of a token
    num_heads: int = 16  # H, attention heads; they divide D
    pre_depth: int = 1  # fpdm: blocks before the loop
    post_depth: int = 1  # fpdm: blocks after the loop
    depth: int = 0  # dit: number of blocks
    num_classes: int = 1000  # labels are 0..num_classes-1, the null label is num_classes
    pre_post_timestep_conditioning: bool = False  # pre, post and final blocks see t too

    def check(self) -> None:
        """Sizes divide, depths fit the kind."""
        self.at_least(1, "input_size", "patch_size", "in_channels", "hidden_size", "num_heads")
        self.at_least(1, "num_classes")
        self.require(
            self.input_size % self.patch_size == 0,
            "input_size",
            f"a multiple of model.patch_size = {self.patch_size}",
        )
        self.require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            f"a multiple of model.num_heads = {self.num_heads}",
        )
        self.require(
            self.hidden_size % 4 == 0,
            "hidden_size",
            "a multiple of 4 (2-D sine-cosine positions)",
        )
        looped, depths = self.kind == "fpdm", (self.pre_depth, self.post_depth)
        self.require(
            min(depths) >= 0 and self.depth == 0 if looped else self.depth >= 1 and not any(depths),
            "depth, pre_depth, post_depth",
            "depth = 0 and the others >= 0 for kind = fpdm"
            if looped
            else "depth >= 1 and the others 0 for kind = dit",
        )
        self.require(
            looped or not self.pre_post_timestep_conditioning,
            "pre_post_timestep_conditioning",
            "false for kind = dit, whose blocks all see t",
        )

    @property
    def tokens(self) -> int:
        """T = (input_size / patch_size)^2."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """2C: C for the prediction, C for the variance fractions."""
        return 2 * self.in_channels


@dataclass(frozen=True)
class ExecutionConfig(Settings):
    """How the blocks run; never changes what they compute beyond rounding."""

    section: ClassVar[str] = "execution"

    impl: Impl = "auto"  # of the operators; one that is named and cannot run is an error
    # what the backward of the m iterations computes again instead of keeping it
    recompute: Recompute = "none"
    chunks: int = 1  # parts of the batch that the m iterations take in turn, for less memory
    # dtype of the iterate where the compute is in half precision
    residual_dtype: Literal["compute", "float32"] = needs(
        "compute", "train.precision!=fp32 or sample.dtype!=float32"
    )

    def check(self) -> None:
        """At least one chunk."""
        self.at_least(1, "chunks")


@dataclass(frozen=True)
class FixedPointConfig(Settings):
    """S-JFB (paper section 3.3): n ~ U{n_min..n_max}, m ~ U{m_min..m_max} per micro-batch.

    JFB is ``m_min = m_max = 1``; multi-step JFB is ``m_min = m_max = M``; full unrolling is
    ``n_max = 0`` with ``detach_init=False``. ``draws="per_rank"`` is the published habit.
    """

    section: ClassVar[str] = "fixed_point"
    modes: ClassVar[tuple[str, ...]] = ("model.kind=fpdm",)

    n_min: int = 0  # fewest iterations without gradient
    n_max: int = 10  # N, most iterations without gradient
    m_min: int = 1  # fewest iterations with gradient
    m_max: int = 12  # M, most iterations with gradient
    # stop the gradient at the iterate that enters the m iterations (n > 0 stops it anyway)
    detach_init: bool = needs(True, "gradient!=implicit", "n_min=0")
    draws: Literal["global", "per_rank"] = "global"  # one (n, m) for all ranks, or one each
    gradient: Literal["unroll", "implicit", "phantom"] = "unroll"  # unroll is S-JFB
    # implicit: evaluations of the transposed Jacobian in the backward
    implicit_iters: int = needs(10, "gradient=implicit")
    phantom_damping: float = needs(0.5, "gradient=phantom")  # phantom: b of a step; 1: undamped

    def check(self) -> None:
        """Both ranges are in order."""
        self.at_least(1, "implicit_iters")
        self.require(0 < self.phantom_damping <= 1, "phantom_damping", "above 0, at most 1")
        self.require(0 <= self.n_min <= self.n_max, "n_min, n_max", "0 <= n_min <= n_max")
        self.require(1 <= self.m_min <= self.m_max, "m_min, m_max", "1 <= m_min <= m_max")


@dataclass(frozen=True)
class DiffusionConfig(Settings):
    """Forward process and loss. ``v_mse`` = (SNR+1), ``p2`` = SNR sqrt(1-abar) (published),
    ``min_snr`` = min(SNR, gamma) and ``eps_mse`` = SNR, each times the squared x0 error."""

    section: ClassVar[str] = "diffusion"

    timesteps: int = 1000  # T, of the training schedule
    beta_start: float = 1e-4  # first beta of the linear schedule, before rescaling
    beta_end: float = 0.02  # last beta of the linear schedule, before rescaling
    zero_terminal_snr: bool = True  # rescale so that abar at the last timestep is exactly 0
    prediction: Literal["v", "eps", "x0"] = "v"  # what the network predicts
    loss_weight: Literal["v_mse", "p2", "min_snr", "eps_mse"] = "v_mse"  # see above
    min_snr_gamma: float = needs(5.0, "loss_weight=min_snr")  # min_snr: the cap gamma
    vb_weight: float = 1.0  # weight of the variational bound, which trains the variance

    def check(self) -> None:
        """Betas rise inside (0, 1); eps is refused where it says nothing about x0."""
        self.at_least(2, "timesteps")
        self.at_least(0, "vb_weight")
        self.require(self.min_snr_gamma > 0, "min_snr_gamma", "more than 0")
        self.require(
            0.0 < self.beta_start <= self.beta_end < 1.0,
            "beta_start, beta_end",
            "0 < beta_start <= beta_end < 1",
        )
        self.require(
            not (self.prediction == "eps" and self.zero_terminal_snr),
            "prediction",
            "v or x0 with zero_terminal_snr=true "
            "(at the terminal step eps carries no information about x0)",
        )


@dataclass(frozen=True)
class SamplerConfig(Settings):
    """A sampling run. Exactly one of ``iters``, ``budget`` and ``budget_macs`` decides the cost, or
    ``schedule`` with allocation=explicit; with ``tol`` it is the most a sample can cost."""

    section: ClassVar[str] = "sample"

    method: Literal["ddim", "ddpm", "dpmpp_2m"] = "ddim"  # dpmpp_2m: DPM-Solver++
    steps: int = 28  # S, timesteps
    iters: int | None = None  # k, the same at every step
    budget: int | None = None  # blocks per image
    budget_macs: float | None = None  # MACs per image, guidance included
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"  # which timesteps
    # how iterations are spread over the timesteps, from noise to image
    allocation: Literal[
        "constant", "increasing", "decreasing", "explicit", "adaptive", "learned"
    ] = "constant"
    schedule: tuple[int, ...] = ()  # k per step in sampling order, for allocation=explicit
    tol: float = 0.0  # relative residual that ends a sample's iteration; 0: always k
    solver: Literal["picard", "anderson", "broyden"] = "picard"  # picard: x <- f(x)
    damping: float = 1.0  # b of the solver's step, 0 < b <= 1; 1: undamped
    # past differences that anderson and broyden use
    window: int = needs(3, "solver=anderson|broyden")
    max_iters: int | None = None  # adaptive: most per timestep; none: twice the average
    reuse: Literal["none", "full", "blend", "extrapolate"] = "none"  # where a timestep starts
    reuse_gamma: float = needs(0.5, "reuse=blend")  # blend: h + gamma (x*_prev - h)
    # blend: gamma at t = 0, linear in t; none: constant
    reuse_gamma_end: float | None = needs(None, "reuse=blend")
    # extrapolate: x*_1 + rho (x*_1 - x*_2)
    reuse_rho: float = needs(0.5, "reuse=extrapolate")
    guidance: float = 1.0  # scale; 1: unguided
    # how many of the first channels are guided; none: all; 3: the published habit
    guidance_channels: int | None = needs(None, "guidance!=1")
    guidance_low: float = needs(0.0, "guidance!=1")  # guided where low <= t / (T - 1) <= high
    guidance_high: float = needs(1.0, "guidance!=1")  # see guidance_low
    # 0: off; 1: the guided prediction gets the conditional one's standard deviation
    guidance_rescale: float = needs(0.0, "guidance!=1")
    eta: float = 0.0  # ddim: 0 is deterministic, 1 as noisy as ddpm
    batch: int = 64  # images at once
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what it computes in
    invariant: bool = False  # bitwise the same image in every batch, at a cost
    graphs: Literal["auto", "on", "off"] = "auto"  # CUDA graphs; auto: those that measure faster

    def check(self) -> None:
        """Counts are counts; what the cost allows is the business of fpdm.budget."""
        self.at_least(1, "steps", "batch", "guidance_channels", "iters", "budget", "max_iters")
        self.at_least(0, "tol")
        self.at_least(1, "window")
        self.require(0 < self.damping <= 1, "damping", "above 0, at most 1")
        adaptive, interval = self.allocation == "adaptive", (self.guidance_low, self.guidance_high)
        self.require(self.tol > 0 or not adaptive, "tol", "more than 0 with allocation=adaptive")
        self.require(
            self.max_iters is None or adaptive, "max_iters", "none without allocation=adaptive"
        )
        self.require(
            0 <= interval[0] <= interval[1] <= 1,
            "guidance_low, guidance_high",
            "0 <= guidance_low <= guidance_high <= 1",
        )
        self.require(0 <= self.guidance_rescale <= 1, "guidance_rescale", "0 to 1")
        self.require(0 <= self.eta <= 1, "eta", "0 to 1")
        macs = self.budget_macs
        self.require(macs is None or macs > 0, "budget_macs", "more than 0")


@dataclass(frozen=True)
class DataConfig(Settings):
    """digits: the built-in 8x8 set. images: a folder of class folders. latents: a folder of shards
    with a manifest."""

    section: ClassVar[str] = "data"

    kind: Literal["digits", "images", "latents"] = "digits"  # see above
    path: str = needs("", "kind=images|latents")  # images, latents: the folder
    # digits: which half
    split: Literal["train", "reference", "all"] = needs("train", "kind=digits")
    image_size: int = needs(32, "kind=images")  # images: height and width after decoding
    flip: bool = False  # mirror half of the samples
    # latents: factor to unit variance; none: the one that is stored with them
    latent_scale: float | None = needs(None, "kind=latents")

    def check(self) -> None:
        """Sizes are positive."""
        self.at_least(1, "image_size")
        scale = self.latent_scale
        self.require(scale is None or scale > 0, "latent_scale", "more than 0")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """AdamW (decoupled weight decay) with an exponential moving average of the parameters."""

    section: ClassVar[str] = "optim"

    impl: Literal["auto", "onepass", "fused", "foreach", "single"] = "auto"  # which AdamW runs
    lr: float = 1e-4  # learning rate, at its highest
    lr_final: float | None = None  # cosine to this at the last step; none: constant
    warmup_steps: int = 0  # steps of a linear warm-up
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.999  # decay of the mean of their squares
    eps: float = 1e-8  # added to AdamW's denominator
    weight_decay: float = 0.0  # decoupled, times the learning rate
    clip_norm: float | None = None  # largest norm of the whole gradient; none: unclipped
    ema_decay: float = 0.9999  # decay of the parameters' average, per step
    ema_warmup: bool = False  # shorter average early on

    def check(self) -> None:
        """Rates and decays lie where AdamW converges."""
        self.at_least(0, "lr", "lr_final", "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        self.require(0 <= self.ema_decay <= 1, "ema_decay", "0 to 1")
        self.require(self.eps > 0, "eps", "more than 0")
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "more than 0")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The run: length, precision, cadence."""

    section: ClassVar[str] = "train"

    out: str = "runs"  # runs live in OUT/NAME
    name: str = ""  # empty: the recipe's name
    init: str = ""  # a run or export, with whose weights (a run's: EMA) a new run begins
    steps: int = 400_000  # optimiser steps in all
    batch: int = 512  # global: all ranks, all micro-batches
    accumulate: int = 1  # micro-batches per step
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # what it computes in; weights stay fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    seed: int = 0  # seed of everything random
    label_dropout: float = 0.1  # share of labels replaced by the null label
    log_every: int = 100  # steps per row of metrics.jsonl
    save_every: int = 5_000  # steps per checkpoint; 0: at the end only
    keep: int = 3  # checkpoints that stay
    grid_every: int = 10_000  # steps per sample grid; 0: at the end only
    grid_per_class: int = 4  # images in a row of a sample grid
    max_nonfinite: int = 20  # non-finite steps in a row that end the run
    scale_init: float = needs(65536.0, "precision=fp16")  # fp16 loss scale, at the start
    # good fp16 steps until the scale doubles
    scale_growth_interval: int = needs(2000, "precision=fp16")
    scale_floor: float = needs(1.0, "precision=fp16")  # fp16 loss scale, lowest
    resume: Literal["auto", "never"] = "auto"  # never: refuse a run that has checkpoints
    # CUDA graphs of micro-batches; auto: where faster, and memory allows
    graphs: Literal["auto", "on", "off"] = "auto"
    tensorboard: bool = False  # log the metrics to TensorBoard too (package tensorboard)
    ddp_timeout_s: int = 600  # seconds that a rank waits for the others

    def check(self) -> None:
        """Counts are counts, and micro-batches are equal."""
        self.at_least(1, "steps", "batch", "accumulate", "log_every", "keep", "grid_per_class")
        self.at_least(1, "max_nonfinite", "scale_growth_interval", "ddp_timeout_s")
        self.at_least(0, "save_every", "grid_every")
        self.require(
            self.batch % self.accumulate == 0,
            "batch",
            f"a multiple of train.accumulate = {self.accumulate}",
        )
        self.require(0 <= self.seed < 2**64, "seed", "0 to 2^64 - 1")
        self.require(0 <= self.label_dropout < 1, "label_dropout", "at least 0 and below 1")
        self.require(
            0 < self.scale_floor <= self.scale_init,
            "scale_floor, scale_init",
            "0 < scale_floor <= scale_init",
        )


@dataclass(frozen=True)
class Config:
    """A whole training run; what ``config.yaml`` in a run directory holds."""

    recipe: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    fixed_point: FixedPointConfig = field(default_factory=FixedPointConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(kind="latents"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        """What no section can know alone. Raises ConfigError."""
        m, s = self.model, self.sample
        if self.diffusion.zero_terminal_snr and s.spacing == "leading":
            raise ConfigError(
                "sample.spacing: got leading, expected trailing or linspace with "
                "diffusion.zero_terminal_snr=true (leading omits the terminal step)"
            )
        if s.steps > self.diffusion.timesteps:
            raise ConfigError(
                f"sample.steps: got {s.steps}, expected at most diffusion.timesteps = "
                f"{self.diffusion.timesteps}"
            )
        if s.guidance != 1.0 and self.train.label_dropout == 0.0:
            raise ConfigError(
                f"sample.guidance: got {s.guidance}, expected 1 with train.label_dropout=0 "
                "(the null label is never trained)"
            )
        shape = (m.in_channels, m.input_size, m.num_classes)
        if self.data.kind == "digits" and shape != (1, 8, 10):
            raise ConfigError(
                f"model.in_channels, input_size, num_classes: got {shape}, expected (1, 8, 10) "
                "for data.kind=digits"
            )
        if self.data.kind == "images" and self.data.image_size != m.input_size:
            raise ConfigError(
                f"data.image_size: got {self.data.image_size}, expected model.input_size = "
                f"{m.input_size}"
            )


# what files of older versions say where nobody had chosen anything
FORMER_DEFAULTS: Mapping[str, Any] = {"data.latent_scale": 0.18215}

# settings and sections that a resumed run may change, each with the reason. Not among them: seed,
# batch, and the cadence of metrics.jsonl. Two exceptions are made by ``diff``: with optim.lr_final
# set train.steps may not change, and a setting whose mode is off always may
RESUME_FREE: Mapping[str, str] = {
    "recipe": "a label",
    "execution": "rounding only",
    "sample": "draws the grids only",
    "data.path": "the fingerprint tells whether it is the same data",
    "optim.impl": "rounding only",
    "train.out": "where the run lives",
    "train.name": "where the run lives",
    "train.steps": "a longer or shorter run has the same beginning",
    "train.device": "rounding only",
    "train.save_every": "cadence of checkpoints",
    "train.keep": "old checkpoints only",
    "train.grid_every": "cadence of pictures",
    "train.grid_per_class": "size of pictures",
    "train.max_nonfinite": "when to give up",
    "train.resume": "asked of this session only",
    "train.graphs": "how the same work is launched",
    "train.tensorboard": "a copy of the metrics",
    "train.ddp_timeout_s": "when to give up",
}


def diff(old: Any, new: Any, ignore: Mapping[str, str] | None = None) -> list[str]:
    """``["section.key: old -> new", ...]`` for two Configs, sections or their dicts.

    ``ignore`` (``RESUME_FREE``; for whole Configs) names settings or sections that may differ. When
    it is given, ``train.steps`` may still not differ where the learning rate depends on it
    (``optim.lr_final``), and settings whose mode is off on both sides may.
    """
    a, b = settings.flat(old), settings.flat(new)
    free = set(ignore or ())
    if b.get("optim.lr_final") is not None:
        free.discard("train.steps")
    if ignore is not None:
        free |= settings.idle(Config, a).keys() & settings.idle(Config, b).keys()
    return [
        f"{name}: {a.get(name)} -> {b.get(name)}"
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name) and name not in free and name.split(".")[0] not in free
    ]


def to_dict(config: Any) -> dict[str, Any]:
    """A Config or a section as nested dicts, lists and scalars."""
    return settings.plain(config)


def from_dict(data: Mapping[str, Any], base: Config | None = None) -> Config:
    """The inverse of ``to_dict``; what ``data`` lacks is taken from ``base``.

    Raises ConfigError for a bad value, and for an unknown key, naming the nearest known one.
    """
    return settings.update(base or Config(), data)


def to_yaml(config: Config) -> str:
    """What ``config.yaml`` holds; ``recipes.load_config`` reads it back."""
    return settings.write_yaml(to_dict(config))
