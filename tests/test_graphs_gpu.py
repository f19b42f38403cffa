"""CUDA graphs on a GPU: replays are eager launches bit for bit, and memory comes back."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY, random_model

from fpdm import run, solvers
from fpdm.batches import Draws
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.graphs import CudaBackend, GraphCache, GraphKey
from fpdm.microstep import MicroStep
from fpdm.optim import AdamWEMA
from fpdm.recipes import RECIPES
from fpdm.train import DTYPES
from fpdm.weights import PreparedWeights

pytestmark = pytest.mark.gpu

BUSY = SamplerConfig(
    method="ddpm", steps=6, iters=7, reuse="extrapolate", guidance=2.0, batch=3, dtype="bfloat16",
    graphs="on",
)  # fmt: skip
LABELS, SEEDS = [1, 0, 3], [5, 6, 7]
CASES: dict[str, dict[str, Any]] = {
    "busy": {},
    "fp32": {"dtype": "float32", "method": "dpmpp_2m"},
    "interval": {"guidance_low": 0.3, "guidance_high": 0.7, "guidance_rescale": 0.5},
    "tolerance": {"tol": 0.1},
    "adaptive": {"tol": 0.1, "allocation": "adaptive"},
    "auto": {"graphs": "auto"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(TINY).cuda()


def make(model: Any, config: SamplerConfig = BUSY) -> Sampler:
    return Sampler(model, Diffusion(DiffusionConfig(), "cuda"), config)


def key(number: int) -> GraphKey:
    return GraphKey("x", number, (), (), (), "cuda", "", 0, ())


@pytest.mark.parametrize("case", CASES)
def test_a_thousand_replays(model: Any, case: str) -> None:
    """Each bitwise what eager launches give, over batches and seeds."""
    s = make(model, replace(BUSY, **CASES[case]))
    plain = make(model, replace(s.config, graphs="off"))
    want = [plain.sample(LABELS, [n, n + 1, n + 2]).x for n in range(3)]
    assert s.graphs is not None
    for round_ in range(200):
        found = s.sample(LABELS, [round_ % 3 + i for i in range(3)]).x
        assert torch.equal(found, want[round_ % 3])
        if s.graphs.replays >= 1000 or (case == "auto" and round_ > 60):
            break
    assert case == "auto" or s.graphs.replays >= 1000
    assert not s.graphs.broken


def test_seeds_change_the_noise(model: Any) -> None:
    s = make(model)
    found = [s.sample([1, 1, 1], [n, n + 10, n + 20]).x for n in range(6)]
    images = torch.cat(found)
    apart = (images[:, None] - images[None]).flatten(2).abs().amax(2)
    assert apart[~torch.eye(len(images), dtype=torch.bool, device="cuda")].min() > 0.01
    assert torch.equal(s.sample([1, 1, 1], [0, 10, 20]).x, found[0])


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.alone
def test_a_hundred_captures_give_their_memory_back(model: Any) -> None:
    s = make(model)
    assert s.graphs is not None
    sizes = []
    while s.graphs.captures < 100:
        for _ in range(2):
            s.sample(LABELS, SEEDS)
        s.release()
        sizes.append(used())
    assert max(sizes) - sizes[0] <= 0.1 * 2**30


@pytest.mark.alone
def test_evicted_graphs_give_their_memory_back(model: Any) -> None:
    """Shapes that never come again, at most two graphs at a time."""
    s = make(model, replace(BUSY, batch=128, guidance=1.0, steps=2, iters=1))
    assert s.graphs is not None
    s.graphs.limit = 2
    s.sample([0] * 128, range(128))
    before = used()
    for count in range(128, 28, -1):
        for _ in range(2):
            s.sample([0] * count, range(count))
    assert used() - before <= 0.1 * 2**30


@pytest.mark.alone
def test_a_failed_capture_releases_its_pool() -> None:
    """CUDA refuses to copy to the host in a capture; what was allocated comes back."""
    x = torch.ones(64, 2**20, device="cuda")

    def waits() -> None:
        y = x * 2
        y.sum().item()

    waits()
    torch.cuda.empty_cache()
    before = used()
    cache = GraphCache(CudaBackend(x.device), always=True)
    cache.run(key(1), waits)
    with pytest.warns(UserWarning, match="graphs: capture failed, everything runs eagerly now"):
        cache.run(key(1), waits)
    torch.cuda.empty_cache()
    assert used() - before <= 64 * 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.run(key(1), waits)
    # the next one captures as if nothing had happened
    fresh, y = GraphCache(CudaBackend(x.device), always=True), torch.zeros(4, device="cuda")
    for _ in range(4):
        fresh.run(key(2), lambda: y.add_(1))
    assert (y.tolist(), fresh.captures, fresh.broken) == ([4.0] * 4, 1, False)


def test_a_dropped_graph_leaves_the_others_theirs() -> None:
    """Products of graphs on one stream share cuBLAS's workspace, which a reset frees."""
    a, b = torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    found, want = torch.empty_like(a), a @ b
    cache = GraphCache(CudaBackend(a.device), always=True)
    for number in (1, 2):
        for _ in range(2):
            cache.run(key(number), lambda: torch.mm(a, b, out=found))
    cache._drop(cache.entries.pop(key(1)))
    torch.cuda.empty_cache()
    junk = [torch.full((2**25,), 255, dtype=torch.uint8, device="cuda") for _ in range(8)]
    for _ in range(3):
        found.zero_()
        cache.run(key(2), lambda: torch.mm(a, b, out=found))
        assert torch.equal(found, want)
    assert all((x == 255).all() for x in junk)


