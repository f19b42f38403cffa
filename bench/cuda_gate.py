"""Compile gate of csrc/cuda without a GPU: what every kernel takes of a device.

    python -m bench.cuda_gate            prints a summary and what breaks a limit
    python -m bench.cuda_gate --write    ... and writes bench/tables/cuda_resources.json

Every instantiation that a launcher can choose goes through the compiler that the package is built
with (fpdm.kernels.cuda_compile), unless the package or the user's cache holds what that made of the
same sources; the machine code is read back with the disassembler in the triton wheel. Limits: no
stack, no local memory; shared memory of one block within the device, and within 96 KB; on sm_70 at
least 8 resident warps per multiprocessor in attention and 16 elsewhere, and four HMMA.884 for every
mma.m8n8k4 of the PTX, which tensor-core kernels have.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from fpdm.kernels import cuda_compile, cuda_kernels
from fpdm.kernels.cuda_kernels import Kernel

TABLE = Path(__file__).parent / "tables" / "cuda_resources.json"
ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
SHARED_LIMIT = 96 * 1024
MIN_WARPS = {"attention": 8, "other": 16}
# per multiprocessor: warps, shared memory, and what a block takes of it beside its own; per block
DEVICES = {
    "sm_70": (64, 96, 0, 96),
    "sm_75": (32, 64, 0, 64),
    "sm_80": (64, 164, 1, 163),
    "sm_90": (64, 228, 1, 227),
    "sm_100": (64, 228, 1, 227),
    "sm_120": (48, 100, 1, 99),
}
PARTITIONS, PARTITION_REGISTERS, REGISTER_UNIT, SHARED_UNIT, BLOCKS = 4, 16384, 256, 256, 32


class Resources(NamedTuple):
    """One kernel on one architecture; ``mma`` in the PTX, ``hmma`` and ``local`` in the SASS."""

    registers: int
    stack: int
    local: int
    threads: int
    smem: int
    warps: int  # resident on a multiprocessor
    hmma: int
    mma: int


Table = dict[str, dict[str, Resources]]


def tools() -> Path | None:
    """The folder with cuobjdump and nvdisasm, or None."""
    spec = importlib.util.find_spec("triton")
    root = Path(spec.origin).parent if spec and spec.origin else None
    folder = root / "backends" / "nvidia" / "bin" if root else None
    return folder if folder and (folder / "nvdisasm").exists() else None


def unavailable() -> str | None:
    """Why the gate cannot run here, or None."""
    if tools() is None:
        return "needs cuobjdump and nvdisasm of the triton wheel"
    try:
        version = cuda_compile.compiler_version()
    except cuda_compile.CompileError as error:
        return str(error)
    return None if version == "12.9" else f"got NVRTC {version}, expected 12.9"


def resident_warps(arch: str, registers: int, threads: int, smem: int) -> int:
    """Warps of whole blocks that fit a multiprocessor at once."""
    warps, shared, reserved, _ = DEVICES[arch]
    per_block = -(-threads // 32)
    unit = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = PARTITIONS * (PARTITION_REGISTERS // unit) if unit else warps
    taken = -(-smem // SHARED_UNIT) * SHARED_UNIT + reserved * 1024
    blocks = min(BLOCKS, min(warps, by_registers) // per_block)
    return per_block * (min(blocks, shared * 1024 // taken) if taken else blocks)


def _run(tool: str, *args: str) -> str:
    folder = tools()
    assert folder is not None
    done = subprocess.run([folder / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout


def read_back(code: bytes) -> dict[str, tuple[int, int, int, int]]:
    """Symbol -> (registers, stack, local memory instructions, HMMA.884) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(code)
        usage = _run("cuobjdump", "-res-usage", str(path))
        sass = _run("nvdisasm", "-c", str(path))
    sections = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),", sass, flags=re.MULTILINE)
    bodies = dict(zip(sections[1::2], sections[2::2]))
    found = {}
    for symbol, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        registers, stack = (int(re.findall(rf"{n}:(\d+)", line)[0]) for n in ("REG", "STACK"))
        body = bodies[symbol]
        local = len(re.findall(r"\b(?:LDL|STL)\b", body))
        found[symbol] = registers, stack, local, len(re.findall(r"\bHMMA\.884\b", body))
    return found


def products(
    source: str, kernels: Sequence[Kernel], included: Mapping[str, str] | None
) -> dict[str, int]:
    """Symbol -> number of mma.m8n8k4 in its PTX."""
    if not any(kernel.tensor_cores for kernel in kernels):
        return {}
    ptx = cuda_compile.build(source, "compute_70", kernels, included).code.decode("latin-1")
    parts = re.split(r"\.entry\s+(\w+)\s*\(", ptx)
    return {n: body.count("mma.sync.") for n, body in zip(parts[1::2], parts[2::2])}


