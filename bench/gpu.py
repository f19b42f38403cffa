"""What only a GPU can tell and no row of ``python -m bench`` holds.

    python -m bench.gpu profile --out DIR   device time by kernel: a loop of 8, a training step
    python -m bench.gpu memory --out DIR    peak memory of a training step with its optimiser state
    python -m bench.gpu digits --out DIR    300 steps of the digits in fp32, fp16 and bf16
    python -m bench.gpu replays --out DIR   training micro-batches replayed against launched
    python -m bench.gpu syncs --out DIR     host synchronisations and launches of a sampler step
    python -m bench.gpu smoke               one small step, for compute-sanitizer

Each writes one JSON file and goes on past an arm that fails, or that is beyond what it must keep
(LIMITS), recording why; it then exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine, suites, timing
from bench.rows import inputs, randomised
from fpdm.config import ExecutionConfig, ModelConfig, OptimConfig, SamplerConfig
from fpdm.diffusion import Diffusion, DiffusionConfig
from fpdm.microstep import MicroStep
from fpdm.model import FPDM, build_model
from fpdm.optim import AdamWEMA
from fpdm.recipes import MODEL_PRESETS, RECIPES
from fpdm.weights import PreparedWeights

XL = MODEL_PRESETS["fpdm-xl-2"]
BATCH = 64
LINES = 28
CALLS = 3  # profiled, after as many to warm up
# what a row must keep: GB of a training step by recompute setting, with the chunks that it is meant
# for; relative distance of the losses in half precision from those in float32; copies that begin a
# sampler's run, and the end that the profile waits for
LIMITS: dict[str, float] = {"full": 3.5, "elementwise": 9.0, "losses": 0.04, "waits": 3}


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
            "command": "python -m bench.gpu " + " ".join(sys.argv[1:2]),
            "commit": machine.commit(),
            "rows": [],
        }

    def add(self, **row: Any) -> None:
        """Append a row and write the file."""
        self.data["rows"].append(row)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        shown = {k: v for k, v in row.items() if k != "losses"}
        print(json.dumps(shown), flush=True)

    @contextlib.contextmanager
    def row(self, **facts: Any) -> Any:
        """A row that is filled inside, or says what went wrong there."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.add(**facts, **found)
        gc.collect()
        torch.cuda.empty_cache()


def keep(found: dict[str, Any], what: str, got: float) -> None:
    """Marks a row whose ``got`` is beyond its limit, or NaN, as failed."""
    if not got <= LIMITS[what]:
        found["error"] = f"{what}: got {got:.3g}, expected at most {LIMITS[what]:g}"


def by_kernel(fn: Callable[[], Any]) -> dict[str, Any]:
    """Device microseconds per call of ``fn`` by kernel, largest first; launches; in all."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(CALLS):
        fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        for _ in range(CALLS):
            fn()
        torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if e.self_device_time_total > 0]
    events = [e for e in events if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: -e.self_device_time_total)
    kernels = [
        {"kernel": e.key[:90], "us": e.self_device_time_total / CALLS, "count": e.count / CALLS}
        for e in events
    ]
    total, count = (sum(k[name] for k in kernels) for name in ("us", "count"))  # type: ignore[misc]
    return {"total_us": total, "launches": count, "kernels": kernels[:LINES]}


def profile_parts(report: Report) -> None:
    """Ours: the loop at k = 8, of a batch and of one image with guidance, and a training step at
    (5, 6)."""
    device = torch.device("cuda")
    for name, batch in (("loop", BATCH), ("loop", 2), ("training", BATCH)):
        fold = name == "loop"
        with report.row(arm=name, batch=batch) as found:
            x, t, y = inputs(XL, batch, device)
            model = randomised(XL, device)
            # in training as the trainer has them
            weights = PreparedWeights(model, torch.bfloat16, fold=fold, accumulate=not fold)

            def loop(model: FPDM = model, weights: Any = weights, args: Any = (x, t, y)) -> None:
                with torch.no_grad():
                    model(*args, 8, weights=weights)

            def step(model: FPDM = model, weights: Any = weights, args: Any = (x, t, y)) -> None:
                model.zero_grad(set_to_none=False)
                model(*args, 6, 5, weights=weights).float().square().mean().backward()

            found |= by_kernel(loop if fold else step)


def peak_of_step(
    config: ModelConfig, n: int, m: int, dtype: torch.dtype, **execution: Any
) -> dict[str, Any]:
    """Peak of a whole step, all state included, by the allocator and beyond its start."""
    # models hang in cycles: the last one would go while this one is measured
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # drawn there: a CPU takes 10 s over a DiT-XL
    with torch.device("cuda"):
        model = build_model(config, ExecutionConfig(**execution))
    weights = PreparedWeights(model, dtype, accumulate=True)
    optimizer = AdamWEMA(model, OptimConfig(), weights)
    x, t, y = inputs(config, BATCH, torch.device("cuda"))
    state = torch.cuda.memory_allocated() - before
    for _ in range(2):
        optimizer.zero_grad()
        how = (m, n) if isinstance(model, FPDM) else ()
        model(x, t, y, *how, weights=weights).float().square().mean().backward()
        optimizer.step(1e-4)
    torch.cuda.synchronize()
    return {
        "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "state_gb": state / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def memory(report: Report) -> None:
    """XL/2 at B = 64, n = m = 12, bf16: FPDM in every recompute mode, DiT, the published one."""
    with report.row(arm="published bf16 eager", model="fpdm-xl-2", n=12, m=12, batch=BATCH) as f:
        f |= published_peak()
    for name in ("fpdm-xl-2", "dit-xl-2"):
        for mode in ("full", "elementwise", "none"):
            for chunks in (4, 1):
                facts = {"model": name, "recompute": mode, "chunks": chunks, "batch": BATCH}
                with report.row(arm="fpdm", n=12, m=12, **facts) as found:
                    found |= peak_of_step(
                        MODEL_PRESETS[name], 12, 12, torch.bfloat16, recompute=mode,
                        chunks=chunks,
                    )  # fmt: skip
                    if name == "fpdm-xl-2" and mode in LIMITS and chunks > 1:
                        keep(found, mode, found["peak_gb"])


def published_peak() -> dict[str, Any]:
    """The same of the published architecture with torch's fused AdamW, in eager autocast."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, device = torch.cuda.memory_allocated(), torch.device("cuda")
    plain = suites.Plain(randomised(XL, device), torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True)
    average = [p.detach().clone() for p in plain.parameters()]
    x, t, y = inputs(XL, BATCH, device)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = plain(x, t, y, 12, 12)
        out.float().square().mean().backward()
        optimizer.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del average  # it had to be there until now
    return {"peak_gb": peak / 1e9}


