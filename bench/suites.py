"""The rows of the benchmark: what is timed, against what, and what it costs by count.

A row is a name and a function that builds its arms. The first arm is ours; the others are baselines
in the same process. An arm that is a string says why it cannot run here, and becomes a row that
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench import cost, published
from bench.timing import Arm
from fpdm import engine, noise
from fpdm.config import (
    DataConfig,
    DiffusionConfig,
    ExecutionConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
)
from fpdm.data import open_dataset
from fpdm.diffusion import Diffusion
from fpdm.kernels import ops
from fpdm.model import FPDM
from fpdm.optim import AdamWEMA
from fpdm.recipes import MODEL_PRESETS, RECIPES
from fpdm.weights import PreparedWeights

OURS = "fpdm"


@dataclass
class Arms:
    """Callables by name, ours first; FLOPs and bytes of one call of ours; images per call."""

    run: dict[str, Arm | str]
    flops: int = 0
    bytes: int = 0
    images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """``build`` makes the arms only when the row is run."""

    suite: str
    name: str
    build: Callable[[], Arms]
    rounds: int = 15


@dataclass(frozen=True)
class Setting:
    """Model, batch, dtype and device of a suite."""

    label: str
    config: ModelConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """Such as ``S/2 B8 bfloat16``."""
        return f"{self.label} B{self.batch} {str(self.dtype).removeprefix('torch.')}"


DIGITS = RECIPES["digits"].model
S2 = MODEL_PRESETS["fpdm-s-2"]
XL = MODEL_PRESETS["fpdm-xl-2"]


def settings(device: torch.device) -> list[Setting]:
    """The models of the operator and iteration suites: small ones on a CPU, XL/2 on a GPU."""
    if device.type == "cuda":
        halves = (torch.bfloat16, torch.float16)
        return [Setting("XL/2", XL, b, d, device) for b in (2, 64) for d in halves]
    return [
        Setting("digits", DIGITS, 64, torch.float32, device),
        Setting("digits", DIGITS, 64, torch.bfloat16, device),
        Setting("S/2", S2, 8, torch.bfloat16, device),
    ]


def randomised(config: ModelConfig, device: torch.device, **execution: Any) -> FPDM:
    """Every parameter random: adaLN-Zero would make the gates zero."""
    torch.manual_seed(0)
    model = FPDM(config, ExecutionConfig(**execution)).to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model


def inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y."""
    side = config.input_size
    x = torch.randn(batch, config.in_channels, side, side, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return x, t, torch.randint(0, config.num_classes, (batch,), device=device)


def operators(s: Setting) -> Iterator[Row]:
    """Each operator, forward and backward, against the plain one."""
    b, t, d, h = s.batch, s.config.tokens, s.config.hidden_size, s.config.num_heads

    def tensors() -> dict[str, Tensor]:
        torch.manual_seed(0)
        like = {"dtype": s.dtype, "device": s.device}
        found = {n: torch.randn(b, t, d, **like) for n in ("z", "y", "dy", "out", "dz")}
        found |= {n: torch.randn(b, t, 4 * d, **like) for n in ("wide", "dwide", "wide_out")}
        found |= {n: torch.randn(b, t, 3 * d, **like) for n in ("qkv", "dqkv")}
        found["mod"] = torch.randn(b, 6 * d, **like)
        found["dmod"] = torch.zeros(b, 6 * d, device=s.device)
        found["w"] = torch.randn(4 * d, d, **like)
        found["bias"] = torch.randn(4 * d, **like)
        found["dw"], found["db"] = torch.zeros(4 * d, d, device=s.device), found["bias"].float()
        return found

    def calls(o: Any, v: dict[str, Tensor]) -> dict[str, tuple[Arm, float]]:
        shift, scale, gate, *_ = v["mod"].chunk(6, -1)
        dshift, dscale, dgate, *_ = v["dmod"].chunk(6, -1)
        z, y, out, dz, dy = v["z"], v["y"], v["out"], v["dz"], v["dy"]
        return {
            "adaln": (lambda: o.adaln(z, shift, scale, out=out), 2),
            "adaln_backward": (
                lambda: o.adaln_backward(dy, z, scale, dz, dshift, dscale), 4
            ),
            "gate_residual": (lambda: o.gate_residual(z, y, gate, out=out), 3),
            "gate_residual_backward": (
                lambda: o.gate_residual_backward(dy, y, gate, dgate, out=out), 3
            ),
            "gate_residual_adaln": (
                lambda: o.gate_residual_adaln(z, y, gate, shift, scale, z_out=dz, out=out), 4
            ),
            "gelu": (lambda: o.gelu(v["wide"], out=v["wide_out"]), 8),
            "gelu_backward": (
                lambda: o.gelu_backward(v["dwide"], v["wide"], out=v["wide_out"]), 12
            ),
            "linear_add_gelu": (
                lambda: o.linear_add_gelu(
                    z, v["w"], v["bias"], pre=v["wide"], out=v["wide_out"]
                ), 13
            ),
            "linear_wgrad": (lambda: o.linear_wgrad(v["dwide"], z, v["dw"], v["db"]), 5),
            "attention": (lambda: o.attention(v["qkv"], h, out=out), 4),
            "attention_backward": (
                lambda: o.attention_backward(dy, v["qkv"], y, h, out=v["dqkv"]), 8
            ),
        }  # fmt: skip

    def build(name: str) -> Arms:
        v = tensors()
        impl = ops.choose("auto", s.device, s.dtype)
        found = {
            OURS: calls(ops.resolve(impl, s.device, s.dtype), v)[name],
            "plain PyTorch": calls(ops.resolve("reference", s.device), v)[name],
        }
        units = found[OURS][1]
        rows = b * t
        gemm = 8 * rows * d * d
        products = {
            "linear_add_gelu": gemm, "linear_wgrad": gemm,
            "attention": 4 * rows * t * d, "attention_backward": 10 * rows * t * d,
        }  # fmt: skip
        size = int(units * b * t * d * s.dtype.itemsize)
        arms = {k: fn for k, (fn, _) in found.items()}
        return Arms(arms, products.get(name, 0), size, facts={"impl": impl})

    for name in calls(ops.resolve("reference", "cpu"), _placeholders()):
        yield Row("operators", f"{s.name} {name}", lambda name=name: build(name), 31)


def _placeholders() -> dict[str, Tensor]:
    names = ("z", "y", "dy", "out", "dz", "wide", "dwide", "wide_out", "qkv", "dqkv", "mod", "dmod")
    return dict.fromkeys((*names, "w", "bias", "dw", "db"), torch.empty(1, 6))


class Plain(nn.Module):
    """The published architecture as a module, so that inductor may freeze its weights."""

    def __init__(self, model: FPDM, dtype: torch.dtype):
        super().__init__()
        self.config, self.names = model.config, list(model.state_dict())
        for name, value in model.state_dict().items():
            self.register_parameter(
                name.replace(".", "__"), nn.Parameter(value.detach().to(dtype, copy=True))
            )

    def forward(self, x: Tensor, t: Tensor, y: Tensor, iters: int, free: int = 0) -> Tensor:
        """(B,2C,h,w)."""
        state = {n: getattr(self, n.replace(".", "__")) for n in self.names}
        return published.forward(state, self.config, x, t, y, iters, free)[0]


def gemms(s: Setting, iters: int) -> Arm:
    """The library's GEMMs and attention of ``iters`` iterations and the pre and post blocks, and
    nothing between them: no implementation that calls the library can be faster."""
    b, t, d, h = s.batch, s.config.tokens, s.config.hidden_size, s.config.num_heads
    like = {"dtype": s.dtype, "device": s.device}
    block = ((1, 3), (1, 1), (1, 4), (4, 1))
    shapes = {(1, 2), (2, 1), *block}
    x = {i: torch.randn(b * t, i * d, **like) for i in (1, 2, 4)}
    w = {(i, o): torch.randn(o * d, i * d, **like) for i, o in shapes}
    bias = {o: torch.randn(o * d, **like) for _, o in shapes}
    out = {o: torch.empty(b * t, o * d, **like) for _, o in shapes}
    q, k, v = torch.randn(3, b, h, t, d // h, **like).unbind(0)

    def run() -> None:
        with torch.no_grad():
            for index in range(iters + s.config.pre_depth + s.config.post_depth):
                for i, o in (((1, 2), (2, 1)) if index < iters else ()) + block:
                    torch.addmm(bias[o], x[i], w[i, o].t(), out=out[o])
                nn.functional.scaled_dot_product_attention(q, k, v)

    return run


def frozen(module: nn.Module, *args: Any) -> Arm:
    """``module`` under torch.compile with inductor's weight freezing, compiled here."""
    from torch._inductor import config as inductor

    compiled = torch.compile(module.eval())

    def run() -> object:
        with torch.no_grad():
            return compiled(*args)

    with inductor.patch(freezing=True):
        run()
    return run


def network(s: Setting, iters: int = 8, compile_too: bool = True) -> Row:
    """The whole network once, without gradient."""

    def build() -> Arms:
        model = randomised(s.config, s.device)
        weights = PreparedWeights(model, s.dtype, fold=True)
        x, t, y = inputs(s.config, s.batch, s.device)
        plain, args = Plain(model, s.dtype), (x.to(s.dtype), t, y, iters)
        arms: dict[str, Arm | str] = {
            OURS: _no_grad(lambda: model(x, t, y, iters, weights=weights)),
            "gemm + attention": gemms(s, iters),
            "published eager": _no_grad(lambda: plain(*args)),
        }
        if compile_too:
            arms["published compiled"] = _no_grad(_compiled(plain, args))
        if s.device.type == "cpu":
            arms["published frozen"] = frozen(Plain(model, s.dtype), *args)
        parts = [p for _ in range(iters) for p in cost.iteration(s.config, s.batch)]
        return Arms(arms, cost.flops(parts), 0, s.batch)

    return Row("network", f"{s.name} k={iters}", build, 9)


def _compiled(module: nn.Module, args: tuple[Any, ...]) -> Arm:
    compiled = torch.compile(module, mode="max-autotune-no-cudagraphs" if args[0].is_cuda else None)
    return lambda: compiled(*args)


def _no_grad(fn: Arm) -> Arm:
    def run() -> object:
        with torch.no_grad():
            return fn()

    return run


def training(s: Setting, n: int, m: int, recompute: str = "none", compile_too: bool = True) -> Row:
    """Forward and backward of one step."""

    def build() -> Arms:
        model = randomised(s.config, s.device, recompute=recompute)
        weights = PreparedWeights(model, s.dtype)
        x, t, y = inputs(s.config, s.batch, s.device)
        plain = Plain(model, torch.float32)

        def ours() -> None:
            model.zero_grad(set_to_none=False)
            model(x, t, y, m, n, weights=weights).float().square().mean().backward()

        def theirs(module: nn.Module, dtype: torch.dtype) -> None:
            plain.zero_grad(set_to_none=False)
            with torch.autocast(s.device.type, dtype=dtype, enabled=dtype != torch.float32):
                out = module(x, t, y, m, n)
            out.float().square().mean().backward()

        arms: dict[str, Arm | str] = {
            OURS: ours,
            "published eager": lambda: theirs(plain, s.dtype),
            "published eager float32": lambda: theirs(plain, torch.float32),
        }
        if compile_too:
            compiled = torch.compile(plain)
            arms["published compiled"] = lambda: theirs(compiled, s.dtype)
        parts = [p for _ in range(n + m) for p in cost.iteration(s.config, s.batch)]
        parts += [p for _ in range(m) for p in cost.iteration_backward(s.config, s.batch)]
        return Arms(arms, cost.flops(parts), 0, s.batch)

    return Row("training", f"{s.name} n={n} m={m} {recompute}", build, 9)


def optimizer(label: str, config: ModelConfig, device: torch.device) -> Row:
    """One update of all parameters with the average and the half-precision copies."""

    def build() -> Arms:
        arms: dict[str, Arm | str] = {}
        size = 0
        for impl in ("auto", "fused", "onepass", "foreach"):
            model = randomised(config, device)
            weights = PreparedWeights(model, torch.bfloat16)
            try:
                opt = AdamWEMA(model, OptimConfig(impl=impl), weights)  # type: ignore[arg-type]
            except ValueError as error:
                arms[impl] = str(error)
                continue
            opt.gradients.normal_()
            size = 38 * opt.layout.trained
            arms[OURS if impl == "auto" else impl] = lambda opt=opt: opt.step(1e-4, 0.5)
        return Arms(arms, 0, size)

    return Row("optimizer", f"{label} {device.type}", build, 15)


def sampling(s: Setting, guidance: float, steps: int, iters: int) -> Row:
    """Images from noise, against the published loop with the same network in eager PyTorch."""

    def build() -> Arms:
        model = randomised(s.config, s.device)
        diffusion = Diffusion(DiffusionConfig(), device=str(s.device))
        config = SamplerConfig(
            steps=steps, iters=iters, guidance=guidance, batch=s.batch,
            dtype=str(s.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        )  # fmt: skip
        sampler = engine.Sampler(model, diffusion, config)
        labels, seeds = [0] * s.batch, list(range(s.batch))
        plain = Plain(model, s.dtype)

        def theirs() -> None:
            keys = noise.as_keys(seeds).to(s.device)
            x = noise.normals(keys, 0, 0, noise.SAMPLE_INIT, (s.config.in_channels,) + (
                s.config.input_size,) * 2)  # fmt: skip
            y = torch.tensor(labels, device=s.device)
            null = torch.full_like(y, s.config.num_classes)
            for index, (t, _) in enumerate(sampler.plan.steps):
                times = torch.full_like(y, t)
                if guidance == 1.0:
                    out = plain(x.to(s.dtype), times, y, iters)
                else:
                    both = plain(
                        torch.cat([x, x]).to(s.dtype), times.repeat(2), torch.cat([y, null]), iters
                    )
                    cond, free = both.chunk(2)
                    out = engine.steps.guide(cond, free, guidance, None)
                x = engine.steps.step(x, out.float(), sampler.rows[index], None)

        def ours() -> None:
            sampler.sample(labels, seeds, stats=False)

        arms: dict[str, Arm | str] = {OURS: ours, "published eager": _no_grad(theirs)}
        return Arms(arms, 0, 0, s.batch, {"steps": steps, "k": iters, "guidance": guidance})

    return Row("sampler", f"{s.name} S={steps} k={iters} guidance {guidance:g}", build, 7)


def data() -> Row:
    """Reading a batch of digits."""

    def build() -> Arms:
        import numpy as np

        digits = open_dataset(DataConfig(kind="digits"))
        ids = np.arange(256) % len(digits)
        return Arms({OURS: lambda: digits.batch(ids)}, images=256)

    return Row("data", "digits 256", build, 15)


def cpu_rows() -> list[Row]:
    """Everything that ``python -m bench`` times without a GPU."""
    device = torch.device("cpu")
    kinds = settings(device)
    rows = [row for s in kinds for row in operators(s)]
    rows += [network(kinds[2]), network(kinds[1], 3)]
    rows += [
        sampling(Setting("digits", DIGITS, b, d, device), g, 10, 3)
        for b, d, g in (
            (1, torch.float32, 1.1), (8, torch.float32, 1.1), (64, torch.float32, 1.1),
            (64, torch.float32, 1.0), (64, torch.bfloat16, 1.1),
        )
    ]  # fmt: skip
    rows += [
        training(kinds[2], 6, 6),
        training(kinds[0], 1, 2, compile_too=False),
        training(kinds[1], 1, 2, compile_too=False),
    ]
    return [*rows, optimizer("digits", DIGITS, device), optimizer("S/2", S2, device), data()]


def gpu_rows() -> list[Row]:
    """XL/2 on one GPU, compiled baselines last: bench.gpu_rows."""
    from bench import gpu_rows as module

    return module.rows()


__all__ = ["OURS", "Arms", "Row", "cpu_rows", "gpu_rows"]
