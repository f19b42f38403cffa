"""The Triton operators compiled, on a GPU: operator cases in three dtypes, repeats, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import violation
from on_device import OnDevice
from operator_cases import CAP, Case, fixed, fused_rows, generate, odd_attention, run_case
from operator_specs import attended, infinite_key
from torch import Tensor

from fpdm.config import ExecutionConfig, ModelConfig, OptimConfig
from fpdm.kernels import implementations
from fpdm.model import FPDM
from fpdm.optim import AdamWEMA
from fpdm.weights import PreparedWeights

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = DTYPES[1:]
CASES = [*generate(480, DTYPES, CAP), *fixed(DTYPES), *fixed(DTYPES[::-1]), *odd_attention(DTYPES)]
FUSED = [*(c for c in CASES if c.op in implementations.FUSED), *fused_rows(DTYPES)]
# the library's GEMM: tensor cores truncate their float32 sums, see test_weight_gradients
CASES = [c for c in CASES if c.op != "linear_wgrad" or c.dtype == torch.float32]


def operators(impl: str) -> OnDevice:
    return OnDevice(implementations.resolve(impl, "cuda", torch.float32))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def test_attention_of_an_infinite_key() -> None:
    operators = implementations.resolve("triton", "cuda", torch.float32)
    assert infinite_key(operators, DTYPES, "cuda") == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    assert run_case(operators("triton"), case) == []


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused(case: Case) -> None:
    assert run_case(operators("triton-fused"), case) == []


@pytest.mark.parametrize("rows", [7, 1024, 16384])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_gradients_add_in_float32(dtype: torch.dtype, rows: int) -> None:
    """dW and db on top of what was there: a tensor core drops at most a bit of each of its partial
    sums of 8 products; the sum over rows is float32 throughout."""
    torch.manual_seed(rows)
    dy, x = (torch.randn(1, rows, n, device="cuda", dtype=dtype) for n in (40, 48))
    start, bias = torch.randn(40, 48, device="cuda"), torch.randn(40, device="cuda")
    dw, db = start.clone(), bias.clone()
    implementations.resolve("triton", "cuda", dtype).linear_wgrad(dy, x, dw, db)
    wide_dy, wide_x = dy[0].double(), x[0].double()
    size = start.abs().double() + wide_dy.abs().t() @ wide_x.abs()
    eps = torch.finfo(torch.float32).eps
    error = (dw.double() - start.double() - wide_dy.t() @ wide_x).abs()
    assert (error / (size * eps * (rows / 8 + 2))).max() <= 1
    error = (db.double() - bias.double() - wide_dy.sum(0)).abs()
    assert (error / (eps * (bias.abs() + wide_dy.abs().sum(0)))).max() <= 1
    if rows <= 1024:
        # a half-precision result would be seen
        coarse = dw.to(dtype).double() - start.double() - wide_dy.t() @ wide_x
        assert (coarse.abs() / (size * eps * (rows / 8 + 2))).max() > 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
def test_xl_iteration_is_within_the_contract(impl: str, dtype: torch.dtype) -> None:
    """One iteration of the published shape, forward and every gradient, where all tiles are the
    large ones."""
    found, low, oracle = (
        xl_gradients(impl, dtype), xl_gradients("reference", dtype),
        xl_gradients("reference", torch.float64),
    )  # fmt: skip
    wrong = {
        name: line for name in oracle
        if (line := violation(found[name], low[name], oracle[name], dtype))
    }  # fmt: skip
    assert wrong == {}


def xl_gradients(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = FPDM(ModelConfig(), ExecutionConfig(impl=impl))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    x, noise = torch.randn(8, 4, 32, 32), torch.randn(8, 8, 32, 32)
    model = model.to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    weights = None if dtype == torch.float64 else PreparedWeights(model, dtype)
    x, noise = (v.to("cuda", model.pos_embed.dtype) for v in (x, noise))
    t, y = torch.arange(8).cuda() * 100, torch.arange(8).cuda()
    out = model(x, t, y, 2, weights=weights)
    out.backward(noise.to(out.dtype))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}


@pytest.mark.parametrize("batch", [2, 16, 64])
def test_xl_network_without_gradient_is_within_the_contract(batch: int) -> None:
    """By the routes of the committed table, at the sizes it was measured at: 512, 4,096 and 16,384
    rows, folded weights, k = 2."""
    found, low, oracle = (
        xl_output(batch, "triton", torch.bfloat16), xl_output(batch, "reference", torch.bfloat16),
        xl_output(batch, "reference", torch.float64),
    )  # fmt: skip
    assert violation(found, low, oracle, torch.bfloat16) is None


def xl_output(batch: int, impl: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    model = FPDM(ModelConfig(), ExecutionConfig(impl=impl)).cuda()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
        weights = None if dtype == torch.float64 else PreparedWeights(model, dtype, fold=True)
        x = torch.randn(batch, 4, 32, 32).to("cuda", model.pos_embed.dtype)
        t, y = torch.arange(batch).cuda() * 10, torch.arange(batch).cuda()
        return model(x, t, y, 2, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
def test_a_thousand_repeats_are_bitwise_equal(impl: str) -> None:
    """Outputs and weight gradients, with more blocks than the device holds at once."""
    repeats(impl, 1000)


@pytest.mark.parametrize("impl", ["triton", "triton-fused"])
def test_repeats_are_bitwise_equal(impl: str) -> None:
    repeats(impl, 150)


def repeats(impl: str, count: int) -> None:
    torch.manual_seed(1)
    model = FPDM(ModelConfig(pre_depth=0, post_depth=0), ExecutionConfig(impl=impl)).cuda()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    weights = PreparedWeights(model, torch.bfloat16)
    x, t = torch.randn(60, 4, 32, 32, device="cuda"), torch.arange(60).cuda()
    first: dict[str, Tensor] = {}
    equal = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(count):
        model.zero_grad()
        out = model(x, t, t, 1, 1, weights=weights)
        out.float().square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found["output"] = out.detach()
        first = first or {n: v.clone() for n, v in found.items()}
        for n, v in found.items():
            equal &= (v == first[n]).all()
    assert equal.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient"])
def test_attention_routes_agree(route: str, dtype: torch.dtype) -> None:
    from fpdm.kernels import attention_routes

    if attention_routes.unmet(route, 72, dtype, torch.device("cuda")):
        pytest.skip("this route does not take the dtype")
    torch.manual_seed(0)
    qkv = torch.randn(2, 256, 3 * 144, device="cuda", dtype=dtype)
    out = attention_routes.run(route, qkv, 2, qkv.new_empty(2, 256, 144))
    low, oracle = attended(qkv, 2), attended(qkv.double(), 2)
    assert violation(out, low, oracle, dtype) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_pass_adamw_equals_fused(dtype: torch.dtype) -> None:
    """Ten steps; copies are the parameters rounded."""
    config = ModelConfig(input_size=8, hidden_size=96, num_heads=2)
    found = []
    for impl in ("onepass", "fused"):
        torch.manual_seed(0)
        model = FPDM(config).cuda()
        weights = PreparedWeights(model, dtype)
        optimizer = AdamWEMA(model, OptimConfig(impl=impl, weight_decay=0.1), weights)  # type: ignore[arg-type]
        for step in range(10):
            optimizer.gradients.copy_(normal(optimizer.gradients, step))
            optimizer.step(1e-3, 0.5)
        assert weights.flat is not None
        rounded = optimizer.flat["w"].to(dtype)
        assert torch.equal(weights.flat[: optimizer.layout.trained], rounded)
        found.append({k: v.clone() for k, v in optimizer.flat.items()})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=2e-5, atol=1e-7)


def normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def test_counters_name_triton() -> None:
    """auto is Triton here, and nothing else ran but the library's GEMMs."""
    model: Any = FPDM(ModelConfig(input_size=8, hidden_size=96, num_heads=2)).cuda()
    x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([1, 2]).cuda()
    implementations.reset_counters()
    model(x, t, t, 2, 1, weights=PreparedWeights(model, torch.bfloat16)).float().sum().backward()
    assert implementations.ran("triton")
