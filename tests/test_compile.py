"""Compile gate of the Triton kernels, without a GPU: limits, committed table, planted faults."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import planted_kernels as planted  # noqa: E402
import torch  # noqa: E402

from bench import compile_gate as gate  # noqa: E402
from fpdm.kernels import adaln, gemm, gemm_table  # noqa: E402
from fpdm.kernels.launch import HALVES  # noqa: E402


@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
def test_every_kernel(arch: int) -> None:
    """Limits, nothing that is never launched, dots on tensor cores: one test, so that everything is
    compiled once; of attention and the fused GEMMs the heaviest forms."""
    check(gate.compiled(arch, gate.BRIEF), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
def test_every_form(arch: int) -> None:
    """The same for all that may be launched."""
    found = gate.compiled(arch)
    assert {r.key for r in found} == gate.planned(arch)
    check(found, arch)


def check(rows: list[gate.Resources], arch: int) -> None:
    assert [line for r in rows for line in gate.violations(r)] == []
    assert {r.key for r in rows} <= set(gate.committed())
    assert gate.unlaunched(gate.kernel_modules(), rows) == set()
    # the gate knows a dot when it sees one
    with_dot = {r.kernel for r in rows if r.dot}
    assert with_dot == {
        "attention._attention_forward", "attention._attention_backward_q",
        "attention._attention_backward_kv",
        "gemm_kernels.adaln_linear", "gemm_kernels.linear_add_gelu",
        "gemm_kernels.linear_gate_residual",
    }  # fmt: skip
    wgmma = {r.kernel for r in rows if r.instructions.get("HGMMA")}
    assert wgmma == (with_dot if arch == 90 else set())


@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
def test_the_table_has_all_that_may_be_launched(arch: int) -> None:
    """Without compiling: every kernel with its tile, and none that is gone. Registers may change
    with Triton; a kernel that comes or goes is a change to look at."""
    known = {key for key in gate.committed() if key.arch == arch}
    found = gate.planned(arch)
    advice = "python -m bench.compile_gate --write"
    assert sorted(found - known) == [], f"not in {gate.TABLE.name}: {advice}"
    assert sorted(known - found) == [], f"only in {gate.TABLE.name}: {advice}"
    assert gate.planned(arch, gate.BRIEF) < found


def test_the_table_breaks_no_limit() -> None:
    assert [line for r in gate.committed().values() for line in gate.violations(r)] == []


def test_a_tile_that_is_not_in_the_table_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 256 for a bias, which spill: in both half precisions, anything kept or nothing."""
    tile = gemm_table.Tile(128, 256, 64, 8, 3, tma=True)
    monkeypatch.setitem(gemm_table._HEAVY, ("linear_bias_gelu", 90), (tile,))
    new = gate.planned(90) - set(gate.committed())
    assert {(k.kernel, k.warps, k.stages) for k in new} == {("gemm_kernels.linear_add_gelu", 8, 3)}
    assert len(new) == 4


