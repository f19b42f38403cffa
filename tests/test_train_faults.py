"""Kills, signals, full disks: what is left must be whole, and the resumed run the same run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    MODEL,
    FullDisk,
    changed,
    fingerprint,
    finish,
    orphans,
    small,
    start,
    wait_for,
)  # fmt: skip

from fpdm import checkpoint, train
from fpdm.checkpoint import FAILPOINTS
from fpdm.config import ConfigError, DataConfig
from fpdm.shards import write_shards
from fpdm.train import Trainer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The uninterrupted run, from a child like all others: (config, fingerprint, seconds)."""
    return reference_of(small(tmp_path_factory.mktemp("reference"), steps=24, save_every=4))


def reference_of(config):
    log = Path(config.train.out) / "log"
    assert finish(start(config, log)) == 0, log.read_text()
    again = changed(config, name="again")
    begin = time.monotonic()
    assert finish(start(again, log)) == 0
    seconds = time.monotonic() - begin
    assert fingerprint(again) == fingerprint(config)
    return config, fingerprint(config), seconds


def resume_and_compare(config, expected, log: Path) -> None:
    assert finish(start(config, log)) == 0, log.read_text()
    assert fingerprint(config) == expected
    assert not orphans(config)


def kills(reference, tmp_path: Path, count: int, seed: int) -> None:
    """``count`` runs that SIGKILL met. The length of a run is followed, as the machine's load is
    another one every minute."""
    config, expected, seconds = reference
    rng, killed = random.Random(seed), 0
    for i in range(3 * count):
        run = changed(config, out=str(tmp_path), name=f"run{i}")
        moment = rng.uniform(0.02, 1.0) * seconds
        child = start(run, tmp_path / "log")
        time.sleep(moment)
        child.kill()
        child.join()
        print(f"seed {seed}: kill {i} after {moment:.3f} s of {seconds:.3f} s, {child.exitcode}")
        if child.exitcode == 0:
            # it had ended
            seconds *= 0.8
            continue
        assert child.exitcode == -signal.SIGKILL
        seconds *= 1.05
        resume_and_compare(run, expected, tmp_path / "log")
        killed += 1
        if killed == count:
            return
    raise AssertionError(f"only {killed} of {count} runs were killed")


def test_sigkill_at_twenty_random_moments(reference, tmp_path):
    kills(reference, tmp_path, 20, seed=1)


@pytest.mark.slow
def test_sigkill_at_fifty_random_moments(reference, tmp_path):
    kills(reference, tmp_path, 50, seed=2)


def failpoint(reference, tmp_path: Path, name: str, occurrence: int) -> None:
    config, expected, _ = reference
    run = changed(config, out=str(tmp_path), name=f"{name}-{occurrence}")
    child = start(run, tmp_path / "log", env={"FPDM_FAILPOINT": f"{name}:{occurrence}"})
    assert finish(child) == -signal.SIGKILL, (tmp_path / "log").read_text()
    resume_and_compare(run, expected, tmp_path / "log")


@pytest.mark.parametrize("occurrence", [1, 2, 3])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_sigkill_at_failpoints(reference, tmp_path, name, occurrence):
    failpoint(reference, tmp_path, name, occurrence)


def test_the_loss_scale_survives_sigkill(tmp_path):
    config = small(
        tmp_path, steps=12, save_every=4, precision="fp16", scale_growth_interval=3, name="whole"
    )
    reference = reference_of(config)
    assert reference[1]["state"]["scaler"]["scale"] > config.train.scale_init
    failpoint(reference, tmp_path, "before-rename", 2)


class Telling(Trainer):
    """Tells of every step that it begins."""

    def local_step(self, step: int) -> None:
        with open(self.directory.root / "begun", "ab") as file:
            file.write(b".")
        super().local_step(step)


