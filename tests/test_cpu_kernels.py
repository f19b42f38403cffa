"""csrc/cpu, each instruction set that this processor has: the generated cases, units in the last
place of GELU, the same bits whatever the number of threads and whenever it runs. How it is built
and loaded: test_native_build.py."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_cpu_loop
import test_cpu_unroll
import torch
from operator_cases import (
    CAP,
    DTYPES,
    Case,
    arguments,
    execute,
    fixed,
    generate,
    odd_attention,
    run_case,
    values_of,
)
from operator_specs import SPECS, Values, infinite_key
from torch import Tensor

from fpdm.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.native is None, reason=f"csrc/cpu: {cpu.unavailable(torch.device('cpu'), None)}"
)
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
KINDS = DTYPES["cpu"]
CASES = [*generate(320, KINDS), *fixed(KINDS), *odd_attention(KINDS)]
FEW = generate(160, KINDS, CAP, seed=5)
MANY = generate(2000, KINDS, 2**22, seed=1)
# large enough that a team is woken, with a short last run in every partial sum
TEAM = [
    Case(op, dtype, 3, 257, 48, 2, f=40, variant=form)
    for op, spec in SPECS.items()
    for form in range(len(spec.forms))
    for dtype in (KINDS if form == 0 else KINDS[form % 2 :][:1])
]
# those that sum over more than one thread's share, or whose products a team packs together
REDUCING = [c for c in TEAM if c.op not in ("gelu", "gelu_backward", "adaln")]


def load(library: str | Path, isa: str, folder: Path) -> ModuleType:
    """One more copy of the extension in this process, on ``isa``. A path is loaded only once, and
    pybind11 returns the module that has the name already."""
    copy = shutil.copy(library, folder / Path(library).name)
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cpu", copy)
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPDM_CPU_ISA", isa)
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
    assert native.isa == isa
    return native


@pytest.fixture(scope="module", params=ISAS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    try:
        return load(cpu.native.__file__, request.param, tmp_path_factory.mktemp(request.param))
    except ImportError as error:
        pytest.skip(f"{request.param}: {error}")


def use(native: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """``fpdm.kernels.cpu`` on that copy, products included."""
    patch.setattr(cpu, "native", native)
    patch.setattr(cpu, "LIBRARY_PRODUCTS", frozenset())
    patch.setattr(cpu, "LIBRARY_WGRADS", frozenset())


@pytest.fixture
def on_variant(variant: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use(variant, monkeypatch)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    assert run_case(cpu, case) == []


@pytest.mark.usefixtures("on_variant")
def test_instruction_sets() -> None:
    """Each keeps the contract, so they agree within it."""
    assert [line for case in FEW for line in run_case(cpu, case)] == []


@pytest.mark.usefixtures("on_variant")
def test_an_infinite_key() -> None:
    assert infinite_key(cpu, DTYPES["cpu"]) == []


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.usefixtures("on_variant")
def test_a_key_far_behind_has_no_weight(dtype: torch.dtype) -> None:
    """However large its value is."""
    qkv = torch.zeros(1, 40, 3, 16)
    qkv[0, :, 0, 0] = 40
    qkv[0, :, 1, 0], qkv[0, :, 2] = 40, 1
    qkv[0, 7, 1, 0], qkv[0, 7, 2] = -40, 3e38
    y = cpu.attention(qkv.view(1, 40, 48).to(dtype), 1)
    torch.testing.assert_close(y, torch.ones_like(y))


def test_products_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where csrc/cpu leaves them to it: without wide vectors, and bfloat16 with AMX tiles."""
    monkeypatch.setattr(cpu, "LIBRARY_PRODUCTS", frozenset(KINDS))
    monkeypatch.setattr(cpu, "LIBRARY_WGRADS", frozenset(KINDS))
    mine = [case for case in FEW if "linear" in case.op]
    assert [line for case in mine for line in run_case(cpu, case)] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many(part: int) -> None:
    """2,000 cases, none of which the limit cuts."""
    assert [line for case in MANY[part::8] for line in run_case(cpu, case)] == []


