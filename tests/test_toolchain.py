"""What Triton compiles with: what we say of it, against Triton's own build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if sys.platform == "win32":
    pytest.skip("Triton brings a compiler there", allow_module_level=True)

from triton.runtime import build

from fpdm import info
from fpdm.config import ConfigError, OptimConfig
from fpdm.kernels import adamw, implementations, toolchain
from fpdm.kernels import triton as operators
from fpdm.optim import _choose

CUDA = torch.device("cuda", 0)
HEADERS = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
SOURCE = "#include <Python.h>\nint answer(void) { return 42; }\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs are those of a folder of our own: a working gcc, unless a test takes it away."""
    if sysconfig.get_config_var("CC") is None or not HEADERS:
        pytest.skip("needs a C compiler and Python's headers")
    folder = tmp_path / "bin"
    folder.mkdir()
    # as and ld: gcc's own helpers
    for name in ("gcc", "as", "ld"):
        (folder / name).symlink_to(_which(name))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(toolchain, "_libcuda", lambda: None)
    # whatever this machine's Triton has compiled before
    monkeypatch.setattr(toolchain, "_built", lambda: False)
    return folder


def _which(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def builds(folder: Path) -> bool:
    """Whether Triton's own build makes a module that includes Python.h."""
    source = folder / "answer.c"
    source.write_text(SOURCE)
    try:
        build._build("answer", str(source), str(folder), [], [], [], [])
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return False
    return True


def no_compiler(folder: Path, m: pytest.MonkeyPatch) -> None:
    (folder / "gcc").unlink()


def clang_only(folder: Path, m: pytest.MonkeyPatch) -> None:
    (folder / "gcc").rename(folder / "clang")


def named(folder: Path, m: pytest.MonkeyPatch) -> None:
    m.setenv("CC", str((folder / "gcc").rename(folder / "my-cc")))


def named_wrongly(folder: Path, m: pytest.MonkeyPatch) -> None:
    m.setenv("CC", "cc-of-nowhere")


def with_options(folder: Path, m: pytest.MonkeyPatch) -> None:
    m.setenv("CC", "gcc -O1")


def empty(folder: Path, m: pytest.MonkeyPatch) -> None:
    m.setenv("CC", "")


def no_headers(folder: Path, m: pytest.MonkeyPatch) -> None:
    paths = sysconfig.get_paths
    m.setattr(sysconfig, "get_paths", lambda **k: {**paths(**k), "include": str(folder)})
    m.setattr(toolchain, "_include", lambda: str(folder))


def headers_elsewhere(folder: Path, m: pytest.MonkeyPatch) -> None:
    m.setenv("CPATH", sysconfig.get_paths()["include"])
    no_headers(folder, m)


def headers_of_a_wrapper(folder: Path, m: pytest.MonkeyPatch) -> None:
    (folder / "gcc").rename(folder / "real-gcc")
    include = sysconfig.get_paths()["include"]
    (folder / "gcc").write_text(f'#!/bin/sh\nexec {folder}/real-gcc -I{include} "$@"\n')
    (folder / "gcc").chmod(0o755)
    no_headers(folder, m)


def own_build(folder: Path, m: pytest.MonkeyPatch) -> None:
    no_compiler(folder, m)
    m.setattr(build.knobs.build, "impl", lambda *args: "made elsewhere")


MACHINES: dict[str, tuple[Any, str | None]] = {
    "gcc": (lambda folder, m: None, None),
    "no compiler": (no_compiler, "C compiler: got none, expected gcc or clang in PATH, or CC"),
    "clang": (clang_only, None),
    "CC": (named, None),
    "a wrong CC": (named_wrongly, "C compiler: got CC='cc-of-nowhere', expected the name or path"),
    "CC with options": (with_options, "C compiler: got CC='gcc -O1', expected"),
    "an empty CC": (empty, "C compiler: got CC='', expected"),
    "no headers": (no_headers, "Python.h: got none in"),
    "headers by CPATH": (headers_elsewhere, None),
    "headers by a wrapper": (headers_of_a_wrapper, None),
    "triton.knobs.build.impl": (own_build, None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_said_is_what_triton_does(
    name: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange, reason = MACHINES[name]
    arrange(machine, monkeypatch)
    told = toolchain.missing()
    assert builds(machine) == (told == []), told
    if reason is None:
        assert told == []
    else:
        (line,) = told
        assert line.startswith(reason)
        assert "\n" not in line


def test_a_machine_without_a_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto goes on with what runs, and says why; an explicit request is one line."""
    monkeypatch.setattr(operators, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert implementations.choose("auto", CUDA, torch.bfloat16) == "triton"
    assert _choose("auto", CUDA) == "onepass"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the dtype has nothing else
        assert implementations.choose("auto", CUDA, torch.float64) == "reference"
    no_compiler(machine, monkeypatch)
    with pytest.warns(UserWarning, match=r"^impl: auto is reference, .* triton .*: C compiler: go"):
        assert implementations.choose("auto", CUDA, torch.bfloat16) == "reference"
    assert _choose("auto", CUDA) == "fused"
    for impl in implementations.TRITON:
        with pytest.raises(implementations.ImplError) as caught:
            implementations.choose(impl, CUDA, torch.bfloat16)
        line = str(caught.value)
        assert line.startswith(f"impl: got {impl}, which cannot run on cuda:0: C compiler: got non")
        assert "\n" not in line
    with pytest.raises(ConfigError, match=r"optim.impl: got onepass, .* C compiler: got none"):
        _choose(OptimConfig(impl="onepass").impl, CUDA)
    assert str(adamw.unavailable(CUDA)).startswith("C compiler")
    with pytest.warns(UserWarning, match="auto is reference"):
        told = info.implementations("cuda:0")
    assert told["auto"] == "reference"
    assert told["triton"].startswith("C compiler: got none, expected gcc or clang in PATH")
    assert json.dumps(told)


def test_libcuda_is_asked_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver

    def gone() -> list[str]:
        raise AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up")

    monkeypatch.setattr(driver, "libcuda_dirs", gone)
    assert toolchain._libcuda() == (
        "libcuda.so.1: libcuda.so cannot found! Please make sure GPU is set up "
        "(TRITON_LIBCUDA_PATH names its folder)"
    )
    monkeypatch.setattr(driver, "libcuda_dirs", lambda: [os.sep])
    assert toolchain._libcuda() is None
    # one that does not look for it
    monkeypatch.delattr(driver, "libcuda_dirs")
    assert toolchain._libcuda() is None


MODULE = """
#include <Python.h>
static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "made", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&def); }
"""


def test_what_is_compiled_already_needs_no_compiler(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 3.7 on Triton's launcher is part of the one module that it compiles and keeps."""
    from triton.backends.nvidia import driver

    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(machine / "cache"))
    monkeypatch.setattr(toolchain, "_libcuda", lambda: None)
    monkeypatch.setattr(driver, "CudaUtils", lambda: build.compile_module_from_src(MODULE, "made"))
    monkeypatch.setattr(driver, "PyKernelArg", None, raising=False)
    assert not toolchain._built()
    driver.CudaUtils()
    assert toolchain._built()
    monkeypatch.setenv("PATH", str(machine / "nothing"))
    monkeypatch.delenv("CC", raising=False)
    assert str(toolchain._compiler()).startswith("C compiler: got none")
    assert toolchain.missing() == []
    # up to 3.6 there are launchers beside it
    monkeypatch.delattr(driver, "PyKernelArg")
    assert len(toolchain.missing()) == 1


def test_rocm_is_not_asked_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_libcuda", lambda: "libcuda.so.1: none")
    monkeypatch.setattr(toolchain, "_built", lambda: False)
    assert "libcuda.so.1: none" in toolchain.missing()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert toolchain.missing() == []
