"""The iterations with gradient, and their backward, as one call of csrc/cpu: the bits that kernel
after kernel gives, in what is returned and in what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cpu_loop import OPS, end_by_a_signal, operands, packed
from torch import Tensor

from fpdm import block, walk
from fpdm.block import BlockGrads, Scratch, saved_units
from fpdm.fixed_point import unroll, unroll_backward
from fpdm.kernels import cpu, cpu_loop, implementations, ops
from fpdm.kernels.launch import LaunchError

pytestmark = pytest.mark.skipif(
    cpu.native is None, reason=f"csrc/cpu: {cpu.unavailable(torch.device('cpu'), None)}"
)
APART = SimpleNamespace(**{**vars(OPS), "loops": lambda *dtypes: False})
MODES = ("none", "elementwise", "full")
# samples, tokens, width, heads; odd widths, a head of 72, batches that no number of parts divides
SIZES = [(3, 7, 48, 4), (5, 17, 35, 7), (1, 64, 144, 2)]


def results(
    operators: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, ...],
    dtype: torch.dtype,
    m: int,
    recompute: str,
    chunks: int = 1,
    injected: bool = True,
    trained: bool = True,
    norms: bool = True,
) -> dict[str, Tensor]:
    """All that forward and backward return and keep, of the same numbers every time."""
    b, t, d, heads = size
    x, u, mod, w = operands(b, t, d, dtype, injected)
    weights = [v for v in w if v is not None]
    i = torch.randn(b, t, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    injection = [] if u is None else [(2 * d, 2 * d), (2 * d,), (d, 2 * d), (d,)]
    shapes = [*(v.shape for v in w[:8] if v is not None), *injection]
    params = [torch.empty(shape) for shape in shapes] if trained else []
    constants = (None if u is None else i), u, mod
    how = (m, heads, "cpu", recompute, chunks)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "resolve", lambda *_: operators)
        out, table, *saved = unroll(x, *constants, params, weights, *how, norms, False)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found = [
            unroll_backward(params, g, x, *constants, weights, *saved, *how, wanted)
            for wanted in (True, False)
        ]
    assert out.isfinite().all()
    kept = dict(zip(("out", "norms", "xs", "residual", "compute"), (out, table, *saved)))
    for label, (dx, di, dmod, dparams) in zip(("x", "no x"), found):
        kept |= {f"{label}: dx": dx, f"{label}: di": di, f"{label}: dmod": dmod}
        kept |= {f"{label}: parameter {j}": v for j, v in enumerate(dparams)}
    return kept


def compare(monkeypatch: pytest.MonkeyPatch, *args: Any, **kw: Any) -> None:
    want = results(APART, monkeypatch, *args, **kw)
    found = results(OPS, monkeypatch, *args, **kw)
    for name, value in want.items():
        assert torch.equal(found[name], value), (name, args, kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_one_call_is_the_same_bits(
    size: tuple[int, ...], recompute: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu_loop.loops(dtype, dtype):
        pytest.skip(f"{dtype}: products are the library's here")
    for m, chunks in ((1, 1), (3, 1), (4, 2)):
        compare(monkeypatch, size, dtype, m, recompute, chunks)
    compare(monkeypatch, size, dtype, 2, recompute, trained=False, norms=False)
    compare(monkeypatch, size, dtype, 1, recompute, 2, injected=False)


def test_the_comparison_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel by kernel with a first operand that is off is not the same bits."""
    how = ((3, 7, 48, 4), torch.float32, 2, "none")
    compare(monkeypatch, *how)
    for name in ("step_forward", "step_backward", "injection_backward"):
        step = getattr(walk, name)

        def off(operators: Any, g: Tensor, *rest: Any, step: Any = step) -> Any:
            return step(operators, g.mul_(1.001), *rest)

        with monkeypatch.context() as patch:
            patch.setattr(walk, name, off)
            with pytest.raises(AssertionError):
                compare(monkeypatch, *how)


