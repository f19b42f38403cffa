"""Weights as the operators want them: cast once, folded once, refreshed in place.

A model's parameters stay in their own dtype (float32). ``PreparedWeights`` holds copies in the
compute dtype, made once per optimiser step instead of once per use, and for sampling the folded
injection E W_p. The trainer or sampler owns it and passes it as ``weights=``; whoever changes
parameters calls ``refresh()``, which writes in place, so captured addresses stay valid. Staleness
is never inferred.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fpdm.block import BlockWeights

BLOCK_KEYS = (
    "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip
FC1, FC2 = "block_fixed_point_projection_fc1", "block_fixed_point_projection_fc2"
PROJECTION = "block_pre_projection"


class WeightView:
    """A model's parameters in ``dtype``: prepared copies where there are any, casts otherwise."""

    def __init__(self, params: dict[str, Tensor], dtype: torch.dtype, copies: dict[str, Tensor]):
        self.params, self.dtype, self.copies = params, dtype, copies

    def get(self, name: str) -> Tensor:
        """The parameter in the compute dtype, without gradient."""
        copy = self.copies.get(name)
        return self.params[name].detach().to(self.dtype) if copy is None else copy

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """(weight, bias) of a Linear in the compute dtype."""
        return self.get(f"{name}.weight"), self.get(f"{name}.bias")

    def injection(self) -> tuple[Tensor, Tensor]:
        """(E, b1) of u = E i + b1; folded: (E W_p, E b_p + b1) of u = E W_p h + (E b_p + b1)."""
        if self.folded:
            return self.copies["fold.weight"], self.copies["fold.bias"]
        return self.halves()[1], self.get(f"{FC1}.bias")

    def halves(self) -> tuple[Tensor, Tensor]:
        """W1 = [A | E], each (2D,D)."""
        if "half.a" in self.copies:
            return self.copies["half.a"], self.copies["half.e"]
        a, e = self.get(f"{FC1}.weight").chunk(2, dim=1)
        return a, e

    @property
    def folded(self) -> bool:
        """Whether the pre-projection is folded into the injection."""
        return "fold.weight" in self.copies

    def block(self, name: str, injected: bool = False) -> BlockWeights:
        """The block ``name``; with the injection MLP when ``injected``."""
        own = [self.get(f"{name}.{key}") for key in BLOCK_KEYS]
        if not injected:
            return BlockWeights(*own)
        return BlockWeights(*own, *self.halves(), *self.linear(FC2))  # type: ignore[call-arg]


class PreparedWeights(WeightView):
    """Copies of ``model``'s parameters in ``dtype``; aliases where the dtype is the parameters'
    own.

    ``fold=True`` (sampling only: it carries no gradient) also holds E W_p and E b_p + b1, computed
    in the parameters' dtype and then rounded: 2 D^2 instead of 3 D^2 MACs per token and timestep.
    ``load_state_dict`` on the model refreshes by itself; every other change of parameters (an
    optimiser step, an EMA swap) must call ``refresh()``.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, fold: bool = False):
        params: dict[str, Tensor] = dict(model.named_parameters())
        super().__init__(params, dtype, {})
        self._pairs: list[tuple[Tensor, Tensor]] = []
        injected = f"{FC1}.weight" in params
        for name, param in params.items():
            if param.dtype == dtype:
                continue
            if injected and name == f"{FC1}.weight":
                # contiguous halves; the whole is never multiplied by
                for key, half in zip(("half.a", "half.e"), param.detach().chunk(2, dim=1)):
                    self._add(key, half)
            else:
                self._add(name, param.detach())
        if fold and injected:
            d = params[f"{PROJECTION}.weight"].shape[0]
            device = params[f"{PROJECTION}.weight"].device
            self.copies["fold.weight"] = torch.empty(2 * d, d, dtype=dtype, device=device)
            self.copies["fold.bias"] = torch.empty(2 * d, dtype=dtype, device=device)
        self.refresh()
        ref = weakref.ref(self)

        def loaded(module: nn.Module, keys: Any) -> None:
            if (prepared := ref()) is not None:
                prepared.refresh()

        model.register_load_state_dict_post_hook(loaded)

    def _add(self, key: str, source: Tensor) -> None:
        self.copies[key] = torch.empty(source.shape, dtype=self.dtype, device=source.device)
        self._pairs.append((self.copies[key], source))

    @torch.no_grad()
    def refresh(self) -> None:
        """Write every copy again, in place."""
        if self._pairs:
            copies, sources = (list(side) for side in zip(*self._pairs))
            torch._foreach_copy_(copies, sources)
        if self.folded:
            e = self.params[f"{FC1}.weight"].chunk(2, dim=1)[1]
            bias = torch.addmv(self.params[f"{FC1}.bias"], e, self.params[f"{PROJECTION}.bias"])
            self.copies["fold.weight"].copy_(e @ self.params[f"{PROJECTION}.weight"])
            self.copies["fold.bias"].copy_(bias)
