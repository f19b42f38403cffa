"""The rows of the benchmark: whole networks, the sampler, training, the optimiser, data.

Baselines run in the same process: the published architecture written plainly, in float32 as it
shipped, in half precision, compiled, and on a CPU compiled with frozen weights; the library's
products alone; a DiT of the same width. One that cannot run is named with the reason.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import cost, published, third_party
from bench.operators import iteration, operators
from bench.rows import DIGITS, OURS, S2, XL, Arms, Row, Setting, attempt, inputs, randomised
from bench.timing import Arm
from fpdm import budget, engine, noise, shards
from fpdm.config import DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SamplerConfig
from fpdm.data import open_dataset
from fpdm.diffusion import Diffusion
from fpdm.kernels.launch import dtype_name
from fpdm.optim import AdamWEMA
from fpdm.recipes import MODEL_PRESETS
from fpdm.weights import PreparedWeights

# of csrc/cpu
DTYPES = (torch.float32, torch.bfloat16)


def settings(device: torch.device) -> list[Setting]:
    """The models of the operator and iteration suites on a CPU; bench.gpu_rows has a GPU's."""
    kinds = (("digits", DIGITS, 64), ("S/2", S2, 2))
    return [Setting(label, c, b, d, device) for label, c, b in kinds for d in DTYPES]


class Plain(nn.Module):
    """The published architecture as a module, so that inductor may freeze its weights."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.config, self.names = model.config, list(model.state_dict())
        for name, value in model.state_dict().items():
            self.register_parameter(
                name.replace(".", "__"), nn.Parameter(value.detach().to(dtype, copy=True))
            )

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, iters: int, free: int = 0,
        f: Callable[..., Tensor] = published.fixed_point_map,
    ) -> Tensor:  # fmt: skip
        """(B,2C,h,w); ``f``: the map, or that compiled."""
        state = {n: getattr(self, n.replace(".", "__")) for n in self.names}
        return published.forward(state, self.config, x, t, y, iters, free, f=f)[0]


def dit(config: ModelConfig, iters: int) -> ModelConfig:
    """The DiT of an FPDM's size: the preset of its width, else one with as many blocks."""
    blocks = next(
        (c.depth for c in MODEL_PRESETS.values()
         if c.kind == "dit" and c.hidden_size == config.hidden_size),
        config.pre_depth + iters + config.post_depth,
    )  # fmt: skip
    return replace(config, kind="dit", depth=blocks, pre_depth=0, post_depth=0)


def network_flops(config: ModelConfig, batch: int, iters: int) -> int:
    """FLOPs of one evaluation with folded injection."""
    return 2 * batch * budget.macs_per_sample(config, [iters], True, 1.0)


def gemms(s: Setting, iters: int) -> Arm:
    """The library's GEMMs and attention of ``iters`` iterations and the pre and post blocks, and
    nothing between them: no implementation that calls the library can be faster."""
    b, t, d, h = s.batch, s.config.tokens, s.config.hidden_size, s.config.num_heads
    like: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
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


def compiled(module: nn.Module, args: tuple[Any, ...], freezing: bool = False) -> Arm:
    """``module`` under torch.compile, compiled here; ``freezing``: its weights are constants."""
    from torch._inductor import config as inductor

    optimised = published.optimised(module.eval())
    run = _no_grad(lambda: optimised(*args))
    with inductor.patch(freezing=freezing):
        run()
    return run


def network(s: Setting, iters: int = 8, beside: Collection[str] = (), seconds: float = 12.0) -> Row:
    """The whole network once, without gradient. ``beside``: also against what is ``compiled`` (on a
    CPU) and against the ``dit`` of its size. ``seconds``: as of a row."""

    def build() -> Arms:
        model = randomised(s.config, s.device)
        weights = PreparedWeights(model, s.dtype, fold=True)
        x, t, y = inputs(s.config, s.batch, s.device)
        plain, args = Plain(model, s.dtype), (x.to(s.dtype), t, y, iters)
        shipped = Plain(model, torch.float32)
        arms: dict[str, Arm | str] = {
            OURS: _no_grad(lambda: model(x, t, y, iters, weights=weights)),
            "gemm + attention": gemms(s, iters),
            "published eager": _no_grad(lambda: plain(*args)),
        }
        if s.dtype != torch.float32:
            arms["published eager float32"] = _no_grad(lambda: shipped(x, t, y, iters))
        if "compiled" in beside:
            arms["published compiled"] = attempt(lambda: compiled(plain, args))
            frozen = Plain(model, s.dtype)
            arms["published frozen"] = attempt(lambda: compiled(frozen, args, freezing=True))
        if "dit" in beside:
            arms |= _dit_arms(s, iters)
        count = network_flops(s.config, s.batch, iters)
        size = cost.network_bytes(s.config, s.batch, iters, s.dtype.itemsize)
        facts = {"k": iters, "dit_blocks": dit(s.config, iters).depth}
        return Arms(arms, count, size, s.batch, facts, s.dtype)

    return Row("network", f"{s.name} k={iters}", build, 21, seconds)


