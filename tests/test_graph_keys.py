"""What a graph is never replayed across: weights, settings of the call and of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from recorder import eager, make, network
from test_graphs import BUSY, LABELS, SEEDS, SMALL

from fpdm import graphs
from fpdm.graphs import GraphKey, addresses
from fpdm.weights import PreparedWeights


def test_other_weights_are_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = network(SMALL), network(SMALL, seed=1)
    s, _ = make(BUSY, model, monkeypatch)
    assert s.graphs is not None
    s.sample(LABELS, SEEDS)
    captures = s.graphs.captures
    assert captures
    # the parameters move to new addresses
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            p.data = q.detach().clone()
    s.weights.refresh()
    found = s.sample(LABELS, SEEDS).x
    assert s.graphs.captures == 2 * captures
    assert torch.equal(found, eager(BUSY, other).sample(LABELS, SEEDS).x)
    again = PreparedWeights(model, torch.float32, fold=True)
    assert addresses(again) != addresses(s.weights)
    assert addresses(s.weights) == addresses(s.weights)


def test_what_a_key_tells_apart() -> None:
    key = GraphKey("iterate", 6, (8,), (4, 16), (torch.float32,), "cpu", "reference", 0, (1, 2))
    changes: list[dict[str, Any]] = [
        {"piece": "update"}, {"rows": 4}, {"variant": (4,)}, {"shape": (4, 32)},
        {"dtypes": (torch.bfloat16,)}, {"device": "cuda:1"}, {"impl": "triton"}, {"buffers": 1},
        {"weights": (1, 3)},
    ]  # fmt: skip
    assert len({key, *(replace(key, **change) for change in changes)}) == 1 + len(changes)
    assert len(changes) == len(vars(key))


@pytest.fixture
def precision() -> Iterator[Any]:
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    yield matmul
    matmul.fp32_precision = torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


def test_settings_that_the_captured_work_depends_on(
    monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    """Statistics, TF32, deterministic algorithms and the library of products are decided at
    capture."""
    model = network(SMALL)
    s, _ = make(BUSY, model, monkeypatch)
    assert s.graphs is not None
    s.graphs.limit = 99
    s.sample(LABELS, SEEDS)
    seen = [len(s.graphs.entries)]
    s.sample(LABELS, SEEDS, stats=False)
    seen.append(len(s.graphs.entries))
    torch.set_float32_matmul_precision("high")
    s.sample(LABELS, SEEDS)
    seen.append(len(s.graphs.entries))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    s.sample(LABELS, SEEDS)
    seen.append(len(s.graphs.entries))
    monkeypatch.setattr(CUDA, "preferred_blas_library", lambda: "cuBLASLt")
    s.sample(LABELS, SEEDS)
    seen.append(len(s.graphs.entries))
    assert seen == [seen[0] * i for i in (1, 2, 3, 4, 5)]


CUDA = torch.backends.cuda
SWITCHES: dict[str, Callable[[bool], Any]] = {
    "flash": CUDA.enable_flash_sdp,
    "efficient": CUDA.enable_mem_efficient_sdp,
    "cudnn": CUDA.enable_cudnn_sdp,
    "math": CUDA.enable_math_sdp,
    "math in half precision": lambda on: CUDA.allow_fp16_bf16_reduction_math_sdp(not on),
    "sums in float16": partial(setattr, CUDA.matmul, "allow_fp16_reduced_precision_reduction"),
    "sums in bfloat16": partial(setattr, CUDA.matmul, "allow_bf16_reduced_precision_reduction"),
    "products in float16": lambda on: setattr(CUDA.matmul, "allow_fp16_accumulation", not on),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_attention_and_products(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel SDPA and cuBLAS take is decided at capture; switched back, the first graphs
    serve again."""
    s, _ = make(BUSY, network(SMALL), monkeypatch)
    assert s.graphs is not None
    seen = []
    try:
        for on in (True, True, False, False, True):
            SWITCHES[switch](on)
            s.sample(LABELS, SEEDS)
            seen.append((len(s.graphs.entries), s.graphs.captures))
    finally:
        SWITCHES[switch](True)
    (_, (entries, captures), *others) = seen
    assert others[1:] == [(2 * entries, 2 * captures)] * 2


def test_both_ways_of_setting_tf32(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """Where a caller uses torch's newer setting, the older getter raises."""
    if not hasattr(precision, "fp32_precision"):
        pytest.skip("torch before 2.9")
    precision.fp32_precision = "ieee"
    first = graphs.global_settings()
    precision.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert graphs.global_settings() != first
    s, _ = make(BUSY, network(SMALL), monkeypatch)
    assert s.sample(LABELS[:2], SEEDS[:2]).x.isfinite().all()
