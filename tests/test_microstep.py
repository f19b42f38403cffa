"""The trainer's captured micro-batches without a GPU: recorded, and replayed on static buffers."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from recorder import RecordingBackend
from torch import Tensor

from fpdm import graphs, microstep
from fpdm.batches import Draws
from fpdm.config import Config, ConfigError
from fpdm.diffusion import Diffusion
from fpdm.microstep import MicroStep
from fpdm.optim import AdamWEMA
from fpdm.recipes import RECIPES
from fpdm.weights import PreparedWeights

SMALL = replace(RECIPES["digits"].model, hidden_size=16, num_heads=2)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=2)
CPU = torch.device("cpu")
PAIRS = [(0, 1), (2, 1), (2, 2), (0, 1), *[(2, 2), (2, 1), (0, 1)] * 4]


class Bench:
    """A micro-step on the CPU beside all that it works on; ``mode`` of train.graphs."""

    def __init__(
        self, mode: str, monkeypatch: pytest.MonkeyPatch, config: Config, **execution: Any
    ):
        self.model = random_model(config.model, impl="reference", **execution)
        self.diffusion = Diffusion(config.diffusion)
        dtype = microstep_dtype(config)
        self.weights = PreparedWeights(self.model, dtype, accumulate=True)
        self.optimizer = AdamWEMA(self.model, config.optim, self.weights)
        self.backend = RecordingBackend(self.statics)
        monkeypatch.setattr(graphs, "backend_for", lambda device: self.backend)
        config = replace(config, train=replace(config.train, graphs=mode))
        self.step = MicroStep(self.model, self.diffusion, self.weights, config, CPU)

    def statics(self) -> Iterator[Tensor]:
        yield from self.optimizer.flat.values()
        yield self.optimizer.buffer
        yield from self.weights.copies.values()
        yield from self.model.buffers()
        yield from (p.detach() for p in self.model.parameters())
        yield self.diffusion._tables
        if self.step.held is not None:
            yield from self.step.held.tensors()

    def run(
        self, number: int, n: int, m: int, batch: int = 3, zero: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(rows, gradients) of a micro-batch of its own."""
        g = torch.Generator().manual_seed(number)
        x0, noise = (torch.randn(batch, 1, 8, 8, generator=g) for _ in range(2))
        t, y = (torch.randint(0, top, (batch,), generator=g) for top in (1000, 11))
        if zero:
            self.optimizer.zero_grad()
        rows = self.step(x0, Draws(t, noise, y), n, m, 0.5 + number)
        self.optimizer.grad_norm()  # gathers gradients that left the buffer
        return rows, self.optimizer.gradients.clone()


def microstep_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def small(**train: Any) -> Config:
    config = RECIPES["digits"]
    fixed = replace(config.fixed_point, n_max=2, m_max=2)
    return replace(
        config, model=SMALL, fixed_point=fixed, train=replace(config.train, **train)
    )  # fmt: skip


