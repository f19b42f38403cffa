"""An export that replaces another one: killed at any moment it is the old one or the new one."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from test_checkpoint_kills import start_child, wait_child

from fpdm import exports
from fpdm.config import DiffusionConfig, ModelConfig
from fpdm.files import CheckpointError
from fpdm.model import from_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ModelConfig(input_size=4, in_channels=1, hidden_size=16, num_heads=2, num_classes=3)
# before the weights, the description, and the weights' usual name
FAILPOINTS = ("atomic-write:1", "atomic-write:2", "before-rename:1")
NAME = "final_layer.linear.bias"


def export(out: Path, number: int) -> None:
    """With ``number`` in its weights and in its description."""
    state = dict(random_model(MODEL).state_dict())
    state[NAME] = torch.full_like(state[NAME], number)
    exports.export(
        out, MODEL, state, which="ema", diffusion=DiffusionConfig(), extra={"step": number}
    )


def export_killed(out: Path, number: int, failpoint: str) -> None:
    def child() -> None:
        os.environ["FPDM_FAILPOINT"] = failpoint
        export(out, number)

    assert wait_child(start_child(child)) == signal.SIGKILL


def number_of(out: Path) -> int:
    found = exports.read_export(out)
    assert (found.state()[NAME] == found.extra["step"]).all()
    assert (from_pretrained(out).state_dict()[NAME] == found.extra["step"]).all()
    return found.extra["step"]


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FAILPOINTS, FAILPOINTS)))
def test_killed_twice(tmp_path: Path, first: str, second: str) -> None:
    """Also where the second replacement finds what the first one has left."""
    export(tmp_path, 1)
    export_killed(tmp_path, 2, first)
    before = 2 if first == "before-rename:1" else 1
    assert number_of(tmp_path) == before
    export_killed(tmp_path, 3, second)
    assert number_of(tmp_path) == (3 if second == "before-rename:1" else before)
    export(tmp_path, 4)
    assert number_of(tmp_path) == 4
    assert names(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_the_first_one_killed(tmp_path: Path, failpoint: str) -> None:
    export_killed(tmp_path, 1, failpoint)
    if failpoint == "before-rename:1":
        assert number_of(tmp_path) == 1
    else:
        with pytest.raises(CheckpointError, match=r"config.json: missing"):
            exports.read_export(tmp_path)
    export(tmp_path, 2)
    assert number_of(tmp_path) == 2
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_the_weights_in_question_are_named(tmp_path: Path) -> None:
    """Whatever a stopped replacement has left beside them."""
    export(tmp_path, 1)
    (tmp_path / exports.NEXT).write_bytes(b"half")
    raw = bytearray((tmp_path / exports.WEIGHTS).read_bytes())
    raw[-3] ^= 1
    (tmp_path / exports.WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor .* damaged"):
        exports.read_export(tmp_path).state()


def test_renamed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path, 1)
    export_killed(tmp_path, 2, "before-rename:1")
    read = exports.read_safetensors

    def renamed(path: Path, record: Any) -> Any:
        if path.name == exports.NEXT and path.exists():
            path.rename(tmp_path / exports.WEIGHTS)
        return read(path, record)

    monkeypatch.setattr(exports, "read_safetensors", renamed)
    assert number_of(tmp_path) == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_somebodys_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"got a {name} of something else, expected a new"):
        export(tmp_path, 1)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "{}"
