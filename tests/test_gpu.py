"""On a GPU: the same numbers as on the CPU, the contract in half precision, bitwise repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, random_model, worst_relative
from contract import violation
from torch import Tensor

from bench import published as plain
from fpdm import run
from fpdm.config import DiffusionConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.weights import PreparedWeights

pytestmark = pytest.mark.gpu


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, 8, generator=g).cuda()
    return x, torch.tensor([999, 500, 0]).cuda(), torch.tensor([1, 10, 3]).cuda()


def test_equals_cpu(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model(TINY)
    with torch.no_grad():
        want = model(*(b.cpu() for b in batch), 4)
        found = model.cuda()(*batch, 4).cpu()
    assert worst_relative(found, want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contract(batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    model = random_model(TINY).cuda()
    state = model.state_dict()

    def reference(kind: torch.dtype) -> Tensor:
        cast = {k: v.to(kind) for k, v in state.items()}
        return plain.forward(cast, TINY, batch[0].to(kind), *batch[1:], 2)[0]

    oracle, low = reference(torch.float64), reference(dtype)
    with torch.no_grad():
        found = model(*batch, 2, weights=PreparedWeights(model, dtype))
    assert violation(found, low, oracle, dtype) is None


@pytest.mark.alone
@pytest.mark.parametrize(
    ("graphs", "tol", "solver"),
    [("off", 0.0, "picard"), ("on", 0.0, "picard"), ("off", 0.1, "picard"), ("on", 0.1, "picard"),
     ("off", 0.1, "anderson"), ("on", 0.1, "broyden")],
)  # fmt: skip
def test_sampler_never_waits(
    graphs: Any, tol: float, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplerConfig(
        method="ddpm",
        steps=3,
        iters=2,
        reuse="extrapolate",
        guidance=2.0,
        batch=3,
        dtype="bfloat16",
        graphs=graphs,
        tol=tol,
        solver=solver,
    )
    s = Sampler(random_model(TINY).cuda(), Diffusion(DiffusionConfig(), "cuda"), config)
    noise = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    for _ in range(3):  # warm-up: allocations, libraries, compiled kernels, captures
        usual = s.sample([1, 0, 3], [5, 6, 7]).x
        given = s.sample([1, 0, 3], [5, 6, 7], step_noise=noise).x
    execute = run.Run.execute

    def guarded(self: run.Run, *args: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(run.Run, "execute", guarded)
    assert torch.equal(s.sample([1, 0, 3], [5, 6, 7]).x, usual)
    assert torch.equal(s.sample([1, 0, 3], [5, 6, 7], step_noise=noise).x, given)
    # the guard sees a wait
    with pytest.raises(RuntimeError, match="synchroniz"):
        s.sample([1, 0, 3], [5, 6, 7], progress=lambda _: usual.sum().item())


def test_repeats_are_bitwise(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = random_model(TINY).cuda()
    prepared = PreparedWeights(model, torch.bfloat16)
    seen: list[list[Tensor]] = []
    for _ in range(50):
        model.zero_grad()
        out = model(*batch, 3, no_grad_iters=1, weights=prepared)
        out.float().square().mean().backward()
        seen.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))
