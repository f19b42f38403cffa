from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from fpdm import config as c
from fpdm import settings
from fpdm.config import Config, ConfigError, diff, from_dict, to_dict, to_yaml
from fpdm.recipes import MODEL_PRESETS, RECIPES, load_config

SECTIONS = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)[1:]}


def refused(*argv: str, recipe: str = "digits") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, argv)
    message = str(caught.value)
    assert "\n" not in message
    assert not set("╭│╰") & set(message)
    return message


def parameters(m: c.ModelConfig) -> int:
    """As published, without the fixed positions."""
    D, p = m.hidden_size, m.patch_size
    block = 18 * D * D + 15 * D
    embed = p * p * m.in_channels * D + D + 256 * D + D + D * D + D + (m.num_classes + 1) * D
    final = 2 * D * D + 2 * D + (D + 1) * p * p * m.out_channels
    loop = (D * D + D) + (4 * D * D + 2 * D) + (2 * D * D + D) if m.kind == "fpdm" else 0
    blocks = m.depth or m.pre_depth + 1 + m.post_depth
    return embed + blocks * block + loop + final


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config == RECIPES[name]
    assert config.recipe == name
    assert from_dict(to_dict(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config
    assert diff(config, load_config(str(path))) == []


def test_the_recipes_say_what_the_paper_says() -> None:
    i, u = RECIPES["imagenet256"], RECIPES["unconditional256"]
    assert i.model == MODEL_PRESETS["fpdm-xl-2"]
    assert (i.train.batch, i.optim.lr, i.optim.weight_decay, i.optim.ema_decay) == (
        512, 1e-4, 0.0, 0.9999,
    )  # fmt: skip
    assert (i.train.steps, u.train.steps) == (400_000, 100_000)
    assert i.sample.iters is not None
    assert i.sample.steps * (i.sample.iters + 2) == 560
    assert (u.model.num_classes, u.train.label_dropout, u.sample.guidance) == (1, 0.0, 1.0)


def test_presets_have_the_counted_sizes() -> None:
    names = {
        f"{k}-{s}-{p}" for k in ("fpdm", "dit") for s in ("s", "b", "l", "xl") for p in (2, 4, 8)
    }
    assert set(MODEL_PRESETS) == names | {"dit-xl-2-3layer"}
    counted = {
        "fpdm-xl-2": 86.50, "dit-xl-2": 674.83, "dit-b-2": 130.3, "dit-xl-2-3layer": 77.2,
    }  # fmt: skip
    for name, millions in counted.items():
        assert round(parameters(MODEL_PRESETS[name]) / 1e6, 1) == round(millions, 1)
    # control: another depth would be seen
    other = dataclasses.replace(MODEL_PRESETS["dit-b-2"], depth=11)
    assert round(parameters(other) / 1e6, 1) != 130.3


def test_a_preset_is_applied_before_the_options_and_keeps_the_input() -> None:
    config = load_config("digits", ["--model.depth=3", "--preset", "dit-b-4"])
    m = config.model
    assert (m.kind, m.patch_size, m.hidden_size, m.depth) == ("dit", 4, 768, 3)
    assert (m.input_size, m.in_channels, m.num_classes) == (8, 1, 10)
    flag = ["--model.pre_post_timestep_conditioning", "true"]
    with pytest.raises(ConfigError, match="got True, expected false for kind = dit"):
        load_config("digits", ["--preset", "dit-b-4", *flag])
    looped = load_config("digits", ["--preset=fpdm-s-2"])
    assert looped.model.hidden_size == 384
    # a DiT has no iterations for the sampler to count
    assert (config.sample.iters, looped.sample.iters) == (None, RECIPES["digits"].sample.iters)
    assert "did you mean fpdm-xl-2?" in refused("--preset", "fpdm-xxl-2")
    assert "no value" in refused("--preset")


def test_options_of_every_type() -> None:
    argv = ["--train.batch", "96", "--optim.lr=3e-4", "--optim.clip_norm", "1", "--train.name", "x",
            "--train.tensorboard", "true", "--sample.iters", "none", "--sample.allocation",
            "explicit", "--sample.steps", "3", "--sample.schedule", "5", "4", "3",
            "--train.log-every", "7"]  # fmt: skip
    config = load_config("digits", argv)
    assert config.train.batch == 96
    assert (config.optim.lr, config.optim.clip_norm) == (3e-4, 1.0)
    assert (config.train.name, config.train.tensorboard, config.train.log_every) == ("x", True, 7)
    assert (config.sample.iters, config.sample.schedule) == (None, (5, 4, 3))
    # control: nothing else moved
    changed = {line.split(":")[0] for line in diff(RECIPES["digits"], config)}
    assert changed == {
        "train.batch", "optim.lr", "optim.clip_norm", "train.name", "train.tensorboard",
        "sample.iters", "sample.allocation", "sample.steps", "sample.schedule", "train.log_every",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "meant"),
    [
        ("--train.bath", "--train.batch"),
        ("--train.lr", "--optim.lr"),
        ("--optin.lr", "--optim.lr"),
        ("--steps", "--train.steps or --sample.steps"),
        ("--fixedpoint.n_max", "--fixed_point.n_max"),
        ("--pre-set", "--preset"),
    ],
)
def test_an_unknown_option_names_the_nearest(token: str, meant: str) -> None:
    for argv in ((token, "3"), (f"{token}=3",)):
        message = refused(*argv)
        assert message.startswith(f"unknown option {token}; did you mean")
        assert message.endswith(f"did you mean {meant}?")


def test_what_resembles_nothing_is_refused_without_advice() -> None:
    assert refused("--zzz", "3") == "unknown option --zzz"
    assert refused("--recipe", "digits").startswith("unknown option --recipe")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("digit", "unknown recipe digit; did you mean digits?"),
        ("imagenet", "did you mean imagenet256?"),
        ("", "got nothing in place of RECIPE; expected digits, imagenet256, unconditional256 or"),
        ("", "or the path of a .yaml file: python -m fpdm.train digits"),
        ("--train.steps", "got --train.steps in place of RECIPE; expected digits"),
        ("nowhere/x.yaml", "expected a file"),
    ],
)
def test_an_unknown_recipe(recipe: str, words: str) -> None:
    assert words in refused(recipe=recipe)


