"""The Triton operators under the interpreter: generated cases, planted faults, a training run.

The interpreter is chosen when a kernel is defined, so these tests run in a process of their own;
``TRITON_INTERPRET=1 pytest tests/test_triton.py`` runs them in this one. float32 and float16: the
interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import operator_cases as oc
import pytest
import torch
from operator_cases import Case, generate, run_case

pytest.importorskip("triton")
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16)
PARTS = 2
inside = pytest.mark.skipif(not INSIDE, reason="needs TRITON_INTERPRET=1; run by test_interpreter")


@pytest.mark.skipif(INSIDE, reason="this is the other process")
@pytest.mark.parametrize("part", ["cases", "rest"])
def test_interpreter(part: str) -> None:
    which = "test_cases" if part == "cases" else "not test_cases and not test_many"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(INSIDE, reason="this is the other process")
def test_interpreter_many() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-k", "test_many", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


def triton_operators() -> Any:
    from fpdm.kernels import triton

    return triton


CASES = [*generate(320, DTYPES, oc.CAP), *oc.fixed(DTYPES)]


@inside
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    assert run_case(triton_operators(), case) == []


@inside
@pytest.mark.slow
@pytest.mark.parametrize("case", generate(2000, DTYPES, 2**19, seed=1), ids=str)
def test_many(case: Case) -> None:
    assert run_case(triton_operators(), case) == []
