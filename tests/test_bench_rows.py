"""What a row of the benchmark counts, and what is read of a GPU while it runs; without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import cost, gpu_rows, machine, report, rows, suites
from fpdm.config import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(input_size=8, hidden_size=16, num_heads=2)
TINY = rows.Setting("test", CONFIG, 2, torch.bfloat16, CPU)


def units(s: rows.Setting) -> tuple[int, int]:
    """Bytes of U = B T D elements, and of D x D weights."""
    d = s.config.hidden_size
    return (n * s.dtype.itemsize for n in (s.batch * s.config.tokens * d, d * d))  # type: ignore[return-value]


def evaluation(s: rows.Setting, k: int) -> int:
    """By hand: an iteration reads 16 D^2 of weights and moves 5, 3, 1, 4, 4, 3, 2, 5 and 6 U; an
    outer block lacks the injection, which moves 5 and 3 of them and 4 D^2; E moves 3 U and 2 D^2.
    """
    u, w = units(s)
    return k * (33 * u + 16 * w) + 2 * (25 * u + 12 * w) + 3 * u + 2 * w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_an_evaluation_and_of_the_sampler(dtype: torch.dtype) -> None:
    s = replace(TINY, dtype=dtype)
    assert suites.network(s, 3, False).build().bytes == evaluation(s, 3)
    guided = replace(s, batch=2 * s.batch)
    for make in (suites.sampling, lambda s, g, *how: gpu_rows.sampling(s, g, False, *how)):
        plain, twice = (make(s, guidance, 5, 3).build() for guidance in (1.0, 4.0))
        assert plain.bytes == 5 * evaluation(s, 3)
        assert twice.bytes == 5 * evaluation(guided, 3) < 2 * plain.bytes
        assert twice.flops == 2 * plain.flops


def test_bytes_of_a_training_step() -> None:
    """By hand, of the products alone: forward 26 U and 16 D^2 an iteration; back 52 U, the weights
    once, and their gradients in float32 read and written."""
    u, w = units(TINY)
    n, m, d = 1, 2, TINY.config.hidden_size
    back = w + 8 * d * d
    want = (n + m) * (26 * u + 16 * w) + 2 * (20 * u + 12 * w) + 5 * u + 3 * w
    want += m * (52 * u + 16 * back) + 2 * (40 * u + 12 * back) + 10 * u + 3 * back
    for mode in cost.RECOMPUTE:
        # what is computed again counts for nothing, as its FLOPs do
        assert suites.training(TINY, n, m, mode).build().bytes == want
    several = gpu_rows.training(TINY, [(n, m), (n, m)], "none", False, False).build()
    assert several.bytes == 2 * want


def measured(**facts: Any) -> dict[str, Any]:
    """A row as run_row writes it."""
    arms = {rows.OURS: {"median_s": 2e-3, "best_s": 2e-3, "spread": 0.0, "ratio": 1.0}}
    return {"suite": "sampler", "name": "a", "arms": arms, "missing": {}, **facts}


def test_the_floor_is_the_larger_of_the_two() -> None:
    ceilings = {"gemm float32": 1e9, "gemm bfloat16": 4e9, "copy": 1e8}
    counts = {"flops": 4_000_000, "bytes": 50_000, "dtype": "bfloat16"}
    row = measured(**counts)
    row |= machine.shares(row, 2e-3, ceilings)
    assert report.floor(row) == "50% (GEMM, 1 ms)"
    row |= machine.shares({**row, "bytes": 150_000}, 2e-3, ceilings)
    assert report.floor(row) == "75% (copy, 1.5 ms)"
    assert report.floor(measured()) == ""
    head, (line,) = report.suite_table({"rows": [row]}, "sampler")
    assert dict(zip(head, line))["of the floor"] == "75% (copy, 1.5 ms)"
