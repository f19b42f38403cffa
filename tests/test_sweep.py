"""The sweep: its points, its file, continuing, its command."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import read_png

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
    text = (tmp_path / "sweep.json").read_text()
    assert json.loads(text) == {"settings": {"a": 1}, "rows": rows}
    assert len(text.splitlines()) == 5 + len(rows)
    # points that were left out before come where they belong
    wider = sweep.points(DIGITS, (12, 140), (2,), 1000)
    rows = sweep.run(wider, range(2), measure, tmp_path, {"a": 1})
    assert [(r["budget"], r["k"], r["seed"]) for r in rows[:3]] == [
        (12, 2, 0),
        (12, 2, 1),
        (140, 1, 0),
    ]
    assert len(calls) == 6
    assert (tmp_path / "sweep.png").read_bytes().startswith(figures.PNG_MAGIC)
    with pytest.raises(ConfigError, match="6 rows of another model or other settings; expected"):
        sweep.run(wanted[:1], range(1), measure, tmp_path, {"a": 2})
    assert len(json.loads((tmp_path / "sweep.json").read_text())["rows"]) == len(calls) == 6


def test_two_sweeps_at_once(tmp_path: Path) -> None:
    """Each keeps the rows that the other one writes meanwhile, and other settings are refused."""
    wanted = sweep.points(DIGITS, (140,), (1, 2, 3, 5), 1000)
    row = {"frechet": 2.0, "accuracy": 0.5}

    def meanwhile(point: Point, seed: int) -> dict[str, float]:
        sweep.run(wanted[2:], range(1), lambda point, seed: row, tmp_path, {"a": 1})
        with pytest.raises(ConfigError, match="other settings; expected another directory"):
            sweep.run(wanted, range(1), lambda point, seed: row, tmp_path, {"a": 2})
        return row | {"frechet": 1.0}

    rows = sweep.run(wanted[:3], range(1), meanwhile, tmp_path, {"a": 1})
    # of a point that both have measured the first row stays
    assert [(r["k"], r["frechet"]) for r in rows] == [(1, 1.0), (2, 1.0), (3, 2.0), (5, 2.0)]
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.json", "sweep.png"]


def test_a_sweep_without_a_row_yet_takes_no_directory(tmp_path: Path) -> None:
    """One that was stopped before its first row has nothing to lose."""
    row = {"frechet": 2.0, "accuracy": 0.5}

    def stopped(point: Point, seed: int) -> dict[str, float]:
        raise KeyboardInterrupt

    wanted = sweep.points(DIGITS, (140,), (1,), 1000)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(wanted, range(1), stopped, tmp_path, {"a": 1})
    rows = sweep.run(wanted, range(1), lambda point, seed: row, tmp_path, {"a": 2})
    assert len(rows) == 1
    with pytest.raises(ConfigError, match="1 rows of another model or other settings"):
        sweep.run(wanted, range(1), lambda point, seed: row, tmp_path, {"a": 1})


def test_rows_from_many_threads(tmp_path: Path) -> None:
    def write(k: int) -> None:
        row = {"budget": 9, "k": k, "seed": 0, "frechet": 1.0, "accuracy": 0.5}
        sweep._add(tmp_path / "sweep.json", {}, [row])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    assert [r["k"] for r in sweep._add(tmp_path / "sweep.json", {})] == list(range(40))


def test_a_picture_of_no_sweep_stays(tmp_path: Path) -> None:
    (tmp_path / "sweep.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds sweep.png and no sweep.json, expected another"):
        sweep.run([], range(1), lambda point, seed: {}, tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.png"]


def test_points_are_taken_once_or_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"budgets": "20,20", "ks": "1,1,500,0", "seeds": "2"}
    found, seeds = sweep.asked(DIGITS, asked, 1000)
    assert ([(p.budget, p.k) for p in found], seeds) == ([(20, 1)], 2)
    assert capsys.readouterr().out == (
        "left out: got 20 x 500, 20 x 0 (budget x k), expected k at least 1 and 1 to 1000 "
        "timesteps\n"
    )
    sweep.asked(DIGITS, asked | {"ks": "1"}, 1000)
    assert capsys.readouterr().out == ""


def test_what_it_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every point how long the others will take by their blocks, and at the end the means."""
    clock = [0.0]
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: clock[0])

    def measure(point: Point, seed: int) -> dict[str, float]:
        clock[0] += 2.0 * (point.budget - point.stranded)
        return {"frechet": 1.0 + point.k + seed, "accuracy": 0.5 + 0.25 * seed}

    wanted = [Point(30, 1, 10, 0), Point(30, 2, 7, 2), Point(60, 1, 20, 0)]
    sweep.run(wanted, range(2), measure, tmp_path, {})
    lines = capsys.readouterr().out.splitlines()
    # 236 blocks of two seconds: 30 twice, 28 twice, 60 twice
    assert [line.partition("about ")[2] for line in lines[:6]] == [
        "7 min left", "6 min left", "5 min left", "4 min left", "2 min left", "",
    ]  # fmt: skip
    assert lines[6:10] == [
        "   k       30 blocks       60 blocks",
        "   1     2.500 0.625     2.500 0.625",
        "   2     3.500 0.625         -     -",
        "Frechet distance and accuracy, means over the seeds",
    ]
    # a second run has nothing to wait for
    sweep.run(wanted, range(2), measure, tmp_path, {})
    assert capsys.readouterr().out.splitlines()[:4] == lines[6:10]


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
    for ignored in (["--sample.budget", "12"], ["--sets", "4"], ["--strict"]):
        with pytest.raises(ConfigError, match=f"--sweep: got {ignored[0]}, expected --budgets"):
            evaluate.command(["--sweep", *ignored])
    for seeds in ("0", "3,4"):
        with pytest.raises(ConfigError, match=f"--seeds: got {seeds}, expected how many"):
            evaluate.command(["--sweep", "--seeds", seeds])


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"rows": 3, "settings": {}}', '{"rows": [{}], "settings": {}}', "\xff",
        '{"rows": [{"budget": 1, "k": 1, "frechet": 1, "accuracy": 1}], "settings": {}}',
    ],
)  # fmt: skip
def test_damaged_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"{path}, which is damaged, expected"):
        sweep.run([], range(1), lambda point, seed: {}, tmp_path, {})
    assert path.read_bytes() == text.encode("latin-1")


