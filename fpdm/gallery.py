"""The output directory of a sampler: single images, settings, npz, grid, each whole or not at all.

    NNNNNN.png     every image (NNNNNN.npy, float32, for latents: a VAE makes images of them)
    samples.npz    arr_0 (N,h,w,C) uint8, clamp(127.5 x + 128, 0, 255) truncated; latents
                   (N,C,h,w) float32; labels (N,) int64; seeds (N,) uint64
    grid.png       the first images
    settings.json  what the images depend on

A directory belongs to the settings it was begun with. samples.npz and grid.png are made from the
single images, by whichever process finds all of them there.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fpdm import figures
from fpdm.config import ConfigError, ModelConfig, UserError
from fpdm.files import atomic_write, make_directory, write_problem
from fpdm.settings import flat

GRID_IMAGES = 400


class Store:
    """The single images of an output directory, by id: uint8 pixels or float32 latents."""

    def __init__(self, out: Path, config: ModelConfig):
        side, c = config.input_size, config.in_channels
        self.out, self.latent = out, c not in (1, 3)
        self.shape = (c, side, side) if self.latent else (side, side, c)
        self.dtype = np.dtype(np.float32 if self.latent else np.uint8)

    def path(self, index: int) -> Path:
        """Where image ``index`` lies."""
        return self.out / f"{index:06d}.{'npy' if self.latent else 'png'}"

    def write(self, index: int, x: Tensor) -> None:
        """Store one sample (C,h,w), whole or not at all."""
        if self.latent:
            buffer = io.BytesIO()
            np.save(buffer, x.float().cpu().numpy())
            atomic_write(self.path(index), buffer.getvalue())
        else:
            atomic_write(self.path(index), figures.encode_png(figures.to_uint8(x[None])[0]))

    def read(self, index: int) -> np.ndarray | None:
        """The stored image, or None when it is missing or damaged."""
        try:
            data = self.path(index).read_bytes()
            image = (
                np.load(io.BytesIO(data)) if self.latent else figures.decode_png(data, self.shape)
            )
        except (OSError, ValueError, EOFError):
            return None
        return image if (image.shape, image.dtype) == (self.shape, self.dtype) else None

    def need(self, index: int) -> np.ndarray:
        """The stored image; UserError when it is missing or damaged."""
        image = self.read(index)
        if image is None:
            raise UserError(f"{self.path(index)}: vanished or damaged while it was needed")
        return image

    def tensor(self, index: int) -> Tensor:
        """The stored image as a sample (C,h,w); pixels land in the middle of their interval."""
        x = torch.from_numpy(self.need(index).astype(np.float32))
        return x if self.latent else (x.permute(2, 0, 1) - 127.5) / 127.5


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Take ``out`` for ``settings`` (JSON); ConfigError names the first difference to its own."""
    path = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: got the file {out}, expected a directory, new or of these images")
    try:
        make_directory(out)
    except OSError as error:
        raise ConfigError(write_problem(out, error)) from error
    if not path.exists():
        atomic_write(path, json.dumps(settings, indent=1).encode() + b"\n")
        return
    try:
        old = flat(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: got no settings, expected another output directory") from error
    new = flat(settings)
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{name}: got {new.get(name)}, expected {old.get(name)} of {path}, or another "
                "output directory"
            )


def assemble(store: Store, labels: Sequence[int], seeds: Sequence[int], columns: int) -> bool:
    """Write samples.npz and grid.png if every image is there; False if one is missing.

    UserError when one is damaged: a run of its shard makes it again.
    """
    count = len(labels)
    if not all(store.path(i).exists() for i in range(count)):
        return False

    def write(file: BinaryIO) -> None:
        # image by image: the set may be large
        shape = (count, *store.shape)
        header = {"descr": store.dtype.str, "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for i in range(count):
                    entry.write(store.need(i).tobytes())
            for name, values, dtype in (("labels", labels, np.int64), ("seeds", seeds, np.uint64)):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as entry:
                    np.lib.format.write_array(entry, np.array(values, dtype))

    atomic_write(store.out / "samples.npz", write)
    shown = min(count, GRID_IMAGES)
    rows = [labels[i : min(i + columns, shown)] for i in range(0, shown, columns)]
    named = [row[0] for row in rows] if all(len(set(row)) == 1 for row in rows) else None
    images = torch.stack([store.tensor(i) for i in range(shown)])
    figures.save_grid(images, store.out / "grid.png", columns, labels=named)
    return True
