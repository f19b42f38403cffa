"""The output directory of a sampler: single images, settings, npz, grid, each whole or not at all.

    NNNNNN.png     every image
    NNNNNN.npy     float32 (C,h,w), of a model of latents; with a VAE their pictures lie beside them
    samples.npz    arr_0 (N,h,w,C) uint8, clamp(127.5 x + 128, 0, 255) truncated; of latents without
                   a VAE (N,C,h,w) float32; labels (N,) int64; seeds (N,) uint64
    grid.png       the first images
    settings.json  what the images depend on
    vae.json       what made pictures of latents

A directory belongs to the settings, and to the VAE, it was begun with. samples.npz and grid.png are
made from the single images, by whichever process finds all of them there.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpdm import figures
from fpdm.config import ModelConfig, UserError
from fpdm.files import atomic_write

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


def develop(
    decode: Callable[[Tensor], Tensor], latents: Store, pictures: Store, ids: Sequence[int],
    batch: int,
) -> int:  # fmt: skip
    """Make the missing pictures of ``ids`` from their stored latents, ``batch`` at once; how many
    there were to make. ``decode``: (B,C,h,w) to (B,3,H,W)."""
    missing = [i for i in ids if pictures.read(i) is None]
    quiet = None if missing else True  # none: a bar on a terminal only
    with tqdm(total=len(missing), unit="img", desc="decoding", disable=quiet) as bar:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            x = decode(torch.stack([latents.tensor(i) for i in part]))
            for i, picture in zip(part, x):
                pictures.write(i, picture)
            bar.update(len(part))
    return len(missing)


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
