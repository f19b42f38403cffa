"""Embeddings and assembly: FPDM (paper section 3) and the DiT baseline, from the same block.

    tokens  h0 = patchify(x_t) + sincos;   cond  c = emb(t) + emb(y),  c_pp = emb(y) (or c)
    pre     h  = pre_l(... pre_1(h0, c_pp));   x* = fixed point of the injected block;   post; final

Parameter names are those of published checkpoints, so ``load_state_dict(published, strict=True)``
works. The module holds no state beside its parameters and draws no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fpdm import fixed_point, gradients, operands
from fpdm.config import ConfigError, ExecutionConfig, ModelConfig
from fpdm.exports import SHIPPED, WEIGHTS, compare, read_export
from fpdm.fixed_point import BlockSettings, SolveStats
from fpdm.gradients import S_JFB, Gradient
from fpdm.kernels import ops
from fpdm.kernels.direct import call
from fpdm.weights import BLOCK_KEYS, FIXED_POINT, PROJECTION, Parts, WeightView

FREQUENCIES = 256


class Modulation(NamedTuple):
    """adaLN vectors in the compute dtype: (B,6D) for every block of ``pre`` and ``post`` and for
    the fixed-point block ``fp`` (shift, scale, gate, twice), (B,2D) for the final layer."""

    pre: list[Tensor]
    fp: Tensor | None
    post: list[Tensor]
    final: Tensor


class Solved(NamedTuple):
    """What ``FPDM.solve`` returns: ``output`` (B,2C,h,w) in the compute dtype; ``solution`` (B,T,D)
    in the iterate's: the last iterate; ``stats``: residuals, None where none were asked for."""

    output: Tensor
    solution: Tensor
    stats: SolveStats | None


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, side^2, D): the column's D/2 channels, then the row's."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, width).float()


