"""csrc/cuda to machine code through NVRTC, on any machine: no GPU, no CUDA toolkit, no torch.

    compile_cuda(source, arch, names)   one translation unit; sm_70 gives a cubin, compute_70 PTX
    build(source, arch)                 a header of csrc/cuda with all its kernels
    build_cubins(directory)             what a package carries, with a manifest of SHA-256
    load(source, capability)            for run time: package, else cache, else NVRTC

The compile gate, setup.py and the launchers all come through compile_cuda with the same flags, so
the code that was gated is the code that runs. NVRTC is the library of the wheel
nvidia-cuda-nvrtc-cu12 (12.9 is the last that knows sm_70), else the system's. The kernels include
nothing but csrc/cuda, so no CUDA header is needed.

Numbers that C++ decides (threads, dynamic shared memory) come back in the mangled name of a
variable template, evaluated by the compiler itself.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fpdm.kernels import cuda_kernels
from fpdm.kernels.cuda_kernels import Kernel
from fpdm.settings import UserError

ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_90")
FLAGS = ("--std=c++17",)
CUBINS = Path(__file__).with_name("cubins")
MANIFEST = "manifest.json"
_NUMBER = "template <long long N> __device__ const long long fpdm_number = N;\n"
_MANGLED = re.compile(r"_Z11fpdm_numberILx(\d+)EE")
_DEPRECATION = re.compile(r"^nvrtc: warning: Architectures prior to .*\n?", re.MULTILINE)


class CompileError(UserError):
    """NVRTC is missing, or refuses what it was given; or machine code that is not to be trusted."""


@dataclass(frozen=True)
class Compiled:
    """Machine code or PTX, the symbol of every name expression, and what the compiler said."""

    code: bytes
    symbols: dict[str, str]
    log: str


@dataclass(frozen=True)
class Entry:
    """Where a kernel is in its module and how it is launched."""

    symbol: str
    threads: int  # per block, at most
    smem: int  # bytes of dynamic shared memory
    rows: int  # per block, where the kernel fixes it


@dataclass(frozen=True)
class Binary:
    """A module and its kernels by name."""

    code: bytes
    entries: dict[str, Entry]


def nvrtc_candidates() -> Iterator[str]:
    """Libraries to try: the wheels' first and of those CUDA 12, then what the loader finds."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for where in ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"):
        yield from (str(root / where) for root in roots if (root / where).exists())
    yield from ("libnvrtc.so.12", "libnvrtc.so.13")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    for name in nvrtc_candidates():
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        return lib
    raise CompileError(
        "NVRTC: got no library, expected libnvrtc.so.12: "
        "pip install nvidia-cuda-nvrtc-cu12==12.9.86"
    )


@functools.cache
def compiler_version() -> str:
    """Version of NVRTC, like 12.9. Raises CompileError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def check_architecture(arch: str) -> None:
    """Raises CompileError where there is no NVRTC, or one that does not compile for ``arch``."""
    version, lib, count = compiler_version(), _nvrtc(), ctypes.c_int()
    if not hasattr(lib, "nvrtcGetSupportedArchs"):  # before 11.2, which does not say
        return
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(known)
    if known and int(arch.removeprefix("sm_")) not in known:
        raise CompileError(
            f"NVRTC {version}: got sm_{min(known)} and newer, expected {arch}: "
            "pip install nvidia-cuda-nvrtc-cu12==12.9.86"
        )


def source_directory() -> Path:
    """csrc/cuda: inside the package when it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parent):
        if (root / "csrc" / "cuda").is_dir():
            return root / "csrc" / "cuda"
    raise CompileError(f"{package / 'csrc' / 'cuda'}: got nothing, expected the kernels' headers")