BAD = [
    ("--train.batch 0", "train.batch: got 0, expected at least 1"),
    ("--train.batch x", "train.batch: got 'x', expected an integer"),
    ("--train.batch 1.5", "got '1.5', expected an integer"),
    ("--train.batch", "train.batch: got no value, expected an integer"),
    ("--train.batch 3 4", "train.batch: got 3 4, expected an integer"),
    ("stray", "got 'stray'"),
    ("--train.batch 10 --train.accumulate 3", "a multiple of train.accumulate = 3"),
    ("--train.steps 0", "train.steps"),
    ("--train.log_every 0", "train.log_every"),
    ("--train.keep 0", "train.keep"),
    ("--train.save_every -1", "train.save_every"),
    ("--train.label_dropout 1", "train.label_dropout: got 1.0"),
    ("--train.precision fp8", "got 'fp8', expected one of fp32, bf16, fp16"),
    ("--train.seed -1", "train.seed"),
    ("--train.scale_floor 0", "train.scale_floor"),
    ("--train.tensorboard 2", "train.tensorboard: got 2, expected true or false"),
    ("--optim.lr nan", "optim.lr: got 'nan', expected a finite number"),
    ("--optim.lr inf", "optim.lr: got 'inf'"),
    ("--optim.lr -1", "optim.lr"),
    ("--optim.beta2 1", "optim.beta2"),
    ("--optim.ema_decay 1.01", "optim.ema_decay"),
    ("--optim.clip_norm 0", "optim.clip_norm"),
    ("--optim.clip_norm abc", "got 'abc', expected a finite number or none"),
    ("--sample.schedule 1 x", "expected a list of integers"),
    ("--optim.eps 0", "optim.eps"),
    ("--model.patch_size 3", "a multiple of model.patch_size = 3"),
    ("--model.num_heads 5", "a multiple of model.num_heads = 5"),
    ("--model.kind dit", "model.depth, pre_depth, post_depth"),
    ("--model.in_channels 3", "for data.kind=digits"),
    ("--model.num_classes 11", "for data.kind=digits"),
    ("--fixed_point.n_min 4", "0 <= n_min <= n_max"),
    ("--fixed_point.m_min 0", "1 <= m_min <= m_max"),
    ("--diffusion.beta_end 1", "beta_start, beta_end"),
    ("--diffusion.prediction eps", "expected v or x0 with zero_terminal_snr=true"),
    ("--sample.spacing leading", "leading omits the terminal step"),
    ("--sample.steps 0", "sample.steps"),
    ("--sample.steps 1001", "diffusion.timesteps = 1000"),
    ("--sample.guidance nan", "sample.guidance"),
    ("--sample.guidance 2 --train.label_dropout 0", "the null label is never trained"),
    ("--sample.guidance_channels 0", "sample.guidance_channels"),
    ("--sample.eta -0.1", "sample.eta"),
    ("--sample.batch 0", "sample.batch"),
    ("--sample.iters 0", "sample.iters"),
    ("--data.kind images", "data.image_size: got 32, expected model.input_size = 8"),
    ("--data.kind video", "expected one of digits, images, latents"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[argv for argv, _ in BAD])
def test_a_bad_value_is_one_line(argv: str, words: str) -> None:
    assert words in refused(*argv.split())


@pytest.mark.parametrize(
    "argv",
    [
        "--train.batch 12 --train.accumulate 3",
        "--diffusion.prediction eps --diffusion.zero_terminal_snr false --sample.spacing leading",
        "--train.precision fp16 --train.device cpu",
        "--train.save_every 0 --train.grid_every 0",
        "--train.seed 18446744073709551615",
        "--sample.guidance -1",
    ],
)
def test_what_only_looks_bad_is_taken(argv: str) -> None:
    load_config("digits", argv.split())


def test_python_values_are_checked_like_text() -> None:
    import numpy as np

    assert c.SamplerConfig(steps=np.int64(5), guidance=2).guidance == 2.0  # type: ignore[arg-type]
    assert type(c.SamplerConfig(steps=np.int64(5)).steps) is int  # type: ignore[arg-type]
    assert c.SamplerConfig(schedule=[3, 2]).schedule == (3, 2)  # type: ignore[arg-type]
    mistakes = [
        {"batch": True}, {"batch": 2.0}, {"batch": "2"}, {"eta": math.inf}, {"eta": 10**400},
        {"dtype": "f4"}, {"schedule": [1.5]}, {"invariant": 1}, {"method": None},
    ]  # fmt: skip
    for bad in mistakes:
        with pytest.raises(ConfigError, match=r"^sample\.\w+: got "):
            c.SamplerConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean float16"):
        c.SamplerConfig(dtype="float15")  # type: ignore[arg-type]


def test_a_partial_yaml_names_its_base_and_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: digits\npreset: fpdm-b-2\ntrain:\n  batch: 32\noptim: {lr: 1e-4, lr_final: none}\n"
        "sample:\n  schedule: [1, 2]\ndata:\n"
    )
    config = load_config(str(path), ["--train.batch", "16"])
    assert (config.recipe, config.model.hidden_size, config.train.batch) == ("digits", 768, 16)
    assert (config.optim.lr, config.sample.schedule) == (1e-4, (1, 2))
    assert config.fixed_point == RECIPES["digits"].fixed_point


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: digits\ntrain: {bath: 3}", "unknown key train.bath; did you mean train.batch?"),
        ("trian: {batch: 3}", "unknown key trian"),
        ("train: {lr: 3}", "did you mean optim.lr?"),
        ("recipe: digitz", "unknown recipe digitz; did you mean digits?"),
        ("preset: fpdm-b-3", "unknown preset fpdm-b-3"),
        ("train: 3", "train: got 3, expected a section"),
        ("train: {batch: many}", "train.batch: got 'many', expected an integer"),
        ("train: {precision: fp17}", "did you mean fp16?"),
        ("optim: {lr: .nan}", "optim.lr: got nan"),
        ("train: {batch: 3}\ntrain: {steps: 4}", "key train given again in line 2"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "got no YAML"),
        ("a: !!python/object/apply:os.system [exit]", "got no YAML"),
    ],
)
def test_a_bad_yaml_is_one_line_that_names_the_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refused(recipe=str(path))
    assert words in message
    assert "bad.yaml" in message


