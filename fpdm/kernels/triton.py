"""The Triton operator set: our kernels between GEMMs of the library, or fused with them.

GEMMs are cuBLAS's; ``fpdm.kernels.gemm`` decides per shape, by its committed table, where one of
ours with its glue fused runs instead. ``fused=True`` asks for ours (the set ``triton-fused``).
Needs a CUDA device of capability 8.0 or newer and a C compiler (fpdm.kernels.toolchain); under
TRITON_INTERPRET=1 it runs on the CPU in float32 and float16, to be tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fpdm.kernels import reference, rows, toolchain
from fpdm.kernels.adaln import adaln, adaln_backward
from fpdm.kernels.attention import attention, attention_backward
from fpdm.kernels.gate_residual import gate_residual, gate_residual_adaln, gate_residual_backward
from fpdm.kernels.gemm import (
    adaln_linear,
    linear,
    linear_add_gelu,
    linear_gate_residual,
    linear_gate_residual_adaln,
)
from fpdm.kernels.launch import FLOATS, check, dtype_name, library
from fpdm.kernels.mlp import gelu, gelu_backward
from fpdm.kernels.reference import linear_dgrad

__all__ = [
    "adaln", "adaln_backward", "adaln_linear", "attention", "attention_backward", "gate_residual",
    "gate_residual_adaln", "gate_residual_backward", "gelu", "gelu_backward", "library", "linear",
    "linear_add_gelu", "linear_dgrad", "linear_gate_residual", "linear_gate_residual_adaln",
    "linear_wgrad", "unavailable",
]  # fmt: skip
WIDE = (torch.float32,)
# decided when the kernels were defined, whatever the environment says now
INTERPRETED = not isinstance(rows.load, triton.JITFunction)


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None where these kernels run on ``device`` in ``dtype``, else every reason why not."""
    reasons = []
    if INTERPRETED:
        if device.type != "cpu":
            reasons.append(f"device: got {device}, expected cpu under TRITON_INTERPRET=1")
    elif device.type != "cuda":
        reasons.append(f"device: got {device}, expected cuda (or cpu under TRITON_INTERPRET=1)")
    elif not torch.cuda.is_available():
        reasons.append("device: got no CUDA device, expected one")
    elif (found := torch.cuda.get_device_capability(device)) < (8, 0):
        reasons.append(f"capability: got {found[0]}.{found[1]}, expected 8.0 or newer")
    else:
        # the first kernel would fail with Triton's traceback
        reasons += toolchain.missing()
    # the interpreter's bfloat16 dot is wrong
    known = tuple(d for d in FLOATS if not (INTERPRETED and d == torch.bfloat16))
    if dtype is not None and dtype not in known:
        names = ", ".join(map(dtype_name, known))
        reasons.append(f"dtype: got {dtype_name(dtype)}, expected {names}")
    return "; ".join(reasons) or None


def linear_wgrad(dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    """dW += dy^T x, db += sum dy: see ``reference.linear_wgrad``.

    The bias is a kernel of ours: torch's reduction and its sum take twice the time.
    """
    g = dy.reshape(-1, dy.shape[-1]).contiguous()
    if dbias is not None:
        operand = ("dy", g, g.shape, FLOATS)
        check("linear_wgrad", dy.device, (operand,), (("dbias", dbias, g.shape[1:], WIDE),))
    reference.linear_wgrad(g, x, dweight, None)
    if dbias is not None:
        rows.add_column_sums(g, dbias)
