"""Which GEMM runs: ours with its glue fused, cuBLASLt's epilogue, or the library with our glue.

The answer is data: ``gemm_table.json`` beside this file, written by ``python -m bench.gemm`` on a
GPU. An entry says which route a measurement chose for one operator, a range of rows M = B T, one
N, K, dtype and device, and carries that measurement. Where nothing was measured the library runs.

    {"op": "linear_bias_gelu", "keep": false, "m": [8192, 32768], "n": 4608, "k": 1152,
     "dtype": "bfloat16", "device": "NVIDIA H200", "route": "fused",
     "tile": [128, 256, 64, 8, 3, true, true],
     "ms": {"library": 0.31, "fused": 0.29, "cublaslt": 0.3}, "source": "bench/results/..."}

``keep`` says whether y, pre or p is kept for a backward; linear_bias_gelu is linear_add_gelu with a
bias. ``at`` is the M that was measured: of two entries for a number of rows, that of these very
rows counts. ``algorithm`` is cuBLASLt's in the list of version ``cublas`` for that M
(fpdm.kernels.cublaslt).
``device`` is a name as the driver reports it, or a capability ("sm_90"); a name comes first.
Nothing here measures, and nothing depends on what ran before: a captured graph stays valid.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fpdm.kernels import cublaslt
from fpdm.kernels.launch import cdiv, dtype_name
from fpdm.settings import UserError

TABLE = Path(__file__).with_name("gemm_table.json")
OPERATORS = (
    "linear", "adaln_linear", "linear_add_gelu", "linear_bias_gelu", "linear_gate_residual",
    "linear_gate_residual_adaln",
)  # fmt: skip
# that cuBLASLt computes, where nothing is kept
CUBLASLT = ("linear", "linear_add_gelu", "linear_bias_gelu")
ROUTES = ("library", "fused", "cublaslt")
# streaming multiprocessors per architecture
PROCESSORS = {80: 108, 90: 132}


class TableError(UserError):
    """An entry of the table that cannot be used."""


class Tile(NamedTuple):
    """How a fused GEMM is cut: a block of m x n results, k products at a time, ``warps`` warps,
    ``stages`` buffers of operands in flight. ``tma``: operands through tensor memory descriptors
    (sm_90, aligned rows); ``persistent``: one program per processor walks over the blocks."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False


class Choice(NamedTuple):
    """A route, why, the tile that was measured (None: ``tiles(...)[0]``), and which of cuBLASLt's
    algorithms."""

    route: str
    reason: str
    tile: Tile | None = None
    algorithm: int = 0


# up to 64 sums a thread: every epilogue fits the registers beside them
_LARGE = {
    80: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(128, 64, 64, 4, 3)),
    90: (
        Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 3, tma=True, persistent=True),
        Tile(64, 128, 64, 4, 3, tma=True),
    ),
}
_SMALL = {
    80: (Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3)),
    90: (
        Tile(64, 128, 64, 4, 3, tma=True),
        Tile(64, 64, 64, 4, 4, tma=True),
        Tile(64, 64, 64, 4, 4),
    ),
}
# 128 sums a thread: more products per byte loaded, where prologue and epilogue are light enough.
# 128 x 256 of linear_bias_gelu spill on sm_90 where the pre-activation is kept
_HEAVY = {
    ("linear_add_gelu", 80): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3)),
    ("linear_bias_gelu", 80): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3)),
    ("linear_add_gelu", 90): (
        Tile(128, 256, 64, 8, 3, tma=True),
        Tile(128, 128, 64, 4, 3, tma=True),
    ),
    ("linear_bias_gelu", 90): (Tile(128, 128, 64, 4, 3, tma=True),),
    ("adaln_linear", 90): (Tile(128, 256, 64, 8, 3),),
}
# float32 has no tensor cores to feed here: its products are exact float32
_WIDE = (Tile(64, 64, 32, 4, 2),)


def tiles(op: str, m: int, n: int, dtype: torch.dtype, arch: int) -> tuple[Tile, ...]:
    """The tiles worth timing for m x n results, likeliest first; at most 8. At XL/2 shapes each
    passes the compile gate (bench.compile_gate) in every form of ``op``."""
    if dtype == torch.float32:
        return _WIDE
    # later ones of the consumer line have the shared memory of sm_86
    known = 90 if 90 <= arch < 120 else 80
    found: tuple[Tile, ...]
    if m * n < 2**22:
        found = _SMALL[known]
    else:
        found = _HEAVY.get((op, known), ()) + _LARGE[known]
    return tuple(sorted(found, key=lambda t: _waves(t, m, n, PROCESSORS[known])))


