"""What a row of the benchmark counts, and what is read of a GPU while it runs; without a GPU."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cost, gpu_rows, machine, report, rows, suites, third_party
from fpdm.config import ModelConfig

CPU = torch.device("cpu")
# 16 tokens
CONFIG = ModelConfig(input_size=8, hidden_size=32, num_heads=2)
TINY = rows.Setting("test", CONFIG, 2, torch.bfloat16, CPU)


def units(s: rows.Setting) -> tuple[int, int]:
    """Bytes of U = B T D elements, and of D x D weights."""
    d = s.config.hidden_size
    return (n * s.dtype.itemsize for n in (s.batch * s.config.tokens * d, d * d))  # type: ignore[return-value]


def evaluation(s: rows.Setting, k: int) -> int:
    """By hand: an iteration reads 16 D^2 of weights and moves 5, 3, 1, 4, 4, 3, 2, 5 and 6 U; an
    outer block lacks the injection, which moves 5 and 3 of them and 4 D^2; E moves 3 U and 2 D^2.
    """
    u, w = units(s)
    return k * (33 * u + 16 * w) + 2 * (25 * u + 12 * w) + 3 * u + 2 * w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_an_evaluation_and_of_the_sampler(dtype: torch.dtype) -> None:
    s = replace(TINY, dtype=dtype)
    assert suites.network(s, 3).build().bytes == evaluation(s, 3)
    guided = replace(s, batch=2 * s.batch)
    for make in (suites.sampling, lambda s, g, *how: gpu_rows.sampling(s, g, False, *how)):
        plain, twice = (make(s, guidance, 5, 3).build() for guidance in (1.0, 4.0))
        assert plain.bytes == 5 * evaluation(s, 3)
        assert twice.bytes == 5 * evaluation(guided, 3) < 2 * plain.bytes
        assert twice.flops == 2 * plain.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_training_step(dtype: torch.dtype) -> None:
    """By hand, of the products alone: forward 26 U and 16 D^2 an iteration; back 52 U, the weights
    once, and their gradients in float32 read and written."""
    s = replace(TINY, dtype=dtype)
    u, w = units(s)
    n, m, d = 1, 2, s.config.hidden_size
    back = w + 8 * d * d
    want = (n + m) * (26 * u + 16 * w) + 2 * (20 * u + 12 * w) + 5 * u + 3 * w
    want += m * (52 * u + 16 * back) + 2 * (40 * u + 12 * back) + 10 * u + 3 * back
    for mode in cost.RECOMPUTE:
        # what is computed again counts for nothing, as its FLOPs do
        assert suites.training(s, n, m, mode).build().bytes == want
    several = gpu_rows.training(s, [(n, m), (n, m)], "none", False, False).build()
    assert several.bytes == 2 * want


def measured(**facts: Any) -> dict[str, Any]:
    """A row as run_row writes it."""
    arms = {rows.OURS: {"median_s": 2e-3, "best_s": 2e-3, "spread": 0.0, "ratio": 1.0}}
    return {"suite": "sampler", "name": "a", "arms": arms, "missing": {}, **facts}


def test_the_floor_is_the_larger_of_the_two() -> None:
    ceilings = {"gemm float32": 1e9, "gemm bfloat16": 4e9, "copy": 1e8}
    counts = {"flops": 4_000_000, "bytes": 50_000, "dtype": "bfloat16"}
    row = measured(**counts)
    row |= machine.shares(row, 2e-3, ceilings)
    assert report.floor(row) == "50% (GEMM, 1 ms)"
    row |= machine.shares({**row, "bytes": 150_000}, 2e-3, ceilings)
    assert report.floor(row) == "75% (copy, 1.5 ms)"
    assert report.floor(measured()) == ""
    head, (line,) = report.suite_table({"rows": [row]}, "sampler")
    assert dict(zip(head, line))["of the floor"] == "75% (copy, 1.5 ms)"


class FusedLayerNorm(torch.nn.LayerNorm):
    """apex.normalization and liger_kernel.transformers, by their documented arguments."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, memory_efficient: bool = False):
        super().__init__(normalized_shape, eps)


class FusedAdam:
    """apex.optimizers without apex's CUDA extensions."""

    def __init__(self, params: list[Any], lr: float = 1e-3, adam_w_mode: bool = True) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")