def headers() -> dict[str, str]:
    """Name -> text of every header of csrc/cuda."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(source_directory().glob("*.cuh"))}


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(v.encode() for v in values))


class _Program:
    """An nvrtcProgram, destroyed in the end."""

    def __init__(self, source: str, included: Mapping[str, str]):
        self.lib, self.handle = _nvrtc(), ctypes.c_void_p()
        names, texts = list(included), list(included.values())
        self._check(
            self.lib.nvrtcCreateProgram(
                ctypes.byref(self.handle), source.encode(), b"fpdm.cu",
                len(names), _strings(texts), _strings(names),
            )
        )  # fmt: skip

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.nvrtcDestroyProgram(ctypes.byref(self.handle))

    def call(self, name: str, *args: object) -> None:
        """nvrtc<name>(program, ...)"""
        self._check(getattr(self.lib, f"nvrtc{name}")(self.handle, *args))

    def _check(self, status: int) -> None:
        if status:
            told = self.lib.nvrtcGetErrorString(status).decode()
            raise CompileError(f"NVRTC {compiler_version()}: got {told}")

    def output(self, name: str) -> bytes:
        """What nvrtcGet<name> gives."""
        size = ctypes.c_size_t()
        self.call(f"Get{name}Size", ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"Get{name}", buffer)
        return buffer.raw

    def log(self) -> str:
        """Errors and warnings, without the one that every sm_70 program gets."""
        text = self.output("ProgramLog").rstrip(b"\0").decode(errors="replace")
        return _DEPRECATION.sub("", text).strip()

    def symbol(self, name: str) -> str:
        """The mangled name of a name expression."""
        found = ctypes.c_char_p()
        self.call("GetLoweredName", name.encode(), ctypes.byref(found))
        return (found.value or b"").decode()


def compile_cuda(
    source: str, arch: str, names: Sequence[str], included: Mapping[str, str] | None = None
) -> Compiled:
    """Compiles CUDA C++ for ``arch``: sm_NN gives a cubin, compute_NN gives PTX.

    ``names``: the name expressions to instantiate; ``included``: the headers, csrc/cuda by default.
    Raises CompileError with the compiler's log.
    """
    with _Program(source, headers() if included is None else included) as program:
        for name in names:
            program.call("AddNameExpression", name.encode())
        options = [f"--gpu-architecture={arch}", *FLAGS]
        try:
            program.call("CompileProgram", len(options), _strings(options))
        except CompileError as error:
            raise CompileError(f"{error} for {arch}: {program.log()}") from None
        code = program.output("PTX" if arch.startswith("compute_") else "CUBIN")
        return Compiled(code, {name: program.symbol(name) for name in names}, program.log())


def build(
    source: str,
    arch: str,
    kernels: Sequence[Kernel] | None = None,
    included: Mapping[str, str] | None = None,
) -> Binary:
    """csrc/cuda/<source>.cuh with ``kernels`` (all of them) for one architecture.

    Raises CompileError, for a warning too.
    """
    kernels = cuda_kernels.of_source(source) if kernels is None else kernels
    variables = {
        n: f"&fpdm_number<{n}>" for n in dict.fromkeys(n for k in kernels for n in k.numbers)
    }
    unit = f"#include <{source}.cuh>\n{_NUMBER}using namespace fpdm;\n"
    names = [*(k.name for k in kernels), *variables.values()]
    compiled = compile_cuda(unit, arch, names, included)
    if compiled.log:
        raise CompileError(f"{source}.cuh for {arch}: got a warning, expected none: {compiled.log}")

    def value(number: str) -> int:
        match = _MANGLED.fullmatch(compiled.symbols[variables[number]])
        assert match is not None, compiled.symbols
        return int(match[1])

    return Binary(
        compiled.code,
        {k.name: Entry(compiled.symbols[k.name], *map(value, k.numbers)) for k in kernels},
    )


def source_hash() -> str:
    """SHA-256 of all that decides the machine code, compiler and architecture apart."""
    parts = [*headers().items(), *((k.name, k.numbers) for k in cuda_kernels.KERNELS), FLAGS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _pack(binary: Binary) -> bytes:
    """One line of JSON, then the code."""
    entries = {name: asdict(entry) for name, entry in binary.entries.items()}
    return json.dumps(entries).encode() + b"\n" + binary.code


def _unpack(data: bytes) -> Binary:
    line, _, code = data.partition(b"\n")
    return Binary(code, {name: Entry(**entry) for name, entry in json.loads(line).items()})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_cubins(
    directory: str | os.PathLike[str], architectures: Sequence[str] = ARCHITECTURES
) -> dict[str, Any]:
    """Writes what a package carries, one file per header and architecture, and the manifest, which
    it returns: compiler, hash of the sources, SHA-256 by file. compute_NN writes PTX.

    Raises CompileError where NVRTC is missing or does not know an architecture.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(product(cuda_kernels.SOURCES, architectures))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = pool.map(lambda job: _pack(build(*job)), jobs)
        files = {f"{source}.{arch}.bin": data for (source, arch), data in zip(jobs, packed)}
    for name, data in files.items():
        _write(folder / name, data, 0o644)
    told = {"nvrtc": compiler_version(), "sources": source_hash()}
    found = {**told, "files": {name: _sha256(data) for name, data in sorted(files.items())}}
    _write(folder / MANIFEST, json.dumps(found, indent=1).encode() + b"\n", 0o644)
    return found


