"""The small classifier whose features measure drawn digits.

    conv 3x3, 1 -> 16, silu;  conv 3x3, 16 -> 32, silu;  mean over 2x2;
    linear 512 -> 64, silu  = features;  linear 64 -> 10

It is trained on split "train" of the built-in digits alone and never sees the reference half.
``python -m bench.make_digits_classifier`` makes ``assets/digits_classifier.safetensors``: bit for
bit on the same machine, and elsewhere to rounding (a start changed by 1e-14 ends within 1e-11). For
that the training is smooth (silu and means, no kinks where rounding could choose a branch), runs in
float64 on the CPU, and draws only uniform numbers from counters, so that no library's logarithm
enters; the result is rounded to float32 once. Features and logits are computed in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from fpdm import noise
from fpdm.data import stream_indices
from fpdm.settings import UserError, one_line

WEIGHTS = Path(__file__).parent / "assets" / "digits_classifier.safetensors"
SHAPES = {
    "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
    "hidden.weight": (64, 512), "hidden.bias": (64,),
    "output.weight": (10, 64), "output.bias": (10,),
}  # fmt: skip
SEED, STEPS, BATCH, RATE, DECAY, DROPOUT, AMPLITUDE = 1, 400, 128, 3e-3, 1e-2, 0.3, 0.25
_INIT, _SHIFT, _NOISE, _DROP = range(4)


def features(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """x (N,1,8,8) in [-1,1] -> (N,64) float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    h = F.silu(F.conv2d(x.double(), w["conv1.weight"], w["conv1.bias"], padding=1))
    h = F.silu(F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1))
    h = F.avg_pool2d(h, 2).flatten(1)
    return F.silu(F.linear(h, w["hidden.weight"], w["hidden.bias"]))


def logits(f: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Features (N,64) -> (N,10) float64."""
    return F.linear(f, weights["output.weight"].double(), weights["output.bias"].double())


def accuracy(x: Tensor, labels: Tensor, weights: Mapping[str, Tensor]) -> float:
    """Share of x (N,1,8,8) that is recognised as ``labels`` (N,)."""
    with torch.no_grad():
        found = logits(features(x, weights), weights).argmax(dim=1)
    return (found == labels).double().mean().item()


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file. Raises UserError when it is missing, damaged or of another shape."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); install fpdm again") from None
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != SHAPES:
        raise UserError(f"{path}: got tensors {found}, expected {SHAPES}; install fpdm again")
    return weights


@cache
def shipped() -> dict[str, Tensor]:
    """The weights in the package, read once."""
    return read(WEIGHTS)


def about(path: str | Path = WEIGHTS) -> dict[str, Any]:
    """What a file of weights says of itself: accuracies, training data, settings."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])


def initial() -> dict[str, Tensor]:
    """float64: weights uniform with variance 1.5 / inputs, biases zero."""
    keys = noise.as_keys([SEED])
    out = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        count = math.prod(shape)
        bound = math.sqrt(4.5 * shape[0] / count) if len(shape) > 1 else 0.0
        u = noise.uniforms(keys, i, 0, _INIT, count)
        out[name] = (bound * (2 * u - 1)).reshape(shape)
    return out


def augment(x: Tensor, seed: int, step: int) -> Tensor:
    """x (B,1,8,8) float64 with every second image moved by -1, 0 or 1 pixel each way (paper moves
    in), and uniform noise of AMPLITUDE added to every pixel."""
    b, side = len(x), x.shape[-1]
    keys, slots = noise.as_keys([seed]).expand(b), torch.arange(b)
    u = noise.uniforms(keys, slots, step, _SHIFT, 3)
    move = (3 * u[:, :2]).long() * (u[:, 2:] < 0.5) + (u[:, 2:] >= 0.5)
    reach = torch.arange(side)
    rows, columns = move[:, :1] + reach, move[:, 1:] + reach
    padded = F.pad(x[:, 0], (1, 1, 1, 1), value=-1.0)
    x = padded[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
    u = noise.uniforms(keys, slots, step, _NOISE, side * side)
    return x + AMPLITUDE * (2 * u - 1).reshape(x.shape)


def train(
    x: Tensor, labels: Tensor, weights: Mapping[str, Tensor] | None = None, steps: int = STEPS
) -> dict[str, Tensor]:
    """Weights (float64) after ``steps`` steps of AdamW on x (n,1,8,8), labels (n,): cosine rate,
    cross-entropy, dropout on the features, the augmentation above. ``weights`` is the start, by
    default ``initial()``. Runs on one thread: the order of sums depends on the number."""
    params = {n: t.clone().requires_grad_() for n, t in (weights or initial()).items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=RATE, weight_decay=DECAY, foreach=False, fused=False
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            ids = torch.from_numpy(stream_indices(len(x), SEED, step * BATCH, BATCH))
            f = features(augment(x[ids].double(), SEED, step), params)
            keys = noise.as_keys([SEED]).expand(BATCH)
            kept = noise.uniforms(keys, torch.arange(BATCH), step, _DROP, f.shape[1]) > DROPOUT
            loss = F.cross_entropy(logits(f * kept / (1 - DROPOUT), params), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return {name: param.detach() for name, param in params.items()}