def digits(report: Report) -> None:
    """The digits recipe for 300 steps in each precision: losses of the same steps."""
    from fpdm.train import Trainer

    recipe, exact = RECIPES["digits"], 0.0
    for precision in ("fp32", "bf16", "fp16"):
        with report.row(arm=precision) as found, tempfile.TemporaryDirectory() as folder:
            train = replace(
                recipe.train, out=folder, name=precision, steps=300, log_every=10, save_every=0,
                grid_every=0, device="cuda", precision=precision,
            )  # fmt: skip
            trainer = Trainer(replace(recipe, train=train))
            if (done := trainer.run()) < train.steps:
                # the trainer ends in order at a signal, as if it had been asked for fewer steps
                raise SystemExit(f"digits: {precision}: stopped at step {done} of {train.steps}")
            lines = trainer.directory.metrics.read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            found["losses"] = [row["loss"] for row in rows]
            found |= {"last": rows[-1]["loss"], "skipped": rows[-1]["skipped"]}
            mean = sum(row["loss"] for row in rows[-10:]) / 10
            found |= {"mean_of_last_100": mean, "scale": rows[-1]["scale"]}
            exact = exact or mean
            keep(found, "losses", abs(mean / exact - 1))


# recipe, batch, (n, m), precision, execution
REPLAYS: list[tuple[str, int, tuple[int, int], str, dict[str, Any]]] = [
    ("digits", 64, (1, 2), "fp32", {}),
    ("digits", 64, (1, 2), "bf16", {}),
    ("imagenet256", 8, (5, 6), "bf16", {}),
    ("imagenet256", 64, (5, 6), "bf16", {}),
    ("imagenet256", 64, (5, 6), "bf16", {"recompute": "elementwise", "chunks": 4}),
    ("imagenet256", 64, (5, 6), "bf16", {"recompute": "full", "chunks": 4}),
]


def replays(report: Report) -> None:
    """A training micro-batch replayed as one graph against the same launched kernel by kernel; what
    a graph takes of the device's memory beside the pool that all share."""
    for recipe, batch, (n, m), precision, execution in REPLAYS:
        facts = {"recipe": recipe, "batch": batch, "n": n, "m": m, "precision": precision}
        with report.row(**facts, **execution) as found:
            arms = {
                mode: micro_step(recipe, batch, (n, m), precision, mode, execution)
                for mode in ("off", "on")
            }
            times = timing.interleave(arms, 9)
            found |= {f"{mode}_ms": 1e3 * t.median for mode, t in times.items()}
            found["launched_over_replayed"] = timing.ratio(times["off"], times["on"])
    pairs = [(n, m) for n in (1, 4, 8) for m in (2, 4)]
    with report.row(arm="graphs", recipe="imagenet256", batch=8, graphs=len(pairs)) as found:
        run = micro_batches("imagenet256", 8, (8, 8), "bf16", "on", {})
        # the pool has the size of the largest m from the first graph on
        run(8, 8)
        run(8, 8)
        for pair in pairs:
            run(*pair)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info()
        for pair in pairs:
            run(*pair)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info()
        found["mb_each"] = (before - after) / len(pairs) / 1e6


