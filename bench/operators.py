"""Rows of single operators, forward and backward, and of the parts of one iteration.

Every call lists the tensors that it must read and write, each once and without cache credit: the
bytes of a row are theirs. Small models stay in the caches of a CPU, so that a row can beat the copy
ceiling. What an operator overwrites in place, or adds to, counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench import cost, published
from bench.rows import OURS, Arms, Row, Setting, randomised
from bench.timing import Arm
from fpdm.block import forward_workspace, step_forward
from fpdm.config import ModelConfig
from fpdm.kernels import implementations
from fpdm.weights import PreparedWeights

# a row of single kernels
single = partial(Row, pooled=True, replayed=True)
# the calls of block.step_forward with injection, in order
PARTS = (
    "fc1 injection, gelu", "fc2 injection", "adaln, qkv", "attention", "proj, gate, adaln",
    "fc1, gelu", "fc2, gate",
)  # fmt: skip
# buffers that an operator may fill on its way, and that nothing has to read
_SCRATCH = ("pre", "p", "y")


@dataclass(frozen=True)
class Call:
    """``fn``, the tensors it must read and those it must write."""

    fn: Arm
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """What crosses the memory bus at least."""
        return sum(t.nbytes for t in (*self.reads, *self.writes))


def tensors(s: Setting) -> dict[str, Tensor]:
    """Operands and results of every operator."""
    torch.manual_seed(0)
    b, t, d = s.batch, s.config.tokens, s.config.hidden_size
    like: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
    found = {n: torch.randn(b, t, d, **like) for n in ("z", "y", "dy", "out", "dz")}
    found |= {n: torch.randn(b, t, 4 * d, **like) for n in ("wide", "dwide", "wide_out")}
    found |= {n: torch.randn(b, t, 3 * d, **like) for n in ("qkv", "dqkv")}
    found["mod"] = torch.randn(b, 6 * d, **like)
    found["dmod"] = torch.zeros(b, 6 * d, device=s.device)
    # pre-activations of about 1: where GELU underflows, denormal numbers are what is timed
    found["w"] = torch.randn(4 * d, d, **like) / d**0.5
    found["bias"] = torch.randn(4 * d, **like)
    found["dw"], found["db"] = torch.zeros(4 * d, d, device=s.device), found["bias"].float()
    return found


def calls(o: Any, v: dict[str, Tensor], heads: int) -> dict[str, Call]:
    """Every operator of the set ``o`` on ``tensors``."""
    shift, scale, gate, *_ = v["mod"].chunk(6, -1)
    dshift, dscale, dgate, *_ = v["dmod"].chunk(6, -1)
    z, y, out, dz, dy, qkv, dqkv = (v[n] for n in ("z", "y", "out", "dz", "dy", "qkv", "dqkv"))
    wide, dwide, wide_out, w, bias = (v[n] for n in ("wide", "dwide", "wide_out", "w", "bias"))
    dw, db = v["dw"], v["db"]
    return {
        "adaln": Call(
            lambda: o.adaln(z, shift, scale, out=out), (z, shift, scale), (out,)),
        "adaln_backward": Call(
            lambda: o.adaln_backward(dy, z, scale, dz, dshift, dscale),
            (dy, z, scale, dz, dshift, dscale), (dz, dshift, dscale)),
        "gate_residual": Call(
            lambda: o.gate_residual(z, y, gate, out=out), (z, y, gate), (out,)),
        "gate_residual_backward": Call(
            lambda: o.gate_residual_backward(dy, y, gate, dgate, out=out),
            (dy, y, gate, dgate), (dgate, out)),
        "gate_residual_adaln": Call(
            lambda: o.gate_residual_adaln(z, y, gate, shift, scale, z_out=dz, out=out),
            (z, y, gate, shift, scale), (dz, out)),
        "gelu": Call(lambda: o.gelu(wide, out=wide_out), (wide,), (wide_out,)),
        "gelu_backward": Call(
            lambda: o.gelu_backward(dwide, wide, out=wide_out), (dwide, wide), (wide_out,)),
        "linear_add_gelu": Call(
            lambda: o.linear_add_gelu(z, w, bias, pre=wide, out=wide_out),
            (z, w, bias), (wide, wide_out)),
        "linear_wgrad": Call(
            lambda: o.linear_wgrad(dwide, z, dw, db), (dwide, z, dw, db), (dw, db)),
        "attention": Call(lambda: o.attention(qkv, heads, out=out), (qkv,), (out,)),
        "attention_backward": Call(
            lambda: o.attention_backward(dy, qkv, y, heads, out=dqkv), (dy, qkv, y), (dqkv,)),
    }  # fmt: skip


# the names of ``calls``
OPERATORS = (
    "adaln", "adaln_backward", "gate_residual", "gate_residual_backward", "gate_residual_adaln",
    "gelu", "gelu_backward", "linear_add_gelu", "linear_wgrad", "attention", "attention_backward",
)  # fmt: skip


def flops(name: str, config: ModelConfig, batch: int) -> int:
    """Of the products in an operator of ``calls``."""
    t, d = config.tokens, config.hidden_size
    gemm, head = 8 * batch * t * d * d, 2 * batch * t * t * d
    return {
        "linear_add_gelu": gemm, "linear_wgrad": gemm,
        "attention": 2 * head, "attention_backward": 5 * head,
    }.get(name, 0)  # fmt: skip


def operators(s: Setting) -> Iterator[Row]:
    """Each operator, forward and backward, against the plain one."""
    heads = s.config.num_heads

    def build(name: str) -> Arms:
        v = tensors(s)
        ours = calls(implementations.resolve("auto", s.device, s.dtype), v, heads)[name]
        plain = calls(implementations.resolve("reference", s.device), v, heads)[name]
        count = flops(name, s.config, s.batch)
        return Arms(
            {OURS: ours.fn, "plain PyTorch": plain.fn}, count, ours.bytes, dtype=s.dtype
        )  # fmt: skip

    for name in OPERATORS:
        yield single("operators", f"{s.name} {name}", partial(build, name), 31, 1.0)


class Recorder:
    """An operator set that runs ``reference`` and remembers every call."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return getattr(self.reference, name)(*args, **kwargs)

        return call


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of operands and results of a recorded call; of buffers that are not kept, none."""
    wanted = [x for n, x in kwargs.items() if n not in (*_SCRATCH, "prev", "norms")]
    return sum(x.nbytes for x in (*args, *wanted) if isinstance(x, Tensor))


def iteration(s: Setting) -> Iterator[Row]:
    """Each call of one iteration without gradient, and the whole of it."""
    heads = s.config.num_heads

    def state() -> SimpleNamespace:
        # nothing but the iterated block
        model = randomised(replace(s.config, pre_depth=0, post_depth=0), s.device)
        b, t, d = s.batch, s.config.tokens, s.config.hidden_size
        like: dict[str, Any] = {"dtype": s.dtype, "device": s.device}
        shapes = ((b, t, d), (b, t, 2 * d), (b, 6 * d))
        x, u, mod = (torch.randn(shape, **like) for shape in shapes)
        block = PreparedWeights(model, s.dtype).block("block_fixed_point", injected=True)
        acts = forward_workspace(x, s.dtype, "full")
        acts.z = acts.z2 = out = torch.empty_like(x)
        return SimpleNamespace(model=model, x=x, mod=mod, args=(x, u, mod, block, heads, acts, out))

    def part(index: int) -> Arms:
        v = state()
        recorder = Recorder(implementations.resolve("reference", s.device))
        with torch.no_grad():
            step_forward(recorder, *v.args)
        name, args, kwargs = recorder.calls[index]
        ours, plain = (implementations.resolve(i, s.device, s.dtype) for i in ("auto", "reference"))
        run: dict[str, Arm | str] = {
            OURS: lambda: getattr(ours, name)(*args, **kwargs),
            "plain PyTorch": lambda: getattr(plain, name)(*args, **kwargs),
        }
        products = [p for p in cost.iteration(s.config, s.batch) if p.kind != "elementwise"]
        return Arms(run, products[index].flops, _moved(args, kwargs), dtype=s.dtype)

    def whole() -> Arms:
        v = state()
        ours, plain = (implementations.resolve(i, s.device, s.dtype) for i in ("auto", "reference"))
        weights = {k: p.detach().to(s.dtype) for k, p in v.model.state_dict().items()}
        i, c = (torch.randn_like(v.x), torch.randn_like(v.mod[:, : v.x.shape[-1]]))

        def theirs() -> None:
            with torch.no_grad():
                published.fixed_point_map(weights, v.x, i, c, heads)

        run: dict[str, Arm | str] = {
            OURS: lambda: step_forward(ours, *v.args),
            "plain PyTorch": lambda: step_forward(plain, *v.args),
            "published eager": theirs,
        }
        parts = cost.iteration(s.config, s.batch, s.dtype.itemsize, "fused")
        return Arms(run, cost.flops(parts), sum(p.bytes for p in parts), dtype=s.dtype)

    for index, name in enumerate(PARTS):
        yield single("iteration", f"{s.name} {name}", partial(part, index), 31, 1.0)
    yield single("iteration", f"{s.name} whole", whole, 31, 2.0)
