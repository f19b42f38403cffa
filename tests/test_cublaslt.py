"""cuBLASLt past torch without a GPU: a library in memory that reads what it is told and computes by
it, so that a wrong layout, leading dimension, epilogue or pointer is a wrong result."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpdm.kernels import cublaslt, gemm_table, reference
from fpdm.kernels.launch import LaunchError


class Library:
    """The functions that are called, on float32 matrices in the host's memory."""

    def __init__(self) -> None:
        self.objects: dict[int, dict[Any, Any]] = {}
        self.listed, self.status, self.calls = 3, 0, [0]
        self.searches: list[dict[Any, Any]] = []

    def _new(self, made: Any, **facts: Any) -> int:
        made._obj.value = len(self.objects) + 1
        self.objects[made._obj.value] = facts
        return 0

    def cublasLtCreate(self, made: Any) -> int:
        return self._new(made)

    def cublasLtMatmulDescCreate(self, made: Any, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)
        return self._new(made)

    def cublasLtMatrixLayoutCreate(
        self, made: Any, kind: int, rows: Any, cols: Any, apart: Any
    ) -> int:
        assert kind == 0
        return self._new(made, rows=rows.value, cols=cols.value, apart=apart.value)

    def cublasLtGetStatusString(self, status: int) -> bytes:
        return b"no such thing"

    def cublasLtMatmulPreferenceCreate(self, made: Any) -> int:
        return self._new(made)

    def _set(self, thing: Any, attribute: int, value: Any, size: int) -> int:
        assert size == ctypes.sizeof(value._obj)
        self.objects[thing.value][attribute] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set

    def cublasLtMatmulPreferenceDestroy(self, thing: Any) -> int:
        self.searches.append(self.objects[thing.value])
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *args: Any) -> int:
        *_, wanted, found, count = args
        count._obj.value = min(wanted, self.listed)
        for i in range(count._obj.value):
            found[i].algorithm[0] = i
        return 0

    def cublasLtMatmul(
        self, handle: Any, description: Any, alpha: Any, a: int, a_like: Any, b: int, b_like: Any,
        beta: Any, c: int, c_like: Any, d: int, d_like: Any, algorithm: Any, workspace: Any,
        size: int, stream: int,
    ) -> int:  # fmt: skip
        told = self.objects[description.value]
        assert told[cublaslt.TRANSPOSE_A] == 1
        assert (workspace, size) == (None, 0)
        self.calls.append(algorithm._obj[0])
        product = self._matrix(a, a_like).T @ self._matrix(b, b_like)
        total = alpha._obj.value * product
        if beta._obj.value:
            total += beta._obj.value * self._matrix(c, c_like)
        epilogue = told[cublaslt.EPILOGUE]
        if epilogue & 4:
            bias = told[cublaslt.BIAS_POINTER]
            total += self._matrix(bias, None, (len(total), 1, len(total)))
        if epilogue & 32:
            inner = np.sqrt(2 / np.pi) * (total + 0.044715 * total**3)
            total = 0.5 * total * (1 + np.tanh(inner))
        self._matrix(d, d_like)[:] = total
        return self.status

    def _matrix(self, address: int, like: Any, shape: Any = None) -> Any:
        facts = self.objects[like.value] if shape is None else None
        rows, cols, apart = facts.values() if facts else shape
        flat = (ctypes.c_float * (apart * (cols - 1) + rows)).from_address(address)
        memory = np.ctypeslib.as_array(flat)
        return np.lib.stride_tricks.as_strided(memory, (rows, cols), (4, 4 * apart))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    monkeypatch.setattr(cublaslt, "library", lambda: found)
    caches = cublaslt._handle, cublaslt._product, cublaslt.warn_once
    for cached in caches:
        cached.cache_clear()
    yield found
    for cached in caches:
        cached.cache_clear()


