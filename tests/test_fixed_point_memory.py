"""What the fixed-point layer keeps and needs, counted storage by storage."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TINY, random_model
from test_fixed_point import addend, leaves, operator_weights, problem

from bench import published as plain
from bench.memory import LiveBytes
from bench.memory import plain as published_memory
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.fixed_point import iterate, unroll, unroll_backward
from fpdm.kernels import cpu_loop
from fpdm.model import FPDM
from fpdm.recipes import MODEL_PRESETS
from fpdm.weights import PreparedWeights


def measure(n: int, m: int, execution: ExecutionConfig, dtype: torch.dtype) -> tuple[int, int, int]:
    """(live bytes between forward and backward, peak of the forward, peak of the backward)."""
    config = ModelConfig(input_size=16, hidden_size=96, num_heads=4, num_classes=10)
    model = FPDM(config, execution)
    weights = PreparedWeights(model, dtype)
    x, t, y = torch.randn(8, 4, 16, 16), torch.full((8,), 500), torch.zeros(8, dtype=torch.long)
    gc.collect()
    with LiveBytes() as mode:
        loss = model(x, t, y, m, no_grad_iters=n, weights=weights).float().square().mean()
        gc.collect()
        live, forward = mode.live(), mode.peak
        mode.peak = 0
        loss.backward()
        return live, forward, mode.peak


UNIT = 8 * 64 * 96


# recompute, with a float32 iterate -> U of an iteration
LEDGER = {
    ("full", False): 1, ("elementwise", False): 13, ("none", False): 23,
    ("full", True): 2, ("elementwise", True): 14, ("none", True): 26,
}  # fmt: skip


@pytest.mark.parametrize(("recompute", "wide"), LEDGER, ids=str)
def test_memory_ledger(recompute: str, wide: bool) -> None:
    """Slope of live bytes over m is the ledger's, over n it is zero."""
    units, residual = LEDGER[recompute, wide], "float32" if wide else "compute"
    dtype = torch.bfloat16 if residual == "float32" else torch.float32
    size = dtype.itemsize * UNIT
    execution = ExecutionConfig(recompute=recompute, residual_dtype=residual)  # type: ignore[arg-type]
    live = {m: measure(0, m, execution, dtype) for m in (2, 3, 6)}
    for a, b in ((2, 3), (3, 6)):
        slope = (live[b][0] - live[a][0]) / (b - a) / size
        assert slope <= units + 0.01, f"{recompute}: {slope} U per iteration, ledger says {units}"
        assert slope > units - 0.01
        # the transient part of both passes does not grow with m
        for kind in (1, 2):
            assert (live[b][kind] - live[a][kind]) / (b - a) / size <= units + 1.01
    with_n = [measure(n, 2, execution, dtype) for n in (1, 6)]
    assert with_n[0][0] == with_n[1][0]
    # with n = 0 the start is h itself, which is alive anyway
    assert with_n[0][0] - live[2][0] <= size * (2 if residual == "float32" else 1)
    # one more iterate to swap with from the second iteration on
    assert with_n[1][1] <= with_n[0][1] + 2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_iteration_keeps_26(dtype: torch.dtype) -> None:
    """What the published architecture keeps per iteration in plain PyTorch, at XL/2's sizes."""
    config = MODEL_PRESETS["fpdm-xl-2"]
    few, many = (published_memory(config, 4, 0, m, dtype).saved for m in (2, 6))
    unit = 4 * config.tokens * config.hidden_size * dtype.itemsize
    assert 26 <= (many - few) / 4 / unit < 26.5


def test_memory_meter_bites() -> None:
    """The published no-grad phase, which builds a graph, is seen by the same meter."""
    model = random_model(TINY)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.tensor([1, 2])
    peaks = []
    for n in (1, 6):
        gc.collect()
        with LiveBytes() as mode:
            plain.forward(state, TINY, x, t, y, 1, n)
            peaks.append(mode.peak)
    assert peaks[1] > peaks[0] + 5 * 10 * 2 * 16 * 48 * 4


def at_xl_ratio(dtype: torch.dtype, b: int = 1) -> dict[str, Any]:
    """Operands with XL's ratio of scores to activations: T = 256, K = 72, H = 8, H T / D = 3.55."""
    p = problem(d=576, t=256, b=b, dtype=dtype)
    p["params"] = [q.float() for q in p["params"]]
    for leaf in leaves(p):
        leaf.requires_grad_()
    return p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop_working_set(dtype: torch.dtype) -> None:
    """The loop without gradient: two iterates and 7 U of workspace."""
    p = at_xl_ratio(dtype)
    weights, u = operator_weights(p, dtype), addend(p, dtype)
    gc.collect()
    with torch.no_grad(), LiveBytes() as mode:
        iterate(p["x"], u, p["mod"], weights, 4, 8, "auto", True)
    # plain PyTorch's LayerNorm and products take some of their own
    assert mode.peak / p["x"].nbytes <= (9.1 if cpu_loop.loops(dtype, dtype) else 12)


