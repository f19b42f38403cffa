"""Times the routes of attention's forward, and writes the table that chooses among them.

    python -m bench.attention --out FILE          heads of 72, 256 and 1024 tokens, fp16 and bf16
    python -m bench.attention --out FILE --write  ... and enters the times into attention_table.json

One process, interleaved, medians of graph replays; what a route allocates and copies is part of its
time. A route whose result is not ours to rounding is not timed. The backward is timed too, for the
record and with its launches: ours against autograd's through SDPA, which has the log-sum-exp of its
forward.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.timing import Arm, device_times, interleave
from fpdm.cli import run_main
from fpdm.kernels import attention, attention_routes
from fpdm.kernels.attention_routes import OURS
from fpdm.kernels.gemm_table import merge
from fpdm.kernels.launch import dtype_name
from fpdm.settings import UserError

HEADS, HEAD = 16, 72
# samples per token count: 151 MB of qkv and output, more than any L2 cache
SHAPES = {256: 64, 1024: 16}


def forward_arms(qkv: Tensor) -> tuple[dict[str, Arm], dict[str, str]]:
    """Route -> call, ours first; route -> why it is left out."""
    expected = attention.attention(qkv, HEADS)
    found: dict[str, Arm] = {OURS: partial(attention.attention, qkv, HEADS, out=expected.clone())}
    missing = {}
    for name in attention_routes.ROUTES[1:]:
        reason = attention_routes.unmet(name, HEAD, qkv.dtype, qkv.device)
        if reason is None:
            out = torch.empty_like(expected)
            call = partial(attention_routes.run, name, qkv, HEADS, out)
            try:
                error = ((call().double() - expected.double()).norm() / expected.norm()).item()
                if error <= 4 * torch.finfo(qkv.dtype).eps:
                    found[name] = call
                    continue
                reason = f"relative error {error:.1e}"
            except Exception as failure:
                reason = f"{type(failure).__name__}: {str(failure)[:200]}"
        missing[name] = reason
    return found, missing


def backward_arms(qkv: Tensor) -> dict[str, Arm]:
    """Ours, and the backward half of SDPA under autograd."""
    b, t, width = qkv.shape
    y, dy = attention.attention(qkv, HEADS), torch.randn_like(qkv[..., : width // 3])
    out = torch.empty_like(qkv)
    leaf = qkv.detach().clone().requires_grad_()
    q, k, v = leaf.view(b, t, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    back = dy.view(b, t, HEADS, HEAD).transpose(1, 2)
    return {
        OURS: partial(attention.attention_backward, dy, qkv, y, HEADS, out=out),
        "sdpa": partial(torch.autograd.grad, theirs, leaf, back, retain_graph=True),
    }


def entry(
    t: int, b: int, dtype: torch.dtype, device: torch.device, source: str, rounds: int
) -> dict[str, Any]:
    """What the table should say, with every time behind it."""
    torch.manual_seed(0)
    qkv = torch.randn(b, t, 3 * HEADS * HEAD, device=device, dtype=dtype)
    arms, missing = forward_arms(qkv)
    measured, uncaptured = device_times(arms, rounds)
    times = {n: x.median * 1e3 for n, x in measured.items()}
    back = {n: x.median * 1e3 for n, x in interleave(backward_arms(qkv), rounds).items()}
    return {
        "t": t, "k": HEAD, "dtype": dtype_name(dtype),
        "device": torch.cuda.get_device_name(device), "ms": times, "source": source, "batch": b,
        "heads": HEADS, "backward_ms": back, "missing": missing | uncaptured,
    }  # fmt: skip


def write(new: list[dict[str, Any]], path: Path = attention_routes.TABLE) -> None:
    """Merges into the committed table: an entry replaces one with the same key."""

    def key(e: dict[str, Any]) -> tuple[Any, ...]:
        return e["device"], e["dtype"], e["t"], e["k"]

    kept = ("t", "k", "dtype", "device", "ms", "source")
    if lost := [f"{e['dtype']} T={e['t']}" for e in new if OURS not in e["ms"]]:
        # such an entry would end every later use of the table
        raise UserError(f"{path.name}: got no time of {OURS} for {', '.join(lost)}, expected all")
    merge(path, [{n: e[n] for n in kept} for e in new], key)


def main(argv: list[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every time")
    parser.add_argument("--write", action="store_true", help="enter the times into the table")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("device: got no CUDA device, expected one")
    # what the table says now is not what is measured
    attention_routes._REQUESTED = OURS
    found = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for t, b in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16):
            device = torch.device("cuda", torch.cuda.current_device())
            found.append(entry(t, b, dtype, device, machine.committed(options.out), options.rounds))
            options.out.write_text(json.dumps(found, indent=1))
            print(json.dumps(found[-1]), flush=True)
            if options.write:
                write(found[-1:])
    return 0


if __name__ == "__main__":
    run_main("bench.attention", main)
