"""How good samples are: ``python -m fpdm.evaluate [SOURCE] [--sets 4] [--strict] [--sample.*]``.

SOURCE is a run directory (EMA of its newest checkpoint), an export directory, or nothing: the
digits model of the package. For digits every set is 898 samples with the labels of the reference
half, which neither the model nor the classifier has seen, and

    conditional accuracy   share recognised as their label, mean over the sets          >= 0.95
    Frechet distance       |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of the classifier's
                           features, set against reference half, mean over the sets     <= 2 b
    nearest-digit ratio    median distance sample -> nearest training digit over
                           median distance reference -> nearest training digit          >= 0.8
    MMD                    unbiased squared maximum mean discrepancy, kernel (a.b / 64 + 1)^3

b is the mean Frechet distance over 20 random splits of the real digits into 898 and 898; beside it
stands the stricter mean over 20 splits stratified by label, as the sets are (both committed in
``assets/digits_baseline.json``). Distances are Euclidean, in units of x, of images clamped to
[-1,1]. Other data has no classifier here and gets the nearest distances alone. The table is printed
and written as ``evaluation.json`` of the run, or ``evaluations/NAME-HASH.json`` here for an export;
exit status 0 whatever it says, unless ``--strict``.
``--sweep`` draws quality against iterations per timestep at fixed budgets (fpdm.sweep).
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpdm import classifier, sweep
from fpdm.cli import parse_options, replace_cost, run_main, take_option
from fpdm.config import ConfigError, DataConfig, SamplerConfig, UserError, load_config
from fpdm.data import Dataset, open_dataset
from fpdm.files import atomic_write, make_directory, write_problem
from fpdm.metrics import frechet, mmd, moments, nearest_distances, split_halves
from fpdm.pretrained import LoadedSource, choose_device, load_source
from fpdm.settings import plain

BASELINE = Path(__file__).parent / "assets" / "digits_baseline.json"
SPLITS = 20
ACCURACY, FRECHET, RATIO = 0.95, 2.0, 0.8
_CHUNK = 1024
# what every point of a sweep decides itself
SWEPT = (
    "sample.iters", "sample.budget", "sample.budget_macs", "sample.steps", "sample.schedule",
    "sample.allocation", "sets", "count", "seed",
)  # fmt: skip


# results


@dataclass(frozen=True)
class Result:
    """One line of the table; ``rule`` is ">=" or "<=" where there is a target."""

    name: str
    value: float
    rule: str = ""
    target: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None without a target; a value that is not finite passes nothing."""
        if self.target is None:
            return None
        good = self.value >= self.target if self.rule == ">=" else self.value <= self.target
        return math.isfinite(self.value) and good


@dataclass(frozen=True)
class Evaluation:
    """The lines, what is not available and why, and details for ``evaluation.json``."""

    title: str
    results: tuple[Result, ...]
    missing: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there was a target, and every one was met."""
        verdicts = [r.passed for r in self.results if r.passed is not None]
        return bool(verdicts) and all(verdicts)

    def table(self) -> str:
        """For people: value, target, pass or FAIL, per line."""
        words = {None: "", True: "pass", False: "FAIL"}
        lines = [self.title]
        for r in self.results:
            target = "-" if r.target is None else f"{r.rule} {r.target:.4g}"
            line = f"  {r.name:<24}{r.value:>10.4g}  {target:<10}{words[r.passed]:<6}{r.note}"
            lines.append(line.rstrip())
        return "\n".join(lines + [f"  not available: {text}" for text in self.missing])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become null."""
        results = [asdict(r) | {"passed": r.passed} for r in self.results]
        return {
            "title": self.title, "passed": self.passed, "results": _finite(results),
            "missing": list(self.missing), "details": _finite(self.details),
        }  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# digits


@dataclass(frozen=True)
class Yardstick:
    """The real digits as the classifier sees them; f_* (N,64) float64."""

    train: Tensor
    reference: Tensor
    labels: Tensor
    f_reference: Tensor
    held_out: float  # median distance reference -> nearest training digit


def _all(data: Dataset) -> tuple[Tensor, Tensor]:
    return data.batch(np.arange(len(data)))


@cache
def digits() -> Yardstick:
    """Both halves, with what every evaluation needs of them."""
    train, _ = _all(open_dataset(DataConfig(kind="digits", split="train")))
    x, labels = _all(open_dataset(DataConfig(kind="digits", split="reference")))
    f = classifier.features(x, classifier.shipped())
    held_out = nearest_distances(x, [train]).median().item()
    return Yardstick(train, x, labels, f, held_out)


