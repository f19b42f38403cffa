"""The model against the published one (golden numbers) and against the plain architecture in
float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    EXTRA,
    TINY,
    TINY_DIT,
    extra_model,
    published,
    random_model,
    tiny_dit,
    tiny_model,
    worst_relative,
)
from contract import violation
from torch import Tensor

from bench import published as plain
from fpdm.config import ConfigError, ModelConfig
from fpdm.diffusion import Diffusion
from fpdm.model import FPDM, DiT, build_model, sincos_2d
from fpdm.steps import guide
from fpdm.weights import PreparedWeights

GOLDEN = 5e-6


@pytest.mark.parametrize("iters", [1, 2, 4, 8, 26])
def test_forward_tiny(tiny: dict[str, Tensor], iters: int) -> None:
    with torch.no_grad():
        out = tiny_model(tiny)(tiny["x"], tiny["t"], tiny["y"], iters)
    assert worst_relative(out, tiny[f"forward.iters{iters}"]) <= GOLDEN


@pytest.mark.parametrize("iters", [1, 3, 12])
def test_forward_extra(extra: dict[str, Tensor], iters: int) -> None:
    with torch.no_grad():
        out = extra_model(extra)(extra["x"], extra["t"], extra["y"], iters)
    assert worst_relative(out, extra[f"forward.iters{iters}"]) <= GOLDEN


def test_golden_gate_bites(tiny: dict[str, Tensor]) -> None:
    """One weight changed by one part in ten thousand is seen."""
    model = tiny_model(tiny)
    with torch.no_grad():
        model.block_fixed_point.attn.qkv.weight.mul_(1.0001)
        out = model(tiny["x"], tiny["t"], tiny["y"], 8)
    assert worst_relative(out, tiny["forward.iters8"]) > GOLDEN


def test_dit(tiny: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = tiny_dit(tiny)(tiny["x"], tiny["t"], tiny["y"])
    assert worst_relative(out, tiny["dit.forward"]) <= GOLDEN


def test_positions(tiny: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    for golden, config in ((tiny, TINY), (extra, EXTRA)):
        ours = sincos_2d(config.hidden_size, config.input_size // config.patch_size)
        assert worst_relative(ours, golden["state_dict.pos_embed"]) <= GOLDEN


def test_guidance(tiny: dict[str, Tensor]) -> None:
    """The published batch [x0 x1; x0 x1]: the first three channels guided, the rest as they are."""
    half = tiny["x"][:2]
    y, t = tiny["cfg.y"], torch.full((4,), 500)
    with torch.no_grad():
        out = tiny_model(tiny)(torch.cat([half, half]), t, y, 4)
    cond, null = out.chunk(2)
    guided = guide(cond, null, 4.0, channels=3)
    want = tiny["cfg.out_scale4"]
    assert worst_relative(guided, want[:2]) <= GOLDEN
    assert worst_relative(null[:, 3:], want[2:, 3:]) <= GOLDEN


def test_reuse_chain(tiny: dict[str, Tensor]) -> None:
    model, solution = tiny_model(tiny), None
    for t in (900, 600, 300, 0):
        with torch.no_grad():
            out, solution, _ = model.solve(
                tiny["x"], torch.full((4,), t), tiny["y"], 2, init=solution
            )
        assert worst_relative(out, tiny[f"reuse.t{t}"]) <= GOLDEN


def test_guided_reuse_extra(extra: dict[str, Tensor]) -> None:
    model, solution = extra_model(extra), None
    x = torch.cat([extra["x"], extra["x"]])
    y = torch.cat([extra["y"], torch.full((3,), EXTRA.num_classes)])
    for t in (999, 500):
        with torch.no_grad():
            out, solution, _ = model.solve(x, torch.full((6,), t), y, 2, init=solution)
        assert worst_relative(out, extra[f"cfg_reuse.t{t}"]) <= GOLDEN
    guided = guide(*out.chunk(2), 4.0, channels=1)
    assert worst_relative(guided, extra["cfg_reuse.guided500"]) <= GOLDEN


LOSSES = [
    ("tiny", "v_zsnr", "v", "p2", True, (2, 3)),
    ("tiny", "eps", "eps", "eps_mse", False, (2, 3)),
    ("extra", "p2", "v", "p2", True, (0, 2)),
    ("extra", "snr+1", "v", "v_mse", True, (0, 2)),
]


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@pytest.mark.parametrize(("which", "key", "prediction", "weight", "zsnr", "counts"), LOSSES)
def test_losses_and_gradients(
    request: pytest.FixtureRequest, which: str, key: str, prediction: str, weight: str, zsnr: bool,
    counts: tuple[int, int], recompute: str,
) -> None:  # fmt: skip
    from fpdm.config import DiffusionConfig, ExecutionConfig

    golden = request.getfixturevalue(which)
    make = tiny_model if which == "tiny" else extra_model
    model = make(golden, ExecutionConfig(recompute=recompute))  # type: ignore[arg-type]
    diffusion = Diffusion(
        DiffusionConfig(prediction=prediction, loss_weight=weight, zero_terminal_snr=zsnr)  # type: ignore[arg-type]
    )
    g = published(golden, f"loss.{key}.")
    x_t = diffusion.q_sample(g["x0"], g["t"], g["noise"])
    n, m = counts
    out = model(x_t, g["t"], golden["y"], m, no_grad_iters=n)
    losses = diffusion.losses(out, g["x0"], x_t, g["t"], g["noise"])
    for name in ("mse", "vb", "loss"):
        torch.testing.assert_close(losses[name], g[name], rtol=GOLDEN, atol=1e-7)
    losses["loss"].mean().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        want = golden[f"grad.{key}.{name}"]
        if want.norm() == 0:
            assert param.grad.abs().max() == 0, name
        else:
            assert ((param.grad - want).norm() / want.norm()).item() <= GOLDEN, name


@pytest.mark.parametrize("config", [TINY, EXTRA])
def test_equals_plain_architecture_fp64(config: ModelConfig) -> None:
    """Split injection, hoists and folding against the unhoisted map: forward and every gradient."""
    model = random_model(config, seed=3).double()
    assert isinstance(model, FPDM)
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    shape = (3, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    t, y = torch.tensor([999, 500, 0]), torch.tensor([1, config.num_classes, 0])
    out = model(x, t, y, 3, no_grad_iters=2)
    want, _ = plain.forward(state, config, x, t, y, 3, 2)
    assert worst_relative(out, want) <= 1e-12
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * probe).sum().backward()
    (want * probe).sum().backward()
    for name, param in model.named_parameters():
        grad = state[name].grad
        assert param.grad is not None
        assert grad is not None
        assert ((param.grad - grad).norm() / grad.norm()).item() <= 1e-12, name


def bf16_violations(model: FPDM, golden: dict[str, Tensor]) -> list[str]:
    """The contract in bf16, forward and every gradient: float64 oracle, plain bf16 PyTorch."""
    config = model.config
    x, t, y = golden["x"], golden["t"], golden["y"]
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(x.shape[0], config.out_channels, *x.shape[2:], generator=generator)

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        state = {k: v.detach().to(dtype).requires_grad_() for k, v in model.state_dict().items()}
        out, _ = plain.forward(state, config, x.to(dtype), t, y, 2, 1)
        (out * probe.to(dtype)).sum().backward()
        return {"output": out.detach()} | {
            k: v.grad for k, v in state.items() if v.grad is not None
        }

    oracle, low = run(torch.float64), run(torch.bfloat16)
    model.zero_grad()
    out = model(x, t, y, 2, 1, weights=PreparedWeights(model, torch.bfloat16))
    (out.float() * probe).sum().backward()
    found = {"output": out.detach()} | {k: p.grad for k, p in model.named_parameters()}
    lines = []
    for name, value in found.items():
        assert value is not None
        line = violation(value, low[name], oracle[name], torch.bfloat16)
        lines += [f"{name}: {line}"] if line else []
    return lines


def test_bf16_within_contract(tiny: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    assert bf16_violations(tiny_model(tiny), tiny) == []
    assert bf16_violations(extra_model(extra), extra) == []


def test_parameter_counts() -> None:
    with torch.device("meta"):
        for depth, keys, count in (
            (1, 48, 86_500_256),
            (2, 68, 134_310_560),
            (4, 108, 229_931_168),
        ):
            model = build_model(ModelConfig(pre_depth=depth, post_depth=depth))
            assert sum(p.numel() for p in model.parameters()) == count
            assert len(model.state_dict()) == keys
        dit = build_model(ModelConfig(kind="dit", depth=28, pre_depth=0, post_depth=0))
        assert sum(p.numel() for p in dit.parameters()) == 674_834_720
        assert len(dit.state_dict()) == 292


def test_starts_as_identity() -> None:
    """adaLN-Zero: the output is zero at initialisation."""
    model = build_model(TINY)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 10]), 3)
    assert out.abs().max() == 0


def test_batch_mates_do_not_matter() -> None:
    model = random_model(TINY)
    x, t = torch.randn(5, 4, 8, 8), torch.tensor([0, 10, 500, 999, 3])
    y = torch.arange(5)
    with torch.no_grad():
        together = model(x, t, y, 4)
        alone = torch.cat([model(x[k : k + 1], t[k : k + 1], y[k : k + 1], 4) for k in range(5)])
    assert worst_relative(alone, together) <= 1e-5


@pytest.mark.parametrize(("model", "config"), [(FPDM, TINY_DIT), (DiT, TINY)])
def test_a_config_of_another_kind_is_refused(model: Any, config: ModelConfig) -> None:
    match = f"{model.__name__}: got model.kind {config.kind}, expected {model.kind}"
    with pytest.raises(ConfigError, match=match):
        model(config)


def test_no_iterations_is_refused() -> None:
    model = random_model(TINY)
    given = torch.randn(1, 4, 8, 8), torch.tensor([0]), torch.tensor([0])
    with pytest.raises(ValueError, match="at least 1"):
        model(*given, 0)
    # what holds one integer is one
    with torch.no_grad():
        assert torch.equal(model(*given, torch.tensor(1)), model(*given, True))


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"t": [-1, 3]}, r"t: got -1, expected at least 0"),
        ({"y": [0, 11]}, r"y: got 11, expected 0\.\.10 \(10 is the null label\)"),
        ({"y": [-1, 0]}, r"y: got -1, expected 0\.\.10"),
    ],
)
def test_values_out_of_range_are_named(kind: str, change: dict, match: str) -> None:
    """Instead of an IndexError of the embedding, or numbers without meaning."""
    depths: dict = {} if kind == "fpdm" else {"kind": "dit", "depth": 1}
    depths |= {} if kind == "fpdm" else {"pre_depth": 0, "post_depth": 0}
    model = build_model(
        ModelConfig(
            input_size=4, in_channels=1, hidden_size=16, num_heads=2, num_classes=10, **depths
        )
    )
    given = {"x": torch.zeros(2, 1, 4, 4), "t": torch.tensor([0, 999]), "y": torch.tensor([0, 10])}
    assert model(**given).shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=match):
        model(**given | {name: torch.tensor(values) for name, values in change.items()})


STUMBLES: dict[str, tuple[Any, str]] = {
    "an image of other channels": (
        lambda m, x, h, mod: m.encode(x[:, :1], mod), r"x: got \(2, 1, 8, 8\) .* expected \(2, 4"),
    "tokens of another width": (
        lambda m, x, h, mod: m.decode(h[..., :3], mod), r"z: got .* expected \(2, 16, 48\)"),
    "a start for another batch": (
        lambda m, x, h, mod: m.iterate(h[:1], h, mod, 2), r"x0: got \(1, 16, 48\), expected"),
    "a point of another batch": (
        lambda m, x, h, mod: m.fixed_point_map(h, mod)(h[:1]), r"x: got \(1, 16, 48\), expected"),
    "fewer than no iterations": (
        lambda m, x, h, mod: m.iterate(h, h, mod, -1), "iters: got -1, expected at least 0"),
    "vectors without the timestep": (
        lambda m, x, h, mod: m.iterate(h, h, m.modulation_pp(LABELS), 2),
        "mod: got none for the fixed-point block"),
    "vectors in another dtype": (
        lambda m, x, h, mod: m.iterate(h, h, mod.fp.double(), 2),
        "mod: got torch.float64, expected torch.float32: made with the same weights"),
    "pre vectors in another dtype": (
        lambda m, x, h, mod: m.encode(x, mod._replace(pre=[v.half() for v in mod.pre])),
        "mod: got torch.float16, expected torch.float32"),
    "half an iteration": (
        lambda m, x, h, mod: m.iterate(h, h, mod, 2.5), "iters: got 2.5, expected an integer"),
    "iterations that are none": (
        lambda m, x, h, mod: m(x, TIMES, LABELS, 2, None), "no_grad_iters: got None, expected an"),
    "labels of a byte": (
        lambda m, x, h, mod: m(x, TIMES, LABELS.to(torch.uint8)), "y: got torch.uint8, expected"),
    "a label that is none": (
        lambda m, x, h, mod: m.modulation(TIMES, torch.tensor([3, 11])),
        r"y: got 11, expected 0\.\.10 \(10 is the null label\)"),
}  # fmt: skip
LABELS, TIMES = torch.tensor([3, 10]), torch.tensor([999, 0])


@pytest.mark.parametrize("name", STUMBLES)
def test_a_loop_of_ones_own_is_told_what_is_wrong(name: str) -> None:
    model = random_model(TINY)
    with torch.no_grad():
        x, mod = torch.randn(2, 4, 8, 8), model.modulation(TIMES, LABELS)
        h = model.encode(x, mod)
        call, message = STUMBLES[name]
        with pytest.raises(ValueError, match=message):
            call(model, x, h, mod)


def test_transforms_of_the_model_are_refused() -> None:
    """Gradients by torch.func, for all samples and for each: in our words, not in those of the
    labels that have no values there."""
    model = random_model(TINY)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x, t, y)).square().mean()

    x, grad = torch.randn(2, 4, 8, 8), torch.func.grad(loss)
    each = torch.func.vmap(grad, in_dims=(None, 0, 0, 0))
    one = x.unsqueeze(1), TIMES.unsqueeze(1), LABELS.unsqueeze(1)
    for call in (lambda: grad(params, x, TIMES, LABELS), lambda: each(params, *one)):
        with pytest.raises(NotImplementedError, match=r"got a tensor inside torch.func's grad"):
            call()
