"""Stopping by residual: against a loop over one sample at a time, alone and among others, and what
it saves."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_model, watch_iterations
from torch import Tensor

from fpdm import run, solvers, steps, stopping
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler, Samples
from fpdm.kernels import implementations
from fpdm.plan import bucket, groups, most_iterations, reserves
from fpdm.pretrained import load_source
from fpdm.run import initial_iterate

SMALL = ModelConfig(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5)
# 32 samples of the digits; both branches, reuse and a noisy method in one
COUNT = 32
LABELS, SEEDS = [i % 10 for i in range(COUNT)], list(range(100, 100 + COUNT))
CONFIG = SamplerConfig(
    method="ddpm", steps=4, iters=12, tol=0.02, reuse="full", guidance=1.5, batch=COUNT
)


@pytest.fixture(scope="module")
def digits() -> Any:
    """The shipped model: a contraction, as trained."""
    return load_source(None)


def test_without_a_tolerance_only_the_cap_ends() -> None:
    """Not even a residual of 0, whatever the solver."""
    n = 2
    w: Any = SimpleNamespace(
        done=torch.zeros(n, dtype=torch.bool), count=torch.zeros(n, dtype=torch.int64),
        cap=torch.tensor([1, 2]), left=torch.tensor([n]),
    )  # fmt: skip
    for done in ([True, False], [True, True]):
        stopping._mark(w, n, torch.zeros(n), 0.0)
        assert w.done.tolist() == done


def sampler(digits: Any, config: SamplerConfig = CONFIG, **kw: Any) -> Sampler:
    return Sampler(digits.model, digits.diffusion, config, **kw)


def alone(s: Sampler, label: int, seed: int) -> tuple[Tensor, list[list[int]]]:
    """One sample, its branches apart, straight from the definition: (x, iterations (S,G))."""
    model, config, weights = s.model, s.config, s.weights
    keys = run.as_keys([seed])
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    x = run.normals(keys, 0, 0, run.SAMPLE_INIT, shape)
    past: dict[int, tuple[Tensor, ...]] = {}
    left, used = list(s.totals), []
    for row, ((t, k), count) in enumerate(zip(s.plan.steps, s.plan.branches)):
        outs, spent = [], []
        for branch, y in enumerate([label, model.config.num_classes][:count]):
            mod = model.modulation(torch.tensor([t]), torch.tensor([y]), weights=weights)
            h = model.encode(x, mod, weights=weights)
            z, j = initial_iterate(config, h, past.get(branch, ())), 0
            later = [
                q for (_, q), c in list(zip(s.plan.steps, s.plan.branches))[row + 1 :] if branch < c
            ]
            spare = left[branch] - sum(max(1, q // 2) for q in later)
            cap = min(spare, s.plan.limit) if s.plan.limit else k
            while True:
                z, stats = model.iterate(z, h, mod, 1, stats=True, weights=weights)
                j += 1
                if stats.residual[0, 0] <= s.tol or j == cap:
                    break
            past[branch] = (z,)
            left[branch] -= j
            spent.append(j)
            outs.append(model.decode(z, mod, weights=weights))
        if count == 1:
            past.pop(1, None)
        out = outs[0] if count == 1 else steps.guide(*outs, config.guidance)
        z = run.normals(keys, row, 0, run.SAMPLE_STEP, shape) if s.table.random[row] else None
        x = steps.step(x, out, s.rows[row], z)
        used.append(spent)
    return x[0], used


def differs(s: Sampler, found: Samples, which: range = range(0, COUNT, 8)) -> str | None:
    """None when the samples ``which`` are those of the definition, else what is wrong."""
    with torch.no_grad():
        for i in which:
            x, used = alone(s, LABELS[i], SEEDS[i])
            counts = found.stats.iterations[:, :, i]
            mine = [row[:count] for row, count in zip(counts.tolist(), s.plan.branches)]
            if mine != used:
                return f"sample {i}: iterations {mine}, expected {used}"
            if not (x - found.x[i]).abs().max() <= 1e-4:
                return f"sample {i}: off by {(x - found.x[i]).abs().max()}"
    return None


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host follows every iteration, as it does wherever a solve is not one call."""
    follow(monkeypatch)


def follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations.resolve("cpu", "cpu"), "loops", lambda *dtypes: False)


CASES: dict[str, dict[str, Any]] = {
    "constant": {},
    "adaptive": {"allocation": "adaptive", "iters": 6, "tol": 0.03},
    "bounded": {"allocation": "adaptive", "iters": 6, "tol": 0.03, "max_iters": 7},
    "interval": {"guidance_low": 0.2, "guidance_high": 0.6},
    "unguided": {"guidance": 1.0, "reuse": "none"},
    "increasing": {"iters": None, "budget": 4 * 2 + 30, "allocation": "increasing"},
}


@pytest.mark.parametrize(
    ("case", "lag"),
    [
        *((case, None) for case in CASES), ("adaptive", 0), ("unguided", 0), ("adaptive", 1),
        ("interval", 1),
    ],
)  # fmt: skip
def test_definition(
    digits: Any, case: str, lag: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the host knows when (without a lag: one call), and whoever is in the batch."""
    if lag is not None:
        follow(monkeypatch)
        monkeypatch.setitem(solvers.LAG, "cpu", lag)
    s = sampler(digits, replace(CONFIG, **CASES[case]))
    found = s.sample(LABELS, SEEDS)
    assert differs(s, found) is None
    used, ks = found.stats.iterations, torch.tensor([k for _, k in s.plan.steps])
    ran = (~found.stats.residual.isnan()).sum(1)
    assert torch.equal(ran, used[:, 0])
    assert used[:, 0].min() >= 1
    assert bool((used.sum(0) <= ks.sum()).all())
    assert len(used[:, 0].unique()) > 2  # the case is not trivial
    if not s.plan.limit:
        assert bool((used <= ks.view(-1, 1, 1)).all())
    else:
        assert bool((used > ks.view(-1, 1, 1)).any())
        assert used.max() <= s.plan.limit


def no_freeze(w: Any, n: int, r: Tensor, tol: float, *rest: Any) -> None:
    stopping._mark(w, n, r, tol)


def forgets_rows(w: Any, slots: Tensor, z: Tensor) -> None:
    w.result.index_copy_(0, slots, z[slots])
    w.used.index_copy_(0, slots, w.count[slots])


def forgets_the_bank(w: Any, n: int, k: Tensor, reserve: Tensor, limit: int) -> None:
    w.bank.fill_(w.bank.max())
    BEGIN(w, n, k, reserve, limit)


def forgets_the_injection(w: Any, n: int, m: int, z: Tensor, others: Any) -> Tensor:
    return COMPACT(w, n, m, z, others[1:])


def one_for_all(w: Any, n: int, r: Tensor, tol: float, *rest: Any) -> None:
    DECIDE(w, n, r.max().expand(n), tol, *rest)


def one_for_some(w: Any, n: int, r: Tensor, tol: float, *rest: Any) -> None:
    some = w.rows[:n] % 8 == 7
    r = torch.where(some, r.masked_fill(~some, 0.0).max(), r)
    DECIDE(w, n, r, tol, *rest)


def counts_twice(w: Any, n: int, k: Tensor, reserve: Tensor, limit: int) -> None:
    BEGIN(w, n, k, reserve, limit)
    w.count[:n].fill_(1)


BEGIN, COMPACT, DECIDE = stopping.begin, stopping.compact, stopping.decide


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("decide", no_freeze), ("collect", forgets_rows), ("begin", forgets_the_bank),
        ("compact", forgets_the_injection), ("decide", one_for_all), ("begin", counts_twice),
    ],
)  # fmt: skip
def test_the_definition_bites(
    digits: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where the host knows at once, nothing that is done is there to freeze
    monkeypatch.setitem(solvers.LAG, "cpu", int(fault is no_freeze))
    if name != "begin":
        follow(monkeypatch)
    monkeypatch.setattr(stopping, name, fault)
    s = sampler(digits, replace(CONFIG, **CASES["adaptive"]))
    assert differs(s, s.sample(LABELS, SEEDS)) is not None


# alone and among others


def mates_matter(digits: Any, invariant: bool, **changes: Any) -> str | None:
    """None when samples alone are as among 31 others, else what is wrong."""
    config = replace(CONFIG, steps=3, guidance_high=0.8, invariant=invariant, **changes)
    s = sampler(digits, config)
    among = s.sample(LABELS, SEEDS)
    assert len(among.stats.iterations[:, 0].unique()) > 2  # they stop apart
    for i in (0, 7, 31):
        one = s.sample(LABELS[i : i + 1], SEEDS[i : i + 1])
        off = float((one.x[0] - among.x[i]).abs().max())
        fewer = int((one.stats.iterations[..., 0] - among.stats.iterations[..., i]).abs().max())
        residuals = one.stats.residual[..., 0], among.stats.residual[..., i]
        same = torch.equal(*(r.nan_to_num(-1) for r in residuals))
        near = off <= (0 if invariant else 1e-4) and fewer <= (not invariant)
        if not near or (invariant and not same):
            return f"sample {i}: off by {off:.2g}, k by {fewer}, residuals {same}"
    return None


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize(
    ("reuse", "allocation"),
    [("full", "adaptive"), ("blend", "adaptive"), ("extrapolate", "constant")],
)
def test_batch_mates(digits: Any, reuse: Any, allocation: Any, invariant: bool) -> None:
    """Bitwise in invariant mode; else 1e-4 with k that differ by one at most."""
    changes: dict[str, Any] = {"reuse": reuse, "allocation": allocation, "reuse_gamma_end": 0.9}
    changes["iters"] = 6 if allocation == "adaptive" else 12
    assert mates_matter(digits, invariant, **changes) is None


@pytest.mark.usefixtures("followed")
def test_batch_mates_that_matter(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One residual for every eighth sample; one that runs alone has its own."""
    monkeypatch.setattr(stopping, "decide", one_for_some)
    assert mates_matter(digits, False, reuse="full") is not None


def test_a_bad_sample_harms_no_other(digits: Any) -> None:
    """NaN meets no tolerance: it runs to its cap, and the others are as without it but for
    the rounding of other shapes."""
    s = sampler(digits, replace(CONFIG, steps=2, invariant=False))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    broken = noise.clone()
    broken[2] = torch.nan
    good, found = (s.sample(LABELS[:4], SEEDS[:4], noise=z) for z in (noise, broken))
    assert found.x[2].isnan().all()
    assert found.stats.iterations[:, :, 2].tolist() == [[12, 12]] * 2
    for i in (0, 1, 3):
        assert (found.x[i] - good.x[i]).abs().max() <= 1e-5
        assert torch.equal(found.stats.iterations[..., i], good.stats.iterations[..., i])


# what it saves


def row_iterations(s: Sampler, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Samples]:
    """Rows times iterations that ran, whoever they were for."""
    with monkeypatch.context() as patch:
        rows = watch_iterations(patch)
        found = s.sample(LABELS, SEEDS)
    return sum(rows), found


def spread(digits: Any) -> Sampler:
    """Half of the batch converges at once, the others slowly: mean k below 0.6 of the cap."""
    return sampler(digits, replace(CONFIG, guidance=1.0, tol=0.004, iters=21, method="ddim"))


def evenly(w: Any, n: int, *rest: Any) -> None:
    """k spread evenly from 4 to the cap of 20: mean 0.58 of it, and hardly two samples alike."""
    BEGIN(w, n, *rest)
    w.cap[:n] = 4 + w.rows[:n] * 16 // (COUNT - 1)


def spread_evenly(digits: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Sampler:
    """Nothing but those caps ends an iteration."""
    monkeypatch.setattr(stopping, "begin", evenly)
    return sampler(digits, replace(CONFIG, guidance=1.0, tol=1e-6, iters=20, **changes))


def test_work_that_stopping_saves(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU no row runs that is not needed; buckets, with their late flag, carry at most half
    again as many."""
    s = spread(digits)
    ran, found = row_iterations(s, monkeypatch)
    all_of_it = COUNT * 21 * CONFIG.steps
    used = int(found.stats.iterations.sum())
    assert ran == used <= 0.6 * all_of_it
    follow(monkeypatch)
    assert row_iterations(s, monkeypatch)[0] == used
    monkeypatch.setitem(solvers.LAG, "cpu", 1)
    ran, found = row_iterations(s, monkeypatch)
    assert found.stats.iterations.sum() == used
    assert used < ran <= min(1.5 * used, 0.75 * all_of_it)
    monkeypatch.setattr(run, "bucket", lambda rows: COUNT)  # never compacted
    assert row_iterations(s, monkeypatch)[0] > ran


@pytest.mark.parametrize("lag", [None, 0, 1])
def test_work_of_samples_that_stop_apart(
    digits: Any, lag: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly what is used on a CPU; in buckets, one iteration late, at most 0.8 of everything."""
    if lag is not None:
        follow(monkeypatch)
        monkeypatch.setitem(solvers.LAG, "cpu", lag)
    s = spread_evenly(digits, monkeypatch, steps=2)
    ran, found = row_iterations(s, monkeypatch)
    assert found.stats.iterations[:, 0].tolist() == [[4 + i * 16 // 31 for i in range(COUNT)]] * 2
    assert 0.55 <= found.stats.iterations.double().mean() / 20 <= 0.6
    used = int(found.stats.iterations.sum())
    assert ran == used if not lag else used < ran <= 0.8 * 2 * COUNT * 20


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_time_that_stopping_saves(
    digits: Any, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B=32, mean k at most 0.6 of the cap: at most 0.75 of the time of running all to the cap.

    Processor time of this thread, interleaved, the best of five: other processes do not count.
    """
    stopped = spread(digits)
    if apart:
        stopped = spread_evenly(digits, monkeypatch, method="ddim")
    cap = stopped.config.iters
    assert cap is not None
    whole = sampler(digits, replace(stopped.config, tol=0.0))
    best = [float("inf")] * 2
    for _ in range(5):
        for i, s in enumerate((stopped, whole)):
            start = time.thread_time()
            found = s.sample(LABELS, SEEDS)
            best[i] = min(best[i], time.thread_time() - start)
            if s is stopped:
                assert found.stats.iterations.double().mean() <= 0.6 * cap
    assert best[0] <= 0.75 * best[1], best


# tolerances that cannot be met, solvers


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 3e-8), ("bfloat16", 0.002)])
def test_a_tolerance_below_rounding(digits: Any, dtype: Any, tol: float) -> None:
    config = replace(CONFIG, steps=2, iters=3, tol=tol, dtype=dtype)
    with pytest.warns(UserWarning, match=r"^sample\.tol: got .* run to their cap$") as told:
        s = sampler(digits, config)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = s.sample(LABELS[:3], SEEDS[:3])
        assert torch.equal(found.x, sampler(digits, replace(config, tol=0.0)).sample(
            LABELS[:3], SEEDS[:3]).x)  # fmt: skip
        sampler(digits, replace(config, tol=0.6 * torch.finfo(getattr(torch, dtype)).eps))
    assert found.stats.iterations.unique().tolist() == [3]


def test_a_tolerance_just_above_rounding_is_met(digits: Any) -> None:
    """Residuals of a bfloat16 iterate end at about 0.45 eps, as the warning says: 0.77 is met by
    all, and half an eps by most."""
    config = replace(CONFIG, steps=5, iters=40, dtype="bfloat16", guidance=1.0)
    met = sampler(digits, replace(config, tol=6e-3)).sample(LABELS, SEEDS).stats.iterations
    assert (met < 40).double().mean() > 0.9
    half = torch.finfo(torch.bfloat16).eps / 2
    met = sampler(digits, replace(config, tol=half)).sample(LABELS, SEEDS).stats.iterations
    assert (met < 40).double().mean() > 0.5


def test_a_solver_in_the_loop(digits: Any) -> None:
    config = replace(CONFIG, tol=1e-3, iters=24, guidance=1.0, method="ddim")
    plain = sampler(digits, config).sample(LABELS, SEEDS)
    picard = sampler(digits, config, solver=solvers.Picard).sample(LABELS, SEEDS)
    assert torch.equal(picard.stats.iterations, plain.stats.iterations)
    assert (picard.x - plain.x).abs().max() <= 1e-5
    anderson = sampler(digits, config, solver=solvers.Anderson).sample(LABELS, SEEDS)
    assert anderson.stats.iterations.sum() < plain.stats.iterations.sum()
    assert (anderson.x - plain.x).abs().max() <= 0.05
    # without a tolerance all evaluations are used, and the best is returned
    capped = replace(config, tol=0.0, steps=1, iters=8)
    found = sampler(digits, capped, solver=solvers.Anderson).sample(LABELS, SEEDS)
    assert found.stats.iterations.unique().tolist() == [8]


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_what_the_caller_set_changes_nothing(digits: Any, solver: Any) -> None:
    """Autocast and default dtype: neither what is launched nor the float32 sums of a solver."""
    s = sampler(digits, replace(CONFIG, steps=2, solver=solver))
    want = s.sample(LABELS[:4], SEEDS[:4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s.sample(LABELS[:4], SEEDS[:4]).x, want.x)
    torch.set_default_dtype(torch.float64)
    try:
        found = s.sample(LABELS[:4], SEEDS[:4])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.x, want.x)
    assert found.stats.residual.dtype == torch.float32


@pytest.mark.usefixtures("followed")
def test_only_a_tolerance_reads_the_device(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = solvers.Flag.read

    def watched(self: Any, j: int) -> int | None:
        reads.append(j)
        return read(self, j)

    monkeypatch.setattr(solvers.Flag, "read", watched)
    sampler(digits, replace(CONFIG, tol=0.0, steps=2)).sample(LABELS[:2], SEEDS[:2])
    assert reads == []
    found = sampler(digits, replace(CONFIG, steps=2)).sample(LABELS[:2], SEEDS[:2])
    longest = found.stats.iterations.amax(dim=(1, 2)).tolist()
    assert reads == [j for most in longest for j in range(most)]


# plans


def test_buckets() -> None:
    sizes = sorted({bucket(n) for n in range(1, 200)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(n <= bucket(n) <= 1.5 * n for n in range(1, 1000))


def test_groups() -> None:
    for k in range(1, 100):
        found = groups(k)
        assert sum(found) == k
        assert set(found) <= {8, 4, 2, 1}
        # all but the last begin on the same buffer
        assert all(size % 2 == 0 for size in found[:-1])
        whole = groups(k, captured=False)
        assert whole == [8] * (k // 8) + [k % 8] * (k % 8 > 0)


def test_reserves() -> None:
    assert reserves([4, 5, 1], [2, 1, 2]) == [(3, 1), (1, 1), (0, 0)]
    assert most_iterations([4, 5, 1], 999) == [7, 8, 8]
    assert most_iterations([4, 5, 1], 6) == [6, 6, 6]
    # greed at every timestep: each still runs at least half of its k, and the sum is met
    for ks in ([3, 3, 3], [8] * 28, [1, 2, 9, 4], [1] * 5):
        left = sum(ks)
        for k, (kept, _), most in zip(ks, reserves(ks, [1] * len(ks)), most_iterations(ks, 999)):
            ran = left - kept
            assert max(1, k // 2) <= ran <= most
            left -= ran
        assert left == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tol": -0.1}, "sample.tol: got -0.1, expected at least 0"),
        ({"allocation": "adaptive", "tol": 0.0}, "sample.tol: got 0.0, expected more than 0 with"),
        ({"max_iters": 4}, "sample.max_iters: got 4, expected none without allocation=adaptive"),
        ({"max_iters": 0, "allocation": "adaptive"}, "sample.max_iters: got 0, expected at least"),
        ({"guidance_low": 0.7, "guidance_high": 0.2}, "guidance_low, guidance_high: got 0.7, 0.2"),
        ({"guidance_rescale": 1.5}, "sample.guidance_rescale: got 1.5, expected 0 to 1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, **changes)
    assert words in str(error.value)


def test_a_dit_has_no_residual() -> None:
    dit = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=1)
    config = SamplerConfig(steps=2, tol=0.1)
    with pytest.raises(ConfigError, match="got tol for a DiT, which has no iterations"):
        Sampler(random_model(dit), Diffusion(DiffusionConfig()), config)
