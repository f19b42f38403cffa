"""Attention of the triton set without a GPU: the choice of a route, routes of others, and how the
kernels are cut. The kernels themselves run in test_triton.py."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import violation
from torch import Tensor

from fpdm import info
from fpdm.kernels import attention_routes as routes
from fpdm.kernels import implementations, reference
from fpdm.kernels.implementations import ImplError
from fpdm.settings import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No request, and nothing remembered from another test."""
    caches = (routes._route, routes.names, routes.entries)
    monkeypatch.setattr(routes, "_REQUESTED", "auto")
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A flash-attn package that records what it is given."""
    given: list[Tensor] = []

    def qkvpacked(qkv: Tensor) -> Tensor:
        given.append(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        p = torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1)
        return (p @ v).transpose(1, 2).contiguous()

    package = ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_qkvpacked_func = qkvpacked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return given


def entry(**changes: Any) -> dict[str, Any]:
    ms = {"triton": 0.06, "sdpa-cudnn": 0.05, "flash-attn": 0.04}
    return {
        "t": 256, "k": 72, "dtype": "bfloat16", "device": "sm_90", "ms": ms, "source": "a file",
    } | changes  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    path = tmp_path / "table.json"
    monkeypatch.setattr(routes, "TABLE", path)

    def write(*entries: dict[str, Any]) -> None:
        path.write_text(json.dumps({"entries": entries}))

    return write


def oracle(qkv: Tensor, heads: int) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).reshape(b, t, width // 3)


def test_committed_table() -> None:
    """Complete; and what it does not say, ours computes."""
    routes.entries()
    assert routes.route(3, 72, HALF, CPU) == (
        "triton",
        "not measured for T=3, K=72, bfloat16 on cpu",
    )


def test_the_fastest_that_can_run(hopper: None, table: Callable[..., None]) -> None:
    table(entry())
    name, why = routes.route(256, 72, HALF, GPU)
    assert name == "sdpa-cudnn"
    assert why == (
        "measured on sm_90: flash-attn 0.04 ms, sdpa-cudnn 0.05 ms, triton 0.06 ms (a file); "
        "flash-attn cannot run: the package flash-attn is not installed"
    )
    for other in ((255, 72, HALF), (256, 64, HALF), (256, 72, torch.float16)):
        assert routes.route(*other, GPU)[0] == "triton"


@pytest.mark.parametrize(
    ("ms", "name"),
    [
        ({"triton": 0.1, "sdpa-cudnn": 0.099}, "triton"),
        ({"triton": 0.1, "sdpa-cudnn": 0.097}, "sdpa-cudnn"),
        ({"triton": 0.12, "sdpa": 0.1, "sdpa-cudnn": 0.099}, "sdpa"),
    ],
)
def test_two_percent_are_noise(
    hopper: None, table: Callable[..., None], ms: dict[str, float], name: str
) -> None:
    """Between routes that are as fast the earlier one: ours, then torch's own choice."""
    table(entry(ms=ms))
    assert routes.route(256, 72, HALF, GPU)[0] == name


def test_an_installed_package_is_chosen(
    hopper: None, table: Callable[..., None], flash: list[Tensor]
) -> None:
    table(entry())
    assert routes.route(256, 72, HALF, GPU)[0] == "flash-attn"


def test_a_device_name_comes_before_its_architecture(
    hopper: None, table: Callable[..., None]
) -> None:
    table(entry(), entry(device="NVIDIA H200", ms={"triton": 0.03, "sdpa-cudnn": 0.05}))
    assert routes.route(256, 72, HALF, GPU)[0] == "triton"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"source": None}, "without"),
        ({"ms": {"sdpa": 0.1}}, "expected triton"),
        ({"ms": {"triton": 0.1, "xformers": 0.05}}, "got triton, xformers"),
    ],
)
def test_a_bad_entry_is_refused(table: Callable[..., None], bad: dict[str, Any], says: str) -> None:
    made = {k: v for k, v in entry(**bad).items() if v is not None}
    table(made)
    with pytest.raises(ImplError, match=says):
        routes.entries()


@pytest.mark.parametrize("name", [n for n in routes.ROUTES if n != "flash-attn"])
def test_a_request_is_met(monkeypatch: pytest.MonkeyPatch, hopper: None, name: str) -> None:
    monkeypatch.setattr(routes, "_REQUESTED", name)
    assert routes.route(256, 72, HALF, GPU) == (name, "FPDM_ATTENTION asks for it")


