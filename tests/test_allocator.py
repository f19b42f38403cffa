"""Freed memory that a command keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fpdm import allocator

# megabytes that a fresh process holds after 80 were allocated, written and freed
PROBE = """
import ctypes, os, sys
from fpdm import allocator
if "keep" in sys.argv:
    assert allocator.keep_freed_memory()
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
    for name in allocator._OPTIONS:
        monkeypatch.delenv(name, raising=False)
    assert held("keep") >= 70
    assert held() <= 20


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not allocator.keep_freed_memory()
