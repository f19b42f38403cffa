"""Every operator in plain PyTorch: the specification, the oracle and the fallback.

Runs on any device and dtype, float64 included, and imports nothing but torch. Shapes: B batch,
T tokens, D width, H heads, K = D/H, N rows. Activations are (B, T, width) and contiguous; shift,
scale and gate are (B, D) views with any batch stride. ``out`` buffers may be given by the caller,
who may alias them where a docstring allows it. Nothing here records an autograd graph: forward and
backward are separate functions, and the caller disables gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

LN_EPS = 1e-6


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None: it runs everywhere."""
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """y = x W^T + b.   x (B,T,I), weight (O,I), bias (O,) -> (B,T,O); ``out`` may have another
    dtype, and holds what was rounded to that of x before."""
    rows, wt = _rows(x), weight.t()
    if out is not None and out.dtype == x.dtype:
        flat = out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(rows, wt, out=flat)
        else:
            torch.addmm(bias, rows, wt, out=flat)
        return out
    y = torch.mm(rows, wt) if bias is None else torch.addmm(bias, rows, wt)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if out is None else out.copy_(y)


def linear_dgrad(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """dx = dy W.   dy (B,T,O), weight (O,I) -> (B,T,I); ``out`` may have another dtype."""
    rows = _rows(dy)
    if out is not None and out.dtype == dy.dtype:
        torch.mm(rows, weight, out=out.view(-1, out.shape[-1]))
        return out
    dx = torch.mm(rows, weight).view(*dy.shape[:-1], weight.shape[1])
    return dx if out is None else out.copy_(dx)


def linear_wgrad(dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    """dW += dy^T x, db += sum dy, in the accumulators' dtype (float32 for half-precision
    inputs). On a GPU the GEMM itself adds to a float32 accumulator (beta = 1); torch takes such a
    pair of dtypes from 2.10 on."""
    g, rows = _rows(dy), _rows(x)
    if dweight.dtype == g.dtype:
        dweight.addmm_(g.t(), rows)
    elif g.is_cuda and g.numel():
        torch.addmm(dweight, g.t(), rows, out_dtype=dweight.dtype, out=dweight)
    else:
        dweight.addmm_(g.t().to(dweight.dtype), rows.to(dweight.dtype))
    if dbias is not None:
        dbias.add_(g.sum(0, dtype=dbias.dtype))


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Tanh GELU: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). ``out`` may be x."""
    if out is None:
        return torch.nn.functional.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def gelu_backward(
    dy: Tensor, x: Tensor, out: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """dx = dy gelu'(x). ``out`` may be dy; ``total`` += dx, as it is stored, in the accumulators'
    dtype."""
    if out is None:
        out = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    else:
        torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=out)
    if total is not None:
        total.add_(out)
    return out


def linear_add_gelu(
    x: Tensor, weight: Tensor, addend: Tensor, pre: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """gelu(pre), pre = x W^T + u.   addend u: a bias (O,) or a tensor (B,T,O).

    ``pre`` receives the pre-activation (for the backward); it may be the same buffer as ``out``
    when the pre-activation is not wanted.
    """
    if addend.dim() == 1:
        pre = linear(x, weight, addend, out=pre)
    else:
        shape = (*x.shape[:-1], weight.shape[0])
        pre = x.new_empty(shape) if pre is None else pre
        torch.addmm(_rows(addend), _rows(x), weight.t(), out=pre.view(-1, shape[-1]))
    return gelu(pre, out=out)


def adaln(z: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """LN(z) (1 + scale) + shift, LN without affine, eps 1e-6.   z (B,T,D), shift, scale (B,D).

    The result has the dtype of ``scale`` (z may be a float32 residual stream).
    """
    xhat = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=LN_EPS).to(scale.dtype)
    return torch.addcmul(shift.unsqueeze(1), xhat, scale.unsqueeze(1) + 1, out=out)


def adaln_backward(
    dy: Tensor, z: Tensor, scale: Tensor, dz: Tensor, dshift: Tensor, dscale: Tensor
) -> None:
    """dz += LN'(dy (1 + scale)); dshift += sum_t dy; dscale += sum_t dy LN(z).

    dz (B,T,D) in z's dtype; dshift, dscale (B,D) float32 (float64 for float64 inputs), all
    accumulated.
    """
    native = torch.ops.aten.native_layer_norm
    xhat, mean, rstd = native(z, z.shape[-1:], None, None, LN_EPS)
    acc = dshift.dtype
    dshift.add_(dy.sum(1, dtype=acc))
    dscale.add_((dy.to(acc) * xhat).sum(1))
    dxhat = (dy * (scale.unsqueeze(1) + 1)).to(z.dtype)
    dz.add_(
        torch.ops.aten.native_layer_norm_backward(
            dxhat, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
    )


def gate_residual(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """z + gate y.   z, y (B,T,D), gate (B,D); ``out`` may be z.

    With ``prev`` and ``norms`` (2,B) float32, norms[0] = |out - prev| and norms[1] = |out| per
    sample (L2 over tokens and width): the residual of the fixed-point map, without a host sync.
    """
    out = torch.addcmul(z, y, gate.unsqueeze(1), out=out)
    if norms is not None and prev is not None:
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        flat = out.flatten(1)
        diff = torch.sub(flat, prev.flatten(1))
        norms[0].copy_(torch.linalg.vector_norm(diff, dim=1, dtype=wide))
        norms[1].copy_(torch.linalg.vector_norm(flat, dim=1, dtype=wide))
    return out


def gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, dgate: Tensor, out: Tensor | None = None
) -> Tensor:
    """dy = gate dout (in y's dtype); dgate += sum_t dout y.   dz is dout itself."""
    dgate.add_((dout.to(dgate.dtype) * y).sum(1))
    if out is None or out.dtype != torch.promote_types(dout.dtype, gate.dtype):
        dy = (dout * gate.unsqueeze(1)).to(y.dtype)
        return dy if out is None else out.copy_(dy)
    return torch.mul(dout, gate.unsqueeze(1), out=out)


def gate_residual_adaln(
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    z_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z' = z + gate y;  LN(z') (1 + scale) + shift.   ``z_out`` may be z."""
    z_new = gate_residual(z, y, gate, out=z_out)
    return z_new, adaln(z_new, shift, scale, out=out)


def adaln_linear(
    z: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None = None,
    out: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """y W^T + b, y = adaln(z).   z (B,T,D), weight (O,D) -> (B,T,O).

    The buffer ``y`` (B,T,D) holds adaln(z) afterwards if ``keep``; else its content is undefined.
    """
    return linear(adaln(z, shift, scale, out=y), weight, bias, out=out)


def linear_gate_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    gate: Tensor,
    p: Tensor | None = None,
    out: Tensor | None = None,
    prev: Tensor | None = None,
    norms: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """z + g p, p = x W^T + b.   x (B,T,I), weight (D,I), z (B,T,D); ``out`` may be z.

    The buffer ``p`` (B,T,D) holds the product afterwards if ``keep``. ``prev`` and ``norms`` as in
    ``gate_residual``.
    """
    p = linear(x, weight, bias, out=p)
    return gate_residual(z, p, gate, out=out, prev=prev, norms=norms)


def linear_gate_residual_adaln(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    p: Tensor | None = None,
    z_out: Tensor | None = None,
    out: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """z' = z + g p, p = x W^T + b;  LN(z') (1 + scale) + shift.   ``z_out`` may be z.

    The buffer ``p`` (B,T,D) holds the product afterwards if ``keep``.
    """
    p = linear(x, weight, bias, out=p)
    return gate_residual_adaln(z, p, gate, shift, scale, z_out=z_out, out=out)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _wide(x: Tensor) -> Tensor:
    # half precision is widened: scores overflow float16, and dp - delta cancels
    return x if x.dtype == torch.float64 else x.float()


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)


def _groups(qkv: Tensor, heads: int) -> list[slice]:
    """Heads in groups whose scores take at most half an activation: (H/n) T <= D/2."""
    _, t, width = qkv.shape
    n = next((n for n in range(1, heads) if heads % n == 0 and 6 * heads * t <= n * width), heads)
    size = heads // n
    return [slice(start, start + size) for start in range(0, heads, size)]


def attention(qkv: Tensor, heads: int, out: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v per head.   qkv (B,T,3D) packed as (3,H,K) -> (B,T,D)."""
    b, t, width = qkv.shape
    out = qkv.new_empty(b, t, width // 3) if out is None else out
    per_head = out.view(b, t, heads, width // (3 * heads)).transpose(1, 2)
    packed = _heads(qkv, heads)
    for part in _groups(qkv, heads):
        q, k, v = (_wide(x[:, part]) for x in packed)
        per_head[:, part].copy_(_probabilities(q, k) @ v)
    return out


def attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, heads: int, out: Tensor | None = None
) -> Tensor:
    """Gradient with respect to qkv, probabilities recomputed.   dy, y (B,T,D) -> (B,T,3D)."""
    out = torch.empty_like(qkv) if out is None else out
    packed, grads = _heads(qkv, heads), _heads(out, heads)
    split = (*dy.shape[:2], heads, packed[0].shape[-1])
    dy, y = dy.view(split).transpose(1, 2), y.view(split).transpose(1, 2)
    for part in _groups(qkv, heads):
        q, k, v = (_wide(x[:, part]) for x in packed)
        dq, dk, dv = (x[:, part] for x in grads)
        g, p = _wide(dy[:, part]), _probabilities(q, k)
        dv.copy_(p.transpose(-1, -2) @ g)
        # row sum of p dp = row sum of y dy
        delta = (g * _wide(y[:, part])).sum(-1, keepdim=True)
        ds = (g @ v.transpose(-1, -2)).sub_(delta).mul_(p).mul_(q.shape[-1] ** -0.5)
        dq.copy_(ds @ k)
        dk.copy_(ds.transpose(-1, -2) @ q)
    return out
