"""NVRTC without a GPU: cubins, manifest, cache, and what is refused."""

from __future__ import annotations

import contextlib
import json
import stat
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fpdm.kernels import cuda, cuda_compile, cuda_driver, cuda_kernels, implementations
from fpdm.kernels.cuda_compile import Binary, CompileError, Entry


def missing() -> str | None:
    try:
        cuda_compile.compiler_version()
    except CompileError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries one header's kernels."""
    monkeypatch.setattr(cuda_kernels, "SOURCES", ("reduce",))
    monkeypatch.setattr(cuda_compile, "CUBINS", tmp_path / "cubins")
    cuda_compile.build_cubins(tmp_path / "cubins", ["sm_70", "sm_80"])
    return tmp_path / "cubins"


@needs_nvrtc
def test_compiles_names_and_numbers() -> None:
    source = "template <class T, int N> __global__ void f(T* p) { p[0] = N; }"
    found = cuda_compile.compile_cuda(source, "sm_90", ["f<float, 3>"], {})
    assert found.code[:4] == b"\x7fELF"
    assert found.symbols == {"f<float, 3>": "_Z1fIfLi3EEvPT_"}
    assert found.log == ""
    ptx = cuda_compile.compile_cuda(source, "compute_70", ["f<float, 3>"], {}).code
    assert b".target sm_70" in ptx


@needs_nvrtc
def test_errors_have_the_compilers_log() -> None:
    with pytest.raises(CompileError, match=r"for sm_70: fpdm\.cu\(1\): error: .*nonsense"):
        cuda_compile.compile_cuda("nonsense x;", "sm_70", [], {})
    with pytest.raises(CompileError, match="for sm_20"):
        cuda_compile.compile_cuda("", "sm_20", [], {})


@needs_nvrtc
def test_a_warning_is_an_error() -> None:
    kernel = cuda_kernels.Kernel("odd", "odd_kernel", "Traits", "P")
    text = """
    struct Traits { static constexpr int threads = 32;
                    static constexpr __device__ int smem_bytes() { return 0; } };
    namespace fpdm {}
    __global__ void odd_kernel() { int unused; }
    """
    with pytest.raises(CompileError, match=r"odd\.cuh for sm_70: got a warning.*never referenced"):
        cuda_compile.build("odd", "sm_70", [kernel], {"odd.cuh": text})


@needs_nvrtc
def test_package_is_read_and_checked(package: Path) -> None:
    entry = cuda_compile.load("reduce", (7, 2)).entries["reduce_columns_kernel"]
    assert (entry.threads, entry.smem) == (128, 0)
    path = package / "reduce.sm_70.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CompileError, match="do not fit their SHA-256"):
        cuda_compile.load("reduce", (7, 0))
    (package / cuda_compile.MANIFEST).write_text("{")
    with pytest.raises(CompileError, match="got no manifest"):
        cuda_compile.load("reduce", (8, 6))


@needs_nvrtc
def test_stale_package_is_not_run(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_compile, "FLAGS", (*cuda_compile.FLAGS, "--fmad=false"))
    assert cuda_compile.manifest() == {}
    cuda_compile.load("reduce", (7, 0))
    assert [p.name.split(".")[:2] for p in cache.iterdir()] == [["reduce", "sm_70"]]


@needs_nvrtc
def test_cache_is_private_whole_and_rebuilt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cuda_compile.cached("reduce", "sm_100")
    (path,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_compile, "build", None)
        assert cuda_compile.cached("reduce", "sm_100") == first
    for damaged in (b"", whole[:1000], whole[:-1] + b"x"):
        path.write_bytes(damaged)
        assert cuda_compile.cached("reduce", "sm_100") == first
        assert path.read_bytes() == whole
    cache.chmod(0o755)
    with pytest.raises(CompileError, match=r"got mode 755 of user \d+, expected mode 700"):
        cuda_compile.cached("reduce", "sm_100")


@needs_nvrtc
def test_manifest_lists_what_is_there(package: Path) -> None:
    data = json.loads((package / cuda_compile.MANIFEST).read_text())
    assert data["sources"] == cuda_compile.source_hash()
    assert sorted(data["files"]) == ["reduce.sm_70.bin", "reduce.sm_80.bin"]
    assert {p.name for p in package.iterdir()} == {*data["files"], cuda_compile.MANIFEST}


