"""Latents on disk: shards under a manifest, and their writer.

A folder holds ``manifest.json`` and ``shard_00000.safetensors``, ``shard_00001.safetensors``, ...

    latents       (rows, C, h, w) float16 or float32, times the manifest's latent_scale already
    latents_flip  the same for the mirrored images (optional, in all shards or in none)
    labels        (rows,) int64, 0 <= label < num_classes

Rows are numbered through the shards in the manifest's order, never a directory listing's. The
manifest holds size, SHA-256 and a CRC-32 per tensor for each shard and a SHA-256 of itself; every
byte is checked each time a folder is opened. Hashes show damage, they do not show who wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpdm.files import (
    FileRecord,
    TensorFile,
    failpoint,
    fsync_directory,
    new_file,
    read_safetensors,
    read_small,
    write_problem,
    write_safetensors,
)
from fpdm.settings import UserError, one_line

MANIFEST = "manifest.json"
ORIGIN = "origin.json"  # of shards that fpdm.encode makes
_VERSION = 1
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_EXPONENT = {"float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
_T = TypeVar("_T")
_R = TypeVar("_R")

# latents (b, C, h, w), labels (b,), latents of the mirrored images (b, C, h, w) or None
LatentBatch = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]


class DataError(UserError):
    """A data set that cannot be opened, read or written; the message names the file or the row."""


@dataclass(frozen=True)
class Shard:
    """One file of the manifest."""

    file: str
    rows: int
    size: int
    sha256: str
    crc32: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says: shape (C, h, w), dtype, rows, classes, shards in order."""

    shape: tuple[int, int, int]
    dtype: str
    count: int
    num_classes: int
    latent_scale: float
    flip: bool
    shards: tuple[Shard, ...]

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest, so that any changed byte of a file shows."""
        content = {"format": "fpdm-latents", "version": _VERSION, **asdict(self)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n"


def thread_map(function: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
    """``map`` over threads, results in order. Hashing and image decoding release the GIL."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def listed(names: Sequence[object], limit: int = 3) -> str:
    """The first names and how many more there are, for a message of one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


def check_request(indices: np.ndarray, flips: np.ndarray | None, count: int) -> None:
    """Refuse indices that are not (B,) integers in [0, count), and flips that are not (B,) bools.

    Raises:
        DataError: names the first offender.
    """
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise DataError(
            f"indices: got {indices.dtype} {indices.shape}, expected integers of shape (B,)"
        )
    outside = (indices < 0) | (indices >= count)
    if outside.any():
        raise DataError(f"indices: got {indices[outside][0]}, expected 0 <= index < {count}")
    if flips is not None and (flips.shape != indices.shape or flips.dtype != np.bool_):
        raise DataError(f"flips: got {flips.dtype} {flips.shape}, expected bool {indices.shape}")


class LatentShards:
    """An opened folder of shards; see ``open_latents``.

    ``batch`` gives x (B, C, h, w) float32 = stored latents * latent_scale / manifest.latent_scale
    and labels (B,) int64; where ``flips`` is true the mirrored image's latents. Only the rows that
    are asked for are read from disk.
    """

    def __init__(
        self, manifest: Manifest, files: Sequence[TensorFile], labels: Tensor, latent_scale: float
    ) -> None:
        self.manifest, self.latent_scale = manifest, latent_scale
        self.shape = manifest.shape
        self.num_classes = manifest.num_classes
        self._files, self._labels = files, labels
        self._factor = latent_scale / manifest.latent_scale
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])[:-1]
        content = f"{hashlib.sha256(manifest.to_bytes()).hexdigest()} latent_scale={latent_scale!r}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return self.manifest.count

    def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Rows ``indices`` (B,). Raises DataError for an index out of range, a row that the file no
        longer holds, and a flip where no mirrored latents are stored."""
        check_request(indices, flips, len(self))
        if flips is not None and flips.any() and not self.manifest.flip:
            raise DataError("flips: got true, expected false: the shards hold no latents_flip")
        stored = np.empty((len(indices), *self.shape), self.manifest.dtype)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        for i in np.unique(owner):
            at = np.flatnonzero(owner == i)
            rows = indices[at].astype(np.int64) - self._starts[i]
            mirrored = np.zeros(len(at), bool) if flips is None else flips[at]
            for name, chosen in (("latents", ~mirrored), ("latents_flip", mirrored)):
                if chosen.any():
                    self._gather(i, name, rows[chosen], stored, at[chosen])
        x = torch.from_numpy(stored).float()
        labels = self._labels[torch.from_numpy(indices.astype(np.int64))]
        return (x if self._factor == 1.0 else x.mul_(self._factor)), labels

    def _gather(self, i: int, name: str, rows: np.ndarray, out: np.ndarray, to: np.ndarray) -> None:
        try:
            self._files[i].gather(name, rows, out, to)
        except UserError as error:
            first, last = self._starts[i] + rows.min(), self._starts[i] + rows.max()
            raise DataError(f"{error} (reading {len(rows)} of rows {first}..{last})") from None


