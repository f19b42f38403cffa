"""The run directory: one trainer at a time, and rows that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import changed, small

from fpdm import checkpoint, figures, files
from fpdm.checks import check_same
from fpdm.config import ConfigError, FixedPointConfig, UserError
from fpdm.data import open_dataset
from fpdm.kernels import implementations
from fpdm.runlog import RunDirectory
from fpdm.train import Trainer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # drawing the curves takes longer than the run
    monkeypatch.setattr(figures, "plot_history", lambda metrics, path: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path, steps=2, save_every=1, log_every=1)
    refusals: list[str] = []

    class Joined(Trainer):
        def local_step(self, step: int) -> None:
            super().local_step(step)
            with pytest.raises(ConfigError, match="run, where another process is training") as told:
                Trainer(config).run()
            refusals.append(str(told.value))

    Joined(config).run()
    assert len(refusals) == 2
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    # whoever ended, also by an error, has let go of it
    with pytest.raises(ConfigError, match="of another run"):
        Trainer(changed(config, seed=9)).run()
    assert Trainer(changed(config, steps=3)).run() == 3


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, steps=1, log_every=1)
    for told in (False, True):
        Trainer(config).run()
        assert ("no checkpoint under" in capsys.readouterr().out) == told
        shutil.rmtree(tmp_path / "run" / "checkpoints")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)


def test_half_a_row_does_not_stay(tmp_path: Path) -> None:
    """A write that meets the end of the space takes what fits and reports no error."""
    directory, path = RunDirectory(tmp_path), tmp_path / "metrics.jsonl"
    directory.append(path, {"step": 1})
    size = path.stat().st_size
    for room in (size + 5, size):
        with file_limit(room), pytest.raises(UserError, match=rf"cannot write {path}: .*space"):
            directory.append(path, {"step": 2})
        assert path.stat().st_size == size
    directory.append(path, {"step": 2})
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2]


def test_a_config_of_somebody_s_own_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, steps=1)
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("# mine\nrecipe: digits\n")
    Trainer(config).run()
    assert "what was there is config.yaml.bak now" in capsys.readouterr().out
    assert (root / "config.yaml.bak").read_text().startswith("# mine")
    written = (root / "config.yaml").read_text()
    # nor is what was kept replaced
    shutil.rmtree(root / "checkpoints")
    (root / "config.yaml").write_text("# mine too\n")
    Trainer(config).run()
    assert "what was there is config.yaml.bak1 now" in capsys.readouterr().out
    assert (root / "config.yaml.bak1").read_text() == "# mine too\n"
    # its own it writes again: the run goes on, with more steps, and begins anew
    Trainer(changed(config, steps=2)).run()
    shutil.rmtree(root / "checkpoints")
    (root / "config.yaml").write_text(written)
    Trainer(config).run()
    assert "config.yaml.bak now" not in capsys.readouterr().out
    assert (root / "config.yaml.bak").read_text().startswith("# mine")


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Fewer steps than it has done, and other ranks where each draws its own (n, m)."""
    ours = FixedPointConfig(n_max=2, m_max=2, draws="per_rank")
    config = small(tmp_path, steps=3, fixed_point=ours)
    Trainer(config).run()
    with pytest.raises(ConfigError, match=r"train.steps: got 2, expected at least 3, where"):
        Trainer(changed(config, steps=2)).run()
    meta = checkpoint.load_newest(tmp_path / "run" / "checkpoints").meta
    data = open_dataset(config.data)
    check_same(meta, config, data, 1, tmp_path)
    with pytest.raises(ConfigError, match=r"ranks: got 2, expected the 1 of .*per_rank"):
        check_same(meta, config, data, 2, tmp_path)
    shared = replace(config, fixed_point=replace(ours, draws="global"))
    meta["config"]["fixed_point"]["draws"] = "global"
    check_same(meta, shared, data, 2, tmp_path)
    # a setting that came after the checkpoint had its default then
    del meta["config"]["optim"]["ema_warmup"]
    check_same(meta, shared, data, 1, tmp_path)
    meta["config"]["optim"]["gone"] = 1
    with pytest.raises(ConfigError, match=rf"{tmp_path} is of another version .*optim.gone"):
        check_same(meta, shared, data, 1, tmp_path)
    del meta["config"]["optim"]["gone"]
    wrong = replace(shared, optim=replace(shared.optim, ema_warmup=True))
    with pytest.raises(ConfigError, match=r"optim.ema_warmup: False -> True"):
        check_same(meta, wrong, data, 1, tmp_path)


