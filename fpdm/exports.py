"""Exports: a folder of ``model.safetensors`` and ``config.json``, and what a state dict shows.

    export        writes a whole state dict and its configs, tied together by a hash
    read_export   the description, without the weights;  Export.state() the weights, hash verified
    infer_config  the architecture that a state dict in published names has
    compare       whether a state dict is a model's: the same names and shapes, all finite

An export that replaces another one is whole at every moment: its weights come first, under a name
of their own, then its description, by whose hash a reader knows them, then the usual name. Nothing
here builds a model: ``fpdm.model.from_pretrained`` does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from torch import Tensor, nn

from fpdm import __version__, settings
from fpdm.config import DiffusionConfig, ModelConfig, UserError
from fpdm.files import (
    CheckpointError,
    FileRecord,
    atomic_write,
    failpoint,
    fsync_directory,
    make_directory,
    read_safetensors,
    read_small,
    write_problem,
    write_safetensors,
)

FORMAT = 1
SHIPPED = Path(__file__).parent / "assets" / "digits_export"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
NEXT = "model.next.safetensors"  # weights until the description that is theirs is there
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # the published widths S, B, L, XL


def infer_config(
    state: Mapping[str, Tensor],
    pre_post_timestep_conditioning: bool = False,
    num_heads: int | None = None,
    where: str = "state dict",
) -> ModelConfig:
    """The architecture that a published-layout state dict has.

    Raises:
        CheckpointError: a telling tensor is missing or has a shape that no model here has.
    """
    patch = _telling(state, "x_embedder.proj.weight", 4, where)
    positions = _telling(state, "pos_embed", 3, where)
    labels = _telling(state, "y_embedder.embedding_table.weight", 2, where)
    out = _telling(state, "final_layer.linear.weight", 2, where)
    width, channels, size = patch[0], patch[1], patch[2]
    side = math.isqrt(positions[1])
    if patch[3] != size or side * side != positions[1] or labels[0] < 2:
        raise CheckpointError(
            f"{where}: got patches {size}x{patch[3]}, {positions[1]} tokens, {labels[0]} label "
            "rows, expected square patches, a square of tokens, a class and the null label"
        )
    if out[0] != 2 * channels * size * size:
        raise CheckpointError(
            f"{where}: final_layer.linear: got {out[0]} rows, expected {2 * channels * size**2} "
            "(prediction and learned variance)"
        )
    heads = num_heads or _HEADS.get(width)
    if type(heads) is not int:
        raise CheckpointError(
            f"{where}: got num_heads={heads}, expected a number (width {width} has no usual one; "
            "--num_heads gives it)"
        )
    fpdm = any(name.startswith("block_fixed_point.") for name in state)
    depth = _depth(state, "blocks")
    if not fpdm and not depth:
        raise CheckpointError(f"{where}: got neither block_fixed_point.* nor blocks.*")
    return ModelConfig(
        kind="fpdm" if fpdm else "dit",
        input_size=side * size,
        patch_size=size,
        in_channels=channels,
        hidden_size=width,
        num_heads=heads,
        pre_depth=_depth(state, "blocks_pre") if fpdm else 0,
        post_depth=_depth(state, "blocks_post") if fpdm else 0,
        depth=0 if fpdm else depth,
        num_classes=labels[0] - 1,
        pre_post_timestep_conditioning=fpdm and pre_post_timestep_conditioning,
    )


def _telling(state: Mapping[str, Tensor], name: str, rank: int, where: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{where}: {name} is missing, expected a published-layout state dict")
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{where}: {name}: got shape {shape}, expected {rank} dimensions")
    return shape


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks ``prefix.0, prefix.1, ...`` without a gap; strict loading finds the rest."""
    pattern = re.compile(rf"{prefix}\.(\d+)\.")
    indices = {int(match[1]) for name in state if (match := pattern.match(name))}
    return next(index for index in range(len(indices) + 1) if index not in indices)


def compare(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError, one line with the first differences, unless ``state`` has the names
    and shapes of ``model``'s state dict and is finite. Values of ``model`` are not read: it may be
    on the meta device."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    common = [name for name in own if name in state]
    for name in common:
        got, expected = tuple(state[name].shape), tuple(own[name].shape)
        if got != expected:
            problems.append(f"{name}: got shape {got}, expected {expected}")
    if not problems:
        broken = (name for name in common if not state[name].isfinite().all())
        problems = [f"{name} holds NaN or Inf" for name in broken]
    if problems:
        more = f" and {len(problems) - 3} more" if problems[3:] else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:3])}{more}")


