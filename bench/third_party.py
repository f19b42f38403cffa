"""Kernels of other packages, where they are installed and can run; else rows that say why not.

flash-attn, xformers    attention on packed heads, against ours
apex, Liger             LayerNorm with affine weights: less than adaln, which also modulates
apex                    FusedAdam: AdamW alone, without average and half-precision copies
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.operators import calls, flops, tensors
from bench.rows import OURS, Arms, Row, Setting, attempt, randomised
from bench.timing import Arm
from fpdm import info
from fpdm.config import OptimConfig
from fpdm.kernels import implementations
from fpdm.optim import AdamWEMA

Made = Callable[[dict[str, Tensor]], Callable[[], Tensor]]
# of a norm, as in ours
EPS = 1e-6


def absent(module: str, device: torch.device) -> str | None:
    """Why ``module`` cannot be measured here."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "not installed"
    if module == "apex" and not info.apex_is_nvidia(list(spec.submodule_search_locations or [])):
        return "not installed: this apex is an unrelated package"
    return None if device.type == "cuda" else "needs a GPU"


def _flash_attn(qkv: Tensor) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_qkvpacked_func

    # (B,T,3,H,K) -> (B,T,H,K)
    return lambda: flash_attn_qkvpacked_func(qkv)


def _xformers(qkv: Tensor) -> Callable[[], Tensor]:
    from xformers.ops import memory_efficient_attention

    # each (B,T,H,K)
    q, k, v = qkv.unbind(2)
    return lambda: memory_efficient_attention(q, k, v)


def _apex_norm(z: Tensor) -> Callable[[], Tensor]:
    from apex.normalization import FusedLayerNorm

    return _bound(FusedLayerNorm(z.shape[-1], eps=EPS), z)


def _liger_norm(z: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerLayerNorm

    return _bound(LigerLayerNorm(z.shape[-1], eps=EPS), z)


def _bound(module: torch.nn.Module, z: Tensor) -> Callable[[], Tensor]:
    # frozen: a forward that keeps nothing, as ours
    module.to(z.device, z.dtype).requires_grad_(False)
    return lambda: module(z)


def agreeing(fn: Callable[[], Tensor], expected: Tensor) -> Arm:
    """``fn``. Raises ValueError where its result is not ``expected`` to rounding: a layout that was
    misunderstood would be timed all the same."""
    error = (fn().reshape(expected.shape).double() - expected.double()).norm() / expected.norm()
    if not error <= 4 * torch.finfo(expected.dtype).eps:
        raise ValueError(f"got a relative error of {error:.1e}, expected ours to rounding")
    return fn


def rows(s: Setting) -> list[Row]:
    """One row a package and operator; where a package is there and cannot be used, as an apex
    without its CUDA extensions, the row says why."""
    heads, d = s.config.num_heads, s.config.hidden_size

    def operator(name: str, module: str, make: Made) -> Arms:
        why = absent(module, s.device)
        if why is not None:
            return Arms({OURS: why})
        v = tensors(s)
        ours = calls(implementations.resolve("auto", s.device, s.dtype), v, heads)[name]

        def theirs() -> Arm:
            ours.fn()
            z = v["z"]
            # with the weights 1 and 0 that a new module has, a norm alone
            alone = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=EPS)
            return agreeing(make(v), v["out"] if name == "attention" else alone)

        run: dict[str, Arm | str] = {OURS: ours.fn, module: attempt(theirs)}
        return Arms(run, flops(name, s.config, s.batch), ours.bytes, dtype=s.dtype)

    def heads_of(v: dict[str, Tensor]) -> Tensor:
        return v["qkv"].view(*v["qkv"].shape[:2], 3, heads, d // heads)

    def adam() -> Arms:
        why = absent("apex", s.device)
        if why is not None:
            return Arms({OURS: why})
        model, other = (randomised(s.config, s.device) for _ in range(2))
        ours = AdamWEMA(model, OptimConfig())

        def theirs() -> Arm:
            from apex.optimizers import FusedAdam

            for p in other.parameters():
                p.grad = torch.zeros_like(p)
            return FusedAdam(list(other.parameters()), lr=1e-4).step

        return Arms({OURS: lambda: ours.step(1e-4, 1.0), "apex": attempt(theirs)})

    operators: tuple[tuple[str, str, Made], ...] = (
        ("attention", "flash_attn", lambda v: _flash_attn(heads_of(v))),
        ("attention", "xformers", lambda v: _xformers(heads_of(v))),
        ("adaln", "apex", lambda v: _apex_norm(v["z"])),
        ("adaln", "liger_kernel", lambda v: _liger_norm(v["z"])),
    )
    found = [
        Row("third party", f"{s.name} {name}: {module}",
            partial(operator, name, module, make), replayed=True)
        for name, module, make in operators
    ]  # fmt: skip
    return [*found, Row("third party", "optimizer: apex", adam)]
