"""What must hold before step 1: settings that agree with each other, with the data and with an
earlier session of the run; and the advice when a step runs out of memory."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fpdm import __version__
from fpdm.config import RESUME_FREE, Config, ConfigError, diff, from_dict, to_dict
from fpdm.data import Dataset
from fpdm.distributed import Ranks


def check_machine(config: Config, world: int, device: torch.device) -> None:
    """Batch and ranks, precision and device. Raises ConfigError."""
    t = config.train
    if t.batch // t.accumulate < world:
        raise ConfigError(
            f"train.batch: got {t.batch}, expected at least one sample per micro-batch and rank: "
            f"train.accumulate = {t.accumulate} times {world} ranks"
        )
    if t.precision == "bf16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ConfigError(
                f"train.precision: got bf16 on sm_{major}{minor}, expected fp16 (bf16 needs sm_80)"
            )


def check_data(config: Config, data: Dataset) -> None:
    """Model and data agree on shape and classes. Raises ConfigError."""
    c, h, w = data.shape
    if h != w:
        raise ConfigError(f"data: got {h} x {w}, expected as high as wide")
    there = {"in_channels": c, "input_size": h, "num_classes": data.num_classes}
    wrong = [name for name, value in there.items() if getattr(config.model, name) != value]
    if wrong:
        got = ", ".join(str(getattr(config.model, name)) for name in wrong)
        raise ConfigError(
            f"model.{', '.join(wrong)}: got {got}, expected the data's: "
            + " ".join(f"--model.{name} {there[name]}" for name in wrong)
        )
    if len(data) < 1:
        raise ConfigError("data: got no samples, expected at least 1")


def check_same(meta: dict[str, Any], config: Config, data: Dataset, world: int, path: Path) -> None:
    """A resumed run is the same run, but for what ``config.RESUME_FREE`` lets change. Raises
    ConfigError that names the changed fields."""
    try:
        # a setting that is younger than the checkpoint had its default
        old = to_dict(from_dict(meta["config"]))
    except ConfigError as error:
        raise ConfigError(
            f"{path} is of another version of fpdm: {error}; expected another train.name"
        ) from error
    changed = diff(old, to_dict(config), RESUME_FREE)
    if changed:
        decays = any(line.startswith("train.steps:") for line in changed)
        why = " (optim.lr_final is reached at the last step)" if decays else ""
        names = {line.partition(": ")[0] for line in changed} - {"model.num_classes"}
        fits = "train.init" not in names and not any(name.startswith("model.") for name in names)
        raise ConfigError(
            f"{path} is of another run: {'; '.join(changed)}{why}; expected the same settings, or "
            f"another train.name{_from(path) if fits else ''}"
        )
    if meta["data"] != data.fingerprint:
        why = "the data changed since"
        if meta["data"] == getattr(data, "former", ""):
            why = "some images are turned by their EXIF or laid over white, as they were not then"
        raise ConfigError(
            f"data: got fingerprint {data.fingerprint[:16]}, expected {meta['data'][:16]} of "
            f"{path}: {why}; expected the same data, or another train.name{_from(path)}"
        )
    if config.fixed_point.draws == "per_rank" and meta["ranks"] != world:
        raise ConfigError(
            f"ranks: got {world}, expected the {meta['ranks']} of {path}: with fixed_point.draws = "
            "per_rank another number draws other (n, m)"
        )
    if meta["state"]["step"] > config.train.steps:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, expected at least {meta['state']['step']}, "
            f"where {path} is"
        )


def _from(path: Path) -> str:
    """How another run begins with the weights of the run that ``path`` is a checkpoint of."""
    run = quote(str(path.parents[1]))
    return f"; a new run that begins with its weights: --train.name NEW --train.init {run}"


def check_alike(ranks: Ranks, config: Config, fingerprint: str) -> None:
    """Every rank trains the same model on the same data in the same way as rank 0. Raises
    ConfigError on the ranks that would not, PeerError on the others."""
    others = {"data": fingerprint, "fpdm": __version__, "device": ranks.device.type}
    mine = {"config": to_dict(config), **others}
    first = json.loads(ranks.of_first(json.dumps(mine).encode()))
    free = {name: why for name, why in RESUME_FREE.items() if name != "train.steps"}
    changed = diff(first["config"], mine["config"], free)
    changed += [f"{n}: {first[n]} -> {mine[n]}" for n in others if first[n] != mine[n]]
    told = f"rank {ranks.rank}: got other settings or data than rank 0, expected the same: "
    ranks.agree(ConfigError(told + "; ".join(changed)) if changed else None)


def too_large(
    config: Config, device: torch.device, step: int, without_graphs: bool, error: Exception
) -> str:
    """The message for a step that ran out of memory: which settings would need less."""
    t, e = config.train, config.execution
    graphs = "" if without_graphs else ", or train.graphs off"
    return (
        f"train.batch: got {t.batch}, out of memory on {device} in step {step}; expected less at "
        f"once: execution.recompute elementwise or full (now {e.recompute}) or more "
        f"execution.chunks (now {e.chunks}), which a resumed run may change, or more "
        f"train.accumulate (now {t.accumulate}){graphs}: {str(error).split('. ')[0]}"
    )
