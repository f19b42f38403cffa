"""The sweep: its points, its file, continuing, its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fpdm import evaluate, figures, sweep
from fpdm.config import ConfigError, ModelConfig, SamplerConfig
from fpdm.sweep import Point

DIGITS = ModelConfig(input_size=8, in_channels=1, hidden_size=32, num_heads=2, num_classes=10)


def test_points_spend_the_budget() -> None:
    found = sweep.points(DIGITS, (140, 280), (1, 8, 26), 1000)
    assert len(found) == 6
    for p in found:
        assert p.steps * (2 + p.k) + p.stranded == p.budget
        assert 0 <= p.stranded < 2 + p.k
    config = found[0].config(SamplerConfig(budget=9, reuse="full"))
    assert (config.steps, config.iters, config.budget, config.reuse) == (46, 1, None, "full")


def test_points_that_do_not_exist() -> None:
    assert [p.k for p in sweep.points(DIGITS, (140,), (1, 4, 200), 40)] == [4]
    with pytest.raises(ConfigError, match=r"got budgets \[2\]"):
        sweep.points(DIGITS, (2,), (1,), 1000)
    with pytest.raises(ConfigError, match="got a dit"):
        sweep.points(
            ModelConfig(kind="dit", depth=3, pre_depth=0, post_depth=0), (140,), (1,), 1000
        )


def test_a_second_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []

    def measure(point: Point, seed: int) -> dict[str, float]:
        calls.append((point.k, seed))
        return {"frechet": 1.0 + point.k + seed, "accuracy": 0.5}

    wanted = sweep.points(DIGITS, (140,), (1, 2), 1000)
    sweep.run(wanted[:1], range(2), measure, tmp_path, {"a": 1})
    rows = sweep.run(wanted, range(2), measure, tmp_path, {"a": 1})
    assert calls == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [r["frechet"] for r in rows] == [2.0, 3.0, 3.0, 4.0]
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == rows
    assert (tmp_path / "sweep.png").read_bytes().startswith(figures.PNG_MAGIC)
    sweep.run(wanted[:1], range(1), measure, tmp_path, {"a": 2})
    assert calls[-1] == (1, 0)
    assert len(calls) == 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sweep", "--budgets", "12", "--ks", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert evaluate.command(words) == 0
    (row,) = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert (row["budget"], row["k"], row["steps"]) == (12, 2, 3)
    assert row["frechet"] > 0
    with pytest.raises(ConfigError, match="without --sweep"):
        evaluate.command(["--ks", "2"])
    with pytest.raises(ConfigError, match="--ks: got 'x'"):
        evaluate.command(["--sweep", "--ks", "x"])


def test_report_picture(tmp_path: Path) -> None:
    residual = torch.rand(4, 3, 5)
    residual[0, 2] = float("nan")
    iterations = torch.randint(1, 4, (4, 1, 5))
    assert figures.plot_report(residual, iterations, [999, 700, 400, 100], tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(figures.PNG_MAGIC)
    assert not figures.plot_report(residual[:, :0], iterations, [9, 7, 4, 1], tmp_path / "no.png")
    with pytest.raises(ConfigError, match="for 3 timesteps"):
        figures.plot_report(residual, iterations, [9, 7, 4], tmp_path / "no.png")
