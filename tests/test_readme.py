"""What the README says can be run, run: its Python from top to bottom, and its commands as far as
their options."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from fpdm import evaluate, figures, sample
from fpdm.config import ConfigError
from fpdm.schedulers import Denoiser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_python_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other in one namespace, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    installed = importlib.util.find_spec("diffusers") is not None
    space: dict[str, Any] = {}
    for block in blocks("python"):
        if installed or "from diffusers" not in block:
            exec(compile(block, "README.md", "exec"), space)
    assert space["images"].shape == (2, 1, 8, 8)
    if installed:
        assert space["x"].shape == (2, 1, 8, 8)
        assert space["x"].isfinite().all()
        assert isinstance(space["denoise"], Denoiser)


def commands(module: str, text: str) -> list[list[str]]:
    """The words after ``python -m module`` in the shell blocks and between backticks."""
    lines = [line for block in blocks("bash", text) for line in block.splitlines()]
    lines += re.findall(r"`(python -m [^`]*)`", text)
    words = [line.partition("#")[0].split() for line in lines]
    return [line[3:] for line in words if line[:3] == ["python", "-m", module]]


def mistakes(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands of ``text`` whose options do not exist or do not go together, asked of the shipped
    model and stopped before they begin."""

    class Reached(Exception):
        pass

    def begin(*args: Any) -> None:
        raise Reached

    for name in ("evaluate", "_sweep"):
        monkeypatch.setattr(evaluate, name, begin)
    monkeypatch.setattr(sample, "make_request", begin)
    found = []
    for run, module in ((sample.main, "fpdm.sample"), (evaluate.command, "fpdm.evaluate")):
        for argv in commands(module, text):
            try:
                run([word for word in argv if word != "runs/digits"])
            except ConfigError as error:
                found.append(str(error))
            except Reached:
                continue
    return found


def test_commands_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(commands("fpdm.sample", README)) >= 4
    assert len(commands("fpdm.evaluate", README)) >= 2
    assert mistakes(README, monkeypatch) == []
    bad = "```bash\npython -m fpdm.sample --stepz 3\npython -m fpdm.evaluate --swep  # x\n```\n"
    bad += "or `python -m fpdm.sample --budget 12 --steps 20`, which does not fit"
    assert len(mistakes(bad, monkeypatch)) == 3


def test_pictures_are_there() -> None:
    """Every picture that is shown exists and is small; every one that exists is shown."""
    shown = set(re.findall(r"\]\((docs/[^)]*)\)", README))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.png")}
    assert shown == there
    for name in shown:
        data = (ROOT / name).read_bytes()
        assert data.startswith(figures.PNG_MAGIC)
        assert len(data) < 300_000
