"""Training on the digits with the Triton operators, in the interpreter, follows the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import inside, outside, run_inside

from fpdm.config import FixedPointConfig
from fpdm.kernels import implementations, reference
from fpdm.recipes import RECIPES
from fpdm.train import Trainer

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
STEPS = 20


class Plain(Trainer):
    """Without the pictures and the export of its end."""

    def _grid(self) -> None:
        pass

    def _finish(self) -> None:
        self.progress.close()


@outside
def test_interpreter() -> None:
    run_inside(__file__, "-m", "slow")


def losses(out: Path, impl: str) -> list[float]:
    """Of every step: a narrow model, batch 4, N = M = 2."""
    recipe = RECIPES["digits"]
    config = replace(
        recipe,
        model=replace(recipe.model, hidden_size=32, num_heads=2),
        fixed_point=FixedPointConfig(n_max=2, m_max=2),
        execution=replace(recipe.execution, impl=impl),  # type: ignore[arg-type]
        train=replace(
            recipe.train, out=str(out), name=impl, steps=STEPS, batch=4, log_every=1, save_every=0,
            device="cpu",
        ),
    )  # fmt: skip
    trainer = Plain(config)
    trainer.run()
    return [json.loads(row)["loss"] for row in trainer.directory.metrics.read_text().splitlines()]


def worst(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) == STEPS
    return max(abs(a - b) / b for a, b in zip(found, wanted))


@inside
@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
def test_training_follows_the_reference(impl: str, tmp_path: Path) -> None:
    wanted = losses(tmp_path, "reference")
    implementations.reset_counters()
    assert worst(losses(tmp_path, impl), wanted) < 1e-4
    ran = implementations.counters()
    used = {name for by_impl in ran.values() for name in by_impl}
    assert used == {impl, "library"}
    assert {op for op, by_impl in ran.items() if "library" in by_impl} == {
        "linear", "linear_dgrad", "linear_wgrad",
    }  # fmt: skip
    # every operator of a training step: the others are parts of these
    assert {op for op, by_impl in ran.items() if impl in by_impl} == {
        "adaln", "adaln_backward", "adaln_linear", "attention", "attention_backward",
        "gate_residual_backward", "gelu_backward", "linear_add_gelu", "linear_gate_residual",
        "linear_gate_residual_adaln",
    }  # fmt: skip


def test_a_product_short_of_a_token_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask one row short in the weight gradients: 1 of 64 rows."""
    wanted = losses(tmp_path / "right", "reference")
    real = reference.linear_wgrad

    def short(dy: torch.Tensor, *operands: Any) -> None:
        dy = dy.clone()
        dy.view(-1, dy.shape[-1])[-1] = 0
        real(dy, *operands)

    monkeypatch.setattr(reference, "linear_wgrad", short)
    implementations._operator_set.cache_clear()
    try:
        assert worst(losses(tmp_path / "short", "reference"), wanted) > 1e-4
    finally:
        implementations._operator_set.cache_clear()