def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the native kernels are given: the vectors of the first sample for all."""
    mine = [c for c in CASES if c.op == "adaln"]
    monkeypatch.setattr(cpu, "row_stride", lambda t: 0)
    assert any(run_case(cpu, c) for c in mine)


def bits(case: Case) -> dict[str, bytes]:
    found, _ = execute(cpu, case, values_of(case))
    return {n: x.contiguous().view(torch.uint8).numpy().tobytes() for n, x in found.items()}


def thread_dependent(cases: list[Case]) -> list[str]:
    """Those whose bits change with the number of threads."""
    torch.set_num_threads(1)
    wanted = [bits(c) for c in cases]
    found = []
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        found += [f"{c}: {n} threads" for c, want in zip(cases, wanted) if bits(c) != want]
    return found


def call(case: Case, values: Values) -> list[Tensor]:
    """Everything that the operator returns, sums up or measures, into buffers of its own."""
    given = {n: x.clone() for n, x in values.items() if n in case.operands("sums")}
    if "norms" in case.operands("outs"):
        given["norms"] = torch.empty(2, case.b)
    result = getattr(cpu, case.op)(**(values | given), **arguments(case))
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in (*results, *given.values()) if x is not None]


def unrepeatable(cases: list[Case], repeats: int) -> list[str]:
    """Those whose bits change from run to run, with 8 threads."""
    torch.set_num_threads(8)
    found = []
    for case in cases:
        # in turn with other values, so that what is left in the workspace shows
        turns = [values_of(c) for c in (case, replace(case, seed=1))]
        wanted = [call(case, values) for values in turns]
        for i in range(repeats):
            found_now = call(case, turns[i % 2])
            if not all(torch.equal(a, b) for a, b in zip(found_now, wanted[i % 2])):
                found.append(f"{case}: repeat {i}")
                break
    return found


@pytest.mark.usefixtures("on_variant")
def test_results_do_not_depend_on_threads() -> None:
    assert thread_dependent(TEAM) == []


def test_repeats() -> None:
    assert unrepeatable(REDUCING, 100) == []


@pytest.mark.usefixtures("on_variant")
def test_a_bias_of_a_product_without_inputs() -> None:
    dy, dbias = torch.randn(2, 33, 41), torch.ones(41)
    cpu.linear_wgrad(dy, torch.empty(2, 33, 0), torch.empty(41, 0), dbias)
    torch.testing.assert_close(dbias, 1 + dy.sum((0, 1)))


@pytest.mark.slow
@pytest.mark.usefixtures("on_variant")
def test_a_thousand_repeats() -> None:
    assert unrepeatable(REDUCING, 1000) == []


def test_gates_of_bits_bite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum per thread, and a sum in the order in which threads happen to finish."""
    mine = [c for c in TEAM if c.op == "linear_wgrad"]
    order = np.random.default_rng(0)

    def shares(
        dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None, shuffled: bool
    ) -> None:
        parts = list(zip(dy.flatten(0, 1).chunk(8), x.flatten(0, 1).chunk(8)))
        count = 8 if shuffled else torch.get_num_threads()
        for i in order.permutation(8) if shuffled else range(8):
            for a, b in zip(*(p.chunk(count) for p in parts[i])):
                dweight += a.float().t() @ b.float()

    for shuffled, gate in ((False, thread_dependent), (True, lambda c: unrepeatable(c, 5))):
        monkeypatch.setattr(
            cpu, "linear_wgrad", lambda *a, s=shuffled, **k: shares(*a, **k, shuffled=s)
        )
        assert gate(mine)


# of threads, rows and panels: rows by panels of the slowest thread, of a fair share, and of all
SHARES = """
#include <cstdio>
#include "gemm.h"
using namespace fpdm::portable;
int main() {
    fpdm::i64 threads, rows, panels;
    while (scanf("%ld %ld %ld", &threads, &rows, &panels) == 3) {
        double most = 0, all = 0;
        for (fpdm::i64 i = 0; i < threads; i++) {
            const Shares s(rows, panels, Team{i, threads});
            double mine = 0;
            s.by_rows.each(s.blocks.count, [&](fpdm::i64 b) {
                const double height = s.blocks.first(b + 1) - s.blocks.first(b);
                s.by_panels.each(panels, [&](fpdm::i64) { mine += height; });
            });
            most = mine > most ? mine : most;
            all += mine;
        }
        printf("%g %g %g\\n", most, all / threads, all);
    }
}
"""
SHAPES = [
    (threads, rows, panels)
    for threads in (1, 2, 3, 8, 16, 64)
    for rows in (1, 2, 8, 16, 48, 96, 97, 512)
    for panels in (0, 1, 3, 4, 9, 12, 16)
]


