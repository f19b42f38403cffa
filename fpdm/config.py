"""Every setting and every default of fpdm: frozen dataclasses, presets, recipes.

This is the only module with defaults. Dimensions: B batch, T tokens, D width, H heads, C channels,
n iterations without gradient, m iterations with gradient, k iterations, S sampling steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Recompute = Literal["none", "elementwise", "full"]
Impl = Literal["auto", "reference", "triton", "cuda", "cpu"]


class UserError(ValueError):
    """Something the user can mend: one line that says what was got and what was expected.

    Commands print it without a traceback and exit with status 2.
    """


class ConfigError(UserError):
    """A setting that cannot be met."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. ``kind="dit"`` uses ``depth`` blocks; ``kind="fpdm"`` uses ``pre_depth`` blocks,
    the fixed-point block and ``post_depth`` blocks."""

    kind: Literal["fpdm", "dit"] = "fpdm"
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    num_heads: int = 16
    pre_depth: int = 1
    post_depth: int = 1
    depth: int = 0
    num_classes: int = 1000
    pre_post_timestep_conditioning: bool = False

    def __post_init__(self) -> None:
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "num_heads", "num_classes")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: got {getattr(self, name)}, expected at least 1")
        if self.input_size % self.patch_size:
            raise ConfigError(
                f"model.input_size: got {self.input_size}, expected a multiple of "
                f"model.patch_size = {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size: got {self.hidden_size}, expected a multiple of "
                f"model.num_heads = {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ConfigError(
                f"model.hidden_size: got {self.hidden_size}, expected a multiple of 4 "
                "(2-D sine-cosine positions)"
            )
        if self.kind == "fpdm" and (self.depth or self.pre_depth < 0 or self.post_depth < 0):
            raise ConfigError(
                f"model: got depth={self.depth}, pre_depth={self.pre_depth}, "
                f"post_depth={self.post_depth}, expected depth=0 and depths >= 0 for kind=fpdm"
            )
        if self.kind == "dit" and (self.depth < 1 or self.pre_depth or self.post_depth):
            raise ConfigError(
                f"model: got depth={self.depth}, pre_depth={self.pre_depth}, "
                f"post_depth={self.post_depth}, expected depth>=1 and no pre/post for kind=dit"
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
class ExecutionConfig:
    """How the blocks run; never changes what they compute beyond rounding."""

    impl: Impl = "auto"
    recompute: Recompute = "none"
    residual_dtype: Literal["compute", "float32"] = "compute"


@dataclass(frozen=True)
class FixedPointConfig:
    """S-JFB (paper section 3.3): n ~ U{n_min..n_max}, m ~ U{m_min..m_max}, one draw per micro-batch.

    JFB is ``m_min = m_max = 1``; multi-step JFB is ``m_min = m_max = M``; full unrolling is
    ``n_max = 0`` with ``detach_init=False``. ``draws="per_rank"`` is the published habit.
    """

    n_min: int = 0
    n_max: int = 10
    m_min: int = 1
    m_max: int = 12
    detach_init: bool = True
    draws: Literal["global", "per_rank"] = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.n_min <= self.n_max:
            raise ConfigError(
                f"fixed_point.n_min, n_max: got {self.n_min}, {self.n_max}, "
                "expected 0 <= n_min <= n_max"
            )
        if not 1 <= self.m_min <= self.m_max:
            raise ConfigError(
                f"fixed_point.m_min, m_max: got {self.m_min}, {self.m_max}, "
                "expected 1 <= m_min <= m_max"
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """Forward process and loss. ``v_mse`` = (SNR+1), ``p2`` = SNR sqrt(1-abar) (published),
    ``min_snr`` = min(SNR, gamma) and ``eps_mse`` = SNR, each times the squared x0 error."""

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = True
    prediction: Literal["v", "eps", "x0"] = "v"
    loss_weight: Literal["v_mse", "p2", "min_snr", "eps_mse"] = "v_mse"
    min_snr_gamma: float = 5.0
    vb_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ConfigError(f"diffusion.timesteps: got {self.timesteps}, expected at least 2")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ConfigError(
                f"diffusion.beta_start, beta_end: got {self.beta_start}, {self.beta_end}, "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ConfigError(
                "diffusion.prediction: got eps with zero_terminal_snr=true, expected v or x0 "
                "(at the terminal step eps carries no information about x0)"
            )


@dataclass(frozen=True)
class SamplerConfig:
    """A sampling run. Exactly one of ``iters``, ``budget`` (blocks per image) or ``budget_macs`` (MACs per
    image, guidance included) decides the cost; ``schedule`` lists k per step in sampling order."""

    method: Literal["ddim", "ddpm"] = "ddim"
    steps: int = 28
    iters: int | None = None
    budget: int | None = None
    budget_macs: float | None = None
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    allocation: Literal["constant", "increasing", "decreasing", "explicit"] = "constant"
    schedule: tuple[int, ...] = ()
    reuse: Literal["none", "full", "blend", "extrapolate"] = "none"
    reuse_gamma: float = 0.5
    reuse_rho: float = 0.5
    guidance: float = 1.0
    guidance_channels: int | None = None
    eta: float = 0.0
    batch: int = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    invariant: bool = False


@dataclass(frozen=True)
class DataConfig:
    """``digits``: the built-in 8x8 set (``split`` train or all). ``images``: a folder of class folders.
    ``latents``: a folder of shards with a manifest."""

    kind: Literal["digits", "images", "latents"] = "digits"
    path: str = ""
    split: Literal["train", "reference", "all"] = "train"
    image_size: int = 32
    flip: bool = False
    latent_scale: float = 0.18215


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (decoupled weight decay) with an exponential moving average of the parameters."""

    impl: Literal["auto", "fused", "foreach", "single"] = "auto"
    lr: float = 1e-4
    lr_final: float | None = None
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema_decay: float = 0.9999
    ema_warmup: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The run: lengths, precision, cadence. ``batch`` is the global batch (all ranks, all micro-batches)."""

    out: str = "runs"
    name: str = ""
    steps: int = 400_000
    batch: int = 512
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    label_dropout: float = 0.1
    log_every: int = 100
    save_every: int = 5_000
    keep: int = 3
    grid_every: int = 10_000
    grid_per_class: int = 4
    max_nonfinite: int = 20
    scale_init: float = 65536.0
    scale_growth_interval: int = 2000
    scale_floor: float = 1.0
    resume: Literal["auto", "never"] = "auto"
    tensorboard: bool = False
    ddp_timeout_s: int = 600


@dataclass(frozen=True)
class Config:
    """A whole training run; what ``config.yaml`` in a run directory holds."""

    recipe: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    fixed_point: FixedPointConfig = field(default_factory=FixedPointConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SamplerConfig = field(default_factory=SamplerConfig)