def signals(reference, tmp_path: Path, count: int, seed: int) -> None:
    """``count`` signals that met a run, at least half of them before its last step. When they are
    sent is told by the run's own steps, whatever the machine's load."""
    config, expected, seconds = reference
    rng, met, early = random.Random(seed), 0, 0
    kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    for i in range(3 * count):
        # a grid every third step: a third of the time goes into sampling, a part into saving
        run = changed(config, out=str(tmp_path), name=f"run{i}", grid_every=3)
        log, root = tmp_path / f"log{i}", Trainer(run).directory.root
        child = start(run, log, Telling)
        wait_for(root.exists)
        # 0: before the first step, 24: in the last one or while the run ends
        begun = rng.randint(0, 24)
        wait_for(lambda root=root, n=begun: not n or size(root / "begun") >= n)
        time.sleep(rng.uniform(0.0, 1.2) * seconds / 24)
        begin, kind = time.monotonic(), kinds[met % 3]
        alive = child.exitcode is None
        if alive:
            os.kill(child.pid, kind)
        assert finish(child, 10.0) == 0, log.read_text()
        newest = checkpoint.load_newest(Trainer(run).directory.checkpoints)
        assert newest is not None
        print(f"seed {seed}: {kind!r} in step {begun}, left at {newest.step} after "
              f"{time.monotonic() - begin:.3f} s")  # fmt: skip
        if newest.step < 24:
            early += 1
            assert f"saved step {newest.step} of 24" in log.read_text()
        met += alive
        resume_and_compare(run, expected, log)
        if met >= count and early >= count // 2:
            return
    raise AssertionError(f"{met} signals met a run, {early} of them before its last step")


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ten_signals_at_random_phases(reference, tmp_path):
    signals(reference, tmp_path, 10, seed=3)


@pytest.mark.slow
def test_thirty_signals_at_random_phases(reference, tmp_path):
    signals(reference, tmp_path, 30, seed=4)


def test_a_second_signal_exits_at_once(reference, tmp_path):
    run = changed(reference[0], out=str(tmp_path), steps=10**6, batch=512, save_every=0)
    child = start(run, tmp_path / "log", SleepyTrainer)
    wait_for(lambda: (Trainer(run).directory.root / "asleep").exists())
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert child.exitcode is None
    os.kill(child.pid, signal.SIGTERM)
    assert finish(child, 2.0) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("signum", "ignored", "steps"),
    [
        (signal.SIGHUP, False, 3), (signal.SIGHUP, True, 4),
        (signal.SIGTERM, True, 3),
    ],
)  # fmt: skip
def test_a_terminal_that_is_closed_and_signals_that_were_ignored(tmp_path, signum, ignored, steps):
    """The run is saved, or goes on under nohup; SIGTERM is meant for it also where the batch
    script ignores it."""

    class Stopped(Trainer):
        def local_step(self, step: int) -> None:
            super().local_step(step)
            if step == 2:
                os.kill(os.getpid(), signum)

    old = signal.SIG_IGN if ignored else signal.SIG_DFL
    before = signal.signal(signum, old)
    try:
        trainer = Stopped(small(tmp_path, steps=4, save_every=0))
        assert trainer.run() == steps
        assert checkpoint.load_newest(trainer.directory.checkpoints).step == steps
        assert signal.getsignal(signum) == old
    finally:
        signal.signal(signum, before)


def test_the_same_signal_twice_is_one_request(reference, tmp_path):
    """A batch system signals worker and torchrun, which passes its own on: it must still save."""
    run, log = changed(reference[0], out=str(tmp_path), steps=10**6, save_every=0), tmp_path / "log"
    child = start(run, log, Telling)
    wait_for(lambda: size(Trainer(run).directory.root / "begun") > 3)
    for _ in range(3):
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.01)
    assert finish(child) == 0, log.read_text()
    assert "SIGTERM: saved step" in log.read_text()


class SleepyTrainer(Trainer):
    """A step that takes half a minute."""

    def local_step(self, step: int) -> None:
        (self.directory.root / "asleep").touch()
        for _ in range(300):
            time.sleep(0.1)


def test_a_full_disk_loses_nothing(reference, tmp_path):
    config, expected, _ = reference
    run = changed(config, out=str(tmp_path))
    child = start(run, tmp_path / "log", FullDisk)
    assert finish(child) in (1, 2)
    text = (tmp_path / "log").read_text().strip().splitlines()
    assert "fpdm.train: error: cannot write" in text[-1]
    assert "Traceback" not in "".join(text)
    newest = checkpoint.load_newest(Trainer(run).directory.checkpoints)
    assert newest.step == 8
    resume_and_compare(run, expected, tmp_path / "log")


