"""csrc/cpu as it is built and loaded: degradation, record, one OpenMP runtime, the choice of
instruction set, and a run under the sanitizers. What it computes: test_cpu_kernels.py."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fpdm.kernels import cpu
from fpdm.kernels.implementations import ImplError, choose

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "fpdm" / "kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="a shell script around c++"
)
needs_native = pytest.mark.skipif(cpu.native is None, reason="csrc/cpu is not built")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **env},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def build(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The extension into folder/lib."""
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, "FPDM_CUBINS": "0", **env},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_degrades_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "csrc/cpu is not built" in done.stderr
    kernels = tmp_path / "lib" / "fpdm" / "kernels"
    assert not list(kernels.glob("_cpu*"))
    record = json.loads((kernels / "_build.json").read_text())
    assert "/nonexistent/c++" in record["cpu"]["missing"]
    assert "FPDM_CUBINS=0" in record["cuda"]["missing"]
    # what an installed package needs to build or to compile at run time
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    copies = tmp_path / "lib" / "fpdm"
    assert sources == {
        str(p.relative_to(copies)) for p in (copies / "csrc").rglob("*") if p.is_file()
    }


# "compiler FLAG..." without optimisation, that does not know some flags, and perhaps more
COMPILER = """#!/bin/sh
for flag in "$@"; do
    shift
    case $flag in
    -mavx*) echo "unrecognized command-line option '$flag'" >&2; exit 1 ;;
    -O3) flag=-O0 ;;
    esac
    set -- "$@" "$flag"
done
MORE
exec c++ "$@"
"""
# every unit becomes an empty one
EMPTY = """case " $* " in
*" -c "*) for last in "$@"; do :; done; exec c++ -x c++ -c /dev/null -o "$last" ;;
esac"""


def compiler(folder: Path, more: str = "") -> dict[str, str]:
    """As CXX: two words, the way ccache is put before a compiler."""
    script = folder / "old-c++"
    script.write_text(COMPILER.replace("MORE", more))
    script.chmod(0o755)
    return {"CXX": f"/usr/bin/env {script}"}


@needs_compiler
def test_a_build_that_cannot_be_loaded_is_none(tmp_path: Path) -> None:
    """A linker lets functions be missing; and what an earlier build left does not stay."""
    library = tmp_path / "lib" / "fpdm" / "kernels" / f"_cpu{SUFFIX}"
    library.parent.mkdir(parents=True)
    library.touch()
    done = build(tmp_path, **compiler(tmp_path, EMPTY))
    assert done.returncode == 0, done.stderr
    record = json.loads((library.parent / "_build.json").read_text())["cpu"]
    assert list(record) == ["missing"]
    assert "it was linked, but cannot be loaded: " in record["missing"]
    assert "PyInit__cpu" in record["missing"]
    assert not library.exists()


@needs_compiler
def test_a_compiler_that_knows_no_wide_vectors(tmp_path: Path) -> None:
    done = build(tmp_path, **compiler(tmp_path), FPDM_CPU_ISA="")
    library = tmp_path / "lib" / "fpdm" / "kernels" / f"_cpu{SUFFIX}"
    record = json.loads((library.parent / "_build.json").read_text())["cpu"]
    assert record["variants"] == {"portable": []}
    assert len(record["left_out"]) == (3 if platform.machine() in ("x86_64", "AMD64") else 0)
    for name, why in record["left_out"].items():
        assert "unrecognized command-line option '-mavx" in why
        assert f"csrc/cpu is built without {name}: " in done.stderr
    code = f"""if True:
        import importlib.util, torch
        spec = importlib.util.spec_from_file_location("_cpu", {str(library)!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        x = torch.zeros(4)
        native.gelu(0, 4, x.data_ptr(), x.data_ptr())
        print(native.isa)
    """
    done = python(code)
    assert done.stdout == "portable\n", done.stderr


def test_says_why_it_is_missing() -> None:
    code = """if True:
        import sys
        sys.modules["fpdm.kernels._cpu"] = None
        import torch
        from fpdm.kernels import implementations
        print(implementations.unavailable("cpu", "cpu", torch.float32))
        print(implementations.choose("auto", "cpu", torch.float32))
    """
    reason, choice = python(code).stdout.splitlines()
    assert "cannot be loaded" in reason
    assert "compiler" in reason
    assert choice == "reference"


