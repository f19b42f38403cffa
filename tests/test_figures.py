"""Pictures read back by Pillow, which wrote none of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import read_png

from fpdm import figures
from fpdm.config import ConfigError, UserError

pytest.importorskip("PIL")


def test_gray_grid_is_read_back_pixel_by_pixel(tmp_path):
    x = torch.linspace(-1, 1, 5 * 64).reshape(5, 1, 8, 8)
    figures.save_grid(x, tmp_path / "g.png", columns=2, scale=1)
    grid = read_png(tmp_path / "g.png")
    assert grid.shape == (1 + 3 * 9, 1 + 2 * 9, 1)
    pixels = (127.5 * x + 128).clamp(0, 255).byte().numpy()
    for i in range(5):
        top, left = 1 + i // 2 * 9, 1 + i % 2 * 9
        assert np.array_equal(grid[top : top + 8, left : left + 8, 0], pixels[i, 0])
    separators = np.ones(grid.shape[:2], bool)
    for i in range(5):
        top, left = 1 + i // 2 * 9, 1 + i % 2 * 9
        separators[top : top + 8, left : left + 8] = False
    assert (grid[separators] == 96).all()  # also where the sixth image would be
    assert [p.name for p in tmp_path.iterdir()] == ["g.png"]


def test_colour_and_latents_show_three_channels(tmp_path):
    x = torch.rand(3, 4, 6, 5) * 2 - 1
    for channels in (3, 4):
        figures.save_grid(x[:, :channels], tmp_path / f"{channels}.png", columns=3, scale=1)
    rgb, latent = read_png(tmp_path / "3.png"), read_png(tmp_path / "4.png")
    assert rgb.shape == (8, 19, 3)
    assert np.array_equal(rgb, latent)
    assert np.array_equal(rgb[1:7, 7:12], figures.to_uint8(x[1:2, :3])[0])
    figures.save_grid(x[:, :2], tmp_path / "2.png", columns=3, scale=1)
    assert read_png(tmp_path / "2.png").shape == (8, 19, 1)


def test_enlarging_repeats_pixels(tmp_path):
    x = torch.rand(1, 1, 8, 8) * 2 - 1
    figures.save_grid(x, tmp_path / "g.png", columns=1, scale=6)
    grid = read_png(tmp_path / "g.png")[2:-2, 2:-2, 0]
    assert np.array_equal(grid, figures.to_uint8(x)[0, :, :, 0].repeat(6, 0).repeat(6, 1))
    figures.save_grid(x, tmp_path / "auto.png", columns=1)
    assert np.array_equal(read_png(tmp_path / "auto.png")[2:-2, 2:-2, 0], grid)
    assert figures.make_grid(torch.zeros(1, 1, 64, 64), 1).shape == (66, 66, 1)


def test_values_outside_the_range_and_nan():
    x = torch.tensor([-9.0, 9.0, math.nan, -math.inf, math.inf, 0.0]).reshape(1, 1, 2, 3)
    assert figures.to_uint8(x).flatten().tolist() == [0, 255, 0, 0, 255, 128]


def test_labels_are_drawn_in_the_margin():
    x = torch.full((4, 1, 8, 8), -1.0)
    plain = figures.make_grid(x, 2, scale=2)
    labelled = figures.make_grid(x, 2, scale=2, labels=[1, 27])
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 0
    assert np.array_equal(labelled[:, margin:], plain)
    ones = [(labelled[rows, :margin] == 255).sum() for rows in (slice(0, 18), slice(18, None))]
    # dots of 2 x 2: a one has 8, a two 11, a seven 7
    assert ones == [8 * 4, 18 * 4]
    assert not (plain == 255).any()


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "labels"),
    [
        ((1, 8, 8), 1, 1, None),
        ((0, 1, 8, 8), 1, 1, None),
        ((2, 1, 8, 8), 0, 1, None),
        ((2, 1, 8, 8), 1, 0, None),
        ((2, 1, 8, 8), 1, 1, [3]),
        ((2, 1, 8, 8), 1, 1, [3, -1]),
    ],
)
def test_bad_grids_are_refused(shape, columns, scale, labels):
    with pytest.raises(ConfigError, match="grid: got"):
        figures.make_grid(torch.zeros(shape), columns, scale, labels)


def test_a_grid_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "g.png"
    figures.save_grid(torch.zeros(1, 1, 8, 8), path, 1)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        figures.save_grid(torch.ones(1, 1, 8, 8), path, 1)
    assert path.read_bytes() == before
    with pytest.raises(UserError):
        figures.save_grid(torch.ones(1, 1, 8, 8), tmp_path / "missing" / "g.png", 1)


# plots


def write_rows(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


ROWS = [
    {"step": 10 * i, "loss": 2.0 / (i + 1), "mse": 1.5 / (i + 1), "vb": 1e-3, "n": i % 4,
     "m": 1 + i % 3, "residual": None if i == 3 else 0.5 ** i, "lr": 1e-3}
    for i in range(1, 30)
]  # fmt: skip


def test_history_is_read_leniently(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [*ROWS, {"step": 10, "loss": 7.0}, {"no": "step"}]
    write_rows(path, rows, tail='[1]\nnull\n{"step": 300, "lo')
    history = figures.read_history(path)
    assert history["step"].tolist() == [10 * i for i in range(1, 30)]
    assert history["loss"][0] == 7.0  # the later of two rows of a step
    assert math.isnan(history["residual"][2])
    with pytest.raises(ConfigError, match="cannot be read"):
        figures.read_history(tmp_path / "none.jsonl")


def test_a_long_history_is_drawn_from_means(tmp_path, monkeypatch):
    """Every row counts in one point, at its last step; gaps are left out."""
    monkeypatch.setattr(figures, "_MOST_POINTS", 4)
    steps, values = np.arange(1.0, 11.0), np.arange(10.0)
    values[3:6], values[7] = math.nan, math.nan
    thin, means = figures._thinned(steps, values)
    assert thin.tolist() == [3, 6, 9, 10]
    assert means[[0, 2, 3]].tolist() == [1.0, 7.0, 9.0]
    assert math.isnan(means[1])
    assert figures._thinned(steps[:4], values[:4])[1] is not means
    assert figures._thinned(steps[:4], values[:4])[0].tolist() == [1, 2, 3, 4]
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "m.jsonl", ROWS)
    assert figures.plot_history(tmp_path / "m.jsonl", tmp_path / "c.png")


def test_smoothing_is_a_weighted_mean_that_skips_gaps():
    out = figures.smooth(np.array([math.nan, 4.0, math.nan, 1.0]), decay=0.5)
    assert math.isnan(out[0])
    assert out[1:].tolist() == [4.0, 4.0, (0.25 * 4 + 1) / 1.25]
    assert figures.smooth(np.full(9, 3.0), 0.9).tolist() == pytest.approx([3.0] * 9)


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], [{"step": 1, "loss": math.nan}], [{"step": 1, "loss": -1.0, "n": 2}]]
)
def test_history_is_plotted(tmp_path, rows, capfd):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "metrics.jsonl", rows)
    assert figures.plot_history(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    pixels = read_png(tmp_path / "curves.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 1
    assert capfd.readouterr().err == ""


def test_one_row_is_a_dot_that_can_be_seen(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = []
    for loss in (0.5, None):
        write_rows(tmp_path / "m.jsonl", [{"step": 30, "loss": loss, "residual": 0.1}])
        assert figures.plot_history(tmp_path / "m.jsonl", tmp_path / "c.png")
        pixels = read_png(tmp_path / "c.png").astype(int)
        third = pixels[: len(pixels) // 3, : pixels.shape[1] * 3 // 4]  # left of the legend
        pictures.append((abs(third[..., 0] - third[..., 2]) > 100).sum())
    assert pictures[0] > 5
    assert pictures[1] == 0


def test_empty_history_is_said_not_drawn(tmp_path, capsys):
    write_rows(tmp_path / "metrics.jsonl", [])
    assert not figures.plot_history(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert "has no rows" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_residuals_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    residual = torch.rand(5, 4, 3)
    residual[2:, 3] = math.nan
    assert figures.plot_residuals(residual, [999, 700, 400, 200, 9], tmp_path / "r.png")
    assert read_png(tmp_path / "r.png").std() > 1
    assert figures.plot_residuals(residual.mean(dim=2), range(5), tmp_path / "s.png")
    with pytest.raises(ConfigError, match="3 timesteps"):
        figures.plot_residuals(residual, [1, 2, 3], tmp_path / "t.png")


def test_model_without_iterations_has_no_residuals(tmp_path, capsys):
    assert not figures.plot_residuals(torch.zeros(5, 0, 3), range(5), tmp_path / "r.png")
    assert "no iteration has a residual" in capsys.readouterr().err


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "metrics.jsonl", ROWS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not figures.plot_history(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not figures.plot_residuals(torch.rand(2, 3), [9, 1], tmp_path / "r.png")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("matplotlib is not installed" in line and "fpdm[eval]" in line for line in lines)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_matplotlib_that_cannot_be_loaded_is_one_line(tmp_path):
    """A notebook hands its back end's name to its children, who do not have it."""
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "metrics.jsonl", ROWS)
    code = "from fpdm import figures; figures.plot_history('metrics.jsonl', 'curves.png')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "bogus"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("curves.png: not drawn, matplotlib cannot be loaded: ")
    assert len(done.stderr.splitlines()) == 1
