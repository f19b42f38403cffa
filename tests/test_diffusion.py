"""Schedule against the golden numbers; losses against a slow float64 implementation by the book."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm import diffusion as module
from fpdm.config import ConfigError, DiffusionConfig
from fpdm.diffusion import Diffusion

WEIGHTS = ["v_mse", "p2", "min_snr", "eps_mse"]
CASES = [
    (p, w, z)
    for p, w, z in itertools.product(["v", "eps", "x0"], WEIGHTS, [True, False])
    if not (p == "eps" and z)
]


def make(prediction: str = "v", weight: str = "v_mse", zsnr: bool = True, **kw: Any) -> Diffusion:
    return Diffusion(
        DiffusionConfig(prediction=prediction, loss_weight=weight, zero_terminal_snr=zsnr, **kw)  # type: ignore[arg-type]
    )


def test_golden_schedule(tiny: dict[str, Tensor]) -> None:
    d = make()
    want = tiny["betas_zsnr"].numpy()
    assert np.abs(d.betas / want - 1).max() <= 1e-9  # the gate is 5e-6
    assert d.betas[-1] == 1.0
    assert d.alphas_cumprod[-1] == 0.0
    got = d.alphas_cumprod[tiny["timestep_map10"].numpy()]
    np.testing.assert_allclose(got, tiny["alphas_cumprod10"].numpy(), rtol=1e-9, atol=0)
    plain = make(zsnr=False)
    assert np.abs(plain.betas / want - 1).max() > 5e-6  # without the rescale it would be seen
    assert plain.betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-15)


@pytest.mark.filterwarnings("error")
def test_betas_that_leave_no_signal() -> None:
    for kind, zsnr, end in (("v", True, 0.999), ("x0", True, 0.999), ("eps", False, 0.3)):
        with pytest.raises(
            ConfigError, match=rf"beta_end: got 0\.01, {end}, expected less: no sig"
        ):
            make(kind, zsnr=zsnr, beta_start=0.01, beta_end=end)
    for kind, zsnr, end in (("v", False, 0.999), ("v", True, 0.5), ("eps", False, 0.1)):
        assert make(kind, zsnr=zsnr, beta_start=0.01, beta_end=end)._tables.isfinite().all()


@pytest.mark.parametrize("zsnr", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_tables(zsnr: bool, steps: int) -> None:
    d = make(zsnr=zsnr, timesteps=steps)
    assert d.betas.shape == d.alphas_cumprod.shape == d.log_beta_tilde.shape == (steps,)
    for table in (d.betas, d.alphas_cumprod, d.log_beta_tilde):
        assert table.dtype == np.float64
        assert np.isfinite(table).all()
    assert d._tables.isfinite().all()
    assert (np.diff(d.alphas_cumprod) < 0).all()
    assert d.log_beta_tilde[0] == d.log_beta_tilde[1]
    last = d.betas[-1] * (1 - d.alphas_cumprod[-2]) / (1 - d.alphas_cumprod[-1])
    assert math.exp(d.log_beta_tilde[-1]) == pytest.approx(last, rel=1e-12)
    assert (d.alphas_cumprod[-1] == 0) == zsnr


def book(
    d: Diffusion, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Losses sample by sample, float64, from x_0 and posterior means; only betas are borrowed."""
    betas = [float(b) for b in d.betas]
    abars = np.cumprod([1 - b for b in betas]).tolist()
    rows: dict[str, list[Tensor]] = {"mse": [], "vb": []}
    for o, x, xt, i in zip(output.double(), x0.double(), x_t.double(), t.tolist()):
        c = len(x)
        pred, u = o[:c], o[c:]
        abar, before, beta = abars[i], abars[i - 1] if i else 1.0, betas[i]
        a, s = math.sqrt(abar), math.sqrt(1 - abar)
        if d.config.prediction == "v":
            x0_hat = a * xt - s * pred
        else:
            x0_hat = pred if d.config.prediction == "x0" else (xt - s * pred) / a
        snr = abar / (1 - abar)
        w = {
            "v_mse": snr + 1,
            "p2": snr * math.sqrt(1 - abar),
            "min_snr": min(snr, d.config.min_snr_gamma),
            "eps_mse": snr,
        }[d.config.loss_weight]
        rows["mse"].append((w * (x - x0_hat) ** 2).mean())
        j = max(i, 1)
        tilde = betas[j] * (1 - abars[j - 1]) / (1 - abars[j])
        f = (u + 1) / 2
        log_var = f * math.log(beta) + (1 - f) * math.log(tilde)
        first = math.sqrt(before) * beta / (1 - abar)
        second = math.sqrt(1 - beta) * (1 - before) / (1 - abar)
        mean = first * x0_hat.detach() + second * xt
        if i == 0:
            nats = list(map(bin_nll, x.flatten(), mean.flatten(), log_var.flatten()))
            rows["vb"].append(torch.stack(nats).mean() / math.log(2))
        else:
            gap = (first * x + second * xt - mean) ** 2
            kl = 0.5 * (log_var - math.log(tilde) - 1 + (tilde + gap) / log_var.exp())
            rows["vb"].append(kl.mean() / math.log(2))
    out = {k: torch.stack(v) for k, v in rows.items()}
    out["loss"] = out["mse"] + d.config.vb_weight * out["vb"]
    return out


