"""Files that are whole or absent, and safetensors files that are checked as they are streamed.

Writing: bytes go to a temporary name, are fsynced and renamed. Reading: a header is believed only
as far as the file is long, and a record of hashes names the tensor whose bytes changed. Nothing
here executes what it reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import stat
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fpdm.settings import ConfigError, UserError, flat, one_line

TEMPORARY = ".tmp-"
LOCK = ".lock"
_CHUNK = 1 << 20  # bytes hashed, checked and written at a time
_HEADER_LIMIT = 100_000_000  # the safetensors format's own
_JSON_LIMIT = 1 << 26
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_hits: Counter[str] = Counter()


class CheckpointError(UserError):
    """A file of weights or state that cannot be written, or cannot be trusted."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest holds about one file; ``tensors`` maps names to CRC-32."""

    size: int
    sha256: str
    tensors: dict[str, int]

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, dict):  # records are read from files
            raise TypeError("tensors is not a mapping")


def failpoint(name: str) -> None:
    """SIGKILL this process at the given occurrence of ``FPDM_FAILPOINT=name[:occurrence]``."""
    wanted, _, occurrence = os.environ.get("FPDM_FAILPOINT", "").partition(":")
    if wanted == name:
        _hits[name] += 1
        if _hits[name] == int(occurrence or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def atomic_write(path: str | Path, data: bytes | Callable[[BinaryIO], object]) -> None:
    """Put ``data`` (bytes, or a function that writes to a seekable binary file) at ``path``: all of
    it or nothing, also across a kill or a power cut. The temporary file lies beside it under one
    fixed name, so what a kill leaves behind is used up by the next write of the same file.

    Raises:
        UserError: the directory is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with _open_exclusively(temporary) as file:
            try:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
                failpoint("atomic-write")
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        fsync_directory(path.parent)
    except OSError as error:
        raise UserError(write_problem(path, error)) from error


def _open_exclusively(path: Path) -> BinaryIO:
    """Open ``path`` empty for writing, after any other writer of that name has let go of it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # the other writer has renamed the file that was waited for


def write_problem(path: Path, error: OSError) -> str:
    """One line for a failed write, with the path, the reason and the free space."""
    reason = error.strerror or type(error).__name__
    if error.errno == errno.EFBIG:
        reason = f"{reason} (limit of the process, ulimit -f)"
    if error.errno == errno.EISDIR:
        return f"cannot write {path}: {reason}; expected the name of a file"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return f"cannot write {path}: {reason}; expected a directory {path.parent}"
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB free)"
    return f"cannot write {path}: {reason}; expected write permission and enough disk space{free}"


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents, durably; an existing directory is fine."""
    if not path.is_dir():
        make_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        fsync_directory(path.parent)


def claim(
    directory: Path, settings: Mapping[str, Any], name: str = "settings.json",
    told: Collection[str] = (), written: str = "*",
) -> None:  # fmt: skip
    """Claim ``directory`` (created when missing) for ``settings`` (JSON), which its file ``name``
    holds from then on. Raises ConfigError, naming the first difference, where it already holds
    others, or where there is no such file beside somebody's own: any that the pattern ``written``
    names, hidden ones apart. Settings in ``told`` are recorded and not compared."""
    path = directory / name
    if directory.exists() and not directory.is_dir():
        raise ConfigError(
            f"out: got the file {directory}, expected a directory, new or of these settings"
        )
    try:
        make_directory(directory)
    except OSError as error:
        raise ConfigError(write_problem(directory, error)) from error
    # before ``name`` is looked for: who claims the directory meanwhile writes that one first
    there = sorted(found.name for found in directory.glob(written) if found.name[0] != ".")
    if not path.exists():
        if there:
            raise ConfigError(
                f"out: got {directory}, which holds {there[0]} and no {name}, expected a directory "
                "that is new, empty or of these settings"
            )
        text = json.dumps(settings, indent=1).encode() + b"\n"
        # other writers wait for this one's end: the first one's settings stay, and are compared
        atomic_write(path, lambda file: file.write(path.read_bytes() if path.exists() else text))
    try:
        old = flat(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: got no settings, expected another output directory") from error
    new = flat(settings)
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key) and key not in told:
            raise ConfigError(
                f"{key}: got {new.get(key)}, expected {old.get(key)} of {path}, or another output "
                "directory"
            )


@contextlib.contextmanager
def directory_lock(root: Path, wait_s: float) -> Iterator[str]:
    """Lock ``root`` against other writers; yields "held", "busy", or "unsupported": a file system
    without locks, or a directory in which nothing can be made.

    The lock is on a file in it: on network file systems other hosts do not see the lock of a
    directory. The kernel drops it when the last process that has the file open ends (a child forked
    meanwhile counts), so that its holder may take every temporary for an orphan.
    """
    try:
        fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not root.is_dir():
            raise
        yield "unsupported"
        return
    state, deadline = "", time.monotonic() + wait_s
    try:
        while not state:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                state = "held"
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    state = "busy"
                else:
                    time.sleep(0.02)
            except OSError:  # a network file system without locks
                state = "unsupported"
        yield state
    finally:
        if state == "held":  # said aloud: a child forked meanwhile shares the descriptor
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Callable[[memoryview], None]]:
    """Create ``path``; yield its write function; fsync at the end."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    failpoint("open")

    def write(view: memoryview) -> None:
        while len(view):
            view = view[os.write(fd, view) :]
        failpoint("mid-write")

    try:
        yield write
        failpoint("before-fsync")
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):  # so that reading back reads the disk, not the page cache
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits of the SHA-256 of names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()[:16]