def _dit_arms(s: Setting, iters: int) -> dict[str, Arm | str]:
    config = dit(s.config, iters)
    model = randomised(config, s.device)
    weights, plain = PreparedWeights(model, s.dtype), Plain(model, s.dtype)
    x, t, y = inputs(config, s.batch, s.device)
    return {
        "DiT by fpdm": _no_grad(lambda: model(x, t, y, weights=weights)),
        "DiT eager": _no_grad(lambda: plain(x.to(s.dtype), t, y, 0)),
    }


def _no_grad(fn: Arm) -> Arm:
    def run() -> object:
        with torch.no_grad():
            return fn()

    return run


def training(
    s: Setting, n: int, m: int, recompute: str = "none", compile_too: str = "", chunks: int = 1
) -> Row:
    """Forward and backward of one step. ``compile_too``: of the published model also the ``whole``
    compiled, or the ``map`` alone, whose compilation takes as long whatever n and m are."""

    def build() -> Arms:
        model = randomised(s.config, s.device, recompute=recompute, chunks=chunks)
        weights = PreparedWeights(model, s.dtype, accumulate=True)
        x, t, y = inputs(s.config, s.batch, s.device)
        plain = Plain(model, torch.float32)

        def ours() -> None:
            model.zero_grad(set_to_none=False)
            model(x, t, y, m, n, weights=weights).float().square().mean().backward()

        def theirs(module: Callable[..., Tensor], dtype: torch.dtype, **compiled: Any) -> None:
            plain.zero_grad(set_to_none=False)
            with torch.autocast(s.device.type, dtype=dtype, enabled=dtype != torch.float32):
                out = module(x, t, y, m, n, **compiled)
            out.float().square().mean().backward()

        arms: dict[str, Arm | str] = {
            OURS: ours,
            "published eager": lambda: theirs(plain, s.dtype),
        }
        if s.dtype != torch.float32:
            arms["published eager float32"] = lambda: theirs(plain, torch.float32)
        if compile_too == "whole":
            optimised = published.optimised(plain)
            arms["published compiled"] = lambda: theirs(optimised, s.dtype)
        if compile_too == "map":
            f = published.optimised(published.fixed_point_map)
            arms["published, map compiled"] = lambda: theirs(plain, s.dtype, f=f)
        if recompute == "none":
            arms |= dit_training(s, n + m)
        count = cost.training_flops(s.config, s.batch, n, m)
        facts = {"n": n, "m": m, "recompute": recompute, "chunks": chunks,
                 "dit_blocks": dit(s.config, n + m).depth}  # fmt: skip
        size = cost.training_bytes(s.config, s.batch, n, m, s.dtype.itemsize)
        return Arms(arms, count, size, s.batch, facts, s.dtype)

    name = f"{s.name} n={n} m={m} {recompute}" + (f", {chunks} chunks" if chunks > 1 else "")
    return Row("training", name, build, 15, 45.0)


def dit_training(s: Setting, iters: int) -> dict[str, Arm | str]:
    """Forward and backward of the DiT of its size."""
    config = dit(s.config, iters)
    model = randomised(config, s.device)
    weights = PreparedWeights(model, s.dtype, accumulate=True)
    x, t, y = inputs(config, s.batch, s.device)

    def run() -> None:
        model.zero_grad(set_to_none=False)
        model(x, t, y, weights=weights).float().square().mean().backward()

    return {"DiT by fpdm": run}


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
            arms[OURS if impl == "auto" else impl] = partial(opt.step, 1e-4)
        return Arms(arms, 0, size)

    return Row("optimizer", f"{label} {device.type}", build, 15, 5.0, pooled=True)


def sampling(s: Setting, guidance: float, steps: int, iters: int) -> Row:
    """Images from noise, against the published loop with the same network in eager PyTorch."""

    def build() -> Arms:
        model = randomised(s.config, s.device)
        diffusion = Diffusion(DiffusionConfig(), device=str(s.device))
        config = SamplerConfig(
            steps=steps, iters=iters, guidance=guidance, batch=s.batch,
            dtype=dtype_name(s.dtype),  # type: ignore[arg-type]
        )  # fmt: skip
        sampler = engine.Sampler(model, diffusion, config)
        labels, seeds = [0] * s.batch, list(range(s.batch))
        arms: dict[str, Arm | str] = {
            OURS: lambda: sampler.sample(labels, seeds, stats=False),
            "published eager": published_sampler(sampler, Plain(model, s.dtype), s, labels, seeds),
        }
        if s.dtype != torch.float32:
            shipped, wide = Plain(model, torch.float32), replace(s, dtype=torch.float32)
            arms["published eager float32"] = published_sampler(
                sampler, shipped, wide, labels, seeds
            )
        counts = sampling_counts(s, guidance, steps, iters)
        facts = {"steps": steps, "k": iters, "guidance": guidance, "batch": s.batch}
        return Arms(arms, *counts, s.batch, facts, s.dtype)

    name = f"{s.name} S={steps} k={iters} guidance {guidance:g}"
    return Row("sampler", name, build, 15, 8.0, pooled=s.batch <= 8)


