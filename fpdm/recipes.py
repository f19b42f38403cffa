"""Architecture presets and training recipes by name, and the Config that a command line asks for.

Presets are written for 32x32 latents of 4 channels and 1000 classes; ``--preset NAME``, and
``preset:`` in YAML, take input size, channels and classes from the recipe. Parameters as written,
without the fixed positions: fpdm-xl-2 86.5 M, dit-xl-2 674.8 M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fpdm import settings
from fpdm.cli import COST, parse_options, replace_cost, take_option
from fpdm.config import (
    FORMER_DEFAULTS,
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    FixedPointConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
    TrainConfig,
    from_dict,
)
from fpdm.settings import flat, idle

# name: (depth of the DiT, width D, heads H)
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def _dit(depth: int, **shape: int) -> ModelConfig:
    return ModelConfig(kind="dit", depth=depth, pre_depth=0, post_depth=0, **shape)  # type: ignore[arg-type]


def _presets() -> dict[str, ModelConfig]:
    shapes = {
        f"{size}-{patch}": (depth, {"patch_size": patch, "hidden_size": d, "num_heads": h})
        for size, (depth, d, h) in SIZES.items()
        for patch in (2, 4, 8)
    }
    return {
        **{f"fpdm-{n}": ModelConfig(**shape) for n, (_, shape) in shapes.items()},  # type: ignore[arg-type]
        **{f"dit-{n}": _dit(depth, **shape) for n, (depth, shape) in shapes.items()},
        # Tab. 3, "DiT-XL, 3 layers": the paper says 86 M parameters, counted 77.2 M. Its other
        # baseline, "DiT-B, 11 layers, 130 M", is dit-b-2: 12 layers are 130.3 M.
        "dit-xl-2-3layer": _dit(3, **shapes["xl-2"][1]),
    }


MODEL_PRESETS: Mapping[str, ModelConfig] = MappingProxyType(_presets())

# two minutes on two CPU cores: the built-in 8x8 digits. Chosen by measurement (bench/NOTES.md):
# half the batch and twice the steps, short loops, and betas that leave 8x8 images some signal at
# most timesteps (the rescaling to zero terminal SNR makes any end of the schedule valid)
_DIGITS = Config(
    recipe="digits",
    model=ModelConfig(input_size=8, in_channels=1, hidden_size=128, num_heads=4, num_classes=10),
    fixed_point=FixedPointConfig(n_max=2, m_max=2),
    diffusion=DiffusionConfig(beta_end=0.006),
    data=DataConfig(kind="digits"),
    optim=OptimConfig(lr=1.5e-3, lr_final=1e-5, ema_decay=0.998),
    train=TrainConfig(steps=3400, batch=64, log_every=50, save_every=850, grid_every=1700),
    sample=SamplerConfig(method="ddim", steps=20, iters=3, guidance=1.1, batch=128),
)

# the paper's ImageNet run on 256x256 latents. Where paper, published code and this recipe differ:
#   n_max      paper 12 (M = N = 12); code 10; Tab. 4 itself does best with 3 to 6
#   draws      code: per_rank, every rank its own (n, m); here one draw for all
#   loss       paper: unweighted v, which is v_mse; code: p2, no weight at the terminal step
#   precision  paper: V100, so fp16 or fp32; code: bf16
#   spacing    code: linspace, here trailing; under zero terminal SNR both begin at T - 1
#   guidance   the paper's tables use none, its pictures 4 on three of the four channels
#              (guidance_channels=3); here the grids use 4 on all four
#   steps      paper: as many as fit a time (4 days), about 400 k for DiT; no clipping, no warm-up
_IMAGENET = Config(
    recipe="imagenet256",
    model=MODEL_PRESETS["fpdm-xl-2"],
    fixed_point=FixedPointConfig(n_max=12, m_max=12),
    diffusion=DiffusionConfig(prediction="v", loss_weight="v_mse", zero_terminal_snr=True),
    data=DataConfig(kind="latents"),
    optim=OptimConfig(lr=1e-4, weight_decay=0.0, ema_decay=0.9999),
    train=TrainConfig(steps=400_000, batch=512, precision="bf16", label_dropout=0.1),
    # 56 (1 + 8 + 1) = 560 blocks, as in Fig. 1
    sample=SamplerConfig(method="ddim", steps=56, iters=8, reuse="full", guidance=4.0, batch=16),
)

# CelebA-HQ, FFHQ, LSUN Church: one class, no label dropout and so no guidance, one day of training
_UNCONDITIONAL = Config(
    recipe="unconditional256",
    model=ModelConfig(num_classes=1),
    fixed_point=_IMAGENET.fixed_point,
    diffusion=_IMAGENET.diffusion,
    data=DataConfig(kind="latents"),
    optim=_IMAGENET.optim,
    train=TrainConfig(steps=100_000, batch=512, precision="bf16", label_dropout=0.0),
    sample=SamplerConfig(method="ddim", steps=56, iters=8, reuse="full", batch=16),
)

RECIPES: Mapping[str, Config] = MappingProxyType(
    {config.recipe: config for config in (_DIGITS, _IMAGENET, _UNCONDITIONAL)}
)

# the help begins with it: 80 columns; tyro joins lines that are not indented
_ABOUT = """\
Trains a model, with no more than the name of a RECIPE:
    python -m fpdm.train digits                       minutes on two CPU cores
    python -m fpdm.train digits --train.name short --train.steps 500
    torchrun --nproc_per_node=8 -m fpdm.train imagenet256 --data.path latents/

