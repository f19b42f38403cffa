"""What a sampling command asks for: its options, the settings and the images that they mean."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from fpdm.cli import COST, Parser
from fpdm.config import ConfigError, SamplerConfig
from fpdm.engine import check_labels, check_seeds
from fpdm.gallery import GRID_IMAGES
from fpdm.kernels import implementations
from fpdm.pretrained import LoadedSource, image_settings
from fpdm.settings import hints, plain, used

VAE_BATCH = 8
_MOST_IMAGES = 1 << 24
# options of what is drawn
DRAWN = (
    "out", "labels", "count", "seed", "seeds", "vae", "vae_batch", "shard", "residuals", "report",
    "compare",
)  # fmt: skip


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
    p.add_argument("--weights", choices=("ema", "raw"), help="of a run directory (default: ema)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--impl", help="auto, " + ", ".join(implementations.IMPLEMENTATIONS))
    _add_sampling(p)
    _add_drawing(p)
    return p


def _add_sampling(p: Parser) -> None:
    """Options that replace settings of the source's sampler."""
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
    p.add_argument("--batch", type=int, help="images at once")
    p.add_argument("--dtype", choices=choices("dtype"), help="of the compute")
    p.add_argument(
        "--graphs", choices=choices("graphs"), help="CUDA graphs; auto: where measured faster"
    )
    p.add_argument("--invariant", action="store_true", default=None, help="one by one, bit for bit")


def _add_drawing(p: Parser) -> None:
    """Options of what is drawn, those of ``DRAWN``."""
    p.add_argument("--out", help="output directory (default: samples/<source>-<settings>)")
    p.add_argument("--labels", default="balanced", help="balanced, all, or 0,3,5-7 (cycled)")
    p.add_argument("--count", type=int, help="number of images")
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="image i has seed + i")
    seeds.add_argument("--seeds", help="one per image: 0,5,10-19")
    p.add_argument(
        "--vae", metavar="DIR_OR_ID",
        help="of diffusers, for latents: a directory or a hub's OWNER/NAME, such as "
        "stabilityai/sd-vae-ft-ema",
    )  # fmt: skip
    p.add_argument("--vae-batch", type=int, help=f"latents decoded at once (default {VAE_BATCH})")
    p.add_argument("--shard", default="0/1", help="i/n: make images i, i+n, ...")
    p.add_argument("--residuals", action="store_true", help="also residuals.png (matplotlib)")
    p.add_argument("--report", action="store_true", help="also report.png: iterations, residuals")
    p.add_argument(
        "--compare", choices=choices("reuse"),
        help="a report, and numbers, with the same images under this reuse beside them",
    )  # fmt: skip


def sampler_config(base: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    """``base`` with what the command line gives; a new cost replaces the old one."""
    names = {field.name for field in fields(SamplerConfig)} - {"schedule"}
    given = {n: v for n, v in vars(args).items() if n in names and v is not None}
    explicit = base.allocation == "explicit"
    if args.schedule is not None:
        if args.allocation is not None:
            raise ConfigError(
                f"allocation: got {args.allocation} with --schedule, which says k of every "
                "timestep, expected one of them"
            )
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
        if not 0 <= last - first < _MOST_IMAGES:
            raise ConfigError(
                f"{name}: got the range {part.strip()}, expected first-last, at most {_MOST_IMAGES}"
            )
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
    if not 1 <= count <= _MOST_IMAGES:
        raise ConfigError(f"count: got {count}, expected at least 1 and at most {_MOST_IMAGES}")
    if args.labels not in ("all", "balanced") and len(cycle) > count:
        raise ConfigError(
            f"labels: got {len(cycle)} for {count} images, expected at most one for each"
        )
    if seeds is None:
        seeds = [args.seed + i for i in range(count)]
    if args.labels == "balanced":
        labels = [i * classes // count for i in range(count)]
        columns = count // classes if count % classes == 0 else 0
    else:
        labels = [cycle[i % len(cycle)] for i in range(count)]
        # a row of every label once; of a single one a square
        columns = len(cycle) if 1 < len(cycle) <= 16 < 2 * count else 0
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
        "source": source.identity(),
        "model": plain(source.model.config),
        "diffusion": plain(source.diffusion.config),
        "sample": image_settings(config),
        "iterations": ks,
        "labels": args.labels,
        "seeds": args.seeds if args.seeds is not None else f"{args.seed}+i",
        "count": len(labels),
    }
    ids = list(range(shard, len(labels), shards))
    return Request(labels, seeds, ids, columns, settings)


def check_draws_nothing(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option of what is drawn, or of when iterations end, which
    --calibrate would ignore."""
    defaults = parser()
    allocation = args.allocation if args.allocation != "learned" else None
    for name, got in (("tol", args.tol), ("max-iters", args.max_iters), ("allocation", allocation)):
        if got is not None:
            raise ConfigError(
                f"{name}: got {got} with --calibrate, which runs every iteration of all timesteps "
                "alike, expected none"
            )
    for name in DRAWN:
        if getattr(args, name) != defaults.get_default(name):
            option = name.replace("_", "-")
            raise ConfigError(
                f"{option}: got it with --calibrate, which draws nothing, expected none"
            )