def test_odd_gemms_compile() -> None:
    """What the interpreter cannot tell: one row is a constant to the compiler, and sizes that no
    block divides take other paths."""

    def odd(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
        b, t, d, o = (1, 1, 17, 40) if residual == dtype else (3, 7, 40, 72)
        if dtype == torch.bfloat16:
            return
        if dtype == torch.float32:
            b, t, d, o = 2, 64, 1000, 48
        x, z = torch.empty(b, t, o, dtype=dtype), torch.empty(b, t, d, dtype=residual)
        g, s, a = torch.empty(b, 6 * d, dtype=dtype).chunk(6, -1)[:3]
        up, down = torch.empty(o, 2 * d, dtype=dtype)[:, d:], torch.empty(d, o, dtype=dtype)
        p, norms = torch.empty_like(z, dtype=dtype), torch.empty(2, b)
        gemm.adaln_linear(z, s, a, up, x[0, 0], p, fused=True)
        gemm.linear_add_gelu(p, up, x, torch.empty_like(x), fused=True)
        gemm.linear_gate_residual(x, down, s[0], z, g, p, None, z, norms, fused=True)

    found = gate.compiled(90, [odd])
    kernels = {"adaln_linear", "linear_add_gelu", "linear_gate_residual", "statistics"}
    assert {r.kernel for r in found} >= {f"gemm_kernels.{n}" for n in kernels}
    assert [line for r in found for line in gate.violations(r) if "stack" in line] == []


@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
def test_the_widest_rows_compile(arch: int) -> None:
    """No model has them; in float32 they hold most."""

    def wide(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
        if dtype == torch.float32:
            y, z, dz = (torch.empty(2, 16, 8192) for _ in range(3))
            adaln.adaln_backward(y, z, z[:, 0], dz, dz[:, 0].clone(), dz[:, 0].clone())

    found = gate.compiled(arch, [wide])
    assert [line for r in found for line in gate.violations(r)] == []


PLANTED = {
    "spilling": {"bytes of stack", "accesses to local memory"},
    "atomic": {"atomics"},
    "greedy": {"bytes of shared memory"},
}


@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
def test_planted_kernels_are_caught(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for what it does and not for what its neighbours in the same listing do."""
    # operands in float32 do not wait in shared memory
    monkeypatch.setattr(gate, "DTYPES", HALVES)
    rows = gate.compiled(arch, [getattr(planted, f"launch_{name}") for name in PLANTED])
    assert len(rows) == len(PLANTED) * len(HALVES)
    every = set().union(*PLANTED.values())
    for r in rows:
        lines = gate.violations(r)
        found = {words for words in every if any(words in line for line in lines)}
        assert found == PLANTED[r.kernel.removeprefix("planted_kernels.")], r


def test_a_listing_with_a_line_that_is_not_understood_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = gate._tool

    def shorter(name: str, *options: str) -> str:
        text = tool(name, *options)
        return text.replace("EXIT", "?", 1) if name == "nvdisasm" else text

    monkeypatch.setattr(gate, "_tool", shorter)
    with pytest.raises(RuntimeError, match="instructions, expected one for each 16 B"):
        gate.compiled(90, [planted.launch_atomic])


def test_a_dot_without_tensor_cores_and_idle_processors_are_caught() -> None:
    good = gate.Resources("m.k", 90, "*fp16", "", 4, 3, 128, 0, 1024, 16, {"HGMMA": 4}, True)
    assert gate.violations(good) == []
    assert "tensor-core" in gate.violations(good._replace(instructions={"FFMA": 9}))[0]
    assert gate.violations(good._replace(types="*fp32", instructions={"FFMA": 9})) == []
    assert "resident warps" in gate.violations(good._replace(resident=4))[0]


def test_a_forgotten_kernel_is_caught() -> None:
    """``helper`` is called by another kernel, so it is none that a launcher must launch."""
    found = gate.compiled(90, [planted.launch_atomic])
    expected = {f"planted_kernels.{n}" for n in ("spilling", "greedy", "forgotten")}
    assert gate.unlaunched([planted], found) == expected
    assert gate.unlaunched([ModuleType("empty")], found) == set()


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "expected"),
    [
        (32, 0, 4, 90, 64),  # the limit of the multiprocessor
        (128, 0, 4, 90, 16),  # 65536 registers / (128 x 32)
        (129, 0, 4, 90, 12),  # given out 256 at a time: 136
        (168, 0, 8, 80, 8),  # 12 by registers, of which a second block of 8 does not fit
        (255, 0, 8, 80, 8),
        (64, 100 * 1024, 4, 90, 8),  # two blocks of 101 KB in 228
        (64, 100 * 1024, 4, 80, 4),  # one in 164
    ],
)
def test_resident_warps(registers: int, shared: int, warps: int, arch: int, expected: int) -> None:
    assert gate.resident_warps(registers, shared, warps, arch) == expected


def test_the_table_is_what_the_command_writes() -> None:
    text = gate.TABLE.read_text()
    fields = [*gate.Resources._fields[:-2], "dot", "tensor"]
    assert all(list(row) == fields for row in json.loads(text))
    assert text.count("\n") == len(json.loads(text)) + 2


def test_nothing_of_the_pretended_device_remains() -> None:
    before = triton.runtime.driver._active
    with gate.recording(90):
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert triton.runtime.driver._active is before