def test_what_it_refuses() -> None:
    device = torch.device("cpu")
    assert "float64" in (cpu.unavailable(device, torch.float64) or "")
    assert "float16" in (cpu.unavailable(device, torch.float16) or "")
    assert "cuda" in (cpu.unavailable(torch.device("cuda"), torch.float32) or "")


@needs_native
def test_the_record_is_of_this_source() -> None:
    record = json.loads((KERNELS / "_build.json").read_text())["cpu"]
    code = """if True:
        import setuptools
        setuptools.setup = lambda **_: None
        import setup
        print(setup.source_hash())
    """
    done = python(code)
    assert done.stdout.strip() == record["source"], "csrc/cpu has changed since it was built"
    assert record["compiler"]
    assert "portable" in record["variants"]
    assert not [flag for flag in record["flags"] if "fast-math" in flag]


RUNTIMES = r"""if True:
    import ctypes, re, torch
    from fpdm.kernels import cpu
    torch.set_num_threads(2)
    cpu.gelu(torch.randn(1 << 20))
    for path in MORE:
        ctypes.CDLL(path)
    maps = open("/proc/self/maps").read()
    print(*sorted(set(re.findall(r"/\S*(?:libgomp|libiomp|libomp)\S*", maps))), sep="\n")
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_one_openmp_runtime(tmp_path: Path) -> None:
    found = python(RUNTIMES.replace("MORE", "[]")).stdout.split()
    assert len(found) == 1, found
    # control: a second copy is seen
    copy = shutil.copy(found[0], tmp_path / "libgomp-copy.so")
    both = python(RUNTIMES.replace("MORE", repr([str(copy)])))
    assert len(both.stdout.split()) == 2, both.stderr


@needs_native
def test_products_without_wide_vectors() -> None:
    """Are the library's, and counted as such."""
    code = """if True:
        import torch
        from fpdm.kernels import cpu, implementations, reference
        print(cpu.native.isa, len(cpu.LIBRARY_PRODUCTS))
        reference.linear_wgrad = lambda *_: print("the library's")
        ops = implementations.resolve("auto", "cpu", torch.float32)
        x, w, b = torch.randn(2, 3, 8), torch.randn(8, 8), torch.zeros(8)
        ops.linear_dgrad(ops.gelu(ops.linear(x, w, b)), w)
        ops.linear_wgrad(x, x, w, b)
        print(implementations.ran("cpu"))
    """
    told = python(code, FPDM_CPU_ISA="portable").stdout.splitlines()
    assert told == [
        "portable 2",
        "the library's",
        "cpu: gelu 1; library: linear 1, linear_dgrad 1, linear_wgrad 1",
    ]


@needs_native
def test_out_of_memory() -> None:
    """Is Python's error, after which a smaller call runs."""
    code = """if True:
        import resource, torch
        from fpdm.kernels import cpu
        torch.set_num_threads(1)
        qkv = torch.randn(1, 60000, 48)
        y = torch.empty(1, 60000, 16)
        small = cpu.attention(qkv[:, :8].contiguous(), 1)
        with open("/proc/self/status") as status:
            size = next(int(s.split()[1]) for s in status if s.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + (8 << 20),) * 2)
        for _ in range(2):
            try:
                cpu.attention(qkv, 1, y)
            except MemoryError as error:
                print(error)
        print(torch.equal(cpu.attention(qkv[:, :8].contiguous(), 1), small))
    """
    done = python(code)
    first, second, again = done.stdout.splitlines() or [done.stderr] * 3
    assert first == second
    assert first.startswith("csrc/cpu: ")
    assert first.endswith(" bytes of workspace cannot be had")
    assert again == "True"


@needs_native
def test_threads_of_python_have_the_number_of_threads() -> None:
    """Whatever torch was told elsewhere, before its first work in a thread."""
    code = """if True:
        import threading, torch
        from fpdm.kernels import cpu
        x = torch.randn(1 << 20)
        tasks = lambda: len(__import__("os").listdir("/proc/self/task"))
        torch.set_num_threads(1)
        seen = []
        def run():
            before = tasks()
            cpu.gelu(x, x)
            seen.append(tasks() - before)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        print(seen)
    """
    assert python(code, OMP_NUM_THREADS="4").stdout == "[0]\n"
    # control: without it OpenMP starts as many as its own setting says
    plain = "cpu.here = type('Here', (), {'device': cpu.DEVICE})\n        x = torch"
    without = code.replace("x = torch", plain)
    assert python(without, OMP_NUM_THREADS="4").stdout == "[3]\n"


