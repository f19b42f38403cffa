"""No setting is read and ignored: each, alone, changes a run, or stands here with the reason.

Runs of three steps on weights that are away from their zero initialisation; what is compared are
weights, average, optimiser, metrics and the grid of samples, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import fingerprint, small

from fpdm.config import RESUME_FREE, Config, ConfigError, SamplerConfig, from_dict
from fpdm.settings import flat, idle, used
from fpdm.train import Trainer

TINY = {
    "model.hidden_size": 16, "sample.steps": 4, "sample.iters": 4, "sample.guidance": 1.5,
}  # fmt: skip
# setting: (another value, settings under which it matters)
MATTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.kind": ("dit", {}),
    "model.depth": (2, {"model.kind": "dit"}),
    "model.patch_size": (4, {}),
    "model.hidden_size": (24, {}),
    "model.num_heads": (1, {}),
    "model.pre_depth": (0, {}),
    "model.post_depth": (2, {}),
    "model.pre_post_timestep_conditioning": (True, {}),
    "execution.impl": ("reference", {}),
    "execution.chunks": (2, {}),
    "execution.residual_dtype": ("float32", {"train.precision": "bf16"}),
    "fixed_point.n_min": (1, {}),
    "fixed_point.n_max": (1, {}),
    "fixed_point.m_min": (2, {}),
    "fixed_point.m_max": (1, {}),
    "fixed_point.detach_init": (False, {"fixed_point.n_max": 0}),
    "fixed_point.gradient": ("phantom", {}),
    "fixed_point.implicit_iters": (2, {"fixed_point.gradient": "implicit"}),
    "fixed_point.phantom_damping": (0.9, {"fixed_point.gradient": "phantom"}),
    "diffusion.timesteps": (500, {}),
    "diffusion.beta_start": (0.001, {}),
    "diffusion.beta_end": (0.03, {}),
    "diffusion.zero_terminal_snr": (False, {}),
    "diffusion.prediction": ("x0", {}),
    "diffusion.loss_weight": ("p2", {}),
    "diffusion.min_snr_gamma": (0.1, {"diffusion.loss_weight": "min_snr"}),
    "diffusion.vb_weight": (0.5, {}),
    "data.split": ("reference", {}),
    "optim.impl": ("single", {}),
    "optim.lr": (2e-3, {}),
    "optim.lr_final": (1e-4, {}),
    "optim.warmup_steps": (3, {}),
    "optim.beta1": (0.5, {}),
    "optim.beta2": (0.5, {}),
    "optim.eps": (1e-3, {}),
    "optim.weight_decay": (0.1, {}),
    "optim.clip_norm": (0.1, {}),
    "optim.ema_decay": (0.5, {}),
    "optim.ema_warmup": (True, {}),
    "train.batch": (6, {}),
    "train.accumulate": (2, {}),
    "train.precision": ("bf16", {}),
    "train.seed": (5, {}),
    "train.label_dropout": (0.9, {}),
    "train.log_every": (2, {}),
    "train.grid_per_class": (2, {}),
    "train.scale_init": (8.0, {"train.precision": "fp16"}),
    "train.scale_growth_interval": (1, {"train.precision": "fp16"}),
    "sample.method": ("ddpm", {}),
    "sample.steps": (3, {}),
    "sample.iters": (5, {}),
    "sample.budget": (30, {"sample.iters": None, "sample.budget": 20}),
    "sample.budget_macs": (9e6, {"sample.iters": None, "sample.budget_macs": 6e6}),
    "sample.schedule": (
        [1, 2, 3, 1],
        {
            "sample.iters": None, "sample.allocation": "explicit", "sample.schedule": [2, 2, 2, 1],
        },
    ),
    "sample.spacing": ("linspace", {}),
    "sample.allocation": ("increasing", {}),
    "sample.tol": (0.9, {}),
    "sample.solver": ("anderson", {}),
    "sample.damping": (0.5, {}),
    "sample.window": (1, {"sample.solver": "anderson", "sample.iters": 6}),
    "sample.max_iters": (4, {"sample.allocation": "adaptive", "sample.tol": 0.05}),
    "sample.reuse": ("full", {}),
    "sample.reuse_gamma": (0.1, {"sample.reuse": "blend"}),
    "sample.reuse_gamma_end": (0.1, {"sample.reuse": "blend"}),
    "sample.reuse_rho": (0.1, {"sample.reuse": "extrapolate"}),
    "sample.guidance": (3.0, {}),
    "sample.guidance_low": (0.5, {}),
    "sample.guidance_high": (0.5, {}),
    "sample.guidance_rescale": (0.7, {}),
    "sample.eta": (0.5, {}),
    "sample.dtype": ("bfloat16", {}),
}  # fmt: skip
# settings whose one effect is elsewhere; the other tests are those that show it
ELSEWHERE = {
    "recipe": "a label",
    "model.input_size": "the digits' (tests/test_images.py)",
    "model.in_channels": "the digits' (tests/test_engine.py)",
    "model.num_classes": "the digits' (tests/test_engine.py)",
    "execution.recompute": "memory alone (tests/test_fixed_point_memory.py)",
    "fixed_point.draws": "with several ranks (tests/test_train.py)",
    "data.kind": "other data (tests/test_data.py)",
    "data.path": "other data (tests/test_data.py)",
    "data.image_size": "images (tests/test_images.py)",
    "data.flip": "refused for digits (tests/test_data.py)",
    "data.latent_scale": "latents (tests/test_shards.py)",
    "train.out": "where the run lives",
    "train.name": "where the run lives",
    "train.init": "other weights (tests/test_start.py)",
    "train.steps": "the length",
    "train.device": "the other device (tests/test_gpu.py)",
    "train.save_every": "files (tests/test_train.py)",
    "train.keep": "files (tests/test_train.py)",
    "train.grid_every": "files (tests/test_train.py)",
    "train.max_nonfinite": "when to give up (tests/test_train.py)",
    "train.scale_floor": "after many overflows (tests/test_train.py)",
    "train.resume": "files (tests/test_train.py)",
    "train.graphs": "launches (tests/test_graphs.py)",
    "train.tensorboard": "files (tests/test_train.py)",
    "train.ddp_timeout_s": "when to give up (tests/test_train_faults.py)",
    "sample.guidance_channels": "one channel here (tests/test_steps.py)",
    "sample.batch": "rounding below a grey level (tests/test_run.py)",
    "sample.invariant": "rounding below a grey level (tests/test_run.py)",
    "sample.graphs": "launches (tests/test_graphs.py)",
}


def test_every_setting_stands_here() -> None:
    assert sorted([*MATTERS, *ELSEWHERE]) == sorted(flat(Config()))


# settings with modes (``settings.needs``): under which others they are ignored, and so refused
IGNORED: dict[str, list[dict[str, Any]]] = {
    "execution.residual_dtype": [{}],
    **{
        f"fixed_point.{name}": [{"model.kind": "dit"}]
        for name in ("n_min", "n_max", "m_min", "m_max", "draws", "gradient")
    },
    "fixed_point.detach_init": [
        {"fixed_point.gradient": "implicit"}, {"fixed_point.n_min": 1}, {"model.kind": "dit"},
    ],
    "fixed_point.implicit_iters": [{}, {"fixed_point.gradient": "phantom"}],
    "fixed_point.phantom_damping": [{}, {"fixed_point.gradient": "implicit"}],
    "diffusion.min_snr_gamma": [{}],
    "train.scale_init": [{}, {"train.precision": "bf16"}],
    "train.scale_growth_interval": [{}, {"train.precision": "bf16"}],
    "train.scale_floor": [{}, {"train.precision": "bf16"}],
    "sample.window": [{}],
    "sample.reuse_gamma": [{"sample.reuse": name} for name in ("none", "full", "extrapolate")],
    "sample.reuse_gamma_end": [{"sample.reuse": name} for name in ("none", "full", "extrapolate")],
    "sample.reuse_rho": [{"sample.reuse": name} for name in ("none", "full", "blend")],
    "sample.guidance_channels": [{"sample.guidance": 1.0}],
    "sample.guidance_low": [{"sample.guidance": 1.0}],
    "sample.guidance_high": [{"sample.guidance": 1.0}],
    "sample.guidance_rescale": [{"sample.guidance": 1.0}],
}  # fmt: skip
OTHER_VALUES = {
    "fixed_point.draws": "per_rank", "train.scale_floor": 2.0, "sample.guidance_channels": 1,
}  # fmt: skip
# other data than the digits; their loaders have tests of their own
OF_DATA = ["data.path", "data.split", "data.image_size", "data.latent_scale"]
# matter in some mode, without which they are refused whoever gives them
BY_CHECK = [
    "model.depth", "sample.budget", "sample.budget_macs", "sample.schedule", "sample.max_iters",
]  # fmt: skip


def moded() -> list[str]:
    """Every setting that says which modes it needs."""
    sections = [getattr(Config(), name) for name in vars(Config()) if name != "recipe"]
    return [
        f"{section.section}.{field.name}"
        for section in sections
        for field in dataclasses.fields(section)
        if section.modes or field.metadata.get("needs")
    ]


def test_every_mode_stands_here() -> None:
    """A setting that matters in one mode only declares it; one that declares it is tried."""
    assert sorted(moded()) == sorted([*IGNORED, *OF_DATA])
    contextual = [name for name, (_, context) in MATTERS.items() if context]
    assert sorted(set(contextual) - set(BY_CHECK)) == sorted(set(contextual) & set(moded()))
    for name in contextual:
        assert name not in idle(Config, flat(configured(Path(), MATTERS[name][1])))


@pytest.mark.parametrize("name", IGNORED)
def test_an_ignored_setting_is_refused(name: str) -> None:
    for context in IGNORED[name]:
        config = configured(Path(), {**context, name: other(name)})
        with pytest.raises(ConfigError, match=rf"^{name}: got \S+ with \S+ \S+.*, expected \S+ ."):
            used(config, [name])
        # the mode's own setting is not
        used(config, list(context))


def test_a_setting_of_another_run_beside_it_is_not_refused() -> None:
    """``--gamma`` is of the blend that a sampler is compared with."""
    config = SamplerConfig(reuse_gamma=0.3)
    assert used(config, ["reuse_gamma"], replace(config, reuse="blend")) is config
    with pytest.raises(ConfigError, match=r"reuse_gamma: got 0\.3 with sample\.reuse none, expec"):
        used(config, ["reuse_gamma"], replace(config, reuse="full"))


def other(name: str) -> Any:
    return OTHER_VALUES.get(name) or MATTERS[name][0]


def configured(out: Path, changes: dict[str, Any]) -> Config:
    """A run of three steps with ``changes``."""
    if changes.get("model.kind") == "dit":
        dit = {"model.depth": 1, "model.pre_depth": 0, "model.post_depth": 0, "sample.iters": None}
        changes = {**dit, **changes}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in {**TINY, **changes}.items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    config = small(out, steps=3, batch=4, log_every=1, save_every=0, label_dropout=0.3)
    return from_dict(nested, config)


def run(out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of the run with ``changes``."""
    config = configured(out, changes)
    Trainer(config).run()
    return fingerprint(config)