@pytest.mark.skipif(not shutil.which("c++"), reason="compiles the rule")
def test_no_thread_has_much_more_than_its_share(tmp_path: Path) -> None:
    """The slowest one has at most twice a fair share, or as little as whole rows or panels give:
    with 3 panels and many rows, all of a team work."""
    (tmp_path / "shares.cpp").write_text(SHARES)
    include = Path(__file__).parents[1] / "csrc" / "cpu"
    program = str(tmp_path / "shares")
    command = ["c++", "-std=c++17", "-w", "-fopenmp", "-DFPDM_ISA=portable", f"-I{include}"]
    subprocess.run([*command, str(tmp_path / "shares.cpp"), "-o", program], check=True)
    table = "".join("{} {} {}\n".format(*shape) for shape in SHAPES)
    done = subprocess.run([program], input=table, capture_output=True, text=True, check=True)
    found = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(SHAPES)
    wrong = []
    for (threads, rows, panels), (most, fair, every) in zip(SHAPES, found):
        assert every == rows * panels
        # of 4 rows: a tile of fewer takes as long
        least = min(rows * -(-panels // threads), max(4, -(-rows // threads)) * panels)
        if most > max(2 * fair, least):
            wrong.append(f"{threads} threads, {rows} rows, {panels} panels: {most} of {every}")
    assert wrong == []


def gelu_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its derivative in float64."""
    with np.errstate(over="ignore", under="ignore"):
        return _gelu_oracle(x.astype(np.float64))


def _gelu_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c, k = np.sqrt(2 / np.pi), 0.044715
    u = c * (x + k * x**3)
    s, t = 1 / (1 + np.exp(-2 * u)), 1 / (1 + np.exp(2 * u))
    return x * s, s + x * s * t * 2 * c * (1 + 3 * k * x * x)


def gelu_inputs(kind: str) -> np.ndarray:
    """As float32; beyond 1e18 x^2 overflows there: PyTorch's derivative is NaN, and so is ours."""
    every = np.arange(1 << 16, dtype=np.uint32)
    if kind == "bfloat16":
        x = (every << 16).view(np.float32)
    elif kind == "float16":
        x = every.astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        g = np.random.default_rng(0)
        wide, tail = g.uniform(-12, 6, 500_000), -np.exp(g.uniform(-20, 3, 250_000))
        x = np.concatenate([wide, tail, g.normal(size=250_000)]).astype(np.float32)
    return x[np.abs(x) < 1e18]


ORACLES: dict[str, tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]] = {}


def gelu_units(kind: str, gelu: Callable[..., Tensor], slope: Callable[..., Tensor]) -> list[float]:
    """The worst distances of GELU and of its derivative from float64, in units in the last place
    of float32."""
    if kind not in ORACLES:
        ORACLES[kind] = gelu_inputs(kind), gelu_oracle(gelu_inputs(kind))
    x, oracles = ORACLES[kind]
    ours = torch.from_numpy(x)
    found = []
    for result, oracle in zip((gelu(ours), slope(torch.ones_like(ours), ours)), oracles):
        unit = np.spacing(np.abs(oracle).astype(np.float32)).astype(np.float64)
        found.append(float((np.abs(result.numpy() - oracle) / unit).max()))
    return found


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.usefixtures("on_variant")
def test_gelu_in_units_in_the_last_place(kind: str) -> None:
    """Over every value of the two half precisions, and a million others."""
    value, slope = gelu_units(kind, cpu.gelu, cpu.gelu_backward)
    assert value <= 2
    assert slope <= 4


@pytest.mark.usefixtures("on_variant")
def test_gelu_in_bfloat16() -> None:
    """Half a unit in the last place and the 2^-14 of what is rounded, relative and, where the
    derivative cancels, absolute."""
    x = torch.from_numpy(gelu_inputs("bfloat16"))
    ours = x.bfloat16()
    results = cpu.gelu(ours), cpu.gelu_backward(torch.ones_like(ours), ours)
    for result, oracle, absolute in zip(results, gelu_oracle(x.numpy()), (2.0**-114, 2.0**-16)):
        _, exponent = np.frexp(oracle)
        unit = np.ldexp(1.0, np.maximum(exponent - 8, -133))
        error = np.abs(result.double().numpy() - oracle)
        assert ((error - absolute) / unit).max() <= 0.5 + 2.0**-6


def test_the_gate_of_units_bites() -> None:
    """One more unit than is allowed, everywhere."""

    def off(fn: Callable[..., Tensor], units: int) -> Callable[..., Tensor]:
        return lambda *x: (fn(*x).view(torch.int32) + units).view(torch.float32)

    value, slope = gelu_units("float16", off(cpu.gelu, 3), off(cpu.gelu_backward, 5))
    assert value > 2
    assert slope > 4


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.usefixtures("on_variant")
def test_gelu_beyond_the_finite(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, inf, nan, -1e30, 1e30, -3e38, -20.0, 20.0, 0.0, -0.0] * 7).to(dtype)
    torch.testing.assert_close(
        cpu.gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), equal_nan=True
    )
    plain = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    torch.testing.assert_close(cpu.gelu_backward(torch.ones_like(x), x), plain, equal_nan=True)


