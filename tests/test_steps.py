"""Spacing against the golden maps; steps against a second, textbook sampler in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from torch import Tensor

from fpdm import steps as module
from fpdm.config import ConfigError, DiffusionConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.steps import StepTable, branches, build_table, guide, step, timesteps

PROCESSES = [("v", True), ("v", False), ("eps", False), ("x0", True), ("x0", False)]
METHODS = [("ddim", 0.0), ("ddim", 0.7), ("ddim", 1.0), ("ddpm", 0.0)]


def make(prediction: str, zsnr: bool) -> Diffusion:
    return Diffusion(DiffusionConfig(prediction=prediction, zero_terminal_snr=zsnr))  # type: ignore[arg-type]


def test_golden_maps(tiny: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    assert timesteps(1000, 10, "linspace", True)[::-1] == tiny["timestep_map10"].tolist()
    for s in (28, 35, 56, 70, 93, 250):
        assert timesteps(1000, s, "linspace", True)[::-1] == extra[f"timestep_map{s}"].tolist()


def test_adding_up_matters() -> None:
    """np.linspace rounds elsewhere for some S; a test that could not see it would be no test."""
    other = {s: np.round(np.linspace(0, 999, s)).astype(int).tolist() for s in range(2, 1001)}
    wrong = [s for s, t in other.items() if timesteps(1000, s, "linspace", True)[::-1] != t]
    assert wrong


@pytest.mark.parametrize("total", [2, 97, 1000])
def test_spacings(total: int) -> None:
    counts = range(1, total + 1) if total < 1000 else [1, 2, 3, 7, 28, 333, 400, 999, 1000]
    for s in counts:
        for spacing in ("trailing", "linspace", "leading"):
            t = timesteps(total, s, spacing, False)
            assert len(t) == s
            assert t == sorted(set(t), reverse=True)
            assert t[-1] >= 0
            if spacing != "leading" or s == 1:
                assert t[0] == total - 1
            if spacing != "trailing" and s > 1:
                assert t[-1] == 0


def test_spacings_by_hand() -> None:
    assert timesteps(1000, 4, "trailing", True) == [999, 749, 499, 249]
    assert timesteps(1000, 3, "trailing", True) == [999, 666, 332]
    # 5/2 rounds to 2 and 7.5 to 8: half to even
    assert timesteps(10, 4, "trailing", True) == [9, 7, 4, 1]
    assert timesteps(1000, 4, "leading", False) == [750, 500, 250, 0]
    assert timesteps(1000, 3, "linspace", True) == [999, 500, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1000, 0, "trailing", True), "sample.steps: got 0, expected 1..1000"),
        ((1000, 1001, "linspace", True), "sample.steps: got 1001, expected 1..1000"),
        ((1000, 10, "leading", True), "got leading with zero terminal SNR, expected trailing"),
        ((1000, 1, "leading", True), "got leading with zero terminal SNR, expected trailing"),
        ((1000, 10, "even", True), "sample.spacing: got even, expected trailing, linspace"),
    ],
)
def test_bad_spacings(arguments: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        timesteps(*arguments)


# a bounded function of (x, t) in place of the network: (B,C,h,w) -> (B,2C,h,w)
def network(x: Any, t: int) -> Any:
    tanh, cat = (torch.tanh, torch.cat) if isinstance(x, Tensor) else (np.tanh, np.concatenate)
    flipped = x.flip(3) if isinstance(x, Tensor) else x[..., ::-1]
    parts: Any = [tanh(0.6 * x - 0.3 * flipped + t / 500 - 1), 1.3 * tanh(flipped + 0.2)]
    return cat(parts, 1)


def book(
    d: Diffusion, chain: list[int], method: str, eta: float, x: np.ndarray, zs: np.ndarray
) -> list[np.ndarray]:
    """x after every step: x_0 and eps first, posterior mean and variance of the retained chain."""
    abars = np.cumprod(1 - d.betas)[chain[::-1]]  # forward in time
    alphas = [abars[0]] + [abars[i] / abars[i - 1] for i in range(1, len(abars))]
    trace = []
    for n, t in enumerate(chain):
        i = len(chain) - 1 - n
        abar, before = abars[i], abars[i - 1] if i else 1.0
        out = network(x, t)
        c = x.shape[1]
        pred, u = out[:, :c], out[:, c:]
        if d.config.prediction == "v":
            x0 = math.sqrt(abar) * x - math.sqrt(1 - abar) * pred
            eps = math.sqrt(1 - abar) * x + math.sqrt(abar) * pred
        elif d.config.prediction == "eps":
            x0, eps = (x - math.sqrt(1 - abar) * pred) / math.sqrt(abar), pred
        else:
            x0, eps = pred, (x - math.sqrt(abar) * pred) / math.sqrt(1 - abar)
        if method == "ddim":
            sigma: Any = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
            mean = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
        else:
            beta = 1 - alphas[i]
            mean = math.sqrt(before) * beta / (1 - abar) * x0
            mean = mean + math.sqrt(alphas[i]) * (1 - before) / (1 - abar) * x
            sigma = 0.0
            if i > 0:
                tilde = beta * (1 - before) / (1 - abar)
                f = (u + 1) / 2
                sigma = np.sqrt(beta**f * tilde ** (1 - f))
        x = mean + (sigma * zs[n] if i else 0.0)
        trace.append(x)
    return trace


def exact(table: StepTable, x: np.ndarray, zs: np.ndarray) -> list[np.ndarray]:
    """The table's rows in float64."""
    trace = []
    for t, z, row in zip(table.timesteps, zs, table.coefficients):
        out, c = network(x, t), x.shape[1]
        spread = row[2] * np.exp(row[3] + row[4] * out[:, c:])
        x = row[0] * x + row[1] * out[:, :c] + spread * z
        trace.append(x)
    return trace