# other values of settings whose one effect is elsewhere
RESUMED = {
    "execution.recompute": "full", "sample.batch": 2, "sample.invariant": True,
    "train.keep": 1, "train.save_every": 1, "train.grid_every": 1, "train.max_nonfinite": 3,
    "train.graphs": "auto", "train.ddp_timeout_s": 5, "train.steps": 6, "train.device": "auto",
    "fixed_point.draws": "per_rank", "train.scale_floor": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has done three of its five steps."""
    out = tmp_path_factory.mktemp("begun")
    Trainer(configured(out, {})).run()
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("away_from_zero")
@pytest.mark.parametrize("name", [*MATTERS, *RESUMED])
def test_a_run_that_is_resumed_with_it_changed(name: str, begun: Path, tmp_path: Path) -> None:
    """It goes on, or is refused in a line that names every change and the way out."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    value, context = (RESUMED[name], {}) if name in RESUMED else MATTERS[name]
    changes = {**context, name: value}
    if changes.get("train.steps") is None:
        changes["train.steps"] = 5
    config = configured(tmp_path, changes)
    # of fp16 alone; a run in float32 does not use it
    ignored = {"train.scale_floor"}
    refused = [n for n in (name, *context) if not {n, n.split(".")[0]} & {*RESUME_FREE, *ignored}]
    if not refused:
        assert Trainer(config).run() == config.train.steps
        return
    with pytest.raises(ConfigError, match=r"step_0000003 is of another run: ") as told:
        Trainer(config).run()
    assert all(f"{n}: " in str(told.value) for n in refused)
    ways = "expected the same settings, or another train.name"
    ways += "; a new run that begins with its weights: --train.name NEW --train.init "
    ways += str(tmp_path / "run")
    if any(n.startswith("model.") for n in refused):
        ways = ways.partition(";")[0]
    assert str(told.value).endswith(ways)


@pytest.mark.slow
@pytest.mark.usefixtures("away_from_zero")
@pytest.mark.parametrize("name", MATTERS)
def test_it_matters(name: str, tmp_path: Path) -> None:
    value, context = MATTERS[name]
    changed = run(tmp_path / "b", {**context, name: value})
    assert run(tmp_path / "a", context) != changed


@pytest.mark.slow
@pytest.mark.usefixtures("away_from_zero")
def test_one_that_does_not_would_be_seen(tmp_path: Path) -> None:
    """The same run twice is the same bits."""
    base = run(tmp_path / "a", {})
    assert run(tmp_path / "b", {}) == base


@pytest.mark.slow
@pytest.mark.usefixtures("away_from_zero")
@pytest.mark.parametrize("name", IGNORED)
def test_what_is_refused_does_not_matter(name: str, tmp_path: Path) -> None:
    for i, context in enumerate(IGNORED[name]):
        base = run(tmp_path / f"a{i}", context)
        assert run(tmp_path / f"b{i}", {**context, name: other(name)}) == base
