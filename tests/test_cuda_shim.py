"""csrc/cuda on the CPU: the operator cases, every instantiation, races, bounds, coverage."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shim
import torch
from contract import violation
from operator_cases import CAP, Case, execute, fixed, generate, run_case, values_of
from operator_specs import attended, infinite_key
from torch import Tensor

from fpdm.kernels import cuda, cuda_compile, cuda_kernels, implementations, reference
from fpdm.kernels.cuda_kernels import Kernel
from fpdm.kernels.launch import LaunchError

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="needs g++ to build the shim")
HALF, FLOAT = torch.float16, torch.float32
DTYPES = (FLOAT, HALF)
FAULTS = {
    "no_sync_block": "race: read and write of shared word 1 (byte 4), thread 0 and thread 1",
    "no_sync_warp": "race: write and read of shared word",
    "read_then_write": "race: read and write of shared word 5 (byte 20), several threads and",
    "shared_bounds": "shared memory: 4 bytes at byte 256, expected within 256",
    "shared_alignment": "shared memory: 8 bytes at byte 4, misaligned",
    "red_zone": "red zone of the shared memory (256 bytes) was written at byte 263",
    "divergence": "divergence: thread 0 waits at shuffle, thread 3 at sync_warp",
    "lost_lanes": "divergence: thread 0 waits at shuffle, other lanes have ended",
    "global_bounds": "global memory: read of 4 bytes",
    "global_alignment": "global memory: 8 bytes",
    "global_race": "race: write of global memory",
    "too_large": "dynamic shared memory: 102400 bytes, expected at most 98304",
}
CONTROLS = ("none", "warp_order", "early_exit", "unwritten")


def planted(fault: str) -> Kernel:
    arguments = f"<Fault::{fault}>"
    return Kernel("planted", f"planted_kernel{arguments}", f"PlantedTraits{arguments}", "Planted")


def product(rows: str) -> Kernel:
    return Kernel("planted", f"product_kernel<{rows}>", "ProductTraits", "Product")


PLANTED = [*(planted(f) for f in (*FAULTS, *CONTROLS)), product("true"), product("false")]


@pytest.fixture(scope="module")
def backend() -> shim.Shim:
    return shim.Shim()


@pytest.fixture
def ours(backend: shim.Shim, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The operator set, on the CPU."""
    monkeypatch.setattr(cuda, "_backend", backend)
    yield cuda
    backend.reverse = False


def test_operator_cases(ours: Any) -> None:
    cases = [*generate(320, DTYPES, CAP), *fixed(DTYPES)]
    assert [line for case in cases for line in run_case(ours, case)] == []


def sweep() -> list[Case]:
    """What the operator cases leave out, so that every instantiation runs: widths that allow no
    16-byte accesses, wide blocks, all head sizes, heads enough for the large blocks."""
    rows = ("adaln", "gate_residual_adaln", "adaln_backward")
    other = ("gate_residual", "gate_residual_backward")
    found = []
    for dtype, residual in ((HALF, HALF), (HALF, FLOAT), (FLOAT, FLOAT)):
        for op, d, variant in (
            *((op, d, 0) for op in rows for d in (50, 96, 1290, 1296)),
            *((op, d, 0) for op in other for d in (50, 96)),
            *(("gate_residual", d, 1) for d in (50, 1296)),
        ):
            found.append(Case(op, dtype, 2, 3, d, 1, residual=residual, variant=variant))
        # 3 tokens leave a part of a block's rows without work: a gate of Inf must not reach it
        gate = Case("gate_residual", dtype, 2, 3, 48, residual=residual, variant=1)
        found.append(replace(gate, extreme="-inf", where="gate"))
    for dtype in DTYPES:
        for op in ("gelu", "gelu_backward", "linear_add_gelu"):
            found += [Case(op, dtype, 1, 3, d, 1) for d in (50, 48)]
        for op in ("attention", "attention_backward"):
            found += [Case(op, dtype, 1, 33, 2 * k, 2) for k in cuda_kernels.HEAD_SIZES]
            found += [Case(op, dtype, 20, 3, 4 * k, 4) for k in cuda_kernels.LARGE_HEADS]
    return found


def test_every_instantiation(ours: Any, backend: shim.Shim) -> None:
    backend.launches.clear()
    assert [line for case in sweep() for line in run_case(ours, case)] == []
    assert set(backend.launches) == {kernel.name for kernel in cuda_kernels.KERNELS}


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes_without_a_kernel_run_in_plain_pytorch(
    ours: Any, backend: shim.Shim, dtype: torch.dtype
) -> None:
    """A model that a CPU trains must sample on a V100: a warning says what runs."""
    implementations.warn_once.cache_clear()
    backend.launches.clear()
    torch.manual_seed(0)
    qkv, dy = torch.randn(2, 5, 3 * 40).to(dtype), torch.randn(2, 5, 40).to(dtype)
    with pytest.warns(UserWarning, match=r"attention: got head size 20, expected one of 12, 16"):
        y = ours.attention(qkv, 2)
    assert torch.equal(y, reference.attention(qkv, 2))
    with pytest.warns(UserWarning, match=r"attention_backward: got head size 20"):
        dqkv = ours.attention_backward(dy, qkv, y, 2)
    assert torch.equal(dqkv, reference.attention_backward(dy, qkv, y, 2))
    assert not backend.launches
    with pytest.raises(LaunchError, match="attention: qkv: got width 120, expected a multiple of"):
        ours.attention(qkv, 7)


