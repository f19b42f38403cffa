"""csrc/cuda on a GPU against the float64 oracle: machine code for the device, and the PTX of sm_70.

A newer GPU emulates mma.m8n8k4: the numbers count, the times mean nothing. The PTX needs NVRTC 12.9
or earlier; a machine with a later one takes it from a folder that was made elsewhere,

    python -c "from fpdm.kernels.cuda_compile import build_cubins as b; b('ptx', ['compute_70'])"

which FPDM_PTX names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from on_device import OnDevice
from operator_cases import CAP, fixed, generate, run_case
from operator_specs import infinite_key
from test_cuda_shim import DTYPES, HALF, sweep

from fpdm.kernels import cuda, cuda_compile, reference
from fpdm.kernels.cuda_compile import Binary
from fpdm.kernels.cuda_driver import Driver

pytestmark = pytest.mark.gpu


def volta(source: str, capability: tuple[int, int]) -> Binary:
    """PTX for compute_70, which the driver translates."""
    folder = os.environ.get("FPDM_PTX")
    if folder is not None:
        return cuda_compile.read(Path(folder), source, "compute_70")
    return cuda_compile.build(source, "compute_70")


@pytest.fixture(scope="module", params=["native", "sm_70 PTX"])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "native":
        return Driver()
    if "FPDM_PTX" not in os.environ and cuda_compile.compiler_version() >= "13":
        pytest.skip("needs FPDM_PTX, or NVRTC 12: 13 does not know sm_70")
    return Driver(volta)


@pytest.fixture
def ours(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    monkeypatch.setattr(cuda, "_backend", driver)
    return OnDevice(cuda)


CASES = [*generate(320, DTYPES, CAP), *fixed(DTYPES), *sweep()]


@pytest.mark.parametrize("op", sorted({c.op for c in CASES}))
def test_operator_cases(ours: OnDevice, op: str) -> None:
    found = [line for case in CASES if case.op == op for line in run_case(ours, case)]
    assert found == []


def test_an_infinite_key(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_backend", driver)
    assert infinite_key(cuda, DTYPES, "cuda") == []


def test_repeats_are_bitwise_equal(ours: OnDevice) -> None:
    qkv = torch.randn(2, 256, 3 * 1152, device="cuda", dtype=HALF)
    dy = torch.randn(2, 256, 1152, device="cuda", dtype=HALF)
    y = cuda.attention(qkv, 16)
    dqkv = cuda.attention_backward(dy, qkv, y, 16)
    for _ in range(300):
        assert torch.equal(cuda.attention(qkv, 16), y)
        assert torch.equal(cuda.attention_backward(dy, qkv, y, 16), dqkv)


def test_graph_replays(ours: OnDevice, driver: Driver) -> None:
    driver.prepare(torch.device("cuda"))
    z = torch.randn(2, 64, 384, device="cuda")
    vectors = torch.randn(2, 6 * 384, device="cuda").chunk(6, -1)
    out = torch.empty_like(z)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.adaln(z, vectors[0], vectors[1], out=out)
    z.normal_()
    graph.replay()
    want = reference.adaln(z.double(), vectors[0].double(), vectors[1].double())
    assert (out - want).abs().max() < 1e-5 * want.abs().max()


def test_a_load_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_backend", Driver())
    x = torch.randn(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(cuda.LaunchError, match="inside a capture"), torch.cuda.graph(graph):
        cuda.gelu(x)
