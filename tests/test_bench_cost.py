"""The counts against hand counts and torch's FLOP counter, the memory against the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import cost, machine, memory, published, report, suites
from fpdm.block import (
    SAVED,
    BlockGrads,
    BlockWeights,
    Scratch,
    forward_workspace,
    injection_backward,
    saved_units,
    slot_views,
    step_backward,
    step_forward,
)
from fpdm.config import ExecutionConfig, ModelConfig
from fpdm.kernels import reference
from fpdm.kernels.implementations import OPERATORS
from fpdm.model import FPDM
from fpdm.recipes import MODEL_PRESETS
from fpdm.weights import PreparedWeights

XL = MODEL_PRESETS["fpdm-xl-2"]
SMALL = ModelConfig(input_size=8, hidden_size=48, num_heads=4, num_classes=10)


def test_the_hand_count_at_xl() -> None:
    """18.44 D^2 MACs per token as published, 16.44 hoisted (2 T D = 0.444 D^2)."""
    d, t = 1152, 256
    macs = 16 * d * d + 2 * t * d
    assert cost.flops(cost.iteration(XL, 1)) == 2 * t * macs
    assert cost.flops(cost.iteration(XL, 1, style="fused")) == 2 * t * macs
    published_macs = t * (18 * d * d + 2 * t * d) + 6 * d * d
    assert cost.flops(cost.iteration(XL, 1, style="published")) == 2 * published_macs
    assert cost.flops(cost.iteration(XL, 1)) == pytest.approx(11.17e9, rel=1e-3)
    units = [cost.elementwise_units(cost.iteration(XL, 4, 2, s), XL, 4, 2) for s in cost.STYLES]
    assert units == [40, 23, 3]


def counted(fn: Callable[[], object]) -> int:
    # the counter knows neither the CPU's own attention kernel nor a product that is added in place
    inplace = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=inplace)
    with counter as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        fn()
    return mode.get_total_flops()


def test_torch_counts_the_same() -> None:
    model = FPDM(SMALL)
    weights = PreparedWeights(model, torch.float32)
    b, t, d = 3, SMALL.tokens, SMALL.hidden_size
    x, u, mod = torch.randn(b, t, d), torch.randn(b, t, 2 * d), torch.randn(b, 6 * d)
    acts = forward_workspace(x, x.dtype, "full")
    acts.z = acts.z2 = out = torch.empty_like(x)
    block: BlockWeights = weights.block("block_fixed_point", injected=True)
    ours = counted(lambda: step_forward(reference, x, u, mod, block, 4, acts, out))
    assert ours == cost.flops(cost.iteration(SMALL, b))
    i, c = torch.randn(b, t, d), torch.randn(b, d)
    plain = counted(lambda: published.fixed_point_map(model.state_dict(), x, i, c, 4))
    assert plain == cost.flops(cost.iteration(SMALL, b, style="published"))
    wrong = replace(SMALL, hidden_size=96)
    assert ours != cost.flops(cost.iteration(wrong, b))


def test_torch_counts_the_same_backward() -> None:
    model = FPDM(SMALL)
    block = PreparedWeights(model, torch.float32).block("block_fixed_point", injected=True)
    b, t, d = 3, SMALL.tokens, SMALL.hidden_size
    x, u, mod = torch.randn(b, t, d), torch.randn(b, t, 2 * d), torch.randn(b, 6 * d)
    units = saved_units("none", True)
    buffers = (torch.empty(n * x.numel()) for n in units)
    acts = slot_views(*buffers, "none", True, x.shape)
    step_forward(reference, x, u, mod, block, 4, acts, torch.empty_like(x), None, SAVED["none"])
    plain = [torch.zeros_like(w) for w in block[:8] if w is not None]
    grads = BlockGrads(*plain, torch.zeros(2 * d, 2 * d), torch.zeros(2 * d),
                       torch.zeros(d, 2 * d), torch.zeros(d))  # fmt: skip
    scratch, du = Scratch.like(x, x.dtype), torch.zeros(b, t, 2 * d)

    def backward() -> None:
        g, z = torch.randn(b, t, d), acts.z
        assert z is not None
        step_backward(reference, g, z, mod, block, 4, acts, grads, torch.zeros(b, 6 * d), scratch)
        injection_backward(reference, g, x, block, acts, grads, scratch, du)

    assert counted(backward) == cost.flops(cost.iteration_backward(SMALL, b, recompute="none"))


def test_the_hand_count_of_a_network() -> None:
    """(n_pre + n_post)(12 D^2 + 2 T D) + 2 D^2 folded + k (16 D^2 + 2 T D) MACs a token."""
    d, t = 1152, 256
    macs = 2 * (12 * d * d + 2 * t * d) + 2 * d * d + 8 * (16 * d * d + 2 * t * d)
    assert suites.network_flops(XL, 4, 8) == 2 * 4 * t * macs
    for style in ("library", "fused"):
        assert cost.flops(cost.network(XL, 4, 8, style=style)) == 2 * 4 * t * macs  # type: ignore[arg-type]
    # published: the projection alone, and vectors in every block and iteration
    plain = t * (2 * (12 * d * d + 2 * t * d) + d * d + 8 * (18 * d * d + 2 * t * d))
    want = 2 * 4 * (plain + 10 * 6 * d * d)
    assert cost.flops(cost.network(XL, 4, 8, style="published")) == want


def test_the_hand_count_of_waves() -> None:
    """512 rows of XL/2 in tiles of 128 x 128 on 132 multiprocessors at 790 TFLOP/s: 4 rows of 18,
    9, 27, 9, 36 and 9 tiles, one wave each but two of the MLP's fc1. A wave of K = 1152 takes 6.3
    us, those of the injection's and the MLP's fc2 twice and four times as long."""
    device = replace(cost.DEVICES["H200"], flops=790e12, bandwidth=1e15, gap=0.0)
    gemms = [p for p in cost.iteration(XL, 2) if p.kind == "gemm"]
    assert [p.tiles for p in gemms] == [4 * n for n in (18, 9, 27, 9, 36, 9)]
    wave = 2 * 128 * 128 * 1152 * 132 / 790e12
    assert cost.seconds(gemms, device) == pytest.approx((1 + 2 + 1 + 1 + 2 + 4) * wave)
    assert cost.seconds(gemms, device) == pytest.approx(69e-6, rel=0.01)
    # of many rows the last wave is a thirtieth
    many = [p for p in cost.iteration(XL, 64) if p.kind == "gemm"]
    assert 1 < cost.seconds(many, device) / (cost.flops(many) / device.flops) < 1.04


def test_the_hand_count_of_a_training_step() -> None:
    """The parts counted by torch above, 12 D^2 + 2 T D MACs a token for an outer block, 3 D^2 for
    the injection."""
    t, d = 256, 1152
    forward = cost.flops(cost.iteration(XL, 4))
    backward = cost.flops(cost.iteration_backward(XL, 4))
    macs = 2 * (36 * d * d + 7 * t * d) + 9 * d * d
    want = 11 * forward + 6 * backward + 2 * 4 * t * macs
    assert cost.training_flops(XL, 4, 5, 6) == want


def test_the_parts_of_a_training_step_are_its_count() -> None:
    parts = cost.training(XL, 4, 5, 6)
    assert cost.flops(parts) == cost.training_flops(XL, 4, 5, 6)

    # bytes of the backward by hand, in U of half precision: gates 6, GELU 12 and 14, adaln 8, and
    # the gradients of the biases of fc2, fc1, proj, qkv and of the injection's fc2
    def units(parts: list[cost.Part]) -> float:
        return cost.elementwise_units(parts, XL, 4, 2)

    one = cost.iteration_backward(XL, 4, recompute="none")
    assert units(one) == 6 + 12 + 14 + 8 + (1 + 4 + 1 + 3 + 1)
    block = cost.iteration_backward(XL, 4, 2, "none", False)
    assert units(block) == 6 + 12 + 8 + (1 + 4 + 1 + 3)
    # i's bias, and the float32 gradient of u, 2 U wide: read twice and rounded once
    ends = 1 + 2 * 4 + 2
    step = units(cost.network(XL, 4, 11)) + 6 * units(one) + 2 * units(block) + ends
    assert units(cost.training(XL, 4, 5, 6)) == step
    # a step of n = 0, m = 1 has every weight's gradient once
    found = [p.name for p in cost.training(XL, 4, 0, 1) if p.name.endswith("wgrad")]
    assert len(found) == 6 + 2 * 4 + 2
    # what is computed again: products only where no pre-activation is kept
    extra = {mode: cost.flops(cost.training(XL, 4, 5, 6, 2, mode)) - cost.flops(parts)
             for mode in cost.RECOMPUTE}  # fmt: skip
    block = cost.flops(cost.iteration(XL, 4)) - 2 * 4 * 256 * 4 * 1152**2
    full = 6 * cost.flops(cost.iteration(XL, 4)) + 2 * block
    assert extra == {"none": 0, "elementwise": 0, "full": full}
    assert all(p.again == 0 and p.kind != "elementwise" for p in cost.products(parts))


def test_backward_is_twice_the_forward() -> None:
    """Every GEMM has two gradients; attention's backward has five products for two."""
    forward, backward = cost.iteration(XL, 2), cost.iteration_backward(XL, 2)
    gemm = sum(p.flops for p in forward if p.kind == "gemm")
    attention = sum(p.flops for p in forward if p.kind == "attention")
    assert cost.flops(backward) == 2 * gemm + 5 * attention // 2
    # x, dy and the weights' gradient in float32, read and written
    fc2 = next(p for p in backward if p.name == "fc2 wgrad")
    d, rows = XL.hidden_size, 2 * XL.tokens
    assert fc2.bytes == 2 * rows * 5 * d + 8 * 4 * d * d
    assert fc2.tiles == (4 * d // 128) * (d // 128)
    full = cost.iteration_backward(XL, 2, recompute="full")
    assert cost.flops(full) == cost.flops(backward) + gemm + attention


def test_what_is_computed_again_takes_time() -> None:
    """Eight products of 2 T D MACs a token where five count: 9.6 us a sample at the rate of a
    V100's tensor cores, as bench/NOTES.md counts them in the machine code."""
    part = next(p for p in cost.iteration_backward(XL, 1) if p.name == "attention backward")
    one = 2 * XL.tokens**2 * XL.hidden_size
    assert (part.flops, part.flops + part.again) == (5 * one, 8 * one)
    device = replace(cost.DEVICES["V100"], flops=125e12, gap=0.0, bandwidth=1e15)
    assert cost.seconds([part], device) == pytest.approx(9.6e-6, rel=0.02)


def test_predictions_order_as_they_must() -> None:
    for row in cost.predictions(XL, 64):
        assert row["gemm + attention"] < row["fused"] < row["library"] < row["published"]
    h200 = next(r for r in cost.predictions(XL, 64) if r["device"] == "H200")
    # the roofline that the kernels were planned with: 22.4 us as published, 16.0 us fused
    assert h200["published"] == pytest.approx(22.4, rel=0.1)
    assert h200["fused"] == pytest.approx(16.0, rel=0.1)


@pytest.mark.parametrize(("mode", "units"), [("none", 23), ("elementwise", 13), ("full", 1)])
def test_memory_grows_by_the_ledger(mode: str, units: int) -> None:
    execution = ExecutionConfig(recompute=mode)  # type: ignore[arg-type]
    short, long = (memory.training(XL, 2, execution, 0, m).saved for m in (2, 6))
    unit = 2 * XL.tokens * XL.hidden_size * 2
    assert (long - short) / (4 * unit) == pytest.approx(units, abs=0.01)


def test_memory_at_the_papers_setting() -> None:
    """Batch 64, n = m = 12, bf16, everything included. The paper: 10.2 GB, and DiT 25.2 GB."""
    totals = {}
    for mode, chunks in (("elementwise", 4), ("full", 4)):
        execution = ExecutionConfig(recompute=mode, chunks=chunks)  # type: ignore[arg-type]
        totals[mode] = memory.training(XL, 64, execution).total / memory.GB
    assert totals["elementwise"] <= 9.0
    assert totals["full"] <= 3.5
    written = json.loads((machine.ROOT / "bench/results/counted.json").read_text())["memory"]
    for row in written:
        if row["model"] == "fpdm-xl-2" and row["arm"].removeprefix("fpdm ") in totals:
            # python -m bench --count writes it again
            assert row["total"] == pytest.approx(totals[row["arm"].removeprefix("fpdm ")], rel=1e-3)
    assert memory.plain(XL, 64).total / memory.GB > 10.2


def test_fake_memory_is_real_memory() -> None:
    """The same step with real tensors of the reference, saved bytes compared."""
    execution = ExecutionConfig(impl="reference")
    fake = memory.training(SMALL, 4, execution, 1, 3, torch.float32).saved
    model = FPDM(SMALL, execution)
    weights = PreparedWeights(model, torch.float32)
    x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 5), torch.zeros(4, dtype=torch.int64)
    with memory.LiveBytes() as mode:
        loss = model(x, t, y, 3, 1, weights=weights).float().square().mean()
        real = mode.live()
    assert loss.isfinite()
    assert fake == pytest.approx(real, rel=0.02)


