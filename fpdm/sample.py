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
deserves and saves that for ``--allocation learned``: in the run, or in calibrations/ for an export.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fpdm import calibration, figures
from fpdm.budget import Calibration
from fpdm.cli import run_main, stoppable
from fpdm.config import ConfigError, ModelConfig, SamplerConfig
from fpdm.engine import Sampler
from fpdm.files import claim
from fpdm.gallery import Store, assemble, develop
from fpdm.kernels import implementations
from fpdm.model import FPDM
from fpdm.pretrained import LoadedSource, choose_device, load_source
from fpdm.request import (
    VAE_BATCH,
    Request,
    check_draws_nothing,
    make_request,
    parser,
    sampler_config,
)
from fpdm.shards import listed
from fpdm.vae import TOLD, VAE, load_vae

REPORTED = 256  # images of which a report keeps every residual


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


def again(sampler: Sampler, request: Request, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Residuals (S,K,n) and iterations (S,n) of the images ``ids``, sampled once more."""
    labels, seeds = [request.labels[i] for i in ids], [request.seeds[i] for i in ids]
    stats = sampler.sample(labels, seeds).stats
    return stats.residual.cpu(), stats.iterations[:, 0].cpu()


def draw_residuals(sampler: Sampler, made: Made, request: Request, path: Path) -> None:
    """Draws, into ``path``, the mean residuals of the images made now; where none was, of the first
    ones, which are sampled again for it."""
    first = request.ids[:REPORTED]
    residual = made.residual if made.images else again(sampler, request, first)[0]
    if figures.plot_residuals(residual, [t for t, _ in sampler.plan.steps], path):
        print(f"wrote      {path}")


def report(
    sampler: Sampler, other: Sampler | None, made: Made, request: Request, path: Path
) -> None:
    """Draws, into ``path``, residuals and iterations of the first images. Where none was made now,
    the first ones are sampled again for it. An ``other`` sampler makes the same images for
    comparison, which is also printed in numbers."""
    ids, runs = made.traced or request.ids[:REPORTED], {}
    for s in (sampler, *([other] if other is not None else [])):
        now = s is sampler and made.traced
        found = made.traces, made.iterations[:, : len(ids)]
        runs[f"reuse {s.config.reuse}"] = found if now else again(s, request, ids)
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
    # the names of folders, which may hold anything
    names = [f"{i} {x if x.isprintable() else repr(x)}" for i, x in enumerate(source.classes)]
    return [
        f"source     {source.name} ({source.which}): {m.kind}, {parameters / 1e6:.2f} M parameters",
        *([f"classes    {listed(names, 8)}"] if names else []),
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


def calibrate(source: LoadedSource, config: SamplerConfig, images: int) -> None:
    """Learn an allocation from ``images`` of all classes, save and print it."""
    if not isinstance(source.model, FPDM):
        raise ConfigError(f"calibrate: got a {source.model.config.kind}, expected an fpdm")
    if images < 1:
        raise ConfigError(f"calibrate: got {images} images, expected at least 1")
    source.check_guidance(config)
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
    if args.vae_batch is not None and args.vae_batch < 1:
        raise ConfigError(f"vae-batch: got {args.vae_batch}, expected at least 1")
    if args.vae is None:
        if args.vae_batch is not None:
            raise ConfigError(f"vae-batch: got {args.vae_batch} without --vae, expected none")
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
    made_by = {"vae": {"name": vae.name, "sha256": vae.sha256}, "scale": scale}
    claim(out, made_by, "vae.json", TOLD, written="[0-9]*.png")
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
    """Prints what the iterations of the images made now came to."""
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
        if args.residuals:
            draw_residuals(sampler, made, request, out / "residuals.png")
        if args.report or other is not None:
            report(sampler, other, made, request, out / "report.png")
        if vae is not None:
            sampler.release()
            batch = 1 if config.invariant else args.vae_batch or VAE_BATCH
            store = make_pictures(vae, scale, store, source.model.config, request, batch)
        if assemble(store, request.labels, request.seeds, request.columns):
            what = "latents: --vae makes pictures of them" if store.latent else "images"
            print(f"wrote      {out}/grid.png, samples.npz and {len(request.labels)} {what}")
        else:
            count = len(request.ids)
            print(f"wrote      {count} images to {out}; the other shards' are not all there")


if __name__ == "__main__":
    run_main("fpdm.sample", main)