def test_order_does_not_matter(ours: Any, backend: shim.Shim) -> None:
    """Last blocks and warps first: the same bits. So nothing depends on who comes first."""
    for case in (c for c in generate(80, DTYPES, 2**13, seed=5) if not c.extreme):
        values = values_of(case)
        if case.op == "attention_backward":
            values["y"] = torch.zeros(case.b, case.t, case.d, dtype=case.dtype)
        first, _ = execute(ours, case, values)
        backend.reverse = True
        second, _ = execute(ours, case, values)
        backend.reverse = False
        assert all(torch.equal(first[name], second[name]) for name in first), case


def test_large_blocks_are_bitwise_small_ones(
    ours: Any, backend: shim.Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which blocks are taken depends on batch and device; the numbers must not."""
    monkeypatch.setattr(cuda, "MULTIPROCESSORS", 1)
    for op in ("attention", "attention_backward"):
        case = Case(op, HALF, 2, 300, 72, 1)
        values = values_of(case) | {"y": torch.zeros(2, 300, 72, dtype=HALF)}
        backend.launches.clear()
        large, _ = execute(ours, case, values)
        assert all("8, 256" in name for name in backend.launches)
        backend.launches.clear()
        with monkeypatch.context() as turing:
            turing.setattr(backend, "limit", 64 * 1024)
            small, _ = execute(ours, case, values)
        assert all("2, 64" in name for name in backend.launches)
        assert torch.equal(small["out"], large["out"])


@pytest.mark.parametrize(("t", "larger"), [(256, 20.0), (1024, 20.0), (1024, 200.0)])
def test_uneven_gradients_cost_no_bits(ours: Any, t: int, larger: float) -> None:
    """One query's dy is larger than all others': the contract without what y's rounding allows."""
    case = Case("attention_backward", HALF, 1, t, 72)
    values = values_of(case)
    values["dy"][0, 5] *= larger
    found, _ = execute(ours, case, values)
    with torch.enable_grad():
        low, oracle = (
            case.spec.plain({n: x.to(d) for n, x in values.items()}, 1)["out"]
            for d in (HALF, torch.float64)
        )
    for name, *same in zip("qkv", *(x.chunk(3, -1) for x in (found["out"], low, oracle))):
        assert violation(*same, HALF) is None, f"d{name}"


def test_no_finite_product_overflows(ours: Any) -> None:
    """dS up to 2 |dy| max|v|, where no score is larger than any other."""
    case = Case("attention_backward", HALF, 1, 64, 72)
    qkv, dy = torch.zeros(1, 64, 216, dtype=HALF), torch.zeros(1, 64, 72, dtype=HALF)
    qkv[..., 72:144] = values_of(case)["qkv"][..., 72:144]
    qkv[..., 150], dy[..., 6] = -65504.0, 1.9
    qkv[0, 3, 150] = 65504.0
    y = attended(qkv.float(), 1).half()
    found = ours.attention_backward(dy, qkv, y, 1).double()
    with torch.enable_grad():
        plain = case.spec.plain({"qkv": qkv.double(), "dy": dy.double()}, 1)["out"]
    assert found.isfinite().all()
    assert (found - plain).norm() < 1e-3 * plain.norm()


def test_an_infinite_key(ours: Any) -> None:
    assert infinite_key(ours, DTYPES) == []


def test_refuses_what_no_kernel_takes(ours: Any) -> None:
    wide = torch.zeros(1, 1, 4104)
    with pytest.raises(LaunchError, match="got D = 4104, expected at most 4096"):
        ours.adaln(wide, wide[0], wide[0])
    with pytest.raises(LaunchError, match="got bfloat16, expected float16 or float32"):
        ours.gelu(wide.bfloat16())
    shifted = torch.zeros(3 * 64 + 1, dtype=HALF)[1:].view(1, 1, 192)
    with pytest.raises(LaunchError, match="alignment to 16 bytes"):
        ours.attention(shifted, 1)


@pytest.fixture(scope="module", params=["asm", "ucontext"])
def small(request: pytest.FixtureRequest) -> Iterator[shim.Shim]:
    """The planted kernels, with both ways of switching stacks."""
    flags = ["-DSHIM_UCONTEXT"] if request.param == "ucontext" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cuda_kernels.FORMATS, "Planted", "PP")
        patch.setitem(cuda_kernels.FORMATS, "Product", "PPP")
        yield shim.Shim(PLANTED, shim.build(PLANTED, flags=flags))


