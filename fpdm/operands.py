"""What a model may be given: shapes, kinds, values and dtypes, told at its boundary.

B batch, C channels, T tokens, D width. Each function raises ValueError, one line with what was got
and what was expected. Nothing here waits for a device: values are read of plain CPU tensors only.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from fpdm.config import ModelConfig

_compiling = torch.compiler.is_compiling


def check_inputs(config: ModelConfig, x: Tensor, t: Tensor, y: Tensor) -> None:
    """x as ``check_image`` wants it, t and y (B,) integers as ``check_values`` does."""
    check_image(config, x)
    b = x.shape[0]
    for name, value in (("t", t), ("y", y)):
        if tuple(value.shape) != (b,) or value.is_floating_point():
            got = f"{tuple(value.shape)} {value.dtype}"
            raise ValueError(f"{name}: got {got}, expected ({b},) integers")
    check_values(config, y, t)


def check_image(config: ModelConfig, x: Tensor) -> None:
    """x (B,C,h,w) of a floating-point dtype."""
    want = (x.shape[0], config.in_channels, config.input_size, config.input_size)
    if tuple(x.shape) != want or not x.is_floating_point():
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected {want} floating point")


def check_tokens(config: ModelConfig, name: str, z: Tensor, batch: int) -> None:
    """z (B,T,D) of ``batch`` samples."""
    want = (batch, config.tokens, config.hidden_size)
    if tuple(z.shape) != want:
        raise ValueError(f"{name}: got {tuple(z.shape)}, expected {want}")


def check_values(config: ModelConfig, y: Tensor, t: Tensor | None = None) -> None:
    """Labels 0..num_classes (the null label) and timesteps of at least 0."""
    for name, value, most in (("t", t, None), ("y", y, config.num_classes)):
        # not of a fake or compiled tensor or one inside torch.func, which have none
        readable = type(value) is Tensor and value.device.type == "cpu" and not _compiling()
        readable = readable and not torch._C._are_functorch_transforms_active()
        if not readable or value is None or not len(value) or value.is_floating_point():
            continue
        read = value.numpy()
        low, high = int(read.min()), int(read.max())
        if low < 0 or (most is not None and high > most):
            bound = "at least 0" if most is None else f"0..{most} ({most} is the null label)"
            raise ValueError(f"{name}: got {low if low < 0 else high}, expected {bound}")


def check_label_dtype(y: Tensor) -> None:
    """y of a dtype that an embedding is indexed with."""
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y: got {y.dtype}, expected torch.int64 or torch.int32")


def whole(name: str, value: int, least: int) -> int:
    """The argument ``name``, an integer of at least ``least``; a tensor or numpy's may hold it."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        try:
            value = int(operator.index(value))
        except TypeError:
            raise ValueError(f"{name}: got {value!r}, expected an integer") from None
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def damping(name: str, value: float) -> float:
    """The argument ``name``, the b of a damped step: 0 < b <= 1."""
    if not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise ValueError(f"{name}: got {value!r}, expected a number above 0, at most 1")
    return value


def check_vectors(vectors: Tensor, dtype: torch.dtype) -> None:
    """adaLN vectors in the compute ``dtype``."""
    if vectors.dtype != dtype:
        told = "made with the same weights, under the same autocast"
        raise ValueError(f"mod: got {vectors.dtype}, expected {dtype}: {told}")
