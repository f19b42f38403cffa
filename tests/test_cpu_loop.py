"""The loop as one call of csrc/cpu, and weights packed for it: bit for bit what kernel after kernel
gives from weights as they are."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_model
from operator_cases import DTYPES, execute, generate, values_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fpdm import block
from fpdm.block import BlockWeights, forward_workspace, iterate_forward
from fpdm.config import DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.fixed_point import SolveStats
from fpdm.kernels import cpu, cpu_loop, implementations
from fpdm.kernels.launch import LaunchError
from fpdm.model import FPDM
from fpdm.weights import PreparedWeights
from fpdm.workspace import Watch

pytestmark = pytest.mark.skipif(
    cpu.native is None, reason=f"csrc/cpu: {cpu.unavailable(torch.device('cpu'), None)}"
)
OPS = implementations.resolve("cpu", "cpu") if cpu.native is not None else SimpleNamespace()
# head sizes 12, 5 (odd width), 72; short and long sums
SIZES = [(3, 7, 48, 4), (2, 17, 35, 7), (1, 64, 144, 2), (5, 16, 128, 4)]


def packs(dtype: torch.dtype) -> bool:
    return cpu.pack(torch.zeros(1, 1, dtype=dtype)) is not None


def operands(
    b: int, t: int, d: int, dtype: torch.dtype, injected: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor, BlockWeights]:
    """x, u, modulation (a view of a wider one) and plain weights."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * std).to(dtype)

    def weight(o: int, i: int) -> Tensor:
        return normal(o, i, std=0.5 * i**-0.5)

    w = BlockWeights(
        weight(3 * d, d), normal(3 * d), weight(d, d), normal(d), weight(4 * d, d), normal(4 * d),
        weight(d, 4 * d), normal(d),
    )  # fmt: skip
    if injected:
        a, e = weight(2 * d, 2 * d).chunk(2, dim=1)
        w = w._replace(inj_a=a, inj_e=e, inj_w2=weight(d, 2 * d), inj_b2=normal(d))
    u = normal(b, t, 2 * d) if injected else None
    return normal(b, t, d), u, normal(b, 8 * d, std=0.3)[:, : 6 * d], w


def packed(w: BlockWeights) -> BlockWeights:
    """All but the injected half, which is another operator's."""
    names = [n for n in w._fields if n in ("qkv", "proj", "fc1", "fc2", "inj_a", "inj_w2")]
    found = {n: cpu.pack(v) for n in names if (v := getattr(w, n)) is not None}
    return w._replace(**found)


def buffers(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)


def kernel_by_kernel(x: Tensor, *args: Any, norms: Tensor | None = None) -> Tensor:
    u, mod, w, heads, k = args
    apart = SimpleNamespace(**{**vars(OPS), "loops": lambda *dtypes: False})
    acts = forward_workspace(x, mod.dtype, "full")
    return iterate_forward(apart, x, buffers(x), u, mod, w, heads, acts, k, norms)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_iterate(size: tuple[int, ...], injected: bool, dtype: torch.dtype) -> None:
    if not cpu_loop.loops(dtype, dtype):
        pytest.skip(f"{dtype}: products are the library's here")
    b, t, d, heads = size
    x, u, mod, w = operands(b, t, d, dtype, injected)
    for k in (1, 2, 5):
        norms, found_norms = (torch.full((k, 2, b), torch.nan) for _ in range(2))
        want = kernel_by_kernel(x, u, mod, w, heads, k, norms=norms)
        assert want.isfinite().all()
        for weights in (w, packed(w)) if packs(dtype) else (w,):
            acts, start = forward_workspace(x, dtype, "full"), x.clone()
            found = OPS.iterate(start, buffers(x), u, mod, weights, heads, acts, k, found_norms)
            assert torch.equal(found, want)
            assert torch.equal(found_norms, norms)
            assert torch.equal(start, x)
            # the second buffer may be x
            first, start = torch.empty_like(x), x.clone()
            found = OPS.iterate(start, (first, start), u, mod, weights, heads, acts, k)
            assert torch.equal(found, want)


def test_one_call_for_k() -> None:
    """Not one for each operator."""
    x, u, mod, w = operands(2, 7, 48, torch.float32)
    acts = forward_workspace(x, x.dtype, "full")
    implementations.reset_counters()
    iterate_forward(OPS, x, buffers(x), u, mod, w, 4, acts, 9)
    assert implementations.counters() == {"iterate": {"cpu": 1}}