def operands(addend: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (2,3,8), weight (12,8) as a column slice of a wider one, u."""
    g = torch.Generator().manual_seed(0)
    x, wide = torch.randn(2, 3, 8, generator=g), torch.randn(12, 16, generator=g)
    shape = {"bias": (12,), "tensor": (2, 3, 12)}.get(addend or "")
    return x, wide[:, :8], None if shape is None else torch.randn(shape, generator=g)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("addend", [None, "bias", "tensor"])
def test_products(library: Library, addend: str | None, gelu: bool) -> None:
    x, weight, u = operands(addend)
    out = torch.full((2, 3, 12), torch.nan)
    y = cublaslt.linear(x, weight, u, out, gelu, algorithm=2)
    expected = x.double() @ weight.double().t() + (0 if u is None else u.double())
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    assert y is out
    assert torch.allclose(y.double(), expected, atol=1e-5)
    assert library.calls[-1] == 2
    # no workspace, which the library would clear before every product; 16 bytes are promised
    assert library.searches == [{1: 0, 5: 16, 6: 16, 7: 16, 8: 16}]
    # the same plan with another bias
    if addend == "bias":
        assert u is not None
        cublaslt.linear(x, weight, u + 1, out, gelu, algorithm=2)
        assert len(library.searches) == 1
        assert not torch.allclose(out.double(), expected, atol=0.1)


def test_a_wrong_leading_dimension_is_a_wrong_result(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library in memory believes what it is told."""
    x, weight, _ = operands(None)
    product = cublaslt._product
    monkeypatch.setattr(cublaslt, "_product", lambda m, n, k, _, *rest: product(m, n, k, k, *rest))
    wrong = cublaslt.linear(x, weight, None)
    assert not torch.allclose(wrong, x @ weight.t(), atol=1e-3)


def test_nothing_to_do(library: Library) -> None:
    x, weight, _ = operands(None)
    assert cublaslt.linear(x[:0], weight, None).shape == (0, 3, 12)
    assert library.calls == [0]


def test_errors(library: Library) -> None:
    x, weight, _ = operands(None)
    # a shorter list than that of the measurement
    cublaslt.linear(x, weight, None, algorithm=3)
    assert library.calls == [0, 2]
    library.status = 13
    with pytest.raises(
        LaunchError, match=r"cublasLtMatmul: got status 13, no such thing, expected 0"
    ):
        cublaslt.linear(x, weight, None)
    library.listed = 0
    with pytest.raises(LaunchError, match=r"cublasLt: got no algorithm for 3 x 12 x 8"):
        cublaslt.linear(x[:1], weight, None)


@pytest.mark.parametrize("gelu", [False, True])
def test_torch_does_what_the_library_refuses(
    library: Library, tabled: None, monkeypatch: pytest.MonkeyPatch, gelu: bool
) -> None:
    """Without an algorithm, and at the launch: told once, and the product is there."""
    gemm = pytest.importorskip("fpdm.kernels.gemm")
    monkeypatch.setattr(cublaslt, "version", lambda: 130100)
    x, weight, u = operands("bias")
    expected = x @ weight.t() + u
    if gelu:
        # its glue is Triton's
        monkeypatch.setattr(gemm.mlp, "linear_add_gelu", lambda *a, **_: reference.linear(*a[:3]))
    call = gemm.linear_add_gelu if gelu else gemm.linear
    library.listed, made = 0, len(library.searches)
    with pytest.warns(UserWarning, match=r"no algorithm for 6 x 12 x 8.*torch's own"):
        assert torch.allclose(call(x, weight, u), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(call(x, weight, u), expected, atol=1e-5)
    assert len(library.searches) == made + 1
    # and nothing of a call is kept
    gone, kept = weakref.ref(x), x.clone()
    del x
    assert gone() is None
    x = kept
    cublaslt._product.cache_clear()
    library.listed, library.status = 3, 15
    with pytest.warns(UserWarning, match=r"status 15, no such thing.*torch's own"):
        assert torch.allclose(call(x, weight, u), expected, atol=1e-5)
    # what is wrong with the operands is no refusal
    with pytest.raises(LaunchError, match="out: got"):
        call(x, weight, u, *[torch.empty(5, 12)] * (2 if gelu else 1))


def test_operands_that_would_be_read_or_written_outside(library: Library) -> None:
    x, weight, u = operands("tensor")
    assert u is not None
    out, wide = torch.empty(2, 3, 12), torch.zeros(2, 3, 12)
    for args, words in (
        ((x, weight, u[:1], out), "addend: got"), ((x, weight, u, out[:1]), "out: got"),
        ((x[..., :4].contiguous(), weight, u, out), "x: got"), ((x, weight, u, u), "out: got"),
        ((wide.view(-1)[:48].view(2, 3, 8), weight, u, wide), "out: got"),
    ):  # fmt: skip
        with pytest.raises(LaunchError, match=f"linear: {words}"):
            cublaslt.linear(*args)
    assert library.calls == [0]


def test_operands_that_do_not_fit() -> None:
    x, weight, u = operands("tensor")
    assert u is not None
    assert cublaslt.fits(x, weight, u, None)
    odd = torch.randn(2 * 3 * 8 + 1)[1:].view(2, 3, 8)
    for wrong in (
        (odd, weight, u, None), (x.transpose(0, 1), weight, u, None), (x, weight.half(), u, None),
        (x, weight.t(), u, None), (x, weight, u.transpose(0, 1), None),
        (x, weight, u, torch.empty(2, 3, 12, dtype=torch.bfloat16)),
    ):  # fmt: skip
        assert not cublaslt.fits(*wrong)


ENTRY = {
    "op": "linear", "keep": False, "m": [1, 9], "n": 12, "k": 8, "dtype": "float32",
    "device": "cpu", "route": "cublaslt", "algorithm": 2, "cublas": 130100, "at": 6,
    "ms": {"library": 0.2, "cublaslt": 0.1}, "source": "here",
}  # fmt: skip


@pytest.fixture
def tabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gelu = ENTRY | {"op": "linear_bias_gelu"}
    monkeypatch.setattr(gemm_table, "entries", lambda: (ENTRY, gelu))
    gemm_table._choice.cache_clear()
    yield
    gemm_table._choice.cache_clear()


def choice(op: str = "linear", m: int = 6) -> tuple[str, int]:
    gemm_table._choice.cache_clear()
    found = gemm_table.choice(op, m, 12, 8, torch.float32, "cpu", False)
    assert "measured on cpu" in found.reason
    return found.route, found.algorithm


def test_an_algorithm_is_one_version_s_and_size_s(
    tabled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another list begins with another algorithm: GELU's epilogue gains by any, a product alone
    does not; and no library is no route."""
    monkeypatch.setattr(cublaslt, "version", lambda: 130100)
    assert choice() == choice("linear_bias_gelu") == ("cublaslt", 2)
    assert choice(m=7) == ("library", 0)
    assert choice("linear_bias_gelu", 7) == ("cublaslt", 0)
    monkeypatch.setattr(cublaslt, "version", lambda: 120900)
    assert choice() == ("library", 0)
    assert choice("linear_bias_gelu") == ("cublaslt", 0)
    monkeypatch.setattr(cublaslt, "version", lambda: None)
    assert choice() == choice("linear_bias_gelu") == ("library", 0)


def test_the_table_decides(library: Library, tabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = pytest.importorskip("fpdm.kernels.gemm")
    monkeypatch.setattr(cublaslt, "version", lambda: 130100)
    x, weight, u = operands("bias")
    expected = x @ weight.t() + u
    assert torch.allclose(gemm.linear(x, weight, u), expected, atol=1e-5)
    assert library.calls == [0, 2]
    gemm.linear_add_gelu(x, weight, u)
    assert library.calls == [0, 2, 2]
    # kept, for a backward
    pre = torch.empty_like(expected)
    monkeypatch.setattr(gemm.mlp, "linear_add_gelu", lambda *args, **kwargs: "library")
    assert gemm.linear_add_gelu(x, weight, u, pre, torch.empty_like(pre)) == "library"
    # torch takes what does not fit
    assert torch.allclose(gemm.linear(x.transpose(0, 1), weight, u), expected.transpose(0, 1))
    assert library.calls == [0, 2, 2]


def test_without_a_library() -> None:
    if torch.version.cuda is not None:
        pytest.skip(f"torch has CUDA {torch.version.cuda}")
    cublaslt.library.cache_clear()
    cublaslt.version.cache_clear()
    assert cublaslt.version() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("addend", [None, "bias", "tensor"])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "shape", [(512, 1152, 384), (512, 1152, 4608), (4096, 2304, 1152)], ids=str
)
def test_products_on_a_gpu(
    shape: tuple[int, int, int], gelu: bool, addend: str | None, dtype: torch.dtype
) -> None:
    """Launched and replayed, by each of the first algorithms; nothing beside the result written."""
    from fpdm.graphs import CudaBackend

    torch.manual_seed(0)
    m, n, k = shape
    x = torch.randn(2, m // 2, k, device="cuda", dtype=dtype)
    weight = torch.randn(n, 2 * k, device="cuda", dtype=dtype)[:, :k].mul_(k**-0.5)
    wanted = {"bias": (n,), "tensor": (2, m // 2, n)}.get(addend or "")
    u = None if wanted is None else torch.randn(wanted, device="cuda", dtype=dtype)
    expected = x.double() @ weight.double().t() + (0 if u is None else u.double())
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    red = torch.full((3, 2, m // 2, n), torch.nan, device="cuda", dtype=dtype)
    eps = torch.finfo(dtype).eps
    for algorithm in range(cublaslt.ALGORITHMS):
        for mode in ("launched", "replayed"):
            red.fill_(torch.nan)

            def work(algorithm: int = algorithm) -> None:
                assert cublaslt.fits(x, weight, u, red[1])
                cublaslt.linear(x, weight, u, red[1], gelu, algorithm)

            if mode == "replayed":
                CudaBackend(torch.device("cuda")).capture(work).replay()
            else:
                work()
            error = (red[1].double() - expected).abs()
            assert (error <= 2 * eps * (1 + expected.abs())).all()
            assert red[0].isnan().all()
            assert red[2].isnan().all()
