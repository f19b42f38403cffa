"""Samples drawn and measured: ``python -m fpdm.evaluate [SOURCE] [--sets 4] [--strict]``.

SOURCE is a run directory (EMA of its newest checkpoint), an export directory, or nothing: the
digits model of the package. What is measured, and the targets, are in fpdm.quality. The table is
printed and written as ``evaluation.json`` of the run, as its ``evaluation-HASH.json`` under other
settings than its own, or as ``evaluations/NAME-HASH.json`` here for an export. HASH is of weights
and settings, and an evaluation of others is not replaced; ``evaluation.json`` follows the run's
newest checkpoint. Exit status 0 whatever it says, unless ``--strict``.
``--sweep`` draws quality against iterations per timestep at fixed budgets (fpdm.sweep).
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fpdm import sweep
from fpdm.cli import given_names, parse_options, replace_cost, run_main, take_option
from fpdm.config import ConfigError, DataConfig, SamplerConfig, UserError
from fpdm.data import open_dataset
from fpdm.files import TEMPORARY, atomic_write, make_directory, read_small, write_problem
from fpdm.pretrained import LoadedSource, choose_device, image_settings, load_source
from fpdm.quality import Evaluation, baseline, digits, evaluate_pixels, evaluate_samples
from fpdm.recipes import load_config
from fpdm.settings import flat, idle, plain

# what every point of a sweep decides itself
SWEPT = (
    "sample.iters", "sample.budget", "sample.budget_macs", "sample.steps", "sample.schedule",
    "sample.allocation", "sets", "count", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Settings of the command; ``sample`` begins as the source's own."""

    sample: SamplerConfig
    data: DataConfig
    sets: int = field(default=4, metadata={"help": "how many are drawn, of 898 digits each"})
    count: int = field(default=256, metadata={"help": "samples per set, of data other than digits"})
    seed: int = field(default=0, metadata={"help": "sample i has seed + i"})
    held_out: str = field(
        default="", metadata={"help": "folder of images or latents that training did not see"}
    )
    out: str = field(
        default="",
        metadata={"help": "JSON file or directory of results (the run's own, or evaluations/)"},
    )


def is_digits(source: LoadedSource) -> bool:
    """Whether the model draws what the built-in digits are: one channel, 8 x 8, ten classes."""
    c = source.model.config
    return (c.in_channels, c.input_size, c.num_classes) == (1, 8, 10)


def _check_digits(given: Sequence[str]) -> None:
    """The digits' model is measured against the digits, whatever else is asked for."""
    ignored = [n for n in given if n in ("count", "held_out") or n.startswith("data.")]
    if ignored:
        raise ConfigError(
            f"--{', --'.join(ignored)}: got one with a model of the digits, expected none: it is "
            "measured against the built-in digits (--sets: how often)"
        )


def draw(source: LoadedSource, config: SamplerConfig, labels: Sequence[int], seed: int) -> Tensor:
    """One sample per label; sample i has seed ``seed + i``."""
    sampler = source.sampler(config)
    total = len(labels) * len(sampler.plan.steps)
    with tqdm(total=total, unit="step", desc="sampling", leave=None, disable=None) as bar:
        seeds = range(seed, seed + len(labels))
        return sampler.sample(labels, seeds, progress=bar.update, stats=False).x.cpu()


def evaluate(source: LoadedSource, options: Options) -> Evaluation:
    """Draw ``options.sets`` sets and measure them. Raises ConfigError for what cannot be met."""
    for name, least in (("sets", 1), ("count", 2)):
        if (got := getattr(options, name)) < least:
            raise ConfigError(f"{name}: got {got}, expected at least {least}")
    if is_digits(source):
        labels = digits().labels.tolist() * options.sets
        return evaluate_samples(
            draw(source, options.sample, labels, options.seed), labels, options.sets
        )
    if options.data.kind == "digits":
        raise ConfigError("data.kind: got digits, expected the images or latents of this model")
    data = options.data
    if data.latent_scale is None:  # of another one its samples would lie elsewhere
        data = replace(data, latent_scale=source.latent_scale)
    train, held_out = open_dataset(data), None
    if options.held_out:
        scale = getattr(train, "latent_scale", None)
        held_out = open_dataset(replace(data, path=options.held_out, latent_scale=scale))
        if held_out.fingerprint == train.fingerprint:  # before an hour of sampling
            raise ConfigError(
                f"held_out: got {options.held_out}, the training images themselves, expected "
                "images that training did not see"
            )
    classes = source.model.config.num_classes
    labels = [i % classes for i in range(options.sets * options.count)]
    return evaluate_pixels(draw(source, options.sample, labels, options.seed), train, held_out)


def _sweep(source: LoadedSource, options: Options, wanted: dict[str, str | None]) -> int:
    """``--sweep``; see fpdm.sweep."""
    if not is_digits(source):
        raise ConfigError("--sweep: got a model of other data, expected digits (it needs a judge)")
    found, seeds = sweep.asked(
        source.model.config, wanted, source.diffusion.config.timesteps
    )  # fmt: skip
    labels = digits().labels.tolist()

    def measure(point: sweep.Point, seed: int) -> dict[str, float]:
        x = draw(source, point.config(options.sample), labels, seed << 32)
        values = {r.name: r.value for r in evaluate_samples(x, labels).results}
        return {
            "frechet": values["Frechet distance"], "accuracy": values["conditional accuracy"]
        }  # fmt: skip

    settings = {"source": source.digest(), "sample": plain(options.sample)}
    half = baseline()
    references = {
        "real halves": half["unstratified_frechet_mean"],
        "real halves, equal class counts": half["frechet_mean"],
    }
    out = Path(options.out or "sweep")
    sweep.run(found, range(seeds), measure, out, settings, references)
    return 0


