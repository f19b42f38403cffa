"""Operators called past the dispatcher: the same numbers, and nobody who listens misses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_model
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm.config import ModelConfig
from fpdm.kernels import direct, ops
from fpdm.weights import PreparedWeights

Map = Callable[[Tensor], Tensor]
SMALL = ModelConfig(
    input_size=4, in_channels=1, patch_size=2, hidden_size=16, num_heads=2, num_classes=3
)


def gradients(dtype: torch.dtype, accumulate: bool) -> list[Tensor]:
    """Output and gradients of one step; every operator of the model takes part."""
    model = random_model(SMALL)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weights = PreparedWeights(model, dtype, accumulate=accumulate)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = model(x, torch.tensor([5, 600]), torch.tensor([1, 3]), 2, 1, weights=weights)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_both_ways_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, accumulate: bool
) -> None:
    ours = gradients(dtype, accumulate)
    monkeypatch.setattr(direct, "watched", lambda tensors: True)
    assert all(map(torch.equal, ours, gradients(dtype, accumulate)))


def operands() -> list[Tensor]:
    return [torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8).requires_grad_()]


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def seen_by_a_mode() -> bool:
    with Names() as names:
        direct.call(ops.adaln, *operands(), "reference").sum().backward()
    return {"fpdm.adaln.default", "fpdm.adaln_backward.default"} <= names.seen


def seen_by_compile() -> bool:
    nodes: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    fn = torch.compile(
        lambda *args: direct.call(ops.adaln, *args, "reference"), fullgraph=True, backend=backend
    )
    fn(*operands())
    return any("fpdm.adaln" in node for node in nodes)


def seen_by_a_trace() -> bool:
    fn = torch.jit.trace(
        lambda *args: direct.call(ops.adaln, *args, "reference"), tuple(operands()),
        check_trace=False,
    )  # fmt: skip
    return "fpdm::adaln" in str(fn.graph)


class Named(Tensor):
    seen: bool = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen = cls.seen or "adaln" in str(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def seen_by_a_subclass() -> bool:
    Named.seen = False
    z, shift, scale = operands()
    direct.call(ops.adaln, z.as_subclass(Named), shift, scale, "reference")
    return Named.seen


@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated")
@pytest.mark.parametrize("seen", [seen_by_a_mode, seen_by_a_trace, seen_by_a_subclass])
def test_listeners_see_the_operators(
    monkeypatch: pytest.MonkeyPatch, seen: Callable[[], bool]
) -> None:
    assert seen()
    monkeypatch.setattr(direct, "watched", lambda tensors: False)
    assert not seen()


def test_compile_sees_the_operators() -> None:
    assert seen_by_compile()


def test_transforms_are_watched() -> None:
    found: list[bool] = []
    torch.func.vmap(lambda x: found.append(direct.watched([x])) or x)(torch.zeros(2))
    assert found == [True]
    assert not direct.watched([torch.zeros(2)])


def test_a_graph_that_is_kept_and_one_used_twice() -> None:
    z, shift, scale = operands()
    out = direct.call(ops.adaln, z, shift, scale, "auto").sum()
    first, second = (torch.autograd.grad(out, scale, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(
        direct.call(ops.adaln, z, shift, scale, "auto").square().sum(), scale, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def penalty(f: Map, z: Tensor, v: Tensor) -> Tensor:
    """The incoming gradient needs none itself, and a loss beside it hides that one is missing."""
    z = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z), z, v, create_graph=True)
    (f(z).square().sum() + g.square().sum()).backward()
    return g


def dual(f: Map, z: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent


def squared(f: Map) -> Map:
    return lambda z: f(z).square().sum()


MORE: dict[str, Callable[[Map, Tensor, Tensor], Any]] = {
    "a penalty on the gradient": penalty,
    "forward mode": dual,
    "functional.jvp": lambda f, z, v: torch.autograd.functional.jvp(f, z, v)[1],
    "functional.hvp": lambda f, z, v: torch.autograd.functional.hvp(squared(f), z, v)[1],
    "functional.hessian": lambda f, z, v: torch.autograd.functional.hessian(squared(f), z),
    "func.grad": lambda f, z, v: torch.func.grad(squared(f))(z),
    "func.vjp": lambda f, z, v: torch.func.vjp(f, z)[1](v),
    "func.jvp": lambda f, z, v: torch.func.jvp(f, (z,), (v,))[1],
    "func.jacfwd": lambda f, z, v: torch.func.jacfwd(f)(z),
    "func.jacrev": lambda f, z, v: torch.func.jacrev(f)(z),
    "func.vmap": lambda f, z, v: torch.func.vmap(f)(z.unsqueeze(0)),
}
ONCE = "fpdm's operators: got .*, expected first derivatives by torch.autograd .once_diff"


def a_map() -> Map:
    model = random_model(SMALL)
    with torch.no_grad():
        mod = model.modulation(torch.tensor([5, 600]), torch.tensor([1, 3]))
        return model.fixed_point_map(torch.randn(2, 4, 16), mod)


@pytest.mark.parametrize("name", MORE)
def test_more_than_a_first_derivative_is_refused(name: str) -> None:
    """In every way that torch has to ask for one; it would answer most of them with zeros."""
    f, z, v = a_map(), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    with pytest.raises(NotImplementedError, match=ONCE):
        MORE[name](f, z, v)


@pytest.mark.parametrize("name", [name for name in MORE if not name.startswith("func.")])
def test_a_listener_is_refused_it_too(name: str) -> None:
    f, z, v = a_map(), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    with Names(), pytest.raises(NotImplementedError, match=ONCE):
        MORE[name](f, z, v)


@pytest.mark.parametrize("name", ["a penalty on the gradient", "forward mode", "func.jvp"])
def test_compiled_code_refuses_it_too(name: str) -> None:
    torch._dynamo.reset()
    _, shift, scale = operands()
    f = torch.compile(lambda z: direct.call(ops.adaln, z, shift, scale, "auto"), backend="eager")
    with pytest.raises(NotImplementedError, match=ONCE):
        MORE[name](f, torch.randn(2, 3, 8), torch.randn(2, 3, 8))


def gelu(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    return ops.linear_add_gelu(x, weight, addend, "auto")[0]


def adaln_after_gate(*given: Tensor) -> Tensor:
    return ops.gate_residual_adaln(*given, "auto")[1]


# function, shapes, operands that it is not linear in
CURVED: list[tuple[Callable[..., Tensor], list[tuple[int, ...]], int]] = [
    (gelu, [(2, 3, 8), (4, 8), (2, 3, 4)], 3),
    (adaln_after_gate, [(2, 3, 8), (2, 3, 8), (2, 8), (2, 8), (2, 8)], 3),
    (lambda *given: ops.adaln(*given, "auto"), [(2, 3, 8), (2, 8), (2, 8)], 1),
    (lambda qkv: ops.attention(qkv, 2, "auto"), [(2, 3, 24)], 1),
]


@pytest.mark.parametrize(("f", "shapes", "curved"), CURVED)
def test_a_gradient_knows_the_operand_that_it_depends_on(
    f: Callable[..., Tensor], shapes: list[tuple[int, ...]], curved: int
) -> None:
    """Where nothing but that one is trained, its graph is all that there is to refuse by."""
    for at in range(curved):
        given = [torch.randn(shape) for shape in shapes]
        given[at].requires_grad_()
        (g,) = torch.autograd.grad(f(*given).sum(), given[at], create_graph=True)
        with pytest.raises(NotImplementedError, match=ONCE):
            g.sum().backward()