CASES: dict[str, tuple[Config, dict[str, Any]]] = {
    "plain": (small(), {}),
    "half": (small(precision="bf16"), {"residual_dtype": "float32"}),
    "elementwise": (small(), {"recompute": "elementwise", "chunks": 2}),
    "full": (small(), {"recompute": "full"}),
    "phantom": (
        replace(small(), fixed_point=replace(small().fixed_point, gradient="phantom")), {}),
    "dit": (replace(small(), model=DIT), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_replays_are_eager_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and every gradient bit for bit, over inputs, scales and (n, m); a graph per pair."""
    config, execution = CASES[case]
    ours = Bench("on", monkeypatch, config, **execution)
    usual = Bench("off", monkeypatch, config, **execution)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (n, m) in enumerate(PAIRS):
            for a, b in zip(ours.run(number, n, m), usual.run(number, n, m)):
                assert torch.equal(a, b)
    assert usual.step.graphs is None
    assert ours.step.graphs is not None
    # a pair's first launch is eager, and all are until the largest m has a graph
    pairs, eager = (1, 1) if case == "dit" else (3, 6)
    assert ours.step.graphs.captures == ours.backend.alive == pairs
    assert ours.step.graphs.replays == len(PAIRS) - eager
    ours.step.release()
    assert ours.backend.alive == 0


def test_an_optimizer_step_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written in place: a graph reads the new ones."""
    config = small(precision="bf16")
    ours, usual = (Bench(mode, monkeypatch, config) for mode in ("on", "off"))
    for number in range(6):
        for b in (ours, usual):
            b.run(number, 1, 2)
            b.optimizer.step(1e-2)
    assert ours.step.graphs is not None
    assert ours.step.graphs.replays == 5
    assert torch.equal(ours.optimizer.flat["w"], usual.optimizer.flat["w"])


def test_another_batch_size_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    for number, batch in enumerate((3, 3, 3, 2, 2, 2, 3, 3)):
        for a, b in zip(ours.run(number, 1, 2, batch), usual.run(number, 1, 2, batch)):
            assert torch.equal(a, b)
    assert ours.backend.alive == 1
    assert ours.step.graphs is not None
    assert ours.step.graphs.captures == 3


def test_the_largest_m_is_captured_first_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After another batch size, too, whose graphs have a pool of their own."""
    ours = Bench("on", monkeypatch, small())
    assert ours.step.graphs is not None
    for batch in (3, 2):
        for number in range(3):
            ours.run(number, 1, 1, batch)
        assert ours.backend.alive == 0
        for number in range(6):
            ours.run(number, 1, 2 - number % 2, batch)
        assert ours.backend.alive == 2
        ours.run(0, 1, 2, batch + 2)
        assert ours.backend.alive == 0


def test_a_graph_that_was_dropped_has_been_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: where the largest m gains nothing by a graph, a smaller one is tried all the same."""
    ours = Bench("auto", monkeypatch, small())
    for m in (2, 1):
        for number in range(8):
            ours.run(number, 1, m)
    assert ours.step.graphs is not None
    assert (ours.step.graphs.captures, ours.backend.alive) == (2, 0)


KEEPS = {"nothing": False, "its loss": True}


def accumulator(p: Tensor) -> Any:
    """The node of autograd that adds to a parameter's gradient: the one that lives, else a new
    one."""
    return p.view_as(p).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keeps", KEEPS)
def test_no_node_of_autograd_outlives_a_step(
    case: str, keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an eager step belongs to the caller's stream, and would draw it into the capture of
    the next, which CUDA refuses."""
    config, execution = CASES[case]
    b, kept = Bench("off", monkeypatch, config, **execution), []
    params, losses = list(b.model.parameters()), b.diffusion.losses

    def marking(*args: Any) -> dict[str, Tensor]:
        found = losses(*args)
        for p in params:
            accumulator(p).metadata["old"] = True
        kept.extend([found] if KEEPS[keeps] else [])
        return found

    monkeypatch.setattr(b.diffusion, "losses", marking)
    gc.collect()
    gc.disable()
    try:
        b.run(0, 1, 2)
        old = ["old" in accumulator(p).metadata for p in params]
    finally:
        gc.enable()
    assert any(old) is KEEPS[keeps]


def test_statistics_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Bench("on", monkeypatch, small())
    x0, noise = torch.randn(2, 3, 1, 8, 8)
    draws = Draws(torch.tensor([1, 2, 3]), noise, torch.tensor([1, 2, 3]))
    for _ in range(4):
        rows = ours.step(x0, draws, 1, 2, 1.0, stats=True)
    assert ours.backend.alive == 0
    assert (rows[3] > 0).all()


def planted(fault: str, step: MicroStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right when launched, and stale or lost when replayed."""
    call, run = MicroStep.__call__, MicroStep._run
    current: list[Draws] = []

    def called(self: Any, x0: Tensor, draws: Draws, *rest: Any) -> Tensor:
        current[:] = [draws]
        return call(self, x0, draws, *rest)

    def ran(self: Any, x0: Any, d: Draws, n: int, m: int, scale: Any, stats: bool) -> Tensor:
        if self is step and fault == "scale":
            scale = float(scale.detach().numpy())
        if self is step and fault == "noise":
            d = current[0]
        return run(self, x0, d, n, m, scale, stats)

    monkeypatch.setattr(MicroStep, "__call__", called)
    monkeypatch.setattr(MicroStep, "_run", ran)


def differs(ours: Bench, usual: Bench) -> bool:
    """Whether any of five steps of one pair does."""
    pairs = [(ours.run(i, 1, 2), usual.run(i, 1, 2)) for i in range(5)]
    return any(not torch.equal(a, b) for found in pairs for a, b in zip(*found))


def test_numbers_and_passing_buffers_in_a_graph_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss scale that is no buffer gives stale gradients, a micro-batch's own tensor no graph."""
    for fault in ("scale", "noise"):
        with monkeypatch.context() as patch:
            one, usual = (Bench(mode, patch, small()) for mode in ("off", "off"))
            planted(fault, one.step, patch)
            assert not differs(one, usual)
    with monkeypatch.context() as patch:
        ours, usual = (Bench(mode, patch, small()) for mode in ("on", "off"))
        planted("scale", ours.step, patch)
        assert differs(ours, usual)
    with monkeypatch.context() as patch:
        ours, usual = (Bench(mode, patch, small()) for mode in ("on", "off"))
        planted("noise", ours.step, patch)
        with pytest.warns(UserWarning, match=r"capture failed.*reads \(3,"):
            assert not differs(ours, usual)


@pytest.mark.parametrize("change", ["dropped", "replaced", "moved"])
def test_other_gradients_and_weights_than_captured(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph adds to the gradients it was captured with: with others there is another, or none."""
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    for number in range(8):
        for b in (ours, usual):
            b.optimizer.zero_grad()
            param = next(b.model.parameters())
            if number == 4 and change == "dropped":
                b.model.zero_grad()
            if number == 4 and change == "replaced":
                param.grad = torch.ones_like(param)
            if number == 4 and change == "moved":
                param.data = param.data.clone() + 1
        (rows, grads), (want, others) = (b.run(number, 1, 2, zero=False) for b in (ours, usual))
        assert torch.equal(rows, want)
        assert torch.equal(grads, others)
        assert grads.norm() > 0


def test_as_many_graphs_as_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the cache's own limit, which would capture them again and again."""
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    ours = Bench("on", monkeypatch, small())
    for number, (n, m) in enumerate(PAIRS):
        ours.run(number, n, m)
    assert ours.step.graphs is not None
    assert (ours.step.graphs.evictions, ours.backend.alive) == (0, 3)


def test_a_failed_capture_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, usual = (Bench(mode, monkeypatch, small()) for mode in ("on", "off"))
    ours.backend.fail = 1
    with pytest.warns(UserWarning, match="capture failed, everything runs eagerly"):  # noqa: PT031
        for number in range(4):
            for a, b in zip(ours.run(number, 1, 2), usual.run(number, 1, 2)):
                assert torch.equal(a, b)
    assert ours.backend.alive == 0


@pytest.mark.parametrize("free", [24, 22])
def test_auto_needs_room_for_two_steps(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launched step beside the pool of the graphs; the results are the same without them."""
    ours, usual = Bench("auto", monkeypatch, small()), Bench("off", monkeypatch, small())
    asked: list[int] = []

    def room(device: torch.device) -> tuple[int, int]:
        asked.append(len(asked))
        return free * 10**9, 10 * 10**9

    monkeypatch.setattr(microstep, "room", room)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number, pair in enumerate([(0, 1), *[(2, 2)] * 9]):
            for a, b in zip(ours.run(number, *pair), usual.run(number, *pair)):
                assert torch.equal(a, b)
    lines = [str(w.message) for w in said]
    if free == 24:
        assert lines == []
        assert ours.step.graphs is not None
        assert ours.step.graphs.captures == 1
        # before the first capture alone
        assert len(asked) == 4
    else:
        assert lines == ["train.graphs: got 22.0 GB free, expected 23.0 for both: kernel by kernel "
                         "from here on, not as graphs"]  # fmt: skip
        assert ours.step.graphs is None
        assert len(asked) == 1


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free: the driver's, and what the allocator keeps; needed: the peak above what stays."""
    told = {"mem_get_info": (5, 100), "memory_allocated": 20, "memory_reserved": 60,
            "max_memory_allocated": 50}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert microstep.room(torch.device("cuda", 0)) == (45, 30)
    assert microstep.room(CPU) == (0, 0)


def test_on_needs_a_device_that_captures() -> None:
    config = small(graphs="on")
    model = random_model(config.model)
    weights = PreparedWeights(model, torch.float32)
    with pytest.raises(ConfigError, match=r"train\.graphs: got on, expected auto or off on cpu"):
        MicroStep(model, Diffusion(config.diffusion), weights, config, CPU)


def test_whole_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer with recorded micro-batches writes what it writes without. A step that finds no
    memory beside them is computed again under auto: what its launched micro-batch left in gradients
    and sums is gone. Under on the run ends, naming the way out."""
    plain, replayed = (whole_run(mode, tmp_path, monkeypatch) for mode in ("off", "on"))
    assert replayed.micro.graphs.replays > 15
    same_run(plain, replayed)
    with pytest.warns(UserWarning, match="^train.graphs: out of memory beside them: kernel by"):
        refused = whole_run("auto", tmp_path, monkeypatch, refuses=3)
    assert refused.micro.graphs is None
    same_run(plain, refused)
    shutil.rmtree(tmp_path / "on")
    with pytest.raises(ConfigError, match=r"\(now 2\), or train.graphs off: CUDA out of memory"):
        whole_run("on", tmp_path, monkeypatch, refuses=1)


def whole_run(mode: str, out: Path, monkeypatch: pytest.MonkeyPatch, refuses: int = 0) -> Any:
    """A trainer that has run; its ``refuses``-th launched micro-batch beside graphs finds no memory
    when its gradients are there."""
    from fpdm.train import Trainer

    config = small(
        out=str(out), name=mode, steps=24, batch=8, accumulate=2, log_every=5, save_every=0,
        grid_every=0, grid_per_class=1, graphs=mode,
    )  # fmt: skip
    holder: list[Any] = []

    def statics() -> Iterator[Tensor]:
        t = holder[0]
        yield from (*t.optimizer.flat.values(), t.optimizer.buffer, t.diffusion._tables)
        yield from (*t.model.buffers(), *t.prepared.copies.values())
        yield from t.micro.held.tensors()

    backend = RecordingBackend(statics)
    monkeypatch.setattr(graphs, "backend_for", lambda device: backend)
    execution = replace(config.execution, impl="reference")
    # two graphs: recording one takes seconds
    fixed = replace(config.fixed_point, n_min=1, n_max=1, m_min=1, m_max=2)
    trainer = Trainer(replace(config, execution=execution, fixed_point=fixed))
    holder.append(trainer)
    monkeypatch.setattr(trainer, "_grid", lambda: None)
    run, left = MicroStep._run, [refuses]

    def crowded(self: MicroStep, *args: Any) -> Tensor:
        rows = run(self, *args)
        if left[0] and self.graphs is not None and self.graphs.captures:
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(MicroStep, "_run", crowded)
        trainer.run()
    return trainer


def same_run(a: Any, b: Any) -> None:
    assert a.directory.metrics.read_text() == b.directory.metrics.read_text()
    assert torch.equal(a.optimizer.flat["w"], b.optimizer.flat["w"])