def compare(d: Diffusion, count: int, method: str, eta: float, spacing: str) -> tuple[float, float]:
    """Worst relative error over the steps: (float64 table, fp32 steps)."""
    chain = timesteps(1000, count, spacing, d.config.zero_terminal_snr)
    rng = np.random.default_rng(0)
    x, zs = rng.standard_normal((3, 2, 4, 4)), rng.standard_normal((count, 3, 2, 4, 4))
    table = build_table(d, chain, method, eta)
    want = book(d, chain, method, eta, x, zs)
    double = max(
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(exact(table, x, zs), want)
    )
    y, rows, worst = torch.from_numpy(x).float(), table.rows(), 0.0
    for n, t in enumerate(chain):
        z = torch.from_numpy(zs[n]).float() if table.random[n] else None
        y = step(y, network(y, t), rows[n], z)
        assert y.dtype == torch.float32
        worst = max(worst, relative(y, torch.from_numpy(want[n])))
    return float(double), worst


@pytest.mark.parametrize(("prediction", "zsnr"), PROCESSES)
@pytest.mark.parametrize(("method", "eta"), METHODS)
@pytest.mark.parametrize("count", [1, 2, 10, 28])
def test_by_the_book(prediction: str, zsnr: bool, method: str, eta: float, count: int) -> None:
    for spacing in ("trailing", "linspace"):
        double, single = compare(make(prediction, zsnr), count, method, eta, spacing)
        assert double <= 1e-10  # 1 - abar loses four digits at t = 0
        assert single <= 5e-6


def _training_betas(d: Diffusion, chain: Any, method: str, eta: float) -> StepTable:
    """The fault of a sampler that forgets to respace."""
    table = BUILD(d, chain, method, eta)
    coefficients = table.coefficients.copy()
    coefficients[:-1, 3] = (np.log(d.betas) / 2)[np.asarray(chain)[:-1]]
    return StepTable(table.timesteps, coefficients, table.random)


def _scaled(column: int) -> Callable[..., StepTable]:
    def fault(*arguments: Any) -> StepTable:
        table = BUILD(*arguments)
        table.coefficients[5, column] *= 1.001
        return table

    return fault


BUILD = build_table