def open_latents(path: Path, latent_scale: float | None, flip: bool) -> LatentShards:
    """Check every byte of a folder of shards and keep its files open; without a scale of one's own
    the latents come as they are stored.

    Raises:
        DataError: a missing, surplus, truncated or changed file, NaN or Inf, a label out of range,
            another shape, dtype or number of rows than the manifest says, or ``flip`` without
            mirrored latents. Shard and rows are named.
    """
    manifest = read_manifest(path)
    if flip and not manifest.flip:
        raise DataError(f"data.flip: got true, expected false: {path} holds no latents_flip")
    names = {shard.file for shard in manifest.shards}
    surplus = sorted({entry.name for entry in path.glob("[!.]*.safetensors")} - names)
    if surplus:
        raise DataError(f"{path}: got files that are not in the manifest: {listed(surplus)}")
    starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])
    _allow_open_files(len(names))

    def check(i: int) -> tuple[TensorFile, Tensor] | DataError:
        try:
            return _open_shard(path, manifest, manifest.shards[i], int(starts[i]))
        except DataError as error:
            return error

    opened = list(thread_map(check, range(len(manifest.shards))))
    errors = [result for result in opened if isinstance(result, DataError)]
    if errors:
        more = f" (and {len(errors) - 1} more damaged shards)" if errors[1:] else ""
        raise DataError(f"{errors[0]}{more}")
    files, labels = zip(*(x for x in opened if not isinstance(x, DataError)))
    return LatentShards(manifest, files, torch.cat(labels), latent_scale or manifest.latent_scale)


def _allow_open_files(count: int) -> None:
    """Raises the soft limit by ``count`` as far as the hard one allows: every shard stays open, and
    the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a folder. Raises DataError: missing, damaged or of another version."""
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(f"{path}: got a folder without {MANIFEST}, expected latent shards")
    try:
        raw = read_small(file)
    except UserError as error:
        raise DataError(str(error)) from None
    try:
        content = json.loads(raw)
        known, version = content.pop("format") == "fpdm-latents", content.pop("version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        known = False
    if not known:
        raise DataError(f"{file}: damaged, or not a manifest of latents")
    if version != _VERSION:
        raise DataError(f"{file}: got format version {version!r:.20}, expected {_VERSION}")
    try:
        del content["sha256"]
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        manifest = Manifest(**{**content, "shape": tuple(content["shape"])})
        intact = manifest.to_bytes() == raw
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise DataError(f"{file}: damaged, its content does not match its own sha256")
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: Manifest) -> None:
    """Whoever wrote it: names that stay inside the folder, sorted shards, sums that fit."""
    for i, shard in enumerate(manifest.shards):
        if not isinstance(shard.crc32, dict):
            raise DataError(f"{file}: got shard {i} without a CRC-32 per tensor")
        name = _shard_name(i)
        if shard.file != name:
            raise DataError(f"{file}: got shard {i} named {shard.file!r:.60}, expected {name}")
    rows = [shard.rows for shard in manifest.shards]
    if not rows or not all(type(n) is int and n > 0 for n in rows) or sum(rows) != manifest.count:
        raise DataError(
            f"{file}: got count {manifest.count!r:.20} and rows {listed(rows)}, expected rows > 0 "
            "that sum to count"
        )
    sizes = (*manifest.shape, manifest.num_classes)
    if len(sizes) != 4 or not all(type(n) is int and n > 0 for n in sizes):
        raise DataError(
            f"{file}: got shape {manifest.shape!r:.60} and {manifest.num_classes!r:.20} classes, "
            "expected (C, h, w) and at least one class"
        )
    scale = manifest.latent_scale
    if manifest.dtype not in tuple(_DTYPES) or type(scale) is not float or not 0 < scale < math.inf:
        raise DataError(
            f"{file}: got dtype {manifest.dtype!r:.20} and latent_scale {scale!r:.20}, "
            "expected float16 or float32 and a positive number"
        )


def _shard_name(i: int) -> str:
    return f"shard_{i:05d}.safetensors"