@needs_native
@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_unknown_instruction_set(impl: str) -> None:
    """Is an error, and not silently plain PyTorch; of what does not ask for csrc/cpu it is none."""
    code = f"""if True:
        from fpdm import info
        from fpdm.kernels.implementations import ImplError, choose
        try:
            print(choose({impl!r}, "cpu"))
        except ImplError as error:
            print(error)
        print(choose("reference", "cpu"))
        print(info.implementations("cpu")["auto"])
    """
    error, reference, auto = python(code, FPDM_CPU_ISA="mmx").stdout.splitlines()
    told = "FPDM_CPU_ISA: got 'mmx', expected one of portable, avx2, avx512, avx512_bf16"
    assert error.endswith(told)
    assert reference == "reference"
    assert auto == f"none: {told}"


def test_an_instruction_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known one, which this processor lacks."""
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setenv("FPDM_CPU_ISA", "avx2")
    for why in ("FPDM_CPU_ISA: got avx2, expected one of those built", "No module named x"):
        monkeypatch.setattr(cpu, "_missing", why)
        for impl in ("auto", "cpu"):
            with pytest.raises(ImplError, match="FPDM_CPU_ISA: got avx2, expected") as error:
                choose(impl, "cpu")
            assert why in str(error.value)
    monkeypatch.delenv("FPDM_CPU_ISA")
    assert choose("auto", "cpu") == "reference"


SANITIZED = """if True:
    import importlib.util, sys
    import torch
    spec = importlib.util.spec_from_file_location("fpdm.kernels._cpu", BUILT)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    import fpdm.kernels
    sys.modules["fpdm.kernels._cpu"] = fpdm.kernels._cpu = native
    import operator_cases as oc
    import pytest
    import test_cpu_loop as loop
    import test_cpu_unroll as unrolled
    from fpdm.kernels import cpu
    assert cpu.native is native
    torch.set_num_threads(2)
    FAULT
    kinds = (torch.float32, torch.bfloat16)
    cpu.LIBRARY_PRODUCTS = cpu.LIBRARY_WGRADS = frozenset()
    cases = oc.generate(64, kinds, oc.CAP, seed=6)
    print("failed:", [line for case in cases for line in oc.run_case(cpu, case)])
    for size in loop.SIZES:
        for kind in kinds:
            loop.test_iterate(size, True, kind)
            loop.test_solve(size, True, kind)
    for mode in unrolled.MODES:
        for kind in kinds:
            unrolled.compare(pytest.MonkeyPatch(), unrolled.SIZES[1], kind, 3, mode, 2)
"""


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_sanitizers(tmp_path: Path) -> None:
    done = build(tmp_path, FPDM_SANITIZE="1")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "lib" / "fpdm" / "kernels" / f"_cpu{SUFFIX}"
    # with the library of exceptions, which it must find before the interpreter loads another
    wanted = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output(["c++", f"-print-file-name={n}"], text=True) for n in wanted]
    # the interpreter and torch leak by design
    env = {"LD_PRELOAD": " ".join(n.strip() for n in found), "ASAN_OPTIONS": "detect_leaks=0"}
    code = SANITIZED.replace("BUILT", repr(str(library)))
    for isa in ISAS:
        done = python(code.replace("FAULT", ""), FPDM_CPU_ISA=isa, **env)
        if "that this processor can run" in done.stderr:
            continue
        assert done.stdout == "failed: []\n", isa + done.stdout + done.stderr[-3000:]
        assert "runtime error" not in done.stderr
    # control: one vector past the end of a buffer
    fault = "x = torch.randn(64); native.gelu(0, 80, x.data_ptr(), x.data_ptr())"
    done = python(code.replace("FAULT", fault), FPDM_CPU_ISA="portable", **env)
    assert "heap-buffer-overflow" in done.stderr