def test_diff_names_what_a_resumed_run_may_not_change() -> None:
    old = load_config("digits", ["--optim.lr_final", "none", "--optim.lr", "0.001"])
    free = ["--train.steps", "9", "--train.keep", "9", "--sample.iters", "9", "--train.out", "x"]
    free += ["--train.graphs", "off", "--optim.lr_final", "none", "--optim.lr", "0.001"]
    assert diff(old, load_config("digits", free), c.RESUME_FREE) == []
    new = load_config("digits", [*free[:-1], "0.5", "--train.seed", "3"])
    assert diff(old, new, c.RESUME_FREE) == ["optim.lr: 0.001 -> 0.5", "train.seed: 0 -> 3"]
    assert len(diff(old, new)) == 7
    # the learning rate depends on the number of steps once it decays
    decays = load_config("digits", ["--optim.lr_final", "0"])
    longer = load_config("digits", ["--optim.lr_final", "0", "--train.steps", "9"])
    assert diff(decays, longer, c.RESUME_FREE) == [
        f"train.steps: {RECIPES['digits'].train.steps} -> 9"
    ]
    assert diff(to_dict(old), new, c.RESUME_FREE) == diff(old, new, c.RESUME_FREE)
    # a run from before there was such a setting
    older = to_dict(old)
    del older["train"]["graphs"]
    assert diff(older, old, c.RESUME_FREE) == []


