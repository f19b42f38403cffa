"""What the fixed-point layer keeps and needs on a GPU, by the allocator's count: XL/2's shapes, B =
32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fixed_point import problem
from test_fixed_point_memory import LEDGER, Passes, passes, peak_of_backward

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
HEADS, BATCH = 16, 32
# the gradient of the modulation, 16 bytes a row and head of attention, sums of rows
SMALL = 0.25


class Allocated:
    """The allocator's bytes from here on; ``peak`` once it is left."""

    def __enter__(self) -> Allocated:
        self.before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def live(self) -> int:
        """Now."""
        return torch.cuda.memory_allocated() - self.before

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated() - self.before


def measured(m: int, impl: str, recompute: str, wide: bool) -> Passes:
    """In bfloat16, the second time, when what is allocated once for all is there."""
    p: dict[str, Any] = problem(d=72 * HEADS, t=256, b=BATCH, dtype=torch.bfloat16)
    p |= {name: p[name].cuda() for name in ("x", "i", "mod")}
    p["params"] = [q.float().cuda() for q in p["params"]]
    return [passes(p, m, HEADS, impl, recompute, 1, wide, Allocated) for _ in range(2)][1]


@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
@pytest.mark.parametrize(("recompute", "wide"), LEDGER, ids=str)
def test_memory_ledger(impl: str, recompute: str, wide: bool) -> None:
    """Of an iteration, the ledger's; what both passes need beside it is the same for any m."""
    few, many = (measured(m, impl, recompute, wide) for m in (3, 6))
    slope, units = (many.kept - few.kept) / 3, LEDGER[recompute, wide]
    assert abs(slope - units) < 0.02, f"{slope:.2f} U an iteration, the ledger says {units}"
    assert many.forward - few.forward < 0.02
    assert many.backward - few.backward < 0.02
    assert few.backward <= peak_of_backward(recompute, wide) + SMALL
