"""csrc/cpu as it is built and loaded: degradation, record, one OpenMP runtime, every instruction
set, threads, accuracy of the GELU, and a run under the sanitizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm.kernels import cpu

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "fpdm" / "kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
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


def test_says_why_it_is_missing() -> None:
    code = """if True:
        import sys
        sys.modules["fpdm.kernels._cpu"] = None
        import torch
        from fpdm.kernels import ops
        print(ops.unavailable("cpu", "cpu", torch.float32))
        print(ops.choose("auto", "cpu", torch.float32))
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


AGREE = """if True:
    import operator_cases as oc
    import torch
    from fpdm.kernels import cpu
    if cpu.native is None:
        raise SystemExit("cannot run: " + cpu.unavailable(torch.device("cpu"), None))
    print(cpu.native.isa)
    kinds = (torch.float32, torch.bfloat16)
    cpu.LIBRARY_PRODUCTS = frozenset(kinds[:{library}])
    for case in oc.generate({count}, kinds, oc.CAP, seed=5):
        for line in oc.run_case(cpu, case):
            print(line)
"""


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str) -> None:
    """Each keeps the contract, so they agree within it."""
    done = python(AGREE.format(count=160, library=0), FPDM_CPU_ISA=isa)
    if "that this processor can run" in done.stderr and isa != "portable":
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.split() == [isa], done.stdout + done.stderr


@needs_native
def test_products_of_the_library() -> None:
    """Where csrc/cpu leaves them to it: without wide vectors, and bfloat16 with AMX tiles."""
    done = python(AGREE.format(count=160, library=2))
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr
    code = "from fpdm.kernels import cpu; print(len(cpu.LIBRARY_PRODUCTS))"
    assert python(code, FPDM_CPU_ISA="portable").stdout == "2\n"


@needs_native
def test_unknown_instruction_set() -> None:
    done = python(AGREE.format(count=1, library=0), FPDM_CPU_ISA="mmx")
    assert "FPDM_CPU_ISA: got mmx" in done.stderr


def every_output(seed: int = 0) -> list[Tensor]:
    """All operators once, large enough for a team: sums over tokens in several chunks."""
    g = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for dtype, b, t, d in ((torch.float32, 3, 70, 96), (torch.bfloat16, 2, 530, 72)):

        def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype)

        z, y, x = some(b, t, d), some(b, t, d), some(b, t, 2 * d)
        shift, scale, gate = some(b, 6 * d).chunk(6, -1)[:3]
        w, bias = some(d, 2 * d), some(d)
        sums, dz, dw, db = some(b, 3 * d).float(), z.clone(), some(d, 2 * d).float(), bias.float()
        norms = torch.empty(2, b)
        found += [cpu.adaln(z, shift, scale), *cpu.gate_residual_adaln(z, y, gate, shift, scale)]
        found.append(cpu.gate_residual(z, y, gate, prev=y, norms=norms))
        found += [cpu.gate_residual_backward(y, z, gate, sums[:, :d]), cpu.linear(x, w, bias)]
        cpu.adaln_backward(y, z, scale, dz, sums[:, d : 2 * d], sums[:, 2 * d :])
        cpu.linear_wgrad(y, x, dw, db)
        found += [norms, sums, dz, dw, db, cpu.linear_dgrad(y, w), cpu.linear_add_gelu(x, w, y)]
        found.append(cpu.gelu_backward(x, x))
        qkv = some(b, t, 3 * d)
        found += [cpu.attention(qkv, 2), cpu.attention_backward(y, qkv, y, 2)]
        found.append(cpu.linear_gate_residual(x, w, bias, z, gate))
    return found


@needs_native
def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = every_output()
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for index, (a, b) in enumerate(zip(every_output(), want)):
                assert torch.equal(a, b), (threads, index)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.slow
def test_a_thousand_repeats_with_eight_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        want = every_output()
        for _ in range(1000):
            assert all(torch.equal(a, b) for a, b in zip(every_output(), want))
    finally:
        torch.set_num_threads(before)


def gelu_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its derivative in extended precision."""
    x = x.astype(np.longdouble)
    c, k = np.sqrt(2 / np.longdouble("3.14159265358979323846264338")), np.longdouble("0.044715")
    u = c * (x + k * x**3)
    s, t = 1 / (1 + np.exp(-2 * u)), 1 / (1 + np.exp(2 * u))
    return x * s, s + x * s * t * 2 * c * (1 + 3 * k * x * x)


def gelu_inputs(kind: str) -> np.ndarray:
    every = np.arange(1 << 16, dtype=np.uint32)
    if kind == "bfloat16":
        x = (every << 16).view(np.float32)
    elif kind == "float16":
        x = every.astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        g = np.random.default_rng(0)
        wide, tail = g.uniform(-12, 6, 500_000), -np.exp(g.uniform(-20, 3, 250_000))
        x = np.concatenate([wide, tail, g.normal(size=250_000)]).astype(np.float32)
    # beyond, x^2 overflows in float32: PyTorch's derivative is NaN there, and so is ours
    return x[np.abs(x) < 1e18]


@needs_native
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision")
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_gelu_in_units_in_the_last_place(kind: str) -> None:
    x = gelu_inputs(kind)
    ours = torch.from_numpy(x)
    results = cpu.gelu(ours), cpu.gelu_backward(torch.ones_like(ours), ours)
    with np.errstate(over="ignore", under="ignore"):
        oracles = gelu_oracle(x)
    for result, oracle, limit in zip(results, oracles, (2, 4)):
        unit = np.spacing(np.abs(oracle).astype(np.float32)).astype(np.longdouble)
        assert float((np.abs(result.numpy() - oracle) / unit).max()) <= limit


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_beyond_the_finite(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, inf, nan, -1e30, 1e30, -3e38, -20.0, 20.0, 0.0, -0.0] * 7).to(dtype)
    torch.testing.assert_close(
        cpu.gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), equal_nan=True
    )
    plain = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    torch.testing.assert_close(cpu.gelu_backward(torch.ones_like(x), x), plain, equal_nan=True)


SANITIZED = """if True:
    import importlib.util, sys
    import torch
    spec = importlib.util.spec_from_file_location("fpdm.kernels._cpu", LIBRARY)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    import fpdm.kernels
    sys.modules["fpdm.kernels._cpu"] = fpdm.kernels._cpu = native
    import operator_cases as oc
    from fpdm.kernels import cpu
    assert cpu.native is native
    torch.set_num_threads(2)
    FAULT
    kinds = (torch.float32, torch.bfloat16)
    cpu.LIBRARY_PRODUCTS = frozenset()
    cases = oc.generate(64, kinds, oc.CAP, seed=6)
    print("failed:", [line for case in cases for line in oc.run_case(cpu, case)])
"""


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_sanitizers(tmp_path: Path) -> None:
    done = build(tmp_path, FPDM_SANITIZE="1")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "lib" / "fpdm" / "kernels" / f"_cpu{SUFFIX}"
    asan = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    # the interpreter and torch leak by design
    env = {"LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    code = SANITIZED.replace("LIBRARY", repr(str(library)))
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
