"""One self-contained page of a result: pictures first, then every number behind them."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

from bench import machine
from bench.compose import PARTS
from bench.report import (
    LIBRARY,
    PREDICTED,
    ceilings,
    duration,
    every_row,
    origin,
    predictions,
    reason,
    remarks,
    sources,
    unmeasured,
)
from bench.rows import OURS

# of a profile, that are drawn by name
KERNELS = 14
BLUE, RED, GREY = "#2b6cb0", "#c53030", "#cbd5e0"
COLOURS = {
    LIBRARY: "#c53030", "plain PyTorch": "#a0aec0", "published eager": "#4a5568",
    "published eager float32": "#a0aec0", "published compiled": "#dd6b20",
    "published, map compiled": "#f6ad55", "published frozen": "#744210", "DiT by fpdm": "#2f855a",
    "DiT eager": "#9ae6b4", "fpdm without graphs": "#63b3ed",
    "published compiled, replayed": "#c05621",
    "fused": "#805ad5", "foreach": "#d53f8c", "onepass": "#00a3c4",
}  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;
color:#1a202c}h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #e2e8f0}
p.note{color:#4a5568;margin:.3em 0 1em}img{width:100%;display:block;margin:1em 0}
table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:3px 8px;text-align:left;
border-bottom:1px solid #e2e8f0;vertical-align:top}th{background:#f7fafc}
td:nth-child(-n+3),td:nth-child(6){white-space:nowrap}
.wide{width:94vw;margin-left:50%;transform:translateX(-50%);overflow-x:auto}
.wide table{font-size:12px}
dl{display:grid;grid-template-columns:9em 1fr;gap:.1em 1em;margin:1em 0}dt{color:#4a5568}
dd{margin:0}summary{cursor:pointer;margin:1em 0}pre{white-space:pre-wrap;font-size:12px}"""


def figure(width: float = 9.0, height: float = 4.0, columns: int = 1) -> tuple[Any, Any]:
    """A figure outside pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.set_axisbelow(True)
    return drawn, axes


def picture(drawn: Any, alt: str) -> str:
    """The figure inside the page, with no file beside it; its words stay text."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fpdm"}):
        drawn.savefig(data, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{encoded}">'


def label(axis: Any, x: float, y: float, text: str) -> None:
    """Small words right of the end of a bar, over whatever is drawn there."""
    over = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8,
                  color="#4a5568", bbox=over, zorder=5)  # fmt: skip