def test_what_is_idle_before_and_after_may_change() -> None:
    old = to_dict(load_config("digits"))
    old["diffusion"]["min_snr_gamma"] = 1.0
    old["train"]["scale_init"] = 8.0
    assert diff(old, load_config("digits"), c.RESUME_FREE) == []
    assert len(diff(old, load_config("digits"))) == 2
    # control: where it is used on either side it may not
    used = load_config("digits", ["--diffusion.loss_weight", "min_snr"])
    assert "diffusion.min_snr_gamma: 1.0 -> 5.0" in diff(old, used, c.RESUME_FREE)


def test_a_setting_of_a_mode_that_is_off_is_refused() -> None:
    told = refused("--sample.reuse-gamma", "0.5")
    assert told == "sample.reuse_gamma: got 0.5 with sample.reuse none, expected sample.reuse blend"
    told = refused("--sample.guidance", "1", "--sample.guidance_low=0.1")
    assert told.endswith("0.1 with sample.guidance 1, expected sample.guidance other than 1")
    assert "with sample.solver picard, expected sample.solver anderson or broyden" in refused(
        "--sample.window", "5"
    )
    half = refused("--execution.residual_dtype", "float32")
    assert "with train.precision fp32 and sample.dtype float32, expected train.prec" in half
    assert "with model.kind dit, expected model.kind fpdm" in refused(
        "--preset", "dit-b-4", "--fixed_point.n_max", "3"
    )
    # the mode on, in either order; none; a recipe's own value of a mode that is switched off
    argv = ["--sample.reuse_gamma", "0.3", "--sample.reuse", "blend"]
    assert load_config("digits", argv).sample.reuse_gamma == 0.3
    load_config("digits", ["--sample.reuse_gamma_end", "none", "--sample.guidance_channels=none"])
    load_config("digits", ["--preset", "dit-b-4"])
    for dtype in (["--train.precision", "bf16"], ["--sample.dtype", "bfloat16"]):
        load_config("digits", ["--execution.residual_dtype", "float32", *dtype])


def test_settings_of_other_data_are_refused() -> None:
    for recipe, argv, kinds in (
        ("digits", ("--data.path", "x"), "images or latents"),
        ("digits", ("--data.latent_scale", "1"), "latents"),
        ("digits", ("--data.image_size", "8"), "images"),
        ("imagenet256", ("--data.image_size", "8"), "images"),
        ("imagenet256", ("--data.split", "all"), "digits"),
    ):
        told = refused(*argv, recipe=recipe)
        assert told.startswith(f"{argv[0][2:]}: got {argv[1]}")
        assert told.endswith(f", expected data.kind {kinds}")


def test_modes_name_settings_and_values_that_exist() -> None:
    """One that is misspelt would decide nothing."""
    known = {
        f"{name}.{key}": hint
        for name, section in SECTIONS.items()
        for key, hint in settings.hints(type(section)).items()
    }
    modes = [
        (name, mode)
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        for mode in (*section.modes, *field.metadata.get("needs", ()))
    ]
    assert len(modes) > 25
    for section, mode in modes:
        for condition in mode.split(" or "):
            name, _, values = re.split("(!?=)", condition)
            hint = known[name if "." in name else f"{section}.{name}"]
            for value in values.split("|"):
                settings.coerce(name, hint, int(value) if value.isdigit() else value)


