"""No setting is read and ignored: each, alone, changes a run, or stands here with the reason.

Runs of three steps on weights that are away from their zero initialisation; what is compared are
weights, average, optimiser, metrics and the grid of samples, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import fingerprint, small

from fpdm.config import Config, from_dict
from fpdm.settings import flat
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


def run(out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of the run with ``changes``."""
    if changes.get("model.kind") == "dit":
        dit = {"model.depth": 1, "model.pre_depth": 0, "model.post_depth": 0, "sample.iters": None}
        changes = {**dit, **changes}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in {**TINY, **changes}.items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    config = small(out, steps=3, batch=4, log_every=1, save_every=0, label_dropout=0.3)
    config = from_dict(nested, config)
    Trainer(config).run()
    return fingerprint(config)


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
    """The same run twice, and with settings of what is not asked for, is the same bits."""
    base = run(tmp_path / "a", {})
    assert run(tmp_path / "b", {}) == base
    for name in ("sample.reuse_rho", "fixed_point.phantom_damping", "diffusion.min_snr_gamma"):
        assert run(tmp_path / name, {name: MATTERS[name][0]}) == base