def _run_data(path: str | None) -> DataConfig:
    """The data section of a run; that of the digits for anything else."""
    config = Path(path or "") / "config.yaml"
    return load_config(str(config)).data if path and config.is_file() else DataConfig()


def settings_of(source: LoadedSource, options: Options) -> dict[str, Any]:
    """What an evaluation of the source depends on, as its record keeps it."""
    settings: dict[str, Any] = {
        "sample": image_settings(options.sample),
        "sets": options.sets,
        "seed": options.seed,
    }
    if not is_digits(source):
        data, off = plain(options.data), idle(DataConfig, flat(options.data, "data."))
        data = {name: value for name, value in data.items() if f"data.{name}" not in off}
        settings |= {"count": options.count, "data": data, "held_out": options.held_out}
    return settings


def results_path(source: LoadedSource, given: str, settings: dict[str, Any], own: bool) -> Path:
    """Where results go, made ready before anything is measured: ``--out``, else the run, whose
    ``own`` settings have a place of theirs; beside an export, which may be shared or installed,
    nothing is written.

    Raises:
        UserError: it cannot be written, or holds something else than an evaluation of these.
    """
    tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    run = (source.path / "checkpoints").is_dir()
    if given:
        out = Path(given)
        if out.is_dir() or given.endswith("/"):
            out = out / "evaluation.json"
    elif run:
        out = source.path / ("evaluation.json" if own else f"evaluation-{tag}.json")
    else:
        out = Path(f"evaluations/{source.name}-{tag}.json")
    try:
        make_directory(out.parent)
        # an unwritable place must not cost the measurement
        probe = out.with_name(f"{TEMPORARY}probe-{out.name}")
        atomic_write(probe, b"")
        probe.unlink()
    except OSError as error:
        raise UserError(write_problem(out, error)) from error
    if out.exists():
        _check_replaced(out, settings, newest=run and own and not given)
    return out


def _check_replaced(out: Path, settings: dict[str, Any], newest: bool) -> None:
    """Raises ConfigError unless ``out`` is an evaluation of ``settings``; where it follows the
    ``newest`` checkpoint, one of another may be replaced, which is printed."""
    try:
        record = json.loads(read_small(out))
        old, name, _ = flat(record), record["source"]["name"], record["results"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"out: got {out}, which is no evaluation, expected another --out"
        ) from error
    for key, value in flat(settings).items():
        # a resumed run may have other settings of its sampler, and its data may have been moved
        moves = newest and (key.startswith(("source.", "sample.")) or key == "data.path")
        if old.get(key, value) != value and not moves:
            raise ConfigError(f"{key}: got {value}, expected {old[key]} of {out}, or another --out")
    if name != settings["source"]["name"]:
        print(f"replaces   the evaluation of {name} in {out}")


def _measure(source: LoadedSource, options: Options, own: Options, strict: bool) -> int:
    """Samples drawn and measured: the table is printed, the record written. ``own``: the source's
    settings. Exit status."""
    settings = settings_of(source, options)
    default = source.which == "ema" and settings == settings_of(source, own)
    settings["source"] = source.identity()
    out = results_path(source, options.out, settings, default)
    found = evaluate(source, options)
    print(found.table(), flush=True)
    record = found.to_dict() | settings | {
        "sample": plain(options.sample),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    atomic_write(out, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    print(f"wrote {out}")
    return 1 if strict and not found.passed else 0


def command(argv: list[str]) -> int:
    """``python -m fpdm.evaluate``; see the module. Raises UserError."""
    help_only = "-h" in argv or "--help" in argv
    strict = "--strict" in argv
    argv = [token for token in argv if token != "--strict"]
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    weights, argv = take_option("--weights", argv)
    device, argv = take_option("--device", argv)
    wanted: dict[str, str | None] = {}
    for name in ("budgets", "ks", "seeds"):
        wanted[name], argv = take_option(f"--{name}", argv)
    sweeping = "--sweep" in argv
    if any(wanted.values()) and not sweeping:
        raise ConfigError("--budgets, --ks, --seeds: got one without --sweep, expected none")
    argv = [token for token in argv if token != "--sweep"]
    extra = {
        "SOURCE": "run or export directory (first; default: the shipped digits)",
        "--strict": "exit status 1 unless every target is met",
        "--weights": "ema or raw, of a run directory", "--device": "auto, cpu, cuda",
        "--sweep": "quality against k at fixed budgets, into --out (sweep/)",
        "--budgets, --ks, --seeds": "of the sweep: blocks, iterations, number of seeds",
    }  # fmt: skip
    prog = "python -m fpdm.evaluate [SOURCE]"
    if help_only:
        about = "Sampling settings that are not given are SOURCE's own, not these defaults.\n\n"
        parse_options(
            Options(SamplerConfig(iters=8), DataConfig()), ["--help"], prog, extra, about=about
        )
    source = load_source(path, weights, None, choose_device(device or "auto"))
    own = Options(source.sampler_config, _run_data(path))
    # a sweep refuses a cost, which it decides itself
    options = parse_options(own, argv if sweeping else replace_cost(argv), prog, extra)
    if is_digits(source):
        _check_digits(given_names(argv))
    if sweeping:
        given = ["--strict"] * strict
        given += [f"--{name}" for name in given_names(argv) if name in SWEPT]
        if given:
            raise ConfigError(
                f"--sweep: got {', '.join(given)}, expected --budgets, --ks, --seeds in its place"
            )
        return _sweep(source, options, wanted)
    return _measure(source, options, own, strict)


if __name__ == "__main__":
    sys.exit(run_main("fpdm.evaluate", command))