def write_safetensors(
    write: Callable[[memoryview], object], tensors: Mapping[str, Tensor]
) -> tuple[FileRecord, bool]:
    """Stream ``tensors`` in the safetensors format through ``write``, hashing and checking in the
    same pass; of a contiguous tensor on the CPU no copy is made.

    Returns: the record of the file, and whether every floating-point number is finite.

    Raises:
        CheckpointError: a dtype that the format cannot hold.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    prefix, end = _build_header(tensors, order)
    digest, finite = hashlib.sha256(prefix), True
    crcs: dict[str, int] = {}
    write(memoryview(prefix))
    for name in order:
        flat = tensors[name].detach().to("cpu").contiguous().flatten()
        crc = 0
        for chunk in flat.split(_CHUNK // flat.element_size()):
            if chunk.is_floating_point():
                finite = finite and bool(chunk.isfinite().all())
            view = _bytes_of(chunk)
            digest.update(view)
            crc = zlib.crc32(view, crc)
            write(view)
        crcs[name] = crc
    return FileRecord(len(prefix) + end, digest.hexdigest(), crcs), finite


def _build_header(tensors: Mapping[str, Tensor], order: list[str]) -> tuple[bytes, int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"tensor {name!r}: got dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _open_regular(path: Path) -> BinaryIO:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a fifo must not hang the reader
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: got something that is not a regular file")
    return os.fdopen(fd, "rb")


def read_small(path: Path) -> bytes:
    """The bytes of a JSON file of at most 64 MB.

    Raises:
        CheckpointError: missing, unreadable, too large.
    """
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _JSON_LIMIT:
            raise CheckpointError(f"{path}: got {size} bytes, expected at most {_JSON_LIMIT}")
        data = bytearray(size)
        _fill(file, memoryview(data), path)
        return bytes(data)


def _fill(file: BinaryIO, view: memoryview, path: Path) -> None:
    try:
        got = file.readinto(view)  # type: ignore[attr-defined]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if got < len(view):
        raise CheckpointError(f"{path}: ends too early")


def _parse_header(text: bytes, data_size: int) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, bytes) of every tensor in file order.

    Raises ValueError unless the tensors fill the ``data_size`` bytes exactly, so that no claim in a
    header makes a reader allocate more than the file holds.
    """
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("not an object")
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {dtype!r}")
        if len(shape) > 16 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            raise ValueError(f"tensor {name!r} has an impossible shape")
        size = _DTYPES[dtype].itemsize * math.prod(shape)
        if type(begin) is not int or type(end) is not int or end - begin != size:
            raise ValueError(f"tensor {name!r} has offsets that do not fit its shape")
        entries.append((begin, end, name, _DTYPES[dtype], shape))
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, name, _, _ in entries:
        if begin != position:
            raise ValueError(f"tensor {name!r} overlaps its neighbour or leaves a gap")
        position = end
    if position != data_size:
        raise ValueError(f"tensors take {position} bytes, the file holds {data_size}")
    return [(name, dtype, shape, end - begin) for begin, end, name, dtype, shape in entries]


