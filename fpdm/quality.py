"""How good samples are: targets for digits, distances for everything else.

For digits a set is 898 samples with the labels of the reference half, which neither the model nor
the classifier has seen, and

    conditional accuracy   share recognised as their label, mean over the sets          >= 0.95
    Frechet distance       |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of the classifier's
                           features, set against reference half, mean over the sets     <= 2 b
    nearest-digit ratio    median distance sample -> nearest training digit over
                           median distance reference -> nearest training digit          >= 0.8
    MMD                    unbiased squared maximum mean discrepancy, kernel (a.b / 64 + 1)^3

b is the mean Frechet distance over 20 random splits of the real digits into 898 and 898; beside it
stands the stricter mean over 20 splits stratified by label, as the sets are (both committed in
``assets/digits_baseline.json``). Distances are Euclidean, in units of x, of images clamped to
[-1,1]. Other data has no classifier here and gets the nearest distances alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpdm import classifier
from fpdm.config import ConfigError, DataConfig, UserError
from fpdm.data import Dataset, open_dataset
from fpdm.metrics import frechet, mmd, moments, nearest_distances, split_halves

BASELINE = Path(__file__).parent / "assets" / "digits_baseline.json"
SPLITS = 20
ACCURACY, FRECHET, RATIO = 0.95, 2.0, 0.8
_CHUNK = 1024


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


def batches(data: Dataset) -> Iterator[Tensor]:
    """All images of a data set, a batch at a time."""
    for start in range(0, len(data), _CHUNK):
        yield data.batch(np.arange(start, min(start + _CHUNK, len(data))))[0]


def evaluate_pixels(x: Tensor, train: Dataset, held_out: Dataset | None = None) -> Evaluation:
    """Nearest distances of samples x (N,C,h,w) to the images of ``train``, and their ratio to those
    of ``held_out`` images that training did not see (without them there is no target).

    Raises ConfigError when shapes differ, a sample is not finite, or half of ``held_out`` and more
    are training images.
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
        if real.median() == 0:
            raise ConfigError(
                f"held_out: got images of which {int((real == 0).sum())} of {len(real)} are "
                "training images, expected images that training did not see"
            )
        ratio = median / real.median().item()
        note = f"held-out images are {real.median().item():.3f} from training images (median)"
        results.append(Result("nearest ratio", ratio, ">=", RATIO, note))
    return Evaluation(
        f"{len(x)} samples, {len(train)} training images", tuple(results), tuple(missing)
    )
