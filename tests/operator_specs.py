"""What every operator takes, writes and accumulates, and the same in plain PyTorch.

The formulas are written here once more, independent of fpdm.kernels.reference: forward operators as
anybody would write them, backward operators by autograd of those. They run in any arithmetic: in
the operands' own dtypes, in float32, and in float64 as the oracle.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Values = dict[str, Tensor]
# (B,D) operands: chunks of (B,6D), in this order
VECTORS = ("shift", "scale", "gate")
# (B,T,D) operands in the dtype of the residual stream
STREAM = ("z", "z_out", "prev", "dz", "dout")
# not promised to anybody when the caller does not keep them
SCRATCH = ("y", "p", "pre")


@dataclass(frozen=True)
class Spec:
    """An operator. Operands are "name:shape name:shape", of letters B T D F, E for 3D, 2.

    ``outs`` are written, ``sums`` accumulated into. ``forms``: optional operands and arguments, by
    words (see ``Case.form``). ``aliases``: (output, operand that may be the same buffer).
    ``stream``: outputs in the residual dtype beside STREAM. ``exact``: float32 outputs that no
    half-precision intermediate may touch. ``norm``: the operand that is normalised.
    """

    plain: Callable[[Values, int], Values]
    inputs: str
    outs: str = ""
    sums: str = ""
    returns: tuple[str, ...] = ("out",)
    forms: tuple[str, ...] = ("",)
    aliases: tuple[tuple[str, str], ...] = ()
    stream: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    norm: str = ""


def shapes(operands: str) -> dict[str, str]:
    """Name -> letters."""
    return dict(o.split(":") for o in operands.split())  # type: ignore[misc]


def normed(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    xhat = F.layer_norm(z, z.shape[-1:], eps=1e-6).to(scale.dtype)
    return xhat * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attended(qkv: Tensor, heads: int) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).reshape(b, t, width // 3)


def smooth(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gated(z: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return z + gate.unsqueeze(1) * y


def gradients(fn: Callable[..., Tensor], dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    return torch.autograd.grad(fn(*leaves), leaves, dy)


def _linear(v: Values, _: int) -> Values:
    return {"out": F.linear(v["x"], v["weight"], v.get("bias"))}


def _dgrad(v: Values, _: int) -> Values:
    return {"out": v["dy"] @ v["weight"]}


def _wgrad(v: Values, _: int) -> Values:
    dy, x = v["dy"].flatten(0, 1), v["x"].flatten(0, 1)
    found = {"dweight": v["dweight"] + dy.t() @ x}
    return found | ({"dbias": v["dbias"] + dy.sum(0)} if "dbias" in v else {})


def _gelu_backward(v: Values, _: int) -> Values:
    dx = gradients(smooth, v["dy"], v["x"])[0]
    return {"out": dx, **({"total": v["total"] + dx} if "total" in v else {})}


def _add_gelu(v: Values, _: int) -> Values:
    pre = v["x"] @ v["weight"].t() + v["addend"]
    return {"pre": pre, "out": smooth(pre)}


def _adaln_backward(v: Values, _: int) -> Values:
    shift = torch.zeros_like(v["scale"])
    dz, dshift, dscale = gradients(normed, v["dy"], v["z"], shift, v["scale"])
    return {"dz": v["dz"] + dz, "dshift": v["dshift"] + dshift, "dscale": v["dscale"] + dscale}


def _with_norms(out: Tensor, v: Values) -> Values:
    if "prev" not in v:
        return {"out": out}
    both = torch.stack([(out - v["prev"]).flatten(1), out.flatten(1)])
    wide = both.to(torch.promote_types(both.dtype, torch.float32))
    return {"out": out, "norms": torch.linalg.vector_norm(wide, dim=2)}


def _gate_residual(v: Values, _: int) -> Values:
    return _with_norms(gated(v["z"], v["y"], v["gate"]), v)


def _gate_residual_backward(v: Values, _: int) -> Values:
    dout, y = v["dout"], v["y"]
    dy = (dout * v["gate"].unsqueeze(1)).to(y.dtype)
    return {"out": dy, "dgate": v["dgate"] + (dout * y).sum(1)}


def _gate_residual_adaln(v: Values, _: int) -> Values:
    z = gated(v["z"], v["y"], v["gate"])
    return {"z_out": z, "out": normed(z, v["shift"], v["scale"])}


def _attention(v: Values, heads: int) -> Values:
    return {"out": attended(v["qkv"], heads)}


def _attention_backward(v: Values, heads: int) -> Values:
    return {"out": gradients(lambda qkv: attended(qkv, heads), v["dy"], v["qkv"])[0]}


def _adaln_linear(v: Values, _: int) -> Values:
    y = normed(v["z"], v["shift"], v["scale"])
    return {"y": y, "out": F.linear(y, v["weight"], v["bias"])}


def _linear_gate_residual(v: Values, _: int) -> Values:
    p = F.linear(v["x"], v["weight"], v["bias"])
    return {"p": p, **_with_norms(gated(v["z"], p, v["gate"]), v)}


def _linear_gate_residual_adaln(v: Values, _: int) -> Values:
    p = F.linear(v["x"], v["weight"], v["bias"])
    return {"p": p, **_gate_residual_adaln({**v, "y": p}, 0)}


SPECS: dict[str, Spec] = {
    "linear": Spec(
        _linear, "x:BTD weight:FD bias:F", "out:BTF",
        forms=("", "no bias", "to float32"),
    ),
    "linear_dgrad": Spec(
        _dgrad, "dy:BTF weight:FD", "out:BTD", forms=("", "to float32"),
    ),
    "linear_wgrad": Spec(
        _wgrad, "dy:BTF x:BTD", sums="dweight:FD dbias:F", returns=(),
        forms=("", "no bias"), exact=("dweight", "dbias"),
    ),
    "gelu": Spec(lambda v, _: {"out": smooth(v["x"])}, "x:BTD", "out:BTD", aliases=(("out", "x"),)),
    "gelu_backward": Spec(
        _gelu_backward, "dy:BTD x:BTD", "out:BTD", "total:BTD", forms=("", "total"),
        aliases=(("out", "dy"),),
    ),
    "linear_add_gelu": Spec(
        _add_gelu, "x:BTF weight:DF addend:BTD", "pre:BTD out:BTD",
        forms=("", "bias", "without pre", "bias without pre"), aliases=(("pre", "out"),),
    ),
    "adaln": Spec(
        lambda v, _: {"out": normed(v["z"], v["shift"], v["scale"])},
        "z:BTD shift:BD scale:BD", "out:BTD", norm="z",
    ),
    "adaln_backward": Spec(
        _adaln_backward, "dy:BTD z:BTD scale:BD", sums="dz:BTD dshift:BD dscale:BD", returns=(),
        exact=("dshift",), norm="z",
    ),
    "gate_residual": Spec(
        _gate_residual, "z:BTD y:BTD gate:BD prev:BTD", "out:BTD norms:2B",
        forms=("", "norms"), aliases=(("out", "z"),), stream=("out",), exact=("out", "norms"),
    ),
    "gate_residual_backward": Spec(
        _gate_residual_backward, "dout:BTD y:BTD gate:BD", "out:BTD", "dgate:BD",
        exact=("dgate",),
    ),
    "gate_residual_adaln": Spec(
        _gate_residual_adaln, "z:BTD y:BTD gate:BD shift:BD scale:BD", "z_out:BTD out:BTD",
        returns=("z_out", "out"), aliases=(("z_out", "z"),), exact=("z_out",), norm="z_out",
    ),
    "attention": Spec(_attention, "qkv:BTE", "out:BTD"),
    "attention_backward": Spec(_attention_backward, "dy:BTD qkv:BTE y:BTD", "out:BTE"),
    "adaln_linear": Spec(
        _adaln_linear, "z:BTD shift:BD scale:BD weight:FD bias:F", "y:BTD out:BTF",
        forms=("", "without y", "y not kept"), norm="z",
    ),
    "linear_gate_residual": Spec(
        _linear_gate_residual, "x:BTF weight:DF bias:D z:BTD gate:BD prev:BTD",
        "p:BTD out:BTD norms:2B", forms=("", "norms", "norms without p", "norms p not kept"),
        aliases=(("out", "z"),), stream=("out",),
    ),
    "linear_gate_residual_adaln": Spec(
        _linear_gate_residual_adaln, "x:BTF weight:DF bias:D z:BTD gate:BD shift:BD scale:BD",
        "p:BTD z_out:BTD out:BTD", returns=("z_out", "out"),
        forms=("", "without p", "p not kept"), aliases=(("z_out", "z"),), norm="z_out",
    ),
}  # fmt: skip


def infinite_key(ops: Any, dtypes: Sequence[torch.dtype], device: str = "cpu") -> list[str]:
    """Gradients that are NaN other than where plain PyTorch's are, of a key to which no query
    attends, since its products are all -inf. Blocks are not full: what stands for a missing query
    is zeros, and their product with it is NaN."""
    found = []
    for dtype, t in itertools.product(dtypes, (7, 33, 65)):
        g = torch.Generator().manual_seed(t)
        qkv, dy = torch.randn(1, t, 3, 16, generator=g), torch.randn(1, t, 16, generator=g)
        qkv[:, :, 0].abs_().add_(0.1)
        qkv[0, 2, 1, 3] = float("-inf")
        flat = qkv.view(1, t, 48).to(dtype)
        y = attended(flat.float(), 1).to(dtype)
        there = (x.to(device) for x in (dy.to(dtype), flat, y))
        mine = ops.attention_backward(*there, 1).cpu().view(qkv.shape)
        (want,) = gradients(lambda x: attended(x, 1), dy, flat.float())
        wrong = mine.isnan() != want.view(qkv.shape).isnan()
        found += [f"{dtype} T={t} d{name}" for name, w in zip("qkv", wrong.unbind(2)) if w.any()]
    return found
