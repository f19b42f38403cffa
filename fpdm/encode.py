"""Photos to latent shards: ``python -m fpdm.data encode PHOTOS OUT --vae VAE``.

ImageNet takes hours, so an encode that is stopped loses only the shard it was writing. Finished
shards stay in ``.OUT.partial`` beside ``origin.json``, which says what they depend on, and the same
command continues after the last good one. Batches start anew with every shard, so that the result
is bit for bit that of an uninterrupted run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fpdm import noise
from fpdm.files import (
    LOCK,
    TEMPORARY,
    CheckpointError,
    FileRecord,
    atomic_write,
    claim,
    directory_lock,
    read_safetensors,
    write_problem,
)
from fpdm.images import ImageFolder
from fpdm.shards import (
    MANIFEST,
    ORIGIN,
    DataError,
    LatentBatch,
    Manifest,
    empty_manifest,
    partial_folder,
    publish,
    read_manifest,
    regroup,
    write_groups,
)
from fpdm.vae import TOLD, VAE


def encoded_batches(
    images: ImageFolder, vae: VAE, start: int, *, seed: int, flip: bool, batch: int, rows: int
) -> Iterator[LatentBatch]:
    """Latents of ``images`` from number ``start``, a multiple of ``rows``, in their order, and with
    ``flip`` of their mirror images. Gray images have three equal channels."""
    with tqdm(
        total=len(images), initial=start, desc="encoding", unit="img", disable=None
    ) as bar:  # fmt: skip
        for at, stop in cut(start, len(images), rows, batch):
            x, labels = images.batch(np.arange(at, stop))
            x, hashes = x.expand(-1, 3, -1, -1), images.sha256[at:stop]
            latents = vae.encode(x, seed, hashes, noise.ENCODE).cpu().numpy()
            mirrored = None
            if flip:
                mirrored = vae.encode(x.flip(-1), seed, hashes, noise.ENCODE_FLIP).cpu().numpy()
            yield latents, labels.numpy(), mirrored
            bar.update(stop - at)


def cut(start: int, count: int, rows: int, batch: int) -> list[tuple[int, int]]:
    """Parts of at most ``batch`` of start .. count - 1, anew from every multiple of ``rows``."""
    edges = [
        i
        for first in range(start, count, rows)
        for i in range(first, min(first + rows, count), batch)
    ]
    return list(zip(edges, [*edges[1:], count]))


def resume_shards(
    batches: Callable[[int], Iterable[LatentBatch]],
    out: Path,
    origin: Mapping[str, Any],
    *,
    dtype: str,
    latent_scale: float,
    rows_per_shard: int,
    num_classes: int,
) -> tuple[Manifest, int]:
    """``shards.write_shards`` that goes on where an earlier call was stopped; the manifest, and how
    many rows were there already.

    ``origin`` (JSON) is what the rows depend on; ``batches`` makes them from a given row on, the
    first of a shard. Every byte of what is taken up is checked first; from a damaged shard on it is
    made again. A finished folder is checked the same way and left as it is.

    Raises:
        DataError: as ``write_shards``, another process is at it, or a finished folder is damaged.
            ConfigError: what lies there has another origin or other settings, the first difference
            of which is named, or is no encode.
    """
    origin = {
        **origin, "dtype": dtype, "latent_scale": latent_scale, "rows_per_shard": rows_per_shard,
        "num_classes": num_classes,
    }  # fmt: skip
    if (out / ORIGIN).is_file():
        claim(out, origin, ORIGIN, TOLD)
        whole = read_manifest(out)
        _, problem = _intact(out, whole)
        if problem:
            raise DataError(
                f"{problem}; expected all of a finished encode whole: after mv {out} "
                f"{partial_folder(out)} the same command makes it again from there"
            )
        return whole, whole.count
    done = empty_manifest(out, dtype, latent_scale, rows_per_shard, num_classes)
    partial = partial_folder(out)
    claim(partial, origin, ORIGIN, TOLD)
    with directory_lock(partial, 0.0) as state:
        if state == "busy":
            raise DataError(f"{out}: got another process that writes it, expected none")
        try:
            done = _take_up(partial, done)
            there = done.count
            groups = regroup(batches(there), dtype, num_classes, rows_per_shard, there)
            done = write_groups(
                groups, partial, done, num_classes,
                keep=lambda done: atomic_write(partial / MANIFEST, done.to_bytes()),
            )  # fmt: skip
            (partial / LOCK).unlink(missing_ok=True)
            publish(partial, out)
        except OSError as error:
            raise DataError(write_problem(out, error)) from error
    return done, there


def _intact(folder: Path, found: Manifest) -> tuple[int, str]:
    """How many shards are whole before the first damaged one, and what is wrong with that one."""
    for i, shard in enumerate(found.shards):
        record = FileRecord(shard.size, shard.sha256, shard.crc32)
        try:
            read_safetensors(folder / shard.file, record, keep=False)
        except CheckpointError as error:
            return i, str(error)
    return len(found.shards), ""


def _take_up(partial: Path, nothing: Manifest) -> Manifest:
    """What is whole in ``partial``, up to the first damaged shard; removes the other shards."""
    found, done = nothing, nothing
    if (partial / MANIFEST).is_file():
        found = read_manifest(partial)
    whole, problem = _intact(partial, found)
    if problem:
        warnings.warn(f"{problem}; made again from there", stacklevel=1)
    if whole:
        kept = found.shards[:whole]
        done = replace(found, count=sum(shard.rows for shard in kept), shards=kept)
    for path in partial.iterdir():
        ours = path.match("shard_*.safetensors") or path.name.startswith(TEMPORARY)
        if ours and path.name not in {shard.file for shard in done.shards}:
            path.unlink()
    return done