def rows_of(result: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    """The rows of a suite that have a time of ours."""
    return [r for r in result["rows"] if r["suite"] == suite and reason(r) is None]


def overview(result: dict[str, Any]) -> str:
    """Every baseline's time over ours, row by row: right of 1 we are faster."""
    suites = ("network", "sampler", "training", "optimizer")
    rows = [r for suite in suites for r in rows_of(result, suite)]
    if not rows:
        return ""
    drawn, (axis,) = figure(10, 1.2 + 0.3 * len(rows))
    seen = set()
    for place, row in enumerate(rows):
        for name, arm in row["arms"].items():
            if name != OURS:
                label = None if name in seen else name
                # frozen and compiled often lie on each other
                marker = {LIBRARY: "|", "published frozen": "D"}.get(name, "o")
                axis.plot(arm["ratio"], place, marker, markersize=5 if marker == "D" else 8,
                          markeredgewidth=2 if name == LIBRARY else 0, label=label,
                          color=COLOURS.get(name, "black"), alpha=0.9)  # fmt: skip
                seen.add(name)
    axis.axvline(1, color=BLUE, linewidth=2)
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    fine = (0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 2.5, 3)
    coarse = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
    ticks = [t for t in (fine if high / low < 8 else coarse) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(rows)), [f"{r['suite']}: {r['name']}" for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time over ours (right of the line: fpdm is faster)")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return picture(drawn, "every baseline's time over ours")


def floors(result: dict[str, Any], suite: str) -> str:
    """Time of each part against the floor that its bytes and FLOPs allow, a picture a setting."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows_of(result, suite):
        words = row["name"].split(" ")
        groups.setdefault(" ".join(words[:3]), {})[" ".join(words[3:])] = row
    found = []
    for setting, parts in groups.items():
        whole = parts.pop("whole", None)
        title = setting
        if whole is not None:
            told = (f"{n} {duration(arm['median_s'])}" for n, arm in whole["arms"].items())
            title += ": the whole iteration " + ", ".join(told)
        drawn, (axis,) = figure(10, 1.0 + 0.42 * len(parts))
        draw = _dots if suite == "operators" else _bars
        for place, row in enumerate(parts.values()):
            draw(axis, place, row, origin(result, row)["ceilings"])
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds")
        if suite == "operators":
            # the smallest operator is a hundredth of the largest
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            low, high = axis.get_xlim()
            axis.set_xlim(low, high * 7)
        else:
            axis.margins(x=0.2)
            axis.set_xlim(left=0)
        axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        found.append(picture(drawn, f"{suite}, {setting}: time against the floor"))
    return "\n".join(found)


def _floor(row: dict[str, Any], rates: dict[str, float]) -> tuple[float, float, float, str]:
    """Milliseconds of plain PyTorch, ours and the floor, and our share of the ceiling in words."""
    compute = row["flops"] / machine.gemm_ceiling(rates, row["dtype"])
    move = row["bytes"] / rates["copy"]
    floor = 1e3 * max(compute, move)
    plain, ours = (1e3 * row["arms"][n]["median_s"] for n in ("plain PyTorch", OURS))
    ceiling = "GEMM" if compute > move else "copy"
    return plain, ours, floor, f"fpdm: {floor / ours:.0%} of the {ceiling} ceiling"


def _bars(axis: Any, place: int, row: dict[str, Any], rates: dict[str, float]) -> None:
    plain, ours, floor, told = _floor(row, rates)
    labels = ("plain PyTorch", OURS, "floor") if place == 0 else (None,) * 3
    axis.barh(place - 0.2, plain, 0.34, color=GREY, label=labels[0])
    axis.barh(place + 0.2, ours, 0.34, color=BLUE, label=labels[1])
    axis.plot([floor] * 2, [place - 0.4, place + 0.4], color=RED, linewidth=2, label=labels[2])
    label(axis, max(ours, floor), place + 0.2, told)


def _dots(axis: Any, place: int, row: dict[str, Any], rates: dict[str, float]) -> None:
    """On a logarithmic axis, where a bar would begin anywhere."""
    plain, ours, floor, told = _floor(row, rates)
    labels = ("plain PyTorch", OURS, "floor") if place == 0 else (None,) * 3
    axis.plot([ours, plain], [place] * 2, color=GREY, linewidth=2)
    axis.plot(plain, place, "o", color=COLOURS["plain PyTorch"], markersize=9, label=labels[0])
    axis.plot(ours, place, "o", color=BLUE, markersize=9, label=labels[1])
    axis.plot([floor] * 2, [place - 0.35, place + 0.35], color=RED, linewidth=2, label=labels[2])
    label(axis, 1.05 * max(plain, ours, floor), place, told)


def speed(result: dict[str, Any]) -> str:
    """Images per second against batch, with and without guidance, where there are batches."""
    lines: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows_of(result, "sampler"):
        label, batch, dtype, *rest = row["name"].split(" ")
        for name, arm in row["arms"].items():
            # the float32 baseline of a row in half precision is that of the float32 row
            shown = "float32" if name.endswith(" float32") else dtype
            key = (f"{label} {' '.join(rest)}", shown, name.removesuffix(" float32"))
            points = lines.setdefault(key, {})
            points.setdefault(int(batch[1:]), row["images"] / arm["median_s"])
    sizes = {t: {b for key, p in lines.items() if key[0] == t for b in p} for t, _, _ in lines}
    titles = [title for title, batches in sizes.items() if len(batches) > 1]
    if not titles:
        return ""
    drawn, axes = figure(10, 4, len(titles))
    for axis, title in zip(axes, titles):
        for (mine, dtype, name), points in lines.items():
            # one point is no line: a dtype of one batch is in the table
            if mine == title and len(points) > 1:
                axis.plot(*zip(*sorted(points.items())), label=f"{name}, {dtype}",
                          color=BLUE if name == OURS else COLOURS.get(name),
                          marker="o" if dtype == "float32" else "s")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        batches = sorted(sizes[title])
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.set(xlabel="batch", ylabel="images/s", title=title)
        axis.legend(fontsize=8, frameon=False)
    return picture(drawn, "images per second against batch")


def cost_against_k(result: dict[str, Any]) -> str:
    """One evaluation against k: measured, and DiT as a level."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows_of(result, "network"):
        if "k" not in row:
            continue
        setting = row["name"].rsplit(" k=", 1)[0]
        for name, arm in row["arms"].items():
            time = 1e3 * arm["median_s"] / row["images"]
            series.setdefault(setting, {}).setdefault(name, {})[row["k"]] = time
    wanted = {s: arms for s, arms in series.items() if len(arms[OURS]) > 2}
    if not wanted:
        return ""
    drawn, axes = figure(10, 4.2, len(wanted))
    for axis, (setting, arms) in zip(axes, wanted.items()):
        for name, points in arms.items():
            colour = BLUE if name == OURS else COLOURS.get(name, "black")
            if name.startswith("DiT"):
                axis.axhline(next(iter(points.values())), color=colour, linestyle="--", label=name)
            elif len(points) > 1:
                axis.plot(*zip(*sorted(points.items())), marker="o", color=colour, label=name)
            else:
                axis.plot(*zip(*points.items()), "s", color=colour, label=name)
        axis.set(title=f"{setting}: measured", xlabel="iterations k", ylabel="ms per sample")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    return picture(drawn, "cost of one evaluation against k")


def kernels(result: dict[str, Any]) -> str:
    """Device time by kernel, largest first: bench.gpu's part profile."""
    rows = [r for r in result.get("profile", ()) if "kernels" in r]
    found = []
    for row in rows:
        shown, total = row["kernels"][:KERNELS], row["total_us"]
        rest = total - sum(k["us"] for k in shown)
        bars = [(f"{k['kernel'][:56]} x{k['count']:.0f}", k["us"]) for k in shown]
        drawn, (axis,) = figure(10, 1.0 + 0.24 * (len(bars) + 1))
        for place, (_, us) in enumerate(bars := [*bars, ("all others", rest)]):
            axis.barh(place, us / 1e3, 0.7, color=BLUE if place < len(shown) else GREY)
            label(axis, us / 1e3, place, f"{us / total:.0%}")
        axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("milliseconds of the device")
        title = f"{row['arm']}, batch {row['batch']}: {duration(total / 1e6)} in all, "
        axis.set_title(f"{title}{row['launches']:.0f} launches", loc="left", fontsize=10)
        found.append(picture(drawn, f"device time by kernel, {row['arm']} B{row['batch']}"))
    return "\n".join(found)


def modelled(counted: dict[str, Any]) -> str:
    """The cost model: an iteration on named devices, by style."""
    batches = list(counted["model"])
    drawn, axes = figure(10, 3.6, len(batches))
    for axis, batch in zip(axes, batches):
        rows = counted["model"][batch]
        names = [n for n in rows[0] if n != "device"]
        for index, name in enumerate(names):
            places = [place + 0.2 * (index - 1.5) for place in range(len(rows))]
            colour = RED if name == LIBRARY else (GREY, "#90cdf4", BLUE)[index % 3]
            axis.bar(places, [r[name] for r in rows], 0.18, color=colour, label=name)
        axis.set_xticks(range(len(rows)), [r["device"] for r in rows])
        axis.set(title=f"XL/2, batch {batch} (a model)", ylabel="µs per sample and iteration")
        axis.legend(fontsize=8, frameon=False)
    return picture(drawn, "predicted time of an iteration on named devices")


def memory_curve(counted: dict[str, Any]) -> str:
    """Memory of a training step against m, and the ledger by kind beside the paper's totals."""
    drawn, (left, right) = figure(10, 4.4, 2)
    colours = {"recompute none": "#63b3ed", "recompute elementwise": BLUE,
               "recompute full": "#1a365d"}  # fmt: skip
    for name, points in counted["curve"].items():
        left.plot(*zip(*points), marker="o", label=name, color=colours.get(name, "#718096"))
    left.set(title=f"a training step of FPDM XL/2, batch {counted['batch']}, bf16", ylabel="GB",
             xlabel="iterations with gradient, m")  # fmt: skip
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, frameon=False)
    kinds = ("parameters", "gradients", "optimizer", "average", "copies", "saved")
    shades = ("#1a365d", "#2c5282", "#2b6cb0", "#4299e1", "#90cdf4", "#ed8936")
    rows = counted["memory"]
    for place, row in enumerate(rows):
        start = 0.0
        parts = [(k, row[k], c) for k, c in zip(kinds, shades)]
        parts.append(("working set", max(row["forward"], row["backward"]), "#f6e05e"))
        for name, size, colour in parts:
            right.barh(place, size, 0.7, start, color=colour, label=name if not place else None)
            start += size
        label(right, start, place, f"{start:.1f}")
    for model, size in counted["paper_gb"].items():
        places = [i for i, r in enumerate(rows) if r["model"] == model]
        right.plot([size] * 2, [places[0] - 0.45, places[-1] + 0.45], color=RED, linewidth=2,
                   label="the paper" if model == rows[0]["model"] else None)  # fmt: skip
    right.set_yticks(range(len(rows)), [f"{r['model']}: {r['arm']}" for r in rows], fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.12)
    right.set(xlabel="GB", title=f"n = m = {counted['m']}, batch {counted['batch']}")
    right.legend(fontsize=7, frameon=False)
    return picture(drawn, "memory of a training step")


def measured_memory(result: dict[str, Any]) -> str:
    """Peak of the training rows on this machine."""
    rows = [r for r in rows_of(result, "training") if "peak_bytes" in r["arms"][OURS]]
    if not rows:
        return ""
    drawn, (axis,) = figure(10, 0.9 + 0.45 * len(rows))
    largest = max(a.get("peak_bytes", 0) for r in rows for a in r["arms"].values())
    scale, unit = (1e9, "GB") if largest > 2e9 else (1e6, "MB")
    for place, row in enumerate(rows):
        arms = {n: a["peak_bytes"] / scale for n, a in row["arms"].items() if "peak_bytes" in a}
        for shift, (name, colour) in zip((-0.2, 0.2), (("published eager", GREY), (OURS, BLUE))):
            size = arms.get(name)
            axis.barh(place + shift, size or 0, 0.36, color=colour, label=None if place else name)
            label(axis, size or 0, place + shift, f"{size:.3g}" if size else "not measured")
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit} that forward and backward need beyond weights and gradients, measured")
    axis.legend(frameon=False)
    return picture(drawn, "measured memory of the training rows")


