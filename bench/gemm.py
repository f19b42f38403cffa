"""Times the fused GEMMs against the library with our glue, and writes the table that chooses.

    python -m bench.gemm --out FILE          XL/2, fp16 and bf16, batches of 2 to 256
    python -m bench.gemm --out FILE --write  ... and enters what was found into gemm_table.json
    python -m bench.gemm --out FILE --write --routes cublaslt    without our tiles to compile

For each operator, batch and form (anything kept for a backward, or nothing): the library, every
tile of fpdm.kernels.gemm_table.tiles and, where nothing is kept, the first algorithms of cuBLASLt
past torch; in one process, interleaved, medians of graph replays. A result that is not the
library's to rounding is not timed. An arm must gain 2 % to replace the library. --jobs compiles in
so many processes first: Triton keeps what they made on disk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import machine
from bench.timing import device_times
from fpdm.cli import run_main
from fpdm.kernels import cublaslt, gemm, gemm_table, reference
from fpdm.kernels.gemm_table import Tile
from fpdm.kernels.launch import dtype_name
from fpdm.settings import UserError

D, T = 1152, 256
# samples timed -> rows M that the result stands for
BATCHES = {
    2: (T, 4 * T),
    16: (4 * T + 1, 32 * T - 1),
    64: (32 * T, 256 * T),
    128: (128 * T, 128 * T),  # the sampler's batch, guided
    256: (256 * T, 1024 * T),
}
GAIN = 0.98
DTYPES = ("bfloat16", "float16")


class Shape(NamedTuple):
    """One GEMM: (B,T,K) to (B,T,N); ``keep``: what a backward wants is written too."""

    op: str
    b: int
    t: int
    n: int
    k: int
    dtype: torch.dtype
    keep: bool


def shapes(batch: int, dtype: torch.dtype) -> list[Shape]:
    """Every GEMM of one iteration at XL/2, with its glue and alone."""
    cuts = (
        ("adaln_linear", 3 * D, D), ("linear_add_gelu", 2 * D, D), ("linear_bias_gelu", 4 * D, D),
        ("linear_gate_residual_adaln", D, D), ("linear_gate_residual", D, 4 * D),
    )  # fmt: skip
    alone = [Shape("linear", batch, T, i * D, k, dtype, False)
             for i, k in ((3, D), (1, D), (1, 2 * D), (1, 4 * D))]  # fmt: skip
    found = [Shape(op, batch, T, n, k, dtype, keep) for op, n, k in cuts for keep in (False, True)]
    return [*alone, *found]


def routes_of(s: Shape) -> set[str]:
    """Those it can take beside the library."""
    found = set() if s.op == "linear" else {"fused"}
    return found | ({"cublaslt"} if s.op in gemm_table.CUBLASLT and not s.keep else set())


# of an entry, that the table leaves to the file of every time
DETAILS = ("all_ms", "refused")
Arms = dict[str, tuple[Tile | None, Callable[[], Any]]]


def arms(s: Shape, device: torch.device) -> tuple[Arms, list[Tensor]]:
    """Name -> (tile, function): ``library`` first, ``fused i`` with the i-th tile, ``cublaslt i``
    with its i-th algorithm; and the buffers that every one of them must write."""
    # drawn there: a CPU takes seconds over 300 M numbers
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=device).mul_(scale).to(s.dtype)

    x, out = normal(s.b, s.t, s.k), normal(s.b, s.t, s.n)
    weight, bias, extra = normal(s.n, s.k, scale=s.k**-0.5), normal(s.n), torch.empty_like(out)
    shift, scale, gate, *_ = normal(s.b, 6 * max(s.n, s.k), scale=0.5).chunk(6, -1)
    kept = extra if s.keep else None
    arch = gemm.architecture()
    found: Arms = {}
    library: Callable[..., Any]
    fused: Callable[..., Any] | None
    written = [out, *([extra] if s.keep else [])]
    u = normal(s.b, s.t, s.n) if s.op == "linear_add_gelu" else bias
    if s.op == "linear":
        library, fused = partial(reference.linear, x, weight, bias, out), None
    elif s.op == "adaln_linear":
        y = torch.empty_like(x)
        written = [out, *([y] if s.keep else [])]
        shift, scale = shift[:, : s.k], scale[:, : s.k]
        library = partial(
            gemm.adaln_linear, x, shift, scale, weight, bias, y=y, out=out, fused=False
        )
        fused = partial(
            gemm.adaln_linear, x, shift, scale, weight, bias, y if s.keep else None, out
        )
    elif s.op == "linear_gate_residual_adaln":
        z, (g1, s2, a2) = normal(s.b, s.t, s.n), (v[:, : s.n] for v in (gate, shift, scale))
        z_out = torch.empty_like(out)
        written = [out, z_out, *([extra] if s.keep else [])]
        both = partial(gemm.linear_gate_residual_adaln, x, weight, bias, z, g1, s2, a2)
        library = partial(both, extra, z_out, out, fused=False)
        fused = partial(both, kept, z_out, out)
    elif s.op == "linear_gate_residual":
        z, gate = normal(s.b, s.t, s.n), gate[:, : s.n]
        library = partial(
            gemm.linear_gate_residual, x, weight, bias, z, gate, p=extra, out=out, fused=False
        )
        fused = partial(gemm.linear_gate_residual, x, weight, bias, z, gate, kept, out)
    else:
        pre = out if kept is None else kept
        library = partial(gemm.linear_add_gelu, x, weight, u, pre=pre, out=out, fused=False)
        fused = partial(gemm.linear_add_gelu, x, weight, u, kept, out)
    found["library"] = None, library
    if fused is not None:
        tiles = gemm_table.tiles(s.op, s.b * s.t, s.n, s.dtype, arch)
        found |= {f"fused {i}": (tile, partial(fused, fused=tile)) for i, tile in enumerate(tiles)}
    if "cublaslt" in routes_of(s) and device.type == "cuda":
        call = partial(cublaslt.linear, x, weight, u, out, gelu=s.op != "linear")
        for i in range(cublaslt.ALGORITHMS):
            found[f"cublaslt {i}"] = None, partial(call, algorithm=i)
    return found, written


def agreeing(
    found: Arms, written: list[Tensor]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Arms that write what the library writes, to rounding; why the others are left out. The
    buffers are NaN before every arm: what it does not write is not what the last one left."""
    good: dict[str, Callable[[], Tensor]] = {}
    refused: dict[str, str] = {}
    expected: list[Tensor] = []
    for name, (_, fn) in found.items():
        for buffer in written:
            buffer.fill_(torch.nan)
        try:
            fn()
            results = [buffer.double() for buffer in written]
        except Exception as reason:
            refused[name] = f"{type(reason).__name__}: {str(reason)[:200]}"
            continue
        expected = expected or results
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected)]
        if all(error <= 4 * torch.finfo(written[0].dtype).eps for error in errors):
            good[name] = fn
        else:
            refused[name] = f"relative errors {' '.join(f'{e:.1e}' for e in errors)}"
    return good, refused


