"""The rows of ``python -m bench`` on a GPU: XL/2, compiled baselines last.

Published baselines: eager in half precision, float32 as shipped (TF32 off, as its sampler), and
torch.compile with max-autotune: the block, the fixed-point map and the final layer, each once, for
every (n, m) and k, which a compilation of the whole step would not serve. At batch 1 the network
around them is one CUDA graph, and Triton's templates are among the candidates for its GEMMs; at
batch 64 the library's alone, since the search takes minutes and ends at the library for every GEMM
of that size (bench/results/nvidia-h200/autotune.txt).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import cost, published, third_party, timing
from bench.operators import iteration, operators
from bench.rows import LAUNCHED, OURS, Arms, Row, Setting, attempt, inputs, randomised
from bench.suites import (
    Plain,
    data,
    dit_training,
    gemms,
    network,
    optimizer,
    published_sampler,
    sampling_counts,
)
from bench.timing import Arm
from fpdm import engine
from fpdm.batches import draw_iterations
from fpdm.config import DiffusionConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.kernels.launch import dtype_name
from fpdm.recipes import MODEL_PRESETS, RECIPES
from fpdm.weights import PreparedWeights

XL = MODEL_PRESETS["fpdm-xl-2"]
DRAWS = 8


def setting(batch: int, dtype: torch.dtype = torch.bfloat16) -> Setting:
    """XL/2 on the current GPU."""
    return Setting("XL/2", XL, batch, dtype, torch.device("cuda"))


def sampling(
    s: Setting, guidance: float, compiled: bool, steps: int = 28, iters: int = 8,
    method: str = "ddim",
) -> Row:  # fmt: skip
    """Images from noise, against eager PyTorch. ``compiled``: against torch.compile as well, else
    the time of our own launches without graphs."""

    def build() -> Arms:
        model = randomised(s.config, s.device)
        diffusion = Diffusion(DiffusionConfig(), device=str(s.device))
        labels, seeds = [0] * s.batch, list(range(s.batch))

        def ours(graphs: str) -> tuple[engine.Sampler, Arm]:
            config = SamplerConfig(
                steps=steps, iters=iters, guidance=guidance, batch=s.batch, graphs=graphs,  # type: ignore[arg-type]
                dtype=dtype_name(s.dtype), method=method,  # type: ignore[arg-type]
            )  # fmt: skip
            sampler = engine.Sampler(model, diffusion, config)
            run = partial(sampler.sample, labels, seeds, stats=False)
            # graphs are tried, timed and settled; without them once to warm up
            for _ in range(1 if graphs == "off" else 4):
                run()
            return sampler, run

        sampler, run = ours("auto")
        plain = Plain(model, s.dtype).to(s.device)
        arms: dict[str, Arm | str] = {OURS: run}
        one = gemms(replace(s, batch=s.batch * (1 if guidance == 1.0 else 2)), iters)
        if s.batch == 1 and s.device.type == "cuda":
            # without the launches, as everything it is compared with
            one = timing.replayed(one, 1)

        def floor() -> None:
            for _ in range(steps):
                one()

        arms["gemm + attention"] = floor
        if compiled:
            regions = Regions("ATEN,TRITON" if s.batch == 1 else "ATEN")

            def theirs(*args: Any) -> Tensor:
                return regions(partial(_with_map(plain), *args))

            network = Replayed(theirs) if s.batch == 1 else theirs
            arms["published compiled"] = published_sampler(sampler, network, s, labels, seeds)
        arms["published eager"] = published_sampler(sampler, plain, s, labels, seeds)
        if not compiled:
            arms[LAUNCHED] = ours("off")[1]
            if s.batch == 1:  # as shipped; seconds for a large batch
                shipped, wide = Plain(model, torch.float32), replace(s, dtype=torch.float32)
                arms["published eager float32"] = published_sampler(
                    sampler, shipped, wide, labels, seeds
                )
        facts = {"steps": steps, "k": iters, "guidance": guidance}
        counts = sampling_counts(s, guidance, steps, iters)
        return Arms(arms, *counts, s.batch, facts, s.dtype)

    name = f"{s.name} S={steps} k={iters} guidance {guidance:g}"
    name += "" if method == "ddim" else f" {method}"
    return Row("sampler", name + (" compiled" if compiled else ""), build, 31, 12.0)


def _with_map(plain: Plain) -> Any:
    """``plain`` with the map that ``published`` has when it is called: the default of its argument
    is the one that was there when it was defined."""
    return lambda *args: plain(*args, f=published.fixed_point_map)


class Regions:
    """``published`` with its block, fixed-point map and final layer compiled, their GEMMs chosen
    among those of ``backends``."""

    def __init__(self, backends: str = "ATEN") -> None:
        options = {"max_autotune": True, "max_autotune_gemm_backends": backends}
        how: dict[str, Any] = {"options": options, "dynamic": False}
        names = ("block", "fixed_point_map", "_final")
        self.compiled = {n: published.optimised(getattr(published, n), **how) for n in names}

    def __call__(self, fn: Callable[[], Any]) -> Any:
        """What ``fn`` returns with them in place of the plain ones."""
        before = {name: getattr(published, name) for name in self.compiled}
        for name, compiled in self.compiled.items():
            setattr(published, name, compiled)
        try:
            return fn()
        finally:
            for name, plain in before.items():
                setattr(published, name, plain)


class Replayed:
    """A network (x, t, y, k) as one CUDA graph for every k, on copies of its inputs."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.graphs: dict[int, tuple[list[Tensor], Arm, list[Tensor]]] = {}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, k: int) -> Tensor:
        """Its result, overwritten by the next call."""
        if k not in self.graphs:
            held, result = [v.clone() for v in (x, t, y)], [x]

            def work() -> None:
                result[0] = self.network(*held, k)

            self.graphs[k] = held, timing.one_by_one([work]), result
        held, replay, result = self.graphs[k]
        for mine, given in zip(held, (x, t, y)):
            mine.copy_(given)
        replay()
        return result[0]