def sampling_counts(s: Setting, guidance: float, steps: int, iters: int) -> tuple[int, int]:
    """FLOPs and bytes of all timesteps; guidance evaluates a batch twice as large."""
    flops = 2 * s.batch * budget.macs_per_sample(s.config, [iters] * steps, True, guidance)
    batch = s.batch * (1 if guidance == 1.0 else 2)
    return flops, steps * cost.network_bytes(s.config, batch, iters, s.dtype.itemsize)


def published_sampler(
    sampler: engine.Sampler,
    plain: Callable[..., Tensor],
    s: Setting,
    labels: list[int],
    seeds: list[int],
) -> Arm:
    """The published loop: the whole network at every timestep, on [cond; null] under guidance;
    noise from torch's generator."""
    shape, guidance = (s.config.in_channels, *(s.config.input_size,) * 2), sampler.config.guidance

    def run() -> None:
        x = noise.normals(noise.as_keys(seeds).to(s.device), 0, 0, noise.SAMPLE_INIT, shape)
        y = torch.tensor(labels, device=s.device)
        null = torch.full_like(y, s.config.num_classes)
        for index, (t, k) in enumerate(sampler.plan.steps):
            times = torch.full_like(y, t)
            if guidance == 1.0:
                out = plain(x.to(s.dtype), times, y, k)
            else:
                twice = torch.cat([x, x]).to(s.dtype), times.repeat(2), torch.cat([y, null])
                cond, free = plain(*twice, k).chunk(2)
                out = engine.steps.guide(cond, free, guidance, None)
            z = torch.randn_like(x) if sampler.table.random[index] else None
            x = engine.steps.step(x, out.float(), sampler.rows[index], z)

    return _no_grad(run)


def skipped(suite: str, name: str, why: str) -> Row:
    """A row that says why it is not measured."""
    return Row(suite, name, lambda: Arms({OURS: why}))


def data() -> list[Row]:
    """Reading a batch: the built-in digits, and latents from shards with their checks done."""

    def digits() -> Arms:
        found = open_dataset(DataConfig(kind="digits"))
        ids = np.arange(256) % len(found)
        return Arms({OURS: lambda: found.batch(ids)}, images=256)

    def latents() -> Arms:
        folder = Path(tempfile.mkdtemp(prefix="fpdm-bench-"))
        values = np.random.default_rng(0).standard_normal((1024, 4, 32, 32), dtype=np.float32)
        batch = (values, np.zeros(1024, np.int64), None)
        shards.write_shards(
            [batch], folder / "latents", dtype="float16", latent_scale=0.18215, rows_per_shard=512
        )
        found = open_dataset(DataConfig(kind="latents", path=str(folder / "latents")))
        ids = np.random.default_rng(1).integers(0, len(found), 256)
        # mapped files live on until they are closed
        shutil.rmtree(folder)
        size = 256 * 4 * 32 * 32 * (2 + 4)
        return Arms({OURS: lambda: found.batch(ids)}, bytes=size, images=256)

    return [
        Row("data", "digits 256", digits, 15, 2.0),
        Row("data", "latents 256", latents, 15, 2.0),
    ]


def cpu_rows() -> list[Row]:
    """Everything that ``python -m bench`` times without a GPU."""
    device = torch.device("cpu")
    kinds = settings(device)
    digits, _, small, small_bf16 = kinds
    rows = [row for s in kinds for row in operators(s)]
    rows += [row for s in (digits, small, small_bf16) for row in iteration(s)]
    larger = replace(small_bf16, batch=8)
    rows += [
        network(digits, 3, ("compiled", "dit")),
        network(small),
        network(larger, 8, ("compiled",)),
    ]
    rows += [network(small, k) for k in (1, 4, 16)]
    # a round takes seconds: five of them were too few to agree with another run
    rows += [network(Setting("XL/2", XL, 1, d, device), seconds=35.0) for d in DTYPES]
    for batch in (1, 8, 64):
        rows += [sampling(replace(digits, batch=batch), g, 5, 3) for g in (1.0, 1.1)]
    rows.append(sampling(kinds[1], 1.1, 5, 3))
    half = Setting("digits", DIGITS, 64, torch.float16, device)
    why = "on a CPU float16 runs in plain PyTorch, which has no kernel of ours"
    rows.append(skipped("sampler", f"{half.name} S=5 k=3 guidance 1.1", why))
    rows += [training(digits, 1, 2, compile_too="whole"), training(kinds[1], 1, 2)]
    rows += [training(small, 1, 3, "none", "map"), training(small, 1, 3, "full")]
    rows += [training(small, 1, 3, "elementwise"), training(larger, 6, 6, "elementwise", "map", 2)]
    rows += [optimizer("digits", DIGITS, device), optimizer("S/2", S2, device)]
    return [*rows, *third_party.rows(small), *data()]