def _check_architecture(state: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    """What the tensors show must be what the config says."""
    flag = config.pre_post_timestep_conditioning
    found = asdict(infer_config(state, flag, config.num_heads, where))
    for name, value in asdict(config).items():
        if found[name] != value:
            raise CheckpointError(
                f"{where}: got weights with {name}={found[name]}, expected {value} (the config's)"
            )


@dataclass(frozen=True)
class Export:
    """What ``config.json`` of an export says; ``extra`` is what the exporter added (JSON)."""

    path: Path
    model: ModelConfig
    diffusion: DiffusionConfig
    weights: Literal["ema", "raw"]
    extra: dict[str, Any]
    fpdm: str
    record: FileRecord

    def state(self) -> dict[str, Tensor]:
        """The weights, in published names, checked against the stored hash.

        Raises CheckpointError: missing, damaged, or of another architecture than ``model``.
        """
        weights = self.path / WEIGHTS
        for path in (weights, self.path / NEXT):
            with contextlib.suppress(CheckpointError):
                found = read_safetensors(path, self.record)
                break
        else:  # damaged, or renamed between the two looks
            found = read_safetensors(weights, self.record)
        _check_architecture(found, self.model, str(weights))
        return found


def export(
    out_dir: str | Path,
    model_config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    *,
    which: Literal["ema", "raw"],
    diffusion: DiffusionConfig,
    extra: Mapping[str, Any],
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` into ``out_dir``, both or neither.

    ``state_dict`` is a whole one (``pos_embed`` included) in published names; ``which`` says what
    the weights are. The hash in ``config.json`` ties the two files together.

    Raises:
        CheckpointError: weights of another architecture, or not finite, or files of that name which
            are no export. UserError: not writable.
    """
    out = Path(out_dir)
    _check_architecture(state_dict, model_config, f"export to {out}")
    record: list[FileRecord] = []

    def write(file: BinaryIO) -> None:
        written, finite = write_safetensors(file.write, state_dict)
        if not finite:
            raise CheckpointError(f"export to {out}: the weights hold NaN or Inf")
        record.append(written)

    try:
        make_directory(out)
    except OSError as error:
        raise UserError(write_problem(out, error)) from error
    _settle(out)
    atomic_write(out / NEXT, write)
    body = {
        "format": FORMAT,
        "fpdm": __version__,
        "weights": which,
        "model": asdict(model_config),
        "diffusion": asdict(diffusion),
        "extra": dict(extra),
        "file": asdict(record[0]),
    }
    atomic_write(out / CONFIG, json.dumps(body, indent=1).encode() + b"\n")
    failpoint("before-rename")
    _rename(out)
    return out


def _rename(out: Path) -> None:
    """The weights that are described, under the usual name, durably."""
    try:
        os.replace(out / NEXT, out / WEIGHTS)
        fsync_directory(out)
    except OSError as error:
        raise UserError(write_problem(out / WEIGHTS, error)) from error


def _settle(out: Path) -> None:
    """Ends what a kill has stopped, so that the weights that are described are not overwritten.
    Raises CheckpointError for files that are no export's."""
    there = [name for name in (WEIGHTS, CONFIG) if (out / name).exists()]
    if not there:
        return
    try:
        record = FileRecord(**json.loads(read_small(out / CONFIG))["file"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"export to {out}: got a {there[0]} of something else, expected a new directory or one "
            "that holds an export"
        ) from error
    with contextlib.suppress(CheckpointError):
        read_safetensors(out / NEXT, record, keep=False)
        _rename(out)


def read_export(path: str | Path) -> Export:
    """The description of an export, without its weights.

    Raises:
        CheckpointError: missing or malformed. ConfigError: a setting that cannot be met.
    """
    file = Path(path) / CONFIG
    inner = Path(path) / "export"
    if not file.exists() and (inner / CONFIG).exists():
        raise CheckpointError(f"{path}: got a run, expected an export, such as its {inner}")
    try:
        body = json.loads(read_small(file))
        if body["format"] != FORMAT:
            raise CheckpointError(f"{file}: got format {body['format']}, expected {FORMAT}")
        return Export(
            Path(path),
            settings.update(ModelConfig(), body["model"], "model."),
            settings.update(DiffusionConfig(), body["diffusion"], "diffusion."),
            settings.coerce("weights", Literal["ema", "raw"], body["weights"]),
            dict(body["extra"]),
            str(body["fpdm"]),
            FileRecord(**body["file"]),
        )
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = settings.one_line(error)
        raise CheckpointError(f"{file}: got no description of an export: {reason}") from None
