"""Where a number comes from: machine, versions, commit; and the ceilings it is held against.

FPDM_COMMIT names the commit where the files were copied without their history.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.timing import inner_calls, once, synchronize
from fpdm import info, process
from fpdm.kernels.launch import dtype_name

ROOT = Path(__file__).resolve().parent.parent
# seconds between two readings of a GPU; of a load whose energy is told, since that counter moves
# 10 times a second; of one whose clocks are
PERIOD, ENERGY, CLOCKS = 0.05, 2.0, 0.4
# what holds a clock down, by NVML's bits; an idle GPU, and clocks that somebody set, are none
REASONS = {
    0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost", 0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown", 0x80: "power brake",
}  # fmt: skip


def git(*args: str) -> str:
    """Output of git, empty where there is none."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def name() -> str:
    """A folder's name for this machine: the accelerator, else processor and threads."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    found = info.processor()
    return _slug(f"{found.get('name', platform.machine())} {torch.get_num_threads()} threads")


def committed(file: Path) -> str:
    """Where the result ``file`` will lie in the project, for a table that names its source."""
    return f"bench/results/{name()}/{file.name}"


def _slug(text: str) -> str:
    """Lower case, trade marks dropped, one dash between words."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


DIGITS = 12


def commit() -> str:
    """Twelve digits, and + when files of the project differ from it: results are none of those.
    FPDM_COMMIT, where the files were copied without their history."""
    if given := os.environ.get("FPDM_COMMIT"):
        return given.removesuffix("+")[:DIGITS] + ("+" if given.endswith("+") else "")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", f"--short={DIGITS}", "HEAD") + ("+" if changed else "")


def facts(command: str) -> dict[str, Any]:
    """Machine, versions, commit and the command."""
    report = info.collect()
    gpu = {}
    if torch.cuda.is_available():
        gpu = nvml()
    return {
        "machine": name(),
        "processor": report["processor"],
        "devices": report["devices"],
        "versions": report["versions"],
        "commit": commit(),
        "command": command,
        # of the last minute: what runs beside the benchmark is told by ``others``
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": gpu,
        "openmp": {name: os.environ[name] for name in process.NAMES if name in os.environ},
    }


class Others:
    """What other programs take of the processors from here on: ``share`` in 0..1, None where the
    system does not tell. The load average counts the benchmark's own threads, and lags."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), _busy(), _own()

    def share(self) -> float | None:
        """Of all processors since the beginning; the host's part of a virtual one included."""
        began, before, own = self.began
        now = _busy()
        if before is None or now is None:
            return None
        seconds = (time.perf_counter() - began) * (os.cpu_count() or 1)
        return max(0.0, (now - before - (_own() - own)) / seconds) if seconds else None


def _busy() -> float | None:
    """Processor seconds that were not idle, of all processors since the machine started."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, words)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _gpu() -> tuple[Any, Any]:
    """pynvml and its handle of the current GPU: by UUID, since CUDA_VISIBLE_DEVICES, which pynvml
    does not read, changes numbers. Raises where there is none."""
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _reading(lib: Any, h: Any) -> dict[str, Any]:
    """Clocks, what holds them down (bits of ``REASONS``), power, memory in use on the device, and
    by this process; without what this device does not tell."""
    asked: dict[str, Callable[[], Any]] = {
        "sm_mhz": lambda: lib.nvmlDeviceGetClockInfo(h, lib.NVML_CLOCK_SM),
        "memory_mhz": lambda: lib.nvmlDeviceGetClockInfo(h, lib.NVML_CLOCK_MEM),
        "throttle_reasons": lambda: lib.nvmlDeviceGetCurrentClocksThrottleReasons(h),
        "watts": lambda: lib.nvmlDeviceGetPowerUsage(h) / 1e3,
        "memory_used": lambda: lib.nvmlDeviceGetMemoryInfo(h).used,
        # in a container NVML knows it by another number
        "process_memory": lambda: next(
            (p.usedGpuMemory for p in lib.nvmlDeviceGetComputeRunningProcesses(h)
             if p.pid == os.getpid()), None),
        "joules": lambda: lib.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3,
    }  # fmt: skip
    found = {}
    for name, ask in asked.items():
        try:
            value = ask()
        except lib.NVMLError:
            continue
        if value is not None:
            found[name] = value
    return found


def nvml() -> dict[str, Any]:
    """NVML's reading now, of an idle GPU before anything runs; why not, where it is missing."""
    try:
        return _reading(*_gpu())
    except Exception as error:
        return {"unavailable": f"{type(error).__name__}: {error}"}


