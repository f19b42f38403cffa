"""Images from a trained model: ``python -m fpdm.sample [SOURCE] [options]``.

SOURCE is a run directory (the EMA of its newest checkpoint), an export directory, or nothing: the
digits model that ships with the package. Image i is a function of its seed and label alone, so
shards (``--shard i/n`` makes images i, i+n, ...), batches and restarts agree. The output directory
is described in fpdm.gallery: a second run with the same settings makes only what is missing, with
other settings it is refused, and whichever shard finds every image there writes samples.npz and
grid.png.

``--vae DIR_OR_ID`` makes pictures of a model's latents (fpdm.vae), now or later: the same command
with it draws nothing again. Pictures are functions of the stored latents, to one step of 255 in
another ``--vae-batch``, bit for bit with ``--invariant``, which decodes one by one.

``--calibrate IMAGES`` draws nothing: it learns from so many images how many iterations a timestep
deserves and saves that in the run, of an export in calibrations/, for ``--allocation learned``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from fpdm import calibration, figures
from fpdm.budget import Calibration
from fpdm.cli import COST, Parser, run_main, stoppable
from fpdm.config import ConfigError, ModelConfig, SamplerConfig
from fpdm.engine import Sampler, check_labels, check_seeds
from fpdm.files import claim
from fpdm.gallery import GRID_IMAGES, Store, assemble, develop
from fpdm.kernels import implementations
from fpdm.model import FPDM
from fpdm.pretrained import LoadedSource, choose_device, load_source
from fpdm.settings import hints, plain, used
from fpdm.vae import VAE, load_vae

# options of what is drawn
DRAWN = (
    "out", "labels", "count", "seed", "seeds", "vae", "vae_batch", "shard", "residuals", "report",
    "compare",
)  # fmt: skip
REPORTED = 256  # images of which a report keeps every residual


@dataclass(frozen=True)
class Request:
    """Image i has ``labels[i]`` and ``seeds[i]``; this process makes ``ids``; columns of the grid.

    ``settings`` is what the images depend on, as ``settings.json`` keeps it.
    """

    labels: list[int]
    seeds: list[int]
    ids: list[int]
    columns: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What a process made: images, seconds without the writing, mean residual (S,K) over those that
    ran an iteration (NaN where none did), iterations (S,B) of the conditional branch; ``traces``
    (S,K,n), the residuals of the first images, whose ids are ``traced``."""

    images: int
    seconds: float
    residual: Tensor
    iterations: Tensor
    traces: Tensor
    traced: list[int]


def choices(name: str) -> tuple[str, ...]:
    """What ``SamplerConfig`` allows for a setting of words."""
    return get_args(hints(SamplerConfig)[name])


