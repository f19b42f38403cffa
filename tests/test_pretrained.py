"""A run directory or an export as a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from test_sample import DIT, MODEL, SETTINGS, complain, npz

from fpdm import checkpoint, exports, sample
from fpdm.config import (
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ExecutionConfig,
    ModelConfig,
    SamplerConfig,
    TrainConfig,
    to_dict,
)
from fpdm.pretrained import load_source
from fpdm.runlog import export_extra
from fpdm.sample import main


def test_export_without_settings(tmp_path: Path) -> None:
    for model, iters in ((MODEL, 8), (DIT, None)):
        state = random_model(model).state_dict()
        path = exports.export(
            tmp_path / model.kind, model, state, which="raw", diffusion=DiffusionConfig(), extra={}
        )
        loaded = load_source(path)
        assert loaded.sampler_config == SamplerConfig(iters=iters)
        assert loaded.which == "raw"
        assert loaded.latent_scale is None


@pytest.mark.parametrize("scale", ["0.18", -1.0, True])
def test_export_with_a_scale_that_is_none(tmp_path: Path, scale: object) -> None:
    path = exports.export(
        tmp_path / "e", MODEL, random_model(MODEL).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={"latent_scale": scale},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"got latent_scale .*, expected a positive number"):
        load_source(path)


@pytest.mark.parametrize("dropout", ["0.1", -1, True, 1])
def test_export_with_a_label_dropout_that_is_none(tmp_path: Path, dropout: object) -> None:
    path = exports.export(
        tmp_path / "e", MODEL, random_model(MODEL).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={"label_dropout": dropout},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"got label_dropout .*, expected at least 0, below 1"):
        load_source(path)


def test_guidance_needs_a_null_label_that_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = ModelConfig(input_size=8, in_channels=1, hidden_size=16, num_heads=2, num_classes=10)
    model, sources = random_model(digits), {}
    groups = {"model": model.state_dict(), "ema": dict(model.named_parameters())}
    for name, dropout in (("without", 0.0), ("with", 0.1)):
        config = Config(
            model=digits, data=DataConfig(kind="digits"), sample=SETTINGS,
            train=TrainConfig(label_dropout=dropout),
        )  # fmt: skip
        meta = {"config": to_dict(config)}
        checkpoint.save(tmp_path / name / "checkpoints", 12, groups, meta, keep=2)
        exports.export(
            tmp_path / name / "export", digits, model.state_dict(), which="ema",
            diffusion=config.diffusion, extra=export_extra(config, 12),
        )  # fmt: skip
        sources[name] = (str(tmp_path / name), str(tmp_path / name / "export"))
    for source in sources["without"]:
        for more in ([], ["--calibrate", "4"]):
            told = complain([source, "--guidance", "4", *more], capsys)
            assert f"guidance: got 4, expected 1: {source} was trained with train.label_d" in told
    for i, source in enumerate((*sources["with"], *sources["without"])):
        argv = ["--out", str(tmp_path / f"{i}"), "--count", "1", "--steps", "2"]
        main([source, *argv, "--guidance", "4" if i < 2 else "1"])


def test_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = ModelConfig(input_size=8, in_channels=1, hidden_size=16, num_heads=2, num_classes=10)
    config = Config(
        model=digits,
        data=DataConfig(kind="digits"),
        sample=SETTINGS,
        execution=ExecutionConfig(recompute="full", residual_dtype="float32"),
    )
    raw, ema = random_model(digits, seed=1), random_model(digits, seed=2)
    groups = {
        "model": raw.state_dict(),
        "ema": {name: p.detach() for name, p in ema.named_parameters()},
    }
    run = tmp_path / "run"
    checkpoint.save(run / "checkpoints", 12, groups, {"config": to_dict(config)}, keep=2)
    for which, model in (("ema", ema), ("raw", raw)):
        loaded = load_source(run, which)
        assert (loaded.name, loaded.which) == ("run-12", which)
        assert loaded.sampler_config == SETTINGS
        for name, p in model.named_parameters():
            assert torch.equal(dict(loaded.model.named_parameters())[name], p)
    # another implementation is no other precision
    assert load_source(run).model.execution == config.execution
    changed = replace(config.execution, impl="reference")
    assert load_source(run, impl="reference").model.execution == changed
    assert changed != ExecutionConfig(impl="reference")
    sources = []

    def watched(*args: Any) -> Any:
        sources.append(load_source(*args))
        return sources[-1]

    monkeypatch.setattr(sample, "load_source", watched)
    main([str(run), "--out", str(tmp_path / "impl"), "--count", "1", "--impl", "reference"])
    assert sources[0].model.execution == changed
    monkeypatch.undo()
    main([str(run), "--out", str(tmp_path / "out"), "--count", "2"])
    assert len(npz(tmp_path / "out")["arr_0"]) == 2
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "without a checkpoint" in complain([str(tmp_path / "empty")], capsys)


def test_a_place_beside_the_model_is_answered_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint or its file, the directory above, the name of a run; a published file."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("runs/a/checkpoints/step_1")
    checkpoint.mkdir(parents=True)
    Path("model.pt").touch()
    for given in (checkpoint, checkpoint / "ema.safetensors", Path("runs"), Path("a")):
        with pytest.raises(
            ConfigError, match=r"expected a run directory .*; did you mean runs/a\?"
        ):
            load_source(given)
    with pytest.raises(ConfigError, match=r"expected a run directory [^;]*$"):
        load_source("elsewhere")
    with pytest.raises(
        ConfigError, match=r"got the file model\.pt, .* fpdm\.interop model\.pt OUT"
    ):
        load_source("model.pt")
