"""Tables and pictures from the JSON of ``python -m bench``: no number is typed by hand."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from bench import cost, memory
from bench.rows import OURS
from fpdm.recipes import MODEL_PRESETS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def duration(seconds: float) -> str:
    """With a unit, three digits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["suite"], row["name"], "failed: " + row["error"][:80], "", "", ""]
    if OURS not in row["arms"]:
        why = row["missing"].get(OURS, "")
        return [row["suite"], row["name"], "not measured: " + why, "", "", ""]
    ours = row["arms"][OURS]
    others = [
        f"{name} {arm['ratio']:.2f}x" for name, arm in row["arms"].items() if name != OURS
    ] + [f"{name}: {why}" for name, why in row["missing"].items()]
    shares = [f"GEMM {row['gemm_share']:.0%}"] if "gemm_share" in row else []
    shares += [f"copy {row['copy_share']:.0%}"] if "copy_share" in row else []
    peak = f"{ours['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in ours else ""
    return [row["suite"], row["name"], f"{duration(ours['median_s'])} +-{ours['spread']:.0%}",
            "; ".join(others), ", ".join(shares), peak]  # fmt: skip


HEAD = ["suite", "row", "fpdm (median, IQR)", "baselines, times ours", "of the ceiling", "peak"]


def table(result: dict[str, Any]) -> str:
    """Aligned text."""
    rows = [HEAD, *(_cells(r) for r in result["rows"])]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    tops = ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in result["ceilings"].items())
    return "\n".join([*lines, f"ceilings: {tops}"])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def readme_section(results: list[dict[str, Any]]) -> str:
    """What is measured, on what, against what; what is not says so."""
    parts = []
    for result in results:
        v = result["versions"]
        parts.append(
            f"Measured on {result['processor'].get('name')} ({result['machine']}), torch "
            f"{v['torch']}, Python {v['python']}, commit {result['commit']}, by "
            f"`{result['command'].strip()}`. Baselines run in the same process, interleaved; "
            "`2.0x` means that the baseline takes twice our time.\n"
        )
        wanted = [r for r in result["rows"] if r["suite"] in ("network", "training", "sampler")]
        parts.append(markdown(HEAD[1:], [_cells(r)[1:] for r in wanted]) + "\n")
    if not any(r.get("gpu") for r in results):
        parts.append("On a GPU: not measured.\n")
    config = MODEL_PRESETS["fpdm-xl-2"]
    rows = [
        [str(r["device"]), *(f"{r[s]:.1f}" for s in (*cost.STYLES, "gemm + attention"))]
        for r in cost.predictions(config, 64)
    ]
    parts.append(
        "A model, not a measurement: microseconds per sample and iteration of XL/2 at batch 64 in "
        "half precision, from counted FLOPs and bytes (`bench/cost.py`).\n"
    )
    parts.append(markdown(["device", *cost.STYLES, "GEMM + attention"], rows) + "\n")
    kinds = ("parameters", "gradients", "optimizer", "average", "copies", "saved", "total")
    rows = [
        [r["model"], r["arm"], *(f"{r[k]:.1f}" for k in kinds)] for r in memory.table()
    ]  # fmt: skip
    parts.append(
        "Memory of a training step in GB at batch 64, n = m = 12, counted storage by storage "
        "(`bench/memory.py`). The paper reports 10.2 GB for FPDM and 25.2 GB for DiT, both with "
        "checkpointing of what its code checkpoints.\n"
    )
    parts.append(markdown(["model", "arm", *kinds], rows))
    return "\n".join(parts)


