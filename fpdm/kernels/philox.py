"""The random numbers of ``fpdm.noise`` in one launch (Triton), words bit for bit.

    words    Philox4x32-10(counter = (element // 4, c1, c2, domain), key = 64-bit seed)
    normals  (z0, z1) = sqrt(-2 log((w0 + 1/2) / 2^32)) (cos, sin)(2 pi w1 / 2^32)
             (z2, z3) likewise of w2, w3

In plain PyTorch a call is some hundred launches, which take the host longer than a small step takes
the device. Normals are computed in float64 and agree with torch's but for float32 roundings that
fall between two neighbours. The angle is reduced in integers, so that sine and cosine are two short
polynomials: the library's keep a table of pi on the stack. Bytes: 4 or 8 a number, written once.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels.launch import Operand, cdiv, check

BLOCK = 256  # groups of four numbers to a program
TURN = tl.constexpr(2.0 * math.pi / 2**32)
INTEGERS = (torch.int64,)


@triton.jit
def words(key, b_group, c1, c2, domain):
    """The four words of the groups ``b_group`` (int64) under a 64-bit key; counters are scalars."""
    b_zero = b_group * 0
    b_c1 = (b_zero + c1).to(tl.uint32)
    b_c2 = (b_zero + c2).to(tl.uint32)
    b_domain = (b_zero + domain).to(tl.uint32)
    return tl.philox(key, b_group.to(tl.uint32), b_c1, b_c2, b_domain)


@triton.jit
def box_muller(b_w, b_turn):
    """Two normals, float64, from two words."""
    b_r = tl.sqrt(-2.0 * tl.log((b_w.to(tl.float64) + 0.5) * (2.0**-32)))
    # nearest quarter of a turn, and what is left: at most an eighth
    b_q = (b_turn + 0x20000000) >> 30
    b_x = (b_turn - (b_q << 30)).to(tl.int32, bitcast=True).to(tl.float64) * TURN
    b_xx = b_x * b_x
    # Taylor to x^18 / 18!, below half a unit in the last place
    b_cos = tl.full(b_x.shape, 1.0, tl.float64)
    b_sin = tl.full(b_x.shape, 1.0, tl.float64)
    for i in tl.static_range(16, 0, -2):
        b_cos = 1.0 - b_cos * b_xx * (1.0 / (i * (i - 1)))
        b_sin = 1.0 - b_sin * b_xx * (1.0 / (i * (i + 1)))
    b_sin = b_sin * b_x
    b_swap = (b_q & 1) == 1
    b_c = tl.where(b_swap, b_sin, b_cos)
    b_s = tl.where(b_swap, b_cos, b_sin)
    # quarters 1 and 2 have a negative cosine, 2 and 3 a negative sine
    b_c = tl.where(((b_q + 1) & 2) == 2, -b_c, b_c)
    b_s = tl.where((b_q & 2) == 2, -b_s, b_s)
    return b_r * b_c, b_r * b_s


@triton.jit
def normal_at(key, b_element, c1, c2, domain):
    """The normals of single elements (int64), float32: each computes its group."""
    b_w0, b_w1, b_w2, b_w3 = words(key, b_element // 4, c1, c2, domain)
    b_first = b_element % 4 < 2
    b_a, b_b = box_muller(tl.where(b_first, b_w0, b_w2), tl.where(b_first, b_w1, b_w3))
    return tl.where(b_element % 2 == 0, b_a, b_b).to(tl.float32)


@triton.jit(do_not_specialize=["c1", "c2", "domain", "n", "s_key", "s_c1", "s_c2"])
def philox_kernel(
    p_key, p_c1, p_c2, p_out, s_key, s_c1, s_c2, c1, c2, domain, n,
    C1_AT: tl.constexpr, C2_AT: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, 4 * BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_group = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(p_key + i_b * s_key)
    if C1_AT:
        c1 = tl.load(p_c1 + i_b * s_c1)
    if C2_AT:
        c2 = tl.load(p_c2 + i_b * s_c2)
    b_w0, b_w1, b_w2, b_w3 = words(key, o_group, c1, c2, domain)
    if NORMAL:
        b_0, b_1 = box_muller(b_w0, b_w1)
        b_2, b_3 = box_muller(b_w2, b_w3)
    else:
        b_0, b_1, b_2, b_3 = b_w0, b_w1, b_w2, b_w3
    # lanes hold groups: joined, a thread writes four neighbours
    b_z = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (4 * BLOCK,))
    o_z = (tl.program_id(0) % blocks).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    tl.store(p_out + i_b * n + o_z, b_z.to(p_out.dtype.element_ty), mask=o_z < n)


def draw(
    keys: Tensor, c1: int | Tensor, c2: int | Tensor, domain: int, count: int, normal: bool
) -> Tensor:
    """Elements 0..count-1 of the streams (B,count): words as int64, or normals as float32.

    keys (B,) int64; c1, c2 integers in [0, 2^32), or int64 tensors (B,) or (1,) whose low 32 bits
    count. Raises LaunchError for operands that the kernel cannot take.
    """
    b = len(keys)
    dtype = torch.float32 if normal else torch.int64
    out = torch.empty((b, count), dtype=dtype, device=keys.device)
    given = {name: c for name, c in (("c1", c1), ("c2", c2)) if isinstance(c, Tensor)}
    # rows of one element may lie at any distance, and one may serve all
    operands: list[Operand] = [("keys", keys.unsqueeze(-1), (b, 1), INTEGERS)]
    operands += [(name, c.expand(b).unsqueeze(-1), (b, 1), INTEGERS) for name, c in given.items()]
    check("philox", keys.device, operands, [("out", out, (b, count), (dtype,))])
    if not out.numel():
        return out
    strides = {name: c.expand(b).stride(0) for name, c in given.items()}
    # a launch goes to the current device
    with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
        philox_kernel[(b * cdiv(count, 4 * BLOCK),)](
            keys, given.get("c1", keys), given.get("c2", keys), out,
            keys.stride(0), strides.get("c1", 0), strides.get("c2", 0),
            0 if "c1" in given else c1, 0 if "c2" in given else c2, domain, count,
            C1_AT="c1" in given, C2_AT="c2" in given, NORMAL=normal, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
