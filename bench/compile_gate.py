"""Compile gate without a GPU: what every Triton kernel takes of a device at XL/2 shapes.

    python -m bench.compile_gate            prints the table, and what breaks a limit
    python -m bench.compile_gate --write    ... and writes bench/tables/triton_resources.json

The launchers themselves run, on CPU tensors that nobody reads, against a driver that names an
architecture and has no device: what is compiled is what they would launch, specialisation of
addresses and strides included. The machine code is then read back with the disassembler that comes
with Triton.

``PLAN`` is everything that may be launched at these shapes, ``BRIEF`` the same with attention and
fused GEMMs in their heaviest form only. What is launched is known without compiling it
(``planned``).

Limits: no stack and no local memory, no atomics, tensor-core instructions in half precision where
there is a dot, shared memory of one block within the device, at least 8 resident warps per
multiprocessor.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import pkgutil
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fpdm.kernels
from fpdm.kernels import (
    adaln,
    adamw,
    attention,
    gate_residual,
    gemm,
    gemm_table,
    mlp,
    philox,
    rows,
    update,
)  # fmt: skip
from fpdm.steps import Guidance

TABLE = Path(__file__).parent / "tables" / "triton_resources.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
D, T, HEAD_SIZES = 1152, 256, (72, 96, 128)
# samples of one image with guidance, and more: each has another list of tiles
SMALL, BATCHES = 2, (2, 16, 64)
MIN_WARPS = 8
# per multiprocessor: shared memory, of which a block costs 1 KB more than it asks for; per block
SHARED = {80: (164 * 1024, 163 * 1024), 90: (228 * 1024, 227 * 1024)}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
TENSOR_CORES = {80: ("HMMA",), 90: ("HMMA", "HGMMA")}
# as nvdisasm calls them
ISA = {80: "SM80", 90: "SM90a"}
INSTRUCTION = 16  # bytes


class Key(NamedTuple):
    """What identifies a compiled kernel."""

    kernel: str
    arch: int
    types: str
    constants: str
    warps: int
    stages: int


class Resources(NamedTuple):
    """One compiled kernel: its key, and what was measured."""

    kernel: str
    arch: int
    types: str
    constants: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    resident: int
    instructions: dict[str, int]
    dot: bool

    @property
    def key(self) -> Key:
        """Everything but the measurements."""
        return Key(*self[:6])


class _Driver(SimpleNamespace):
    """Names an architecture; a device number of its own keeps Triton's caches apart."""

    def __init__(self, arch: int) -> None:
        super().__init__(
            get_current_device=lambda: arch,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )


@contextlib.contextmanager
def recording(arch: int) -> Iterator[dict[str, tuple[JITFunction, Any]]]:
    """Launches compile for ``arch`` and launch nothing; yields hash -> (function, kernel)."""
    found: dict[str, tuple[JITFunction, Any]] = {}
    original, before = JITFunction.run, driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = self, kernel
        return kernel

    # the attention launcher asks torch, which has no device here
    capability = mock.patch.object(attention, "_capability", return_value=divmod(arch, 10))
    with mock.patch.object(JITFunction, "run", run), capability:
        driver.set_active(_Driver(arch))
        try:
            yield found
        finally:
            driver._active = before


def _rows(batch: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, T, width, dtype=dtype)