def test_report_picture(tmp_path: Path) -> None:
    iterations = torch.randint(1, 4, (4, 5))
    residual = torch.rand(4, 3, 5).masked_fill(
        torch.arange(3).view(1, 3, 1) >= iterations.unsqueeze(1), float("nan")
    )
    runs = {"reuse none": (residual, iterations), "reuse full": (residual / 9, iterations)}
    assert figures.plot_report(runs, [999, 700, 400, 100], tmp_path / "r.png", tol=0.1)
    wide = read_png(tmp_path / "r.png").shape[1]
    del runs["reuse full"]
    assert figures.plot_report(runs, [999, 700, 400, 100], tmp_path / "r.png")
    assert read_png(tmp_path / "r.png").shape[1] < wide
    with pytest.raises(ConfigError, match="for 3 timesteps"):
        figures.plot_report(runs, [9, 7, 4], tmp_path / "no.png")
    runs = {"reuse none": (residual[:, :0], iterations)}
    assert not figures.plot_report(runs, [9, 7, 4, 1], tmp_path / "no.png")


def test_what_the_report_draws() -> None:
    """Medians over all samples: one that has stopped keeps its last residual, and a NaN is none."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axis, nan = figure.subplots(), float("nan")
    residual = torch.tensor([[[0.5, 0.4, 0.3], [0.2, nan, 0.1], [nan, nan, 0.05]]])
    figures._plot_paths(axis, residual, torch.tensor([[2, 1, 3]]), [999], lambda t: "black")
    (line,) = axis.get_lines()
    # the middle one stopped at 0.4, the first at 0.2
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata() == pytest.approx([0.4, 0.2, 0.2])
    broken = torch.tensor([[[0.5, nan, 0.3], [0.2, nan, 0.1]]])
    figures._plot_paths(axis, broken, torch.tensor([[2, 2, 2]]), [999], lambda t: "black")
    assert axis.get_lines()[1].get_ydata() == pytest.approx([0.4, 0.15])


def test_sweep_picture(tmp_path: Path) -> None:
    rows = [
        {"budget": b, "k": k, "seed": s, "frechet": 1.0 + k / 9, "accuracy": 0.9}
        for b in (140, 280) for k in (1, 8) for s in (0, 1)
    ]  # fmt: skip
    assert figures.plot_sweep(rows, tmp_path / "s.png", {"real halves": 0.9})
    assert (tmp_path / "s.png").read_bytes().startswith(figures.PNG_MAGIC)