def test_architecture_of_a_device() -> None:
    found = {c: cuda_compile.architecture(c) for c in ((7, 0), (7, 5), (8, 6), (9, 0), (12, 0))}
    assert list(found.values()) == ["sm_70", "sm_75", "sm_80", "sm_90", "sm_120"]
    assert cuda_compile.architecture((10, 3)) == "sm_103"


def test_building_imports_no_torch() -> None:
    """setup.py builds where torch is not installed."""
    code = "import sys, fpdm.kernels.cuda_compile; sys.exit('torch' in sys.modules)"
    root = Path(cuda_compile.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cuda.unavailable(torch.device("cpu"), torch.bfloat16)
    assert told is not None
    assert "got cpu, expected a CUDA device" in told
    assert "got bfloat16, expected a compute dtype of float16 or float32" in told


class OldNvrtc:
    """NVRTC before 11.2: it does not say what it compiles for."""


class Nvrtc:
    """As far as it says what it compiles for."""

    def __init__(self, *known: int) -> None:
        self.known = known

    def nvrtcGetNumSupportedArchs(self, count: Any) -> int:
        count._obj.value = len(self.known)
        return 0

    def nvrtcGetSupportedArchs(self, into: Any) -> int:
        into[:] = self.known
        return 0


def broken_cupy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A cupy whose import runs ``text``, on a machine with a V100."""
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(cuda_compile, "compiler_version", lambda: "12.9")
    monkeypatch.setattr(cuda_compile, "_nvrtc", OldNvrtc)


USABLE = """
from types import SimpleNamespace as N
cuda = N(function=N(Module=1), driver=N(funcSetAttribute=1), runtime=N(getDeviceCount=lambda: 1))
"""
BROKEN = {
    "raise ImportError('libnvrtc.so.11.2:\\ncannot open shared object file')":
        "ImportError: libnvrtc.so.11.2: cannot open shared object file",
    "raise RuntimeError('CuPy is not correctly installed')": "RuntimeError: CuPy is not correctly",
    "cuda = None": "AttributeError: ",
    USABLE + "def fail(): raise OSError('cudaErrorInsufficientDriver')\n"
    "cuda.runtime.getDeviceCount = fail": "OSError: cudaErrorInsufficientDriver",
}  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_cupy_says_so_before_a_launch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; auto takes the reference, an explicit request is refused with the reason."""
    broken_cupy(tmp_path, monkeypatch, text)
    device = torch.device("cuda", 0)
    told = cuda.unavailable(device, torch.float16)
    assert told is not None
    assert f"cupy is installed and cannot be used: {BROKEN[text]}" in told
    assert "\n" not in told
    with pytest.warns(UserWarning, match="auto is reference, .* on cuda:0; cuda cannot"):
        assert implementations.choose("auto", device, torch.float16) == "reference"
    with pytest.raises(implementations.ImplError, match="cupy is installed and cannot be used"):
        implementations.choose("cuda", device, torch.float16)


def test_a_good_cupy_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_cupy(tmp_path, monkeypatch, USABLE)
    device = torch.device("cuda", 0)
    assert cuda.unavailable(device, torch.float16) is None
    assert implementations.choose("auto", device, torch.float16) == "cuda"


def test_cupy_is_not_imported_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_cupy(tmp_path, monkeypatch, "raise ImportError('imported')")
    assert cuda.unavailable(torch.device("cpu"), None) == "got cpu, expected a CUDA device"


def test_nothing_is_loaded_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that is asked is the device's of the launch, whichever is current."""
    current = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setitem(sys.modules, "cupy", Recorder(14))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    with pytest.raises(cuda_driver.LaunchError, match="reduce: got its first launch on cuda:1"):
        cuda_driver.Driver().entry(cuda_kernels.REDUCE_NORMS, torch.device("cuda", 1))


class Recorder:
    """CuPy, as far as the driver uses it; ``calls`` is what it was asked for."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.Stream: Any = types.SimpleNamespace()
        if version >= 14:
            self.Stream.from_external = lambda stream: ("from_external", *stream.__cuda_stream__())
        self.calls: list[tuple[Any, ...]] = []
        self.cuda = self.driver = self.function = self
        self.attributes = {"MaxSharedMemoryPerBlockOptin": 98304}
        self.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def Device(self, index: int) -> Any:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def Module(self) -> Recorder:
        return self

    def load(self, code: bytes) -> None:
        self.calls.append(("load", code))

    def get_function(self, symbol: str) -> Any:
        def start(*args: Any) -> None:
            self.calls.append((symbol, *args))

        start.ptr = symbol  # type: ignore[attr-defined]
        return start

    def funcSetAttribute(self, *args: Any) -> None:
        self.calls.append(args)

    def ExternalStream(self, pointer: int) -> tuple[str, int]:
        assert self.version < 14, "deprecated"
        return "ExternalStream", pointer


STREAMS = {13: ("ExternalStream", 77), 14: ("from_external", 0, 77)}


@pytest.mark.parametrize("version", STREAMS)
def test_launch_through_cupy(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One load per header, the opt-in above 48 KB, the struct by value, torch's current stream."""
    cupy, device = Recorder(version), torch.device("cuda", 3)
    cuda_driver._stream.cache_clear()
    cuda_driver._shared_limit.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    kernel = cuda_kernels.REDUCE_NORMS
    entries = {kernel.name: Entry("small", 128, 0, 0), "large": Entry("large", 64, 73728, 0)}
    entries["too_large"] = Entry("too_large", 64, 100000, 0)
    driver = cuda_driver.Driver(lambda source, capability: Binary(b"code", entries))
    partial = torch.zeros(4)
    driver.launch(kernel, (5, 2), 128, [partial, None, 9, 1, 2], device)
    driver.launch(kernel, (1, 1), 128, [partial, None, 9, 1, 2], device)
    assert cupy.calls[:2] == [("load", b"code"), ("large", 8, 73728)]
    (symbol, grid, block, (value,), smem, on), again = cupy.calls[2:]
    assert (symbol, grid, block, smem, on) == (
        "small", (5, 2, 1), (128, 1, 1), 0, STREAMS[version],
    )  # fmt: skip
    assert again[1] == (1, 1, 1)
    assert value.shape == (1,)
    assert value.tobytes() == struct.pack("PPqii", partial.data_ptr(), 0, 9, 1, 2)
    cuda_driver._stream.cache_clear()
    cuda_driver._shared_limit.cache_clear()


def test_threads_that_miss_together_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device, kernel = Recorder(14), torch.device("cuda", 0), cuda_kernels.REDUCE_NORMS
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    class Late(dict[Any, Any]):
        """Who looks first is held until the other has looked too."""

        both = threading.Barrier(2)

        def get(self, key: Any, default: Any = None) -> Any:
            found = super().get(key, default)
            self.both.wait(60)
            return found

    entries = {kernel.name: Entry("small", 128, 0, 0)}
    driver = cuda_driver.Driver(lambda source, capability: Binary(b"code", entries))
    monkeypatch.setattr(driver, "_found", Late())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: driver._function(kernel, device.index), range(2)))
    assert cupy.calls == [("load", b"code")]
    assert found[0][0] is found[1][0]