def test_a_shard_that_shrinks_loses_nothing(tmp_path):
    """The run ends in one line, the newest checkpoint is whole, with the data back it goes on."""
    x = np.random.default_rng(0).standard_normal((64, 4, 4, 4)).astype(np.float32)
    write_shards(
        [(x, np.arange(64) % 10, None)], tmp_path / "data", dtype="float16", latent_scale=1.0,
        rows_per_shard=16,
    )  # fmt: skip
    model = replace(MODEL, input_size=4, in_channels=4)
    base = small(tmp_path, steps=24, save_every=4)
    data = DataConfig(kind="latents", path=str(tmp_path / "data"), latent_scale=1.0)
    expected = reference_of(replace(base, model=model, data=data))
    run = changed(expected[0], name="cut")
    child, log = start(run, tmp_path / "log", Cut), tmp_path / "log"
    assert finish(child) == 2
    lines = log.read_text().strip().splitlines()
    assert "fpdm.train: error: " in lines[-1]
    assert "shard_00001.safetensors: has shrunk since it was opened" in lines[-1]
    assert "Traceback" not in log.read_text()
    # the steps since the last due checkpoint were good
    assert "saved step 10, the last before the error" in log.read_text()
    assert checkpoint.load_newest(Trainer(run).directory.checkpoints).step == 10
    # the same command says which shard, until it is back
    assert finish(start(run, log)) == 2
    assert "shard_00001.safetensors: got 1024 bytes" in log.read_text().strip().splitlines()[-1]
    os.replace(tmp_path / "data.cut", tmp_path / "data" / "shard_00001.safetensors")
    # elsewhere is as good: the fingerprint says that it is the same data
    os.rename(tmp_path / "data", tmp_path / "moved")
    moved = replace(run, data=replace(data, path=str(tmp_path / "moved")))
    resume_and_compare(moved, expected[1], log)


def test_a_grid_that_fails_costs_no_steps(tmp_path):
    class Failing(Trainer):
        def _grid(self):
            if self.step == 6:
                raise ValueError("planted")
            super()._grid()

    config = small(tmp_path, steps=9, save_every=0, grid_every=6)
    with pytest.raises(ValueError, match="planted"):
        Failing(config).run()
    trainer = Trainer(config)
    assert checkpoint.load_newest(trainer.directory.checkpoints).step == 6
    assert trainer.run() == 9


@pytest.mark.parametrize(("torchrun", "status"), [(None, 128 + signal.SIGTERM), ("1", 0)])
@pytest.mark.parametrize("where", ["step", "last", "grid"])
def test_a_run_that_a_signal_cut_short_says_so(tmp_path, monkeypatch, where, torchrun, status):
    """Also in its last step and in its last grid, where every step is done and no export made."""
    config = small(tmp_path, steps=4, save_every=0)

    class Signalled(Trainer):
        def local_step(self, step):
            super().local_step(step)
            if step == {"step": 1, "last": 3}.get(where):
                os.kill(os.getpid(), signal.SIGTERM)

        def _grid(self):
            if where == "grid":
                os.kill(os.getpid(), signal.SIGTERM)
            super()._grid()

    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun)
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(train, "load_config", lambda *argv: config)
    monkeypatch.setattr(train, "Trainer", Signalled)
    assert train.main(["digits"]) == status
    assert not (tmp_path / "run" / "export").exists()
    monkeypatch.setattr(train, "Trainer", Trainer)
    assert train.main(["digits"]) == 0
    assert (tmp_path / "run" / "export").exists()


class Cut(Trainer):
    """A shard is cut to 1 kB after the tenth step."""

    def local_step(self, step: int) -> None:
        if step == 10:
            path = Path(self.config.data.path) / "shard_00001.safetensors"
            shutil.copy(path, f"{self.config.data.path}.cut")
            os.truncate(path, 1024)
        super().local_step(step)


def test_a_batch_that_is_too_large_is_told_with_the_ways_out(tmp_path):
    class TooLarge(Trainer):
        def local_step(self, step: int) -> None:
            super().local_step(step)
            if step == 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0")

    config = small(tmp_path, steps=8)
    told = (
        r"^train\.batch: got 16, out of memory on cpu in step 7; expected .*recompute elementwise"
    )
    with pytest.raises(ConfigError, match=told) as caught:
        TooLarge(config).run()
    assert str(caught.value).endswith("(now 1): CUDA out of memory")
    execution = replace(config.execution, recompute="full", chunks=2)
    assert Trainer(replace(config, execution=execution)).run() == 8


# ranks
