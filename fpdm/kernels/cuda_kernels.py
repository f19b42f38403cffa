"""Every kernel of csrc/cuda that a launcher may choose: the one list that compiler, launcher, gate
and host shim share.

A kernel is named by its C++ name expression in namespace fpdm. Threads per block and bytes of
dynamic shared memory are not repeated here: they are constexpr in its traits, from which the
compiler (fpdm.kernels.cuda_compile) and the host shim read them. Imports no torch.

R: element type of the residual stream, C: of everything else; (R,C) is one of STREAMS.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product

HALF, FLOAT = "half_t", "float"
ELEMENTS = (HALF, FLOAT)
STREAMS = ((HALF, HALF), (FLOAT, HALF), (FLOAT, FLOAT))
# blocks that own whole rows, by the constants of columns.cuh, narrow first
BLOCKS = ("NARROW", "WIDE")
HEAD_SIZES = (12, 16, 24, 32, 64, 72, 80)
# (warps, keys in shared memory); the large one where it is the published models' head size
SMALL, LARGE = (2, 64), (8, 256)
LARGE_HEADS = (64, 72)

# parameter structs, in the format of Python's struct module
FORMATS = {
    "AdalnParams": "PPPPPPPqqqiiif",
    "AdalnBackwardParams": "PPPPPqiiif",
    "GateResidualParams": "PPPPPPqiii4x",
    "GateResidualBackwardParams": "PPPPPqiii4x",
    "GeluParams": "PPPPq",
    "ReduceColumnsParams": "PPPqqiiii",
    "ReduceNormsParams": "PPqii",
    "AttentionParams": "PPiif4x",
    "AttentionBackwardParams": "PPPPPiiff",
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation: its header csrc/cuda/<source>.cuh, the name expression, the traits with
    ``threads`` and ``smem_bytes()``, the parameter struct, and the constant in the traits that says
    how many rows a block owns, where that is fixed."""

    source: str
    name: str
    traits: str
    params: str
    rows: str = "threads"

    @property
    def numbers(self) -> tuple[str, str, str]:
        """C++ constants: threads per block at most, dynamic shared memory, rows per block."""
        t = self.traits
        return f"{t}::threads", f"{t}::smem_bytes()", f"{t}::{self.rows}"

    @property
    def tensor_cores(self) -> bool:
        """Whether its loop body is made of mma.m8n8k4."""
        return self.source in ("attention", "attention_backward")


def _flag(value: bool) -> str:
    return "true" if value else "false"


@functools.cache
def adaln(r: str, c: str, block: str, aligned: bool, gated: bool) -> Kernel:
    """adaln, or gate_residual_adaln when ``gated``."""
    name = f"adaln_kernel<{r}, {c}, {block}, {_flag(aligned)}, {_flag(gated)}>"
    return Kernel("adaln", name, f"AdalnTraits<{block}>", "AdalnParams")


@functools.cache
def adaln_backward(r: str, c: str, block: str, aligned: bool) -> Kernel:
    """adaln_backward up to the sums over runs of tokens."""
    name = f"adaln_backward_kernel<{r}, {c}, {block}, {_flag(aligned)}>"
    return Kernel("adaln", name, f"AdalnBackwardTraits<{block}>", "AdalnBackwardParams")


@functools.cache
def gate_residual(r: str, c: str, aligned: bool, norms: bool) -> Kernel:
    """gate_residual, with the sums of its norms over runs of tokens."""
    name = f"gate_residual_kernel<{r}, {c}, {_flag(aligned)}, {_flag(norms)}>"
    return Kernel("gate_residual", name, "GateResidualTraits", "GateResidualParams")


@functools.cache
def gate_residual_backward(r: str, c: str, aligned: bool) -> Kernel:
    """gate_residual_backward up to the sums over runs of tokens."""
    name = f"gate_residual_backward_kernel<{r}, {c}, {_flag(aligned)}>"
    return Kernel("gate_residual", name, "GateResidualTraits", "GateResidualBackwardParams")


@functools.cache
def gelu(form: str, c: str, aligned: bool) -> Kernel:
    """``form``: gelu, gelu_backward or add_gelu."""
    return Kernel("gelu", f"{form}_kernel<{c}, {_flag(aligned)}>", "GeluTraits", "GeluParams")


@functools.cache
def attention(form: str, head: int, shape: tuple[int, int]) -> Kernel:
    """On tensor cores, half precision. ``form``: attention, attention_dq or attention_dkv."""
    source = "attention" if form == "attention" else "attention_backward"
    traits = "".join(part.capitalize() for part in form.split("_")) + "Traits"
    arguments = f"<{head}, {shape[0]}, {shape[1]}>"
    params = "AttentionParams" if form == "attention" else "AttentionBackwardParams"
    return Kernel(source, f"{form}_kernel{arguments}", traits + arguments, params, rows="rows")


@functools.cache
def scalar_attention(form: str, head: int) -> Kernel:
    """The same in float32, without tensor cores."""
    which, params = "ScalarBackward", "AttentionBackwardParams"
    if form == "attention":
        which, params = "ScalarForward", "AttentionParams"
    name = f"scalar_{form}_kernel<{FLOAT}, {head}>"
    return Kernel("attention_scalar", name, f"{which}<{head}>", params, rows="edge")


REDUCE_COLUMNS = Kernel("reduce", "reduce_columns_kernel", "ReduceTraits", "ReduceColumnsParams")
REDUCE_NORMS = Kernel("reduce", "reduce_norms_kernel", "ReduceTraits", "ReduceNormsParams")


def _all() -> list[Kernel]:
    both = (True, False)
    forms = ("attention", "attention_dq", "attention_dkv")
    shapes = [(h, s) for h in HEAD_SIZES for s in (SMALL, LARGE) if s == SMALL or h in LARGE_HEADS]
    return [
        *(adaln(*s, block, *f) for s, block, *f in product(STREAMS, BLOCKS, both, both)),
        *(adaln_backward(*s, block, a) for s, block, a in product(STREAMS, BLOCKS, both)),
        *(gate_residual(*s, a, n) for s, a, n in product(STREAMS, both, both)),
        *(gate_residual_backward(*s, a) for s, a in product(STREAMS, both)),
        *(gelu(*f) for f in product(("gelu", "gelu_backward", "add_gelu"), ELEMENTS, both)),
        *(attention(form, *s) for form, s in product(forms, shapes)),
        *(scalar_attention(*f) for f in product(forms, HEAD_SIZES)),
        REDUCE_COLUMNS,
        REDUCE_NORMS,
    ]


KERNELS = tuple(_all())
SOURCES = tuple(dict.fromkeys(kernel.source for kernel in KERNELS))


def of_source(source: str) -> tuple[Kernel, ...]:
    """The kernels of one header, which are compiled together."""
    return tuple(kernel for kernel in KERNELS if kernel.source == source)
