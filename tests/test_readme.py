"""What the README says can be run, run: its Python from top to bottom, and its commands as far as
their options."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from fpdm import data, evaluate, figures, sample, sweep
from fpdm.config import ConfigError
from fpdm.recipes import load_config
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
                run([word for word in argv if not word.startswith(("runs/", "exports/"))])
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


def refused(text: str) -> list[str]:
    """Commands of ``text`` of the other modules, and targets of make, that do not exist."""
    found = []
    parsers: dict[str, Callable[[list[str]], Any]] = {
        "fpdm.train": lambda argv: load_config(
            "digits" if argv[0].endswith(".yaml") else argv[0], argv[1:]
        ),
        "fpdm.data": data._parser().parse_args,
        "bench": bench.parser().parse_args,
    }
    for module, parse in parsers.items():
        for argv in commands(module, text):
            try:
                parse(argv)
            except (ConfigError, SystemExit):
                found.append(f"{module} {' '.join(argv)}")
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)|`make (\w+)`", text, re.M)
    found += [a or b for a, b in targets if f"\n{a or b}: " not in makefile]
    modules = {module for _, module in re.findall(r"(python|run \S*) -m ([a-z.]+)", text)}
    return found + [name for name in modules if importlib.util.find_spec(name) is None]


def test_other_commands_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert {len(commands(m, README)) > 0 for m in ("fpdm.train", "fpdm.data", "bench")} == {True}
    assert refused(README) == []
    bad = "```bash\nmake it\npython -m fpdm.train digits --train.stpes 3\npython -m fpdm.dta x\n"
    bad += "python -m bench --fast\n```\nand `python -m fpdm.data convert`"
    assert len(refused(bad)) == 5


def test_the_settings_can_be_given(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    file = tmp_path / "photos.yaml"
    file.write_text(text)
    config = load_config(str(file))
    assert (config.data.kind, config.model.patch_size, config.model.in_channels) == ("images", 4, 3)


def test_the_picture_of_the_files_is_true() -> None:
    """Every module stands where things are, and every path that is named exists."""
    picture = README.partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"\w+\.py", picture))
    there = {p.name for p in (ROOT / "fpdm").rglob("*.py") if p.name != "__init__.py"}
    assert named <= there
    # kernels/ has more than its main ones
    assert {p.name for p in (ROOT / "fpdm").glob("*.py")} - named == {"__init__.py"}
    paths = re.findall(r"`((?:fpdm|tests|bench|docs|csrc)/[\w./-]+)`", README)
    assert len(paths) >= 10
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_the_sweep_is_that_of_its_rows() -> None:
    rows = json.loads((ROOT / "docs" / "sweep.json").read_text())["rows"]
    assert "\n".join(sweep.table(rows)) in README


def test_pictures_are_there() -> None:
    """Every picture that is shown exists and is small; every one that exists is shown."""
    shown = set(re.findall(r"\]\((docs/[^)]*)\)", README))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.png")}
    assert shown == there
    for name in shown:
        data = (ROOT / name).read_bytes()
        assert data.startswith(figures.PNG_MAGIC)
        assert len(data) < 300_000
