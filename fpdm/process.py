"""What a command asks of its process: threads that soon sleep, no more than it has processors for,
freed memory kept, output that may end before the work does.

A library must not decide this for the program that imports it, so ``import fpdm`` changes nothing.
A command, ``python -m fpdm.NAME``, owns its process. Variables that are already set are left alone.

Threads. A training step of the digits is some hundred parallel regions, at the end of each of which
OpenMP's threads spin for milliseconds, libgomp's default, before they sleep: beside other programs
they spin away the time that the thread they wait for needs, and a step takes up to ten times as
long. Where they sleep at once, waking them costs a tenth (bench/NOTES.md, 2026-11-27). A
container's quota of processors is likewise unknown to OpenMP, which starts a thread for each
processor of the host. Both are read once, when torch loads libgomp.

Memory. A step on a CPU frees tens of megabytes and allocates the same again. glibc returns them to
the kernel in between, which clears every page anew: up to 4,000 page faults, a tenth of a training
step of the digits on two threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

# what OpenMP reads of the environment
NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# turns that a waiting thread spins before it sleeps. 60,000 are about a millisecond, longer than a
# training step goes without a parallel region; 2,000, for when other programs want the processors,
# just bridge the gap between two regions
SPIN, SPIN_BUSY = 60_000, 2_000
# numbers of mallopt (malloc.h); the first two may also be given in the environment
_OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 << 20),  # free memory at the end of the heap is kept
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),  # blocks under it come from the heap; glibc's maximum
}


def is_command(argv: Sequence[str], original: Sequence[str], package: str = "fpdm") -> bool:
    """Whether the interpreter is on its way to a command of ``package``, by its ``sys.argv`` and
    ``sys.orig_argv``: while ``-m`` looks for a module, it stands in the module's place."""
    modules = [
        word[2:] or following
        for word, following in zip(original, [*original[1:], ""])
        if word.startswith("-m")
    ]
    return list(argv[:1]) == ["-m"] and modules[:1] != [] and modules[0].split(".")[0] == package


def set_threads(root: Path = Path("/sys/fs/cgroup")) -> dict[str, str]:
    """Sets how OpenMP waits and, where the quota of control group ``root`` is smaller than the
    number of processors, how many threads it has. Returns the variables that it set: none once
    torch is loaded."""
    if "torch" in sys.modules:
        return {}
    wanted = {}
    if "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = str(SPIN_BUSY if crowded() else SPIN)
    allowed = quota(root)
    if allowed is not None and allowed < _processors():
        wanted["OMP_NUM_THREADS"] = str(allowed)
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(wanted)
    return wanted


def crowded(file: Path = Path("/proc/loadavg")) -> bool:
    """Whether other programs already want all processors of the machine, more often than not in
    a few looks. False where the system does not tell."""
    try:
        seen = []
        for _ in range(5):
            # "0.20 0.18 0.12 1/80 11206": one of 80 tasks runs, this one
            seen.append(int(file.read_text().split()[3].split("/")[0]) - 1)
            time.sleep(0.004)
    except (OSError, ValueError, IndexError):
        return False
    return sorted(seen)[2] >= (os.cpu_count() or 1)


def _processors() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path) -> int | None:
    """Processors that a control group may use at a time, rounded up; None where it has no limit."""
    try:
        if (root / "cpu.max").is_file():  # version 2
            limit, period = (root / "cpu.max").read_text().split()
        else:
            folder = root / "cpu"
            limit, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        used = int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # "max" is no number
    return max(1, -int(-used // 1)) if used > 0 else None


def open_streams() -> None:
    """Where stdin, stdout or stderr was closed by whoever started the process, nothing is read and
    what is written is dropped; what an encoding lacks is written as an escape."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        place: int | str = os.devnull  # where another file has its descriptor by now
        try:
            os.fstat(fd)
        except OSError:
            place, null = fd, os.open(os.devnull, os.O_RDWR)
            if null != fd:  # else it is the lowest that was free
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
        setattr(sys, name, open(place, "w" if fd else "r", closefd=place != fd))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop(stream: TextIO) -> None:
    """What is written from here on goes nowhere, and what waits in the buffer with it."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


class _Lasting:
    """A stream that drops what it cannot write, and all that follows."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            drop(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        # of a copy that has no stream yet
        if name == "_stream":
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, a reader that has gone (``| tee``, which Ctrl-C ends too), a closed terminal or a
    full disk under the log ends the output and not the work."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def keep_freed_memory() -> bool:
    """Asks malloc to keep up to 512 MB of what is freed, unless the environment says otherwise.

    False where there is no ``mallopt``, or nothing was changed.
    """
    if any(name in os.environ for name in _OPTIONS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(number, size) == 1 for number, size in _OPTIONS.values())