def parser() -> argparse.ArgumentParser:
    """The command line; what is not given comes from the source's own sampler settings."""
    p = Parser(
        prog="python -m fpdm.sample",
        description="Draw images with a trained FPDM or DiT. What is not given comes from the "
        "source's own settings; a new cost (--iters, --budget, ...) replaces the old one.",
        allow_abbrev=False,
    )
    p.add_argument("source", nargs="?", help="run or export directory (default: shipped digits)")
    p.add_argument("--out", help="output directory (default: samples/<source>-<settings>)")
    p.add_argument("--weights", choices=("ema", "raw"), help="of a run directory (default: ema)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--impl", help="auto, " + ", ".join(implementations.IMPLEMENTATIONS))
    p.add_argument("--steps", type=int, help="timesteps S")
    cost = p.add_mutually_exclusive_group()
    cost.add_argument("--iters", type=int, help="fixed-point iterations per timestep")
    cost.add_argument("--budget", type=int, help="blocks per image")
    cost.add_argument("--budget-macs", type=float, help="multiply-adds per image")
    cost.add_argument("--schedule", help="iterations of every timestep in order: 8,8,4,...")
    p.add_argument(
        "--method", choices=choices("method"), help="of sampling (dpmpp_2m: DPM-Solver++)"
    )
    p.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as much as ddpm")
    p.add_argument("--spacing", choices=choices("spacing"), help="of the timesteps in 0..T-1")
    p.add_argument(
        # explicit is what --schedule asks for
        "--allocation", choices=[a for a in choices("allocation") if a != "explicit"],
        help="of iterations to timesteps, from noise to image; learned: see --calibrate",
    )  # fmt: skip
    p.add_argument("--tol", type=float, help="residual that ends an image's iteration; 0: none")
    p.add_argument("--solver", choices=choices("solver"), help="picard: x = f(x) as it stands")
    p.add_argument("--damping", type=float, help="of the solver's step; 1: none")
    p.add_argument("--window", type=int, help="differences that anderson and broyden remember")
    p.add_argument("--max-iters", type=int, help="of --allocation adaptive, per timestep")
    p.add_argument("--calibrate", type=int, metavar="IMAGES", help="learn an allocation and stop")
    p.add_argument(
        "--reuse", choices=choices("reuse"),
        help="of the last timestep's solution, where the next iteration starts",
    )  # fmt: skip
    p.add_argument("--gamma", type=float, dest="reuse_gamma", help="of --reuse blend")
    p.add_argument("--gamma-end", type=float, dest="reuse_gamma_end", help="gamma at t = 0")
    p.add_argument("--rho", type=float, dest="reuse_rho", help="of --reuse extrapolate")
    p.add_argument("--guidance", type=float, help="scale; 1 is the conditional model alone")
    p.add_argument("--guidance-channels", type=int, help="guide only the first ones")
    p.add_argument("--guidance-low", type=float, help="guide where low <= t / (T - 1) <= high")
    p.add_argument("--guidance-high", type=float, help="see --guidance-low")
    p.add_argument("--guidance-rescale", type=float, help="0 none, 1 deviation of the conditional")
    p.add_argument("--labels", default="balanced", help="balanced, all, or 0,3,5-7 (cycled)")
    p.add_argument("--count", type=int, help="number of images")
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="image i has seed + i")
    seeds.add_argument("--seeds", help="one per image: 0,5,10-19")
    p.add_argument("--batch", type=int, help="images at once")
    p.add_argument("--dtype", choices=choices("dtype"), help="of the compute")
    p.add_argument(
        "--graphs", choices=choices("graphs"), help="CUDA graphs; auto: where measured faster"
    )
    p.add_argument("--invariant", action="store_true", default=None, help="one by one, bit for bit")
    p.add_argument(
        "--vae", metavar="DIR_OR_ID",
        help="of diffusers, for latents: a directory or a hub's OWNER/NAME, such as "
        "stabilityai/sd-vae-ft-ema",
    )  # fmt: skip
    p.add_argument("--vae-batch", type=int, default=8, help="latents decoded at once")
    p.add_argument("--shard", default="0/1", help="i/n: make images i, i+n, ...")
    p.add_argument("--residuals", action="store_true", help="also residuals.png (matplotlib)")
    p.add_argument("--report", action="store_true", help="also report.png: iterations, residuals")
    p.add_argument(
        "--compare", choices=choices("reuse"),
        help="a report, and numbers, with the same images under this reuse beside them",
    )  # fmt: skip
    return p