def watch_of(x: Tensor, caps: list[int]) -> Watch:
    """Slots of a batch in order, all going on."""
    w, n = Watch.like(x), len(x)
    w.slots[:] = torch.tensor([list(range(n)), [0] * n, caps, list(range(n))])
    w.result.fill_(torch.nan)
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_solve(size: tuple[int, ...], injected: bool, dtype: torch.dtype) -> None:
    """Every sample as if it were alone: its iterations, residuals and result."""
    if not cpu_loop.loops(dtype, dtype):
        pytest.skip(f"{dtype}: products are the library's here")
    _, t, d, heads = size
    b, most = 5, 6
    x, u, mod, w = operands(b, t, d, dtype, injected)
    x[3] = torch.nan  # meets no tolerance
    norms = torch.empty(most, 2, b)
    kernel_by_kernel(x, u, mod, w, heads, most, norms=norms)
    residual = SolveStats.from_norms(norms).residual
    # met by some after some iterations
    tol = float(residual[1:4].nanmedian())
    caps = [most, 2, most, 4, 1]
    want = [next((j + 1 for j in range(c) if residual[j, i] <= tol), c) for i, c in enumerate(caps)]
    assert len(set(want)) > 2
    watch, told = watch_of(x, caps), torch.full((most, b), torch.nan)
    mine = [x.clone(), torch.empty_like(x), None if u is None else u.clone(), mod.clone()]
    acts = forward_workspace(x, dtype, "full")
    ran = OPS.solve(
        mine[0], (mine[1], mine[0]), mine[2], mine[3], w, heads, acts, most, watch, tol,
        torch.empty(2, b), told,
    )  # fmt: skip
    assert watch.used.tolist() == want
    assert ran == sum(want)
    for i, k in enumerate(want):
        alone = [None if v is None else v[i : i + 1] for v in (x, u, mod)]
        result = kernel_by_kernel(*alone, w, heads, k)
        assert torch.equal(watch.result[i].nan_to_num(), result[0].nan_to_num())
        assert torch.equal(told[:k, i].nan_to_num(), residual[:k, i].nan_to_num())
        assert told[k:, i].isnan().all()


def test_a_solve_without_a_table() -> None:
    x, u, mod, w = operands(3, 7, 48, torch.float32)
    watch = watch_of(x, [1, 2, 3])
    acts = forward_workspace(x, x.dtype, "full")
    other, table = torch.empty_like(x), torch.empty(2, 3)
    assert OPS.solve(x, (other, x), u, mod, w, 4, acts, 3, watch, 0.0, table, None) == 6
    # caps beyond the most: what there is is collected
    watch = watch_of(x, [9, 1, 9])
    assert OPS.solve(x, (other, x), u, mod, w, 4, acts, 2, watch, 0.0, table, None) == 5
    assert watch.used.tolist() == [2, 1, 2]
    assert watch.result.isfinite().all()


# packed weights


@pytest.mark.parametrize("op", sorted(o for o in implementations.FUSED) + ["linear"])
def test_packed_weights(op: str) -> None:
    """Every generated case of a forward product that has a bias, which tells O."""
    fn, seen = getattr(cpu, op), 0
    for case in generate(160, DTYPES["cpu"], 2**14, seed=7):
        if case.op != op or "no bias" in case.form:
            continue
        want, _ = execute(cpu, case, values_of(case))

        def with_packed(*args: Any, **kw: Any) -> Any:
            weight = cpu.pack(kw["weight"])
            return fn(*args, **(kw | {"weight": kw["weight"] if weight is None else weight}))

        found, _ = execute(SimpleNamespace(**{op: with_packed}), case, values_of(case))
        for name, value in want.items():
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), (case, name)
        seen += 1
    assert seen >= 5


def test_zeros_behind_a_packed_weight() -> None:
    for dtype in filter(packs, (torch.float32, torch.bfloat16)):
        o, i = cpu.native.columns + 1, 3
        found = cpu.pack(torch.ones(o, i, dtype=dtype))
        assert found is not None
        assert float(found.double().sum()) == o * i
        assert found.numel() > o * i


def test_fake_weights_stay_as_they_are() -> None:
    """A model of any size can be prepared without memory."""
    with FakeTensorMode():
        model = model_of()
        prepared = PreparedWeights(model, torch.float32, fold=True)
        assert prepared.packed == {}
        x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([3, 9]), torch.tensor([0, 5])
        with torch.no_grad():
            assert model(x, t, y, weights=prepared).shape == (2, 4, 4, 4)


def model_of(impl: Any = "auto") -> FPDM:
    return random_model(
        ModelConfig(input_size=4, in_channels=2, hidden_size=48, num_heads=4, num_classes=5),
        impl=impl,
    )


