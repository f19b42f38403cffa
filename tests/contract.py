"""The tolerance contract: derived, never tuned, and stated here and nowhere else.

Per tensor, for N = max and N = RMS, against a float64 oracle, forward and every gradient:

    N(err) <= 2 N(err of plain PyTorch in that dtype) + c (eps(dtype)/2 + 4 eps(fp32)) N(oracle)

with c = 1 for max and 0.3 for RMS; behind a LayerNorm plus 4 eps(fp32) max|x| rstd. NaN and Inf
positions must be equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def _norms(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    x = x.double()
    return x.abs().max().item(), x.square().mean().sqrt().item()


def violation(
    ours: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype, layer_norm: float = 0.0
) -> str | None:
    """None when the contract holds, else one line. ``layer_norm`` is max|x| rstd before it."""
    if ours.shape != oracle.shape:
        return f"shape: got {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    ours, plain, oracle = ours.double(), plain.double(), oracle.double()
    finite = oracle.isfinite() & plain.isfinite()
    if not torch.equal(ours.isnan() & finite, torch.zeros_like(finite)):
        return "NaN where plain PyTorch and the oracle have none"
    if not torch.equal(ours.isfinite(), plain.isfinite()):
        return "non-finite positions differ from plain PyTorch's"
    ours, plain, oracle = ours[finite], plain[finite], oracle[finite]
    base = torch.finfo(dtype).eps / 2 + 4 * EPS32
    names, factors = ("max", "rms"), (1.0, 0.3)
    for name, c, err, other, size in zip(
        names, factors, _norms(ours - oracle), _norms(plain - oracle), _norms(oracle)
    ):
        bound = 2 * other + c * base * size + 4 * EPS32 * layer_norm
        if err > bound:
            return f"{name} error {err:.3e} > {bound:.3e} (plain {other:.3e}, size {size:.3e})"
    return None
