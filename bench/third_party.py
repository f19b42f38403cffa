"""Kernels of other packages, where they are installed and can run; else rows that say why not.

flash-attn, xformers    attention on packed heads, against ours
apex, Liger             LayerNorm with affine weights: less than adaln, which also modulates
apex                    FusedAdam: AdamW alone, without average and half-precision copies
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.operators import calls, tensors
from bench.rows import OURS, Arms, Row, Setting, randomised
from bench.timing import Arm
from fpdm import info
from fpdm.config import OptimConfig
from fpdm.kernels import implementations
from fpdm.optim import AdamWEMA


def absent(module: str, device: torch.device) -> str | None:
    """Why ``module`` cannot be measured here."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "not installed"
    if module == "apex" and not info.apex_is_nvidia(list(spec.submodule_search_locations or [])):
        return "not installed: this apex is an unrelated package"
    return None if device.type == "cuda" else "needs a GPU"


def _flash_attn(qkv: Tensor) -> Arm:
    from flash_attn import flash_attn_qkvpacked_func

    return lambda: flash_attn_qkvpacked_func(qkv)


def _xformers(qkv: Tensor) -> Arm:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)
    return lambda: memory_efficient_attention(q, k, v)


def _apex_norm(z: Tensor) -> Arm:
    from apex.normalization import FusedLayerNorm

    return _bound(FusedLayerNorm(z.shape[-1]).to(z.device, z.dtype), z)


def _liger_norm(z: Tensor) -> Arm:
    from liger_kernel.transformers import LigerLayerNorm

    return _bound(LigerLayerNorm(z.shape[-1]).to(z.device, z.dtype), z)


def _bound(module: Any, z: Tensor) -> Arm:
    return lambda: module(z)


def rows(s: Setting) -> list[Row]:
    """One row a package and operator."""
    heads, d = s.config.num_heads, s.config.hidden_size

    def operator(name: str, module: str, make: Callable[[dict[str, Tensor]], Arm]) -> Arms:
        why = absent(module, s.device)
        if why is not None:
            return Arms({OURS: why})
        v = tensors(s)
        ours = calls(implementations.resolve("auto", s.device, s.dtype), v, heads)[name]
        return Arms({OURS: ours.fn, module: make(v)}, 0, ours.bytes, dtype=s.dtype)

    def heads_of(v: dict[str, Tensor]) -> Tensor:
        return v["qkv"].view(*v["qkv"].shape[:2], 3, heads, d // heads)

    def adam() -> Arms:
        why = absent("apex", s.device)
        if why is not None:
            return Arms({OURS: why})
        from apex.optimizers import FusedAdam

        model, other = (randomised(s.config, s.device) for _ in range(2))
        ours = AdamWEMA(model, OptimConfig())
        theirs = FusedAdam(list(other.parameters()), lr=1e-4)
        for p in other.parameters():
            p.grad = torch.zeros_like(p)
        return Arms({OURS: lambda: ours.step(1e-4, 1.0), "apex": theirs.step})

    operators: tuple[tuple[str, str, Callable[[dict[str, Tensor]], Arm]], ...] = (
        ("attention", "flash_attn", lambda v: _flash_attn(heads_of(v))),
        ("attention", "xformers", lambda v: _xformers(heads_of(v))),
        ("adaln", "apex", lambda v: _apex_norm(v["z"])),
        ("adaln", "liger_kernel", lambda v: _liger_norm(v["z"])),
    )
    found = [
        Row("third party", f"{s.name} {name}: {module}",
            partial(operator, name, module, make))
        for name, module, make in operators
    ]  # fmt: skip
    return [*found, Row("third party", "optimizer: apex", adam)]