def _open_shard(
    folder: Path, manifest: Manifest, shard: Shard, start: int
) -> tuple[TensorFile, Tensor]:
    """Check one shard against the manifest, then keep it open; beside it its labels."""
    path = folder / shard.file
    rows = f"rows {start}..{start + shard.rows - 1}"
    try:
        read_safetensors(path, FileRecord(shard.size, shard.sha256, shard.crc32), keep=False)
        file = TensorFile(path)
        expected: dict[str, tuple[Any, Any]] = {
            "latents": (_DTYPES[manifest.dtype], (shard.rows, *manifest.shape)),
            "labels": (torch.int64, (shard.rows,)),
        }
        if manifest.flip:
            expected["latents_flip"] = expected["latents"]
        if file.kinds.keys() != expected.keys():
            raise DataError(f"{path}: got {sorted(file.kinds)}, expected {sorted(expected)}")
        for name, kind in expected.items():
            if file.kinds[name] != kind:
                (got, shape), (dtype, wanted) = file.kinds[name], kind
                raise DataError(f"{path}: {name}: got {got} {shape}, expected {dtype} {wanted}")
        labels = np.empty(shard.rows, np.int64)
        file.read("labels", 0, labels)
        for name in (name for name in expected if name != "labels"):
            _check_finite(file, name, shard.rows, start, manifest)
    except UserError as error:
        raise DataError(f"{error} ({rows})") from None
    outside = (labels < 0) | (labels >= manifest.num_classes)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{path}: got label {labels[row]} in row {start + row}, "
            f"expected 0 <= label < {manifest.num_classes}"
        )
    return file, torch.from_numpy(labels)


