"""Pictures: grids of samples as PNG, curves of a run, residuals of a sampler.

Grids need nothing but zlib. The plots need matplotlib (``pip install "fpdm[eval]"``); without it
they print one line and return False, so that a run never fails over a picture. Every file is
written whole or not at all.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpdm.config import ConfigError
from fpdm.files import atomic_write
from fpdm.settings import one_line

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MIN_SIDE = 48  # pixels; smaller images are enlarged unless the caller gives a scale
_LINE = 96  # gray of the separators
_MOST_POINTS = 20_000  # of an averaged curve; a picture is some 900 pixels wide
_WINDOWS = 25  # a curve is averaged over about this part of its rows
# 3 x 5 dots per digit, rows from the top
_GLYPHS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip


def to_uint8(x: Tensor) -> np.ndarray:
    """(N,C,h,w) in [-1,1] -> (N,h,w,C) uint8: clamp(127.5 x + 128, 0, 255) truncated, NaN black."""
    pixels = (127.5 * x.detach().float() + 128).nan_to_num(0.0).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_png(pixels: np.ndarray) -> bytes:
    """(h,w,C) uint8, C = 1 (gray) or 3 (RGB), as an 8-bit PNG without line filters."""
    h, w, c = pixels.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), pixels.reshape(h, w * c)], axis=1)
    header = struct.pack(">IIBBBBB", w, h, 8, {1: 0, 3: 2}[c], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return PNG_MAGIC + b"".join(packed)


def decode_png(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The (h,w,C) pixels of a PNG that ``encode_png`` wrote; ValueError for anything else."""
    h, w, c = shape
    start = len(PNG_MAGIC) + 25  # behind the header chunk
    try:
        size, kind = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + 8 + size]
        (crc,) = struct.unpack_from(">I", data, start + 8 + size)
        rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(h, w * c + 1)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"not a PNG of this program: {error}") from error
    whole = len(data) == start + 12 + size + 12
    if kind != b"IDAT" or crc != zlib.crc32(kind + body) or not whole or rows[:, 0].any():
        raise ValueError("not a PNG of this program")
    return rows[:, 1:].reshape(shape)


