"""A captured micro-batch under every gradient: the implicit one solves within its backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorder import RecordingBackend
from test_microstep import Bench, small

from fpdm import gradients, solvers
from fpdm.config import Config

# a pair's graph comes with its second time
PAIRS = [(1, 1), (1, 1), (0, 1), (1, 1), (0, 1)]


def implicit() -> Config:
    config = small()
    fixed = replace(
        config.fixed_point, n_max=1, m_max=1, gradient="implicit", implicit_iters=4
    )  # fmt: skip
    return replace(config, fixed_point=fixed)


def both(monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, Bench]:
    return Bench("on", monkeypatch, implicit()), Bench("off", monkeypatch, implicit())


def compare(ours: Bench, usual: Bench, pairs: list[tuple[int, int]] = PAIRS) -> None:
    """Rows and every gradient, bit for bit."""
    for number, (n, m) in enumerate(pairs):
        for a, b in zip(ours.run(number, n, m), usual.run(number, n, m)):
            assert torch.equal(a, b), (number, n, m)


def test_replays_of_the_implicit_gradient_are_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward's solve runs a fixed number of evaluations and asks the host nothing."""
    ours, usual = both(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(ours, usual)
    assert ours.step.graphs is not None
    assert (ours.step.graphs.captures, ours.step.graphs.replays) == (2, 3)


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that cannot be captured, as a linear solver may be: within the backward."""
    capture, solve = RecordingBackend.capture, solvers.Anderson._coefficients
    capturing: list[bool] = []

    def watched(self: Any, work: Callable[[], None]) -> Any:
        capturing.append(True)
        try:
            return capture(self, work)
        finally:
            capturing.clear()

    def coefficients(self: Any, r: torch.Tensor) -> torch.Tensor:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return solve(self, r)

    monkeypatch.setattr(RecordingBackend, "capture", watched)
    monkeypatch.setattr(solvers.Anderson, "_coefficients", coefficients)


def test_what_cannot_be_captured_runs_eagerly_after_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, usual = both(monkeypatch)
    refused(monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compare(ours, usual)
    (only,) = told
    assert str(only.message).startswith("graphs: capture failed, everything runs eagerly now: ")
    assert ours.step.graphs is not None
    assert ours.step.graphs.broken
    assert ours.backend.alive == 0


def test_a_solve_that_the_host_follows_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of evaluations that depends on the data is frozen in a replay."""
    ours, usual = both(monkeypatch)
    solve = solvers.solve

    def followed(f: Any, g: torch.Tensor, solver: Any, iters: int, *rest: Any) -> solvers.Solution:
        k = 1 + int(1e6 * g.double().abs().sum().log()) % iters
        return solve(f, g, solver, k, *rest)

    monkeypatch.setattr(gradients.solvers, "solve", followed)
    with pytest.raises(AssertionError, match=r"\(\d, 1, 1\)"):
        compare(ours, usual, [(1, 1)] * 8)
