"""Which kernel computes the attention forward of the triton set: ours, torch's SDPA, flash-attn.

    triton            fpdm.kernels.attention; what runs where nothing was measured
    sdpa              torch.nn.functional.scaled_dot_product_attention; torch chooses its kernel
    sdpa-flash, sdpa-cudnn, sdpa-efficient      the same, with that kernel
    flash-attn        flash_attn_qkvpacked_func of the flash-attn package, where installed

All read the packed qkv (B,T,3,H,K) in place. Those of others allocate their result, and copying it
into the caller's buffer moves 2 U more (U = B T D elements); measured times include it.

FPDM_ATTENTION names a route; without it ``attention_table.json`` decides, the fastest that can run:

    {"t": 256, "k": 72, "dtype": "bfloat16", "device": "NVIDIA H200",
     "ms": {"triton": 0.06, "sdpa-cudnn": 0.07}, "source": "bench/results/..."}

``device`` is a name as the driver reports it, or an architecture ("sm_90"); a name comes first.

The backward is always ours. Theirs starts from the log-sum-exp of the rows, which no ledger of
fpdm.block stores: it would run their forward again (2 products) before its own 5, for K = 72 at 96
columns in flash attention; ours takes 8 products at 80 columns. And theirs is deterministic only
on request, so a choice made here can never make a gradient non-deterministic.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpdm.kernels import implementations
from fpdm.kernels.gemm_table import names
from fpdm.kernels.implementations import ImplError
from fpdm.kernels.launch import dtype_name

TABLE = Path(__file__).with_name("attention_table.json")
OURS = "triton"
WIDEST = 128  # columns of a head that our kernels take
_SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROUTES = (OURS, "sdpa", *_SDPA, "flash-attn")
GAIN = 0.98  # a route must take less than this of an earlier one's time to replace it
_REQUESTED = os.environ.get("FPDM_ATTENTION") or "auto"


def unmet(name: str, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None when a route can run, else the reason why not."""
    if _older(device):
        return f"it needs sm_80, not {names(device)[-1]}"
    if name == OURS and head_size > WIDEST:
        return f"its kernels take heads of at most {WIDEST}, not {head_size}"
    if name in (OURS, "sdpa"):
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if name == "sdpa-efficient":
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype_name(dtype)}"
    if head_size % 8:
        return f"it needs a head size in multiples of 8, not {head_size}"
    if name == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return None


def route(tokens: int, head_size: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """(name, why). Before sm_80 no set with routes runs: the name is that of the implementation
    which does. Raises ImplError when FPDM_ATTENTION names no route, or one that cannot run."""
    return _route(_REQUESTED, tokens, head_size, dtype, device)


@functools.cache
def _route(
    asked: str, tokens: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    if asked != "auto":
        if asked not in ROUTES:
            known = ", ".join(ROUTES)
            raise ImplError(f"FPDM_ATTENTION: got {asked!r}, expected auto or one of {known}")
        reason = unmet(asked, head_size, dtype, device)
        if reason is not None:
            raise ImplError(f"FPDM_ATTENTION: got {asked}, which cannot run: {reason}")
        return asked, "FPDM_ATTENTION asks for it"
    if _older(device):
        why = f"routes need sm_80, not {names(device)[-1]}"
        return implementations.choose("auto", device, dtype), why
    where = f"T={tokens}, K={head_size}, {dtype_name(dtype)}"
    for known_as in names(device):
        for entry in entries():
            key = entry["t"], entry["k"], entry["dtype"], entry["device"]
            if key == (tokens, head_size, dtype_name(dtype), known_as):
                return _fastest(entry, head_size, dtype, device)
    name = OURS if unmet(OURS, head_size, dtype, device) is None else "sdpa"
    return name, f"not measured for {where} on {names(device)[0]}"


def _fastest(
    entry: dict[str, Any], head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    ms: dict[str, float] = entry["ms"]
    reasons = {
        name: unmet(name, head_size, dtype, device) for name in sorted(ms, key=ms.__getitem__)
    }
    best = ms[next(n for n, reason in reasons.items() if reason is None)]
    # less is noise: the first of ROUTES then
    name = next(n for n in ROUTES if n in ms and GAIN * ms[n] <= best and reasons[n] is None)
    times = ", ".join(f"{n} {ms[n]:.3g} ms" for n in reasons)
    skipped = "".join(f"; {n} cannot run: {reason}" for n, reason in reasons.items() if reason)
    return name, f"measured on {entry['device']}: {times} ({entry['source']}){skipped}"


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    """The committed measurements. Raises ImplError for one that is not complete."""
    found = json.loads(TABLE.read_text())["entries"]
    for entry in found:
        if missing := {"t", "k", "dtype", "device", "ms", "source"} - set(entry):
            raise ImplError(f"{TABLE.name}: got an entry without {sorted(missing)}, expected all")
        if OURS not in entry["ms"] or set(entry["ms"]) - set(ROUTES):
            got, known = ", ".join(entry["ms"]), ", ".join(ROUTES)
            raise ImplError(f"{TABLE.name}: ms: got {got}, expected {OURS} and others of {known}")
    return tuple(found)


def run(name: str, qkv: Tensor, heads: int, out: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v into ``out`` (B,T,D) by a route other than ours."""
    b, t, width = qkv.shape
    packed = qkv.view(b, t, 3, heads, width // (3 * heads))
    if name == "flash-attn":
        package = importlib.import_module("flash_attn")
        return out.copy_(package.flash_attn_qkvpacked_func(packed).view_as(out))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    if name == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(_SDPA[name]):
            y = F.scaled_dot_product_attention(q, k, v)
    out.view(b, t, heads, width // (3 * heads)).copy_(y.transpose(1, 2))
    return out


def _older(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