def facts(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    cpu, versions = result["processor"], result["versions"]
    shown = {
        "machine": result["machine"],
        "processor": f"{cpu.get('name')}, {cpu.get('threads')} of {cpu.get('cores')} cores, "
        f"{cpu.get('memory_gib')} GiB, {' '.join(cpu.get('flags', ()))}",
        "devices": "; ".join(f"{k}: {_plainly(v)}" for k, v in result["devices"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": result["commit"],
        "command": result["command"],
        "load before": f"{result['load']:.1f}" if result.get("load") is not None else None,
        "others": f"other programs took {result['others']:.0%} of the processors"
        if result.get("others") is not None
        else None,
        "OpenMP": " ".join(f"{k}={v}" for k, v in result.get("openmp", {}).items()) or None,
        "took": duration(result["seconds"]) if "seconds" in result else None,
        "ceilings": ceilings(result) if "ceilings" in result else "of each run, below",
        "note": remarks(result) or None,
    }
    shown = {k: v for k, v in shown.items() if v is not None}
    cells = (f"<dt>{k}<dd>{html.escape(str(v))}" for k, v in shown.items())
    return f"<dl>{''.join(cells)}</dl>"


def _plainly(value: Any) -> str:
    """A device's facts, or why there is none."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    cells = ("".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table>"


def section(title: str, note: str, *pictures: str, wanted: bool = True) -> str:
    """A heading, what to see, and the pictures. Without one it says that nothing was measured, or
    where it is not ``wanted`` is none."""
    if body := "".join(pictures):
        return f"<h2>{title}</h2><p class=note>{note}</p>{body}"
    return f"<h2>{title}</h2><p class=note>Not measured.</p>" if wanted else ""


def page(result: dict[str, Any], counted: dict[str, Any] | None) -> str:
    """The whole page."""
    predicted = predictions(result)
    kept = {k: v for k, v in result.items() if k not in ("rows", *PARTS)}
    raw = html.escape(json.dumps(kept, indent=1))
    parts = [
        section("At a glance", "Every arm's time over ours; all ran in one process, alternating. "
                "The red stroke is the library's products and attention alone.",
                overview(result)),
        section("Parts of an iteration against their floor", "Each fused call of one iteration "
                "without gradient, and plain PyTorch's time for the same. The floor is the larger "
                "of FLOPs over the measured GEMM rate and bytes over the measured copy rate; what "
                "fits the caches can beat it.", floors(result, "iteration")),
        section("Device time by kernel", "One evaluation at k = 8 (a batch of 2 is one image under "
                "guidance) and one training step of n = 5, m = 6 of XL/2 in bfloat16, launched.",
                kernels(result), wanted=bool(result.get("gpu"))),
        section("Cost against k", "One evaluation of the network per sample, where three k or more "
                "were measured.",
                cost_against_k(result)),
        section("Images per second", "The whole sampler, from noise to images: S timesteps of k "
                "iterations.", speed(result)),
        section("Memory", "Left and right: counted storage by storage without allocating it. "
                "Below: measured here.", memory_curve(counted) if counted else "",
                measured_memory(result)),
        section("The cost model against measurements", "One evaluation of the network, or one "
                "training step, in half precision. The model knows nothing of the host, which "
                "bounds at batch 1 whatever is not replayed as a graph.",
                grid(PREDICTED, predicted) if predicted else "", wanted=bool(result.get("gpu"))),
        section("Other devices", "Predicted from counted FLOPs, bytes, launches and waves of "
                "tiles, and each device's rates, in half precision. Not a measurement. Published: "
                "modulation and concatenation in every iteration, a kernel a call; library: "
                "hoisted, the library's products and fused kernels between them; fused: those "
                "inside the products.", modelled(counted) if counted else "",
                wanted=False),
        section("Operators against their floor", "Forward and backward; a logarithmic axis.",
                floors(result, "operators")),
    ]  # fmt: skip
    lines = "".join(f"<li>{html.escape(line)}" for line in unmeasured(result))
    gone = f"<h2>Not measured</h2><ul>{lines}</ul>" if lines else ""
    every = grid(*every_row(result))
    runs = f"<h2>Runs</h2>{grid(*sources(result))}" if "sources" in result else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>fpdm bench</title>"
        f"<style>{STYLE}</style><h1>fpdm bench</h1>{facts(result)}{''.join(parts)}"
        f"<h2>Every number</h2><details open><summary>{len(result['rows'])} rows</summary>"
        f"<div class=wide>{every}</div></details>{runs}{gone}"
        f"<details><summary>machine, versions, ceilings as JSON</summary><pre>"
        f"{raw}</pre></details></html>\n"
    )