def test_one_call_for_all_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for every part of the batch, forward and backward; what follows u is apart."""
    implementations.reset_counters()
    results(OPS, monkeypatch, (3, 7, 48, 4), torch.float32, 5, "elementwise", chunks=3)
    parts = {"unroll": 3, "unroll_backward": 6, "linear_wgrad": 6, "linear_dgrad": 6}
    assert implementations.counters() == {op: {"cpu": n} for op, n in parts.items()}


def test_batches_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((0, 7, 48, 4), (2, 0, 48, 4)):
        for recompute in MODES:
            compare(monkeypatch, size, torch.float32, 3, recompute)


def test_operands_that_do_not_fit() -> None:
    x, u, mod, w = operands(2, 7, 48, torch.float32)
    assert u is not None
    units = saved_units("none", True)
    slots = [x.new_empty(2, units[0] * x.numel()), x.new_empty(2, units[1] * x.numel())]
    kept = walk.Kept(x, x, u, mod, x.new_empty(1, *x.shape), slots[0], slots[1], "none")
    out, table, work = torch.empty_like(x), torch.empty(0, 2, 2), block.Activations()

    dmodulation = torch.zeros(2, 6 * 48)

    def forward(k: walk.Kept = kept, w: block.BlockWeights = w, out: Tensor = out) -> None:
        OPS.unroll(k, slice(0, 2), w, 4, work, [], out, table)

    def backward(
        k: walk.Kept = kept, g: Tensor = out, dmod: Tensor = dmodulation,
        w: block.BlockWeights = w, **sums: Any,
    ) -> None:  # fmt: skip
        shapes = [v.shape for v in w[:8] if v is not None]
        shapes += [torch.Size(s) for s in ((96, 96), (96,), (48, 96), (48,))]
        grads = BlockGrads(*map(torch.zeros, shapes))._replace(**sums)
        scratch, du = Scratch.like(g, g.dtype), torch.zeros(2, 7, 96)
        OPS.unroll_backward(k, slice(0, 2), w, 4, grads, True, g, dmod, du, scratch, None)

    forward()
    backward()
    empty = kept.residual[:, :0], kept.compute[:, :0]
    full = kept._replace(residual=empty[0], compute=empty[1], recompute="full")
    half = kept._replace(compute=slots[1].bfloat16())
    for run, changes, words in (
        (forward, {"k": kept._replace(u=u[:1])}, "unroll: u: got .1, 7, 96., expected .2, 7, 96."),
        (forward, {"k": kept._replace(residual=slots[0][:1])}, "unroll: residual: got .1344,"),
        (forward, {"k": half}, "unroll: compute: got bfloat16, expected float32"),
        (forward, {"w": w._replace(proj=w.qkv)}, "unroll: proj: got .144, 48., expected .48, 48."),
        (forward, {"out": x}, "unroll: out: got memory shared with x"),
        (backward, {"k": kept._replace(xs=kept.xs[:, :1])}, "unroll_backward: xs: got .1, 1, 7, "),
        # the kernels would read address 0, past an end, or panels of another product
        (forward, {"k": kept._replace(xs=kept.xs[:0])}, "unroll: xs: got .0, 2, 7, 48., expected"),
        (forward, {"k": kept._replace(u=None)}, "unroll: u: got none"),
        (forward, {"k": full}, "unroll: wide: got none"),
        (backward, {"k": kept._replace(xs=kept.xs[:0])}, "unroll_backward: xs: got .0, 2, 7, 48.,"),
        (backward, {"k": full}, "unroll_backward: again: got none"),
        (backward, {"inj_w1": None}, "unroll_backward: da: got none"),
        (backward, {"w": packed(w)}, "unroll_backward: a: got .*, expected .96, 48."),
        (backward, {"dmod": torch.zeros(2, 288).double()}, "unroll_backward: dmod: got float64"),
        (backward, {"g": slots[1][0, : x.numel()].view_as(x)}, "g: got memory shared with compute"),
        (backward, {"qkv": torch.zeros(48, 48)}, "unroll_backward: dqkv: got .48, 48., expected"),
    ):
        with pytest.raises(LaunchError, match=words):
            run(**changes)  # type: ignore[operator]


def test_operands_that_contradict_each_other() -> None:
    x, u, mod, w = operands(2, 7, 48, torch.float32)
    weights = [v for v in w if v is not None]
    how = (4, "cpu", "full", 1, False, False)
    with pytest.raises(ValueError, match="i: got none with u, expected both or neither"):
        unroll(x, None, u, mod, [], weights, 2, *how)
    with pytest.raises(ValueError, match="m: got 0, expected at least 1"):
        unroll(x, x, u, mod, [], weights, 0, *how)
    out, _, *saved = unroll(x, x, u, mod, [], weights, 3, *how)
    with pytest.raises(ValueError, match="m: got 2, expected 3, as many as are kept"):
        unroll_backward([], out, x, x, u, mod, weights, *saved, 2, 4, "cpu", "full", 1, True)


def test_a_signal_ends_the_walk() -> None:
    """Forward and backward of 40,000 iterations, which take seconds."""
    x, u, mod, w = operands(1, 16, 48, torch.float32)
    m, slots = 40_000, x.new_empty(40_000, 0)
    kept = walk.Kept(x, x, u, mod, x.new_zeros(m - 1, *x.shape), slots, slots, "full")
    run = walk.BlockRun(OPS, w, 4)
    out, dmod = torch.empty_like(x), torch.zeros(1, 6 * 48)
    for step in (
        lambda: walk.forward(run, kept, slice(0, 1), out, torch.empty(0, 2, 1)),
        lambda: walk.backward(run, kept, slice(0, 1), out.zero_(), dmod, torch.empty_like(x)),
    ):
        end_by_a_signal(step)