RECIPE (with --help its values stand below) is a YAML file of settings or one of
    digits            8x8 digits, which are built in
    imagenet256       the paper's XL/2 on latents of 256x256 ImageNet
    unconditional256  the same on latents of one class: CelebA-HQ, FFHQ, LSUN

Everything goes into runs/NAME (--train.out, --train.name; NAME: the recipe's):
    metrics.jsonl, checkpoints/, samples/, at the end curves.png and export/
    the same command continues a run that was stopped; Ctrl-C saves first

"""


def with_preset(config: Config, preset: str) -> Config:
    """``config`` with the architecture of ``preset``; its input, channels and classes stay. A DiT
    has no iterations, so their number leaves the sampler."""
    if preset not in MODEL_PRESETS:
        near = settings.suggest(preset, MODEL_PRESETS)
        raise ConfigError(
            f"unknown preset {preset}{near or '; known: ' + ', '.join(MODEL_PRESETS)}"
        )
    model = MODEL_PRESETS[preset]
    kept = ["input_size", "in_channels", "num_classes"]
    if model.kind == "fpdm":
        kept.append("pre_post_timestep_conditioning")
    model = dataclasses.replace(model, **{name: getattr(config.model, name) for name in kept})
    sample = config.sample
    if model.kind == "dit":
        sample = dataclasses.replace(sample, iters=None, reuse="none", tol=0.0)
    return dataclasses.replace(config, model=model, sample=sample)


class _Draft(Config):
    """A Config to which options are still to come: its sections need not agree yet."""

    def __post_init__(self) -> None:
        """Nothing; see ``_agreed``."""


def _agreed(config: Config, kind: type[Config] = Config) -> Config:
    """The same settings as a ``kind``. Raises ConfigError where a Config's sections disagree."""
    return kind(**{name: getattr(config, name) for name in settings.hints(Config)})


def _read(recipe: str) -> tuple[Config, list[str]]:
    """A named recipe, or a YAML file, whose ``recipe:`` names its base and ``preset:`` its
    architecture; and the settings that the file changes although their mode is off."""
    if recipe in RECIPES:
        return _agreed(RECIPES[recipe], _Draft), []
    if not recipe.endswith((".yaml", ".yml")):
        near = settings.suggest(recipe, RECIPES)
        known = f"; expected {', '.join(RECIPES)} or the path of a .yaml file"
        if not recipe or recipe.startswith("-"):
            told = f"got {recipe or 'nothing'} in place of RECIPE"
            raise ConfigError(f"{told}{known}: python -m fpdm.train digits")
        raise ConfigError(f"unknown recipe {recipe}{near or known}")
    path = Path(recipe)
    if not path.is_file():
        raise ConfigError(f"recipe: got {path}, expected a file")
    data = settings.read_yaml(path)
    base, preset = str(data.get("recipe") or ""), data.pop("preset", None)
    if isinstance(sample := data.get("sample"), dict) and sample.keys() & set(COST):
        data["sample"] = dict.fromkeys(COST) | sample
    if base and base not in RECIPES:
        raise ConfigError(f"{path}: unknown recipe {base}{settings.suggest(base, RECIPES)}")
    config = _agreed(RECIPES[base] if base else Config(), _Draft)
    try:
        if preset is not None:
            config = with_preset(config, str(preset))
        before = flat(config)
        config = from_dict(data | {"recipe": base}, config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    given, values = flat(data), flat(config)
    # a run's own file holds every setting; older ones lack those that are new since
    if not values.keys() - given.keys() or (path.parent / "checkpoints").is_dir():
        return config, []
    # a setting that the file gives the value which it had anyway is no mistake
    ignored = [name for name in idle(Config, values) if name in given]
    usual = {name: (before[name], FORMER_DEFAULTS.get(name, before[name])) for name in ignored}
    return config, [name for name in ignored if values[name] not in usual[name]]


def load_config(recipe: str, argv: Sequence[str] = ()) -> Config:
    """The Config of ``fpdm.train RECIPE [--preset NAME] [--section.key value]...``.

    RECIPE is a name in ``RECIPES`` or the path of a YAML file (whole or partial); the
    preset is applied next, then the options in their order. Raises ConfigError: unknown recipe,
    key or option (naming the nearest), bad value, and a setting given in the file or as an option
    that would be ignored (``settings.used``). ``--help`` prints the options with the recipe's
    values and exits.
    """
    if recipe in ("-h", "--help"):
        recipe, argv = "digits", ["--help"]
    config, ignored = _read(recipe)
    preset, rest = take_option("--preset", list(argv))
    if preset is not None:
        config = with_preset(config, preset)
    presets = "fpdm-{s,b,l,xl}-{2,4,8}, dit-{s,b,l,xl}-{2,4,8}, dit-xl-2-3layer"
    extra = {"--preset": f"NAME: architecture, before all other options: {presets}"}
    config = parse_options(
        config, replace_cost(rest), "python -m fpdm.train RECIPE", extra, ("recipe",), _ABOUT
    )
    try:
        config = _agreed(config)
    except ConfigError as error:
        # at odds with itself is a file only where nothing else was said
        raise ConfigError(f"{'' if argv else f'{recipe}: '}{error}") from error
    try:
        return settings.used(config, ignored)
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from error