def entry(
    s: Shape, rows: tuple[int, int], device: torch.device, source: str, rounds: int,
    routes: Sequence[str] = gemm_table.ROUTES,
) -> dict[str, Any]:  # fmt: skip
    """What the table should say for ``s`` among ``routes``, with every time behind it."""
    found, written = arms(s, device)
    found = {name: arm for name, arm in found.items() if name.split()[0] in ("library", *routes)}
    good, refused = agreeing(found, written)
    measured, uncaptured = device_times({**good}, rounds)
    times, refused = {n: t.median * 1e3 for n, t in measured.items()}, refused | uncaptured
    best: dict[str, str] = {}
    for route in gemm_table.ROUTES:
        if mine := [name for name in times if name.split()[0] == route]:
            best[route] = min(mine, key=times.__getitem__)
    ms = {route: times[name] for route, name in best.items()}
    route = min(ms, key=ms.__getitem__)
    if ms[route] > GAIN * ms["library"]:
        route = "library"
    tile = found[best["fused"]][0] if "fused" in best else None
    algorithm = {}
    if "cublaslt" in best:
        number = int(best["cublaslt"].split()[1])
        algorithm = {"algorithm": number, "cublas": cublaslt.version()}
    return {
        "op": s.op, "keep": s.keep, "m": list(rows), "at": s.b * s.t, "n": s.n, "k": s.k,
        "dtype": dtype_name(s.dtype), "device": gemm_table.names(device)[0],
        "route": route, "tile": tile and list(tile), **algorithm, "ms": ms, "source": source,
        "all_ms": times, "refused": refused,
    }  # fmt: skip


def compile_only(s: Shape, part: int, parts: int) -> None:
    """Every ``parts``-th arm once, so that its kernels are in Triton's cache."""
    found, written = arms(s, torch.device("cuda"))
    compiled = [name for name in found if name.startswith("fused")]
    agreeing({name: found[name] for name in ("library", *compiled[part::parts])}, written)


def compile_all(wanted: list[Shape], jobs: int) -> None:
    """Compiles for all shapes in ``jobs`` processes."""
    # the kernels are the same for every batch of one kind: see gemm_table.tiles
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(compile_only, *zip(*((s, i, 3) for s in wanted for i in range(3)))))


def main(argv: list[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.gemm", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every time")
    parser.add_argument("--write", action="store_true", help="enter the routes into the table")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--routes", nargs="+", default=list(gemm_table.ROUTES), choices=gemm_table.ROUTES,
        help="what is compared with the library and entered; operators that have none of them "
        "keep their entries",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile first")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("device: got no CUDA device, expected one")
    device, found = torch.device("cuda"), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        s for b in options.batches for d in options.dtypes for s in shapes(b, getattr(torch, d))
    ]
    wanted = [s for s in wanted if routes_of(s) & set(options.routes)]
    if options.jobs:
        compile_all(wanted, options.jobs)
    for s in wanted:
        which = BATCHES[s.b], device, machine.committed(options.out), options.rounds, options.routes
        found.append(entry(s, *which))
        options.out.write_text(json.dumps(found, indent=1))
        print(json.dumps(found[-1]), flush=True)
        if options.write:
            # at once: a time limit may end this before the last shape
            gemm_table.write([{k: v for k, v in found[-1].items() if k not in DETAILS}])
    return 0


if __name__ == "__main__":
    run_main("bench.gemm", main)
