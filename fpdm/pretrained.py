"""A trained model with its settings, from a run directory or an export directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fpdm import calibration, checkpoint, exports
from fpdm.config import ConfigError, ExecutionConfig, Impl, SamplerConfig, from_dict
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.exports import SHIPPED
from fpdm.files import tensors_digest
from fpdm.model import FPDM, DiT, model_of
from fpdm.settings import plain, update


@dataclass(frozen=True)
class LoadedSource:
    """A trained model and how it was trained; ``which`` of its weights: ema or raw; ``path`` of its
    directory; ``latent_scale`` of its data and ``label_dropout``, None where that is not known;
    ``classes``: their names in the order of their numbers, where they have any."""

    model: FPDM | DiT
    diffusion: Diffusion
    sampler_config: SamplerConfig
    name: str
    which: str
    path: Path
    latent_scale: float | None = None
    label_dropout: float | None = None
    classes: tuple[str, ...] = ()

    def sampler(self, config: SamplerConfig) -> Sampler:
        """A sampler, with the model's calibration if ``config`` wants one. Raises ConfigError for
        settings that cannot be met."""
        self.check_guidance(config)
        found = None
        if config.allocation == "learned":
            there = [path for path in self.calibrations() if path.is_file()]
            found = calibration.load(there[0], self.digest()) if there else None
        return Sampler(self.model, self.diffusion, config, calibration=found)

    def check_guidance(self, config: SamplerConfig) -> None:
        """Raises ConfigError for guidance by a null label that was never trained."""
        if config.guidance != 1.0 and self.label_dropout == 0.0:
            raise ConfigError(
                f"guidance: got {config.guidance:g}, expected 1: {self.path} was trained with "
                "train.label_dropout=0 (the null label is never trained)"
            )

    def calibrations(self) -> list[Path]:
        """Where its calibration may lie, a new one in the first place: the run. An export may be
        shared or installed: nothing is written there, though one that it came with is read."""
        beside = self.path / calibration.NAME
        if (self.path / "checkpoints").is_dir():
            return [beside]
        return [Path(f"calibrations/{self.name}-{self.digest()[:8]}.json"), beside]

    def identity(self) -> dict[str, str]:
        """What a record of its images says that they are of."""
        return {"name": self.name, "weights": self.which, "sha256": self.digest()}

    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of every parameter: what the images depend on."""
        return tensors_digest(self.model.named_parameters())


def image_settings(config: SamplerConfig) -> dict[str, Any]:
    """The settings of a sampler that its images depend on."""
    return {k: v for k, v in plain(config).items() if k not in ("batch", "graphs")}


def load_source(
    path: str | Path | None = None,
    which: str | None = None,
    impl: Impl | None = None,
    device: str | torch.device = "cpu",
) -> LoadedSource:
    """The model in a run directory (``which`` = ema or raw of its newest good checkpoint; None is
    ema) or in an export directory (which holds one of them); without path: the shipped digits.
    ``impl`` replaces the implementation alone: everything else runs as in training.

    Raises ConfigError when ``path`` is neither or does not hold the weights asked for,
    CheckpointError when its files are damaged.
    """
    if which not in (None, "ema", "raw"):
        raise ConfigError(f"weights: got {which!r}, expected ema or raw")
    path = SHIPPED if path is None else Path(path)
    if (path / exports.CONFIG).is_file():
        return _load_export(path, which, impl, device)
    if (path / "checkpoints").is_dir():
        return _load_run(path, which or "ema", impl, device)
    if path.suffix in (".pt", ".pth", ".ckpt") and path.is_file():
        raise ConfigError(
            f"source: got the file {path}, expected a directory: make one of it by "
            f"python -m fpdm.interop {path} OUT"
        )
    raise ConfigError(
        f"source: got {path}, expected a run directory (with checkpoints/) or an export directory "
        f"(with {exports.CONFIG}){_nearest(path)}"
    )


def _is_source(path: Path) -> bool:
    return (path / exports.CONFIG).is_file() or (path / "checkpoints").is_dir()


def _nearest(path: Path) -> str:
    """What may have been meant: a run that ``path`` lies in, one that lies in it, one in runs/."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    found = [p for p in (*path.parents[:3], *inside, Path("runs") / path.name) if _is_source(p)]
    return f"; did you mean {' or '.join(map(str, found[:3]))}?" if found else ""


def _load_export(
    path: Path, which: str | None, impl: Impl | None, device: str | torch.device
) -> LoadedSource:
    found = exports.read_export(path)
    if which not in (None, found.weights):
        raise ConfigError(f"weights: got {which}, expected {found.weights}, all that {path} holds")
    execution = None if impl is None else ExecutionConfig(impl=impl)
    model = model_of(found.model, found.state(), str(path / exports.WEIGHTS), execution).to(device)
    # where the export names no cost: the model's own default
    sampler = SamplerConfig(iters=8 if found.model.kind == "fpdm" else None)
    if "sample" in found.extra:
        sampler = update(SamplerConfig(), found.extra["sample"], "sample.")
    diffusion = Diffusion(found.diffusion, device)
    name = path.resolve().name
    scale = found.extra.get("latent_scale")
    if scale is not None and not (type(scale) in (int, float) and scale > 0):
        raise ConfigError(f"{path}: got latent_scale {scale!r:.40}, expected a positive number")
    dropout = found.extra.get("label_dropout")
    if dropout is not None and not (type(dropout) in (int, float) and 0 <= dropout < 1):
        raise ConfigError(
            f"{path}: got label_dropout {dropout!r:.40}, expected at least 0, below 1"
        )
    return LoadedSource(
        model, diffusion, sampler, name, found.weights, path, scale, dropout,
        _class_names(path, found.extra),
    )  # fmt: skip


def _class_names(path: Path, said: dict[str, Any]) -> tuple[str, ...]:
    names = said.get("classes", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{path}: got classes {names!r:.40}, expected a list of names")
    return tuple(names)


def _load_run(
    path: Path, which: str, impl: Impl | None, device: str | torch.device
) -> LoadedSource:
    found = checkpoint.load_newest(path / "checkpoints", report=_warn)
    if found is None:
        raise ConfigError(f"source: got {path} without a checkpoint, expected a run that saved one")
    config = from_dict(found.meta["config"])
    execution = config.execution if impl is None else replace(config.execution, impl=impl)
    state = dict(found.tensors["model"])
    if which == "ema":
        state.update(found.tensors["ema"])
    model = model_of(config.model, state, str(found.path), execution)
    return LoadedSource(
        model.to(device), Diffusion(config.diffusion, device), config.sample,
        f"{path.resolve().name}-{found.step}", which, path,
        config.data.latent_scale if config.data.kind == "latents" else None,
        config.train.label_dropout, _class_names(found.path, found.meta),
    )  # fmt: skip


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; auto is CUDA when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {name!r}, expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got cuda, expected cpu (no CUDA device is usable here)")
    return device