def _check_finite(file: TensorFile, name: str, rows: int, first: int, manifest: Manifest) -> None:
    step = max(1, (1 << 19) // math.prod(manifest.shape))
    for start in range(0, rows, step):
        part = np.empty((min(step, rows - start), *manifest.shape), manifest.dtype)
        file.read(name, start, part)
        row = first_nonfinite(part)
        if row is not None:
            raise DataError(f"{file.path}: {name}: got NaN or Inf in row {first + start + row}")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors over the memory map of a safetensors file (the library maps, and copies nothing)."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None


def first_nonfinite(latents: np.ndarray) -> int | None:
    """First row of (rows, ...) that holds NaN or Inf; by exponent bits: isfinite is slow."""
    kind, mask = _EXPONENT[latents.dtype.name]
    step = max(1, (1 << 20) // max(1, math.prod(latents.shape[1:])))
    for start in range(0, len(latents), step):
        chunk = np.ascontiguousarray(latents[start : start + step])
        bad = (chunk.view(kind) & mask) == mask
        if bad.any():
            return start + int(np.flatnonzero(bad.reshape(len(chunk), -1).any(axis=1))[0])
    return None


def write_shards(
    batches: Iterable[LatentBatch], out: Path, *, dtype: str, latent_scale: float,
    rows_per_shard: int, num_classes: int | None = None,
) -> Manifest:  # fmt: skip
    """Write batches of latents to a new folder: all or nothing, also across a kill or power cut.

    The folder is built as ``.NAME.partial`` beside ``out`` (one writer per name; what an earlier
    kill left there is removed), each file fsynced, then renamed. ``latent_scale`` is the factor
    that the latents already carry; ``num_classes=None`` takes the largest label + 1.

    Raises:
        DataError: ``out`` exists, or a ``.NAME.partial`` of something else; NaN or Inf (also an
            overflow of float16), a label out of range, a batch of another shape, no rows at all,
            or a full disk. Rows are counted from 0.
    """
    done = empty_manifest(out, dtype, latent_scale, rows_per_shard, num_classes)
    partial = partial_folder(out)
    known = re.compile(rf"shard_\d+\.safetensors|{re.escape(MANIFEST)}")
    if other := sorted(p.name for p in partial.glob("*") if not known.fullmatch(p.name)):
        what = "an unfinished encode" if ORIGIN in other else listed(other)
        raise DataError(f"{partial}: got {what}, expected none there, where {out} is to be built")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        groups = regroup(batches, dtype, num_classes, rows_per_shard)
        done = write_groups(groups, partial, done, num_classes)
        if not done.count:
            raise DataError("got no rows, expected at least one")
        with new_file(partial / MANIFEST) as write:
            write(memoryview(done.to_bytes()))
        publish(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(write_problem(out, error)) from error
        raise
    return done


def partial_folder(out: Path) -> Path:
    """Where ``out`` is built."""
    return out.with_name(f".{out.name}.partial")


def empty_manifest(
    out: Path, dtype: str, latent_scale: float, rows_per_shard: int, num_classes: int | None
) -> Manifest:
    """The manifest of no rows; raises DataError for settings that cannot be met."""
    if dtype not in _DTYPES or rows_per_shard < 1 or not 0 < latent_scale < math.inf:
        raise DataError(
            f"got dtype {dtype}, rows_per_shard {rows_per_shard}, latent_scale {latent_scale}; "
            f"expected {' or '.join(_DTYPES)}, at least 1, a positive number"
        )
    if out.exists():
        raise DataError(f"{out}: got a name that exists, expected a new folder")
    return Manifest((0, 0, 0), dtype, 0, num_classes or 0, float(latent_scale), False, ())


def publish(partial: Path, out: Path) -> None:
    """The finished folder under its name, durably."""
    fsync_directory(partial)
    failpoint("before-rename")
    os.rename(partial, out)
    failpoint("before-dir-fsync")
    fsync_directory(out.parent)


def write_groups(
    groups: Iterable[LatentBatch], folder: Path, done: Manifest, num_classes: int | None,
    keep: Callable[[Manifest], object] = lambda done: None,
) -> Manifest:  # fmt: skip
    """Write each group as a shard after those of ``done``. Returns the manifest with all of them;
    ``keep`` is called with the manifest so far after every shard."""
    for latents, labels, mirrored in groups:
        tensors = {"latents": torch.from_numpy(latents), "labels": torch.from_numpy(labels)}
        if mirrored is not None:
            tensors["latents_flip"] = torch.from_numpy(mirrored)
        name = _shard_name(len(done.shards))
        with new_file(folder / name) as write:
            record, _ = write_safetensors(write, tensors)
        shard = Shard(name, len(labels), record.size, record.sha256, record.tensors)
        classes = num_classes or max(done.num_classes, int(labels.max()) + 1)
        done = replace(
            done, shape=tuple(latents.shape[1:]), count=done.count + len(labels),
            num_classes=classes, flip=mirrored is not None, shards=(*done.shards, shard),
        )  # fmt: skip
        keep(done)
    return done


def regroup(
    batches: Iterable[LatentBatch], dtype: str, num_classes: int | None, rows: int, seen: int = 0
) -> Iterator[LatentBatch]:
    """Checked batches, cast to ``dtype``, cut and joined into groups of ``rows``; ``seen`` rows
    came before them."""
    pending: list[LatentBatch] = []
    held = 0
    first: LatentBatch | None = None
    for batch in batches:
        first = first or batch
        checked = _checked(batch, first, dtype, num_classes, seen)
        size = len(checked[1])
        seen += size
        for start in range(0, size, rows):
            pending.append(_cut(checked, start, start + rows))
            held += len(pending[-1][1])
            if held >= rows:
                group = _join(pending)
                yield _cut(group, 0, rows)
                pending, held = [_cut(group, rows, held)], held - rows
    if held:
        yield _join(pending)


def _cut(group: LatentBatch, start: int, stop: int) -> LatentBatch:
    latents, labels, mirrored = (None if x is None else x[start:stop] for x in group)
    return latents, labels, mirrored  # type: ignore[return-value]  # None only where it was


def _join(batches: list[LatentBatch]) -> LatentBatch:
    mirrored = [batch[2] for batch in batches if batch[2] is not None]
    return (
        np.concatenate([batch[0] for batch in batches]),
        np.concatenate([batch[1] for batch in batches]),
        np.concatenate(mirrored) if mirrored else None,
    )


def _checked(
    batch: LatentBatch, first: LatentBatch, dtype: str, num_classes: int | None, seen: int
) -> LatentBatch:
    latents, labels, mirrored = batch
    shape = (len(labels) if labels.ndim == 1 else -1, *first[0].shape[1:])
    if latents.ndim != 4 or latents.shape != shape or latents.dtype.kind != "f":
        raise DataError(
            f"row {seen}: latents: got {latents.dtype} {latents.shape} with labels {labels.shape}, "
            f"expected floating point of shape (b, C, h, w) with (C, h, w) = {first[0].shape[1:]}"
        )
    if (mirrored is None) != (first[2] is None) or (shape != getattr(mirrored, "shape", shape)):
        raise DataError(f"row {seen}: got latents_flip in some rows only, or of another shape")
    if labels.dtype.kind not in "iu":
        raise DataError(f"row {seen}: labels: got {labels.dtype}, expected integers")
    outside = (labels < 0) | (labels >= (2**31 if num_classes is None else num_classes))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        limit = "" if num_classes is None else f" < {num_classes}"
        raise DataError(f"row {seen + row}: got label {labels[row]}, expected 0 <= label{limit}")
    cast: list[np.ndarray | None] = []
    for x in (latents, mirrored):
        with np.errstate(over="ignore"):  # an overflow is reported with its row below
            cast.append(None if x is None else np.ascontiguousarray(x, dtype=np.dtype(dtype)))
        bad = None if cast[-1] is None else first_nonfinite(cast[-1])
        if bad is not None:
            raise DataError(f"row {seen + bad}: got NaN or Inf in {dtype}, expected finite latents")
    return cast[0], labels.astype(np.int64), cast[1]  # type: ignore[return-value]
