"""What a command asks of its process: threads and freed memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fpdm import process

# megabytes that a fresh process holds after 80 were allocated, written and freed
PROBE = """
import ctypes, os, sys
from fpdm import process
if "keep" in sys.argv:
    assert process.keep_freed_memory()
c, size = ctypes.CDLL(None), 2 << 20
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
before = resident()
for _ in range(3):
    blocks = [c.malloc(size) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        c.free(block)
print(resident() - before)
"""


def held(*args: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process._OPTIONS:
        monkeypatch.delenv(name, raising=False)
    assert held("keep") >= 70
    assert held() <= 20


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not process.keep_freed_memory()


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("python -m fpdm.train digits", True),
        ("python -u -m fpdm sample", True),
        ("python -X dev -mfpdm.info", True),
        ("python -m pytest -m fpdm", False),
        ("python -m fpdm_tools", False),
        ("python", False),
        ("python train.py -m", False),
    ],
)
def test_what_a_command_is(original: str, expected: bool) -> None:
    words = original.split()
    assert process.is_command(["-m", *words[2:]], words) is expected
    assert not process.is_command(["-m", *words[2:]], words, "bench")
    # when the module runs, it has its file's name there
    assert not process.is_command(["/somewhere/train.py"], words)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert process.quota(tmp_path) == expected


def test_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000")
    monkeypatch.setattr(process, "_processors", lambda: 8)
    monkeypatch.setattr(process, "crowded", lambda: False)
    for name in process.NAMES:
        # also undoes what is set here
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # too late
    assert process.set_threads(tmp_path) == {}
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert process.set_threads(tmp_path) == {"GOMP_SPINCOUNT": str(process.SPIN)}
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert process.set_threads(tmp_path) == {"OMP_NUM_THREADS": "2"}
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(process, "_processors", lambda: 2)
    assert process.set_threads(tmp_path) == {}
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(process, "crowded", lambda: True)
    assert process.set_threads(tmp_path) == {"GOMP_SPINCOUNT": str(process.SPIN_BUSY)}


def test_crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    file = tmp_path / "loadavg"
    for running, expected in ((1, False), (4, False), (5, True), (40, True)):
        file.write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
        assert process.crowded(file) is expected, running
    file.write_text("0.2 0.1")
    assert not process.crowded(file)
    assert not process.crowded(tmp_path / "missing")


def test_commands_set_it_and_the_library_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of libgomp itself, which prints its settings when it is loaded."""
    shown = {k: v for k, v in os.environ.items() if k not in process.NAMES} | {
        "OMP_DISPLAY_ENV": "verbose"
    }

    def spins(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, *words], env=shown, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]

    library = spins("-c", "import fpdm.model")
    if not library:
        pytest.skip("torch has another OpenMP than libgomp")
    ours = [f"GOMP_SPINCOUNT = '{count}'" for count in (process.SPIN, process.SPIN_BUSY)]
    assert not any(line in ours for line in library)
    monkeypatch.chdir(Path(__file__).parents[1])
    for words in (
        ["-m", "fpdm.sample", "--help"],
        ["-m", "fpdm", "evaluate", "--help"],
        ["-m", "bench", "--help"],
    ):
        assert any(line in ours for line in spins(*words)), words
