"""Checkpoints that survive a kill at any instant, and name what is damaged.

A checkpoint is a directory ``root/step_0000123/``: one ``<group>.safetensors`` per group of
tensors, ``state.json`` (the caller's JSON) and ``manifest.json`` (size and SHA-256 of each file,
CRC-32 of each tensor, whether every number is finite, and a hash of itself). It is written under a
temporary name, every file is fsynced, then the directory, then it is renamed and the parent is
fsynced, so a visible checkpoint is a whole one. Only after it reads back are older ones pruned.
Nothing is pickled.

A second, different save of one step is stored beside the first as ``step_0000123.1``: a name never
changes its content, which is what lets readers run while a writer prunes. Hashes protect against
accidents, not against the author of a file. One process writes to a root at a time (a lock on the
directory says so); any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fpdm import __version__
from fpdm.files import (
    TEMPORARY,
    CheckpointError,
    FileRecord,
    directory_lock,
    failpoint,
    fsync_directory,
    make_directory,
    new_file,
    read_safetensors,
    read_small,
    write_problem,
    write_safetensors,
)

__all__ = ["FAILPOINTS", "Checkpoint", "CheckpointError", "load", "load_newest", "save"]

FORMAT = 1
FAILPOINTS = ("open", "mid-write", "before-fsync", "before-rename", "before-dir-fsync", "prune")
_LOCK_WAIT_S = 60.0
_DIRECTORY = re.compile(r"step_(\d{7,})(?:\.(\d+))?")
_GROUP = re.compile(r"[A-Za-z0-9_-]+")


class _VanishedError(Exception):
    """A checkpoint was pruned by its writer while being read."""


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. ``tensors[group][name]`` are on the CPU and own their memory."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    finite: bool


def save(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint ``step`` under ``root`` and prune to the newest ``keep`` finite ones.

    ``tensors`` maps group names to named tensors on any device; ``meta`` is JSON (its keys become
    strings). A checkpoint that holds NaN or Inf is stored, marked, and never replaces or prunes a
    finite one. Saving an equal checkpoint again keeps the existing one.

    Returns: the directory of the checkpoint, which has been read back.

    Raises:
        CheckpointError: not writable, disk full, another writer, or it does not read back. Earlier
            checkpoints are untouched; of one that could not be written nothing remains.
    """
    root = Path(root)
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"group name: got {group!r}, expected letters, digits, - and _")
    if keep < 1 or step < 0:
        raise CheckpointError(f"got keep={keep}, step={step}, expected keep >= 1 and step >= 0")
    state = json.dumps(meta, indent=1).encode()
    try:
        make_directory(root)
        with directory_lock(root, _LOCK_WAIT_S) as lock:
            if lock == "busy":
                raise CheckpointError(f"{root}: another process is writing checkpoints here")
            _remove_orphans(root)
            path, finite = _publish(root, step, tensors, state)
            try:
                _read(path, keep=False)
            except CheckpointError as error:
                raise CheckpointError(f"written, but does not read back: {error}") from error
            _prune(root, path, keep, finite)
    except OSError as error:
        raise CheckpointError(write_problem(root / _directory_name(step, 0), error)) from error
    return path


