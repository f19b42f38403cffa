"""csrc/cuda compiles for every architecture within its limits; planted faults are refused."""

from __future__ import annotations

import pytest

from bench import cuda_gate
from fpdm.kernels import cuda_compile, cuda_kernels
from fpdm.kernels.cuda_kernels import Kernel

REASON = cuda_gate.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PLANTED = """
#include <elements.cuh>
namespace fpdm {
struct P { float* data; i32 i; };
template <i32 Threads, i32 Bytes>
struct Traits {
    static constexpr i32 threads = Threads;
    static FPDM_CONSTEXPR i32 smem_bytes() { return Bytes; }
};
FPDM_KERNEL void indexed_kernel(const P p) {
    float v[32];
    for (i32 i = 0; i < 32; ++i) v[i * p.i % 32] = p.data[i];
    for (i32 i = 0; i < 32; ++i) p.data[i] = v[p.data[i] > 0.0f ? p.i % 32 : i];
}
FPDM_KERNEL void FPDM_BOUNDS(1024, 1) crowded_kernel(const P p) {
    float v[96];
    FPDM_UNROLL
    for (i32 i = 0; i < 96; ++i) v[i] = p.data[i * p.i + thread_x()];
    sync_block();
    FPDM_UNROLL
    for (i32 i = 0; i < 96; ++i) p.data[(95 - i) * p.i + thread_x()] = v[i] * v[(i + 7) % 96];
}
FPDM_KERNEL void plain_kernel(const P p) { p.data[thread_x()] = float(p.i); }
FPDM_KERNEL void product_kernel(const P p) {
    float c[8] = {};
    mma884(c, Pack8{u32(p.i), 0}, Pack8{1, u32(p.i)});
    p.data[thread_x()] = c[0] + c[7];
}
}
"""


def violations(name: str, traits: str, source: str = "planted", arch: str = "sm_70") -> list[str]:
    kernel = Kernel(source, name, traits, "P")
    included = {**cuda_compile.headers(), f"{source}.cuh": PLANTED}
    rows = cuda_gate.measure(source, arch, [kernel], included)
    return cuda_gate.violations({arch: rows}, [kernel])


def test_a_plain_kernel_passes() -> None:
    assert violations("plain_kernel", "Traits<128, 0>") == []


def test_planted_stack_is_refused() -> None:
    lines = violations("indexed_kernel", "Traits<32, 0>")
    assert any("bytes of stack, expected none" in line for line in lines)


def test_planted_spill_is_refused() -> None:
    lines = violations("crowded_kernel", "Traits<1024, 0>")
    assert any("LDL and STL, expected none" in line for line in lines)


def test_planted_shared_memory_is_refused() -> None:
    lines = violations("plain_kernel", "Traits<512, 100 * 1024>")
    assert any("got 102400 bytes of shared memory, expected 96 KB at most" in s for s in lines)
    lines = violations("plain_kernel", "Traits<512, 65 * 1024>", arch="sm_75")
    assert lines == ["sm_75 plain_kernel: got 66560 bytes of shared memory, expected 65536"]


def test_planted_occupancy_is_refused() -> None:
    lines = violations("plain_kernel", "Traits<128, 64 * 1024>")
    assert lines == ["sm_70 plain_kernel: got 4 resident warps, expected 16"]


def test_tensor_cores_where_they_belong() -> None:
    assert violations("product_kernel", "Traits<256, 0>", "attention") == []
    lines = violations("plain_kernel", "Traits<256, 0>", "attention")
    assert lines == ["sm_70 plain_kernel: got 0 mma"]


def test_resident_warps_are_the_occupancy_calculator_s() -> None:
    warps = cuda_gate.resident_warps
    assert warps("sm_70", 32, 256, 0) == 64
    assert warps("sm_70", 255, 256, 0) == 8
    assert warps("sm_70", 128, 128, 0) == 16
    assert warps("sm_70", 64, 160, 512) == 30
    assert warps("sm_70", 40, 64, 33 * 1024) == 4
    assert warps("sm_90", 40, 64, 33 * 1024) == 12


def test_every_kernel_on_volta() -> None:
    """And the committed table is of these sources, so what it says of the others holds too."""
    table = cuda_gate.measure_all(["sm_70"])
    assert cuda_gate.violations(table) == []
    assert set(table["sm_70"]) == {kernel.name for kernel in cuda_kernels.KERNELS}
    heading, committed = cuda_gate.committed()
    rewrite = "python -m bench.cuda_gate --write"
    assert heading["sources"] == cuda_compile.source_hash(), rewrite
    assert committed["sm_70"] == table["sm_70"], rewrite
    assert cuda_gate.violations(committed) == []


@pytest.mark.slow
def test_every_kernel_everywhere() -> None:
    table = cuda_gate.measure_all()
    assert cuda_gate.violations(table) == []
    assert cuda_gate.committed()[1] == table
