"""What is read of a GPU beside the time, with a GPU, a clock and an NVML that are made up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as bench
from bench import machine, report, rows, timing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a GPU, and nothing runs on it."""
    stubs: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "current_device": lambda: 3,
        "get_device_properties": lambda _: SimpleNamespace(uuid="ab-cd", L2_cache_size=500),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)


class Cache:
    """An L2 cache that holds what was called since it was flushed, and a clock: a call takes 5 us
    of what is in it, 9 of what is not, a flush 35."""

    def __init__(self, flushes: bool) -> None:
        self.now, self.holds, self.flushes = 0.0, set[str](), flushes

    def perf_counter(self) -> float:
        return self.now

    def flush(self) -> None:
        self.now += 35e-6
        if self.flushes:
            self.holds.clear()

    def operator(self, name: str, slower: float) -> timing.Arm:
        def call() -> None:
            self.now += slower * (5e-6 if name in self.holds else 9e-6)
            self.holds.add(name)

        return call


@pytest.mark.parametrize(("flushes", "seconds"), [(True, 9e-6), (False, 5e-6)])
def test_a_cold_time_is_that_of_the_call_alone(
    device: None, monkeypatch: pytest.MonkeyPatch, flushes: bool, seconds: float
) -> None:
    """With a flush that does not flush, it is the warm one."""
    cache = Cache(flushes)

    def replayed(fn: timing.Arm, calls: int = timing.REPLAYED) -> timing.Arm:
        return timing.in_turn([fn] * calls)

    monkeypatch.setattr(timing, "time", cache)
    monkeypatch.setattr(timing, "flushing", lambda: cache.flush)
    monkeypatch.setattr(timing, "replayed", replayed)
    arms = {name: cache.operator(name, slower) for name, slower in ((rows.OURS, 1), ("plain", 3))}
    warm, _ = timing.device_times(arms, 7)
    cold = timing.cold_times(arms, 7)
    assert [warm[name].median for name in arms] == pytest.approx([5e-6, 15e-6])
    assert [cold[name] for name in arms] == pytest.approx([seconds, 3 * seconds])