def _waves(tile: Tile, m: int, n: int, processors: int) -> float:
    """A guess at the time: rounds over all processors, times products and loads per block."""
    blocks = cdiv(m, tile.m) * cdiv(n, tile.n)
    work = tile.m * tile.n + 32 * (tile.m + tile.n)
    return cdiv(blocks, processors) * work


def choice(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device | str, keep: bool
) -> Choice:
    """What the committed table says for x (m,k) W^T (k,n) on ``device``, and why."""
    devices = names(torch.device(device))
    return _choice(op, m, n, k, dtype_name(dtype), keep, *devices)


@functools.cache
def names(device: torch.device) -> tuple[str, ...]:
    """What an entry may call ``device``, in the order in which they count."""
    if device.type != "cuda":
        return (device.type,)
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


@functools.cache
def _choice(op: str, m: int, n: int, k: int, dtype: str, keep: bool, *devices: str) -> Choice:
    # what was measured with these very rows before what stands for them
    nearest = sorted(entries(), key=lambda e: e.get("at") != m)
    for device in devices:
        for e in nearest:
            key = (e["op"], e["keep"], e["n"], e["k"], e["dtype"], e["device"])
            if key == (op, keep, n, k, dtype, device) and e["m"][0] <= m <= e["m"][1]:
                times = ", ".join(f"{route} {ms:.3g} ms" for route, ms in e["ms"].items())
                reason = f"measured on {device}: {times} ({e['source']})"
                tile = Tile(*e["tile"]) if e.get("tile") else None
                if e["route"] != "cublaslt":
                    return Choice(e["route"], reason, tile)
                return _cublaslt(e, m, reason)
    return Choice("library", f"not measured on {devices[0]} for {dtype} {m} x {n} x {k}")


def _cublaslt(e: dict[str, Any], m: int, reason: str) -> Choice:
    """What an entry that says cublaslt means for ``m`` rows and the version that is here.

    Another size, or version, has another list of algorithms. The first of it gains by its epilogue
    wherever it was measured, and nothing where there is none."""
    found = cublaslt.version()
    if found is None:
        return Choice("library", f"{reason}, but no cuBLASLt here")
    if (m, found) == (e.get("at"), e.get("cublas")):
        return Choice("cublaslt", reason, None, e["algorithm"])
    reason += f", at {e.get('at')} rows by version {e.get('cublas')}; here {m} and {found}"
    return Choice("library" if e["op"] == "linear" else "cublaslt", reason)


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    """The committed entries, checked. Raises TableError."""
    found = json.loads(TABLE.read_text())["entries"]
    for e in found:
        validate(e)
    return tuple(found)


def validate(entry: dict[str, Any]) -> None:
    """Raises TableError unless ``entry`` is complete and its route no slower than the library."""
    need = {"op", "keep", "m", "n", "k", "dtype", "device", "route", "ms", "source"}
    if missing := need - set(entry):
        raise TableError(f"gemm_table: got an entry without {sorted(missing)}, expected all")
    for name, known in (("op", OPERATORS), ("route", ROUTES)):
        if entry[name] not in known:
            raise TableError(f"gemm_table: {name}: got {entry[name]!r}, expected one of {known}")
    if entry["route"] == "cublaslt" and (entry["op"] not in CUBLASLT or entry["keep"]):
        got = f"{entry['op']}, keep {entry['keep']}"
        raise TableError(f"gemm_table: cublaslt: got {got}, expected {CUBLASLT}, nothing kept")
    ms = entry["ms"]
    if entry["route"] not in ms or "library" not in ms:
        raise TableError(f"gemm_table: ms: got {sorted(ms)}, expected library and the route's")
    if ms[entry["route"]] > ms["library"]:
        raise TableError(f"gemm_table: route: got {entry['route']}, slower than library in {ms}")
    if entry.get("tile") is not None and len(entry["tile"]) != len(Tile._fields):
        raise TableError(f"gemm_table: tile: got {entry['tile']}, expected {Tile._fields}")


def merge(
    path: Path, new: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> None:
    """Merges ``new`` into the entries of a table, one a line: an entry replaces that of its key."""
    merged = {key(e): e for e in (*json.loads(path.read_text())["entries"], *new)}
    lines = ",\n".join(f"    {json.dumps(merged[k])}" for k in sorted(merged))
    path.write_text('{\n  "entries": [\n' + lines + "\n  ]\n}\n")


def write(new: Sequence[dict[str, Any]], path: Path = TABLE) -> None:
    """Merges ``new`` into the table: an entry replaces one with the same key. Raises TableError."""

    def key(e: dict[str, Any]) -> tuple[Any, ...]:
        return e["op"], e["keep"], e["device"], e["dtype"], e["n"], e["k"], tuple(e["m"])

    for e in new:
        validate(e)
    merge(path, new, key)
    entries.cache_clear()
    _choice.cache_clear()
