"""A backend for fpdm.graphs without a GPU: records the operators of a launch and runs them again.

As on a GPU, capturing runs nothing, Python runs once, and what it decided then is frozen into the
recording. Tensors that the work found (and did not make) must lie in static storages; those that it
made are filled with NaN after the capture, since a replay makes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm import graphs
from fpdm.config import DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def leaves(x: Any) -> Iterator[Any]:
    """What is no list and no tuple in what an operator takes or returns."""
    if isinstance(x, (list, tuple)):
        for one in x:
            yield from leaves(one)
    else:
        yield x


class NotStatic(Exception):
    """The work read a tensor that a replay would not find again."""


class _Trace(TorchDispatchMode):
    def __init__(self, static: set[int]):
        super().__init__()
        self.static, self.calls = set(static), []
        self.made: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default:
            # a Python number on its way into an operator: a constant of the recording
            self.static.add(storage(args[0]))
        for t in leaves((args, *kwargs.values())):
            found = isinstance(t, Tensor) and id(t) not in self.made
            if found and t.numel() and storage(t) not in self.static:
                self._another_name(func, t)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _another_name(self, func: Any, t: Tensor) -> None:
        """What autograd saved of a result comes back as another tensor on the same storage."""
        base = self.bases.get(storage(t))
        if base is None or base.dtype != t.dtype:
            raise NotStatic(f"{func} reads {tuple(t.shape)}")
        where = (base, tuple(t.size()), t.stride(), t.storage_offset())
        self._note(torch.ops.aten.as_strided.default, where, {}, t)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for t in leaves(out):
            if isinstance(t, Tensor):
                self.made.setdefault(id(t), t)
                if t.numel():
                    self.bases.setdefault(storage(t), t)
        self.calls.append((func, args, kwargs, out))


_LOOP = object()


class _Recorded:
    def __init__(self, backend: RecordingBackend, calls: list[Any]):
        self.backend, self.calls = backend, calls

    def replay(self) -> None:
        # what was recorded is what autograd had made of the work
        with torch._C._AutoDispatchBelowAutograd():
            self._replay()
        self.backend.clock += self.backend.replay_extra

    def _replay(self) -> None:
        now: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(map(current, x))
            return now.get(id(x), x) if isinstance(x, Tensor) else x

        def run(calls: list[Any]) -> None:
            for func, args, kwargs, out in calls:
                if func is _LOOP:
                    before, body, after = args
                    more = current(before)
                    while more:
                        run(body)
                        more = current(after)
                    continue
                again = func(*map(current, args), **{n: current(x) for n, x in kwargs.items()})
                for old, new in zip(leaves(out), leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        now[id(old)] = new

        run(self.calls)

    def release(self) -> None:
        assert self.calls, "released twice"
        self.calls = []
        self.backend.alive -= 1


class RecordingBackend:
    """``statics`` gives the tensors whose storages stay. Every eager launch takes a second on its
    clock, a replay ``1 + replay_extra``; ``late``: no time is known yet. ``fail`` captures fail,
    ``fail_loops``: those of loops. A loop's body runs once at its capture, whatever its flag."""

    loops = True

    def __init__(self, statics: Callable[[], Iterable[Tensor]]):
        self.statics, self.fail_loops = statics, False
        self.trace: _Trace
        self.clock, self.replay_extra, self.late, self.fail = 0.0, 0.0, False, 0
        self.alive = self.emptied = 0

    def capture(self, work: Callable[[], None]) -> _Recorded:
        if self.fail:
            self.fail -= 1
            raise RuntimeError("operation not permitted when\nstream is capturing")
        tensors = {storage(t): t.untyped_storage() for t in self.statics() if t.numel()}
        before = {key: s.clone() for key, s in tensors.items()}
        trace = self.trace = _Trace(set(tensors))
        try:
            with trace:
                work()
        finally:
            for key, s in tensors.items():
                s.copy_(before[key])
        with torch.no_grad():
            for t in trace.made.values():
                if t.is_floating_point() and storage(t) not in trace.static:
                    t.detach().fill_(torch.nan)
        self.alive += 1
        return _Recorded(self, trace.calls)

    def loop(self, more: Callable[[], Tensor], body: Callable[[], None]) -> None:
        if self.fail_loops:
            raise RuntimeError("conditional nodes are not supported")
        before, outer = more(), self.trace.calls
        assert before.shape == ()
        assert before.dtype == torch.bool
        self.trace.calls = []
        body()
        after, inner = more(), self.trace.calls
        self.trace.calls = outer
        outer.append((_LOOP, (before, inner, after), {}, ()))

    def mark(self) -> float:
        self.clock += 0.5
        return self.clock

    def elapsed(self, start: float, end: float) -> float | None:
        return None if self.late else end - start

    def release(self) -> None:
        self.emptied += 1


def network(config: ModelConfig, seed: int = 0) -> Any:
    """By the reference: the recorder sees torch's operators only."""
    return random_model(config, seed, impl="reference")


def make(
    config: SamplerConfig, model: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sampler, RecordingBackend]:
    """A sampler on the CPU that records."""

    def statics() -> list[Tensor]:
        assert s._kept is not None
        tables = [s.timesteps, s.counts, s.reserves, s.rows]
        tables += [] if s.gammas is None else [s.gammas]
        weights = [*s.weights.params.values(), *s.weights.copies.values(), s.model.pos_embed]
        return [*s._kept.tensors(), *tables, *weights]

    backend = RecordingBackend(statics)
    monkeypatch.setattr(graphs, "backend_for", lambda device: backend)
    s = Sampler(model, Diffusion(DiffusionConfig()), config)
    return s, backend


def eager(config: SamplerConfig, model: Any) -> Sampler:
    return Sampler(model, Diffusion(DiffusionConfig()), replace(config, graphs="off"))
