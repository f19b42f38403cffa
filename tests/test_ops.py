"""Every registered operator: schema, fake, autograd, gradients, tolerance contract, choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import violation
from operator_specs import attended, gated, normed, smooth
from torch import Tensor

from fpdm.kernels import implementations, ops, reference


def plain_gate_adaln(
    z: Tensor, y: Tensor, g: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    out = gated(z, y, g)
    return out, normed(out, shift, scale)


def plain_add_gelu(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return smooth(x @ w.t() + u)


def chosen(op: Any) -> Callable[..., Any]:
    """The operator with the implementation left to ``auto``."""
    return lambda *args: op(*args, "auto")


# operator, plain PyTorch, operand shapes from (B, T, D, H); shift, scale, gate come from one (B,
# 6D)
CASES: dict[str, tuple[Any, Callable[..., Any], Callable[..., list[Any]]]] = {
    "adaln": (chosen(ops.adaln), normed, lambda b, t, d, h: [(b, t, d), "mod", "mod"]),
    "attention": (chosen(ops.attention), attended, lambda b, t, d, h: [(b, t, 3 * d), h]),
    "gate_residual": (
        chosen(ops.gate_residual),
        gated,
        lambda b, t, d, h: [(b, t, d), (b, t, d), "mod"],
    ),
    "gate_residual_adaln": (
        chosen(ops.gate_residual_adaln),
        plain_gate_adaln,
        lambda b, t, d, h: [(b, t, d), (b, t, d), "mod", "mod", "mod"],
    ),
    "linear_add_gelu": (
        lambda x, w, u: ops.linear_add_gelu(x, w, u, "auto")[0],
        plain_add_gelu,
        lambda b, t, d, h: [(b, t, d), (2 * d, d), (b, t, 2 * d)],
    ),
    "linear_bias_gelu": (
        lambda x, w, u: ops.linear_add_gelu(x, w, u, "auto")[0],
        plain_add_gelu,
        lambda b, t, d, h: [(b, t, d), (2 * d, d), (2 * d,)],
    ),
    "linear": (
        lambda x, w, u: ops.linear(x, w, u, w.detach(), u.detach(), "auto"),
        lambda x, w, u: F.linear(x, w, u),
        lambda b, t, d, h: [(b, t, d), (2 * d, d), (2 * d,)],
    ),
}


def operands(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> list[Any]:
    """Leaves; modulation vectors are strided views of one (B, 6D), as the model gives them."""
    g = torch.Generator().manual_seed(seed)
    b, _, d, _ = shape
    mod = (torch.randn(b, 6 * d, generator=g) * 0.5).to(dtype)
    chunks = iter(mod.chunk(6, dim=-1))
    found: list[Any] = []
    for spec in CASES[name][2](*shape):
        if spec == "mod":
            found.append(next(chunks).detach().requires_grad_())
        elif isinstance(spec, tuple):
            scale = 1.0 if len(spec) == 3 else spec[-1] ** -0.5
            found.append((torch.randn(spec, generator=g) * scale).to(dtype).requires_grad_())
        else:
            found.append(spec)
    return found


def outputs_and_gradients(fn: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    out = fn(*args)
    outs = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(77)
    probes = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outs]
    tensors = [a for a in args if isinstance(a, Tensor)]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, tensors, probes))


def as_double(args: list[Any]) -> list[Any]:
    return [a.detach().double().requires_grad_() if isinstance(a, Tensor) else a for a in args]


SHAPES = [(2, 7, 48, 4), (1, 1, 24, 2), (3, 17, 72, 1), (2, 64, 96, 4), (0, 4, 48, 4)]


def contract_failures(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[str]:
    ours, plain, _ = CASES[name]
    args = operands(name, shape, dtype)
    oracle = outputs_and_gradients(plain, as_double(args))
    found = outputs_and_gradients(ours, args)
    low = outputs_and_gradients(plain, args)
    scale = 0.0
    if "adaln" in name and args[0].numel():
        z = (oracle[0] if name == "gate_residual_adaln" else args[0]).double()
        scale = (z.abs().max() * z.var(-1, unbiased=False).add(1e-6).rsqrt().max()).item()
    lines = [violation(a, b, c, dtype, scale) for a, b, c in zip(found, low, oracle)]
    return [line for line in lines if line]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contract(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert contract_failures(name, shape, dtype) == [], shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A bfloat16 intermediate in a finer dtype, and a wrong epsilon."""
    real = reference.gelu

    def half(x: Tensor, out: Tensor | None = None) -> Tensor:
        y = real(x.bfloat16().to(x.dtype))
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(reference, "gelu", half)
    monkeypatch.setattr(implementations, "_REQUESTED", "reference")
    implementations._operator_set.cache_clear()
    implementations._chosen.cache_clear()
    try:
        assert contract_failures("linear_bias_gelu", SHAPES[0], dtype)
        if dtype == torch.float32:
            monkeypatch.setattr(reference, "LN_EPS", 1e-5)
            assert contract_failures("adaln", SHAPES[0], dtype)
    finally:
        monkeypatch.undo()
        implementations._operator_set.cache_clear()
        implementations._chosen.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    args = operands(name, (2, 3, 8, 2), torch.float64)
    assert torch.autograd.gradcheck(CASES[name][0], args, fast_mode=True)