def test_an_error_of_the_work_itself() -> None:
    y = torch.zeros(4, device="cuda")
    broken = [False]

    def work() -> None:
        y.add_(1)
        if broken[0]:
            raise ZeroDivisionError

    cache = GraphCache(CudaBackend(y.device), always=True)
    cache.run(key(1), work)
    broken[0] = True
    with pytest.warns(UserWarning, match="capture failed"), pytest.raises(ZeroDivisionError):
        cache.run(key(1), work)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert y.tolist() == [2.0] * 4


def test_capture_while_a_thread_pins_memory(model: Any) -> None:
    stop = threading.Event()

    def pin() -> None:
        while not stop.is_set():
            torch.empty(2**16).pin_memory()
            torch.empty(2**22, device="cuda")

    want = make(model, replace(BUSY, graphs="off")).sample(LABELS, SEEDS).x
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            s = make(model)
            for _ in range(3):
                assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    finally:
        stop.set()
        thread.join()
    assert s.graphs is not None
    assert s.graphs.captures > 0


def test_two_threads_capture(model: Any) -> None:
    """A sampler each, whose captures would spoil each other."""
    want = make(model, replace(BUSY, graphs="off")).sample(LABELS, SEEDS).x
    found: list[bool] = []
    # libraries are loaded in the first call of a thread
    warm = threading.Barrier(2, timeout=60)

    def run_one() -> None:
        s = make(model)
        found.append(torch.equal(s.sample(LABELS, SEEDS).x, want))
        warm.wait()
        found.extend(torch.equal(s.sample(LABELS, SEEDS).x, want) for _ in range(3))
        found.append(s.graphs is not None and s.graphs.captures > 0)

    threads = [threading.Thread(target=run_one) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 10


@pytest.mark.alone
def test_memory_pressure(model: Any) -> None:
    """Nearly full: a right answer or one clear error; and the next request works."""
    s, want = make(model), make(model, replace(BUSY, graphs="off")).sample(LABELS, SEEDS).x
    for _ in range(3):
        s.sample(LABELS, SEEDS)
    wide = random_model(ModelConfig(input_size=64, hidden_size=384, num_heads=6)).cuda()
    large = make(wide, SamplerConfig(steps=2, iters=2, batch=4096, graphs="on"))
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(int(0.96 * free), dtype=torch.uint8, device="cuda")
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    with pytest.raises(ConfigError, match=r"^sample.batch: got 4096, expected less: out of memory"):
        large.sample([0] * 4096, range(4096))
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    del hog
    torch.cuda.empty_cache()
    assert large.sample([0, 1], [0, 1]).x.isfinite().all()


def test_two_streams_share_a_sampler(model: Any) -> None:
    """The static buffers are handed over in order, not only on the host."""
    s, streams = make(model), [torch.cuda.Stream() for _ in range(2)]
    want = [s.sample(LABELS, [n, n, n]).x for n in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(s.sample(LABELS, [n, n, n]).x)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, want))


def micro_steps(
    mode: str, precision: str, gradient: Any = "unroll", **execution: Any
) -> tuple[MicroStep, AdamWEMA]:
    config = RECIPES["digits"]
    fixed = replace(config.fixed_point, n_max=2, m_max=2, gradient=gradient)
    train = replace(config.train, graphs=mode, precision=precision)
    config = replace(config, fixed_point=fixed, train=train)
    net = random_model(config.model, **execution).cuda()
    weights = PreparedWeights(net, DTYPES[precision], accumulate=True)
    optimizer = AdamWEMA(net, config.optim, weights)
    diffusion = Diffusion(config.diffusion, "cuda")
    return MicroStep(net, diffusion, weights, config, torch.device("cuda")), optimizer


def steps_of(step: MicroStep, optimizer: AdamWEMA) -> list[torch.Tensor]:
    """Losses and gradients of 24 micro-batches, an update after each, and the weights."""
    rows = []
    for number, (n, m) in enumerate([(2, 2), (2, 1), (0, 1)] * 8):
        g = torch.Generator("cuda").manual_seed(number)
        x0, noise = torch.randn(2, 16, 1, 8, 8, generator=g, device="cuda")
        t, y = (torch.randint(0, top, (16,), generator=g, device="cuda")
                for top in (1000, 11))  # fmt: skip
        optimizer.zero_grad()
        rows.append(step(x0, Draws(t, noise, y), n, m, 4.0 + number))
        rows.append(optimizer.gradients.clone())
        optimizer.step(1e-3, 1 / (4.0 + number))
    return [*rows, optimizer.flat["w"]]


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_replays_of_other_gradients(gradient: str) -> None:
    """Bitwise those of eager steps, also where a linear solver of the library refuses the capture:
    then after one warning."""
    step, optimizer = micro_steps("on", "fp32", gradient)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = steps_of(step, optimizer)
    assert step.graphs is not None
    assert (
        len([w for w in told if "graphs: capture failed" in str(w.message)]) == step.graphs.broken
    )
    want = steps_of(*micro_steps("off", "fp32", gradient))
    assert all(torch.equal(a, b) for a, b in zip(found, want))


