"""XL/2 on one GPU: ours against the published architecture, in one run, interleaved.

    python -m bench.gpu sample --out DIR      one timestep of a B=64 batch at k = 8, bf16
    python -m bench.gpu train --out DIR       a training step at (n, m) = (5, 6), peak memory at n =
    m = 12 python -m bench.gpu smoke                 one small step, for compute-sanitizer

Medians over interleaved repeats, timed by CUDA events. Every row is written as soon as it is known;
a row that fails records its error and the next one runs. Compiled baselines come last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import published
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.model import FPDM
from fpdm.weights import PreparedWeights

XL = ModelConfig()


class Report:
    """Rows of results, written to one JSON file after each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        props = torch.cuda.get_device_properties(0)
        self.path = path
        self.data: dict[str, Any] = {
            "device": props.name,
            "capability": f"{props.major}.{props.minor}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "command": " ".join(sys.argv),
            "rows": [],
        }

    def add(self, **row: Any) -> None:
        """Append a row and write the file."""
        self.data["rows"].append(row)
        self.path.write_text(json.dumps(self.data, indent=1))
        print(json.dumps(row), flush=True)


def milliseconds(fn: Callable[[], Any]) -> float:
    """One call, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    report: Report, arms: dict[str, Callable[[], Any]], repeats: int, **facts: Any
) -> None:
    """Times every arm in turn; an arm that fails is reported and left out."""
    alive: dict[str, Callable[[], Any]] = {}
    for name, fn in arms.items():
        try:
            began = time.perf_counter()
            for _ in range(3):
                fn()
            torch.cuda.synchronize()
            alive[name] = fn
            print(f"{name}: warm after {time.perf_counter() - began:.1f} s", flush=True)
        except Exception as error:
            report.add(arm=name, error=f"{type(error).__name__}: {str(error)[:300]}", **facts)
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(repeats):
        for name, fn in alive.items():
            times[name].append(milliseconds(fn))
    for name, values in times.items():
        report.add(
            arm=name,
            median_ms=statistics.median(values),
            min_ms=min(values),
            max_ms=max(values),
            repeats=repeats,
            **facts,
        )


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels on the GPU."""
    x = torch.randn(batch, XL.in_channels, XL.input_size, XL.input_size, device="cuda")
    t = torch.randint(0, 1000, (batch,), device="cuda")
    return x, t, torch.randint(0, XL.num_classes, (batch,), device="cuda")


def xl(execution: ExecutionConfig | None = None) -> FPDM:
    """XL/2 with every parameter random (adaLN-Zero would skip work in no kernel, but hide
    errors)."""
    model = FPDM(XL, execution).cuda()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02)
    return model


def plain_state(model: FPDM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights for the published architecture."""
    return {k: v.detach().to(dtype) for k, v in model.state_dict().items()}


def sample(out: Path) -> None:
    """One timestep of the network at k = 8, batch 64, and at batch 1 with guidance (2 rows)."""
    report, model = Report(out / "sample.json"), xl()
    prepared = PreparedWeights(model, torch.bfloat16, fold=True)
    state = plain_state(model, torch.bfloat16)
    compiled = torch.compile(published.forward, mode="max-autotune-no-cudagraphs")
    last: dict[str, Callable[[], Any]] = {}
    for batch in (64, 2):
        x, t, y = inputs(batch)

        def ours(x: Tensor = x, t: Tensor = t, y: Tensor = y) -> Tensor:
            with torch.no_grad():
                return model(x, t, y, 8, weights=prepared)

        def plain(
            f: Any = published.forward, x: Tensor = x, t: Tensor = t, y: Tensor = y
        ) -> Tensor:
            with torch.no_grad():
                return f(state, XL, x.bfloat16(), t, y, 8)[0]

        arms: dict[str, Callable[[], Any]] = {"fpdm bf16": ours, "published bf16 eager": plain}
        interleaved(report, arms, 20, batch=batch, iters=8)
        if batch == 64:
            last = {**arms, "published bf16 compiled": partial(plain, compiled)}
    # compiling takes minutes: everything else is on disk by now
    interleaved(report, last, 20, batch=64, iters=8)


def train(out: Path) -> None:
    """A training step at (5, 6), and peak memory at n = m = 12 in every recompute mode."""
    report, batch = Report(out / "train.json"), 64
    x, t, y = inputs(batch)
    model = xl()
    state = {k: v.requires_grad_() for k, v in plain_state(model, torch.float32).items()}

    def ours(model: FPDM, prepared: PreparedWeights, n: int, m: int) -> None:
        model.zero_grad()
        model(x, t, y, m, n, weights=prepared).float().square().mean().backward()

    def plain(n: int = 5, m: int = 6) -> None:
        for value in state.values():
            value.grad = None
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found, _ = published.forward(state, XL, x, t, y, m, n)
        found.float().square().mean().backward()

    arms: dict[str, Callable[[], Any]] = {}
    for mode in ("none", "elementwise", "full"):
        variant = FPDM(XL, ExecutionConfig(recompute=mode)).cuda()  # type: ignore[arg-type]
        variant.load_state_dict(model.state_dict())
        prepared = PreparedWeights(variant, torch.bfloat16)
        arms[f"fpdm bf16 recompute={mode}"] = partial(ours, variant, prepared, 5, 6)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours(variant, prepared, 12, 12)
        report.add(
            arm=f"fpdm bf16 recompute={mode}", n=12, m=12, batch=batch,
            peak_above_state_bytes=torch.cuda.max_memory_allocated() - before,
        )  # fmt: skip
        variant.zero_grad(set_to_none=True)
    arms["published bf16 eager"] = plain
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        plain(12, 12)
        peak = torch.cuda.max_memory_allocated() - before
        report.add(arm="published bf16 eager", n=12, m=12, batch=batch, peak_above_state_bytes=peak)
    except torch.cuda.OutOfMemoryError as error:
        report.add(arm="published bf16 eager", n=12, m=12, batch=batch, error=str(error)[:200])
    interleaved(report, arms, 10, batch=batch, n=5, m=6)


def smoke() -> None:
    """One small forward and backward."""
    config = ModelConfig(input_size=8, hidden_size=144, num_heads=2, num_classes=10)
    model = FPDM(config).cuda()
    x = torch.randn(2, 4, 8, 8, device="cuda")
    t, y = torch.tensor([5, 900], device="cuda"), torch.tensor([1, 10], device="cuda")
    model(x, t, y, 2, 1, weights=PreparedWeights(model, torch.float16)).float().mean().backward()
    torch.cuda.synchronize()
    print("smoke: done")


def main(argv: list[str]) -> int:
    """Command line; exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("part", choices=("sample", "train", "smoke"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: error: got no CUDA device, expected one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if args.part == "smoke":
        smoke()
    else:
        (sample if args.part == "sample" else train)(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