def test_a_flush_writes_twice_the_cache(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cuda", 3)
        made.append(torch.zeros(size, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    timing.flushing()()
    assert made[0].nbytes == 1000
    assert made[0].bool().all()


def test_without_a_gpu_nothing_is_cold() -> None:
    assert timing.cold_times({rows.OURS: lambda: None}, 5) == {}
    assert machine.under_load(lambda: None, 1.0, 1) == {}


class Nvml:
    """A GPU that idles at 345 MHz until something runs on it, and takes 2 J for every call."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        self.busy, self.calls, self.counts, self.uuid = False, 0, True, ""

    def call(self) -> None:
        self.busy = True
        self.calls += 1
        time.sleep(0.004)

    def idle(self) -> None:
        self.busy = False

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuid = uuid
        return "handle"

    def nvmlDeviceGetClockInfo(self, h: str, kind: int) -> int:
        assert h == "handle"
        return (1700 if self.busy else 345) if kind == self.NVML_CLOCK_SM else 2600

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, h: str) -> int:
        # clocks that were set beside a power cap; idle
        return 0x06 if self.busy else 0x01

    def nvmlDeviceGetPowerUsage(self, h: str) -> int:
        return 700_000

    def nvmlDeviceGetMemoryInfo(self, h: str) -> SimpleNamespace:
        return SimpleNamespace(used=5_000_000_000)

    def nvmlDeviceGetComputeRunningProcesses(self, h: str) -> list[SimpleNamespace]:
        found = ((os.getpid() + 1, 7), (os.getpid(), 3_000_000_000))
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found]

    def nvmlDeviceGetTotalEnergyConsumption(self, h: str) -> int:
        if not self.counts:
            raise self.NVMLError("not supported")
        return 1_000_000 + 2000 * self.calls


@pytest.fixture
def nvml(device: None, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "synchronize", found.idle)
    monkeypatch.setattr(machine, "PERIOD", 0.001)
    monkeypatch.setattr(machine, "ENERGY", 0.2)
    return found


def test_a_gpu_is_read_while_our_arm_runs(nvml: Nvml) -> None:
    before = machine.nvml()
    assert (before["sm_mhz"], before["throttle_reasons"]) == (345, 1)
    found = machine.under_load(nvml.call, 0.004, 4)
    assert nvml.uuid == "GPU-ab-cd"
    assert nvml.calls == 50
    assert found["joules_per_image"] == 0.5
    told = found["nvml"]
    # the last reading may find it idle
    assert told["sm_mhz"] == 1700
    assert list(told["throttled"]) == ["power cap"]
    assert told["throttled"]["power cap"] > 0.5
    assert (told["memory_used"], told["process_memory"]) == (5_000_000_000, 3_000_000_000)
    # a short load of a row without images, and none of its energy
    short = machine.under_load(nvml.call, 0.4, 0)
    assert nvml.calls == 51
    assert list(short) == ["nvml"]


def test_what_a_gpu_does_not_tell_is_left_out(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.counts = False
    found = machine.under_load(nvml.call, 0.004, 4)
    assert "joules_per_image" not in found
    assert found["nvml"]["sm_mhz"] == 1700
    monkeypatch.setattr(machine, "PERIOD", 60.0)
    # shorter than a period: read once, when the work has just ended
    assert machine.under_load(nvml.call, 0.2, 4)["nvml"]["sm_mhz"] == 345
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.under_load(nvml.call, 0.004, 4) == {}
    assert "pynvml" in machine.nvml()["unavailable"]


def test_readings_are_medians_and_shares() -> None:
    readings = [
        {"sm_mhz": mhz, "throttle_reasons": bits, "memory_used": used}
        for mhz, bits, used in ((1000, 0x00, 1), (1980, 0x24, 3), (1500, 0x04, 2), (1600, 0x01, 2))
    ]
    assert machine.condensed(readings) == {
        "sm_mhz": 1550, "memory_used": 3, "throttled": {"power cap": 0.5, "thermal slowdown": 0.25}
    }  # fmt: skip
    assert machine.condensed([{"memory_used": 1}]) == {"memory_used": 1}


def test_a_row_holds_what_was_read(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "told", lambda *_: {})
    arms = rows.Arms({rows.OURS: nvml.call, "plain PyTorch": nvml.call}, bytes=4, images=4)
    times = {name: timing.Times((0.004,) * 5) for name in arms.run}
    monkeypatch.setattr(timing, "device_times", lambda *_: (times, {}))
    monkeypatch.setattr(timing, "cold_times", lambda arms, _: dict.fromkeys(arms, 0.006))
    ceilings = {"copy": 1e4, "gemm float32": 1.0}
    name = "XL/2 B64 bfloat16 adaln"
    row = rows.Row("operators", name, lambda: arms, replayed=True)
    found = bench.run_row(row, None, ceilings)
    assert found["arms"][rows.OURS]["cold_s"] == 0.006
    assert found["copy_share"] == pytest.approx(0.1)
    result = {"rows": [found], "ceilings": ceilings}
    head, (line,) = report.every_row(result)
    cells = dict(zip(head, line))
    want = {"cold L2": "6 ms", "SM clock": "1700 MHz", "memory in use": "5 GB",
            "joules an image": "0.5"}  # fmt: skip
    assert cells | want == cells
    assert cells["throttled"].startswith("power cap ")
    assert report.operator_table(result)[1] == [["adaln", "4 ms, 1.00x", "6 ms, 1.00x"]]
    assert report.operator_table(result)[0][2] == "XL/2 B64 bfloat16, cold L2"
    # a row of the host alone, and one whose graph cannot be captured
    found = bench.run_row(rows.Row("data", "a", lambda: arms), 5, ceilings)
    assert "nvml" not in found
    assert report.every_row({"rows": [found]})[0] == report.HEAD
    monkeypatch.setattr(timing, "device_times", lambda *_: ({}, {rows.OURS: "capture: no"}))
    assert report.reason(bench.run_row(row, None, ceilings)) == "not measured: capture: no"