def micro_step(
    recipe: str, batch: int, pair: tuple[int, int], precision: str, mode: str,
    execution: dict[str, Any], kind: str = "cuda",
) -> Callable[[], Any]:  # fmt: skip
    """The trainer's micro-batch of one (n, m) on random data. Raises RuntimeError where ``mode`` is
    on and nothing is replayed."""
    run = micro_batches(recipe, batch, pair, precision, mode, execution, kind)
    # launched once, then captured
    run(*pair)
    step = run(*pair)
    if mode == "on" and not (step.graphs and step.graphs.replays):
        raise RuntimeError("train.graphs: got no replay, expected one to be timed")
    return lambda: run(*pair)


def micro_batches(
    recipe: str, batch: int, largest: tuple[int, int], precision: str, mode: str,
    execution: dict[str, Any], kind: str = "cuda",
) -> Callable[[int, int], MicroStep]:  # fmt: skip
    """The same of every (n, m) up to ``largest``; returns what ran it."""
    from fpdm.batches import Draws
    from fpdm.train import DTYPES

    config, (n_max, m_max), device = RECIPES[recipe], largest, torch.device(kind)
    # the largest m is captured first: with another in the recipe this one never would be
    fixed = replace(config.fixed_point, n_max=n_max, m_max=m_max)
    train = replace(
        config.train,
        precision=precision,  # type: ignore[arg-type]
        graphs=mode,  # type: ignore[arg-type]
    )
    config = replace(config, fixed_point=fixed, train=train)
    model = randomised(config.model, device, **execution)
    weights = PreparedWeights(model, DTYPES[precision], accumulate=True)
    optimizer = AdamWEMA(model, OptimConfig(), weights)
    step = MicroStep(model, Diffusion(config.diffusion, kind), weights, config, device)
    x, t, y = inputs(config.model, batch, device)
    draws = Draws(t, torch.randn_like(x), y)

    def run(n: int, m: int) -> MicroStep:
        optimizer.zero_grad()
        step(x, draws, n, m, 1.0)
        return step

    return run


def syncs(report: Report) -> None:
    """A sampler's run under the profiler: every call that waits for the device, by name."""
    from torch.profiler import ProfilerActivity, profile

    from fpdm.engine import Sampler

    model = randomised(XL, torch.device("cuda"))
    for graphs, tol in (("off", 0.0), ("on", 0.0), ("on", 0.02)):
        arm = f"graphs {graphs}, tol {tol}"
        with report.row(arm=arm, batch=1, guidance=4.0, steps=28, k=8) as found:
            config = SamplerConfig(
                steps=28,
                iters=8,
                guidance=4.0,
                batch=1,
                tol=tol,
                graphs=graphs,  # type: ignore[arg-type]
                dtype="bfloat16",
            )
            sampler = Sampler(model, Diffusion(DiffusionConfig(), "cuda"), config)
            for _ in range(4):
                sampler.sample([1], [1], stats=False)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
                sampler.sample([1], [1], stats=False)
            events = {e.key: e.count for e in prof.key_averages()}
            found["waits"] = {k: n for k, n in events.items() if "ynchronize" in k}
            # with a tolerance the flag of the last iteration but one is waited for
            waits = sum(n for k, n in found["waits"].items() if not (tol and "Event" in k))
            keep(found, "waits", waits)
            found["launches"] = {k: n for k, n in events.items() if "aunch" in k}


def smoke() -> int:
    """One small float16 forward and backward in every implementation that the device is for; exit
    status 1 when one of them cannot run."""
    from fpdm.kernels import implementations

    config = ModelConfig(input_size=8, hidden_size=144, num_heads=2, num_classes=10)
    x = torch.randn(2, 4, 8, 8, device="cuda")
    t, y = torch.tensor([5, 900], device="cuda"), torch.tensor([1, 10], device="cuda")
    newer = torch.cuda.get_device_capability() >= (8, 0)
    missing = 0
    for impl in ("triton", "triton-fused", "cuda") if newer else ("cuda",):
        dtype = torch.float16
        if reason := implementations.unavailable(impl, "cuda", dtype):
            print(f"smoke: {impl}: not run: {reason}")
            missing = 1
            continue
        model = FPDM(config, ExecutionConfig(impl=impl)).cuda()  # type: ignore[arg-type]
        weights = PreparedWeights(model, dtype)
        model(x, t, y, 2, 1, weights=weights).float().mean().backward()
        torch.cuda.synchronize()
        print(f"smoke: {impl}: done")
    return missing


PARTS = {
    "profile": profile_parts, "memory": memory, "digits": digits, "replays": replays,
    "syncs": syncs,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Command line; exit status 1 when something in it failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("part", choices=(*PARTS, "smoke"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: error: got no CUDA device, expected one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if args.part == "smoke":
        return smoke()
    report = Report(args.out / f"{args.part}.json")
    PARTS[args.part](report)
    return int(any("error" in row for row in report.data["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