@pytest.mark.parametrize(
    ("name", "size", "dtype", "device", "reason"),
    [
        ("sdpa-flash", 72, HALF, CPU, "it needs a CUDA device, not cpu"),
        ("sdpa-efficient", 72, HALF, CPU, "it needs a CUDA device, not cpu"),
        ("sdpa-cudnn", 72, torch.float32, GPU, "it takes float16 and bfloat16, not float32"),
        ("sdpa-flash", 12, HALF, GPU, "it needs a head size in multiples of 8, not 12"),
        ("flash-attn", 72, HALF, GPU, "the package flash-attn is not installed"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(
    monkeypatch: pytest.MonkeyPatch, hopper: None,
    name: str, size: int, dtype: torch.dtype, device: torch.device, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(routes, "_REQUESTED", name)
    with pytest.raises(ImplError) as error:
        routes.route(256, size, dtype, device)
    assert str(error.value) == f"FPDM_ATTENTION: got {name}, which cannot run: {reason}"


def test_an_old_device(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for name in routes.ROUTES:
        assert routes.unmet(name, 72, torch.float16, GPU) == "it needs sm_80, not sm_70"
    # whatever csrc/cuda or the reference computes there is told, not a kernel that cannot run
    monkeypatch.setattr(routes.implementations, "choose", lambda impl, device, dtype: "cuda")
    told = ("cuda", "routes need sm_80, not sm_70")
    assert routes.route(256, 72, torch.float16, GPU) == told
    assert info.attention("cuda:0") == "cuda: routes need sm_80, not sm_70"
    monkeypatch.setattr(routes, "_REQUESTED", "sdpa-efficient")
    with pytest.raises(ImplError, match="got sdpa-efficient, which cannot run: it needs sm_80"):
        routes.route(256, 72, torch.float16, GPU)


def test_an_unknown_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_REQUESTED", "xformers")
    with pytest.raises(ImplError, match="FPDM_ATTENTION: got 'xformers', expected auto or one of"):
        routes.route(256, 72, HALF, CPU)


def difference(name: str, dtype: torch.dtype) -> str | None:
    qkv = torch.randn(2, 17, 3 * 144, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((2, 17, 144), float("nan"), dtype=dtype)
    assert routes.run(name, qkv, 2, out) is out
    return violation(out, oracle(qkv, 2), oracle(qkv.double(), 2), dtype)


# torch has a flash kernel for the CPU too
@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "flash-attn"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_routes_of_others(flash: list[Tensor], name: str, dtype: torch.dtype) -> None:
    assert difference(name, dtype) is None


def test_flash_attn_gets_the_packed_tensor_in_place(flash: list[Tensor]) -> None:
    qkv = torch.randn(2, 5, 3 * 48)
    routes.run("flash-attn", qkv, 4, torch.empty(2, 5, 48))
    assert flash[0].shape == (2, 5, 3, 4, 12)
    assert flash[0].data_ptr() == qkv.data_ptr()
    assert flash[0].is_contiguous()


@pytest.mark.parametrize("fault", ["scale", "order", "heads"])
def test_the_contract_bites(
    monkeypatch: pytest.MonkeyPatch, flash: list[Tensor], fault: str
) -> None:
    """A package with another scale, another order of q, k, v, or heads inside (K,H)."""
    package = sys.modules["flash_attn"]
    real = package.flash_attn_qkvpacked_func
    faulty = {
        "scale": lambda x: real(torch.cat([x[:, :, :1] * 1.01, x[:, :, 1:]], 2)),
        "order": lambda x: real(x.flip(2)),
        "heads": lambda x: real(x.transpose(3, 4).reshape(x.shape)),
    }
    monkeypatch.setattr(package, "flash_attn_qkvpacked_func", faulty[fault])
    assert difference("flash-attn", torch.float32) is not None


class TestLauncher:
    """What fpdm.kernels.attention does before a kernel runs."""

    @pytest.fixture(autouse=True)
    def _kernels(self) -> None:
        self.attention = pytest.importorskip("fpdm.kernels.attention")

    def test_the_route_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "_REQUESTED", "sdpa")
        qkv = torch.randn(2, 9, 3 * 24)
        out = torch.full((2, 9, 24), float("nan"))
        assert self.attention.attention(qkv, 2, out=out) is out
        assert violation(out, oracle(qkv, 2), oracle(qkv.double(), 2), torch.float32) is None

    def test_batch_zero_launches_nothing(self) -> None:
        qkv, y = torch.empty(0, 9, 72), torch.empty(0, 9, 24)
        assert self.attention.attention(qkv, 2).shape == y.shape
        assert self.attention.attention_backward(y, qkv, y, 2).shape == qkv.shape

    @pytest.mark.parametrize(
        ("qkv", "heads", "says"),
        [
            (torch.empty(2, 72), 2, "attention: qkv: got 2 dimensions, expected"),
            (torch.empty(2, 3, 72), 5, "attention: heads: got 5, expected a divisor of 24"),
            (torch.empty(2, 3, 73), 2, "attention: qkv: got a width of 73, expected 3D"),
            (torch.empty(2, 3, 72), 0, "attention: heads: got 0"),
            (torch.empty(2, 3, 72).double(), 2, "attention: qkv: got float64"),
            (torch.empty(3, 2, 72).transpose(0, 1), 2, "attention: qkv: got strides"),
            (torch.empty(1, 2**20, 3072, device="meta"), 16, "under 2\\^31"),
        ],
    )
    def test_refusals(self, qkv: Tensor, heads: int, says: str) -> None:
        from fpdm.kernels.launch import LaunchError

        with pytest.raises(LaunchError, match=says):
            self.attention.attention(qkv, heads)

    def test_wider_heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By torch's SDPA, the backward in plain PyTorch, which is told; by ours only to be
        refused."""
        torch.manual_seed(0)
        qkv, dy = torch.randn(2, 5, 3 * 288), torch.randn(2, 5, 288)
        assert routes.route(5, 144, HALF, CPU)[0] == "sdpa"
        y = self.attention.attention(qkv, 2)
        assert violation(y, oracle(qkv, 2), oracle(qkv.double(), 2), torch.float32) is None
        implementations.warn_once.cache_clear()
        implementations.reset_counters()
        with pytest.warns(UserWarning, match="attention_backward: got head size 144, expected at"):
            dqkv = self.attention.attention_backward(dy, qkv, y, 2)
        assert torch.equal(dqkv, reference.attention_backward(dy, qkv, y, 2))
        assert implementations.ran("triton") == "plain PyTorch: attention_backward 1"
        monkeypatch.setattr(routes, "_REQUESTED", "triton")
        with pytest.raises(ImplError, match="got triton, which cannot run: its kernels take heads"):
            self.attention.attention(qkv, 2)

    def test_parts_of_a_head(self) -> None:
        """Powers of two that cover it: 80 columns of work for 72, never 96 or 128."""
        cut = self.attention.parts
        assert cut(72) == {"K": 72, "MAIN": 64, "TAIL": 16}
        assert [cut(k)["MAIN"] + cut(k)["TAIL"] for k in (12, 24, 64, 80)] == [16, 32, 64, 80]
        for k in range(1, 129):
            main, tail = cut(k)["MAIN"], cut(k)["TAIL"]
            assert main + tail >= k
            assert tail < min(main, k)
            assert all(p & (p - 1) == 0 and (p == 0 or p >= 16) for p in (main, tail))
            assert main + tail <= max(16, 2 * k, k + 15)

    @pytest.mark.parametrize("size", [72, 96, 128])
    def test_tiles_cover_the_tokens(self, size: int) -> None:
        """EVEN drops every mask on tokens: it must be true only where no block passes the end."""
        for capability in ((8, 0), (8, 6), (9, 0), (10, 0)):
            for dtype in (torch.float32, torch.float16):
                for t in (1, 7, 16, 17, 32, 64, 96, 255, 256, 257, 1024):
                    found = self.attention.tiles(t, size, dtype, capability)
                    for warps, tile in found.values():
                        assert warps in (4, 8)
                        if tile["EVEN"]:
                            assert t % tile["M"] == 0
                            assert t % tile["N"] == 0

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
    @pytest.mark.parametrize("size", [12, 24, 64, 80])
    def test_every_kind_of_head_compiles(self, size: int) -> None:
        """One part or two, masked columns or none; the gate compiles K = 72, 96 and 128
        at T = 256."""
        gate = pytest.importorskip("bench.compile_gate")
        qkv, y = torch.empty(1, 17, 6 * size, dtype=HALF), torch.empty(1, 17, 2 * size, dtype=HALF)
        with gate.recording(90) as found:
            self.attention.attention(qkv, 2)
            self.attention.attention_backward(y, qkv, y, 2)
        assert len(found) == 3


def test_measured_times_replace_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``python -m bench.attention --write`` enters is what the launcher reads."""
    bench = pytest.importorskip("bench.attention")
    path = tmp_path / "table.json"
    path.write_text('{"entries": []}')
    details = {"batch": 64, "heads": 16, "backward_ms": {}, "missing": {}}
    bench.write([entry(device="cpu", ms={"triton": 2.0, "sdpa": 1.0}) | details], path)
    bench.write([entry(device="cpu", ms={"triton": 1.0, "sdpa": 3.0}) | details], path)
    monkeypatch.setattr(routes, "TABLE", path)
    routes.entries.cache_clear()
    (found,) = routes.entries()
    assert found["ms"] == {"triton": 1.0, "sdpa": 3.0}
    assert set(found) == {"t", "k", "dtype", "device", "ms", "source"}
    # one without ours would end every later use of the table
    with pytest.raises(UserError, match="got no time of triton for bfloat16 T=256"):
        bench.write([entry(device="cpu", ms={"sdpa": 1.0}) | details], path)
    assert json.loads(path.read_text())["entries"] == [found]
