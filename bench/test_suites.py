"""The same rows under pytest-benchmark: ``pytest bench --benchmark-only``, for its own tools.

Its rounds are not interleaved with a baseline's; the ratios that are published come from
``python -m bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_rows, rows, suites

ROWS = gpu_rows.rows() if torch.cuda.is_available() else suites.cpu_rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{r.suite}: {r.name}" for r in ROWS])
def test_row(row: rows.Row, benchmark: Any) -> None:
    """Our arm, with its counts in ``extra_info``."""
    arms = row.build()
    run = arms.run[rows.OURS]
    if isinstance(run, str):
        pytest.skip(run)
    benchmark.group = row.suite
    benchmark.extra_info.update(flops=arms.flops, bytes=arms.bytes, **arms.facts)
    benchmark(run)