def measure(
    source: str,
    arch: str,
    kernels: Sequence[Kernel] | None = None,
    included: Mapping[str, str] | None = None,
) -> dict[str, Resources]:
    """Resources of the kernels of one header, by name."""
    if kernels is None:
        # as a device gets it
        kernels = cuda_kernels.of_source(source)
        binary = cuda_compile.load(source, divmod(int(arch.removeprefix("sm_")), 10))
    else:
        binary = cuda_compile.build(source, arch, kernels, included)
    mma = products(source, kernels, included) if arch == "sm_70" else {}
    read, found = read_back(binary.code), {}
    for name, entry in binary.entries.items():
        registers, stack, local, hmma = read[entry.symbol]
        warps = resident_warps(arch, registers, entry.threads, entry.smem)
        products_of = mma.get(entry.symbol, 0)
        found[name] = Resources(
            registers, stack, local, entry.threads, entry.smem, warps, hmma, products_of
        )
    return found


def measure_all(architectures: Iterable[str] = ARCHITECTURES) -> Table:
    """Every kernel on every architecture."""
    # the heavy headers first
    sources = sorted(cuda_kernels.SOURCES, key=lambda s: -len(cuda_kernels.of_source(s)))
    jobs = list(product(architectures, sources))
    table: Table = {arch: {} for arch in architectures}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (arch, _), rows in zip(jobs, pool.map(lambda job: measure(job[1], job[0]), jobs)):
            table[arch] |= rows
    return table


def violations(table: Table, kernels: Iterable[Kernel] = cuda_kernels.KERNELS) -> list[str]:
    """Lines for what breaks a limit."""
    known = {kernel.name: kernel for kernel in kernels}
    return [
        f"{arch} {name}: {line}"
        for arch, rows in table.items()
        for name, row in rows.items()
        for line in _broken(arch, known[name], row)
    ]


def _broken(arch: str, kernel: Kernel, row: Resources) -> list[str]:
    checks = [
        (row.stack == 0, f"got {row.stack} bytes of stack, expected none"),
        (row.local == 0, f"got {row.local} LDL and STL, expected none"),
        (
            row.smem <= SHARED_LIMIT,
            f"got {row.smem} bytes of shared memory, expected 96 KB at most",
        ),
    ]
    own = DEVICES[arch][3] * 1024
    # a launcher takes the smaller blocks where the larger do not fit
    optional = str(cuda_kernels.LARGE)[1:-1] in kernel.name
    if not optional:
        checks.append((row.smem <= own, f"got {row.smem} bytes of shared memory, expected {own}"))
    if arch == "sm_70":
        least = MIN_WARPS["attention" if "attention" in kernel.source else "other"]
        checks += [
            (row.warps >= least, f"got {row.warps} resident warps, expected {least}"),
            (row.hmma == 4 * row.mma, f"got {row.hmma} HMMA.884, expected 4 x {row.mma}"),
            (bool(row.mma) == kernel.tensor_cores, f"got {row.mma} mma"),
        ]
    return [line for ok, line in checks if not ok]


def to_json(table: Table) -> str:
    """The committed form: one line per kernel."""
    lines = [f' "nvrtc": "{cuda_compile.compiler_version()}",']
    lines.append(f' "sources": "{cuda_compile.source_hash()}",')
    lines.append(f' "columns": {json.dumps(Resources._fields)},')
    for arch, rows in table.items():
        body = ",\n".join(f"  {json.dumps(n)}: {json.dumps(list(r))}" for n, r in rows.items())
        lines.append(f' "{arch}": {{\n{body}\n }},')
    lines[-1] = lines[-1].removesuffix(",")
    return "{\n" + "\n".join(lines) + "\n}\n"


def committed() -> tuple[dict[str, Any], Table]:
    """(heading, table) of the committed file."""
    data = json.loads(TABLE.read_text())
    rows = {arch: data.pop(arch) for arch in ARCHITECTURES}
    return data, {a: {n: Resources(*r) for n, r in found.items()} for a, found in rows.items()}


def summary(table: Table) -> str:
    """One line per header and architecture: extremes."""
    lines = [f"{'':24s}{'kernels':>8s}{'registers':>10s}{'shared':>8s}{'warps':>6s}{'HMMA':>6s}"]
    for arch, source in product(table, cuda_kernels.SOURCES):
        rows = [table[arch][kernel.name] for kernel in cuda_kernels.of_source(source)]
        worst = [max(r.registers for r in rows), max(r.smem for r in rows)]
        worst += [min(r.warps for r in rows), max(r.hmma for r in rows)]
        cells = f"{worst[0]:10d}{worst[1]:8d}{worst[2]:6d}{worst[3]:6d}"
        lines.append(f"{arch + ' ' + source:24s}{len(rows):8d}{cells}")
    return "\n".join(lines)


def main() -> int:
    """Prints the table's summary and violations; status 1 when there are some."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    args = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        parser.error(reason)
    table = measure_all()
    print(summary(table))
    broken = violations(table)
    print("\n".join(broken) or "no limit broken")
    if args.write and not broken:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(to_json(table))
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