def test_an_nvrtc_that_does_not_know_the_device_says_so_before_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVRTC 13 on a V100: auto takes the reference, an explicit request gets the reason."""
    broken_cupy(tmp_path, monkeypatch, USABLE)
    monkeypatch.setattr(cuda_compile, "manifest", dict)
    monkeypatch.setattr(cuda_compile, "compiler_version", lambda: "13.0")
    device = torch.device("cuda", 0)
    assert cuda.unavailable(device, torch.float16) is None
    monkeypatch.setattr(cuda_compile, "_nvrtc", lambda: Nvrtc(70, 75))
    assert cuda.unavailable(device, torch.float16) is None
    monkeypatch.setattr(cuda_compile, "_nvrtc", lambda: Nvrtc(75, 80, 90))
    told = "no cubins for sm_70 in the package, and NVRTC 13.0: got sm_75 and newer, expected sm_70"
    assert told in (cuda.unavailable(device, torch.float16) or "")
    with pytest.warns(UserWarning, match=f"auto is reference, .* on cuda:0; .*{told}"):
        assert implementations.choose("auto", device, torch.float16) == "reference"
    with pytest.raises(implementations.ImplError, match=told):
        implementations.choose("cuda", device, torch.float16)


@needs_nvrtc
def test_the_compiler_itself_says_what_it_knows() -> None:
    cuda_compile.check_architecture("sm_80")
    with pytest.raises(CompileError, match=r"got sm_\d+ and newer, expected sm_20: pip install"):
        cuda_compile.check_architecture("sm_20")


def test_without_nvrtc_the_reason_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "nvrtc_candidates", lambda: iter(()))
    with pytest.raises(CompileError, match="pip install nvidia-cuda-nvrtc-cu12"):
        cuda_compile._nvrtc.__wrapped__()
