"""Runs tests in another process, under Triton's interpreter.

Whether a kernel is interpreted is decided when it is defined; other tests of the same session need
it compiled, so both cannot live in one process. ``TRITON_INTERPRET=1 pytest FILE`` runs the inner
tests of a file directly.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
# of the tests of a file, those that run under the interpreter, and those that start it: conftest
# leaves out what belongs to the other process
inside, outside = pytest.mark.inside, pytest.mark.outside


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


def _patch_once() -> None:
    """Triton patches its language anew at every call of a device function, which takes half of an
    interpreted kernel's time; once for each function does the same."""
    from triton.runtime import interpreter

    patch: Callable[[Any], object] = interpreter._patch_lang
    patched: set[Any] = set()

    def once(fn: Any) -> SimpleNamespace:
        if fn not in patched:
            patched.add(fn)
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


if INSIDE:
    _patch_once()


def planted(module: str, line: str, fault: str, folder: Path) -> tuple[ModuleType, ModuleType]:
    """A module of fpdm.kernels, and a copy of it with ``line`` replaced wherever it stands."""
    real = importlib.import_module(f"fpdm.kernels.{module}")
    text = inspect.getsource(real)
    assert line in text
    path = folder / f"planted_{module}.py"
    path.write_text(text.replace(line, fault))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return real, copy


def larger_tiles(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs for long sequences: the interpreter's time is per program, not per element.

    Up to 64 tokens every tile is a GPU's; beyond, there are still several to a sample, and masks at
    the ends."""
    from fpdm.kernels import attention, rows

    tile, tiles = rows.tile, attention.tiles

    def long(t: int, *key: Any) -> dict[str, Any]:
        large = {"M": 128, "N": 128, "EVEN": t % 128 == 0}
        return {name: (warps, cut | large) for name, (warps, cut) in tiles(t, *key).items()}

    if tokens > 64:
        # 16 divides every chunk of tokens that a program sums
        monkeypatch.setattr(rows, "tile", lambda width: tile(width) | {"ROWS": 16})
        monkeypatch.setattr(attention, "tiles", long)
