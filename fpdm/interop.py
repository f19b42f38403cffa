"""Weights from and to other programs: published state dicts, and exports (a folder of two files).

Published files are read as data: safetensors, or a torch zip archive through the restricted reader
that knows tensors, plain containers and ``argparse.Namespace``, and calls nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from fpdm import __version__, settings
from fpdm.config import DiffusionConfig, ExecutionConfig, ModelConfig, UserError
from fpdm.files import (
    CheckpointError,
    FileRecord,
    atomic_write,
    make_directory,
    read_safetensors,
    read_small,
    write_problem,
    write_safetensors,
)

if TYPE_CHECKING:
    from fpdm.model import FPDM, DiT

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # the published widths S, B, L, XL
_FLAG = "fixed_point_pre_post_timestep_conditioning"
_ARCHIVE_CODE_LIMIT = 1 << 26


def load_official(
    source: str | Path | Mapping[str, Any],
    pre_post_timestep_conditioning: bool = False,
    num_heads: int | None = None,
) -> FPDM | DiT:
    """A model from a published-layout state dict, the architecture inferred from its shapes.

    ``source``: a ``.pt`` file or mapping, either a bare state dict or ``{model, ema, args, ...}``
    (the EMA is taken when present), or a safetensors file. Two things leave no trace in the
    tensors: whether pre and post blocks see the timestep, and the number of heads. Both are read
    from stored ``args`` where they are there; otherwise the arguments count, and heads default to
    those of the published widths 384, 768, 1024, 1152. The last row of the label table is the null
    label.

    Raises:
        CheckpointError: not such a file, code in it, other names or shapes, numbers not finite.
    """
    where = "state dict" if isinstance(source, Mapping) else str(source)
    stored: Any = source if isinstance(source, Mapping) else _read_weights(Path(source))
    state, args = _split(stored, where)
    flag = args.get(_FLAG, pre_post_timestep_conditioning)
    heads = args.get("num_heads") or num_heads
    if num_heads not in (None, heads):
        raise CheckpointError(f"{where}: got num_heads={num_heads}, expected {heads} (its args)")
    return _build(infer_config(state, bool(flag), heads, where), state, where)


def _read_weights(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        hint = " (from_pretrained reads export folders)" if path.is_dir() else ""
        raise CheckpointError(f"{path}: got no regular file, expected .pt or .safetensors{hint}")
    try:
        if zipfile.is_zipfile(path):
            return _read_archive(path)
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if start[8:] != b"{":
        raise CheckpointError(f"{path}: expected a safetensors file or a torch zip archive (.pt)")
    return read_safetensors(path)


def _read_archive(path: Path) -> Mapping[str, Any]:
    """A torch zip archive, mapped into memory; it may claim no more bytes than it has."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged zip archive: {error}") from None
    code = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size or code > _ARCHIVE_CODE_LIMIT:
        raise CheckpointError(f"{path}: refused: its entries claim more than its {size} bytes")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file may fail in any way; each is one line
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {found[1]}" if found else str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"{path}: refused: {reason}; expected tensors, plain containers, argparse.Namespace"
        ) from None
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path}: got {type(stored).__name__}, expected a state dict")
    state, _ = _split(stored, str(path))
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > size:
        raise CheckpointError(f"{path}: refused: its tensors claim more than its {size} bytes")
    return stored


def _split(stored: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict without wrapper prefixes, stored args) of a checkpoint or a bare state dict."""
    args = stored.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    state = stored
    for key in ("ema", "model"):
        if isinstance(stored.get(key), Mapping):
            state = stored[key]
            break
    if not state or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        for name, tensor in state.items()
    ):
        raise CheckpointError(f"{where}: got no state dict, expected names with float tensors")
    stripped = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): t for name, t in state.items()}
    return stripped, dict(args) if isinstance(args, Mapping) else {}


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
            f"{where}: got num_heads={heads}, expected a number (width {width} has no usual one)"
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


def load_strict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into ``model``: the same names and shapes, all finite, or nothing is copied.

    Raises:
        CheckpointError: one line with the first differences.
    """
    _compare(model, state, where)
    model.load_state_dict(dict(state), strict=True)


def _compare(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
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


def _build(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    where: str,
    execution: ExecutionConfig | None = None,
) -> FPDM | DiT:
    from fpdm.model import build_model

    with torch.device("meta"):  # compared before anything of the claimed size is allocated
        _compare(build_model(config, execution), state, where)
    model = build_model(config, execution)
    model.load_state_dict(dict(state), strict=True)
    return model


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


def export(
    out_dir: str | Path,
    model_config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    *,
    which: Literal["ema", "raw"],
    diffusion: DiffusionConfig,
    extra: Mapping[str, Any],
) -> Path:
    """Write ``model.safetensors`` and ``config.json`` into ``out_dir``, each atomically.

    ``state_dict`` is a whole one (``pos_embed`` included) in published names; ``which`` says what
    the weights are. The hash in ``config.json`` ties the two files together.

    Raises:
        CheckpointError: weights of another architecture, or not finite. UserError: not writable.
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
    atomic_write(out / WEIGHTS, write)
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
    return out


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
        reason = str(error).replace("\n", " ")[:200]
        raise CheckpointError(f"{file}: got no description of an export: {reason}") from None


def from_pretrained(path: str | Path, execution: ExecutionConfig | None = None) -> FPDM | DiT:
    """The model of an export, its weights checked against the stored hash.

    Raises:
        CheckpointError: missing, damaged, or of another architecture than ``config.json`` says.
    """
    found = read_export(path)
    weights = found.path / WEIGHTS
    state = read_safetensors(weights, found.record)
    _check_architecture(state, found.model, str(weights))
    return _build(found.model, state, str(weights), execution)
