"""Kernels that break a limit of the compile gate each, and one that nobody launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def spilling(p_x, p_y, SIZE: tl.constexpr):
    """All values wait for the maximum of their row."""
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_x = tl.load(p_x + o).to(tl.float32)
    tl.store(p_y + o, b_x - tl.max(b_x, 1)[:, None])


@triton.jit
def atomic(p_x, p_sum, SIZE: tl.constexpr):
    """A sum over programs in the order in which they happen to end."""
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.atomic_add(p_sum + tl.arange(0, SIZE), tl.load(p_x + o).to(tl.float32))


@triton.jit
def greedy(p_x, p_y, SIZE: tl.constexpr):
    """Operands in flight for more shared memory than a block may have."""
    o = tl.arange(0, SIZE)
    b_y = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(0, 64):
        b_x = tl.load(p_x + i * SIZE * SIZE + o[:, None] * SIZE + o[None, :])
        b_y = tl.dot(b_x, b_x, b_y)
    tl.store(p_y + o[:, None] * SIZE + o[None, :], b_y)


@triton.jit
def helper(b_x):
    """Called by ``forgotten`` only."""
    return b_x + 1


@triton.jit
def forgotten(p_x):
    """In no list of launches."""
    tl.store(p_x, helper(tl.load(p_x)))


def launch_spilling(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """128 values of each thread, 64 registers."""
    x, y = torch.empty(128, 128, dtype=dtype), torch.empty(128, 128)
    spilling[(1,)](x, y, SIZE=128, num_warps=4, maxnreg=64)


def launch_atomic(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """One sum."""
    atomic[(4,)](torch.empty(512, dtype=dtype), torch.empty(128), SIZE=128)


def launch_greedy(arch: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    """Eight stages of 32 KB."""
    x, y = torch.empty(64, 128, 128, dtype=dtype), torch.empty(128, 128)
    greedy[(1,)](x, y, SIZE=128, num_warps=8, num_stages=9)
