"""Loads csrc/cuda with CuPy and launches it on torch's current stream.

A header's kernels are one module, loaded at the first launch of any of them on a device. That must
come before a CUDA graph is captured; ``Driver.prepare`` loads everything.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fpdm.kernels import cuda_compile, cuda_kernels
from fpdm.kernels.cuda_compile import Binary, Entry
from fpdm.kernels.cuda_kernels import Kernel
from fpdm.kernels.launch import LaunchError
from fpdm.settings import one_line

Argument = Tensor | float | None
Load = Callable[[str, tuple[int, int]], Binary]
STATIC_LIMIT = 48 * 1024  # bytes of dynamic shared memory that need no opt-in


class Launcher(Protocol):
    """What the launchers need of a device, or of its stand-in."""

    def entry(self, kernel: Kernel, device: torch.device) -> Entry:
        """Threads, shared memory and rows per block of a kernel."""

    def shared_limit(self, device: torch.device) -> int:
        """Bytes of shared memory that a block may have."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Starts a kernel; ``arguments`` are the fields of its parameter struct."""


def pack(kernel: Kernel, arguments: Sequence[Argument]) -> bytes:
    """The parameter struct; a tensor is its address, None a null pointer."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    return struct.pack(cuda_kernels.FORMATS[kernel.params], *values)


class Driver:
    """The backend of a GPU. ``load`` finds the machine code of a header for a capability."""

    def __init__(self, load: Load = cuda_compile.load) -> None:
        self._read = load
        self._found: dict[tuple[int, str], tuple[Any, Entry]] = {}
        self._lock = threading.Lock()

    def entry(self, kernel: Kernel, device: torch.device) -> Entry:
        """See Launcher. Loads the kernel's module; raises LaunchError inside a capture."""
        return self._function(kernel, _index(device))[1]

    def shared_limit(self, device: torch.device) -> int:
        """See Launcher: 96 KB on Volta, 64 KB on Turing, more on newer ones."""
        return _shared_limit(_index(device))

    def prepare(self, device: torch.device) -> None:
        """Loads every module, so that nothing is left to load inside a capture."""
        for source in cuda_kernels.SOURCES:
            self.entry(cuda_kernels.of_source(source)[0], device)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """See Launcher. The struct is copied at the launch, so graphs may capture it."""
        import numpy

        index = _index(device)
        function, entry = self._function(kernel, index)
        params = pack(kernel, arguments)
        # an array of one element is passed by value
        value = numpy.frombuffer(params, dtype=f"V{len(params)}")
        stream = _stream(torch.cuda.current_stream(index).cuda_stream)
        with torch.cuda.device(index):
            function((*grid, 1), (threads, 1, 1), (value,), entry.smem, stream)

    def _function(self, kernel: Kernel, index: int) -> tuple[Any, Entry]:
        found = self._found.get((index, kernel.name))
        if found is None:
            self._load(kernel, index)
            found = self._found[index, kernel.name]
        return found

    def _load(self, kernel: Kernel, index: int) -> None:
        import cupy

        with self._lock, torch.cuda.device(index), cupy.cuda.Device(index):
            if (index, kernel.name) in self._found:
                # by another thread meanwhile. A module that is replaced is unloaded, perhaps under
                # a launch or a captured graph
                return
            if torch.cuda.is_current_stream_capturing():
                raise LaunchError(
                    f"{kernel.source}: got its first launch on cuda:{index} inside a capture, "
                    "expected one before (fpdm.kernels.cuda.prepare loads everything)"
                )
            binary = self._read(kernel.source, torch.cuda.get_device_capability(index))
            module = cupy.cuda.function.Module()
            module.load(binary.code)
            driver = cupy.cuda.driver
            for name, entry in binary.entries.items():
                function = module.get_function(entry.symbol)
                # what is larger than the device allows is never launched
                if STATIC_LIMIT < entry.smem <= _shared_limit(index):
                    opt_in = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(function.ptr, opt_in, entry.smem)
                self._found[index, name] = function, entry


@functools.cache
def _shared_limit(index: int) -> int:
    import cupy

    return int(cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Handle:
    """A stream that is not CuPy's, under the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """(version, address)."""
        return 0, self.pointer


# kept for good: CuPy 14's object may destroy the stream when it goes, which is torch's to do
@functools.cache
def _stream(pointer: int) -> Any:
    import cupy

    # from CuPy 14 on, where ExternalStream is deprecated
    if convert := getattr(cupy.cuda.Stream, "from_external", None):
        return convert(_Handle(pointer))
    return cupy.cuda.ExternalStream(pointer)


def missing(device: torch.device) -> list[str]:
    """Why kernels cannot be loaded on ``device``; empty when they can.

    On a CUDA device CuPy is imported and asks the driver how many there are: an installation that
    is broken, or made for a newer CUDA than the driver's, says so here and not at the first launch.
    """
    reasons = []
    installed = importlib.util.find_spec("cupy") is not None
    if not installed:
        reasons.append("cupy is not installed (extra cuda12 or cuda13)")
    if device.type != "cuda" or not torch.cuda.is_available():
        reasons.append(f"got {device.type}, expected a CUDA device")
        return reasons
    if installed and (problem := _cupy_problem()):
        reasons.append(problem)
    capability = torch.cuda.get_device_capability(device)
    arch = cuda_compile.architecture(capability)
    if capability < (7, 0):
        reasons.append(f"got sm_{capability[0]}{capability[1]}, expected sm_70 or newer")
    try:
        files = cuda_compile.manifest()
        if not all(f"{source}.{arch}.bin" in files for source in cuda_kernels.SOURCES):
            cuda_compile.check_architecture(arch)
    except cuda_compile.CompileError as error:
        reasons.append(f"no cubins for {arch} in the package, and {error}")
    return reasons


def _cupy_problem() -> str | None:
    """What of CuPy fails that ``Driver`` needs."""
    try:
        import cupy

        needed = (cupy.cuda.function, "Module"), (cupy.cuda.driver, "funcSetAttribute")
        for module, name in needed:
            getattr(module, name)
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"cupy is installed and cannot be used: {type(error).__name__}: {one_line(error)}"
    return None