def manifest(directory: Path | None = None) -> dict[str, str]:
    """File -> SHA-256 of what the package carries; empty when that is nothing, or was built from
    other headers than the present ones. Raises CompileError when it cannot be read."""
    path = (CUBINS if directory is None else directory) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(data["files"]) if data["sources"] == source_hash() else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise CompileError(f"{path}: got no manifest ({error}), expected JSON") from error


def architecture(capability: tuple[int, int]) -> str:
    """Which machine code a device runs: code of its own major version and no later minor one."""
    major, minor = capability
    for arch in reversed(ARCHITECTURES):
        known = divmod(int(arch.removeprefix("sm_")), 10)
        if known[0] == major and known[1] <= minor:
            return arch
    return f"sm_{major}{minor}"


def load(source: str, capability: tuple[int, int]) -> Binary:
    """The kernels of one header for a device: the package's, else cached or compiled now.

    Raises CompileError when there is no way left, or a file of the package is damaged.
    """
    arch = architecture(capability)
    if f"{source}.{arch}.bin" in manifest():
        return read(CUBINS, source, arch)
    return cached(source, arch)


def read(directory: Path, source: str, arch: str) -> Binary:
    """One file that ``build_cubins`` wrote. Raises CompileError when it is missing or damaged."""
    path = directory / f"{source}.{arch}.bin"
    data = path.read_bytes() if path.is_file() else b""
    if _sha256(data) != manifest(directory).get(path.name):
        raise CompileError(
            f"{path}: got {len(data)} bytes that do not fit their SHA-256, reinstall"
        )
    return _unpack(data)


_building = threading.Lock()


def cached(source: str, arch: str) -> Binary:
    """``build``, kept in a directory of the user's own. A damaged entry is built again."""
    key = _sha256(json.dumps([source, arch, compiler_version(), source_hash()]).encode())
    path = cache_directory() / f"{source}.{arch}.{key[:32]}"
    with _building:
        if path.exists():
            digest, _, data = path.read_bytes().partition(b"\n")
            if _sha256(data).encode() == digest:
                return _unpack(data)
        binary = build(source, arch)
        data = _pack(binary)
        _write(path, _sha256(data).encode() + b"\n" + data, 0o600)
    return binary


def cache_directory() -> Path:
    """$FPDM_CACHE, else fpdm in the user's cache. Raises CompileError unless it is the user's own
    and nobody else may enter: what lies there runs on the GPU."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("FPDM_CACHE") or Path(home) / "fpdm")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.getuid() or mode & 0o077:
        got = f"mode {mode:o} of user {info.st_uid}"
        raise CompileError(f"{path}: got {got}, expected mode 700 of user {os.getuid()}")
    return path


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, whoever else writes the same file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
