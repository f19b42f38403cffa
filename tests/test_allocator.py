"""Freed memory that a command keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fpdm import allocator

# pages that the kernel hands out again for 16 MB that were just freed, 20 times, in a fresh process
PROBE = """
import resource, sys
import torch
from fpdm import allocator
if "keep" in sys.argv:
    assert allocator.keep_freed_memory()
def once():
    blocks = [torch.ones(1 << 20) for _ in range(4)]
for _ in range(3):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*args: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator._OPTIONS:
        monkeypatch.delenv(name, raising=False)
    # pages that were given back in between and cleared again; 1,024 are one of the blocks
    assert faults("keep") < 100
    assert faults() > 1000


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not allocator.keep_freed_memory()