class Passes(NamedTuple):
    """In U: kept between forward and backward; the forward's peak above that; the backward's above
    it, gradients of parameters apart."""

    kept: float
    forward: float
    backward: float


def passes(
    p: dict[str, Any], m: int, heads: int, impl: str, recompute: str, chunks: int = 1,
    wide: bool = False, meter: Callable[[], Any] = LiveBytes,
) -> Passes:  # fmt: skip
    """Of ``unroll`` and its backward on operands ``p`` in their dtype; ``wide``: with a float32
    iterate. ``meter``: LiveBytes, or what else has its ``live`` and ``peak``."""
    dtype, params, unit = p["x"].dtype, p["params"], p["x"].nbytes
    u, weights = addend(p, dtype), operator_weights(p, dtype)
    operands = (p["x"].float() if wide else p["x"]), p["i"], u, p["mod"]
    how = (m, heads, impl, recompute, chunks)
    gc.collect()
    with torch.no_grad():
        with meter() as forward:
            out, _, *saved = unroll(*operands, params, weights, *how, False, False)
            gc.collect()
            kept = forward.live()
        with meter() as backward:
            unroll_backward(params, out, *operands, weights, *saved, *how, False)
    peak = backward.peak - sum(q.nbytes for q in params)
    return Passes(kept / unit, (forward.peak - kept) / unit, peak / unit)


def peak_of_backward(recompute: str, wide: bool) -> int:
    """U above what is saved, where a kernel allocates nothing: 7 of scratch, 4 of du, and the
    gradients of x and i; of an iterate twice as wide 2 more, and a product before it is widened; in
    full recomputation what the element-wise ledger keeps of one iteration."""
    return (16 if wide else 13) + (LEDGER["elementwise", wide] if recompute == "full" else 0)


@pytest.mark.parametrize(("recompute", "kept"), [("none", 0), ("elementwise", 0), ("full", 13)])
@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 14.1), (torch.bfloat16, 23.1)])
def test_backward_working_set(recompute: str, kept: int, dtype: torch.dtype, units: float) -> None:
    """The backward's peak above what was saved, parameter gradients apart: 7 U of scratch, the
    gradients of x, i and u, LayerNorm temporaries; in half precision float32 operands of one weight
    gradient too; in full recomputation what one iteration keeps."""
    p = at_xl_ratio(dtype)
    if cpu_loop.loops(dtype, dtype):
        units = {torch.float32: 11.1, torch.bfloat16: 13.1}[dtype]  # products are csrc/cpu's
    assert passes(p, 3, 8, "auto", recompute).backward <= units + kept


def test_chunks_divide_the_working_set() -> None:
    p = at_xl_ratio(torch.float32, b=4)
    peaks = [passes(p, 3, 8, "auto", "full", chunks).backward for chunks in (1, 4)]
    # the gradient of i is whole, everything else is a quarter
    assert peaks[1] - 1 <= (peaks[0] - 1) / 4 + 0.1
    for recompute in ("elementwise", "full"):
        whole, quarter = (passes(p, 3, 8, "auto", recompute, n).forward for n in (1, 4))
        assert whole >= 5
        assert quarter <= whole / 4 + 0.1


def test_accumulating_needs_no_second_buffer() -> None:
    """The backward's peak falls by the gradients of the block, which autograd would add."""
    p = at_xl_ratio(torch.float32, b=1)
    u, weights = addend(p, torch.float32), operator_weights(p, torch.float32)
    peaks = []
    for accumulate in (False, True):
        params = [q.detach().requires_grad_() for q in p["params"]]
        for q in params:
            q.grad = torch.zeros_like(q)
        how = (2, 8, "auto", "full", 1, False, accumulate)
        out = unroll(p["x"], p["i"], u, p["mod"], params, weights, *how)[0]
        gc.collect()
        with LiveBytes() as mode:
            out.sum().backward()
        peaks.append(mode.peak)
    saved = sum(q.nbytes for q in p["params"])
    assert peaks[0] - peaks[1] >= 0.99 * saved