def test_a_yaml_gives_what_the_command_line_may_switch_on_or_off(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: digits\nsample: {reuse_gamma: 0.3}\n")
    assert refused(recipe=str(path)) == (
        f"{path}: sample.reuse_gamma: got 0.3 with sample.reuse none, expected sample.reuse blend"
    )
    assert load_config(str(path), ["--sample.reuse", "blend"]).sample.reuse_gamma == 0.3
    path.write_text("recipe: digits\nsample: {reuse: blend, reuse_gamma: 0.3}\n")
    config = load_config(str(path), ["--sample.reuse", "none"])
    # what a run stores says everything, also what it ignores
    stored = tmp_path / "stored.yaml"
    stored.write_text(to_yaml(config))
    assert load_config(str(stored)) == config
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    older = to_dict(config)
    del older["train"]["graphs"]
    settings_file = run / "config.yaml"
    settings_file.write_text(settings.write_yaml(older))
    assert load_config(str(settings_file)) == config
    (run / "checkpoints").rmdir()
    # a copy of it elsewhere: what it says as the recipe does, in whatever mode, asks for nothing
    assert "sample.reuse_gamma: got 0.3 with" in refused(recipe=str(settings_file))
    older["sample"]["reuse_gamma"] = 0.5
    older["data"]["latent_scale"] = 0.2
    settings_file.write_text(settings.write_yaml(older))
    assert "data.latent_scale: got 0.2 with" in refused(recipe=str(settings_file))
    # what every older file says
    older["data"]["latent_scale"] = 0.18215
    settings_file.write_text(settings.write_yaml(older))
    assert load_config(str(settings_file)).sample.reuse_gamma == 0.5


def test_an_option_mends_what_a_yaml_leaves_at_odds(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: digits\ntrain: {label_dropout: 0}\n")
    told = refused(recipe=str(path))
    assert told.startswith(f"{path}: sample.guidance: got 1.1, expected 1 with train.label_dropout")
    assert refused("--train.keep", "4", recipe=str(path)) == told.removeprefix(f"{path}: ")
    config = load_config(str(path), ["--sample.guidance", "1"])
    assert type(config) is Config
    assert (config.train.label_dropout, config.sample.guidance) == (0.0, 1.0)
    path.write_text("recipe: digits\ndata: {kind: images, path: x}\nmodel: {in_channels: 3}\n")
    assert load_config(str(path), ["--model.input_size", "32"]).model.input_size == 32
    path.write_text("recipe: digits\nmodel: {input_size: 16}\n")
    argv = ["--data.kind", "images", "--data.image_size", "16", "--preset", "fpdm-s-2"]
    assert load_config(str(path), argv).model.hidden_size == 384


def test_resume_free_names_exist_and_have_reasons() -> None:
    known = {*settings.flat(Config()), *SECTIONS}
    assert set(c.RESUME_FREE) <= known
    assert all(c.RESUME_FREE.values())


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_valid_value_round_trips(data: st.DataObject) -> None:
    section, default = data.draw(st.sampled_from(sorted(SECTIONS.items())))
    name, hint = data.draw(st.sampled_from(sorted(settings.hints(type(default)).items())))
    value = data.draw(
        st.one_of(st.integers(-3, 2000), st.floats(), st.booleans(), st.text(), st.none())
    )
    tried: dict[str, Any] = {section: {name: value}}
    try:
        config = from_dict(tried)
    except ConfigError:
        return
    import yaml

    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert getattr(getattr(config, section), name) == value or value == "none"
    assert hint is not bool or isinstance(value, bool)


def test_help_lists_every_option_with_the_recipes_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        load_config("digits", ["--help"])
    assert not left.value.code
    text = capsys.readouterr().out
    shown = set(re.findall(r"--(\w+\.\w+)", text))
    assert shown == set(settings.flat(Config())) - {"recipe"}
    assert "--preset" in text
    assert f"(default: {RECIPES['digits'].train.steps})" in text


def test_the_first_screen_of_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest command, the recipes and where the outputs go, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for recipe in ("digits", "--help"):
        with pytest.raises(SystemExit):
            load_config(recipe, ["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        first = lines[:24]
        assert any(line.split()[:4] == ["python", "-m", "fpdm.train", "digits"] for line in first)
        named = {line.split()[0] for line in first if line.startswith("    ")}
        assert set(RECIPES) <= named
        assert any("runs/NAME" in line for line in first)
        assert any(line.startswith("--preset") for line in first)


def test_every_section_has_defaults_and_is_named_as_its_field() -> None:
    for section in SECTIONS.values():
        type(section)()  # every field has a default
    assert {s.section for s in SECTIONS.values()} == set(SECTIONS)
