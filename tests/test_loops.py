"""Graphs beyond a straight line of launches: loops that end on the device."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from recorder import eager, make, network

from fpdm import run, solvers, stopping
from fpdm.config import ModelConfig, SamplerConfig
from fpdm.engine import Sampler

SMALL = ModelConfig(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5)
BUSY = SamplerConfig(
    method="ddpm", steps=4, iters=9, tol=0.15, reuse="extrapolate", guidance=2.5, graphs="on"
)
LABELS, SEEDS = [0, 4, 1, 3], [5, 2**63, 7, 8]

# loops that end on the device

LOOPS: dict[str, dict[str, Any]] = {
    "alone": {"guidance": 1.0},
    "both branches": {},
    "interval": {"guidance_low": 0.3, "guidance_high": 0.7, "steps": 6},
    "adaptive": {"allocation": "adaptive", "iters": 4},
    "odd cap": {"tol": 1e-5, "iters": 5},
}


def looped(
    case: str, rows: int, monkeypatch: pytest.MonkeyPatch, statistics: bool = True
) -> tuple[str | None, Sampler]:
    """None when loops of up to ``rows`` slots give what the host-followed iterations give, bit for
    bit, else what differs; and the sampler that looped."""
    model = network(SMALL)
    config = replace(BUSY, batch=rows // 2, invariant=rows <= 2, **LOOPS[case])
    monkeypatch.setattr(stopping, "LOOP_ROWS", rows)
    monkeypatch.setattr(run, "bucket", lambda _: rows)  # the same rows to the end
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    plain, (s, _) = eager(config, model), make(config, model, monkeypatch)
    for seeds in (SEEDS, range(4), SEEDS):
        want, found = plain.sample(LABELS, seeds), s.sample(LABELS, seeds, stats=statistics)
        if not torch.equal(found.stats.iterations, want.stats.iterations):
            return "iterations", s
        residuals = (x.stats.residual.nan_to_num(-1) for x in (found, want))
        if statistics and not torch.equal(*residuals):
            return "residuals", s
        if not torch.equal(found.x, want.x):
            return "samples", s
    return None, s


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("case", LOOPS)
def test_loops_equal_what_the_host_follows(
    case: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, s = looped(case, rows, monkeypatch)
    assert wrong is None
    assert s.graphs is not None
    assert any(key.piece == "solve" for key in s.graphs.entries)
    # a loop for every shape that came twice: from now on the host reads nothing
    reads: list[int] = []
    monkeypatch.setattr(solvers.Flag, "read", lambda self, j: reads.append(j))
    found = s.sample(LABELS, SEEDS)
    assert reads == []
    assert len(found.stats.iterations[:, 0].unique()) > (case != "odd cap")


def test_loops_without_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looped("both branches", 8, monkeypatch, statistics=False)[0] is None


def never_comes_back(self: run.Run, n: int, parity: int, into: int | None, *rest: Any) -> None:
    STEP(self, n, parity, 1 if (parity, into) == (0, 0) else into, *rest)


def begins_without_a_flag(w: Any, n: int, *rest: Any) -> None:
    left = w.left.clone()
    BEGIN(w, n, *rest)
    w.left.copy_(left)


STEP, BEGIN = run.Run._step, stopping.begin


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(run.Run, "_step", never_comes_back), (stopping, "begin", begins_without_a_flag)],
)
def test_loops_that_differ_are_caught(
    where: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterates that stay in the other buffer; a flag of the timestep before. Followed by the host,
    both are right."""
    wrong, s = looped("both branches", 2, monkeypatch)
    assert wrong is None
    want = s.sample(LABELS, SEEDS).x
    monkeypatch.setattr(where, name, fault)
    wrong, s = looped("both branches", 2, monkeypatch)
    assert wrong is not None
    assert s.graphs is not None
    s.graphs.loops = False
    assert torch.equal(s.sample(LABELS, SEEDS).x, want)


def test_loops_only_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed one costs a warning, and no other graph; auto and solvers have none."""
    model = network(SMALL)
    config = replace(BUSY, invariant=True)
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    want = eager(config, model).sample(LABELS, SEEDS).x
    s, backend = make(config, model, monkeypatch)
    backend.fail_loops = True
    with pytest.warns(UserWarning, match="capture of a loop failed, the host follows it now: cond"):
        assert torch.equal(s.sample(LABELS, SEEDS).x, want)
    assert s.graphs is not None
    assert (s.graphs.broken, s.graphs.loops) == (False, False)
    assert backend.alive == s.graphs.captures > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(s.sample(LABELS, SEEDS).x, want)
        for changes in ({"graphs": "auto"}, {"solver": "anderson"}):
            s, backend = make(replace(config, **changes), model, monkeypatch)
            assert s.graphs is not None
            for _ in range(2):
                s.sample(LABELS, SEEDS)
            assert not any(e.graph for key, e in s.graphs.entries.items() if key.piece == "solve")