@pytest.mark.parametrize("fault", [_training_betas, *(_scaled(c) for c in range(5))])
def test_the_book_bites(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setitem(globals(), "build_table", fault)
    double, single = compare(make("v", False), 10, "ddpm", 0.0, "trailing")
    assert double > 1e-10
    assert single > 5e-6


def test_wrong_chain_direction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.log_posterior_variance
    monkeypatch.setattr(
        module, "log_posterior_variance", lambda b, a: right(b[::-1], a[::-1])[::-1]
    )
    with np.errstate(all="ignore"):
        double, _ = compare(make("v", False), 10, "ddpm", 0.0, "trailing")
    assert not double <= 1e-10


@pytest.mark.parametrize(("prediction", "zsnr"), PROCESSES)
@pytest.mark.parametrize(("method", "eta"), METHODS)
def test_tables_are_finite(prediction: str, zsnr: bool, method: str, eta: float) -> None:
    d = make(prediction, zsnr)
    for count in (1, 2, 3, 10, 250, 1000):
        for spacing in ("trailing", "linspace"):
            table = build_table(d, timesteps(1000, count, spacing, zsnr), method, eta)
            assert np.isfinite(table.coefficients).all()
            assert table.rows().isfinite().all()
            assert table.coefficients.dtype == np.float64
            assert not table.random[-1]
            assert (table.coefficients[-1, 2:6] == 0).all()
            noisy = method == "ddpm" or eta > 0
            assert table.random[:-1] == (noisy,) * (count - 1)


def test_last_step_ignores_noise() -> None:
    d = make("v", True)
    table = build_table(d, timesteps(1000, 4, "trailing", True), "ddpm", 0.0)
    x, out = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = torch.cat([out, out], 1)
    z = torch.ones_like(x)
    rows = table.rows()
    assert torch.equal(step(x, out, rows[-1], z), step(x, out, rows[-1], None))
    assert not torch.equal(step(x, out, rows[-2], z), step(x, out, rows[-2], None))
    floats = [float(value) for value in rows[1]]
    torch.testing.assert_close(step(x, out, floats, z), step(x, out, rows[1], z))


def test_one_step_is_the_predicted_image() -> None:
    """S = 1 at zero SNR: DDPM and DDIM both return x_0 = -v, whatever the noise."""
    d = make("v", True)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = network(x, 999)
    for method in ("ddim", "ddpm"):
        table = build_table(d, [999], method, 0.0)
        torch.testing.assert_close(step(x, out, table.rows()[0], x), -out[:, :1])


def test_eta_one_has_the_posterior_variance() -> None:
    d = make("v", True)
    chain = timesteps(1000, 20, "trailing", True)
    ddim, ddpm = build_table(d, chain, "ddim", 1.0), build_table(d, chain, "ddpm", 0.0)
    lowest = np.exp(ddpm.coefficients[:, 3] - ddpm.coefficients[:, 4])  # u = -1
    np.testing.assert_allclose(ddim.coefficients[:-1, 2], lowest[:-1], rtol=1e-10)


@pytest.mark.parametrize(("eta", "fits"), [(1.0, True), (1.1, False)])
def test_eta_up_to_one_leaves_a_variance(eta: float, fits: bool) -> None:
    """What is left for eps, 1 - abar_p - sigma^2, is negative beyond 1 and nowhere below."""
    abar = make("v", True).alphas_cumprod[timesteps(1000, 250, "linspace", True)]
    previous = np.append(abar[1:], 1.0)
    sigma = eta * np.sqrt((1.0 - previous) / (1.0 - abar) * (1.0 - abar / previous))
    assert bool(((1.0 - previous - sigma**2) >= -1e-15).all()) == fits
    if fits:
        build_table(make("v", True), [999, 5], "ddim", eta)
    else:
        with pytest.raises(ConfigError, match=r"^sample\.eta: got 1\.1, expected 0 to 1$"):
            SamplerConfig(eta=eta)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], "ddim", 0.0), "timesteps: got"),
        (([5, 5], "ddim", 0.0), "expected 999..0, descending"),
        (([1000], "ddim", 0.0), "expected 999..0, descending"),
        (([5, -1], "ddim", 0.0), "expected 999..0, descending"),
        (([9, 5], "euler", 0.0), "sample.method: got euler, expected one of ddim, ddpm, dpmpp_2m"),
        (([9, 5], "ddpm", 0.5), "sample.eta: got 0.5 with ddpm, expected 0"),
        (([9, 5], "ddim", -0.5), "sample.eta: got -0.5 with ddim"),
        (([9, 5], "ddim", 1.01), "sample.eta: got 1.01 with ddim, expected 0, or up to 1 with"),
        (([9, 5], "ddim", math.nan), "sample.eta: got nan with ddim"),
    ],
)
def test_bad_tables(arguments: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_table(make("v", True), *arguments)


def test_published_guidance(extra: dict[str, Tensor]) -> None:
    cond, null = extra["cfg_reuse.t500"].chunk(2)
    want = extra["cfg_reuse.guided500"]
    assert relative(guide(cond, null, 4.0), want) <= 5e-6
    assert relative(guide(cond, null, 4.01), want) > 5e-6
    assert relative(guide(null, cond, 4.0), want) > 5e-6


def test_guidance_channels() -> None:
    cond, null = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for channels, guided in ((None, 4), (3, 3), (4, 4), (1, 1)):
        got = guide(cond, null, 3.0, channels)
        want = null + 3.0 * (cond - null)
        torch.testing.assert_close(got[:, :guided], want[:, :guided], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[:, guided:], cond[:, guided:])
    assert torch.equal(guide(cond, null, 1.0), cond)
    assert torch.equal(guide(cond, null, 0.0)[:, :4], null[:, :4])
    for channels in (0, 5):
        with pytest.raises(ConfigError, match=f"got {channels}, expected 1..4"):
            guide(cond, null, 3.0, channels)


def test_guidance_rescale() -> None:
    """phi = 1 gives the deviation of the conditional prediction, phi between the mixture."""
    cond, null = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, full = guide(cond, null, 5.0), guide(cond, null, 5.0, None, 1.0)
    for i in range(3):
        wanted = cond[i, :4].flatten().std()
        assert relative(full[i, :4].flatten().std(), wanted) < 1e-6
        assert relative(plain[i, :4].flatten().std(), wanted) > 0.5
        # the same direction, whatever the batch
        assert relative(full[i, :4] * (plain[i, :4].std() / wanted), plain[i, :4]) < 1e-6
        alone = guide(cond[i : i + 1], null[i : i + 1], 5.0, None, 1.0)
        torch.testing.assert_close(alone[0], full[i])
    torch.testing.assert_close(guide(cond, null, 5.0, None, 0.3), 0.7 * plain + 0.3 * full)
    assert torch.equal(full[:, 4:], cond[:, 4:])
    assert torch.equal(guide(cond, null, 1.0, None, 0.7), cond)
    three = guide(cond, null, 5.0, 3, 1.0)
    assert relative(three[0, :3].flatten().std(), cond[0, :3].flatten().std()) < 1e-6
    assert torch.equal(three[:, 3:], cond[:, 3:])
    # a prediction without deviation stays finite
    flat = torch.zeros(1, 2, 4, 4)
    assert guide(flat, flat, 5.0, None, 1.0).isfinite().all()
    # a single number has none at all: it is guided as without rescaling
    cond, null = cond[:, :, :1, :1], null[:, :, :1, :1]
    assert torch.equal(guide(cond, null, 5.0, 1, 0.7), guide(cond, null, 5.0, 1))
    assert guide(cond, null, 5.0, 2, 0.7).isfinite().all()


def test_guidance_interval() -> None:
    ts = timesteps(1000, 5, "trailing", True)
    assert ts == [999, 799, 599, 399, 199]
    assert branches(ts, 1000, 4.0, 0.0, 1.0) == [2] * 5
    assert branches(ts, 1000, 1.0, 0.0, 1.0) == [1] * 5
    assert branches(ts, 1000, 0.0, 0.3, 0.7) == [1, 1, 2, 2, 1]
    # both ends are in
    assert branches([999, 500, 0], 1000, 4.0, 0.0, 0.0) == [1, 1, 2]
    assert branches([999, 500, 0], 1000, 4.0, 1.0, 1.0) == [2, 1, 1]


@pytest.mark.gpu
def test_steps_never_wait() -> None:
    table = build_table(make("v", True), timesteps(1000, 4, "trailing", True), "ddpm", 0.0)
    x = torch.randn(2, 1, 4, 4)
    out, rows = network(x, 3), table.rows()
    want = [step(x, guide(out, out, 2.0), row, x) for row in rows]
    x, out, rows = x.cuda(), out.cuda(), rows.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [step(x, guide(out, out, 2.0), rows[i], x) for i in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want):
        torch.testing.assert_close(a.cpu(), b)
