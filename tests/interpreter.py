"""Runs tests in another process, under Triton's interpreter.

Whether a kernel is interpreted is decided when it is defined; other tests of the same session need
it compiled, so both cannot live in one process. ``TRITON_INTERPRET=1 pytest FILE`` runs the inner
tests of a file directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INSIDE, reason="needs TRITON_INTERPRET=1; run by test_interpreter")
outside = pytest.mark.skipif(INSIDE, reason="this is the other process")


def run_inside(file: str, *options: str) -> str:
    """pytest on ``file`` under the interpreter, on one thread: its last lines. Fails as it does."""
    # what another pytest or its plugins left for this one is not for the next
    kept = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore",
         *options, file],
        env={**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    return done.stdout[-2000:]
