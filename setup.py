"""Native code of the package; everything else is in pyproject.toml.

csrc/cpu becomes fpdm/kernels/_cpu, each instruction set compiled from the same source; csrc/cuda
becomes cubins where NVRTC is installed. What cannot be built, or cannot be loaded once it is, is
left out: the operators then run in plain PyTorch, and fpdm/kernels/_build.json, which `python -m
fpdm.info` reads, says why. Torch is not needed: the extension takes addresses, and finds torch's
OpenMP functions when it is loaded.

CXX: the C++ compiler, with options if need be. FPDM_WERROR=1: warnings are errors.
FPDM_SANITIZE=1: AddressSanitizer and UBSan. FPDM_CUBINS=0: no cubins.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
VARIANTS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }


def flags() -> list[str]:
    """Of every compilation. No -ffast-math: NaN and the order of sums are promises."""
    found = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    found += ["-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
    if os.environ.get("FPDM_WERROR") == "1":
        found.append("-Werror")
    if os.environ.get("FPDM_SANITIZE") == "1":
        sanitize = "-fsanitize=address,undefined"
        return [*found, "-O1", "-g", sanitize, "-fno-sanitize-recover=undefined"]
    return [*found, "-O3"]


def run(command: list[str]) -> str:
    """What it prints; RuntimeError with its last lines when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = " ".join((done.stderr or done.stdout).split())[-2000:]
        raise RuntimeError(f"{Path(command[0]).name} failed: {tail}")
    return done.stdout


def source_hash() -> str:
    """SHA-256 of csrc/cpu and the bindings, names included."""
    digest = hashlib.sha256()
    for path in sorted([*(CSRC / "cpu").iterdir(), CSRC / "bindings.cpp"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# where torch is not, its OpenMP is that of most of its wheels
LOAD = """if True:
    import ctypes, importlib.util, sys
    try:
        import torch
    except ImportError:
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def load(library: Path) -> None:
    """Raises RuntimeError unless a new process can load it: a linker lets functions be missing."""
    env = {name: value for name, value in os.environ.items() if name != "FPDM_CPU_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        told = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"it was linked, but cannot be loaded: {told}")


def build_cpu(target: Path, work: Path) -> dict[str, Any]:
    """Compiles and links the extension; returns what was built. An instruction set that the
    compiler does not know is left out, unless it is the portable one."""
    import pybind11

    compiler = shlex.split(os.environ.get("CXX") or "c++")
    version = run([*compiler, "--version"]).splitlines()[0]
    work.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    units = [(CSRC / "bindings.cpp", "bindings", headers)]
    units += [(CSRC / "cpu" / f"{name}.cpp", name, []) for name in ("block", "loop", "unroll")]

    def compile_one(source: Path, name: str, extra: list[str]) -> str:
        run([*compiler, *flags(), *extra, "-c", str(source), "-o", str(work / f"{name}.o")])
        return str(work / f"{name}.o")

    def compile_variant(name: str) -> str:
        options = [*VARIANTS[name], f"-DFPDM_ISA={name}"]
        return compile_one(CSRC / "cpu/variant.cpp", name, options)

    objects, left_out = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # they take longest
        variants = {name: pool.submit(compile_variant, name) for name in VARIANTS}
        rest = [pool.submit(compile_one, *unit) for unit in units]
        for name, compiled in variants.items():
            try:
                objects.append(compiled.result())
            except RuntimeError as error:
                if name == "portable":
                    raise
                left_out[name] = str(error)
                print(f"fpdm: csrc/cpu is built without {name}: {error}", file=sys.stderr)
        objects += [compiled.result() for compiled in rest]
    built = {name: extra for name, extra in VARIANTS.items() if name not in left_out}
    has = [f"-DFPDM_HAS_{name}" for name in built]
    objects.append(compile_one(CSRC / "cpu/dispatch.cpp", "dispatch", has))
    # without an OpenMP library: a second one in the process would fight torch's for the cores
    links = [flag for flag in flags() if flag != "-fopenmp"]
    linked = work / target.name
    run([*compiler, "-shared", "-Wl,-z,now", *links, *objects, "-o", str(linked)])
    # a sanitizer wants to be there before the interpreter
    if os.environ.get("FPDM_SANITIZE") != "1":
        load(linked)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(linked, target)
    return {
        "compiler": version, "flags": flags(), "variants": built, "left_out": left_out,
        "source": source_hash(),
    }  # fmt: skip


def build_cubins(folder: Path) -> dict[str, Any]:
    """Cubins of csrc/cuda into ``folder``, where NVRTC is installed."""
    if os.environ.get("FPDM_CUBINS") == "0":
        raise RuntimeError("FPDM_CUBINS=0")
    sys.path.insert(0, str(ROOT))
    try:
        from fpdm.kernels.cuda_compile import build_cubins as build
    finally:
        sys.path.pop(0)
    return build(folder)


class Native(build_ext):
    """Builds what can be built and records it, or why not."""

    def run(self) -> None:
        """Remembers what was asked for: setuptools builds elsewhere and copies the extension."""
        self.in_place = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Writes the extension, cubins, headers and _build.json beside each other."""
        target = Path(self.get_ext_fullpath(ext.name))
        package = ROOT / "fpdm" if self.in_place else target.parent.parent
        work = Path(self.build_temp) / "fpdm"
        (package / "kernels").mkdir(parents=True, exist_ok=True)
        # an old one, in the build's own folder too, would go on running where this build fails
        for old in (target, package / "kernels" / target.name):
            old.unlink(missing_ok=True)
        record: dict[str, Any] = {}
        steps = {
            "cpu": lambda: build_cpu(target, work),
            "cuda": lambda: build_cubins(package / "kernels" / "cubins"),
        }
        for name, step in steps.items():
            try:
                record[name] = step()
            except Exception as error:
                record[name] = {"missing": f"{type(error).__name__}: {error}"}
                print(f"fpdm: csrc/{name} is not built: {error}", file=sys.stderr)
        if not self.in_place:
            shutil.copytree(CSRC, package / "csrc", dirs_exist_ok=True)
        text = json.dumps(record, indent=1, sort_keys=True)
        (package / "kernels" / "_build.json").write_text(text + "\n")


setup(
    ext_modules=[Extension("fpdm.kernels._cpu", ["csrc/bindings.cpp"], optional=True)],
    cmdclass={"build_ext": Native},
)