def flash(
    qkv: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_qkvpacked_func: (B,T,3,H,K) -> (B,T,H,K)."""
    return efficient(*qkv.unbind(2))


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: None = None,
    p: float = 0.0, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """xformers.ops.memory_efficient_attention: (B,T,H,K) each."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """All of them, as if they were installed and ran here."""
    found = {
        "flash_attn": SimpleNamespace(flash_attn_qkvpacked_func=flash),
        "xformers": SimpleNamespace(),
        "xformers.ops": SimpleNamespace(memory_efficient_attention=efficient),
        "apex": SimpleNamespace(),
        "apex.normalization": SimpleNamespace(FusedLayerNorm=FusedLayerNorm),
        "apex.optimizers": SimpleNamespace(FusedAdam=FusedAdam),
        "liger_kernel": SimpleNamespace(),
        "liger_kernel.transformers": SimpleNamespace(LigerLayerNorm=FusedLayerNorm),
    }
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(third_party, "absent", lambda *_: None)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_other_packages_are_called_as_they_want(
    packages: dict[str, SimpleNamespace], dtype: torch.dtype
) -> None:
    s = replace(TINY, dtype=dtype)
    built = [row.build() for row in third_party.rows(s)]
    names = [(row.name, list(arms.run)[1]) for row, arms in zip(third_party.rows(s), built)]
    assert [name for name, _ in names][-1] == "optimizer: apex"
    for (name, package), arms in zip(names[:-1], built):
        assert name.endswith(package)
        fn = arms.run[package]
        assert not isinstance(fn, str), fn
        fn()
        assert arms.bytes
        assert bool(arms.flops) == ("attention" in name)
    why = built[-1].run["apex"]
    assert why == "RuntimeError: apex.optimizers.FusedAdam requires cuda extensions"


def test_a_package_that_does_something_else_or_nothing_is_no_baseline(
    packages: dict[str, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in the place of values, and an import that fails: ours is timed, the row says why."""
    packages["flash_attn"].flash_attn_qkvpacked_func = lambda qkv: efficient(
        *qkv[:, :, [0, 2, 1]].unbind(2)
    )
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    names = [row.name.rpartition(": ")[2] for row in third_party.rows(TINY)]
    assert names == ["flash_attn", "xformers", "apex", "liger_kernel", "apex"]
    flash_attn, xformers, *_ = (row.build().run for row in third_party.rows(TINY))
    assert str(flash_attn["flash_attn"]).startswith("ValueError: got a relative error of")
    assert str(xformers["xformers"]).startswith("ModuleNotFoundError: ")
    assert not isinstance(flash_attn[rows.OURS], str)


def test_the_rows_of_a_gpu() -> None:
    """Every package, the data path, and a sampler of every batch and dtype; what the pieces of
    bench/gpu_check.sh choose by words is no other than before."""
    found = gpu_rows.rows()
    assert len({(row.suite, row.name) for row in found}) == len(found)
    names: dict[str, list[str]] = {}
    for row in found:
        names.setdefault(row.suite, []).append(row.name)
    assert len(names["third party"]) == 5
    assert names["data"] == ["digits 256", "latents 256"]
    sampled = {name.split(" S=")[0] + name.partition("guidance")[2] for name in names["sampler"]
               if "ddpm" not in name and "compiled" not in name}  # fmt: skip
    want = {f"XL/2 B{b} bfloat16 {g}" for b in (1, 8, 64) for g in (1, 4)}
    assert sampled == want | {f"XL/2 B8 {dtype} 1" for dtype in ("float16", "float32")}
    compiled = [row.name for row in found if "compiled" in row.name]
    assert compiled == [row.name for row in found[-3:]]
    for words in ("B1 .*compiled", "B64.*compiled"):
        assert len([name for name in names["sampler"] if re.search(words, name)]) == 1


def test_a_dit_has_a_time_beside_ours() -> None:
    """Forward and backward, and the network alone; many draws have many sizes of it."""
    one = gpu_rows.training(TINY, [(1, 1)], "none", False, True).build().run
    several = gpu_rows.training(TINY, [(1, 1), (1, 2)], "none", False, True).build().run
    assert callable(one["DiT by fpdm"])
    assert "DiT by fpdm" not in several
    alone = suites.network(TINY, 2).build().run
    beside = suites.network(TINY, 2, ("dit",)).build().run
    assert beside.keys() - alone.keys() == {"DiT by fpdm", "DiT eager"}
