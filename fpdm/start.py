"""What a run begins with: what its data decide, and weights of another run (``train.init``).

The weights of an export, or the EMA of a run's newest checkpoint, are read by rank 0 before the
first step of a run and never again: a run that has a checkpoint continues from it, wherever the
other one is by then. Parameters and average begin with them, the optimiser with nothing.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fpdm import checkpoint
from fpdm.config import Config, ConfigError, DataConfig, UserError, diff
from fpdm.data import Dataset
from fpdm.files import read_small
from fpdm.pretrained import LoadedSource, load_source
from fpdm.settings import flat
from fpdm.shards import ORIGIN, LatentShards

_LABELS = "y_embedder.embedding_table.weight"


def settled(config: Config, data: Dataset) -> Config:
    """``config`` with the scale that the latents of ``data`` have, where it leaves that to them."""
    if not isinstance(data, LatentShards):
        return config
    return replace(config, data=replace(config.data, latent_scale=data.latent_scale))


def class_names(config: DataConfig, data: Dataset) -> list[str]:
    """Names of the classes in the order of their numbers: the folders of images, also of those that
    the latents were encoded from; empty where there are none."""
    names: Any = getattr(data, "classes", [])
    if config.kind == "latents" and (origin := Path(config.path) / ORIGIN).is_file():
        # they are for reading alone: no reason to refuse a run
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError, RecursionError):
            names = json.loads(read_small(origin))["classes"]
    known = isinstance(names, list) and len(names) == data.num_classes and names != [""]
    return [str(name) for name in names] if known else []


def begin_with(model: nn.Module, config: Config, checkpoints: Path) -> dict[str, str] | None:
    """Gives ``model`` the weights of ``train.init`` and says so, unless the run has a checkpoint
    already; returns what they are of. The label table of other classes stays as it is.

    Raises:
        UserError: there are none, they are damaged or not finite, or of another model.
    """
    init = config.train.init
    if not init or checkpoint.any_under(checkpoints):
        return None
    try:
        source = load_source(init)
    except UserError as error:
        # the name that the setting has here
        raise type(error)(f"train.init: {str(error).removeprefix('source: ')}") from error
    _check_model(source, config)
    state, told = source.model.state_dict(), ""
    there, here = source.model.config.num_classes, config.model.num_classes
    if there != here:
        state[_LABELS] = model.state_dict()[_LABELS]
        told = f"; label table afresh, for {here} classes in place of {there}"
    model.load_state_dict(state)
    others = diff(flat(source.diffusion.config, "diffusion."), flat(config.diffusion, "diffusion."))
    if source.latent_scale not in (None, config.data.latent_scale):
        others.append(f"data.latent_scale: {source.latent_scale} -> {config.data.latent_scale}")
    if others:
        told += f"; trained with other settings: {'; '.join(others)}"
    found = source.identity()
    print(
        f"begins with {init}: {source.name} ({source.which}, {found['sha256']}){told}", flush=True
    )
    return found


def _check_model(source: LoadedSource, config: Config) -> None:
    lines = diff(flat(source.model.config, "model."), flat(config.model, "model."))
    wrong = [line for line in lines if not line.startswith("model.num_classes: ")]
    if wrong:
        raise ConfigError(
            f"train.init: got {config.train.init} of another model: {'; '.join(wrong)}; expected "
            "the same but for num_classes"
        )
