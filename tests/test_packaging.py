from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fpdm

ROOT = Path(__file__).parents[1]
# ask for them where they are used, not at import
HEAVY = {"tyro", "yaml", "triton", "cupy", "matplotlib", "PIL", "diffusers", "tensorboard", "apex",
         "sklearn", "flash_attn"}  # fmt: skip


def modules(statement: str) -> set[str]:
    """What is loaded after ``statement`` in a new process."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split())


def imported(statement: str) -> set[str]:
    return {name.split(".")[0] for name in modules(statement)}


def test_the_library_imports_nothing_optional() -> None:
    loaded = imported("import fpdm, fpdm.model, fpdm.recipes, fpdm.cli, fpdm.info, fpdm.schedulers")
    assert loaded & {"torch", "fpdm"} == {"torch", "fpdm"}
    assert not loaded & HEAVY


def test_settings_need_no_torch_and_the_probe_bites() -> None:
    loaded = imported("import fpdm.recipes; fpdm.recipes.load_config('digits')")
    assert not loaded & {"torch", "numpy", *HEAVY}
    # control: the probe sees what a command line needs
    argv = "['--train.batch', '8']"
    loaded = imported(f"import fpdm.recipes; fpdm.recipes.load_config('digits', {argv})")
    assert "tyro" in loaded
    assert "torch" not in loaded


def test_the_package_alone_loads_nothing_and_a_name_what_it_needs() -> None:
    loaded = modules("import fpdm; dir(fpdm); fpdm.__version__; fpdm.__all__")
    own = {"fpdm.process"}  # of the standard library alone
    assert {name for name in loaded if name.startswith("fpdm.")} == own
    assert not loaded & {"torch", "numpy", *HEAVY}
    # settings are as light through the package as from their module
    loaded = modules("import fpdm; fpdm.ModelConfig(); fpdm.SamplerConfig(iters=4)")
    own |= {"fpdm.config", "fpdm.settings"}
    assert {name for name in loaded if name.startswith("fpdm.")} == own
    assert not loaded & {"torch", "numpy", *HEAVY}
    # control: the probe sees what a model needs
    loaded = modules("import fpdm; fpdm.FPDM")
    assert loaded & {"torch", "fpdm.model", "fpdm.engine"} == {"torch", "fpdm.model"}
    assert not loaded & HEAVY


def test_public_names_are_those_of_their_modules() -> None:
    assert dir(fpdm) == sorted(fpdm.__all__)
    for name in fpdm.__all__:
        found = getattr(fpdm, name)
        if isinstance(found, type) or callable(found):
            assert getattr(sys.modules[found.__module__], name) is found
    assert fpdm.solvers is sys.modules["fpdm.solvers"]
    assert fpdm.gradients is sys.modules["fpdm.gradients"]
    space: dict[str, object] = {}
    exec("from fpdm import *", space)
    assert set(fpdm.__all__) <= set(space)
    with pytest.raises(AttributeError, match="module 'fpdm' has no attribute 'FPMD'"):
        fpdm.FPMD  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_public_names(tmp_path: Path) -> None:
    """mypy knows every name, and what it is."""
    program = tmp_path / "program.py"
    lines = [f"fpdm.{name}" for name in fpdm.__all__]
    program.write_text("\n".join([
        "import fpdm", *lines, "reveal_type(fpdm.FPDM.from_pretrained('a'))",
        "reveal_type(fpdm.solvers.relative_residual)", "fpdm.FPMD",
    ]))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports", "silent", str(program)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert any('"fpdm.model.FPDM"' in line for line in told), done.stdout + done.stderr
    assert any("def (x: torch._tensor.Tensor" in line for line in told)
    errors = [line for line in told if " error: " in line]
    assert len(errors) == 1, errors
    assert 'no attribute "FPMD"' in errors[0]


def project() -> str:
    return (ROOT / "pyproject.toml").read_text()


def listed(name: str) -> list[str]:
    """A list of strings in pyproject.toml; Python 3.10 has no tomllib."""
    found = re.search(rf"^{name} = \[(.*?)\]$", project(), re.M | re.S)
    assert found, name
    return re.findall(r'"([^"]+)"', found.group(1))


def test_the_project_is_what_it_says() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fpdm.__version__)
    assert 'attr = "fpdm.__version__"' in project()
    assert 'requires-python = ">=3.10,<3.14"' in project()
    assert listed("dependencies") == [
        "torch>=2.10",
        "numpy",
        "safetensors",
        "pyyaml",
        "tqdm",
        "tyro",
    ]
    for extra in ("triton", "cuda12", "cuda13", "diffusers", "eval", "bench", "dev"):
        listed(extra)
    extras = project().partition("[project.optional-dependencies]")[2].partition("[tool.")[0]
    assert "flash" not in extras
    assert "apex" not in extras
    folders = {p.parent for p in (ROOT / "fpdm").rglob("*.py")}
    packages = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert set(listed("packages")) == packages
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def pins(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line and not line.startswith(("#", "-r")):
            package, pinned, rest = line.partition("==")
            assert pinned, f"{name}: {line} is not pinned"
            found.setdefault(package.lower(), []).append(rest)
    return found


def test_everything_is_pinned_and_nothing_twice() -> None:
    run, dev, triton = pins("run.txt"), pins("dev.txt"), pins("triton.txt")
    assert not set(run) & set(dev)
    assert run["torch"] == ["2.13.0"]
    assert triton["triton"][0].startswith("3.6.0")
    for package, rest in {**run, **dev}.items():
        # two pins of one package are for complementary pythons
        markers = [text.partition(";")[2].strip() for text in rest]
        if len(rest) > 1:
            assert markers == ['python_version < "3.11"', 'python_version >= "3.11"'], package
    for name in listed("dependencies"):
        assert name.split(">")[0].lower() in run
    for name in listed("dev"):
        assert name.lower() in dev
    for name in listed("eval"):
        assert name.lower() in run


@pytest.mark.skipif(sys.platform == "win32", reason="make and modes are of Unix")
def test_ci_runs_make_test_in_a_fresh_environment() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert 'make test VENV="$scratch/venv" </dev/null' in text
    subprocess.run(["bash", "-n", script], check=True)
    # a dry run shows every command of `make test` without running one
    done = subprocess.run(
        ["make", "-n", "test", "VENV=/nowhere/venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "-m venv",
        "requirements/dev.txt",
        "ruff check",
        "ruff format --check",
        "mypy",
        "pytest",
    ):
        assert part in done.stdout
    train = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True)
    assert "fpdm.train digits" in train.stdout
    assert "fpdm.evaluate runs/digits" in train.stdout


def test_no_file_names_a_registry_or_a_machine() -> None:
    files = [ROOT / "Makefile", ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    for path in [*files, *(ROOT / "requirements").iterdir()]:
        text = path.read_text()
        assert "://" not in text, path
        assert "--hash" not in text, path
        assert not re.search(r"(^|[\s\"'=])/(home|root|work|opt|usr)/", text), path