def test_prepared_weights_are_packed() -> None:
    """For sampling only, written again in place, and left out of what may meet a backward."""
    model = model_of()
    assert PreparedWeights(model, torch.float32).packed == {}
    prepared = PreparedWeights(model, torch.float32, fold=True)
    with torch.no_grad():
        before = prepared.block("block_fixed_point", injected=True)
        assert {before.qkv.dim(), before.inj_a.dim(), before.inj_w2.dim()} == {4}  # type: ignore[union-attr]
        for p in model.parameters():
            p.mul_(1.5)
        prepared.refresh()
        after = prepared.block("block_fixed_point", injected=True)
        fresh = PreparedWeights(model, torch.float32, fold=True).block("block_fixed_point", True)
        for mine, theirs, old in zip(after, fresh, before):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() == old.data_ptr()
    assert prepared.block("blocks_pre.0").qkv.dim() == 2
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([3, 9]), torch.tensor([0, 5])
    mod = model.modulation(t, y, weights=prepared)
    model.encode(x, mod, weights=prepared).sum().backward()
    double = model_of("reference")
    assert PreparedWeights(double, torch.float32, fold=True).packed == {}


def test_packed_weights_where_none_are_read() -> None:
    """Without a bias nothing tells O; another implementation, chosen later, reads plain ones."""
    if not packs(torch.float32):
        pytest.skip("float32: products are the library's here")
    with pytest.raises(LaunchError, match="linear: weight: got "):
        cpu.linear(torch.zeros(2, 48), cpu.pack(torch.zeros(20, 48)), None)  # type: ignore[arg-type]
    model = model_of()
    prepared = PreparedWeights(model, torch.float32, fold=True)
    for impl, dimensions in (("auto", 4), ("cpu", 4), ("reference", 2)):
        model.execution = replace(model.execution, impl=impl)  # type: ignore[arg-type]
        with torch.no_grad():
            assert prepared.block("block_fixed_point").qkv.dim() == dimensions
    config = SamplerConfig(steps=2, iters=2)
    found = Sampler(model, Diffusion(DiffusionConfig()), config, prepared).sample([1], [2])
    assert found.x.isfinite().all()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_of_packed_weights(
    dtype: str, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole sampler: one call for a solve and packed weights, or neither."""
    model, config = model_of(), SamplerConfig(steps=3, iters=5, guidance=1.5, dtype=dtype)  # type: ignore[arg-type]
    diffusion, compute = Diffusion(DiffusionConfig()), getattr(torch, dtype)
    request = [1, 2, 3], [4, 5, 6]
    if stopped:
        residual = Sampler(model, diffusion, config).sample(*request).stats.residual
        config = replace(config, tol=float(residual.median()))
    implementations.reset_counters()
    found = Sampler(model, diffusion, config).sample(*request)
    if cpu_loop.loops(compute, compute):
        # of a timestep a solve, a pre and a post block
        called = {"solve": 3, "iterate": 6} if stopped else {"iterate": 9}
        calls = implementations.counters()
        assert {op: sum(calls.get(op, {}).values()) for op in called} == called
        assert "attention" not in calls
    with monkeypatch.context() as patch:
        operators = implementations.resolve("cpu", "cpu")  # made anew by whoever forgets the first
        patch.setattr(operators, "loops", lambda *dtypes: False)
        patch.setattr(operators, "pack", lambda weight, out: None)
        plain = Sampler(model, diffusion, config)
        assert plain.weights.packed == {}
        want = plain.sample(*request)
    assert len(want.stats.iterations.unique()) > stopped
    assert torch.equal(found.x, want.x)
    assert torch.equal(found.stats.iterations, want.stats.iterations)
    assert torch.equal(found.stats.residual.nan_to_num(-1), want.stats.residual.nan_to_num(-1))


# what it is given


def test_operands_that_do_not_fit() -> None:
    x, u, mod, w = operands(2, 7, 48, torch.float32)
    acts = forward_workspace(x, x.dtype, "full")
    assert u is not None

    def call(**changes: Any) -> None:
        given = {"x": x, "buffers": buffers(x), "u": u, "mod": mod, "w": w} | changes
        OPS.iterate(*given.values(), 4, acts, 2)

    call()
    for changes, words in (
        ({"u": u[:1]}, r"iterate: u: got \(1, 7, 96\), expected \(2, 7, 96\)"),
        ({"mod": mod[:, :-1]}, r"iterate: mod: got \(2, 287\), expected \(2, 288\)"),
        ({"w": w._replace(fc1=w.fc1[1:])}, r"iterate: fc1: got \(191, 48\), expected \(192, 48\)"),
        ({"w": w._replace(fc1=w.fc1.bfloat16())}, "iterate: fc1: got bfloat16, expected float32"),
        ({"w": packed(w)._replace(proj=cpu.pack(w.qkv))}, "iterate: proj: got .*, expected"),
        ({"buffers": (x, torch.empty_like(x))}, "iterate: even: got memory shared with x"),
        ({"buffers": (first := buffers(x)[0], first)}, "iterate: odd: got memory shared with even"),
    ):
        with pytest.raises(LaunchError, match=words):
            call(**changes)


def test_operands_that_are_not_there() -> None:
    """A kernel would read address 0, divide by 0 or write behind the table's end."""
    x, u, mod, w = operands(2, 7, 48, torch.float32)
    acts, none = forward_workspace(x, x.dtype, "full"), block.Activations()
    for words, weights, heads, made in (
        ("a: got none, expected a tensor", w._replace(inj_a=None), 4, acts),
        ("w2 bias: got none", w._replace(inj_b2=None), 4, acts),
        ("proj bias: got none", w._replace(proj_bias=None), 4, acts),  # type: ignore[arg-type]
        ("wide: got none", w, 4, none),
        ("heads: got 0, expected a divisor of the width 48", w, 0, acts),
        ("heads: got 5, expected a divisor of the width 48", w, 5, acts),
    ):
        with pytest.raises(LaunchError, match=f"iterate: {words}"):
            OPS.iterate(x, buffers(x), u, mod, weights, heads, made, 2)
    for heads in (0, 5):
        with pytest.raises(LaunchError, match=f"attention: heads: got {heads}, expected a divisor"):
            cpu.attention(torch.zeros(2, 7, 3 * 48), heads)
    # the registered operator with u, but without what injects it
    with pytest.raises(LaunchError, match="iterate: a: got none"):
        torch.ops.fpdm.iterate(x, u, mod, list(w[:8]), 2, 4, "cpu", False)
    with pytest.raises(LaunchError, match=r"solve: residual: got \(3, 2\), expected \(4, 2\)"):
        OPS.solve(
            x, (torch.empty_like(x), x), u, mod, w, 4, acts, 4, watch_of(x, [4, 4]), 0.0,
            torch.empty(2, 2), torch.empty(3, 2),
        )  # fmt: skip


def test_batches_of_nothing() -> None:
    """No sample, or samples without tokens."""
    for b, t in ((0, 7), (2, 0)):
        x, u, mod, w = operands(b, t, 48, torch.float32)
        acts, norms = forward_workspace(x, x.dtype, "full"), torch.full((3, 2, b), torch.nan)
        found = OPS.iterate(x, buffers(x), u, mod, w, 4, acts, 3, norms)
        assert found.shape == x.shape
        assert not norms.any()
        watch, z = watch_of(x, [3] * b), (torch.empty_like(x), x)
        ran = OPS.solve(
            x, z, u, mod.contiguous(), w, 4, acts, 3, watch, 0.1, torch.empty(2, b), None
        )
        assert ran == b
        assert watch.used.tolist() == [1] * b


class Stop(Exception):
    """Raised by a handler."""


@pytest.mark.parametrize("call", ["iterate", "solve"])
def test_a_signal_ends_the_loop(call: str) -> None:
    """Within a tenth of a second or an iteration, not after a thousand of them."""
    x, u, mod, w = operands(2, 64, 144, torch.float32)
    acts = forward_workspace(x, x.dtype, "full")
    z, most, watch = (torch.empty_like(x), x), 10**7, watch_of(x, [10**7] * 2)
    run = {
        "iterate": lambda: OPS.iterate(x, z, u, mod, w, 2, acts, most),
        "solve": lambda: OPS.solve(
            x, z, u, mod, w, 2, acts, most, watch, 0.0, torch.empty(2, 2), None
        ),
    }[call]
    end_by_a_signal(run)


def end_by_a_signal(run: Callable[[], object]) -> None:
    """Whose handler raises."""

    def handler(number: int, frame: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGUSR1))
    try:
        timer.start()
        start = time.perf_counter()
        with pytest.raises(Stop):
            run()
        assert time.perf_counter() - start < 30
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_the_comparison_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel by kernel with another operator is not the same bits."""
    x, u, mod, w = operands(3, 7, 48, torch.float32)
    want = OPS.iterate(x, buffers(x), u, mod, w, 4, forward_workspace(x, x.dtype, "full"), 3)
    assert torch.equal(kernel_by_kernel(x, u, mod, w, 4, 3), want)
    step_forward = block.step_forward
    monkeypatch.setattr(
        block, "step_forward", lambda o, x, u, mod, *rest: step_forward(o, x, u, mod * 1.001, *rest)
    )
    assert not torch.equal(kernel_by_kernel(x, u, mod, w, 4, 3), want)


def test_settings_are_told_apart() -> None:
    """An iterate in float32 beside half-precision products is not one call."""
    assert cpu_loop.loops(torch.float32, torch.float32)
    assert not cpu_loop.loops(torch.float32, torch.bfloat16)
    assert not cpu_loop.loops(torch.float64, torch.float64)
