"""The published architecture written plainly: the baseline of every comparison, and a test oracle.

Concatenated injection, modulation vectors recomputed in every iteration, and a "no-grad" phase that
builds an autograd graph and then drops it, as the published code does. Functions of a state dict,
so that any dtype works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpdm.config import ModelConfig
from fpdm.model import timestep_features

Weights = Mapping[str, Tensor]


def optimised(fn: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """``fn`` under torch.compile. Where that would give up after too many recompilations and go on
    uncompiled, it raises: a baseline is what its name says."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(fn, **how)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _adaln(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(z, z.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _attention(w: Weights, name: str, z: Tensor, heads: int) -> Tensor:
    b, t, d = z.shape
    qkv = _linear(w, f"{name}.qkv", z).view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return _linear(w, f"{name}.proj", y.transpose(1, 2).reshape(b, t, d))


def block(w: Weights, name: str, z: Tensor, c: Tensor, heads: int) -> Tensor:
    """adaLN-Zero block.   z (B,T,D), c (B,D)."""
    vectors = _linear(w, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=-1)
    s1, a1, g1, s2, a2, g2 = vectors
    z = z + g1.unsqueeze(1) * _attention(w, f"{name}.attn", _adaln(z, s1, a1), heads)
    hidden = F.gelu(_linear(w, f"{name}.mlp.fc1", _adaln(z, s2, a2)), approximate="tanh")
    return z + g2.unsqueeze(1) * _linear(w, f"{name}.mlp.fc2", hidden)


def fixed_point_map(w: Weights, x: Tensor, i: Tensor, c: Tensor, heads: int) -> Tensor:
    """f(x) = Block(W2 gelu(W1 [x; i] + b1) + b2, c)."""
    hidden = _linear(w, "block_fixed_point_projection_fc1", torch.cat([x, i], dim=-1))
    z = _linear(w, "block_fixed_point_projection_fc2", F.gelu(hidden, approximate="tanh"))
    return block(w, "block_fixed_point", z, c, heads)


def forward(
    w: Weights,
    config: ModelConfig,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    iters: int,
    no_grad_iters: int = 0,
    init: Tensor | None = None,
    detach_init: bool = True,
    f: Callable[..., Tensor] = fixed_point_map,
) -> tuple[Tensor, Tensor]:
    """(output (B,2C,h,w), solution (B,T,D)); FPDM and DiT state dicts alike. ``f``: the map, or
    that compiled."""
    heads, p = config.num_heads, config.patch_size
    emb = timestep_features(t).to(w["pos_embed"].dtype)
    emb = _linear(w, "t_embedder.mlp.2", F.silu(_linear(w, "t_embedder.mlp.0", emb)))
    label = F.embedding(y, w["y_embedder.embedding_table.weight"])
    c = emb + label
    z = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    z = z.flatten(2).transpose(1, 2) + w["pos_embed"]
    if config.kind == "dit":
        for index in range(config.depth):
            z = block(w, f"blocks.{index}", z, c, heads)
        return _final(w, config, z, c), z
    c_pp = c if config.pre_post_timestep_conditioning else label
    for index in range(config.pre_depth):
        z = block(w, f"blocks_pre.{index}", z, c_pp, heads)
    i = _linear(w, "block_pre_projection", z)
    z = z if init is None else init
    for _ in range(no_grad_iters):
        z = f(w, z, i, c, heads)
    z = z.detach() if detach_init else z
    for _ in range(iters):
        z = f(w, z, i, c, heads)
    solution = z
    for index in range(config.post_depth):
        z = block(w, f"blocks_post.{index}", z, c_pp, heads)
    return _final(w, config, z, c_pp), solution


def _final(w: Weights, config: ModelConfig, z: Tensor, c: Tensor) -> Tensor:
    shift, scale = _linear(w, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=-1)
    z = _linear(w, "final_layer.linear", _adaln(z, shift, scale))
    p, side = config.patch_size, config.input_size // config.patch_size
    z = z.view(-1, side, side, p, p, config.out_channels).permute(0, 5, 1, 3, 2, 4)
    return z.reshape(-1, config.out_channels, side * p, side * p)