def timestep_features(t: Tensor) -> Tensor:
    """[cos(t w_k), sin(t w_k)], w_k = 10000^(-k/128).   t (B,) -> (B,256) float32."""
    half = FREQUENCIES // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Named(nn.Module):
    """A container whose children are given by name: the published parameter paths."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _block(width: int) -> nn.Module:
    return _Named(
        attn=_Named(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
        mlp=_Named(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
    )


class _Transformer(nn.Module):
    """What FPDM and DiT share: embeddings, adaLN vectors, blocks, final layer."""

    kind: ClassVar[str]
    parts: Parts

    def __init__(self, config: ModelConfig, execution: ExecutionConfig | None = None):
        super().__init__()
        if config.kind != self.kind:
            name = type(self).__name__
            raise ConfigError(f"{name}: got model.kind {config.kind}, expected {self.kind}")
        self.config, self.execution = config, execution or ExecutionConfig()
        d, p = config.hidden_size, config.patch_size
        self.x_embedder = _Named(proj=nn.Conv2d(config.in_channels, d, p, stride=p))
        self.t_embedder = _Named(
            mlp=nn.Sequential(nn.Linear(FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))
        )
        self.y_embedder = _Named(embedding_table=nn.Embedding(config.num_classes + 1, d))
        self.register_buffer("pos_embed", sincos_2d(d, config.input_size // p))
        self.pos_embed: Tensor
        self.final_layer = _Named(
            linear=nn.Linear(d, p * p * config.out_channels),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d)),
        )

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """adaLN-Zero: Xavier on Linears, zero biases, normal(0.02) on embeddings, zero modulation
        and final layer, so that at step 0 every block is the identity."""
        for name, param in self.named_parameters():
            if (
                name.startswith("final_layer")
                or "adaLN_modulation" in name
                or name.endswith("bias")
            ):
                param.zero_()
            elif name.startswith(("t_embedder", "y_embedder")):
                param.normal_(std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(param.view(param.shape[0], -1), generator=generator)

    def view(self, weights: WeightView | None, like: Tensor) -> WeightView:
        """``weights`` if given; else this model's parameters, cast where they are used: to
        autocast's dtype where it is on for the device of ``like``, else not at all."""
        if weights is not None:
            return weights
        dtype = self.pos_embed.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        params: dict[str, Tensor] = dict(self.named_parameters())
        self.parts.check_names(params)
        return WeightView(params, dtype, {})

    def _linear(self, x: Tensor, name: str, w: WeightView) -> Tensor:
        weight, bias = w.params[f"{name}.weight"], w.params[f"{name}.bias"]
        copies, impl = w.linear(name), self.execution.impl
        return call(ops.linear, x, weight, bias, *copies, impl, w.accumulate)

    def _time(self, t: Tensor, w: WeightView) -> Tensor:
        features = timestep_features(t).to(self.pos_embed.dtype)
        hidden = self._linear(features, "t_embedder.mlp.0", w)
        hidden = self._linear(nn.functional.silu(hidden), "t_embedder.mlp.2", w)
        return hidden.to(self.pos_embed.dtype)

    def _label(self, y: Tensor, w: WeightView) -> Tensor:
        operands.check_label_dtype(y)
        try:
            return nn.functional.embedding(y, w.params["y_embedder.embedding_table.weight"])
        except IndexError:
            # on a CPU; reading them beforehand would be for nothing in a sampler
            operands.check_values(self.config, y)
            raise

    def _vectors(self, s: Tensor, name: str, w: WeightView) -> Tensor:
        """Of s = silu(c), which is the same for all blocks that see c."""
        return self._linear(s, f"{name}.adaLN_modulation.1", w)

    def _settings(self, w: WeightView) -> BlockSettings:
        e = self.execution
        return BlockSettings(self.config.num_heads, e.impl, e.recompute, e.chunks, w.accumulate)

    def residual_dtype(self, w: WeightView) -> torch.dtype:
        """dtype of the iterates under the weights ``w``."""
        wide = self.execution.residual_dtype == "float32" and w.dtype.itemsize < 4
        return torch.float32 if wide else w.dtype

    def _tokens(self, x: Tensor, w: WeightView) -> Tensor:
        """Patchify as one GEMM.   (B,C,h,w) -> (B,T,D)."""
        p = self.config.patch_size
        b, c, side = len(x), self.config.in_channels, self.config.input_size // p
        patches = x.view(b, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        weight, bias = w.params["x_embedder.proj.weight"], w.params["x_embedder.proj.bias"]
        tokens = call(
            ops.linear,
            patches.reshape(b, side * side, c * p * p),
            weight.flatten(1),
            bias,
            w.get("x_embedder.proj.weight").flatten(1),
            w.get("x_embedder.proj.bias"),
            self.execution.impl,
        )
        return (tokens + self.pos_embed.to(tokens.dtype)).to(self.residual_dtype(w))

    def _run(self, h: Tensor, name: str, vectors: Tensor, w: WeightView) -> Tensor:
        """One pre or post block: the unrolled operator with m = 1 and no injection."""
        operands.check_vectors(vectors, w.dtype)
        params = [w.params[f"{name}.{key}"] for key in BLOCK_KEYS]
        out, _ = fixed_point.s_jfb(
            h, None, None, vectors, params, w.block(name), 0, 1, self._settings(w),
            detach_init=False,
        )  # fmt: skip
        return out

    def _final(self, z: Tensor, vectors: Tensor, w: WeightView) -> Tensor:
        """Tokens of the output (B,T,p p 2C)."""
        shift, scale = vectors.chunk(2, dim=-1)
        y = call(ops.adaln, z, shift, scale, self.execution.impl)
        return self._linear(y, "final_layer.linear", w)

    def unpatchify(self, o: Tensor) -> Tensor:
        """(B,T,p p 2C) -> (B,2C,h,w)."""
        c, p = self.config.out_channels, self.config.patch_size
        side = self.config.input_size // p
        o = o.view(-1, side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", o).reshape(-1, c, side * p, side * p)


def _of_fixed_point(mod: Modulation | Tensor, w: WeightView) -> Tensor:
    """The vectors (B,6D) of the fixed-point block."""
    vectors = mod.fp if isinstance(mod, Modulation) else mod
    if vectors is None:
        raise ValueError(
            "mod: got none for the fixed-point block, expected all of modulation(t, y), or "
            "modulation_pp(y)._replace(fp=modulation_fp(t, y))"
        )
    operands.check_vectors(vectors, w.dtype)
    return vectors


class FPDM(_Transformer):
    """A diffusion transformer whose middle is one block iterated to a fixed point (paper eq. 4-6).

    ``forward(x, t, y, iters=8, no_grad_iters=0, init=None)`` -> (B,2C,h,w): C prediction channels
    and C variance fractions. x (B,C,h,w); t (B,) original timestep indices; y (B,) labels,
    ``num_classes`` is the null label. S-JFB: ``no_grad_iters`` (n) iterations store nothing, then
    ``iters`` (m) carry the gradient, from an iterate that is detached unless ``detach_init=False``.
    ``init`` (B,T,D) starts the iteration instead of h. Compute dtype: that of ``weights`` if given,
    else autocast's if on, else the parameters'. Raises ValueError for shapes and kinds that do not
    fit, and for no iteration at all.

    Submodules hold parameters only: the engine reads these by name, so neither a submodule's
    ``forward`` nor its hooks are called. One that holds other parameters is refused (ValueError).
    """

    kind = "fpdm"

    def __init__(self, config: ModelConfig, execution: ExecutionConfig | None = None):
        """Initialised at random, to run as ``execution`` says. Raises ConfigError for a config of
        another kind."""
        super().__init__(config, execution)
        d = config.hidden_size
        self.blocks_pre = nn.ModuleList(_block(d) for _ in range(config.pre_depth))
        self.block_fixed_point = _block(d)
        self.blocks_post = nn.ModuleList(_block(d) for _ in range(config.post_depth))
        self.block_pre_projection = nn.Linear(d, d)
        self.block_fixed_point_projection_fc1 = nn.Linear(2 * d, 2 * d)
        self.block_fixed_point_projection_fc2 = nn.Linear(2 * d, d)
        self.parts = Parts.of(self)
        self.initialize()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path = SHIPPED, execution: ExecutionConfig | None = None
    ) -> FPDM:
        """The model of an export (``config.json`` + ``model.safetensors``; the shipped digits),
        hash verified, on the CPU, to run as ``execution`` says.

        Raises CheckpointError for a damaged export, ConfigError for another kind of model.
        """
        model = from_pretrained(directory, execution)
        if not isinstance(model, cls):
            raise ConfigError(f"{directory}: got a {model.config.kind} export, expected fpdm")
        return model

    def modulation_pp(
        self, y: Tensor, t: Tensor | None = None, *, weights: WeightView | None = None
    ) -> Modulation:
        """Vectors of pre, post and final for labels y (B,) int64; ``fp`` is None. ``t`` (B,) is
        needed only where pre and post see the timestep (``pre_post_timestep_conditioning``). Raises
        ValueError without it there, and for a label that does not exist."""
        w = self.view(weights, y)
        c = self._label(y, w)
        if self.config.pre_post_timestep_conditioning:
            if t is None:
                raise ValueError("modulation_pp: got no t, expected (B,) timesteps for this model")
            c = c + self._time(t, w)
        s = nn.functional.silu(c)
        return Modulation(
            [self._vectors(s, f"blocks_pre.{i}", w) for i in range(self.config.pre_depth)],
            None,
            [self._vectors(s, f"blocks_post.{i}", w) for i in range(self.config.post_depth)],
            self._vectors(s, "final_layer", w),
        )

    def modulation_fp(self, t: Tensor, y: Tensor, *, weights: WeightView | None = None) -> Tensor:
        """Vectors (B,6D) of the fixed-point block for timesteps t (B,) and labels y (B,) int64: the
        rows may mix timesteps, one GEMM for all. Raises ValueError for a label that does not
        exist."""
        w = self.view(weights, y)
        s = nn.functional.silu(self._time(t, w) + self._label(y, w))
        return self._vectors(s, "block_fixed_point", w)

    def modulation(self, t: Tensor, y: Tensor, *, weights: WeightView | None = None) -> Modulation:
        """All vectors for timesteps t (B,) of the training schedule and labels y (B,) int64:
        ``modulation_pp`` and ``modulation_fp`` in one."""
        w = self.view(weights, y)
        return self.modulation_pp(y, t, weights=w)._replace(fp=self.modulation_fp(t, y, weights=w))

    def encode(self, x: Tensor, mod: Modulation, *, weights: WeightView | None = None) -> Tensor:
        """x (B,C,h,w) -> h (B,T,D) in the iterate's dtype, through the pre blocks. Raises
        ValueError for another shape, and for vectors in another dtype than the weights'."""
        w = self.view(weights, x)
        operands.check_image(self.config, x)
        h = self._tokens(x, w)
        for index, vectors in enumerate(mod.pre):
            h = self._run(h, f"blocks_pre.{index}", vectors, w)
        return h

    def decode(self, z: Tensor, mod: Modulation, *, weights: WeightView | None = None) -> Tensor:
        """z (B,T,D) -> (B,2C,h,w) in the compute dtype, through the post blocks and the final
        layer: C prediction channels, C variance fractions. Raises ValueError as ``encode``."""
        return self.unpatchify(self.decode_tokens(z, mod, weights=weights))

    def decode_tokens(
        self, z: Tensor, mod: Modulation, *, weights: WeightView | None = None
    ) -> Tensor:
        """``decode`` before its tokens become an image: (B,T,p p 2C)."""
        w = self.view(weights, z)
        operands.check_tokens(self.config, "z", z, len(z))
        for index, vectors in enumerate(mod.post):
            z = self._run(z, f"blocks_post.{index}", vectors, w)
        return self._final(z, mod.final, w)

    def _inject(self, h: Tensor, w: WeightView) -> tuple[Tensor | None, Tensor]:
        """(i, u): i = W_p h + b_p and, as a constant, u = E i + b1; folded: no i."""
        hc = h.to(w.dtype)
        i = None if w.folded else self._linear(hc, PROJECTION, w)
        e, b1 = w.injection()
        with torch.no_grad():
            source = hc if i is None else i.detach()
            return i, call(ops.linear, source, e, b1, e, b1, self.execution.impl)

    def _solve(
        self, x: Tensor, injected: tuple[Tensor | None, Tensor], vectors: Tensor, n: int, m: int,
        w: WeightView, *, detach_init: bool, stats: bool, gradient: Gradient = S_JFB,
    ) -> tuple[Tensor, SolveStats | None]:  # fmt: skip
        """n iterations without and m with gradient from x (B,T,D), for ``injected`` = (i, u)."""
        i, u = injected
        if i is None and torch.is_grad_enabled():
            raise ValueError("weights: got folded ones with gradients on, expected fold=False")
        out, norms = gradients.iterated_block(
            x, i, u, vectors, [w.params[name] for name in FIXED_POINT],
            w.block("block_fixed_point", injected=True), n, m, self._settings(w), gradient,
            detach_init, stats,
        )  # fmt: skip
        return out, SolveStats.from_norms(norms) if stats else None

    def fixed_point_map(
        self, h: Tensor, mod: Modulation | Tensor, *, weights: WeightView | None = None,
        plain: bool = False,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        """f of x* = f(x*) for the injected h (B,T,D) of ``encode`` and one timestep's vectors:
        x (B,T,D) -> f(x) (B,T,D), differentiable by autograd in x, h, ``mod`` and the parameters:
        once, or with ``plain`` as often as wanted, in forward mode and under torch.func too, by
        plain PyTorch operations (``gradients.plain_map``). Raises ValueError for ``mod`` without
        the fixed-point block's vectors or in another dtype than the weights', and f for an x of
        another shape.

        What ``solvers.solve``, ``solvers.spectral_radius`` and loops of one's own take; many
        iterations in one call are ``iterate``'s and ``solve``'s business. Under ``weights`` that
        accumulate, as a trainer's do, every backward through f that is not ``plain`` adds to the
        parameters' gradients.
        """
        w = self.view(weights, h)
        vectors = _of_fixed_point(mod, w)

        def once(x: Tensor) -> Tensor:
            return self._solve(x, injected, vectors, 0, 1, w, detach_init=False, stats=False)[0]

        if plain:
            names = f"{PROJECTION}.weight", f"{PROJECTION}.bias"
            params = [w.params[name] for name in (*names, *FIXED_POINT)]
            step = gradients.plain_map(h, vectors, params, w.dtype, self.config.num_heads)
        else:
            injected, step = self._inject(h, w), once

        def f(x: Tensor) -> Tensor:
            operands.check_tokens(self.config, "x", x, len(h))
            return step(x)

        return f

    @torch.no_grad()
    def iterate(
        self, x0: Tensor, h: Tensor, mod: Modulation | Tensor, iters: int, stats: bool = False,
        *, weights: WeightView | None = None,
    ) -> tuple[Tensor, SolveStats | None]:  # fmt: skip
        """``iters`` >= 0 fixed-point iterations from x0 (B,T,D) without gradient: (x (B,T,D), stats
        or None). h (B,T,D), of ``encode``, is injected at every one; ``mod`` holds its timestep's
        vectors, or is those of the fixed-point block (B,6D). x0 is h, or for reuse an earlier
        timestep's x. Raises ValueError for other shapes and dtypes, and for ``iters`` below 0."""
        iters = operands.whole("iters", iters, 0)
        operands.check_tokens(self.config, "x0", x0, len(h))
        w = self.view(weights, h)
        injected, vectors = self._inject(h, w), _of_fixed_point(mod, w)
        return self._solve(x0, injected, vectors, iters, 0, w, detach_init=True, stats=stats)

    def solve(
        self, x: Tensor, t: Tensor, y: Tensor, iters: int = 8, no_grad_iters: int = 0,
        init: Tensor | None = None, *, weights: WeightView | None = None, detach_init: bool = True,
        stats: bool = True, gradient: Gradient = S_JFB,
    ) -> Solved:  # fmt: skip
        """Like ``forward``, and also the solution and, with ``stats``, the residual of every
        iteration and sample; ``gradient`` chooses another one than S-JFB's (fpdm.gradients). Raises
        ValueError as the class says."""
        iters = operands.whole("iters", iters, 0)
        no_grad_iters = operands.whole("no_grad_iters", no_grad_iters, 0)
        if iters + no_grad_iters < 1:
            raise ValueError("iters, no_grad_iters: got 0, 0, expected a sum of at least 1")
        operands.check_inputs(self.config, x, t, y)
        if init is not None:
            operands.check_tokens(self.config, "init", init, len(x))
        w = self.view(weights, x)
        mod = self.modulation(t, y, weights=w)
        h = self.encode(x, mod, weights=w)
        assert mod.fp is not None
        start = h if init is None else init.to(h.dtype)
        z, found = self._solve(
            start, self._inject(h, w), mod.fp, no_grad_iters, iters, w,
            detach_init=detach_init, stats=stats, gradient=gradient,
        )  # fmt: skip
        return Solved(self.decode(z, mod, weights=w), z, found)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, iters: int = 8, no_grad_iters: int = 0,
        init: Tensor | None = None, *, weights: WeightView | None = None, detach_init: bool = True,
    ) -> Tensor:  # fmt: skip
        """(B,2C,h,w); see the class."""
        return self.solve(
            x, t, y, iters, no_grad_iters, init, weights=weights, detach_init=detach_init,
            stats=False,
        ).output  # fmt: skip


class DiT(_Transformer):
    """The baseline (Peebles & Xie 2023): ``depth`` blocks, all conditioned on emb(t) + emb(y).
    Submodules hold parameters only, as FPDM's."""

    kind = "dit"

    def __init__(self, config: ModelConfig, execution: ExecutionConfig | None = None):
        super().__init__(config, execution)
        self.blocks = nn.ModuleList(_block(config.hidden_size) for _ in range(config.depth))
        self.parts = Parts.of(self)
        self.initialize()

    def modulation(self, t: Tensor, y: Tensor, *, weights: WeightView | None = None) -> Modulation:
        """All vectors of one timestep; the blocks' stand under ``pre``."""
        w = self.view(weights, y)
        s = nn.functional.silu(self._time(t, w) + self._label(y, w))
        blocks = [self._vectors(s, f"blocks.{i}", w) for i in range(self.config.depth)]
        return Modulation(blocks, None, [], self._vectors(s, "final_layer", w))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, weights: WeightView | None = None
    ) -> Tensor:
        """x (B,C,h,w), t (B,), y (B,) -> (B,2C,h,w), as ``FPDM.forward`` without iterations."""
        operands.check_inputs(self.config, x, t, y)
        w = self.view(weights, x)
        mod = self.modulation(t, y, weights=w)
        h = self._tokens(x, w)
        for index, vectors in enumerate(mod.pre):
            h = self._run(h, f"blocks.{index}", vectors, w)
        return self.unpatchify(self._final(h, mod.final, w))


def build_model(config: ModelConfig, execution: ExecutionConfig | None = None) -> FPDM | DiT:
    """The model that ``config.kind`` names, initialised."""
    return (FPDM if config.kind == "fpdm" else DiT)(config, execution)


def model_of(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    where: str,
    execution: ExecutionConfig | None = None,
) -> FPDM | DiT:
    """The model of ``config`` with the state dict ``state`` in published names, on the CPU.

    Raises CheckpointError, which begins with ``where``, for other names or shapes and for NaN or
    Inf, before anything of the claimed size is allocated.
    """
    with torch.device("meta"):
        compare(build_model(config, execution), state, where)
    model = build_model(config, execution)
    model.load_state_dict(dict(state), strict=True)
    return model


def from_pretrained(
    path: str | Path = SHIPPED, execution: ExecutionConfig | None = None
) -> FPDM | DiT:
    """The model of an export (fpdm.exports; the shipped digits), on the CPU, its weights checked
    against the stored hash.

    Raises CheckpointError for an export that is missing, damaged, or of another architecture than
    its ``config.json`` says, ConfigError for a setting in there that cannot be met.
    """
    found = read_export(path)
    return model_of(found.model, found.state(), str(found.path / WEIGHTS), execution)
