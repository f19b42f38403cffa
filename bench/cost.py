"""What an iteration costs by count: FLOPs, bytes and launches of every part, and a predicted time.

U = B T D elements of the compute dtype. FLOPs are 2 MACs; element-wise arithmetic is not counted.
Bytes are what must cross the memory bus once: operands, results and weights, no cache credit.

    published  concatenated injection, modulation in every iteration, one kernel per PyTorch call
    library    hoisted injection and modulation, library GEMMs, fused kernels between them
    fused      element-wise work in the GEMMs' prologues and epilogues

A prediction is the sum over parts of max(FLOPs / rate / occupancy, bytes / bandwidth) + launches *
gap, the FLOPs with those that are computed again: a model, not a measurement, and labelled so
wherever it is printed. Occupancy: a GEMM computes tiles of 128 x 128 in whole waves, one tile a
multiprocessor, so that the last wave of a large one costs little and the 36 tiles of a small one
leave most of the device idle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fpdm import budget
from fpdm.config import ModelConfig, Recompute

Style = Literal["published", "library", "fused"]
STYLES: tuple[Style, ...] = ("published", "library", "fused")
RECOMPUTE: tuple[Recompute, ...] = ("none", "elementwise", "full")


@dataclass(frozen=True)
class Part:
    """One kernel or GEMM: ``kind`` is gemm, attention or elementwise; ``tiles`` of a GEMM's
    result, 0 where they do not matter; ``again``: FLOPs that our kernels compute a second time,
    which take time and count for nothing."""

    name: str
    kind: str
    flops: int
    bytes: int
    launches: int = 1
    tiles: int = 0
    again: int = 0


@dataclass(frozen=True)
class Device:
    """Rates that a good library reaches, not the data sheet's: FLOP/s in half precision, bytes/s;
    seconds between two kernels inside a CUDA graph; multiprocessors."""

    name: str
    flops: float
    bandwidth: float
    gap: float
    processors: int


# V100: large cuBLAS GEMMs and copies as others report them; A100: 0.8 of the data sheet's rates;
# H200: our ceilings, bench/results/nvidia-h200; H100: the same chip's FLOP/s, and 0.8 of the data
# sheet's bandwidth. The gap is HazyResearch's for H100
DEVICES = {
    d.name: d
    for d in (
        Device("V100", 95e12, 0.80e12, 1.3e-6, 80),
        Device("A100", 250e12, 1.6e12, 1.3e-6, 108),
        Device("H100", 730e12, 2.7e12, 1.3e-6, 132),
        Device("H200", 730e12, 4.14e12, 1.3e-6, 132),
    )
}
TILE = 128


def _counter(config: ModelConfig, batch: int, itemsize: int) -> tuple[Callable, Callable, Callable]:
    """gemm(name, I, O, U moved beside x and y), attention(name, products, U, products again),
    glue(name, U, launches)."""
    t, d = config.tokens, config.hidden_size
    rows, unit = batch * t, batch * t * d * itemsize

    def gemm(name: str, i: float, o: float, extra: float = 0.0) -> Part:
        weights = int(i * o * d * d) * itemsize
        tiles = math.ceil(rows / TILE) * math.ceil(o * d / TILE)
        return Part(name, "gemm", int(2 * rows * i * o * d * d),
                    int((i + o + extra) * unit) + weights, tiles=tiles)  # fmt: skip

    def attention(name: str, products: float, units: float, again: float = 0.0) -> Part:
        product = 2 * rows * t * d
        return Part(name, "attention", int(products * product), int(units * unit),
                    again=int(again * product))  # fmt: skip

    def glue(name: str, units: float, launches: int = 1) -> Part:
        return Part(name, "elementwise", 0, int(units * unit), launches)

    return gemm, attention, glue


def iteration(
    config: ModelConfig, batch: int, itemsize: int = 2, style: Style = "library"
) -> list[Part]:
    """The parts of f(x) in order, for a batch, without gradient."""
    gemm, attention, glue = _counter(config, batch, itemsize)
    if style == "published":
        d = config.hidden_size
        vectors = Part("modulation", "gemm", 12 * batch * d * d, 6 * d * d * itemsize, 3)
        adaln = [glue("layer norm", 2), glue("modulate", 4, 3)]
        gate = glue("gate, residual", 5, 2)
        return [
            vectors, glue("concatenate", 4), gemm("fc1 injection", 2, 2), glue("gelu", 4),
            gemm("fc2 injection", 2, 1), *adaln, gemm("qkv", 1, 3),
            attention("attention", 2, 4), glue("heads", 2), gemm("proj", 1, 1), gate, *adaln,
            gemm("fc1", 1, 4), glue("gelu", 8), gemm("fc2", 4, 1), gate,
        ]  # fmt: skip
    if style == "library":
        return [
            gemm("fc1 injection", 1, 2), glue("add, gelu", 6), gemm("fc2 injection", 2, 1),
            glue("adaln", 2), gemm("qkv", 1, 3), attention("attention", 2, 4), gemm("proj", 1, 1),
            glue("gate, residual, adaln", 4), gemm("fc1", 1, 4), glue("bias, gelu", 8),
            gemm("fc2", 4, 1), glue("gate, residual", 3),
        ]  # fmt: skip
    return [
        gemm("fc1 injection, add, gelu", 1, 2, 2), gemm("fc2 injection", 2, 1),
        glue("statistics", 1), gemm("adaln, qkv", 1, 3), attention("attention", 2, 4),
        gemm("proj, gate, residual", 1, 1, 1), glue("adaln", 2), gemm("fc1, gelu", 1, 4),
        gemm("fc2, gate, residual", 4, 1, 1),
    ]  # fmt: skip


def _block(one: list[Part]) -> list[Part]:
    """What of an iteration follows the injection."""
    return one[1 + next(i for i, p in enumerate(one) if p.name == "fc2 injection") :]


def network(
    config: ModelConfig, batch: int, iters: int, itemsize: int = 2, style: Style = "library"
) -> list[Part]:
    """The parts of one evaluation without gradient: pre and post blocks, the injection, ``iters``
    iterations; without embedding and final layer, less than a hundredth of it."""
    gemm, _, _ = _counter(config, batch, itemsize)
    one = iteration(config, batch, itemsize, style)
    block = [p for p in one if p.name == "modulation"] + _block(one)
    injection = gemm("injection", 1, 1 if style == "published" else 2)
    return [injection, *block * (config.pre_depth + config.post_depth), *one * iters]


def iteration_backward(
    config: ModelConfig,
    batch: int,
    itemsize: int = 2,
    recompute: Recompute = "elementwise",
    injected: bool = True,
) -> list[Part]:
    """The parts of the backward of f(x) in the library style, or of a pre or post block, which has
    no injection; ``full`` adds the forward."""
    _, attention, glue = _counter(config, batch, itemsize)
    wide = 4 / itemsize  # float32 in units of U
    products = [("fc2", 4, 1), ("fc1", 1, 4), ("proj", 1, 1), ("qkv", 1, 3)]
    if injected:
        products.append(("fc2 injection", 2, 1))
    parts = _products_backward(config, batch, itemsize, products)
    if injected:
        # of A x: b1 is the injection's
        parts += _products_backward(config, batch, itemsize, [("fc1 injection", 1, 2)], bias=False)
    parts += [
        # dq and dk, dv are two kernels, which find the scores and dP each, and the sums first
        attention("attention backward", 5, 8, again=3),
        glue("gate backward", 6, 2), glue("gelu backward", 12), glue("adaln backward", 8, 2),
    ]  # fmt: skip
    if injected:
        # it adds to the gradient of u
        parts.append(glue("gelu backward, injection", 6 + 4 * wide))
    if recompute != "none":
        # z', and x where no iterate is kept
        gates = (3, 1) if recompute == "full" or not injected else (9, 3)
        gelu = (8 + 4, 2) if injected else (8, 1)
        parts += [
            glue("gelu again", *gelu), glue("adaln again", 4, 2), glue("gates again", *gates),
        ]  # fmt: skip
    if recompute == "full":
        forward = iteration(config, batch, itemsize)
        parts += forward if injected else _block(forward)
    return parts


def _products_backward(
    config: ModelConfig,
    batch: int,
    itemsize: int,
    products: list[tuple[str, int, int]],
    bias: bool = True,
) -> list[Part]:
    """Gradients of x, W and b of y (O) = x (I) W^T + b for every (name, I, O) in units of D."""
    gemm, _, glue = _counter(config, batch, itemsize)
    parts, d = [], config.hidden_size
    for name, i, o in products:
        wgrad = gemm(f"{name} wgrad", i, o)
        # read and written in float32
        size = wgrad.bytes + i * o * d * d * (8 - itemsize)
        tiles = math.ceil(i * d / TILE) * math.ceil(o * d / TILE)
        parts += [gemm(f"{name} dgrad", o, i), replace(wgrad, bytes=size, tiles=tiles)]
        if bias:
            parts.append(glue(f"{name} bias gradient", o))
    return parts


def training(
    config: ModelConfig,
    batch: int,
    n: int,
    m: int,
    itemsize: int = 2,
    recompute: Recompute = "none",
) -> list[Part]:
    """The parts of the forward and backward of a training step in the library style: everything
    forward, everything but the n iterations back; the injection is not folded."""
    gemm, _, glue = _counter(config, batch, itemsize)
    _, *forward = network(config, batch, n + m, itemsize)
    forward = [gemm("injection", 1, 1), gemm("injection, fc1", 1, 2), *forward]
    back = [(True, m), (False, config.pre_depth + config.post_depth)]
    parts = [
        part for injected, count in back
        for part in iteration_backward(config, batch, itemsize, recompute, injected) * count
    ]  # fmt: skip
    parts += _products_backward(config, batch, itemsize, [("injection", 1, 1)])
    parts += _products_backward(config, batch, itemsize, [("injection, fc1", 1, 2)], bias=False)
    wide = 2 * 4 / itemsize  # the gradient of u is a float32 total: rounded, and summed for b1
    return [*forward, *parts, glue("gradient of u", 2 * wide + 2, 2)]


def products(parts: list[Part]) -> list[Part]:
    """GEMMs and attention alone, nothing computed again: what the library needs at least."""
    return [replace(p, again=0) for p in parts if p.kind != "elementwise"]


def flops(parts: list[Part]) -> int:
    """Sum of FLOPs."""
    return sum(p.flops for p in parts)


def network_bytes(config: ModelConfig, batch: int, iters: int, itemsize: int) -> int:
    """Bytes that one evaluation of the network moves at least: its parts in the fused style."""
    return sum(p.bytes for p in network(config, batch, iters, itemsize, "fused"))


def training_bytes(config: ModelConfig, batch: int, n: int, m: int, itemsize: int) -> int:
    """Bytes that a training step moves at least: those of its products, which could do everything
    else on their way, with nothing computed again."""
    return sum(p.bytes for p in products(training(config, batch, n, m, itemsize)))


def training_flops(config: ModelConfig, batch: int, n: int, m: int) -> int:
    """FLOPs of a training step: n iterations, and m more, the pre and post blocks and the injection
    with their backward. Of a GEMM that is twice its forward, of attention 2.5 times."""
    forward, kept = (budget.macs_per_sample(config, [k], False, 1.0) for k in (n + m, m))
    blocks, attention = config.pre_depth + config.post_depth + m, 2 * config.tokens**2
    return 2 * batch * (forward + 2 * kept + blocks * attention * config.hidden_size // 2)


def elementwise_units(parts: list[Part], config: ModelConfig, batch: int, itemsize: int) -> float:
    """Bytes of the element-wise parts in units of U."""
    unit = batch * config.tokens * config.hidden_size * itemsize
    return sum(p.bytes for p in parts if p.kind == "elementwise") / unit


def seconds(parts: list[Part], device: Device) -> float:
    """Predicted time on ``device``: see the module."""

    def work(p: Part) -> float:
        waves = math.ceil(p.tiles / device.processors)
        occupancy = p.tiles / (waves * device.processors) if p.tiles else 1.0
        return max((p.flops + p.again) / device.flops / occupancy, p.bytes / device.bandwidth)

    return sum(work(p) + device.gap * p.launches for p in parts)


def training_predictions(
    config: ModelConfig, batch: int, n: int, m: int
) -> list[dict[str, float | str]]:
    """Milliseconds of a training step without optimiser for every device, by what is computed again
    in the backward, in half precision."""
    rows: list[dict[str, float | str]] = []
    for device in DEVICES.values():
        row: dict[str, float | str] = {"device": device.name}
        for mode in RECOMPUTE:
            row[mode] = 1e3 * seconds(training(config, batch, n, m, 2, mode), device)
        row["gemm + attention"] = 1e3 * seconds(products(training(config, batch, n, m)), device)
        rows.append(row)
    return rows


def predictions(config: ModelConfig, batch: int) -> list[dict[str, float | str]]:
    """Microseconds per sample and iteration for every device and style, in half precision."""
    rows: list[dict[str, float | str]] = []
    for device in DEVICES.values():
        row: dict[str, float | str] = {"device": device.name}
        for style in STYLES:
            time = seconds(iteration(config, batch, 2, style), device) / batch
            row[style] = 1e6 * time
        row["gemm + attention"] = 1e6 * seconds(products(iteration(config, batch)), device) / batch
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        rows.append(row)
    return rows