@pytest.mark.parametrize("execution", [{}, {"recompute": "elementwise", "chunks": 2}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_replayed_training_steps(mode: str, precision: str, execution: dict[str, Any]) -> None:
    """Losses, gradients and weights bitwise those of eager steps, optimiser steps between."""
    found = []
    for how in (mode, "off"):
        step, optimizer = micro_steps(how, precision, **execution)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(steps_of(step, optimizer))
        if how == "on":
            assert step.graphs is not None
            assert (step.graphs.captures, step.graphs.replays) == (3, 19)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.alone
def test_training_graphs_give_their_memory_back() -> None:
    step, _ = micro_steps("on", "bf16")
    x0, noise = torch.randn(2, 256, 1, 8, 8, device="cuda")
    t, y = (torch.zeros(256, dtype=torch.int64, device="cuda") for _ in range(2))
    sizes = []
    for _ in range(10):
        for n, m in [(0, 1), (2, 1), (0, 2), (2, 2)] * 3:
            step(x0, Draws(t, noise, y), n, m, 1.0)
        step.release()
        torch.cuda.empty_cache()
        sizes.append(used())
    assert max(sizes) - sizes[0] <= 0.1 * 2**30


def test_a_workspace_outlives_its_stream(model: Any) -> None:
    """Buffers of one stream that are freed while another still works on them."""
    s = make(model)
    want = [s.sample(LABELS, SEEDS).x for _ in range(3)][-1]
    assert s._kept is not None
    sizes = [t.untyped_storage().nbytes() for t in s._kept.tensors()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)
        found = s.sample(LABELS, SEEDS).x
    s.release()
    # whatever the allocator thinks is free on the first stream
    junk = [torch.full((n,), 255, dtype=torch.uint8, device="cuda") for n in sizes * 2]
    torch.cuda.synchronize()
    assert torch.equal(found, want)
    assert len(junk) == 2 * len(sizes)


@pytest.mark.alone
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_loops_that_end_on_the_device(
    model: Any, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WHILE nodes: what the host-followed iterations give, bit for bit, without one reading; and
    their memory comes back."""
    config = replace(BUSY, tol=0.1, iters=20, guidance=guidance, invariant=True)
    plain, s = make(model, replace(config, graphs="off")), make(model, config)
    assert s.graphs is not None
    if not s.graphs.loops:
        pytest.skip("this torch captures no conditional WHILE nodes (2.14)")
    # both branches to the end, so that shapes are the same
    monkeypatch.setattr(run, "bucket", lambda rows: 2 if guidance > 1 else 1)
    want = [plain.sample(LABELS, [n, n + 1, n + 2]) for n in range(3)]
    for round_ in range(60):
        found = s.sample(LABELS, [round_ % 3 + i for i in range(3)])
        assert torch.equal(found.x, want[round_ % 3].x)
        assert torch.equal(found.stats.iterations, want[round_ % 3].stats.iterations)
    assert s.graphs.loops
    assert any(e.graph for key, e in s.graphs.entries.items() if key.piece == "solve")
    reads: list[int] = []
    monkeypatch.setattr(solvers.Flag, "read", lambda self, j: reads.append(j))
    s.sample(LABELS, SEEDS)
    assert reads == []
    sizes = []
    for _ in range(20):
        for _ in range(2):
            s.sample(LABELS, SEEDS)
        s.release()
        sizes.append(used())
    assert max(sizes) - sizes[0] <= 0.1 * 2**30


def test_a_body_that_cannot_be_captured() -> None:
    """CUDA refuses to copy to the host in it: the host goes on as before, and other graphs are
    made."""
    cache = GraphCache(CudaBackend(torch.device("cuda")), always=True)
    if not cache.loops:
        pytest.skip("this torch captures no conditional WHILE nodes (2.14)")
    left, y = torch.ones(1, device="cuda"), torch.zeros(4, device="cuda")
    for expected in (contextlib.nullcontext(), pytest.warns(UserWarning, match="of a loop failed")):
        with expected:
            assert not cache.loop(key(1), lambda: left[0] > 0, lambda: left.sub_(left.item()))
    gc.collect()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for _ in range(3):
        cache.run(key(2), lambda: y.add_(1))
    assert (y.tolist(), cache.captures, cache.broken) == ([3.0] * 4, 1, False)
    torch.cuda.empty_cache()
