"""From the final layer to the next timestep in one launch (Triton): unpatchify, guidance, step.

    v, u = unpatchify(o)                         prediction and variance channels
    g    = null + w (cond - null)                first ``guided`` channels; cond's elsewhere
    g   <- g + phi (r - 1) g,  r = std(cond) / std(g) per sample
    x0  <- a x + b g                             kept for the next step of a multistep table
    x   <- k x + p g + h x0' + s exp(l + m u) z  x0' of the step before, z ~ N(0, 1)

Equations and coefficients: fpdm.steps, whose float32 arithmetic this is; numbers: fpdm.noise. In
plain PyTorch 8 launches without noise and over a hundred with it. Bytes: the branches' tokens
once, x read and written once; under rescaling every program reads the guided channels twice more.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpdm.kernels import philox
from fpdm.kernels.launch import FLOATS, Operand, cdiv, check

if TYPE_CHECKING:
    from fpdm.steps import Guidance

BLOCK = 1024
COEFFICIENTS = 8  # of a row of ``steps.StepTable``
WIDE = (torch.float32,)


@triton.jit
def output_at(p_o, o_e, m_e, half, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr):
    """Elements ``o_e`` of (C,H,H) from the tokens of one sample (T, P P 2C), float32; ``half`` 0:
    the prediction, 1: the variance."""
    o_c = o_e // (H * H)
    o_y = o_e // H % H
    o_x = o_e % H
    o_t = o_y // P * (H // P) + o_x // P
    o_col = (o_y % P * P + o_x % P) * (2 * C) + half * C + o_c
    return tl.load(p_o + o_t * (P * P * 2 * C) + o_col, mask=m_e, other=0.0).to(tl.float32)


@triton.jit
def mixed_at(
    p_cond, p_null, o_e, m_e, scale, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """cond and null + w (cond - null), from the end that is nearer, as torch.lerp."""
    b_cond = output_at(p_cond, o_e, m_e, 0, C, H, P)
    b_null = output_at(p_null, o_e, m_e, 0, C, H, P)
    b_step = b_cond - b_null
    near = b_cond - b_step * (1.0 - scale)
    return b_cond, tl.where(scale < 0.5, b_null + scale * b_step, near)


@triton.jit
def ratio_of(
    p_cond, p_null, scale, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """std(cond) / std(mixed) over the guided channels of one sample."""
    n: tl.constexpr = GUIDED * H * H
    b_sum, b_mixed_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(0, n, BLOCK):
        o_e = i + tl.arange(0, BLOCK)
        b_cond, b_mixed = mixed_at(p_cond, p_null, o_e, o_e < n, scale, C, H, P)
        b_sum += b_cond
        b_mixed_sum += b_mixed
    mean, mixed_mean = tl.sum(b_sum) / n, tl.sum(b_mixed_sum) / n
    b_sum, b_mixed_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(0, n, BLOCK):
        o_e = i + tl.arange(0, BLOCK)
        b_cond, b_mixed = mixed_at(p_cond, p_null, o_e, o_e < n, scale, C, H, P)
        b_cond = tl.where(o_e < n, b_cond - mean, 0.0)
        b_mixed = tl.where(o_e < n, b_mixed - mixed_mean, 0.0)
        b_sum += b_cond * b_cond
        b_mixed_sum += b_mixed * b_mixed
    tiny: tl.constexpr = 1.1754943508222875e-38
    wanted, found = tl.sqrt_rn(tl.sum(b_sum) / (n - 1)), tl.sqrt_rn(tl.sum(b_mixed_sum) / (n - 1))
    # a NaN stays one
    return wanted / tl.where(found < tiny, tiny, found)


@triton.jit(do_not_specialize=["batch", "domain", "scale", "rescale"])
def update_kernel(
    p_o, p_x, p_rows, p_step, p_key, p_z, p_x0, batch, domain, scale, rescale,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, GUIDED: tl.constexpr,
    RESCALED: tl.constexpr, NOISE: tl.constexpr, MULTISTEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n: tl.constexpr = C * H * H
    blocks: tl.constexpr = (n + BLOCK - 1) // BLOCK
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < n
    p_cond = p_o + i_b * (2 * n)
    step = tl.load(p_step)
    p_row = p_rows + step * 8
    if GUIDED:
        p_null = p_cond + batch.to(tl.int64) * (2 * n)
        b_cond, b_g = mixed_at(p_cond, p_null, o_e, m_e, scale, C, H, P)
        if RESCALED:
            b_wanted = b_g * ratio_of(p_cond, p_null, scale, C, H, P, GUIDED, BLOCK)
            b_step = b_wanted - b_g
            near = b_wanted - b_step * (1.0 - rescale)
            b_g = tl.where(rescale < 0.5, b_g + rescale * b_step, near)
        b_g = tl.where(o_e < GUIDED * H * H, b_g, b_cond)
    else:
        b_g = output_at(p_cond, o_e, m_e, 0, C, H, P)
    p_here = i_b * n + o_e
    b_x = tl.load(p_x + p_here, mask=m_e, other=0.0)
    b_next = tl.load(p_row) * b_x + tl.load(p_row + 1) * b_g
    if MULTISTEP:
        b_next += tl.load(p_row + 5) * tl.load(p_x0 + p_here, mask=m_e, other=0.0)
        b_x0 = tl.load(p_row + 6) * b_x + tl.load(p_row + 7) * b_g
        tl.store(p_x0 + p_here, b_x0, mask=m_e)
    if NOISE != "none":
        b_u = output_at(p_cond, o_e, m_e, 1, C, H, P)
        if NOISE == "given":
            b_z = tl.load(p_z + p_here, mask=m_e, other=0.0)
        else:
            b_z = philox.normal_at(tl.load(p_key + i_b), o_e.to(tl.int64), step, 0, domain)
        b_std = tl.load(p_row + 2) * tl.exp(tl.load(p_row + 3) + tl.load(p_row + 4) * b_u)
        b_next += b_std * b_z
    tl.store(p_x + p_here, b_next, mask=m_e)


def update_(
    o: Tensor,
    x: Tensor,
    rows: Tensor,
    step: Tensor,
    patch: int,
    guidance: Guidance | None = None,
    keys: Tensor | None = None,
    domain: int = 0,
    noise: Tensor | None = None,
    x0: Tensor | None = None,
) -> None:
    """x (B,C,h,w) float32 becomes the next timestep's, as the module says; x0 likewise.

    o (G B,T,p p 2C): tokens of the final layer, conditional rows first, then with ``guidance``
    (G = 2) the null rows. rows (S,8) float32 of ``StepTable.rows``, of which ``step`` (1,) int64
    names one. z is ``noise`` (B,C,h,w), or where there are ``keys`` (B,) int64 the normals
    (key, c1 = step, c2 = 0, domain); without either none is added. x0 (B,C,h,w): a multistep
    table's. Raises LaunchError for operands that the kernel cannot take.
    """
    b, c, h, w = x.shape
    g = 1 if guidance is None else 2
    inputs: list[Operand] = [
        ("o", o, (g * b, (h // patch) * (w // patch), patch * patch * 2 * c), FLOATS),
        ("rows", rows, (len(rows), COEFFICIENTS), WIDE),
        ("step", step, (1,), philox.INTEGERS),
        ("keys", keys, (b,), philox.INTEGERS),
        ("noise", noise, (b, c, h, h), WIDE),
    ]
    check("update", x.device, inputs, [("x", x, (b, c, h, h), WIDE), ("x0", x0, x.shape, WIDE)])
    if not x.numel():
        return
    drawn = "none" if keys is None else "drawn"
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        update_kernel[(b * cdiv(c * h * w, BLOCK),)](
            o, x, rows, step, step if keys is None else keys, x if noise is None else noise,
            x if x0 is None else x0, b, domain,
            0.0 if guidance is None else guidance.scale,
            0.0 if guidance is None else guidance.rescale,
            C=c, H=h, P=patch, GUIDED=0 if guidance is None else guidance.channels,
            RESCALED=guidance is not None and guidance.rescale != 0.0
            and guidance.channels * h * h > 1,
            NOISE=drawn if noise is None else "given", MULTISTEP=x0 is not None, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