@cache
def baseline() -> dict[str, Any]:
    """The committed half/half distances. Raises UserError when they are missing or damaged."""
    try:
        return json.loads(BASELINE.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{BASELINE}: cannot be read ({error}); install fpdm again") from None


def measure_baseline(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Frechet distance and MMD between the halves of SPLITS stratified splits of all digits, and of
    as many splits that ignore the labels (for comparison: their class counts differ too)."""
    data = open_dataset(DataConfig(kind="digits", split="all"))
    x, labels = _all(data)
    f = classifier.features(x, weights)
    seeds = list(range(SPLITS))
    halves = [split_halves(labels, seed) for seed in seeds]
    plain_halves = [split_halves(torch.zeros_like(labels), seed) for seed in seeds]
    values = [frechet(*moments(f[a]), *moments(f[b])) for a, b in halves]
    unstratified = [frechet(*moments(f[a]), *moments(f[b])) for a, b in plain_halves]
    discrepancy = [mmd(f[a], f[b]) for a, b in halves]
    return {
        "data": data.fingerprint,
        "seeds": seeds,
        "per_half": len(halves[0][0]),
        "frechet": values,
        "frechet_mean": float(np.mean(values)),
        "frechet_std": float(np.std(values, ddof=1)),
        "mmd": discrepancy,
        "mmd_rms": float(np.sqrt(np.mean(np.square(discrepancy)))),
        "unstratified_frechet_mean": float(np.mean(unstratified)),
    }


def evaluate_samples(x: Tensor, labels: Sequence[int] | Tensor, sets: int = 1) -> Evaluation:
    """Digits x (N,1,8,8) in [-1,1] that were asked for as ``labels`` (N,), in ``sets`` equal parts
    that follow each other.

    The target of the Frechet distance holds for sets of 898, the size of the baseline's halves;
    other sizes get the number without a verdict. Samples that are not finite fail everything.
    Raises ConfigError for shapes and labels that do not fit.
    """
    x, y = x.detach().cpu(), torch.as_tensor(labels, dtype=torch.int64).cpu()
    if x.dim() != 4 or x.shape[1:] != (1, 8, 8) or y.shape != x.shape[:1]:
        raise ConfigError(
            f"samples: got {tuple(x.shape)} with {tuple(y.shape)} labels, expected (N,1,8,8), (N,)"
        )
    if sets < 1 or len(x) % sets or len(x) < 2 * sets:
        raise ConfigError(f"sets: got {sets} of {len(x)} samples, expected equal ones of 2 or more")
    if y.min() < 0 or y.max() > 9:
        raise ConfigError(f"labels: got {int(y.min())}..{int(y.max())}, expected 0..9")
    bad = int((~x.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        return _not_finite(bad, len(x))
    weights, real = classifier.shipped(), digits()
    x = x.clamp(-1, 1)
    with torch.no_grad():
        f = classifier.features(x, weights)
        hit = (classifier.logits(f, weights).argmax(dim=1) == y).double()
    reference = moments(real.f_reference)
    parts = [
        {
            "accuracy": hit[rows].mean().item(),
            "frechet": frechet(*moments(f[rows]), *reference),
            "mmd": mmd(f[rows], real.f_reference),
        }
        for rows in torch.arange(len(x)).chunk(sets)
    ]
    return _digits_table(parts, _per_digit(hit, y), nearest_distances(x, [real.train]), real)


def _per_digit(hit: Tensor, labels: Tensor) -> dict[str, float]:
    return {str(c): hit[labels == c].mean().item() for c in labels.unique().tolist()}


def _digits_table(
    parts: list[dict[str, float]], per_digit: dict[str, float], distances: Tensor, real: Yardstick
) -> Evaluation:
    size, half = len(distances) // len(parts), baseline()
    mean = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    spread = " ".join(f"{part['frechet']:.3g}" for part in parts)
    b, strict = half["unstratified_frechet_mean"], half["frechet_mean"]
    like_for_like = size == half["per_half"]
    why = "" if like_for_like else f"; no verdict: sets of {size}, halves of {half['per_half']}"
    median = distances.median().item()
    worst = min(per_digit, key=lambda digit: per_digit[digit])
    results = (
        Result(
            "conditional accuracy", mean["accuracy"], ">=", ACCURACY,
            f"worst digit {worst}: {per_digit[worst]:.3f}",
        ),
        Result(
            "Frechet distance", mean["frechet"], "<=" if like_for_like else "",
            FRECHET * b if like_for_like else None,
            f"{mean['frechet'] / b:.2f} x {b:.3f} of real halves, {mean['frechet'] / strict:.2f} x "
            f"{strict:.3f} of halves with equal class counts; sets {spread}{why}",
        ),
        Result(
            "nearest-digit ratio", median / real.held_out, ">=", RATIO,
            f"median {median:.3f}, of held-out digits {real.held_out:.3f}",
        ),
        Result("MMD", mean["mmd"], note=f"of real halves {half['mmd_rms']:.2g} (root mean square)"),
    )  # fmt: skip
    title = (
        f"digits: {len(parts)} x {size} samples; classifier "
        f"{classifier.about()['accuracy_reference']:.4f} on the reference half"
    )
    details = {
        "sets": parts, "set_size": size, "accuracy_per_digit": per_digit,
        "nearest_median": median, "nearest_median_held_out": real.held_out,
        "frechet_baseline": b, "frechet_over_baseline": mean["frechet"] / b,
        "frechet_over_stratified_baseline": mean["frechet"] / strict,
        "exact_copies": int((distances == 0).sum()),
    }  # fmt: skip
    return Evaluation(title, results, details=details)


def _not_finite(bad: int, count: int) -> Evaluation:
    results = (
        Result("conditional accuracy", math.nan, ">=", ACCURACY),
        Result(
            "Frechet distance", math.nan, "<=", FRECHET * baseline()["unstratified_frechet_mean"]
        ),
        Result("nearest-digit ratio", math.nan, ">=", RATIO),
    )
    return Evaluation(
        f"digits: {bad} of {count} samples hold NaN or Inf", results, details={"not_finite": bad}
    )


# any other data


def batches(data: Dataset) -> Iterator[Tensor]:
    """All images of a data set, a batch at a time."""
    for start in range(0, len(data), _CHUNK):
        yield data.batch(np.arange(start, min(start + _CHUNK, len(data))))[0]


def evaluate_pixels(x: Tensor, train: Dataset, held_out: Dataset | None = None) -> Evaluation:
    """Nearest distances of samples x (N,C,h,w) to the images of ``train``, and their ratio to those
    of ``held_out`` images that training did not see (without them there is no target).

    Raises ConfigError when shapes differ or a sample is not finite.
    """
    x = x.detach().cpu()
    if not x.isfinite().all():
        raise ConfigError("samples: got NaN or Inf, expected finite numbers")
    median = nearest_distances(x, batches(train)).median().item()
    results = [Result("nearest distance", median, note="median, sample to training image")]
    missing = ["accuracy, Frechet distance and MMD: there is a classifier for the digits only"]
    if held_out is None:
        missing.append("nearest ratio: needs images that training did not see (--held_out PATH)")
    else:
        real = torch.cat([nearest_distances(part, batches(train)) for part in batches(held_out)])
        ratio = median / max(real.median().item(), 1e-300)
        note = f"held-out images are {real.median().item():.3f} from training images (median)"
        results.append(Result("nearest ratio", ratio, ">=", RATIO, note))
    return Evaluation(
        f"{len(x)} samples, {len(train)} training images", tuple(results), tuple(missing)
    )


# the command


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
    c = source.model_config
    return (c.in_channels, c.input_size, c.num_classes) == (1, 8, 10)


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
    train = open_dataset(options.data)
    held_out = None
    if options.held_out:
        config = asdict(options.data) | {"path": options.held_out}
        held_out = open_dataset(DataConfig(**config))
    classes = source.model_config.num_classes
    labels = [i % classes for i in range(options.sets * options.count)]
    return evaluate_pixels(draw(source, options.sample, labels, options.seed), train, held_out)


def _sweep(source: LoadedSource, options: Options, wanted: dict[str, str | None]) -> int:
    """``--sweep``; see fpdm.sweep."""
    if not is_digits(source):
        raise ConfigError("--sweep: got a model of other data, expected digits (it needs a judge)")
    found, seeds = sweep.asked(
        source.model_config, wanted, source.diffusion.config.timesteps
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


def results_path(source: LoadedSource, options: Options) -> Path:
    """Where results go, made ready before anything is measured: ``--out``, else the run; beside an
    export, which may be shared or installed, nothing is written. Raises UserError."""
    named = f"evaluations/{source.name}-{source.digest()[:8]}.json"
    run = source.path / "evaluation.json" if (source.path / "checkpoints").is_dir() else named
    out = Path(options.out or run)
    if out.is_dir() or options.out.endswith("/"):
        out = out / "evaluation.json"
    try:
        make_directory(out.parent)
        # an unwritable place must not cost the measurement
        atomic_write(out.with_name(f"{out.name}.probe"), b"")
        out.with_name(f"{out.name}.probe").unlink()
    except OSError as error:
        raise UserError(write_problem(out, error)) from error
    return out


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
        raise ConfigError("--budgets, --ks, --seeds: got one without --sweep")
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
        parse_options(Options(SamplerConfig(iters=8), DataConfig()), ["--help"], prog, extra)
    source = load_source(path, weights, None, choose_device(device or "auto"))
    default = Options(source.sampler_config, _run_data(path))
    # a sweep refuses a cost, which it decides itself
    options = parse_options(default, argv if sweeping else replace_cost(argv), prog, extra)
    if sweeping:
        given = ["--strict"] * strict
        given += [f"--{n}" for n in SWEPT if attrgetter(n)(options) != attrgetter(n)(default)]
        if given:
            raise ConfigError(
                f"--sweep: got {', '.join(given)}, expected --budgets, --ks, --seeds in its place"
            )
        return _sweep(source, options, wanted)
    out = results_path(source, options)
    found = evaluate(source, options)
    print(found.table(), flush=True)
    record = found.to_dict() | {
        "source": {"name": source.name, "weights": source.which, "sha256": source.digest()},
        "sample": plain(options.sample),
        "seed": options.seed,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    atomic_write(out, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    print(f"wrote {out}")
    return 1 if strict and not found.passed else 0


if __name__ == "__main__":
    sys.exit(run_main("fpdm.evaluate", command))