def make_grid(
    x: Tensor, columns: int, scale: int | None = None, labels: Sequence[int] | None = None
) -> np.ndarray:
    """Images (N,C,h,w) in [-1,1], row by row, as one picture (H,W,1 or 3) uint8.

    C = 1 or 2 shows the first channel in gray, C >= 3 the first three as RGB (latents are shown as
    they are, not decoded). Pixels are repeated ``scale`` times; None is the least factor that makes
    an image 48 pixels high. ``labels``: one non-negative integer per row, drawn at its left.
    Raises ConfigError for other shapes or numbers.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ConfigError(f"grid: got images of shape {tuple(x.shape)}, expected (N,C,h,w)")
    if columns < 1 or (scale is not None and scale < 1):
        raise ConfigError(f"grid: got columns={columns}, scale={scale}, expected at least 1")
    images = to_uint8(x[:, :3] if x.shape[1] >= 3 else x[:, :1])
    n, h, w, c = images.shape
    rows = math.ceil(n / columns)
    if labels is not None and (len(labels) != rows or min(labels) < 0):
        raise ConfigError(f"grid: got labels {list(labels)}, expected {rows} integers >= 0")
    scale = scale or math.ceil(_MIN_SIDE / h)
    gap = max(1, scale // 3)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale, w * scale
    margin, dot = 0, max(1, h // 8)
    if labels is not None:
        margin = gap + dot * (4 * max(len(str(label)) for label in labels) + 1)
    shape = (gap + rows * (h + gap), margin + gap + columns * (w + gap), c)
    grid = np.full(shape, _LINE, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), margin + gap + i % columns * (w + gap)
        grid[top : top + h, left : left + w] = image
    for i, label in enumerate(labels or ()):
        top = gap + i * (h + gap) + max(0, (h - 5 * dot) // 2)
        _draw_number(grid, label, top, gap + dot, dot)
    return grid


def _draw_number(grid: np.ndarray, number: int, top: int, left: int, dot: int) -> None:
    """White digits of 3 x 5 dots; what lies outside the picture is cut off."""
    for digit in str(number):
        glyph = np.array([int(bit) for bit in _GLYPHS[int(digit)]], bool).reshape(5, 3)
        glyph = glyph.repeat(dot, axis=0).repeat(dot, axis=1)
        part = grid[top : top + 5 * dot, left : left + 3 * dot]
        part[glyph[: part.shape[0], : part.shape[1]]] = 255
        left += 4 * dot


def save_grid(
    x: Tensor,
    path: str | Path,
    columns: int,
    scale: int | None = None,
    labels: Sequence[int] | None = None,
) -> None:
    """Write ``make_grid`` of the same arguments as an 8-bit PNG, atomically.

    Raises ConfigError for a bad shape or number, UserError when the file cannot be written.
    """
    atomic_write(path, encode_png(make_grid(x, columns, scale, labels)))


def _figure(width: float, height: float, wanted: str) -> Any:
    """A matplotlib figure outside pyplot's global state, or None after saying what is missing."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # its settings may be broken, and MPLBACKEND names anything
        why = 'is not installed (pip install "fpdm[eval]")'
        if not isinstance(error, ImportError):
            why = f"cannot be loaded: {one_line(error)}"
        print(f"{wanted}: not drawn, matplotlib {why}", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(path, buffer.getvalue())


def read_history(path: str | Path) -> dict[str, np.ndarray]:
    """Columns of a metrics file, float64, one entry per row that has a step, in the order of steps.

    A value that is missing, null or no number is NaN; a line that a kill cut short is left out; a
    step that appears twice (a run resumed) counts as it was last written. Raises UserError when the
    file cannot be read.
    """
    steps = array("d")
    columns: dict[str, array[float]] = {}
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    step = float(row["step"])
                except (ValueError, KeyError, TypeError):
                    continue
                for name in row.keys() - columns.keys():
                    columns[name] = array("d", [math.nan]) * len(steps)
                for name, column in columns.items():
                    column.append(_number(row.get(name)))
                steps.append(step)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    order = np.argsort(steps, kind="stable")
    ordered = np.array(steps)[order]
    kept = order[np.append(ordered[1:] != ordered[:-1], True)] if len(order) else order
    return {name: np.array(columns[name])[kept] for name in sorted(columns)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def smooth(values: np.ndarray, decay: float) -> np.ndarray:
    """Running average s_i = sum_j<=i decay^(i-j) v_j / sum_j<=i decay^(i-j) over the finite v_j;
    NaN before the first of them."""
    total = weight = 0.0
    out = np.full(len(values), math.nan)
    for i, value in enumerate(values):
        total, weight = decay * total, decay * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
        if weight:
            out[i] = total / weight
    return out


def plot_history(metrics: str | Path, path: str | Path) -> bool:
    """Loss, relative residual and iterations n, m over the steps of a ``metrics.jsonl``, as a PNG.

    True when the picture was written; False, after one line on stderr, when matplotlib is missing
    or there are no rows. Raises UserError when a file cannot be read or written.
    """
    history = read_history(metrics)
    steps = history.get("step", np.zeros(0))
    if not len(steps):
        print(f"{path}: not drawn, {metrics} has no rows", file=sys.stderr)
        return False
    figure = _figure(8.0, 8.0, str(path))
    if figure is None:
        return False
    loss, residual, iterations = figure.subplots(3, 1, sharex=True)
    for name in ("loss", "mse", "vb"):
        _curve(loss, steps, history.get(name), name)
    # a row's residual is its last step's, after as many iterations as that step drew: no curve
    values = history.get("residual", np.zeros(0))
    if (values > 0).any():
        residual.semilogy(steps, values, ".", markersize=3)
    for name in ("n", "m"):
        if name in history:
            iterations.plot(*_thinned(steps, history[name]), ".", markersize=3, label=name)
    for axis, title in (
        (loss, "loss"), (residual, "residual after a step's own n + m"),
        (iterations, "iterations n, m"),
    ):  # fmt: skip
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="upper right")
    iterations.set_xlabel("step")
    _save(figure, path)
    return True


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours where there are many more rows than pixels; each at its last step."""
    each = -(-len(values) // _MOST_POINTS)
    if each == 1:
        return steps, values
    starts = np.arange(0, len(values), each)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(float), starts)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    with np.errstate(invalid="ignore"):
        return steps[np.minimum(starts + each, len(steps)) - 1], total / count


def _curve(axis: Any, steps: np.ndarray, values: np.ndarray | None, name: str) -> None:
    """Raw values faint, their running average strong; logarithmic where every value is positive."""
    if values is None or not np.isfinite(values).any():
        return
    values = np.where(np.isfinite(values), values, math.nan)
    steps_, means = _thinned(steps, values)
    decay = min(0.98, max(0.0, 1 - _WINDOWS / len(means)))
    marker = "." if np.isfinite(values).sum() == 1 else ""
    (line,) = axis.plot(steps_, smooth(means, decay), marker=marker, label=name)
    axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
    if axis.get_yscale() == "linear" and np.nanmin(values) > 0:
        axis.set_yscale("log")
    elif np.nanmin(values) <= 0:
        axis.set_yscale("symlog", linthresh=1e-3)


def plot_residuals(residual: Tensor, timesteps: Sequence[int], path: str | Path) -> bool:
    """Relative residual of a sampler, (S,K) or (S,K,B) averaged over B, as a PNG: timesteps t of
    the plan from noise (top) to image, iterations from left to right, colour logarithmic.

    NaN marks iterations that a timestep did not run. True when the picture was written; False,
    after one line on stderr, when matplotlib is missing or no iteration was run (a DiT). Raises
    ConfigError for other shapes.
    """
    if residual.dim() not in (2, 3) or len(residual) != len(timesteps):
        raise ConfigError(
            f"residual: got shape {tuple(residual.shape)} for {len(timesteps)} timesteps, "
            "expected (S,K) or (S,K,B)"
        )
    values = residual.detach().double().cpu()
    values = values.nanmean(dim=2) if values.dim() == 3 else values
    table = np.ma.masked_invalid(values.numpy())
    table = np.ma.masked_less_equal(table, 0.0)
    if not table.count():
        print(f"{path}: not drawn, no iteration has a residual", file=sys.stderr)
        return False
    figure = _figure(2.5 + 0.35 * table.shape[1], 1.5 + 0.2 * table.shape[0], str(path))
    if figure is None:
        return False
    from matplotlib.colors import LogNorm

    axis = figure.subplots()
    low = float(table.min())
    norm = LogNorm(low, max(float(table.max()), 1.001 * low))
    image = axis.imshow(table, norm=norm, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(table.shape[1]), [str(j + 1) for j in range(table.shape[1])])
    axis.set_yticks(range(table.shape[0]), [str(t) for t in timesteps])
    axis.set_xlabel("iteration of the timestep")
    axis.set_ylabel("timestep t, from noise to image")
    figure.colorbar(image, label="relative residual")
    _save(figure, path)
    return True


def plot_report(
    runs: Mapping[str, tuple[Tensor, Tensor]],
    timesteps: Sequence[int],
    path: str | Path,
    tol: float = 0.0,
) -> bool:
    """Where the compute went (paper Fig. 3) and what it bought (Fig. 6b, c), as a PNG.

    runs: title -> residual (S,K,B), NaN where an iteration was not run, and iterations (S,B) of the
    same branch; timesteps (S,) from noise to image; tol: drawn as a line. Left: iterations per
    timestep, mean and 10 % to 90 % of the samples. Then, one axis per run, the median residual
    against the iteration, a line per timestep, and 10 % to 90 % of the samples at the first, middle
    and last of them; a sample that has stopped keeps its last residual.

    True when the picture was written; False, after a line on stderr, without matplotlib or without
    iterations. Raises ConfigError for shapes that do not fit.
    """
    count = len(timesteps)
    for residual, ran in runs.values():
        if residual.dim() != 3 or (count, residual.shape[2]) != (len(residual), *ran.shape[1:]):
            raise ConfigError(
                f"residual, iterations: got {tuple(residual.shape)}, {tuple(ran.shape)} for "
                f"{count} timesteps, expected (S,K,B), (S,B)"
            )
    if not any(residual.isfinite().any() for residual, _ in runs.values()):
        print(f"{path}: not drawn, no iteration has a residual", file=sys.stderr)
        return False
    figure = _figure(3.4 + 3.1 * len(runs), 4.2, str(path))
    if figure is None:
        return False
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots(1, 1 + len(runs), width_ratios=[3.0] + [3.4] * len(runs))
    _plot_iterations(axes[0], runs, timesteps)
    scale = ScalarMappable(Normalize(0, max(timesteps)), colormaps["viridis"])
    for axis, (title, (residual, ran)) in zip(axes[1:], runs.items()):
        _plot_paths(axis, residual, ran, timesteps, scale.to_rgba)
        axis.set_title(f"{title}\nmedian, 10-90 % of {residual.shape[2]} images", fontsize=10)
        axis.sharey(axes[1])
        if tol:
            axis.axhline(
                tol, color="black", linestyle="--", linewidth=1, label=f"tolerance {tol:g}"
            )
            axis.legend(loc="upper right")
    axes[1].set_ylabel("relative residual |f(x) - x| / |f(x)|")
    figure.colorbar(scale, ax=axes[-1], label="timestep t (0: image)")
    _save(figure, path)
    return True


def _plot_iterations(
    axis: Any, runs: Mapping[str, tuple[Tensor, Tensor]], timesteps: Sequence[int]
) -> None:
    """Bars of the iterations per timestep, side by side for the runs."""
    place, width = np.arange(len(timesteps)), 0.8 / len(runs)
    for index, (title, (_, ran)) in enumerate(runs.items()):
        values = ran.detach().double().cpu()
        mean = values.mean(1)
        low, high = values.quantile(0.1, dim=1), values.quantile(0.9, dim=1)
        # a mean may lie outside of them
        spread = torch.stack([mean - low, high - mean]).clamp_min(0).numpy()
        where = place + (index + 0.5) * width - 0.4
        axis.bar(where, mean.numpy(), width, yerr=spread, capsize=2, label=title)
    every = -(-len(place) // 10)
    axis.set_xticks(place[::every], [str(t) for t in timesteps[::every]], rotation=60)
    axis.set(xlabel="timestep t, from noise to image", ylabel="iterations per image: mean, 10-90 %")
    axis.legend(loc="best")


def _plot_paths(
    axis: Any, residual: Tensor, ran: Tensor, timesteps: Sequence[int], colour: Any
) -> None:
    """Median residual of every timestep; the spread of three."""
    values, last = residual.detach().double().cpu(), (ran.cpu() - 1).clamp_min(0)
    steps = torch.arange(values.shape[1]).view(1, -1, 1)
    held = values.gather(1, torch.minimum(steps.expand_as(values), last.unsqueeze(1)))
    low, median, high = (held.nanquantile(q, dim=2).numpy() for q in (0.1, 0.5, 0.9))
    x = np.arange(1, values.shape[1] + 1)
    for index, t in enumerate(timesteps):
        axis.plot(
            x, median[index], color=colour(t), linewidth=1.2, marker="." if len(x) < 3 else ""
        )
        if index in (0, len(timesteps) // 2, len(timesteps) - 1):
            axis.fill_between(x, low[index], high[index], color=colour(t), alpha=0.2, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("iteration of the timestep")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def plot_sweep(
    rows: Sequence[dict[str, Any]], path: str | Path, references: Mapping[str, float] | None = None
) -> bool:
    """Quality against iterations per timestep at fixed budgets (paper Fig. 4), as a PNG.

    rows: {"budget", "k", "seed", "frechet", "accuracy"}; every seed is a dot, lines go through the
    means. ``references``: Frechet distances of real data, drawn as lines. False without matplotlib.
    """
    figure = _figure(9.0, 4.4, str(path))
    if figure is None:
        return False
    frechet, accuracy = figure.subplots(1, 2)
    for index, budget in enumerate(sorted({row["budget"] for row in rows})):
        mine = [row for row in rows if row["budget"] == budget]
        ks = sorted({row["k"] for row in mine})
        for axis, name in ((frechet, "frechet"), (accuracy, "accuracy")):
            mean = [np.mean([row[name] for row in mine if row["k"] == k]) for k in ks]
            axis.plot(ks, mean, color=f"C{index}", label=f"{budget} blocks")
            dots = [row["k"] for row in mine], [row[name] for row in mine]
            axis.plot(*dots, ".", color=f"C{index}", alpha=0.6)
    for style, (name, value) in zip((":", "--"), (references or {}).items()):
        frechet.axhline(value, color="black", linestyle=style, linewidth=1, label=name)
    frechet.set_yscale("log")
    frechet.set_ylabel("Frechet distance (lower is better)")
    accuracy.set_ylabel("accuracy (share recognised as its label)")
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"lines: means; dots: each of {seeds} sampling seeds", fontsize=10)
    for axis in (frechet, accuracy):
        axis.set_xscale("log")
        axis.set_xlabel("iterations k per timestep")
        ks = sorted({row["k"] for row in rows})
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    for which in (frechet.yaxis.set_major_formatter, frechet.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    handles, labels = frechet.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    _save(figure, path)
    return True
