"""Random numbers and the sampling step in one launch: words bit for bit, everything else against
float64, and the whole sampler on them. Under Triton's interpreter, in another process."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, relative
from interpreter import inside, outside, planted, run_inside
from torch import Tensor

from fpdm import noise, steps
from fpdm.config import DiffusionConfig, ModelConfig, SamplerConfig
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.kernels.launch import LaunchError
from fpdm.steps import Guidance

KEYS = noise.as_keys([0, 1, 2**63 + 5, 2**64 - 1, 12345678901234567890])
COUNTERS: list[tuple[int | Tensor, int | Tensor, int | Tensor, int]] = [
    (0, 0, 0, 1),
    (5, 7, 3, 10),
    (torch.arange(5) * 1000003, 2**32 - 1, 1, 1030),
    # one for all; only the low 32 bits count
    (torch.tensor([9]), 0, 2, 4096),
    (torch.full((5,), 2**40 + 3), torch.arange(5), 2, 33),
    (4, 9, torch.tensor([7, 7, 3, 3, 1]), 2),
    (torch.arange(5), torch.tensor([9]), 4, 17),
]


@outside
def test_interpreter() -> None:
    pytest.importorskip("triton")
    run_inside(__file__)


def kernels() -> tuple[Any, Any]:
    return tuple(importlib.import_module(f"fpdm.kernels.{n}") for n in ("philox", "update"))  # type: ignore[return-value]


def wrong_numbers() -> list[str]:
    """Where words differ at all, and normals from float64 ones by more than a rounding."""
    philox, _ = kernels()
    found = []
    for c1, c2, domain, count in COUNTERS:
        where = f"{c1} {c2} {domain} {count}"
        if not torch.equal(
            philox.draw(KEYS, c1, c2, domain, count, False),
            noise.uint32(KEYS, c1, c2, domain, count),
        ):
            found.append(f"words {where}")
        mine = philox.draw(KEYS, c1, c2, domain, count, True)
        torchs = noise.normals(KEYS, c1, c2, domain, (count,))
        near = (mine - torchs).abs() <= 2.0**-23 * torchs.abs()
        if not near.all() or int((mine != torchs).sum()) > count // 500:
            found.append(f"normals {where}")
    return found


@inside
def test_numbers() -> None:
    assert wrong_numbers() == []
    philox, _ = kernels()
    # the same key and counters wherever they lie
    far = torch.stack([KEYS, KEYS + 1], 1)[:, 0]
    assert torch.equal(philox.draw(far, 1, 2, 3, 9, True), philox.draw(KEYS, 1, 2, 3, 9, True))
    assert philox.draw(KEYS[:0], 0, 0, 0, 4, True).shape == (0, 4)
    with pytest.raises(LaunchError, match="philox: keys: got int32, expected int64"):
        philox.draw(KEYS.int(), 0, 0, 0, 4, True)


@inside
def test_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quarter of the turn and its ends; the smallest and the largest radius."""
    philox, _ = kernels()
    quarter = 2**30
    turns = [q * quarter + o for q in range(4) for o in (0, 1, quarter // 2 - 1, quarter // 2)]
    turns += [2**32 - 1, 2**32 - quarter // 2]
    pairs = torch.tensor(list(itertools.product((0, 1, 2**31, 2**32 - 1), turns)))
    given = iter(pairs.repeat_interleave(2, 0).tolist())
    expected = []
    for w, turn in pairs.double():
        r = (-2 * ((w + 0.5) / 2**32).log()).sqrt()
        angle = turn * (2 * torch.pi / 2**32)
        expected.append(torch.stack([r * angle.cos(), r * angle.sin()]))
    impl = importlib.import_module("triton.language")

    def fake(key: Any, c0: Any, *rest: Any) -> Any:
        (w, turn), _ = next(given), next(given)
        zero = c0.to(impl.int64) * 0
        return tuple((zero + v).to(impl.uint32) for v in (w, turn, w, turn))

    monkeypatch.setattr(impl, "philox", fake)
    for want in expected:
        found = philox.draw(KEYS[:1], 0, 0, 0, 2, True)[0].double()
        assert (found - want).abs().max() <= 2.0**-24 * want.abs().max() + 1e-15


Case = dict[str, Any]
DEFAULT: Case = {
    "b": 2, "c": 4, "h": 8, "patch": 2, "scale": 1.7, "channels": 4, "rescale": 0.0, "branches": 2,
    "noise": "none", "multistep": False, "dtype": torch.float32, "size": 1.0,
}  # fmt: skip
CASES: list[Case] = [
    {},
    {"branches": 1},
    {"channels": 3, "scale": 0.3},
    {"channels": 1, "rescale": 0.7},
    {"rescale": 0.2, "noise": "drawn", "dtype": torch.float16},
    {"noise": "given"},
    {"noise": "drawn", "branches": 1, "b": 3, "patch": 1},
    {"multistep": True},
    {"multistep": True, "noise": "given", "rescale": 1.0, "channels": 3},
    # several programs to a sample, the last one not full; one channel; whole-image patches
    {"h": 12, "c": 1, "channels": 1, "patch": 4, "rescale": 0.5, "noise": "drawn"},
    {"h": 4, "patch": 4, "c": 2, "channels": 2, "b": 5},
    {"b": 0},
    # as of a model that was just initialised: no spread to rescale by
    {"rescale": 0.5, "size": 0.0},
    # one number to a sample
    {"rescale": 0.5, "h": 1, "patch": 1, "c": 1, "channels": 1},
]


def operands(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    b, c, h, p = (case[n] for n in ("b", "c", "h", "patch"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "o": (normal(case["branches"] * b, (h // p) ** 2, p * p * 2 * c) * case["size"]).to(
            case["dtype"]
        ),
        "x": normal(b, c, h, h), "rows": normal(5, 8) * 0.5, "step": torch.tensor([3]),
        "z": normal(b, c, h, h), "x0": normal(b, c, h, h),
    }  # fmt: skip


def expected(case: Case, v: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and x0 by fpdm.steps with the arithmetic of ``dtype``."""
    c, h, p = (case[n] for n in ("c", "h", "patch"))
    config = ModelConfig(input_size=h, in_channels=c, patch_size=p, hidden_size=16, num_heads=2)
    # float() in steps is for half precision: float64 passes through it unchanged here
    out = random_model(config).unpatchify(v["o"]).to(dtype)
    if case["branches"] == 2 and len(out):
        out = steps.guide(*out.chunk(2), case["scale"], case["channels"], case["rescale"])
    c1, row, x = case["c"], v["rows"][3].to(dtype), v["x"].to(dtype)
    keys, step = noise.as_keys(list(range(case["b"]))), v["step"]
    z = v["z"] if case["noise"] == "given" else None
    if case["noise"] == "drawn":
        z = noise.normals(keys, step, 0, noise.SAMPLE_STEP, (c1, h, h))
    x0 = row[6] * x + row[7] * out[:, :c1]
    found = row[0] * x + row[1] * out[:, :c1]
    if case["multistep"]:
        found = found + row[5] * v["x0"].to(dtype)
    if z is not None:
        found = found + row[2] * torch.exp(row[3] + row[4] * out[:, c1:]) * z.to(dtype)
    return found, x0


def wrong_steps(cases: list[Case]) -> list[str]:
    """Against float64: at most twice the error of plain float32, or two units of rounding."""
    _, update = kernels()
    found = []
    for changes in cases:
        case = DEFAULT | changes
        v = operands(case)
        (x, x0), (low, low0) = (expected(case, v, t) for t in (torch.float64, torch.float32))
        guidance = Guidance(case["scale"], case["channels"], case["rescale"])
        mine, mine0, drawn = v["x"].clone(), v["x0"].clone(), case["noise"] == "drawn"
        update.update_(
            v["o"], mine, v["rows"], v["step"], case["patch"],
            guidance if case["branches"] == 2 else None,
            noise.as_keys(list(range(case["b"]))) if drawn else None, noise.SAMPLE_STEP,
            v["z"] if case["noise"] == "given" else None, mine0 if case["multistep"] else None,
        )  # fmt: skip
        pairs = [(mine, x, low)]
        pairs += [(mine0, x0, low0)] if case["multistep"] else []
        for got, want, plain in pairs:
            off, bound = relative(got, want), max(2 * relative(plain, want), 2.0**-23)
            # a NaN is within no bound
            if len(want) and not off <= bound:
                found.append(f"{changes}: off by {off:.2g}")
        if not case["multistep"] and not torch.equal(mine0, v["x0"]):
            found.append(f"{changes}: x0 written")
    return found


@inside
def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    _, update = kernels()
    assert wrong_steps(CASES) == []
    # several programs to a sample
    monkeypatch.setattr(update, "BLOCK", 64)
    assert wrong_steps(CASES) == []


@inside
@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("update", "tl.load(p_row + 4)", "tl.load(p_row + 3)"),
        # every channel guided
        ("update", "tl.where(o_e < GUIDED * H * H", "tl.where(o_e < C * H * H"),
        # this step's x_0 for the one before
        ("update", "tl.load(p_row + 5) * tl.load(p_x0 +", "tl.load(p_row + 5) * tl.load(p_x +"),
        ("update", "tl.load(p_step)", "tl.load(p_step) - 1"),
        ("update", "step, 0, domain)", "0, step, domain)"),
        ("update", "tl.sum(b_sum) / (n - 1)", "tl.sum(b_sum) / n"),
        ("update", "half * C + o_c", "(1 - half) * C + o_c"),
        ("update", "tl.where(found < tiny, tiny, found)", "found"),
        ("philox", "i_b * s_c2", "i_b * s_c1"),
        ("philox", "b_element % 4 < 2", "b_element % 4 < 1"),
        ("philox", "b_w2, b_w3 = words(key, o_group", "b_w3, b_w2 = words(key, o_group"),
        ("philox", "range(16, 0, -2)", "range(8, 0, -2)"),
        ("philox", "(b_q + 1) & 2", "b_q & 2"),
    ],
)  # fmt: skip
def test_planted_faults(
    module: str, line: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copy = planted(module, line, fault, tmp_path)
    # what another module calls, too
    for name in ("update_kernel", "philox_kernel", "normal_at"):
        if hasattr(real, name):
            monkeypatch.setattr(real, name, getattr(copy, name))
    assert wrong_steps(CASES) + wrong_numbers() != []


SMALL = ModelConfig(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=5)
SAMPLERS: list[dict[str, Any]] = [
    {"method": "ddpm"},
    {"method": "ddim", "eta": 0.5, "reuse": "full"},
    {"method": "dpmpp_2m", "guidance_rescale": 0.5},
    {"method": "ddpm", "guidance": 1.0},
    {"method": "ddim", "guidance_low": 0.3, "guidance_high": 0.8, "guidance_channels": 1},
]


@inside
@pytest.mark.parametrize("changes", SAMPLERS)
def test_sampler(changes: dict[str, Any]) -> None:
    """Triton's against the reference's, tables, branches, noise and history included."""
    base = SamplerConfig(steps=4, iters=2, guidance=2.0, method="ddpm", graphs="off")
    config, found = replace(base, **changes), []
    step_noise = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for impl in ("reference", "triton"):
        model = random_model(SMALL, impl=impl)
        s = Sampler(model, Diffusion(DiffusionConfig()), config)
        found.append(s.sample([0, 1, 2], [7, 8, 9]).x)
        if changes.get("method") == "ddpm":
            found.append(s.sample([0, 1, 2], [7, 8, 9], step_noise=step_noise).x)
    half = len(found) // 2
    for mine, theirs in zip(found[half:], found[:half]):
        assert relative(mine, theirs) <= 2e-6


@pytest.mark.gpu
def test_on_the_device() -> None:
    """Words, normals and steps of the compiled kernels, and noise.* through them."""
    philox, update = kernels()
    keys = KEYS.cuda()
    for c1, c2, domain, count in COUNTERS:
        there = [c.cuda() if isinstance(c, Tensor) else c for c in (c1, c2, domain)]
        mine = noise.uint32(keys, *there, count)
        assert torch.equal(mine.cpu(), noise.uint32(KEYS, c1, c2, domain, count))
        z = noise.normals(keys, *there, (count,)).cpu()
        want = noise.normals(KEYS, c1, c2, domain, (count,))
        assert ((z - want).abs() <= 2.0**-23 * want.abs()).all()
        assert torch.equal(z, philox.draw(keys, *there, count, True).cpu())
    for changes in CASES:
        case = DEFAULT | changes
        v = operands(case)
        want, _ = expected(case, v, torch.float64)
        low, _ = expected(case, v, torch.float32)
        on = {n: t.cuda() for n, t in v.items()}
        guidance = Guidance(case["scale"], case["channels"], case["rescale"])
        drawn = case["noise"] == "drawn"
        update.update_(
            on["o"], on["x"], on["rows"], on["step"], case["patch"],
            guidance if case["branches"] == 2 else None,
            noise.as_keys(list(range(case["b"]))).cuda() if drawn else None, noise.SAMPLE_STEP,
            on["z"] if case["noise"] == "given" else None, on["x0"] if case["multistep"] else None,
        )  # fmt: skip
        if len(want):
            bound = max(2 * relative(low, want), 2.0**-22)
            assert relative(on["x"].cpu(), want) <= bound, changes
