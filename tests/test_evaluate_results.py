"""Where ``python -m fpdm.evaluate`` writes, and what it does not replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import random_model

from fpdm import checkpoint, evaluate, exports, quality
from fpdm.config import Config, ConfigError, DiffusionConfig, ModelConfig, SamplerConfig, to_dict

MODEL = ModelConfig(
    input_size=8, in_channels=1, hidden_size=16, num_heads=2, patch_size=4, num_classes=10
)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[evaluate.Options]:
    """Every measurement that is asked for; none is made."""
    found: list[evaluate.Options] = []

    def note(source: Any, options: evaluate.Options) -> quality.Evaluation:
        found.append(options)
        return quality.Evaluation("nothing", (), (), {})

    monkeypatch.setattr(evaluate, "evaluate", note)
    return found


def save(run: Path, step: int, iters: int = 1) -> None:
    model = random_model(MODEL)
    model.final_layer.linear.bias.data.fill_(step)
    groups: dict[str, Any] = {"model": model.state_dict()}
    groups["ema"] = {name: p.detach() for name, p in model.named_parameters()}
    config = Config(model=MODEL, sample=SamplerConfig(steps=2, iters=iters))
    checkpoint.save(run / "checkpoints", step, groups, {"config": to_dict(config)}, keep=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(tmp_path / "run", 1)
    return tmp_path / "run"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return exports.export(
        tmp_path / "export", MODEL, random_model(MODEL).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={},
    )  # fmt: skip


def results(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("evaluation"))


def test_a_run_has_a_file_for_its_own_settings(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, argv = run / "evaluation.json", [str(run)]
    evaluate.command([*argv, "--sample.batch", "7"])  # which changes no image
    assert results(run) == ["evaluation.json"]
    whole = own.read_bytes()
    others: tuple[list[str], ...] = (
        ["--sample.steps", "3"], ["--seed", "5"], ["--sets", "1"], ["--weights", "raw"],
    )  # fmt: skip
    for i, other in enumerate(others):
        evaluate.command([*argv, *other])
        evaluate.command([*argv, *other])
        assert len(results(run)) == 2 + i
    assert own.read_bytes() == whole
    assert "replaces" not in capsys.readouterr().out
    # it follows the run, and says so
    save(run, 2)
    evaluate.command(argv)
    assert f"replaces   the evaluation of run-1 in {own}\n" in capsys.readouterr().out
    assert json.loads(own.read_text())["source"]["name"] == "run-2"
    # also where it was resumed with another sampler of its grids
    save(run, 3, iters=2)
    evaluate.command(argv)
    assert json.loads(own.read_text())["sample"]["iters"] == 2


@pytest.mark.parametrize("content", ["mine", '{"a": 1}', "[]"])
def test_a_file_of_something_else_stays(content: str, run: Path, measured: list[Any]) -> None:
    own = run / "evaluation.json"
    own.write_text(content)
    for argv in ([], ["--out", str(run)], ["--out", str(own)]):
        with pytest.raises(ConfigError, match=f"out: got {own}, which is no evaluation, expected"):
            evaluate.command([str(run), *argv])
    assert (own.read_text(), measured) == (content, [])


def test_results_of_other_settings_stay(run: Path, measured: list[Any]) -> None:
    own = run / "evaluation.json"
    evaluate.command([str(run)])
    whole = own.read_bytes()
    for out in (run, own):
        with pytest.raises(ConfigError, match=f"sample.steps: got 3, expected 2 of {own}, or anot"):
            evaluate.command([str(run), "--sample.steps", "3", "--out", str(out)])
    assert (own.read_bytes(), len(measured)) == (whole, 1)


def test_results_of_another_model_stay(exported: Path, run: Path, tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path / "x.json"), "--sample.steps", "2", "--sample.iters", "1"]
    evaluate.command([str(exported), *argv])
    evaluate.command([str(exported), *argv])
    with pytest.raises(ConfigError, match=r"source.name: got run-1, expected export of .*x.json"):
        evaluate.command([str(run), *argv])


def test_an_earlier_version_wrote_fewer_settings(run: Path) -> None:
    evaluate.command([str(run)])
    record = json.loads((run / "evaluation.json").read_text())
    del record["sets"]
    (run / "evaluation.json").write_text(json.dumps(record))
    evaluate.command([str(run)])
    assert json.loads((run / "evaluation.json").read_text())["sets"] == 4


def test_looking_whether_it_can_be_written_touches_nothing(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json.probe").write_text("mine")
    evaluate.command([str(exported), "--out", str(tmp_path / "x.json")])
    assert (tmp_path / "x.json.probe").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "x.json", "x.json.probe"]
