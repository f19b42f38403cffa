"""Learning iterations per timestep, keeping them, and sampling with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model

from fpdm import calibration, exports, sample
from fpdm.budget import Calibration, allocate
from fpdm.calibration import NAME, learn, load, save
from fpdm.cli import run_main
from fpdm.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig, to_dict
from fpdm.diffusion import Diffusion
from fpdm.engine import Sampler
from fpdm.files import CheckpointError
from fpdm.pretrained import SHIPPED, load_source
from fpdm.settings import UserError

MODEL = ModelConfig(input_size=4, in_channels=1, hidden_size=16, num_heads=2, num_classes=3)
SETTINGS = SamplerConfig(steps=5, iters=3, reuse="full", guidance=2.0, batch=4)
FOUND = Calibration((999, 499), ((0.5, 0.25), (0.5, 0.125)), "full", 2.0, "0123456789abcdef")


def learned(config: SamplerConfig = SETTINGS) -> Calibration:
    model = random_model(MODEL)
    return learn(model, Diffusion(DiffusionConfig()), config, [0, 1, 2], range(3), "0123")


def test_what_is_learned() -> None:
    """The mean residuals of the same images with four times the iterations."""
    found = learned()
    deep = replace(SETTINGS, iters=12)
    s = Sampler(random_model(MODEL), Diffusion(DiffusionConfig()), deep)
    want = s.sample([0, 1, 2], range(3)).stats.residual.double().mean(2)
    torch.testing.assert_close(torch.tensor(found.residual, dtype=torch.float64), want)
    assert found.timesteps == (999, 799, 599, 399, 199)
    assert (found.reuse, found.guidance, found.weights) == ("full", 2.0, "0123")


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "adaptive", "tol": 0.1, "max_iters": 4},
        {"allocation": "learned"},
        {"iters": None, "allocation": "explicit", "schedule": (1, 2, 3, 4, 5)},
        {"iters": None, "budget": 5 * 2 + 15},
    ],
)
def test_whatever_the_allocation(changes: dict[str, Any]) -> None:
    """Calibration does not depend on how the iterations are to be spent, only on how many."""
    assert learned(replace(SETTINGS, **changes)) == learned()


@pytest.mark.parametrize(
    "changes",
    [{"reuse": "none"}, {"reuse_gamma": 0.2}, {"reuse_gamma_end": 0.1}, {"reuse": "extrapolate"}],
)
def test_of_another_start(changes: dict[str, Any]) -> None:
    """What residuals were learned of: where iterations start."""
    blend = replace(SETTINGS, allocation="learned", reuse="blend", reuse_gamma=0.7)
    found = learned(blend)
    assert found.reuse == "blend 0.7"
    model, diffusion = random_model(MODEL), Diffusion(DiffusionConfig())
    Sampler(model, diffusion, blend, calibration=found)
    with pytest.raises(ConfigError, match=r"got learned with reuse blend 0\.7, expected one with"):
        Sampler(model, diffusion, replace(blend, **changes), calibration=found)


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / NAME
    save(FOUND, path)
    assert load(path, FOUND.weights) == FOUND
    with pytest.raises(ConfigError, match=r"got a calibration of weights 0123456789abcdef, expe"):
        load(path, "ffff")
    with pytest.raises(UserError, match=r"cannot write .*: .*; expected a directory"):
        save(FOUND, path / NAME)


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: "[",
        lambda body: "[]",
        lambda body: body | {"format": 2},
        lambda body: {k: v for k, v in body.items() if k != "reuse"},
        lambda body: body | {"more": 1},
        lambda body: body | {"residual": [[0.5, 0.25], [0.5]]},
        lambda body: body | {"residual": [[], []]},
        lambda body: body | {"residual": []},
        lambda body: body | {"residual": [[0.5, "x"], [0.5, 0.1]]},
        lambda body: body | {"residual": [[0.5, -1.0], [0.5, 0.1]]},
        lambda body: body | {"timesteps": [999, 999]},
        lambda body: body | {"timesteps": 3},
    ],
)
def test_damaged_files(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / NAME
    save(FOUND, path)
    found = damage(json.loads(path.read_text()))
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(CheckpointError, match=r"calibration\.json: got no calibration: ") as error:
        load(path, FOUND.weights)
    assert "\n" not in str(error.value)


def test_residuals_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(MODEL)
    with torch.no_grad():
        next(model.block_fixed_point.parameters()).fill_(torch.nan)
    with pytest.raises(ConfigError, match="calibrate: got residuals with NaN or Inf"):
        learn(model, Diffusion(DiffusionConfig()), SETTINGS, [0], [0], "0123")
    with pytest.raises(ConfigError, match="calibrate: got 0 images"):
        learn(model, Diffusion(DiffusionConfig()), SETTINGS, [], [], "0123")


# the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return exports.export(
        tmp_path / "source", MODEL, random_model(MODEL).state_dict(), which="ema",
        diffusion=DiffusionConfig(), extra={"sample": to_dict(SETTINGS)},
    )  # fmt: skip


def test_command(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(source.iterdir())
    argv = [str(source), "--out", str(tmp_path / "out"), "--count", "3", "--allocation", "learned"]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as left:
            run_main("fpdm.sample", sample.main, [*argv, *more])
        assert left.value.code == 2
        return capsys.readouterr().err

    assert "got learned without a calibration, expected one (python -m fpdm.sample" in refused()
    sample.main([str(source), "--calibrate", "4"])
    told = capsys.readouterr().out
    digest = load_source(source).digest()
    place = Path(f"calibrations/source-{digest[:8]}.json")
    assert f"wrote      {place}\n" in told
    assert sorted(source.iterdir()) == files, "an export may be shared"
    assert "after        1       2       4       8" in told
    assert not (tmp_path / "out").exists()
    sample.main(argv)
    assert "learned" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    found = calibration.load(place, digest)
    assert settings["iterations"] == allocate(15, 5, "learned", found.curves(found.timesteps))
    assert sum(settings["iterations"]) == 15
    # any number of timesteps, any budget
    sample.main([*argv, "--steps", "3", "--budget", "40", "--out", str(tmp_path / "other")])
    settings = json.loads((tmp_path / "other" / "settings.json").read_text())
    assert (len(settings["iterations"]), sum(settings["iterations"])) == (3, 40 - 3 * 2)
    assert "got learned with reuse full, expected one with sample.reuse=none" in refused(
        "--reuse", "none"
    )
    # one that came with an export is read where there is no newer one
    place.rename(source / NAME)
    sample.main([*argv, "--steps", "2", "--out", str(tmp_path / "shared")])
    assert "learned" in capsys.readouterr().out
    # other weights
    exports.export(
        source, MODEL, random_model(MODEL, seed=1).state_dict(), which="ema",
        diffusion=DiffusionConfig(), extra={"sample": to_dict(SETTINGS)},
    )  # fmt: skip
    assert "got a calibration of weights" in refused()


def test_of_a_run_and_of_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shipped = load_source()
    assert replace(shipped, path=run).calibrations() == [run / NAME]
    before = {path: path.stat().st_mtime_ns for path in SHIPPED.iterdir()}
    sample.main(["--calibrate", "1", "--steps", "2", "--iters", "1"])
    assert {path: path.stat().st_mtime_ns for path in SHIPPED.iterdir()} == before
    place = tmp_path / "calibrations" / f"digits_export-{shipped.digest()[:8]}.json"
    assert place.is_file()
    sample.main(["--count", "1", "--steps", "2", "--allocation", "learned", "--out", "out"])
    assert ", learned, " in capsys.readouterr().out


def test_a_dit_cannot_be_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit = replace(MODEL, kind="dit", pre_depth=0, post_depth=0, depth=1)
    path = exports.export(
        tmp_path / "dit", dit, random_model(dit).state_dict(), which="ema",
        diffusion=DiffusionConfig(), extra={},
    )  # fmt: skip
    with pytest.raises(SystemExit):
        run_main("fpdm.sample", sample.main, [str(path), "--calibrate", "2"])
    assert "calibrate: got a dit, expected an fpdm" in capsys.readouterr().err
