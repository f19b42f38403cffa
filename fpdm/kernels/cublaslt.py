"""Products with the epilogues of cuBLASLt that torch does not reach: y = f(x W^T + u).

u is a bias (N,), a tensor (M,N) or nothing, f the identity or tanh GELU of the float32 sum.

Two things differ from torch's own calls into the same library. An addend of y's shape goes in as C
with beta = 1, so that GELU needs no pass of its own. And the library lists algorithms for a shape,
likeliest first: which of them is best is measured (``python -m bench.gemm``) and held by
fpdm.kernels.gemm_table together with the library's version, which the list belongs to. The library
is offered no workspace: these products were no faster with one.

GELU is applied to the float32 sum, not to a stored pre-activation, so it is used only where none is
kept: in the loop without gradient, and in a forward that will be recomputed. Those differ from an
iteration that keeps it by that one rounding. cuBLAS is column-major and computes y^T (N,M) = W x^T;
nothing is copied.

The library is the copy that torch has loaded, called through ctypes on torch's current stream; a
capture may contain these calls like any other launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from typing import Any

import torch
from torch import Tensor

from fpdm.kernels.implementations import warn_once
from fpdm.kernels.launch import FLOATS, LaunchError, aligned, check

# cudaDataType
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
COMPUTE_32F = 68  # CUBLAS_COMPUTE_32F
# attributes of a product; of a search for its algorithm; and epilogues
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8
WORKSPACE_BYTES, ALIGNMENTS = 1, (5, 6, 7, 8)
IDENTITY, BIAS, GELU = 1, 4, 32  # bias and GELU are bits
ALGORITHMS = 4  # the first of the list are worth timing
ALIGNED = 16  # bytes, of every operand


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


@functools.cache
def library() -> Any:
    """The copy that torch has loaded. Raises OSError where there is none."""
    if torch.version.cuda is None:
        raise OSError("cublasLt: got a torch without CUDA, expected one with it")
    found = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    pointer = ctypes.c_void_p
    found.cublasLtMatmul.argtypes = [*[pointer] * 14, ctypes.c_size_t, pointer]
    found.cublasLtGetVersion.restype = ctypes.c_size_t
    found.cublasLtGetStatusString.restype = ctypes.c_char_p
    return found


@functools.cache
def version() -> int | None:
    """The library's, such as 130100; None where there is none."""
    try:
        return int(library().cublasLtGetVersion())
    except OSError:
        return None


class RefusalError(LaunchError):
    """What the library does not do, in its words."""


def _done(status: int, what: str) -> None:
    if status:
        told = library().cublasLtGetStatusString(status)
        raise RefusalError(f"cublasLt: {what}: got status {status}, {told.decode()}, expected 0")


