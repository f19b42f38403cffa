"""What the fixed-point layer keeps and needs with the Triton operators, in the interpreter: storage
by storage, without the interpreter's own copies of operands. The allocator's count on a GPU:
tests/test_memory_gpu.py."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from interpreter import inside, outside, run_inside
from test_fixed_point import problem
from test_fixed_point_memory import LEDGER, Passes, passes, peak_of_backward
from torch.utils._python_dispatch import _disable_current_modes

from fpdm import walk
from fpdm.kernels import reference

pytest.importorskip("triton")
# sums of rows, and 16 bytes a row and head of attention, beside 1 U of 64 tokens
SMALL = 0.5


@outside
def test_interpreter() -> None:
    run_inside(__file__)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel allocates nothing; a weight gradient is a product that adds, without copies in
    float32 of its operands."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def uncounted(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(self, *args, **kwargs)
        # the interpreter's copies hang in a cycle with the storages they are of
        gc.collect(1)

    def wgrad(dy: torch.Tensor, x: torch.Tensor, dweight: torch.Tensor, dbias: Any) -> None:
        assert dbias is None
        with _disable_current_modes():
            g = dy.reshape(-1, dy.shape[-1]).to(dweight.dtype)
            dweight.addmm_(g.t(), x.reshape(-1, x.shape[-1]).to(dweight.dtype))

    monkeypatch.setattr(GridExecutor, "__call__", uncounted)
    monkeypatch.setattr(reference, "linear_wgrad", wgrad)


def measured(m: int, impl: str, recompute: str, wide: bool) -> Passes:
    p: dict[str, Any] = problem(d=48, t=64, b=1, dtype=torch.float16)
    p["params"] = [q.float() for q in p["params"]]
    return passes(p, m, 1, impl, recompute, wide=wide)


@inside
@pytest.mark.parametrize(
    ("impl", "recompute", "wide"),
    [*(("triton", *key) for key in LEDGER), ("triton-fused", "full", False),
     ("triton-fused", "none", False)],
)  # fmt: skip
def test_memory_ledger(impl: str, recompute: str, wide: bool) -> None:
    """Of an iteration, the ledger's, and of the backward what it may need beside that."""
    one, two = (measured(m, impl, recompute, wide) for m in (1, 2))
    assert abs(two.kept - one.kept - LEDGER[recompute, wide]) < 0.02
    # of one iteration alone the gradient of x is not wanted
    assert one.backward <= two.backward <= peak_of_backward(recompute, wide) + SMALL


@inside
def test_a_waste_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of u rounded into 2 U of its own, as it once was."""
    real = walk._injection_gradients

    def wasteful(run: Any, i: torch.Tensor, du: torch.Tensor, *rest: Any) -> None:
        wide = du.to(i.dtype)
        real(run, i, du, *rest)
        del wide

    monkeypatch.setattr(walk, "_injection_gradients", wasteful)
    needed = measured(1, "triton", "none", False).backward
    assert needed > peak_of_backward("none", False) + SMALL