def elementwise(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Launches the element-wise kernels, forward and backward."""
    z, y, dz = _rows(SMALL, D, residual), _rows(SMALL, D, dtype), _rows(SMALL, D, residual)
    vectors = torch.empty(SMALL, 6 * D, dtype=dtype).chunk(6, -1)
    sums = torch.empty(SMALL, 6 * D).chunk(6, -1)
    adaln.adaln(z, *vectors[:2])
    adaln.adaln_backward(y, z, vectors[1], dz, *sums[:2])
    gate_residual.gate_residual(z, y, vectors[2])
    gate_residual.gate_residual(z, y, vectors[2], prev=dz, norms=torch.empty(2, SMALL))
    gate_residual.gate_residual_adaln(z, y, vectors[2], *vectors[3:5])
    gate_residual.gate_residual_backward(dz, y, vectors[2], sums[2])
    mlp.gelu(y)
    mlp.gelu_backward(y, y)
    mlp.gelu_backward(y, y, total=torch.empty(y.shape))
    rows.add_column_sums(y.view(-1, D), sums[0][0])
    # the library's GEMM runs: a short one
    x, w, wide = _rows(SMALL, 16, dtype).zero_(), torch.zeros(2 * D, 16, dtype=dtype), 2 * D
    mlp.linear_add_gelu(x, w, _rows(SMALL, wide, dtype))
    mlp.linear_add_gelu(x, w, _rows(SMALL, wide, dtype), pre=_rows(SMALL, wide, dtype))
    if residual == dtype:
        w, g, m, v, e = (torch.empty(2**20) for _ in range(5))
        for copy in (None, torch.empty(2**20, dtype=dtype)):
            adamw.adamw_(w, g, m, v, e, copy, [0.5] * 10)


def sampling(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Launches the sampling step and random numbers, at 32x32 latents; no residual stream."""
    if residual != dtype:
        return
    keys, x, step = torch.zeros(SMALL, dtype=torch.int64), torch.empty(SMALL, 4, 32, 32), 0
    at = torch.zeros(1, dtype=torch.int64)
    for normal in (True, False):
        philox.draw(keys, at, step, 0, 4096, normal)
        philox.draw(keys, keys, at, 0, 4096, normal)
        # start noise; a counter beyond 31 bits is another type
        philox.draw(keys, 0, step, 1, 4096, normal)
        philox.draw(keys, 2**32 - 1, step, 1, 4096, normal)
    rows_ = torch.empty(28, 8)
    for o in (torch.empty(2 * SMALL, T, 32, dtype=kind) for kind in (dtype, torch.float32)):
        for guidance in (None, Guidance(4.0, 4, 0.0), Guidance(4.0, 3, 0.7)):
            tokens = o[:SMALL] if guidance is None else o
            update.update_(tokens, x, rows_, at, 2, guidance)
            update.update_(tokens, x, rows_, at, 2, guidance, keys)
            update.update_(tokens, x, rows_, at, 2, guidance, x0=torch.empty_like(x))
        update.update_(o, x, rows_, at, 2, Guidance(4.0, 4, 0.7), noise=x.clone(), x0=x.clone())


def attentions(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Launches attention, forward and backward; it has no residual stream."""
    if residual == dtype:
        for size in HEAD_SIZES:
            _attention(dtype, size)


def _attention(dtype: torch.dtype, size: int) -> None:
    qkv, y = _rows(SMALL, 3 * D, dtype), _rows(SMALL, D, dtype)
    attention.attention(qkv, D // size)
    attention.attention_backward(y, qkv, y, D // size)


def gemms(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Launches the fused GEMMs in every form, with every tile that may be chosen."""
    for keep, norms in itertools.product((False, True), repeat=2):
        _gemms(arch, dtype, residual, keep, norms)


def heaviest(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Launches what holds most registers: fused GEMMs with all that a training step keeps, norms
    and a float32 residual stream, attention at one size of heads."""
    if residual == torch.float32:
        _gemms(arch, dtype, residual, True, True)
    if residual == dtype:
        _attention(dtype, 128 if dtype == torch.float32 else 72)


def _gemms(arch: int, dtype: torch.dtype, residual: torch.dtype, keep: bool, norms: bool) -> None:
    for batch in BATCHES:
        x, z, wide = _rows(batch, D, dtype), _rows(batch, D, residual), _rows(batch, 4 * D, dtype)
        g, s, a = torch.empty(batch, 6 * D, dtype=dtype).chunk(6, -1)[:3]
        u, bias = _rows(batch, 2 * D, dtype), torch.empty(4 * D, dtype=dtype)
        weight = {n: torch.empty(n, D, dtype=dtype) for n in (D, 2 * D, 3 * D, 4 * D)}
        deep = torch.empty(D, 4 * D, dtype=dtype)
        y, pre, hidden = (torch.empty_like(t) if keep else None for t in (x, u, wide))
        prev, sums = (torch.empty_like(z), torch.empty(2, batch)) if norms else (None, None)
        tiles = partial(gemm_table.tiles, m=batch * T, dtype=dtype, arch=arch)
        for tile in tiles("adaln_linear", n=3 * D):
            gemm.adaln_linear(z, s, a, weight[3 * D], bias[: 3 * D], y, fused=tile)
        for tile in tiles("linear_add_gelu", n=2 * D):
            gemm.linear_add_gelu(x, weight[2 * D], u, pre, fused=tile)
        for tile in tiles("linear_bias_gelu", n=4 * D):
            gemm.linear_add_gelu(x, weight[4 * D], bias, hidden, fused=tile)
        for tile in tiles("linear_gate_residual", n=D):
            gemm.linear_gate_residual(
                wide, deep, bias[:D], z, g, p=y, prev=prev, norms=sums, fused=tile
            )
            if not norms:
                # behind attention, where nothing is measured
                gemm.linear_gate_residual(x, weight[D], bias[:D], z, g, p=y, fused=tile)


Plan = tuple[Callable[[int, torch.dtype, torch.dtype], None], ...]
BRIEF: Plan = (elementwise, sampling, heaviest)
PLAN: Plan = (elementwise, sampling, attentions, gemms)


def _launch(arch: int, plan: Iterable[Callable[..., None]]) -> None:
    for launches in plan:
        for dtype in DTYPES:
            for residual in dict.fromkeys((dtype, torch.float32)):
                launches(arch, dtype, residual)


def compiled(arch: int, plan: Iterable[Callable[..., None]] = PLAN) -> list[Resources]:
    """Resources of everything that ``plan`` launches, in the order of their names."""
    with recording(arch) as found:
        _launch(arch, plan)
    counted = instructions([kernel.asm["cubin"] for _, kernel in found.values()], arch)
    return sorted(
        resources(*pair, arch, count) for pair, count in zip(found.values(), counted, strict=True)
    )


def planned(arch: int, plan: Iterable[Callable[..., None]] = PLAN) -> set[Key]:
    """Keys of everything that ``plan`` launches; nothing is compiled."""

    def named(self: JITFunction, key: str, *args: Any) -> SimpleNamespace:
        signature, _, constants, options = args[:4]
        source = self.ASTSource(self, signature, constants, None)
        return SimpleNamespace(hash=(self.fn.__name__, key), src=source, metadata=options)

    with mock.patch.object(JITFunction, "_do_compile", named), recording(arch) as found:
        _launch(arch, plan)
    return {_key(*pair, arch) for pair in found.values()}


def _key(function: JITFunction, kernel: Any, arch: int) -> Key:
    meta, source = kernel.metadata, kernel.src
    names = function.arg_names
    # an i64 tells kernels apart: an integer beyond 31 bits
    types = [t for t in source.signature.values() if t.startswith(("*", "tensordesc", "i64"))]
    constants = {names[i]: v for (i, *_), v in source.constants.items()}
    return Key(
        kernel=f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}",
        arch=arch,
        types=" ".join(types),
        constants=" ".join(f"{n}={v}" for n, v in sorted(constants.items())),
        warps=meta.num_warps,
        stages=meta.num_stages,
    )


def resources(
    function: JITFunction, kernel: Any, arch: int, instructions: dict[str, int]
) -> Resources:
    """Reads a compiled kernel."""
    registers, stack = _usage(kernel.asm["cubin"])
    meta = kernel.metadata
    return Resources(
        *_key(function, kernel, arch),
        registers=registers,
        stack=stack,
        shared=meta.shared,
        resident=resident_warps(registers, meta.shared, meta.num_warps, arch),
        instructions=instructions,
        dot="tt.dot" in kernel.asm["ttir"],
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if sizes is None:
        raise RuntimeError(f"cuobjdump: got {usage!r}, expected REG and STACK")
    return int(sizes[1]), int(sizes[2])


def instructions(cubins: Sequence[bytes], arch: int) -> list[dict[str, int]]:
    """How often each instruction occurs in each. All go through one nvdisasm, end to end: it starts
    for 0.2 s and reads a kernel in 0.02."""
    parts = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(parts))
        file.flush()
        # without data flow: labels of branch targets are not needed
        listing = _tool("nvdisasm", "-ndf", "-b", ISA[arch], file.name)
    line = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)"
    names = re.findall(line, listing, re.M)
    if len(names) * INSTRUCTION != sum(map(len, parts)):
        raise RuntimeError(f"nvdisasm: got {len(names)} instructions, expected one for each 16 B")
    rest = iter(names)
    counts = (Counter(itertools.islice(rest, len(part) // INSTRUCTION)) for part in parts)
    return [dict(sorted(count.items())) for count in counts]


def _machine_code(cubin: bytes) -> bytes:
    """The text sections of an ELF file of 64 bits."""
    (table,), (size, count, names) = (
        struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58),
    )  # fmt: skip
    # name, type, flags, address, offset, size
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = heads[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in heads
        if cubin.startswith(b".text.", strings + name)
    )


def _tool(name: str, *options: str) -> str:
    command = [str(TOOLS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident_warps(registers: int, shared: int, warps: int, arch: int) -> int:
    """Warps of one multiprocessor that blocks of ``warps`` fill. Registers are given out 256 at a
    time to each warp, from four banks that each serve a quarter of the warps."""
    each = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // each * 4 // warps
    by_shared = SHARED[arch][0] // (shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps


def violations(r: Resources) -> list[str]:
    """Every limit that a kernel breaks, one line each."""
    count = r.instructions.get
    local = count("LDL", 0) + count("STL", 0)
    atomics = sum(count(n, 0) for n in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"))
    half = "fp16" in r.types or "bf16" in r.types
    cores = sum(count(n, 0) for n in TENSOR_CORES[r.arch])
    broken = {
        f"{r.stack} bytes of stack, expected none": r.stack,
        f"{local} accesses to local memory, expected none": local,
        f"{atomics} atomics, expected none": atomics,
        "no tensor-core instruction, expected some": r.dot and half and not cores,
        f"{r.shared} bytes of shared memory, expected at most {SHARED[r.arch][1]}": (
            r.shared > SHARED[r.arch][1]
        ),
        f"{r.resident} resident warps, expected at least {MIN_WARPS}": r.resident < MIN_WARPS,
    }
    where = f"{r.kernel} sm_{r.arch} {r.types} {r.constants} warps={r.warps} stages={r.stages}"
    return [f"{where}: {what}" for what, bad in broken.items() if bad]


def kernel_modules() -> list[ModuleType]:
    """Every module of fpdm.kernels that imports here."""
    found = []
    for module in pkgutil.iter_modules(fpdm.kernels.__path__, "fpdm.kernels."):
        # an optional package that is missing hides no Triton kernel
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(module.name))
    return found


def unlaunched(modules: Iterable[ModuleType], rows: Iterable[Resources]) -> set[str]:
    """Triton functions that no other one calls and that no row names."""
    functions = {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }
    called = {id(callee) for function in functions.values() for callee in _callees(function)}
    launched = {r.kernel for r in rows}
    return {n for n, f in functions.items() if n not in launched and id(f) not in called}


def _callees(function: JITFunction) -> Iterator[Any]:
    known = function.fn.__globals__
    for node in ast.walk(function.parse()):
        callee = node.func if isinstance(node, ast.Call) else None
        if isinstance(callee, ast.Name):
            yield known.get(callee.id)
        elif isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Name):
            yield getattr(known.get(callee.value.id), callee.attr, None)


def table(rows: Iterable[Resources]) -> str:
    """The committed form: one line for each kernel."""
    lines = [json.dumps(_committed(r)) for r in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _committed(r: Resources) -> dict[str, Any]:
    row = r._asdict()
    dots = {n: c for n, c in row.pop("instructions").items() if n in ("HMMA", "HGMMA")}
    return row | {"tensor": sum(dots.values())}


def committed() -> dict[Key, Resources]:
    """The kernels of the committed table, which counts no instruction but tensor cores'."""
    found = (
        Resources(instructions={TENSOR_CORES[row["arch"]][0]: row.pop("tensor")}, **row)
        for row in json.loads(TABLE.read_text())
    )
    return {r.key: r for r in found}


def main() -> int:
    """Entry point; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate")
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args()
    rows = [r for arch in ARCHITECTURES for r in compiled(arch)]
    for r in rows:
        print(
            f"{r.kernel:32} sm_{r.arch} {r.registers:3} registers {r.shared:6} shared "
            f"{r.resident:2} warps  {r.types} {r.constants} w{r.warps} s{r.stages}"
        )
    broken = [line for r in rows for line in violations(r)]
    broken += [f"{name}: never launched" for name in sorted(unlaunched(kernel_modules(), rows))]
    print("\n".join(broken) or f"{len(rows)} kernels within all limits")
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(rows))
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