# one line of the source each, and what it becomes
FAULTS = {
    "rows.h": {
        # partial sums that depend on the number of threads
        "constexpr i64 CHUNK = 32;": "#define CHUNK i64(8 * omp_get_max_threads())",
    },
    "gemm.h": {
        "c, first > 0);": "c, first > 0 || team.size > 2);",
        # panels multiplied while others still pack them, however many rows there are
        "OWN_PACKING = 96;": "OWN_PACKING = 96 << 20;",
        "packers.barrier();\n            multiply<T>": "multiply<T>",
    },
    # a part of the batch keeps its activations where the first one does
    "unroll.cpp": {"units * batch + WIDTHS[i] * start": "units * batch"},
    # half of a GELU that is recomputed
    "block.cpp": {"v.gelu(r.type, count(r, 2)": "v.gelu(r.type, count(r, 1)"},
    # a slot keeps the modulation of whoever was there before
    "loop.cpp": {"bytes(o.modulation) + from": "bytes(o.modulation) + to"},
    # 2^r to 1e-6
    "vec.h": {"6.931472029e-1f": "6.931480000e-1f"},
}
BUILD = """if True:
    import pathlib, sys, setuptools
    setuptools.setup = lambda **_: None
    import setup
    folder = pathlib.Path(sys.argv[1])
    setup.CSRC, setup.VARIANTS = folder / "csrc", dict.fromkeys(setup.VARIANTS, [])
    setup.build_cpu(folder / sys.argv[2], folder / "temp")
"""


@pytest.mark.slow
def test_faults_in_the_kernels_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    for name, lines in FAULTS.items():
        path = tmp_path / "csrc" / "cpu" / name
        text = path.read_text()
        for line, fault in lines.items():
            assert text.count(line) == 1, line
            text = text.replace(line, fault)
        path.write_text(text)
    library = Path(cpu.native.__file__).name
    command = [sys.executable, "-c", BUILD, str(tmp_path), library]
    subprocess.run(command, cwd=root, check=True, timeout=600)
    (tmp_path / "faulty").mkdir()
    use(load(tmp_path / library, "portable", tmp_path / "faulty"), monkeypatch)
    dependent = " ".join(thread_dependent(REDUCING))
    for op in ("adaln_backward", "gate_residual_backward", "linear_wgrad"):
        assert op in dependent
    for op in ("linear", "linear_gate_residual", "adaln_linear"):
        assert unrepeatable([c for c in REDUCING if c.op == op], 1000)
    value, slope = gelu_units("float32", cpu.gelu, cpu.gelu_backward)
    assert value > 2
    assert slope > 4
    torch.set_num_threads(1)
    for size in test_cpu_loop.SIZES:
        test_cpu_loop.test_iterate(size, True, torch.float32)
        with pytest.raises(AssertionError):
            test_cpu_loop.test_solve(size, True, torch.float32)
    how: dict[str, Any] = {"m": 1, "recompute": "elementwise"}
    for size in test_cpu_unroll.SIZES[:2]:
        compare = functools.partial(
            test_cpu_unroll.compare, monkeypatch, size, torch.float32, **how
        )
        compare(injected=False)
        for fault in ({"injected": True}, {"injected": False, "chunks": 2}):
            with pytest.raises(AssertionError):
                compare(**fault)