def _read_header(
    file: BinaryIO, path: Path
) -> tuple[bytes, list[tuple[str, torch.dtype, list[int], int]]]:
    size = os.fstat(file.fileno()).st_size
    prefix = bytearray(8)
    _fill(file, memoryview(prefix), path)
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(f"{path}: header damaged: it claims {length} bytes of {size}")
    text = bytearray(length)
    _fill(file, memoryview(text), path)
    try:
        return bytes(prefix + text), _parse_header(bytes(text), size - 8 - length)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: header damaged: {one_line(error)}") from None


def read_safetensors(
    path: str | Path, record: FileRecord | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """Read a safetensors file into new CPU tensors and check it against ``record``, when given.

    ``keep=False`` only checks, in constant memory, and returns empty tensors. Memory is bounded by
    the size of the file.

    Raises:
        CheckpointError: missing, malformed, truncated, or changed; names the tensors that changed.
    """
    path = Path(path)
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if record is not None and size != record.size:
            raise CheckpointError(f"{path}: got {size} bytes, expected {record.size}")
        header, entries = _read_header(file, path)
        digest = hashlib.sha256(header)
        crcs: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        scratch = memoryview(bytearray(0 if keep else _CHUNK))
        for name, dtype, shape, count in entries:
            tensors[name] = torch.empty(shape if keep else 0, dtype=dtype)
            whole = _bytes_of(tensors[name])
            crcs[name] = 0
            for start in range(0, count, _CHUNK):
                stop = min(start + _CHUNK, count)
                view = whole[start:stop] if keep else scratch[: stop - start]
                _fill(file, view, path)
                digest.update(view)
                crcs[name] = zlib.crc32(view, crcs[name])
    if record is not None and digest.hexdigest() != record.sha256:
        changed = [name for name in crcs if crcs[name] != record.tensors.get(name)]
        if crcs.keys() != record.tensors.keys() or not changed:
            raise CheckpointError(f"{path}: header damaged: its hash differs from the record")
        names = ", ".join(repr(name) for name in changed[:3]) + (", ..." if changed[3:] else "")
        raise CheckpointError(f"{path}: tensor {names} damaged: its hash differs from the record")
    return tensors


class TensorFile:
    """A safetensors file that stays open, whose rows are read when they are asked for.

    Not mapped: where a file shrinks under a map the process ends with SIGBUS, without a word.
    Another file that takes its name is not seen. ``kinds``: dtype and shape of every tensor. Raises
    CheckpointError, on opening for a damaged header, later for what is not there any more.
    """

    def __init__(self, path: Path) -> None:
        file = _open_regular(path)
        weakref.finalize(self, file.close)
        header, entries = _read_header(file, path)
        self.path, self._fd, offset = path, file.fileno(), len(header)
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._offsets: dict[str, int] = {}
        for name, dtype, shape, size in entries:
            self.kinds[name], self._offsets[name] = (dtype, tuple(shape)), offset
            offset += size

    def __reduce__(self) -> tuple[type[TensorFile], tuple[Path]]:
        """A copy, such as a worker process's, opens it anew: a descriptor is a number of one
        process, and closed with its owner."""
        return TensorFile, (self.path,)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        """``out[:] = tensor[start : start + len(out)]``; contiguous, of the tensor's dtype."""
        view = _bytes(out)
        self._fill(view, self._offsets[name] + start * (len(view) // len(out)))

    def gather(self, name: str, rows: np.ndarray, out: np.ndarray, to: np.ndarray) -> None:
        """``out[to] = tensor[rows]``; as for ``read``."""
        view, offset = _bytes(out), self._offsets[name]
        size = len(view) // len(out)
        for i, row in zip(to.tolist(), rows.tolist()):
            self._fill(view[i * size : (i + 1) * size], offset + row * size)

    def _fill(self, view: memoryview, offset: int) -> None:
        try:
            while len(view):
                got = os.preadv(self._fd, [view], offset)
                if got == 0:
                    raise CheckpointError(f"{self.path}: has shrunk since it was opened")
                view, offset = view[got:], offset + got
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