def sampler_config(base: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    """``base`` with what the command line gives; a new cost replaces the old one."""
    names = {field.name for field in fields(SamplerConfig)} - {"schedule"}
    given = {n: v for n, v in vars(args).items() if n in names and v is not None}
    explicit = base.allocation == "explicit"
    if args.schedule is not None:
        ks = tuple(parse_integers("schedule", args.schedule))
        given = {"steps": len(ks)} | given | dict.fromkeys(COST)
        given |= {"allocation": "explicit", "schedule": ks}
    elif any(name in given for name in COST):
        given = dict.fromkeys(COST) | given
        if explicit:
            given = {"allocation": "constant"} | given | {"schedule": ()}
    config = replace(base, **given)
    compared = [] if args.compare is None else [replace(config, reuse=args.compare)]
    return used(config, given, *compared)


def parse_integers(name: str, text: str) -> list[int]:
    """The integers in text like ``0,3,5-7``; ConfigError for anything else."""
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConfigError(f"{name}: got {text!r}, expected integers like 0,3,5-7")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if not 0 <= last - first < 1 << 24:
            raise ConfigError(f"{name}: got the range {part.strip()}, expected first-last")
        values.extend(range(first, last + 1))
    return values


def choose_images(args: argparse.Namespace, classes: int) -> tuple[list[int], list[int], int]:
    """(labels, seeds, grid columns) of every image, whatever the shard."""
    cycle = list(range(classes))
    if args.labels not in ("all", "balanced"):
        cycle = check_labels(parse_integers("labels", args.labels), classes)
    seeds = None if args.seeds is None else parse_integers("seeds", args.seeds)
    count = args.count
    if count is None and seeds is not None:
        count = len(seeds)
    elif count is None:
        few = 8 * classes if classes <= 16 else 16
        count = few if args.labels == "balanced" else len(cycle)
    if count < 1:
        raise ConfigError(f"count: got {count}, expected at least 1")
    if seeds is None:
        seeds = [args.seed + i for i in range(count)]
    if args.labels == "balanced":
        labels = [i * classes // count for i in range(count)]
        columns = count // classes if count % classes == 0 else 0
    else:
        labels = [cycle[i % len(cycle)] for i in range(count)]
        columns = len(cycle) if len(cycle) <= 16 < 2 * count else 0
    columns = columns or math.ceil(math.sqrt(min(count, GRID_IMAGES)))
    return labels, check_seeds(seeds, count), columns


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of text like ``0/4``, 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"shard: got {text!r}, expected i/n with 0 <= i < n")
    return int(match[1]), int(match[2])


def make_request(
    args: argparse.Namespace, source: LoadedSource, config: SamplerConfig, ks: list[int]
) -> Request:
    """Everything that is to be made, and by this process; ``ks``: the plan's iterations."""
    labels, seeds, columns = choose_images(args, source.model.config.num_classes)
    shard, shards = parse_shard(args.shard)
    settings = {
        "source": {"name": source.name, "weights": source.which, "sha256": source.digest()},
        "model": plain(source.model.config),
        "diffusion": plain(source.diffusion.config),
        "sample": {k: v for k, v in plain(config).items() if k not in ("batch", "graphs")},
        "iterations": ks,
        "labels": args.labels,
        "seeds": args.seeds if args.seeds is not None else f"{args.seed}+i",
        "count": len(labels),
    }
    ids = list(range(shard, len(labels), shards))
    return Request(labels, seeds, ids, columns, settings)


def generate(sampler: Sampler, request: Request, store: Store) -> Made:
    """Make the images of this process that are missing, one batch after the other."""
    missing = [i for i in request.ids if store.read(i) is None]
    plan = sampler.plan.steps
    residual = torch.zeros(2, len(plan), max(sampler.most), device=sampler.device)
    iterations = [torch.zeros(len(plan), 0, dtype=torch.int64)]
    traces, traced = [torch.zeros(len(plan), max(sampler.most), 0)], list[int]()
    seconds, bad = 0.0, 0
    quiet = None if missing else True  # none: a bar on a terminal only
    with tqdm(total=len(missing) * len(plan), unit="step", disable=quiet) as bar:
        for start in range(0, len(missing), sampler.config.batch):
            ids = missing[start : start + sampler.config.batch]
            labels, seeds = [request.labels[i] for i in ids], [request.seeds[i] for i in ids]
            began = time.perf_counter()
            samples = sampler.sample(labels, seeds, progress=bar.update)
            x = samples.x.cpu()
            seconds += time.perf_counter() - began
            bad += int((~x.flatten(1).isfinite().all(1)).sum())
            found = samples.stats.residual
            residual += torch.stack([found.nansum(dim=2), (~found.isnan()).sum(dim=2)])
            iterations.append(samples.stats.iterations[:, 0].cpu())
            if start < REPORTED:
                traces.append(found.cpu())
                traced += ids
            for i, image in zip(ids, x):
                store.write(i, image)
    if bad:
        warnings.warn(f"{bad} of {len(missing)} images hold NaN or Inf", stacklevel=1)
    mean = (residual[0] / residual[1]).cpu()
    ran = torch.cat(iterations, dim=1)
    return Made(len(missing), seconds, mean, ran, torch.cat(traces, dim=2), traced)


def report(
    sampler: Sampler, other: Sampler | None, made: Made, request: Request, path: Path
) -> None:
    """``path``: residuals and iterations of the first images that were made, or of the first that
    were there, drawn again for it as they are by an ``other`` sampler, with which they are compared
    in numbers too."""
    ids = made.traced or request.ids[:REPORTED]
    labels, seeds = [request.labels[i] for i in ids], [request.seeds[i] for i in ids]
    runs = {}
    for s in (sampler, *([other] if other is not None else [])):
        found = made.traces, made.iterations[:, : len(ids)]
        if s is other or not made.traced:
            stats = s.sample(labels, seeds).stats
            found = stats.residual.cpu(), stats.iterations[:, 0].cpu()
        runs[f"reuse {s.config.reuse}"] = found
    timesteps = [t for t, _ in sampler.plan.steps]
    if other is not None:
        print("\n".join(comparison(runs)))
    if figures.plot_report(runs, timesteps, path, sampler.tol):
        print(f"wrote      {path}")


def describe(sampler: Sampler, source: LoadedSource, impl: str) -> list[str]:
    """What is going to run and what it costs."""
    plan, c, m = sampler.plan, sampler.config, source.model.config
    ks = [k for _, k in plan.steps]
    solver = f"k {min(ks)}" if min(ks) == max(ks) else f"k {min(ks)} to {max(ks)}"
    if m.kind == "fpdm":
        solver = f"{'at most ' if sampler.tol else ''}{solver}, {c.allocation}, reuse {c.reuse}"
        solver += f", tolerance {c.tol:g}" if sampler.tol else ""
        solver += f", {c.solver}" if sampler.solver is not None else ""
    else:
        solver = "no fixed point"
    stranded = f" ({plan.stranded} stranded)" if plan.stranded else ""
    parameters = sum(p.numel() for p in source.model.parameters())
    return [
        f"source     {source.name} ({source.which}): {m.kind}, {parameters / 1e6:.2f} M parameters",
        f"plan       {c.method}, {len(ks)} steps {c.spacing}, {solver}, guidance {c.guidance:g}",
        f"per image  {plan.blocks} blocks{stranded}, {plan.macs / 1e9:.3g} GMACs",
        f"running    {impl} on {sampler.device}, {c.dtype}, batch {sampler.batch}",
    ]


def residual_table(plan: Sequence[tuple[int, int]], residual: Tensor) -> list[str]:
    """Relative residual |f(x)-x| / |f(x)| of the first and last iteration that any image ran, per
    timestep: means over the images that ran it."""
    cells = []
    for (t, _), row in zip(plan, residual):
        ran = row[~row.isnan()].tolist()
        if ran:
            cells.append(f"{t:4d} {len(ran):2d} {ran[0]:.0e}>{ran[-1]:.0e}")
    lines = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    head = (
        ["residual   t, most iterations of an image, first > last (mean over those still running)"]
        if lines
        else []
    )
    return head + ["           " + "   ".join(line) for line in lines]


def comparison(runs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Where the runs differ: title -> residual (S,K,B), iterations (S,B), without the first
    timestep, in which there is nothing to reuse."""
    lines = ["compared   after the first timestep: mean iterations, median residual first > last"]
    base = 0.0
    for title, (residual, ran) in runs.items():
        later = slice(1 if len(ran) > 1 else 0, None)
        values, count = residual[later], ran[later]
        last = values.gather(1, (count - 1).clamp_min(0).unsqueeze(1))
        first, final = values[:, 0].nanmedian(), last.nanmedian()
        mean = count.double().mean().item()
        base = base or mean
        saved = f"  {abs(1 - mean / base):.0%} {'fewer' if mean < base else 'more'}"
        line = f"           {title:<18}{mean:6.1f}  {first:.0e}>{final:.0e}"
        lines.append(line + (saved if mean != base else ""))
    return lines


def check_draws_nothing(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option of what is drawn, which --calibrate would ignore."""
    defaults = parser()
    for name in DRAWN:
        if getattr(args, name) != defaults.get_default(name):
            option = name.replace("_", "-")
            raise ConfigError(
                f"{option}: got it with --calibrate, which draws nothing, expected none"
            )


def calibrate(source: LoadedSource, config: SamplerConfig, images: int) -> None:
    """Learn an allocation from ``images`` of all classes, save and print it."""
    if not isinstance(source.model, FPDM):
        raise ConfigError(f"calibrate: got a {source.model.config.kind}, expected an fpdm")
    labels = [i % source.model.config.num_classes for i in range(images)]
    # seeds that no image of a usual run has
    seeds = range(1 << 63, (1 << 63) + images)
    found = calibration.learn(
        source.model, source.diffusion, config, labels, seeds, source.digest()
    )
    path = source.calibrations()[0]
    calibration.save(found, path)
    print(f"wrote      {path}")
    print("\n".join(learned_table(found)))


def learned_table(found: Calibration) -> list[str]:
    """Residuals after 1, 2, 4, ... iterations per timestep."""
    depth = len(found.residual[0])
    columns = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= depth]
    head = "residual   after " + "".join(f"{k:8d}" for k in columns)
    rows = zip(found.timesteps, found.residual)
    return [head] + [
        f"           {t:5d}" + "".join(f"{row[k - 1]:8.0e}" for k in columns) for t, row in rows
    ]


def choose_vae(args: argparse.Namespace, source: LoadedSource, device: torch.device) -> VAE | None:
    """The VAE of the command line, whose latents are the model's. Raises ConfigError."""
    if args.vae_batch < 1:
        raise ConfigError(f"vae-batch: got {args.vae_batch}, expected at least 1")
    if args.vae is None:
        return None
    channels = source.model.config.in_channels
    if channels in (1, 3):
        raise ConfigError(f"vae: got {args.vae}, expected none: this model draws pictures itself")
    vae = load_vae(args.vae, device)
    if vae.channels != channels:
        raise ConfigError(
            f"vae: got {args.vae} of {vae.channels} channels, expected the model's {channels}"
        )
    return vae


def claim_pictures(out: Path, vae: VAE | None, source: LoadedSource) -> float:
    """Take ``out`` for pictures by ``vae``, or for none; the scale of the latents. Raises
    ConfigError where pictures by another one are there."""
    if vae is None:
        if (out / "vae.json").exists():
            raise ConfigError(
                f"vae: got none, expected the one of {out}/vae.json, or another output directory"
            )
        return 1.0
    scale = source.latent_scale or vae.scale
    claim(out, {"vae": {"name": vae.name, "sha256": vae.sha256}, "scale": scale}, "vae.json")
    return scale


def make_pictures(
    vae: VAE, scale: float, latents: Store, model: ModelConfig, request: Request, batch: int
) -> Store:
    """Decode what is missing of this process's pictures; where all of them lie."""
    size = vae.factor * model.input_size
    store = Store(latents.out, replace(model, in_channels=3, input_size=size))
    began = time.perf_counter()
    made = develop(lambda z: vae.decode(z, scale), latents, store, request.ids, batch)
    each = f", {1e3 * (time.perf_counter() - began) / made:.3g} ms per picture" if made else ""
    print(f"pictures   {made} made by {vae.name}, {len(request.ids) - made} were there{each}")
    return store


def tell(sampler: Sampler, made: Made, told: str) -> None:
    """What the iterations of the images that were made did."""
    if sampler.tol:
        mean = made.iterations.float().mean()
        print(f"iterations mean {mean:.3g} of {sampler.plan.mean():.3g} per timestep")
    print("\n".join(residual_table(sampler.plan.steps, made.residual)))
    print(f"operators  {told}")
    if sampler.graphs is not None:
        g = sampler.graphs
        print(f"graphs     {g.captures} captured, {g.replays} replays beside these calls")


def main(argv: Sequence[str]) -> None:
    """The command; see the module."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    source = load_source(args.source, args.weights, args.impl, device)
    dtype = getattr(torch, sampler_config(source.sampler_config, args).dtype)
    impl = implementations.choose(source.model.execution.impl, device, dtype)
    source.model.execution = replace(source.model.execution, impl=impl)
    config = sampler_config(source.sampler_config, args)
    if args.calibrate is not None:
        check_draws_nothing(args)
        calibrate(source, config, args.calibrate)
        return
    sampler, other = source.sampler(config), None
    if args.compare == config.reuse:
        raise ConfigError(f"compare: got {args.compare}, the run's own, expected another reuse")
    if args.compare is not None:
        other = source.sampler(replace(config, reuse=args.compare))
    request = make_request(args, source, config, [k for _, k in sampler.plan.steps])
    vae = choose_vae(args, source, device)
    tag = hashlib.sha256(json.dumps(request.settings, sort_keys=True).encode()).hexdigest()[:8]
    out = Path(args.out or f"samples/{source.name}-{tag}")
    claim(out, request.settings)
    scale = claim_pictures(out, vae, source)
    print("\n".join(describe(sampler, source, impl)), flush=True)
    implementations.reset_counters()
    store = Store(out, source.model.config)
    with stoppable("the same command goes on with what is missing"):
        made = generate(sampler, request, store)
        told = implementations.ran(impl)
        there = len(request.ids) - made.images
        each = f", {1e3 * made.seconds / made.images:.3g} ms per image" if made.images else ""
        print(f"images     {made.images} made, {there} were there{each}", flush=True)
        if made.images:
            tell(sampler, made, told)
        if made.images and args.residuals:
            timesteps = [t for t, _ in sampler.plan.steps]
            figures.plot_residuals(made.residual, timesteps, out / "residuals.png")
        if args.report or other is not None:
            report(sampler, other, made, request, out / "report.png")
        if vae is not None:
            sampler.release()
            batch = 1 if config.invariant else args.vae_batch
            store = make_pictures(vae, scale, store, source.model.config, request, batch)
        if assemble(store, request.labels, request.seeds, request.columns):
            what = "latents: --vae makes pictures of them" if store.latent else "images"
            print(f"wrote      {out}/grid.png, samples.npz and {len(request.labels)} {what}")
        else:
            count = len(request.ids)
            print(f"wrote      {count} images to {out}; the other shards' are not all there")


if __name__ == "__main__":
    run_main("fpdm.sample", main)
