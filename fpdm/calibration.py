"""Iterations per timestep learned once: what a calibration batch's residuals say, kept as a file.

``learn`` samples some images with many iterations at every timestep; allocation ``learned``
(``budget.greedy``) then spends any budget, over any number of timesteps, where those residuals fall
most. The file names its weights; where it lies is the business of ``pretrained.LoadedSource``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fpdm.budget import Calibration, reuse_of
from fpdm.config import ConfigError, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.files import CheckpointError, atomic_write, make_directory, read_small, write_problem
from fpdm.model import FPDM
from fpdm.settings import UserError, one_line

NAME = "calibration.json"
FORMAT = 1
DEPTH = 4  # iterations measured, in multiples of the average k


def learn(
    model: FPDM,
    diffusion: Diffusion,
    config: SamplerConfig,
    labels: list[int],
    seeds: Sequence[int],
    digest: str,
) -> Calibration:
    """Residuals of images with ``labels`` and ``seeds`` under ``config``, with K = 4 times its
    average k iterations at every timestep. ``digest`` names the weights.

    Raises ConfigError without images, or for settings that cannot be met.
    """
    if not labels:
        raise ConfigError("calibrate: got 0 images, expected at least 1")
    # what it costs, whatever the allocation
    plain = replace(config, allocation="constant", schedule=(), tol=0.0, max_iters=None)
    if config.schedule:
        plain = replace(plain, iters=-(-sum(config.schedule) // len(config.schedule)))
    average = Sampler(model, diffusion, plain).plan.steps[0][1]
    deep = replace(plain, iters=DEPTH * average, budget=None, budget_macs=None)
    sampler = Sampler(model, diffusion, deep)
    stats = sampler.sample(labels, seeds).stats
    residual = stats.residual.double().mean(dim=2).tolist()
    if not all(value < float("inf") for row in residual for value in row):
        raise ConfigError("calibrate: got residuals with NaN or Inf, expected finite ones")
    return Calibration(
        tuple(t for t, _ in sampler.plan.steps), tuple(map(tuple, residual)), reuse_of(config),
        config.guidance, digest,
    )  # fmt: skip


def save(calibration: Calibration, path: Path) -> None:
    """Write it. Raises UserError when that cannot be done."""
    body = {"format": FORMAT, **asdict(calibration)}
    try:
        make_directory(path.parent)
    except OSError as error:
        raise UserError(write_problem(path, error)) from error
    atomic_write(path, json.dumps(body, allow_nan=False).encode() + b"\n")


def load(path: Path, digest: str) -> Calibration:
    """The one of the weights that ``digest`` names.

    Raises CheckpointError for a file that holds none, ConfigError for one of other weights.
    """
    found = _parse(path)
    if found.weights != digest:
        raise ConfigError(
            f"{path}: got a calibration of weights {found.weights}, expected {digest} "
            "(--calibrate IMAGES makes a new one)"
        )
    return found


def _parse(path: Path) -> Calibration:
    try:
        body: dict[str, Any] = json.loads(read_small(path))
        if body.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        residual = tuple(tuple(float(value) for value in row) for row in body.pop("residual"))
        timesteps = tuple(int(t) for t in body.pop("timesteps"))
        found = Calibration(timesteps, residual, **body)
        depths = {len(row) for row in residual}
        if len(depths) != 1 or 0 in depths or len(set(timesteps)) != len(residual):
            raise ValueError("expected as many rows as timesteps, all of one length")
        if not all(0 <= value < float("inf") for row in residual for value in row):
            raise ValueError("expected finite residuals")
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: got no calibration: {one_line(error)}") from None
