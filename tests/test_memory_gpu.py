"""What the fixed-point layer keeps and needs on a GPU, by the allocator's count, in units U of one
activation (B,T,D): XL/2's shapes, B = 32."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from test_fixed_point import addend, operator_weights, problem

from fpdm.fixed_point import unroll, unroll_backward

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
HEADS, BATCH = 16, 32
# the gradient of the modulation, 16 bytes a row and head of attention, sums of rows
SMALL = 0.25
LEDGER = {
    ("full", False): 1, ("elementwise", False): 13, ("none", False): 23,
    ("full", True): 2, ("elementwise", True): 14, ("none", True): 26,
}  # fmt: skip


def passes(m: int, impl: str, recompute: str, wide: bool) -> dict[str, float]:
    """Of ``unroll`` and its backward in bfloat16, ``wide``: with a float32 iterate. In U: ``kept``
    between them; the ``forward``'s peak above that; the ``backward``'s peak above it, parameter
    gradients apart."""
    dtype = torch.bfloat16
    p: dict[str, Any] = problem(d=72 * HEADS, t=256, b=BATCH, dtype=dtype)
    p |= {name: p[name].cuda() for name in ("x", "i", "mod")}
    params = [q.float().cuda() for q in p["params"]]
    p["params"] = params
    unit = p["x"].nbytes
    x = p["x"].float() if wide else p["x"]
    u, weights = addend(p, dtype), operator_weights(p, dtype)
    how = (m, HEADS, impl, recompute, 1)
    operands = x, p["i"], u, p["mod"]
    found: dict[str, float] = {}
    # the second time, when what is allocated once for all is there
    for _ in range(2):
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            out, _, *saved = unroll(*operands, params, weights, *how, False, False)
            kept = torch.cuda.memory_allocated() - before
            peak = torch.cuda.max_memory_allocated() - before
            found = {"kept": kept / unit, "forward": (peak - kept) / unit}
            torch.cuda.reset_peak_memory_stats()
            dout = torch.randn_like(out)
            before = torch.cuda.memory_allocated()
            grads = unroll_backward(params, dout, *operands, weights, *saved, *how, False)
            peak = torch.cuda.max_memory_allocated() - before
        found["backward"] = (peak - sum(q.nbytes for q in params)) / unit
        del out, saved, dout, grads
    return found


@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
@pytest.mark.parametrize(("recompute", "wide"), LEDGER, ids=str)
def test_memory_ledger(impl: str, recompute: str, wide: bool) -> None:
    """Of an iteration, the ledger's; what both passes need beside it is the same for any m. The
    backward's peak is 13 U above what is saved, 16 with an iterate twice as wide (of which 1 U is
    a product's, before it is widened), and in full recomputation what one iteration keeps."""
    few, many = (passes(m, impl, recompute, wide) for m in (3, 6))
    slope = (many["kept"] - few["kept"]) / 3
    units = LEDGER[recompute, wide]
    assert abs(slope - units) < 0.02, f"{slope:.2f} U an iteration, the ledger says {units}"
    assert many["forward"] - few["forward"] < 0.02
    assert many["backward"] - few["backward"] < 0.02
    again = (14 if wide else 13) if recompute == "full" else 0
    assert few["backward"] <= (16 if wide else 13) + again + SMALL