def _publish(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes
) -> tuple[Path, bool]:
    temporary = root / f"{TEMPORARY}{step}-{os.getpid()}"
    os.mkdir(temporary)
    try:
        records: dict[str, FileRecord] = {}
        finite = True
        for group, named in tensors.items():
            name = f"{group}.safetensors"
            with new_file(temporary / name) as write:
                records[name], good = write_safetensors(write, named)
            finite = finite and good
        records["state.json"] = FileRecord(len(state), hashlib.sha256(state).hexdigest(), {})
        manifest = _manifest(step, finite, records)
        for name, data in (("state.json", state), ("manifest.json", manifest)):
            with new_file(temporary / name) as write:
                write(memoryview(data))
        fsync_directory(temporary)
        destination = _destination(root, step, records, finite)
        if destination.exists():
            shutil.rmtree(temporary)
            return destination, finite
        failpoint("before-rename")
        os.rename(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoint("before-dir-fsync")
    fsync_directory(root)
    return destination, finite


def _destination(root: Path, step: int, records: dict[str, FileRecord], finite: bool) -> Path:
    """Where a new checkpoint goes; an existing path when the one there is to be kept."""
    existing = [path for path in _listing(root) if _number(path)[0] == step]
    if not existing:
        return root / _directory_name(step, 0)
    with contextlib.suppress(CheckpointError):
        old = _read(existing[0], keep=False)
        if _read_manifest(existing[0])[1] == records or (old.finite and not finite):
            return existing[0]
    return root / _directory_name(step, _number(existing[0])[1] + 1)


def _prune(root: Path, new: Path, keep: int, finite: bool) -> None:
    """Keep the newest ``keep`` finite checkpoints that verify; of the others (damaged, not finite)
    at most ``keep`` and none older than those. Never ``new``; nothing finite if ``new`` is not."""
    good = bad = 0
    for path in _listing(root):
        if good == keep:
            drop = finite
        elif finite if path == new else _is_good(path):
            good, drop = good + 1, False
        else:
            bad += 1
            drop = bad > keep
        if drop and path != new:
            # renamed first: a reader finds all of it or none
            doomed = root / f"{TEMPORARY}prune-{path.name}"
            os.rename(path, doomed)
            failpoint("prune")
            _remove(doomed)


def _is_good(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return _read(path, keep=False).finite
    return False


def _remove_orphans(root: Path) -> None:
    for entry in root.iterdir():
        if entry.name.startswith(TEMPORARY):
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _directory_name(step: int, revision: int) -> str:
    return f"step_{step:07d}" + (f".{revision}" if revision else "")


def _number(path: Path) -> tuple[int, int]:
    match = _DIRECTORY.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _listing(root: Path) -> list[Path]:
    """The checkpoint directories of ``root``, newest first."""
    found = [path for path in root.iterdir() if _DIRECTORY.fullmatch(path.name)]
    return sorted(found, key=_number, reverse=True)


def _manifest(step: int, finite: bool, records: Mapping[str, FileRecord]) -> bytes:
    return _sealed(
        {
            "files": {name: vars(record) for name, record in records.items()},
            "finite": finite,
            "format": FORMAT,
            "fpdm": __version__,
            "step": step,
        }
    )


def _sealed(body: dict[str, Any]) -> bytes:
    """Canonical JSON of ``body`` with a hash of itself: any other byte string is refused."""
    text = json.dumps(body, sort_keys=True, indent=1)
    seal = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body | {"sha256": seal}, sort_keys=True, indent=1).encode()


def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    file = path / "manifest.json"
    data = read_small(file)
    try:
        body = json.loads(data)
        version = body["format"]
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"{file}: got format {version}, expected at most {FORMAT}: of a newer fpdm, or "
                "damaged"
            )
        body.pop("sha256", None)
        if _sealed(body) != data:
            raise CheckpointError(f"{file}: damaged: its own hash differs")
        records = {name: FileRecord(**record) for name, record in body["files"].items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: damaged: not a manifest") from None
    for name in records:
        stem, _, kind = name.partition(".")
        if not _GROUP.fullmatch(stem) or kind not in ("safetensors", "json"):
            raise CheckpointError(f"{file}: got file name {name!r}, expected a plain name")
    return body, records


def _read(path: Path, keep: bool) -> Checkpoint:
    body, records = _read_manifest(path)
    if _DIRECTORY.fullmatch(path.name) and _number(path)[0] != body["step"]:
        raise CheckpointError(
            f"{path}: got the checkpoint of step {body['step']}, expected that of its name"
        )
    tensors, meta = {}, {}
    for name, record in records.items():
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = read_safetensors(path / name, record, keep)
            continue
        data = read_small(path / name)
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise CheckpointError(f"{path / name}: damaged: its hash differs from the manifest")
        try:
            meta = json.loads(data)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path / name}: not JSON") from None
    return Checkpoint(body["step"], path, tensors, meta, body["finite"])


def any_under(root: Path) -> bool:
    """Whether there is a checkpoint under ``root``, good or not."""
    return root.is_dir() and bool(_listing(root))


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: anything missing or damaged; names the file and, where it can, the tensor.
    """
    return _read(Path(path), keep=True)


def load_newest(root: str | Path, report: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that verifies, finite ones first; None if there is none.

    Every checkpoint passed over is reported in one line with the file and the tensor. Temporaries
    of dead writers are removed.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    root = Path(root)
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            report(line)

    for _ in range(100):
        try:
            if not root.exists():
                return None
            with directory_lock(root, 0.0) as lock:
                if lock == "held":
                    _remove_orphans(root)
            paths = _listing(root)
        except OSError as error:
            raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from error
        if not paths:
            return None
        with contextlib.suppress(_VanishedError):
            return _pick(root, paths, say)
    raise CheckpointError(f"{root}: its checkpoints vanish faster than they can be read")


def _pick(root: Path, paths: list[Path], say: Callable[[str], None]) -> Checkpoint:
    finite = [path for path in paths if _claims_finite(path)]
    poisoned = [path for path in paths if path not in finite]
    problem = ""
    for path in [*finite, *poisoned]:
        try:
            found = load(path)
        except CheckpointError as error:
            if not path.exists():
                raise _VanishedError from error
            problem = problem or str(error)
            say(f"refused checkpoint {error}")
            continue
        if not found.finite:
            say(f"{path}: holds NaN or Inf, and no finite checkpoint is left")
        for other in poisoned if found.finite else ():
            if _number(other) > _number(path):
                say(f"passed over checkpoint {other}: holds NaN or Inf; using {path.name}")
        return found
    raise CheckpointError(f"{root}: none of its {len(paths)} checkpoints can be used: {problem}")


def _claims_finite(path: Path) -> bool:
    """False for a checkpoint marked not finite; for a damaged one loading says what is wrong."""
    with contextlib.suppress(CheckpointError):
        return bool(_read_manifest(path)[0]["finite"])
    return True