@pytest.mark.parametrize("name", ["adaln", "attention", "gate_residual", "gate_residual_adaln"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(
        getattr(ops, name), (*operands(name, (2, 3, 8, 2), torch.float32), "auto")
    )


def test_opcheck_gemms() -> None:
    for name in ("linear_add_gelu", "linear_bias_gelu"):
        args = operands(name, (2, 3, 8, 2), torch.float32)
        torch.library.opcheck(ops.linear_add_gelu, (*args, "auto"))
    x, w, b = operands("linear", (2, 3, 8, 2), torch.float32)
    half = (w.detach().bfloat16(), b.detach().bfloat16())
    torch.library.opcheck(ops.linear, (x, w, b, *half, "auto"))
    dy = torch.randn(2, 3, 16)
    torch.library.opcheck(
        ops.linear_backward, (dy, x.detach(), w.detach(), half[0], True, True, "auto")
    )
    sums = torch.zeros(16, 8), torch.zeros(16)
    torch.library.opcheck(ops.linear_backward_, (*sums, dy, x.detach(), half[0], True, "reference"))


def test_opcheck_backwards() -> None:
    z, shift, scale = (a.detach() for a in operands("adaln", (2, 3, 8, 2), torch.float32))
    torch.library.opcheck(ops.adaln_backward, (z, z, scale, "auto"))
    torch.library.opcheck(ops.gate_residual_backward, (z, z, shift, "auto"))
    qkv = torch.randn(2, 3, 24)
    torch.library.opcheck(
        ops.attention_backward, (z, qkv, ops.attention(qkv, 2, "auto"), 2, "auto")
    )
    pre, w = torch.randn(2, 3, 16), torch.randn(16, 8)
    for bias in (False, True):
        torch.library.opcheck(ops.linear_add_gelu_backward, (pre, pre, z, w, bias, "auto"))


def test_aliased_buffers() -> None:
    """The loop overwrites: GELU in place, z' over z, f(x) over z'."""
    z, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gate = torch.randn(2, 8)
    want = reference.gate_residual(z, y, gate)
    buffer = z.clone()
    assert torch.equal(reference.gate_residual(buffer, y, gate, out=buffer), want)
    buffer = y.clone()
    assert torch.equal(reference.gelu(buffer, out=buffer), reference.gelu(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bad_sample_stays_alone(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), 65504.0):
        for name in CASES:
            args = operands(name, (3, 7, 48, 4), dtype)
            clean = CASES[name][0](*args)
            with torch.no_grad():
                args[0][1, 2] = bad
            dirty = CASES[name][0](*args)
            for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (clean, dirty))):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[2], b[2])


def test_half_precision_sums_are_float32() -> None:
    """256 products of 30 x 30 leave float16's range; their float32 sum does not."""
    dy = torch.full((1, 256, 4), 30.0, dtype=torch.float16)
    dweight, dbias = torch.zeros(4, 4), torch.zeros(4)
    reference.linear_wgrad(dy, dy, dweight, dbias)
    assert torch.equal(dweight, torch.full((4, 4), 230400.0))
    dgate = torch.zeros(1, 4)
    reference.gate_residual_backward(dy * 10, dy * 10, torch.ones(1, 4).half(), dgate)
    assert torch.equal(dgate, torch.full((1, 4), 23040000.0))


def test_residual_norms() -> None:
    z, y, prev = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(3))
    norms = torch.empty(2, 3, dtype=torch.float64)
    out = reference.gate_residual(z, y, torch.randn(3, 8).double(), prev=prev, norms=norms)
    torch.testing.assert_close(norms[0], (out - prev).flatten(1).norm(dim=1))
    torch.testing.assert_close(norms[1], out.flatten(1).norm(dim=1))


def test_choice_of_implementation() -> None:
    native = implementations.unavailable("cpu", "cpu") is None
    assert implementations.choose("auto", "cpu") == ("cpu" if native else "reference")
    assert implementations.choose("auto", "cpu", torch.float64) == "reference"
    with pytest.raises(implementations.ImplError, match="got triton, which cannot run on cpu"):
        implementations.choose("triton", "cpu")
    with pytest.raises(implementations.ImplError, match="expected auto or one of"):
        implementations.choose("tritn", "cpu")
    with pytest.raises(implementations.ImplError, match="floating-point"):
        implementations.resolve("auto", "cpu", torch.int32)


def test_counters() -> None:
    implementations.reset_counters()
    ops.adaln(torch.randn(1, 2, 4), torch.randn(1, 4), torch.randn(1, 4), "auto")
    assert implementations.counters() == {"adaln": {implementations.choose("auto", "cpu"): 1}}
    implementations.reset_counters()
    assert implementations.counters() == {}