def bin_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of the probability between the edges of the bin of x."""

    def cdf(edge: Tensor) -> Tensor:
        z = (edge - mean) / (log_var / 2).exp()
        return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    upper = cdf(x + 1 / 255) if x <= 0.999 else torch.ones_like(x)
    lower = cdf(x - 1 / 255) if x >= -0.999 else torch.zeros_like(x)
    return -(upper - lower).clamp_min(1e-12).log()


def batch(d: Diffusion, accuracy: float = 0.05) -> tuple[Tensor, ...]:
    """Predictions near the truth, variances on both sides of the range, both ends of the data."""
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 1, 2, 137, 500, 998, 999, 0])
    x0 = torch.randn(8, 2, 4, 4, generator=g).clamp(-1, 1)
    noise = torch.randn(8, 2, 4, 4, generator=g)
    # at t = 0 a deviation of some sigma, not of hundreds
    spread = torch.where(t == 0, 1.0, accuracy * 20).view(-1, 1, 1, 1)
    error = spread * torch.randn(8, 2, 4, 4, generator=g)
    if d.config.prediction == "x0":
        error = error * torch.where(t == 0, 0.01, 1.0).view(-1, 1, 1, 1)
    u = 1.2 * torch.randn(8, 2, 4, 4, generator=g)
    output = torch.cat([d.target(x0, t, noise) + error, u], 1)
    return output, x0, d.q_sample(x0, t, noise), t, noise


def disagreements(d: Diffusion, oracle: Diffusion | None = None) -> list[str]:
    """Losses and gradients beyond 2e-5 (fp32 through a few roundings; vb at t=0 subtracts cdfs)."""
    output, x0, x_t, t, noise = batch(d)
    got_at, want_at = output.clone().requires_grad_(), output.double().requires_grad_()
    got = d.losses(got_at, x0, x_t, t, noise)
    want = book(oracle or d, want_at, x0, x_t, t, noise)
    wrong = []
    for name in ("mse", "vb", "loss"):
        assert got[name].dtype == torch.float32
        limit = 2e-5 * want[name].abs() + 1e-7
        if not ((got[name] - want[name]).abs() <= limit).all():
            wrong.append(name)
    (g,) = torch.autograd.grad(got["loss"].sum(), got_at)
    (w,) = torch.autograd.grad(want["loss"].sum(), want_at)
    for name, channels in (("grad mse", slice(0, 2)), ("grad vb", slice(2, 4))):
        error = (g[:, channels] - w[:, channels]).flatten(1).norm(dim=1)
        if not (error <= 1e-4 * w[:, channels].flatten(1).norm(dim=1) + 1e-7).all():
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(("prediction", "weight", "zsnr"), CASES)
def test_losses_by_the_book(prediction: str, weight: str, zsnr: bool) -> None:
    assert disagreements(make(prediction, weight, zsnr, vb_weight=0.7)) == []


def _negated(self: Diffusion) -> Any:
    keep, jacobian = ORIGINAL(self)
    return keep, -jacobian


ORIGINAL = Diffusion._x0_coefficients


@pytest.mark.parametrize(
    ("target", "name", "value", "caught"),
    [
        (module, "BIN", 1 / 127.5, "vb"),
        (module, "log_posterior_variance", lambda b, a: np.log(b), "vb"),
        (Diffusion, "_x0_coefficients", _negated, "vb"),
        (Diffusion, "weight", lambda self, t: torch.ones(len(t)), "mse"),
    ],
)
def test_the_book_bites(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any, caught: str
) -> None:
    monkeypatch.setattr(target, name, value)
    assert caught in disagreements(make("v", "p2"))


def test_swapped_weights_are_seen() -> None:
    assert disagreements(make("v", "p2"), oracle=make("v", "min_snr")) == [
        "mse",
        "loss",
        "grad mse",
    ]


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_terminal_gradient(prediction: str, weight: str) -> None:
    """p2, min_snr and eps_mse leave the terminal step without gradient; v_mse does not."""
    d = make(prediction, weight)
    t = torch.tensor([999, 998])
    x0, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    output = torch.full((2, 2, 2, 2), 0.3, requires_grad=True)
    losses = d.losses(output, x0, d.q_sample(x0, t, noise), t, noise)
    (grad,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert bool((grad[0, 0] == 0).all()) == (weight != "v_mse")
    assert (grad[1, 0] != 0).all()
    assert bool(d.weight(t)[0] == 0) == (weight != "v_mse")


def test_v_mse_is_plain() -> None:
    t = torch.arange(1000)
    assert torch.equal(make("v", "v_mse").weight(t), torch.ones(1000))
    assert torch.equal(make("eps", "eps_mse", False).weight(t), torch.ones(1000))


def test_p2_leaves_the_noisy_third_out() -> None:
    w = make("v", "p2").weight(torch.arange(1000)).double()
    assert (w[:400].sum() / w.sum()).item() == pytest.approx(0.86, abs=0.01)
    assert (w[:700].sum() / w.sum()).item() == pytest.approx(0.997, abs=0.001)


@pytest.mark.parametrize(("prediction", "zsnr"), [("v", True), ("eps", False), ("x0", True)])
def test_terms_train_their_own_channels(prediction: str, zsnr: bool) -> None:
    d = make(prediction, zsnr=zsnr)
    output, x0, x_t, t, noise = batch(d)
    output.requires_grad_()
    losses = d.losses(output, x0, x_t, t, noise)
    (mse,) = torch.autograd.grad(losses["mse"].sum(), output, retain_graph=True)
    (vb,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert (mse[:, 2:] == 0).all()
    assert (vb[:, :2] == 0).all()
    assert (mse[:, :2] != 0).any()
    assert (vb[:, 2:] != 0).any()


def test_perfect_posterior_has_no_bound() -> None:
    """u = -1 (variance beta~) and the true v: KL = 0 at every t > 0; else it is positive."""
    d = make()
    t = torch.arange(1, 1000)
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 999, 1, 2, 2, generator=g)
    u = torch.full_like(x0, -1.0)
    exact = torch.cat([d.target(x0, t, noise), u], 1)
    x_t = d.q_sample(x0, t, noise)
    assert d.losses(exact, x0, x_t, t, noise)["vb"].abs().max() < 1e-9
    off = torch.cat([d.target(x0, t, noise) + 0.1, u], 1)
    assert (d.losses(off, x0, x_t, t, noise)["vb"] > 0).all()


@pytest.mark.parametrize("u", [-1.0, 0.0, 1.5])
def test_bins_of_the_first_step_sum_to_one(u: float) -> None:
    """2^-vb over all 256 values of x_0 is a distribution, whatever mean and variance are."""
    d = make(prediction="x0")
    x0 = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.long)
    for mean in (-0.99, 0.0, 0.31):
        output = torch.tensor([mean, u]).view(1, 2, 1, 1).expand(256, 2, 1, 1)
        vb = d.losses(output, x0, x0, t, torch.zeros_like(x0))["vb"].double()
        assert (2.0**-vb).sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("prediction", "zsnr"), [("v", True), ("eps", False), ("x0", True)])
def test_identities(prediction: str, zsnr: bool) -> None:
    d = make(prediction, zsnr=zsnr)
    t = torch.tensor([0, 400, 999])
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    x_t = d.q_sample(x0, t, noise)
    abar = torch.tensor(d.alphas_cumprod[t.numpy()]).float().view(3, 1, 1, 1)
    torch.testing.assert_close(x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    if zsnr:
        assert torch.equal(x_t[2], noise[2])
    keep, jacobian = d._at(t, 4)[-2:]
    back = keep * x_t + jacobian * d.target(x0, t, noise)
    if prediction == "v":
        torch.testing.assert_close(d.target(x0, t, noise)[2], -x0[2])
    torch.testing.assert_close(back, x0, rtol=1e-4, atol=5e-5)


def test_finite_far_from_the_truth() -> None:
    for prediction, weight, zsnr in CASES:
        d = make(prediction, weight, zsnr)
        t = torch.tensor([0, 1, 998, 999])
        g = torch.Generator().manual_seed(3)
        x0, noise = torch.randn(2, 4, 1, 4, 4, generator=g)
        output = (30 * torch.randn(4, 2, 4, 4, generator=g)).requires_grad_()
        losses = d.losses(output, x0, d.q_sample(x0, t, noise), t, noise)
        losses["loss"].sum().backward()
        assert all(v.isfinite().all() for v in losses.values())
        assert output.grad is not None
        assert output.grad.isfinite().all()


def test_no_synchronisation_and_half_precision() -> None:
    class Recorder(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    d = make()
    output, x0, x_t, t, noise = batch(d)
    with Recorder() as recorder:
        half = d.losses(output.bfloat16(), x0, x_t, t, noise)
    assert not [n for n in recorder.names if "_local_scalar_dense" in n or "nonzero" in n]
    whole = d.losses(output.bfloat16().float(), x0, x_t, t, noise)
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, whole[name])


def test_bad_shapes() -> None:
    d = make()
    x0, t = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"output, x_t: got \(2, 1, 4, 4\)"):
        d.losses(x0, x0, x0, t, x0)


@pytest.mark.gpu
def test_same_losses_on_the_gpu() -> None:
    cpu, gpu = make(), Diffusion(DiffusionConfig(), "cuda")
    args = batch(cpu)
    want = cpu.losses(*args)
    moved = [a.cuda() for a in args]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gpu.losses(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in got.items():
        torch.testing.assert_close(value.cpu(), want[name], rtol=1e-4, atol=1e-6)