def test_stand_ins_cover_every_operator() -> None:
    found = memory._shape_only()
    assert isinstance(found, SimpleNamespace)
    assert set(OPERATORS) <= set(vars(found))
    z = torch.empty(2, 3, 8)
    assert isinstance(found.adaln(z, z[:, 0], z[:, 0]), Tensor)


def test_predictions_stand_beside_measurements() -> None:
    """Per evaluation of the network; guidance doubles the batch, other devices have no row."""
    device, shape = cost.DEVICES["H200"], (XL, 16, 8)
    measured = {
        "fpdm": 28 * 2 * cost.seconds(cost.network(*shape), device),
        "published eager": 28 * 3 * cost.seconds(cost.network(*shape, style="published"), device),
    }
    arms = {name: {"median_s": seconds} for name, seconds in measured.items()}
    name = "XL/2 B8 bfloat16 S=28 k=8 guidance 4"
    rows = [{"suite": "sampler", "name": n, "arms": arms} for n in (name, "S/2 B8 bfloat16 k=8")]
    found = report.predictions({"machine": "nvidia-h200", "rows": rows})
    assert [(line[1], line[-1]) for line in found] == [
        ("fpdm", "2.00"),
        ("published eager", "3.00"),
    ]
    assert report.predictions({"machine": "amd-epyc-2-threads", "rows": rows}) == []
