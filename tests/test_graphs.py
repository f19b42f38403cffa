"""Captured launches without a GPU: the plan is recorded and replayed, on static buffers only."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorder import NotStatic, RecordingBackend, eager, make, network
from torch import Tensor

from fpdm import engine, graphs, run, solvers, steps
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.graphs import GraphCache, GraphKey
from fpdm.solvers import Anderson

SMALL = ModelConfig(
    input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5, pre_depth=1,
    post_depth=2,
)  # fmt: skip
TIMED = replace(SMALL, pre_post_timestep_conditioning=True)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=2)
BUSY = SamplerConfig(
    method="ddpm", steps=5, iters=3, reuse="extrapolate", guidance=2.5, batch=3, graphs="on"
)
LABELS, SEEDS = [0, 4, 1, 1, 3, 2, 0], [5, 0, 2**63, 2**64 - 1, 7, 8, 9]
CASES: dict[str, tuple[ModelConfig, SamplerConfig]] = {
    "busy": (SMALL, BUSY),
    "interval": (SMALL, replace(BUSY, guidance_low=0.3, guidance_high=0.7, steps=7)),
    "conditioned": (TIMED, replace(BUSY, guidance_rescale=0.5)),
    "schedule": (
        SMALL,
        replace(BUSY, iters=None, allocation="explicit", schedule=(15, 1, 2, 9, 4)),
    ),
    "blend": (SMALL, replace(BUSY, reuse="blend", reuse_gamma=0.1, reuse_gamma_end=0.9)),
    "multistep": (SMALL, replace(BUSY, method="dpmpp_2m", reuse="none")),
    "half": (SMALL, replace(BUSY, dtype="bfloat16", reuse="full")),
    "tolerance": (SMALL, replace(BUSY, iters=9, tol=0.15, batch=7)),
    "adaptive": (SMALL, replace(BUSY, iters=4, tol=0.15, allocation="adaptive", steps=7)),
    "dit": (DIT, replace(BUSY, iters=None, reuse="none")),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_equal_eager(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, over batches, ragged ends, seeds and calls; every launch of the steady state is a
    replay."""
    kind, config = CASES[case]
    model = network(kind)
    # who is compacted when decides the shapes, and shapes the rounding: late for both, as on a GPU
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    plain, (s, backend) = eager(config, model), make(config, model, monkeypatch)
    assert plain.graphs is None
    assert s.graphs is not None
    for labels, seeds in ((LABELS, SEEDS), (LABELS[::-1], SEEDS), (LABELS, range(7))):
        want, found = plain.sample(labels, seeds), s.sample(labels, seeds)
        assert torch.equal(found.x, want.x)
        assert torch.equal(found.stats.residual.nan_to_num(-1), want.stats.residual.nan_to_num(-1))
        assert torch.equal(found.stats.iterations, want.stats.iterations)
    assert backend.alive == s.graphs.captures > 0
    captures, replays = s.graphs.captures, s.graphs.replays
    if not s.tol:
        s.sample(LABELS, SEEDS)
        sizes = [g for x in s.launches if x.op == "iterate" for g in run.groups(x.count)]
        pieces = len(sizes) + sum(x.op in ("encode", "update") for x in s.launches)
        assert s.graphs.captures == captures
        assert s.graphs.replays == replays + pieces * -(-7 // config.batch)


def test_given_noise_and_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise goes through a static buffer; a solver's steps run eagerly among the graphs."""
    model = network(SMALL)
    noise = torch.randn(5, 7, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    s, _ = make(BUSY, model, monkeypatch)
    plain = eager(BUSY, model)
    for z in (noise, noise.flip(0), None):
        want = plain.sample(LABELS, SEEDS, step_noise=z).x
        assert torch.equal(s.sample(LABELS, SEEDS, step_noise=z).x, want)
    s, backend = make(replace(BUSY, tol=0.1), model, monkeypatch)
    s = Sampler(model, s.diffusion, s.config, solver=Anderson)
    backend.statics = lambda: [
        *s._kept.tensors(), s.timesteps, s.counts, s.reserves, s.rows,  # type: ignore[union-attr]
        *s.weights.params.values(), *s.weights.copies.values(), model.pos_embed,
    ]  # fmt: skip
    plain = Sampler(model, s.diffusion, replace(s.config, graphs="off"), solver=Anderson)
    for _ in range(3):
        assert torch.equal(s.sample(LABELS, SEEDS).x, plain.sample(LABELS, SEEDS).x)
    assert s.graphs is not None
    assert {key.piece for key in s.graphs.entries} == {"encode", "update"}


def bakes_the_step(self: run.Run, launch: Any, n: int, noisy: bool) -> None:
    """A launch that reads its row by the host's counter instead of the device's."""
    self.w.step.fill_(launch.step)
    UPDATE(self, launch, n, noisy)


def reads_what_is_not_static(self: run.Run, launch: Any, n: int) -> None:
    """A launch that reads a tensor of its run."""
    ENCODE(self, launch, n)
    self.w.z[0].add_(self.stats.residual.new_zeros(1) if launch.step < 0 else self.stray)


def draws_on_the_host(self: run.Run, launch: Any, n: int, noisy: bool) -> None:
    """Noise of the step at capture, for ever."""
    seen = steps.step

    def step(x: Tensor, out: Tensor, row: Tensor, z: Any, *rest: Any) -> Tensor:
        z = run.normals(self.w.keys[: len(x)], launch.step, 0, run.SAMPLE_STEP, self.shape)
        return seen(x, out, row, z, *rest)

    steps.step = step
    try:
        UPDATE(self, launch, n, noisy)
    finally:
        steps.step = seen


UPDATE, ENCODE = run.Run._update, run.Run._encode


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_update", bakes_the_step),
        ("_update", draws_on_the_host),
        ("_encode", reads_what_is_not_static),
    ],
)
def test_dynamic_launches_are_caught(
    name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(SMALL)
    want = eager(BUSY, model).sample(LABELS, SEEDS).x
    monkeypatch.setattr(run.Run, "stray", torch.zeros(1), raising=False)
    monkeypatch.setattr(run.Run, name, fault)
    assert torch.equal(eager(BUSY, model).sample(LABELS, SEEDS).x, want)  # eagerly it is right
    s, backend = make(BUSY, model, monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = s.sample(LABELS, SEEDS).x
    refused = [w for w in told if "capture failed" in str(w.message)]
    assert bool(refused) != (not torch.equal(found, want))
    if fault is reads_what_is_not_static:
        assert "reads (1,)" in str(refused[0].message)
        with pytest.raises(NotStatic):
            backend.capture(lambda: torch.zeros(3).add_(torch.ones(3).clone() + STRAY))


STRAY = torch.ones(3)


# keys


def test_refresh_keeps_graphs_and_their_weights_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, _ = make(replace(BUSY, dtype="bfloat16"), model, monkeypatch)
    assert s.graphs is not None
    first = [s.sample(LABELS, SEEDS).x for _ in range(2)][-1]  # keys met once are captured now
    captures = s.graphs.captures
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    s.weights.refresh()
    found = s.sample(LABELS, SEEDS).x
    assert s.graphs.captures == captures
    assert torch.equal(found, eager(s.config, model).sample(LABELS, SEEDS).x)
    assert not torch.equal(found, first)


# the cache


class Work:
    """Launches that count how often they ran."""

    def __init__(self) -> None:
        self.ran = 0
        self.buffer = torch.zeros(3)

    def __call__(self) -> None:
        self.ran += 1
        self.buffer.add_(1)


def cache_of(work: Work, always: bool, limit: int = 8) -> tuple[GraphCache, RecordingBackend]:
    backend = RecordingBackend(lambda: [work.buffer])
    return GraphCache(backend, always, limit), backend


def keys() -> Iterator[GraphKey]:
    first = GraphKey("x", 1, (), (), (), "cpu", "reference", 0, ())
    return (replace(first, rows=i) for i in itertools.count())


def test_eviction() -> None:
    work = Work()
    cache, backend = cache_of(work, always=True, limit=2)
    a, b, c = itertools.islice(keys(), 3)
    for key in (a, a, b, b, a):  # b is the older one now
        cache.run(key, work)
    assert (cache.captures, cache.replays, cache.evictions, backend.alive) == (2, 3, 0, 2)
    cache.run(c, work)
    assert (list(cache.entries), cache.evictions, backend.alive) == ([a, c], 1, 1)
    cache.run(a, work)
    cache.run(b, work)
    assert (list(cache.entries), cache.evictions, backend.alive) == ([a, b], 1, 1)
    # once each: 8 launches, whatever became of them
    assert work.buffer.tolist() == [8.0] * 3
    # a hundred keys, two kept
    for key in itertools.islice(keys(), 100):
        cache.run(key, work)
        cache.run(key, work)
        assert backend.alive <= 2
    cache.clear()
    assert (backend.alive, backend.emptied, len(cache.entries)) == (0, 1, 0)


def test_few_graphs_still_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, backend = make(replace(BUSY, iters=7), model, monkeypatch)
    assert s.graphs is not None
    s.graphs.limit = 6
    for _ in range(3):
        found = s.sample(LABELS, SEEDS).x
        assert backend.alive <= 6
    assert torch.equal(found, eager(s.config, model).sample(LABELS, SEEDS).x)
    assert s.graphs.evictions


def test_an_iterate_of_another_dtype_has_another_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = network(SMALL), replace(BUSY, dtype="bfloat16")
    s, _ = make(config, model, monkeypatch)
    s.sample(LABELS, SEEDS)
    model.execution = replace(model.execution, residual_dtype="float32")
    wide = s.sample(LABELS, SEEDS).x
    assert s._kept is not None
    assert s._kept.z[0].dtype == torch.float32
    assert torch.equal(wide, eager(config, model).sample(LABELS, SEEDS).x)


@pytest.mark.parametrize(("extra", "kept"), [(-0.4, True), (-0.02, False), (0.3, False)])
def test_auto_keeps_what_measures_faster(extra: float, kept: bool) -> None:
    work = Work()
    cache, backend = cache_of(work, always=False)
    backend.replay_extra = extra
    key = next(keys())
    for _ in range(1 + graphs.TRIALS):
        cache.run(key, work)
    assert (work.ran, cache.captures) == (1 + graphs.TRIALS, 0)
    backend.late = True
    for _ in range(2 * graphs.TRIALS):
        cache.run(key, work)
    assert (cache.captures, backend.alive, cache.entries[key].settled) == (1, 1, False)
    backend.late = False
    for _ in range(4):
        cache.run(key, work)
    assert (backend.alive == 1) == kept
    assert cache.entries[key].settled
    total = 1 + 3 * graphs.TRIALS + 4
    assert work.buffer.tolist() == [float(total)] * 3
    assert cache.captures == 1  # never tried again


def test_a_failed_capture_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, no graph, and this and the next request are right."""
    model = network(SMALL)
    s, backend = make(BUSY, model, monkeypatch)
    want = eager(BUSY, model).sample(LABELS, SEEDS).x
    s.sample(LABELS, SEEDS)
    assert s.graphs is not None
    assert backend.alive > 0
    backend.fail = 1
    with pytest.warns(UserWarning, match="capture failed, everything runs eagerly now: operation"):
        found = s.sample(LABELS, SEEDS, stats=False).x
    assert torch.equal(found, want)
    assert (backend.alive, len(s.graphs.entries), backend.emptied > 0) == (0, 0, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    assert backend.alive == 0


def test_errors_of_the_work_itself_are_not_hidden() -> None:
    work = Work()
    cache, _ = cache_of(work, always=True)

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.run(next(keys()), broken)


# the workspace


def test_release_and_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, backend = make(replace(BUSY, batch=5), model, monkeypatch)
    want = eager(s.config, model).sample(LABELS, SEEDS).x
    few = s.sample(LABELS[:2], SEEDS[:2]).x
    small = s._kept
    assert (few - want[:2]).abs().max() <= 1e-5
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    assert s._kept is not small
    assert s._kept is not None
    kept = s._kept
    assert torch.equal(s.sample(LABELS[:2], SEEDS[:2]).x, few)  # a part of the larger one
    assert s._kept is kept
    s.release()
    assert (s._kept, backend.alive) == (None, 0)
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)


def test_a_kept_workspace_outlives_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, _ = make(BUSY, model, monkeypatch)
    with torch.inference_mode():
        want = [s.sample(LABELS, SEEDS).x for _ in range(2)][-1]
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)


def test_streams_are_told_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for what was launched before it, on whichever stream; buffers that stay are held
    for the stream of every call."""

    class Event:
        waits = 0

        def wait(self) -> None:
            self.waits += 1

    events: list[Event] = []
    held: list[int] = []

    def now(device: torch.device) -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(engine, "_now", now)
    monkeypatch.setattr(engine, "_hold", lambda buffers: held.append(len(buffers)))
    s, _ = make(BUSY, network(SMALL), monkeypatch)
    assert len(events) == 1  # tables and weights may be on their way still
    for n in (1, 2):
        s.sample(LABELS, SEEDS)
        assert [e.waits for e in events] == [1] * n + [0]
    assert s._kept is not None
    assert held == [len(s._kept.tensors())] * 2


def test_a_taken_workspace_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, _ = make(replace(BUSY, steps=2), model, monkeypatch)
    want = eager(s.config, model).sample(LABELS, SEEDS).x
    inner: list[Tensor] = []

    def between(_: int) -> None:
        inner.append(s.sample(LABELS, SEEDS).x)

    for _ in range(2):
        assert torch.equal(s.sample(LABELS, SEEDS, progress=between).x, want)
    assert all(torch.equal(x, want) for x in inner)
    assert len(inner) == 2 * 3 * 2


def test_without_graphs_nothing_is_kept() -> None:
    s = Sampler(network(SMALL), Diffusion(DiffusionConfig()), replace(BUSY, graphs="auto"))
    s.sample(LABELS, SEEDS)
    assert (s.graphs, s._kept) == (None, None)
    s.release()


def test_graphs_cannot_be_had_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"^sample\.graphs: got on, expected auto or off on cpu$"):
        Sampler(network(SMALL), Diffusion(DiffusionConfig()), BUSY)


def test_workspace_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of U: u 2, iterates 2, intermediates 7, solutions as many as reuse keeps, results
    only while a residual decides."""
    wide = replace(SMALL, hidden_size=256, input_size=16)
    model = network(wide)
    rows, tokens = 2 * 3, 64
    unit = rows * tokens * 256 * 4
    for changes, units in (
        ({"reuse": "none"}, 11), ({"reuse": "full"}, 12), ({"reuse": "extrapolate"}, 13),
        ({"reuse": "full", "tol": 0.1}, 13),
    ):  # fmt: skip
        s, _ = make(replace(BUSY, steps=1, **changes), model, monkeypatch)
        s.sample(LABELS[:3], SEEDS[:3])
        assert s._kept is not None
        vectors = rows * (6 * 4 + 2 + 6) * 256 * 4
        assert units * unit <= s._kept.nbytes() - vectors <= (units + 0.1) * unit


def test_out_of_memory_names_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(SMALL)
    s, _ = make(BUSY, model, monkeypatch)
    want = s.sample(LABELS, SEEDS).x
    s.release()
    full, encode = [True], model.encode

    def short(*args: Any, **kw: Any) -> Tensor:
        if full.pop() if full else False:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return encode(*args, **kw)

    monkeypatch.setattr(model, "encode", short)
    with pytest.raises(ConfigError, match=r"^sample.batch: got 3, expected less: out of memory on"):
        s.sample(LABELS, SEEDS)
    assert s._kept is None
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)