def write_readme(path: Path, results: Path) -> bool:
    """Puts the section between the markers; False when the README has none."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        return False
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*/bench.json"))]
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    path.write_text(f"{head}{BEGIN}\n{readme_section(found)}\n{END}{tail}")
    return True


def _picture(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", bbox_inches="tight")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}" style="max-width:100%">'


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _parts_picture(result: dict[str, Any]) -> str:
    """Time of every operator against the floor that its bytes and FLOPs allow."""
    pictures = []
    names = sorted({r["name"].rsplit(" ", 1)[0] for r in _rows(result, "operators")})
    for setting in names:
        rows = [r for r in _rows(result, "operators") if r["name"].rsplit(" ", 1)[0] == setting]
        figure, axes = _axes(f"{setting}: operators against their floor", "microseconds", "")
        dtype = "bfloat16" if "bfloat16" in setting else "float32"
        labels = [r["name"].rsplit(" ", 1)[1] for r in rows]
        tops = result["ceilings"]
        floor = [
            1e6 * max(r["bytes"] / tops["copy"], r["flops"] / tops[f"gemm {dtype}"]) for r in rows
        ]
        plain = [1e6 * r["arms"]["plain PyTorch"]["median_s"] for r in rows]
        ours = [1e6 * r["arms"][OURS]["median_s"] for r in rows]
        axes.barh(labels, plain, color="#d0d0d0", label="plain PyTorch")
        axes.barh(labels, ours, height=0.5, color="#3070b0", label="fpdm")
        axes.barh(labels, floor, height=0.2, color="#c03030", label="floor")
        axes.legend()
        axes.invert_yaxis()
        pictures.append(_picture(figure))
    return "\n".join(pictures)


def _rows(result: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    return [r for r in result["rows"] if r["suite"] == suite and "error" not in r]


def _batch_picture(result: dict[str, Any]) -> str:
    figure, axes = _axes("sampling: images per second against batch", "batch", "images/s")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(result, "sampler"):
        label, batch, dtype, *rest = row["name"].split(" ")
        key = " ".join((label, dtype, *rest))
        speed = row["images"] / row["arms"][OURS]["median_s"]
        lines.setdefault(key, []).append((int(batch[1:]), speed))
    for key, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=key)
    axes.legend()
    return _picture(figure)


def _memory_picture() -> str:
    from fpdm.config import ExecutionConfig

    config = MODEL_PRESETS["fpdm-xl-2"]
    figure, axes = _axes("XL/2, batch 64: memory of a training step", "m", "GB")
    ms = (1, 4, 8, 12)
    for mode in ("none", "elementwise", "full"):
        execution = ExecutionConfig(recompute=mode)  # type: ignore[arg-type]
        totals = [memory.training(config, 64, execution, 0, m).total / memory.GB for m in ms]
        axes.plot(ms, totals, marker="o", label=f"recompute {mode}")
    plain = [memory.plain(config, 64, 0, m).total / memory.GB for m in ms]
    axes.plot(ms, plain, marker="o", color="#909090", label="published, bf16 eager")
    axes.legend()
    return _picture(figure)


def _cost_picture() -> str:
    config = MODEL_PRESETS["fpdm-xl-2"]
    figure, axes = _axes("XL/2, batch 64, H200 (model): network against k", "k", "us per sample")
    device, ks = cost.DEVICES["H200"], range(1, 69)
    for style in cost.STYLES:
        one = 1e6 * cost.seconds(cost.iteration(config, 64, 2, style), device) / 64
        axes.plot(ks, [k * one for k in ks], label=style)
    axes.legend()
    return _picture(figure)


def write_html(result: dict[str, Any], path: Path) -> Path:
    """One self-contained page."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(r)) + "</tr>"
        for r in result["rows"]
    )
    head = "".join(f"<th>{h}</th>" for h in HEAD)
    facts = {k: v for k, v in result.items() if k not in ("rows", "processor")}
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>fpdm bench</title><style>body{font:14px "
        "sans-serif;max-width:1100px;margin:2em auto}td,th{padding:2px 8px;text-align:left;"
        "border-bottom:1px solid #ddd}pre{white-space:pre-wrap}</style>"
        f"<h1>fpdm bench: {html.escape(result['machine'])}</h1>"
        f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"
        f"<table><tr>{head}</tr>{rows}</table>"
        f"<h2>Parts of an iteration</h2>{_parts_picture(result)}"
        f"<h2>Sampling</h2>{_batch_picture(result)}"
        f"<h2>Memory</h2>{_memory_picture()}<h2>Cost</h2>{_cost_picture()}\n"
    )
    return path