def launch(small: shim.Shim, fault: str) -> Tensor:
    numbers, out = torch.arange(64.0), torch.zeros(64)
    small.launch(planted(fault), (1, 1), 64, (numbers, out), numbers.device)
    return out


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(small: shim.Shim, fault: str) -> None:
    with pytest.raises(shim.ShimError) as caught:
        launch(small, fault)
    assert FAULTS[fault] in str(caught.value)


def test_controls_pass(small: shim.Shim) -> None:
    numbers = torch.arange(64.0)
    assert torch.equal(launch(small, "none"), numbers.roll(-1))
    assert torch.equal(launch(small, "warp_order"), numbers.view(32, 2).flip(1).flatten())
    assert torch.equal(launch(small, "early_exit"), torch.where(numbers < 32, numbers, 0.0))
    assert launch(small, "unwritten").isnan().all()


@pytest.mark.parametrize("rows", [False, True])
def test_product_has_the_lane_map_of_the_manual(small: shim.Shim, rows: bool) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 8, (32, 4), generator=g).half() for _ in range(2))
    c = torch.randint(-8, 8, (32, 8), generator=g).float()
    want = torch.zeros(32, 8)
    lanes = torch.arange(32)
    upper = (lanes >= 16).long() * 4
    for quad in range(4):
        own = ((lanes % 16) // 4 == quad).nonzero().flatten()
        left, right, sums = torch.zeros(8, 4), torch.zeros(4, 8), torch.zeros(8, 8)
        for lane in own.tolist():
            up = int(upper[lane])
            left[lane % 4 + up] = a[lane].float()
            if rows:
                right[lane % 4, up : up + 4] = b[lane].float()
            else:
                right[:, lane % 4 + up] = b[lane].float()
        position = {}
        for lane in own.tolist():
            for i in range(8):
                row = (lane & 1) + (i & 2) + int(upper[lane])
                column = (i & 4) + (lane & 2) + (i & 1)
                position[row, column] = (lane, i)
                sums[row, column] = c[lane, i]
        assert len(position) == 64
        for (row, column), (lane, i) in position.items():
            want[lane, i] = (sums + left @ right)[row, column]
    kernel = product("true" if rows else "false")
    small.launch(kernel, (1, 1), 32, (a, b, c), c.device)
    assert torch.equal(c, want)


def test_race_planted_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier of block_sum taken out of the real header."""
    headers = tmp_path / "cuda"
    shutil.copytree(cuda_compile.source_directory(), headers)
    text = (headers / "columns.cuh").read_text()
    assert text.count("sync_block();") == 1
    (headers / "columns.cuh").write_text(text.replace("sync_block();", ""))
    kernel = cuda_kernels.adaln("float", "float", "NARROW", True, False)
    other = cuda_kernels.adaln_backward("float", "float", "NARROW", True)
    library = shim.build([kernel, other], folder=tmp_path, headers=headers)
    monkeypatch.setattr(cuda, "_backend", shim.Shim([kernel, other], library))
    case = Case("adaln", FLOAT, 1, 3, 384, 1)
    with pytest.raises(shim.ShimError, match=r"race: write and read of shared word \d+"):
        run_case(cuda, case)


def test_parameter_structs_have_the_launchers_layout() -> None:
    """The format beside each struct is the one that is packed."""
    found = {}
    for text in cuda_compile.headers().values():
        for line in text.splitlines():
            if line.startswith("struct ") and "Params" in line:
                name, form = line.split()[1], line.split('"')[1]
                found[name] = form
    formats = cuda_kernels.FORMATS
    assert found == {name: formats[name] for name in formats if name.endswith("Params")}


def coverage(backend: shim.Shim, folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """(lines of csrc/cuda with code, those that have not run)."""
    backend.lib.shim_dump_coverage()
    data = next(folder.glob("*registry.gcda"))
    command = ["gcov", "--json-format", "--stdout", str(data)]
    report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    lines: dict[tuple[str, int], bool] = {}
    for file in json.loads(report.stdout)["files"]:
        path = Path(file["file"])
        if path.parent.name == "cuda" and path.suffix == ".cuh":
            for line in file["lines"]:
                key = (path.name, line["line_number"])
                lines[key] = lines.get(key, False) or line["count"] > 0
    return len(lines), sorted(key for key, ran in lines.items() if not ran)


@pytest.mark.slow
def test_line_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 95 % of the lines of csrc/cuda; the header that is replaced here has none."""
    flags = ["--coverage", "-O1", "-DSHIM_COVERAGE"]
    backend = shim.Shim(library=shim.build(cuda_kernels.KERNELS, folder=tmp_path, flags=flags))
    monkeypatch.setattr(cuda, "_backend", backend)
    run_case(cuda, Case("gelu", FLOAT, 1, 3, 48, 1))
    lines, missed = coverage(backend, tmp_path)
    assert lines > 300
    assert len(missed) > 0.5 * lines
    for case in (*sweep(), *generate(160, DTYPES, 2**13), *fixed(DTYPES)):
        run_case(cuda, case)
    lines, missed = coverage(backend, tmp_path)
    print(f"{len(missed)} of {lines} lines have not run: {missed}")
    assert len(missed) <= 0.05 * lines, missed