def floor_of_training(s: Setting, n: int, m: int) -> Arm:
    """The library's GEMMs and attention of a training step, and nothing between them: n + m
    forwards, then for m of them, and for the pre and post blocks, both products of every weight and
    the backward of attention."""
    b, t, d, h = s.batch, s.config.tokens, s.config.hidden_size, s.config.num_heads
    like: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
    block = ((1, 3), (1, 1), (1, 4), (4, 1))
    injected = ((1, 2), (2, 1), *block)
    x = {i: torch.randn(b * t, i * d, **like) for i in (1, 2, 3, 4)}
    w = {(i, o): torch.randn(o * d, i * d, **like) for i, o in injected}
    dw = {(i, o): torch.empty(o * d, i * d, **like) for i, o in injected}
    out = {i: torch.empty(b * t, i * d, **like) for i in (1, 2, 3, 4)}
    q, k, v = (torch.randn(b, h, t, d // h, **like).requires_grad_() for _ in range(3))
    dy = torch.randn(b, h, t, d // h, **like)
    attend = nn.functional.scaled_dot_product_attention
    kept = attend(q, k, v)

    def forward(shapes: tuple[tuple[int, int], ...]) -> None:
        for i, o in shapes:
            torch.mm(x[i], w[i, o].t(), out=out[o])
        with torch.no_grad():
            attend(q, k, v)

    def backward(shapes: tuple[tuple[int, int], ...]) -> None:
        for i, o in shapes:
            torch.mm(x[o], w[i, o], out=out[i])
            torch.mm(x[o].t(), x[i], out=dw[i, o])
        torch.autograd.grad(kept, (q, k, v), dy, retain_graph=True)

    def run() -> None:
        ends = s.config.pre_depth + s.config.post_depth
        for shapes, free, kept_ones in ((injected, n, m), (block, 0, ends)):
            for _ in range(free + kept_ones):
                forward(shapes)
            for _ in range(kept_ones):
                backward(shapes)

    return run


def training(
    s: Setting, draws: list[tuple[int, int]], recompute: str, compiled: bool, eager: bool
) -> Row:
    """Forward and backward of the steps ``draws`` of (n, m), one after the other: each as a CUDA
    graph, as ``train.graphs`` has them, and kernel by kernel; a compiled baseline both ways too."""

    def build() -> Arms:
        chunks = 1 if recompute == "none" else 4
        model = randomised(s.config, s.device, recompute=recompute, chunks=chunks)
        weights = PreparedWeights(model, s.dtype, accumulate=True)
        x, t, y = inputs(s.config, s.batch, s.device)
        plain = Plain(model, torch.float32)
        # a pool of graphs takes its size from the first
        pairs = sorted(draws, key=lambda pair: -pair[1])

        def ours(n: int, m: int) -> None:
            model.zero_grad(set_to_none=False)
            model(x, t, y, m, n, weights=weights).float().square().mean().backward()

        def theirs(n: int, m: int) -> None:
            plain.zero_grad(set_to_none=False)
            with torch.autocast(s.device.type, dtype=s.dtype):
                out = _with_map(plain)(x, t, y, m, n)
            out.float().square().mean().backward()

        floors = [floor_of_training(s, n, m) for n, m in draws]

        launched = [partial(ours, *pair) for pair in pairs]
        arms: dict[str, Arm | str] = {
            OURS: timing.one_by_one(launched),
            "gemm + attention": timing.in_turn(floors),
            LAUNCHED: timing.in_turn(launched),
        }
        plainly = [partial(theirs, *pair) for pair in pairs]
        if eager:
            arms["published eager"] = timing.in_turn(plainly)
        if eager and len(draws) == 1:
            arms |= dit_training(s, sum(draws[0]))
        if compiled:
            regions = Regions()
            arms["published compiled"] = partial(regions, timing.in_turn(plainly))
            arms["published compiled, replayed"] = attempt(
                lambda: timing.one_by_one([partial(regions, step) for step in plainly])
            )
        count = sum(cost.training_flops(s.config, s.batch, n, m) for n, m in draws)
        size = sum(cost.training_bytes(s.config, s.batch, n, m, s.dtype.itemsize) for n, m in draws)
        facts = {"recompute": recompute, "draws": draws, "chunks": chunks}
        return Arms(arms, count, size, s.batch * len(draws), facts, s.dtype)

    n, m = (statistics.mean(pair[i] for pair in draws) for i in range(2))
    what = f"n={n:g} m={m:g}" + (f" over {len(draws)} draws" if len(draws) > 1 else "")
    name = f"{s.name} {what} {recompute}"
    return Row("training", name + (" compiled" if compiled else ""), build, 31, 12.0)


def drawn() -> list[tuple[int, int]]:
    """The (n, m) of the first steps of the paper's recipe."""
    config = RECIPES["imagenet256"].fixed_point
    return [draw_iterations(0, step, 0, config, 0) for step in range(DRAWS)]


def samplers() -> list[Row]:
    """Batches with and without guidance, and one of them in every dtype; the longest row last.
    173 s on an H200."""
    some = [(setting(64), 1.0), (setting(8), 4.0), (setting(1), 4.0), (setting(1), 1.0)]
    some += [(setting(8, d), 1.0) for d in (torch.bfloat16, torch.float16, torch.float32)]
    found = [sampling(s, guidance, False) for s, guidance in some]
    found.append(sampling(setting(1), 4.0, False, method="ddpm"))
    return [*found, sampling(setting(64), 4.0, False)]


def rows() -> list[Row]:
    """Everything, cheap rows first and compiled baselines last."""
    large, one = setting(64), setting(1)
    found = [*operators(large), *iteration(large), *third_party.rows(large), *data()]
    found += [network(large, 8, ("dit",)), *(network(large, k) for k in (1, 4, 16)), *samplers()]
    found += [training(large, [(5, 6)], mode, False, mode == "none")
              for mode in cost.RECOMPUTE]  # fmt: skip
    found += [training(large, drawn(), "none", False, True)]
    found += [optimizer("XL/2", XL, large.device)]
    found += [sampling(large, 1.0, True), sampling(one, 4.0, True)]
    return [*found, training(large, [(5, 6), (6, 6)], "none", True, True)]