class Watch:
    """NVML's readings of a GPU every ``PERIOD`` seconds while inside, taken by a thread."""

    def __init__(self, lib: Any, h: Any) -> None:
        # the handle is the caller's: a new thread's current device is another
        self.lib, self.h, self.readings = lib, h, list[dict[str, Any]]()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        # the first reading has to wait: a clock takes a while to rise
        while not self.over.wait(PERIOD):
            self.readings.append(_reading(self.lib, self.h))


def condensed(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Of readings under load: medians of clocks and power, the most memory, and ``throttled``: of
    every one of ``REASONS`` that was there, in how many of them, 0..1."""
    values = {name: [r[name] for r in readings if name in r] for name in readings[0]}
    how: dict[str, Callable[[list[Any]], Any]] = {
        "sm_mhz": statistics.median, "memory_mhz": statistics.median, "watts": statistics.median,
        "memory_used": max, "process_memory": max,
    }  # fmt: skip
    found = {name: fn(values[name]) for name, fn in how.items() if name in values}
    if masks := values.get("throttle_reasons"):
        shares = {r: sum(bool(m & bit) for m in masks) / len(masks) for bit, r in REASONS.items()}
        found["throttled"] = {reason: share for reason, share in shares.items() if share}
    return found


def under_load(fn: Callable[[], object], seconds: float, images: int) -> dict[str, Any]:
    """What NVML tells while calls of ``fn`` run, which take ``seconds`` each: ``nvml``, readings
    ``condensed``, and ``joules_per_image`` where there are images and a counter. Without NVML
    nothing; ``facts`` says why."""
    if not torch.cuda.is_available():
        return {}
    try:
        lib, h = _gpu()
    except Exception:
        return {}
    count = max(1, round((ENERGY if images else CLOCKS) / seconds))
    synchronize()
    before = _reading(lib, h)
    with Watch(lib, h) as watch:
        for _ in range(count):
            fn()
        synchronize()
    after = _reading(lib, h)
    # of a load that was shorter than a period, the one right after it
    found: dict[str, Any] = {"nvml": condensed(watch.readings or [after])}
    if images and "joules" in before and "joules" in after:
        found["joules_per_image"] = (after["joules"] - before["joules"]) / count / images
    return found


def gemm_ceiling(ceilings: dict[str, float], dtype: str) -> float:
    """FLOP/s for products of ``dtype``: also the float32 rate, in which a processor without
    half-precision products can compute them faster than the library does."""
    return max(ceilings[f"gemm {dtype}"], ceilings["gemm float32"])


def shares(row: dict[str, Any], seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """Of the ceilings, that a row's counts reach in ``seconds``."""
    found = {}
    if row["bytes"]:
        found["copy_share"] = row["bytes"] / seconds / ceilings["copy"]
    if row["flops"]:
        found["gemm_share"] = row["flops"] / seconds / gemm_ceiling(ceilings, row["dtype"])
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large GEMM per dtype, and bytes/s of a large copy (read + write)."""
    cuda = device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if cuda else ()))
    m, n, k = (16384, 4608, 1152) if cuda else (2048, 1536, 384)
    found = {}
    for dtype in dtypes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device)
        b = b.to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)

        def gemm(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b.t(), out=out)

        inner = inner_calls(gemm, 0.02)
        best = min(once(gemm, inner) for _ in range(5))
        found[f"gemm {dtype_name(dtype)}"] = 2 * m * n * k / best
    source = torch.empty(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    best = min(once(lambda: target.copy_(source)) for _ in range(6))
    found["copy"] = 2 * source.nbytes / best
    return found
