"""The kernels of csrc/cuda on a CPU: builds them with g++, and stands in for the driver.

``build(kernels, ...)`` makes a shared library from the same headers, with intrinsics.cuh replaced;
``Shim`` has the launch method of fpdm.kernels.cuda.Driver. Libraries are kept in a temporary
directory of the user's own, by a hash of all that goes into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fpdm.kernels import cuda_compile, cuda_kernels
from fpdm.kernels.cuda_compile import Entry
from fpdm.kernels.cuda_driver import Argument, pack
from fpdm.kernels.cuda_kernels import Kernel

HERE = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# the device contracts to fma only where the source says so here: one difference fewer to explain
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", *WARNINGS)


class ShimError(AssertionError):
    """A kernel did what a GPU would not forgive."""


class Span(ctypes.Structure):
    """Memory that a kernel may touch."""

    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("smem", ctypes.c_int32),
        ("rows", ctypes.c_int32),
    ]


def registry(kernels: Sequence[Kernel]) -> str:
    """C++ that names every kernel, with threads and shared memory from its own traits."""
    lines = [f"#include <{s}.cuh>" for s in dict.fromkeys(k.source for k in kernels)]
    lines += ["", "using namespace fpdm;", "", "static const shim::Kernel kernels[] = {"]
    for k in kernels:
        lines += [
            f'    {{"{k.name}", {", ".join(k.numbers)},',
            f"     shim::params_bytes(&{k.name}),",
            f"     [](const void* p) {{ shim::call<&{k.name}>(&{k.name}, p); }}}},",
        ]
    lines += [
        "};",
        "",
        'extern "C" const char* shim_launch(unsigned kernel, const unsigned* grid,',
        "    unsigned threads, const void* params, unsigned params_bytes,",
        "    const shim::Span* spans, unsigned span_count, int reverse) {",
        "    const shim::Kernel& k = kernels[kernel];",
        '    if (params_bytes != k.params_bytes) return "the parameter struct has another size";',
        "    return shim::launch(k, grid, threads, params, spans, span_count, reverse != 0);",
        "}",
        "#ifdef SHIM_COVERAGE",
        'extern "C" void __gcov_dump(), __gcov_reset();',
        'extern "C" void shim_dump_coverage() { __gcov_dump(), __gcov_reset(); }',
        "#endif",
        'extern "C" const shim::Kernel* shim_kernel(unsigned kernel) { return &kernels[kernel]; }',
    ]
    return "\n".join(lines) + "\n"


def _cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"fpdm-shim-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077:
        raise ShimError(f"{path}: expected a directory of this user alone")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def compiler() -> str | None:
    """g++, if there is one."""
    return shutil.which("g++")


def build(
    kernels: Sequence[Kernel],
    folder: Path | None = None,
    flags: Sequence[str] = (),
    headers: Path | None = None,
) -> Path:
    """The shared library for ``kernels``, their headers in ``headers`` (csrc/cuda).

    With ``folder`` it is built there, in any case, for instance with --coverage among ``flags``.
    """
    headers = headers or cuda_compile.source_directory()
    include = [HERE, headers, cuda_compile.source_directory()]
    texts = [p.read_text() for d in include for p in sorted(d.glob("*.*")) if p.suffix != ".py"]
    source = registry(kernels)
    key = repr([texts, source, FLAGS, tuple(flags), _processor()])
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    final = (folder or _cache()) / f"{name}.so"
    if final.exists() and folder is None:
        return final
    with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
        work = folder or Path(scratch)
        made, main = work / "shim.so", work / "registry.cpp"
        main.write_text(source)
        paths = [f"-I{p}" for p in dict.fromkeys(include)]
        command = ["g++", *FLAGS, *flags, *paths, str(main), str(HERE / "engine.cpp")]
        done = subprocess.run(
            [*command, "-o", str(made)], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise ShimError(f"g++: {done.stderr[:4000]}")
        made.replace(final)
    return final


class Shim:
    """A backend of fpdm.kernels.cuda for CPU tensors. ``launches`` counts kernels by name; with
    ``reverse`` the last blocks and warps run first."""

    def __init__(
        self, kernels: Sequence[Kernel] = cuda_kernels.KERNELS, library: Path | None = None
    ):
        self.index = {k.name: i for i, k in enumerate(kernels)}
        self.lib = ctypes.CDLL(str(library or build(kernels)))
        self.lib.shim_launch.restype = ctypes.c_char_p
        self.lib.shim_kernel.restype = ctypes.POINTER(_Kernel)
        self.launches: Counter[str] = Counter()
        self.reverse = False
        self.limit = 96 * 1024

    def entry(self, kernel: Kernel, device: torch.device) -> Entry:
        """What the registry says of a kernel."""
        found = self.lib.shim_kernel(self.index[kernel.name]).contents
        return Entry(kernel.name, found.threads, found.smem, found.rows)

    def shared_limit(self, device: torch.device) -> int:
        """Volta's, unless a test says otherwise."""
        return self.limit

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Runs every block; raises ShimError with block, thread and reason."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        spans = (Span * len(tensors))(*(Span(*_span(t)) for t in tensors))
        params = pack(kernel, arguments)
        dims = (ctypes.c_uint * 3)(*grid, 1)
        self.launches[kernel.name] += 1
        error = self.lib.shim_launch(
            self.index[kernel.name], dims, threads, params, len(params), spans, len(tensors),
            self.reverse,
        )  # fmt: skip
        if error is not None:
            raise ShimError(f"{kernel.name}: {error.decode()}")


def _span(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte of the elements of ``t``."""
    start = t.data_ptr()
    if t.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return start, start + (last + 1) * t.element_size()