def _make(function: str, *args: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _done(getattr(library(), function)(ctypes.byref(made), *args), function)
    return made


def _tell(function: str, thing: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.sizeof(value)
    status = getattr(library(), function)(thing, attribute, ctypes.byref(value), size)
    _done(status, f"{function} {attribute}")


def _on(device: int) -> Any:
    """The device as the current one; -1: a library in memory, for the tests."""
    return torch.cuda.device(device) if device >= 0 else contextlib.nullcontext()


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    with _on(device):
        return _make("cublasLtCreate")


class Product:
    """y (M,N) = f(x (M,K) W (N,K)^T + beta C + bias) by the ``algorithm``-th of the list, or its
    last; rows of W lie ``distance`` elements apart. Raises LaunchError where there is none."""

    def __init__(
        self, m: int, n: int, k: int, distance: int, dtype: torch.dtype, epilogue: int,
        beta: float, algorithm: int, device: int,
    ):  # fmt: skip
        kind = TYPES[dtype]
        self.handle = _handle(device)
        self.description = _make("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES[torch.float32])
        self._set(TRANSPOSE_A, ctypes.c_int32(1))
        self._set(EPILOGUE, ctypes.c_int32(epilogue))
        if epilogue & BIAS:
            # how it is aligned is part of the search
            self._set(BIAS_POINTER, ctypes.c_void_p(ALIGNED))
        self.w, self.x, self.y = (
            _make("cublasLtMatrixLayoutCreate", kind, ctypes.c_uint64(rows), ctypes.c_uint64(cols),
                  ctypes.c_int64(apart))
            for rows, cols, apart in ((k, n, distance), (k, m, k), (n, m, n))
        )  # fmt: skip
        search = _make("cublasLtMatmulPreferenceCreate")
        wishes: dict[int, Any] = {WORKSPACE_BYTES: ctypes.c_uint64(0)}
        wishes |= dict.fromkeys(ALIGNMENTS, ctypes.c_uint32(ALIGNED))
        for attribute, value in wishes.items():
            _tell("cublasLtMatmulPreferenceSetAttribute", search, attribute, value)
        found, count = (_Algorithm * (algorithm + 1))(), ctypes.c_int()
        status = library().cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.description, self.w, self.x, self.y, self.y, search, algorithm + 1,
            found, ctypes.byref(count),
        )  # fmt: skip
        library().cublasLtMatmulPreferenceDestroy(search)
        _done(status, "cublasLtMatmulAlgoGetHeuristic")
        if not count.value:
            raise RefusalError(f"cublasLt: got no algorithm for {m} x {n} x {k}, expected one")
        self.algorithm = found[min(algorithm, count.value - 1)]
        self.alpha, self.beta = ctypes.c_float(1.0), ctypes.c_float(beta)
        # the description holds the bias of the call under way
        self.one = threading.Lock()

    def _set(self, attribute: int, value: Any) -> None:
        _tell("cublasLtMatmulDescSetAttribute", self.description, attribute, value)

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor | None, y: Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launch it; operands of the plan's shapes and dtype, which ``fits`` has seen."""
        with self.one:
            if bias is not None:
                self._set(BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
            _done(
                library().cublasLtMatmul(
                    self.handle, self.description, ctypes.byref(self.alpha), weight.data_ptr(),
                    self.w, x.data_ptr(), self.x, ctypes.byref(self.beta),
                    (y if c is None else c).data_ptr(), self.y, y.data_ptr(), self.y,
                    ctypes.byref(self.algorithm.algorithm), None, 0, stream,
                ),
                "cublasLtMatmul",
            )  # fmt: skip

    def __del__(self) -> None:
        # at the interpreter's end the library may be gone before it
        with contextlib.suppress(Exception):
            for layout in (self.w, self.x, self.y):
                library().cublasLtMatrixLayoutDestroy(layout)
            library().cublasLtMatmulDescDestroy(self.description)


# a plan is made before a capture: in one, some versions refuse to search
@functools.cache
def _product(*key: Any) -> Product | str:
    """The plan, or why there is none: asked once. In words, as an error would keep the operands of
    everybody who raises it."""
    try:
        return Product(*key)
    except RefusalError as error:
        return str(error)


def fits(x: Tensor, weight: Tensor, addend: Tensor | None, out: Tensor | None) -> bool:
    """Whether a plan can take these operands: one dtype, dense (rows of the weight may lie apart),
    16-byte aligned."""
    dense = [t for t in (x, addend, out) if t is not None]
    return (
        all(t.dtype == weight.dtype and t.is_contiguous() for t in dense)
        and weight.stride(-1) == 1
        and weight.stride(0) >= weight.shape[1]
        and aligned((*dense, weight), ALIGNED)
    )


def attempt(
    x: Tensor, weight: Tensor, addend: Tensor | None, out: Tensor | None = None,
    gelu: bool = False, algorithm: int = 0,
) -> Tensor | None:  # fmt: skip
    """``linear``; None where it cannot take the operands, or where the library refuses, of which
    one warning tells: torch's own call does either."""
    if not fits(x, weight, addend, out):
        return None
    try:
        return linear(x, weight, addend, out, gelu, algorithm)
    except RefusalError as error:
        warn_once(f"{error}: torch's own product runs instead")
        return None


def linear(
    x: Tensor, weight: Tensor, addend: Tensor | None, out: Tensor | None = None,
    gelu: bool = False, algorithm: int = 0,
) -> Tensor:  # fmt: skip
    """x W^T + u, or tanh GELU of it, not rounded in between.   x (B,T,I), weight (O,I), u (O,),
    (B,T,O) or None, as ``fits`` wants them -> (B,T,O). Raises LaunchError."""
    n, k = weight.shape
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    tensor = addend is not None and addend.dim() > 1
    shape, dtype = (*x.shape[:-1], n), (weight.dtype,)
    inputs = (
        ("x", x, (*x.shape[:-1], k), dtype),
        ("weight", weight, (n, k), FLOATS),
        ("addend", addend, shape if tensor else (n,), dtype),
    )
    check("linear", x.device, inputs, (("out", out, shape, dtype),))
    m = x.numel() // k
    if not m:
        return out
    bias = None if tensor else addend
    epilogue = BIAS * (bias is not None) | GELU * gelu or IDENTITY
    index = x.device.index if x.is_cuda else -1
    plan = _product(m, n, k, weight.stride(0), x.dtype, epilogue, float(tensor), algorithm, index)
    if isinstance(plan, str):
        raise RefusalError(plan)
    with _on(index):
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        plan.run(x, weight, bias, addend if tensor else None, out, stream)
    return out
