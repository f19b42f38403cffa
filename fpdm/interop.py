"""Weights of other programs: a published .pt, safetensors file or state dict -> model.

    python -m fpdm.interop FILE OUT [--diffusion.prediction eps, ...]     FILE as the export OUT

Published files are read as data: safetensors, or a torch zip archive through the restricted reader
that knows tensors, plain containers and ``argparse.Namespace``, and calls nothing else.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm.cli import parse_options, run_main
from fpdm.config import ConfigError, DiffusionConfig, ExecutionConfig
from fpdm.exports import export, infer_config
from fpdm.files import CheckpointError, read_safetensors
from fpdm.model import FPDM, DiT, model_of

_FLAG = "fixed_point_pre_post_timestep_conditioning"
_ARCHIVE_CODE_LIMIT = 1 << 26


def load_official(
    source: str | Path | Mapping[str, Any],
    pre_post_timestep_conditioning: bool = False,
    num_heads: int | None = None,
    execution: ExecutionConfig | None = None,
) -> FPDM | DiT:
    """A model from a published-layout state dict, the architecture inferred from its shapes; on the
    CPU, to run as ``execution`` says.

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
    return model_of(infer_config(state, bool(flag), heads, where), state, where, execution)


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
        raise CheckpointError(
            f"{path}: got neither, expected a safetensors file or a torch zip archive (.pt)"
        )
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


@dataclass(frozen=True)
class Untold:
    """What leaves no trace in the weights."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    num_heads: int | None = field(
        default=None, metadata={"help": "none: as stored, or of the published width"}
    )
    pre_post_timestep_conditioning: bool = field(
        default=False, metadata={"help": "whether pre and post blocks see t, where FILE is silent"}
    )
    latent_scale: float | None = field(
        default=None, metadata={"help": "that latents were multiplied by; none: their VAE's"}
    )


def command(argv: list[str]) -> int:
    """``python -m fpdm.interop FILE OUT``; see the module. Raises UserError."""
    places = []
    while argv and not argv[0].startswith("-"):
        places.append(argv[0])
        argv = argv[1:]
    extra = {"FILE": "a published .pt, or safetensors", "OUT": "directory of the export"}
    options = parse_options(Untold(), argv, "fpdm.interop", extra)
    if len(places) != 2:
        raise ConfigError(f"got {len(places)} places, expected two: FILE and OUT")
    file, out = places
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ConfigError(f"OUT: got {out}, which holds files, expected a new directory")
    model = load_official(file, options.pre_post_timestep_conditioning, options.num_heads)
    scale = {} if options.latent_scale is None else {"latent_scale": options.latent_scale}
    export(out, model.config, model.state_dict(), which="ema", diffusion=options.diffusion,
           extra=scale)  # fmt: skip
    c, d = model.config, options.diffusion
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"wrote {out}: {c.kind}, {parameters:.1f} M parameters, width {c.hidden_size}, "
        f"{c.num_heads} heads; taken to predict {d.prediction} with zero_terminal_snr "
        f"{str(d.zero_terminal_snr).lower()} (--diffusion.prediction, ...): the weights do not say"
    )
    return 0


if __name__ == "__main__":
    run_main("fpdm.interop", command)