def test_grids_in_another_dtype_than_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16 on a CPU is plain PyTorch's; the grids are drawn in it, whatever trains."""
    config = small(tmp_path, steps=2, grid_every=1)
    config = replace(config, sample=replace(config.sample, dtype="float16"))
    trainer = Trainer(config)
    trainer.run()
    assert "NaN" not in capsys.readouterr().out
    assert trainer.sampler.model.execution.impl == "reference"
    assert trainer.impl == implementations.choose("auto", "cpu", torch.float32)
    assert (tmp_path / "run" / "export").is_dir()
    # what float16 cannot hold is told
    trainer.optimizer.ema["final_layer.linear.weight"].fill_(1e5)
    trainer._grid()
    assert "step 2: 10 images of the grid hold NaN or Inf" in capsys.readouterr().out
    # a grid that a kill kept from being drawn
    (tmp_path / "run" / "samples" / "step_0000002.png").unlink()
    assert Trainer(changed(config, steps=3)).run() == 3
    monkeypatch.setattr(Trainer, "local_step", None)
    refused = replace(config, execution=replace(config.execution, impl="cpu"))
    if implementations.unavailable("cpu", torch.device("cpu"), torch.float32) is None:
        with pytest.raises(
            implementations.ImplError, match=r"execution\.impl: got cpu, .*sample\.dtype = float16"
        ):
            Trainer(changed(refused, name="other")).run()
    assert not (tmp_path / "other").exists()
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints") is not None


def scalars(root: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(name)]


def test_tensorboard_shows_every_row_once(tmp_path: Path) -> None:
    """Also after a kill, which loses no row, and a resume, which writes some again."""
    pytest.importorskip("tensorboard")
    config = small(tmp_path, steps=9, log_every=1, save_every=4, tensorboard=True)

    class Killed(Trainer):
        def local_step(self, step: int) -> None:
            if step == 6:
                # without a farewell, as by SIGKILL
                os._exit(9)
            super().local_step(step)

    child = os.fork()
    if child == 0:
        Killed(config).run()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    root = tmp_path / "run"
    assert [step for step, _ in scalars(root, "loss")] == [1, 2, 3, 4, 5, 6]
    # files are read in the order of the second that their names begin with
    time.sleep(1.0)
    Trainer(config).run()
    rows = [json.loads(row) for row in (root / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "lr"):
        wanted = [(row["step"], row[name]) for row in rows]
        assert scalars(root, name) == [(step, pytest.approx(value)) for step, value in wanted]
    assert len(scalars(root, "images_per_s")) == 9
    assert len(list((root / "tensorboard").iterdir())) == 2


def test_tensorboard_that_is_missing_or_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, steps=4, log_every=1, tensorboard=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(
            ConfigError, match=r"train\.tensorboard: got true, expected .*installed"
        ):
            Trainer(config).run()
    pytest.importorskip("tensorboard")
    board = tmp_path / "run" / "tensorboard"
    board.touch()
    with pytest.raises(UserError, match=r"cannot write .*tensorboard"):
        Trainer(config).run()
    board.unlink()

    # the writer's thread prints what ended it
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    class Full(Trainer):
        def _row_if_due(self) -> None:
            if self.step != 3:
                return super()._row_if_due()
            with file_limit(max(path.stat().st_size for path in board.iterdir()) + 9):
                return super()._row_if_due()

    with pytest.raises(UserError, match=r"cannot write .*tensorboard: File too large"):
        Full(config).run()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, and says that nothing keeps another trainer away."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    for _ in range(2):
        directory = RunDirectory(tmp_path)
        directory.prepare()
        told = f"{directory.root}: it cannot be locked: let no other process train there"
        assert capsys.readouterr().out.splitlines() == [told]
