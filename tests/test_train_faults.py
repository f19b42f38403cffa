"""Kills, signals and ranks: what is left must be whole, and the resumed run the same run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    MODEL,
    FailingTrainer,
    HashingTrainer,
    UnequalTrainer,
    changed,
    fingerprint,
    orphans,
    small,
    start,
    start_pair,
)  # fmt: skip

from fpdm import checkpoint
from fpdm.checkpoint import FAILPOINTS
from fpdm.config import ConfigError, DataConfig
from fpdm.shards import write_shards
from fpdm.train import Trainer

LIMIT = 60.0


def finish(process, seconds: float = LIMIT) -> int:
    """Exit status of a child that must end by itself."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


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


class FullDisk(Trainer):
    """No file may grow beyond 1 kB after the second checkpoint."""

    def save(self) -> None:
        if self.step > 8:
            no_space(1000)
        super().save()


def no_space(size: int) -> None:
    """No file may grow beyond ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


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
    assert checkpoint.load_newest(Trainer(run).directory.checkpoints).step == 8
    # the same command says which shard, until it is back
    assert finish(start(run, log)) == 2
    assert "shard_00001.safetensors: got 1024 bytes" in log.read_text().strip().splitlines()[-1]
    os.replace(tmp_path / "data.cut", tmp_path / "data" / "shard_00001.safetensors")
    # elsewhere is as good: the fingerprint says that it is the same data
    os.rename(tmp_path / "data", tmp_path / "moved")
    moved = replace(run, data=replace(data, path=str(tmp_path / "moved")))
    resume_and_compare(moved, expected[1], log)


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


def pair_config(tmp_path: Path, **changes):
    settings = {"precision": "fp32", "steps": 50, "eps": 1e-3, "accumulate": 2, "save_every": 10}
    return small(tmp_path, **{**settings, **changes})


def run_pair(config, log: Path, kind=HashingTrainer) -> list[list[str]]:
    children = start_pair(config, log, kind)
    codes = [finish(child) for child in children]
    assert codes == [0, 0], [Path(f"{log}.{r}").read_text() for r in range(2)]
    root = Trainer(config).directory.root
    return [(root / f"hashes.{r}").read_text().split() for r in range(2)]


def test_two_ranks_agree_every_step_and_resume_on_one(tmp_path):
    config = pair_config(tmp_path, name="pair", batch=15, accumulate=1)
    first, second = run_pair(changed(config, steps=25), tmp_path / "log")
    assert first == second
    assert len(set(first)) == 25
    one = changed(config, name="one")
    assert finish(start(one, tmp_path / "log.one")) == 0
    assert finish(start(config, tmp_path / "log.resumed")) == 0
    ends = [checkpoint.load_newest(Trainer(c).directory.checkpoints) for c in (config, one)]
    assert ends[0].meta["state"]["step"] == ends[1].meta["state"]["step"] == 50
    for name, value in ends[1].tensors["model"].items():
        # eps = 1e-3 keeps Adam from turning the rounding of a tiny gradient into a whole step
        assert (ends[0].tensors["model"][name] - value).abs().max() < 2e-5, name


def test_two_ranks_for_fifty_steps_with_accumulation_and_a_signal(tmp_path):
    config = pair_config(tmp_path)
    children = start_pair(config, tmp_path / "log", HashingTrainer)
    wait_for(lambda: (Trainer(config).directory.root / "hashes.0").exists())
    os.kill(children[1].pid, signal.SIGTERM)
    assert [finish(child, 10.0) for child in children] == [0, 0]
    assert "SIGTERM: saved step" in (tmp_path / "log.0").read_text()
    first, second = run_pair(config, tmp_path / "log")
    assert first == second
    assert len(first) == 50


def test_ranks_that_do_not_sum_would_be_seen(tmp_path):
    first, second = run_pair(pair_config(tmp_path, steps=3), tmp_path / "log", UnequalTrainer)
    assert first[0] != second[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_rank_ends_the_other(tmp_path, victim):
    config = pair_config(tmp_path, steps=10**6, save_every=5)
    children = start_pair(config, tmp_path / "log")
    wait_for(lambda: len(list(Trainer(config).directory.checkpoints.glob("step_*"))) >= 2)
    children[victim].kill()
    begin = time.monotonic()
    assert finish(children[1 - victim], 10.0) in (1, 2)
    print(f"survivor left after {time.monotonic() - begin:.3f} s")
    lines = (tmp_path / f"log.{1 - victim}").read_text().splitlines()
    assert f"rank {1 - victim}: a peer stopped or froze" in lines[-1]
    assert "Traceback" not in "".join(lines)
    # the same command goes on
    newest = checkpoint.load_newest(Trainer(config).directory.checkpoints)
    more = changed(config, steps=newest.step + 3)
    assert [len(hashes) for hashes in run_pair(more, tmp_path / "log")] == [3, 3]


class PoisonedTrainer(HashingTrainer):
    """A NaN in a sample of rank 1, step 3."""

    def _micro_step(self, step, micro, n, m):
        if step == 3 and self.ranks.rank == 1:
            micro.x[0] = float("nan")
        return super()._micro_step(step, micro, n, m)


PLANTED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from runs import Trainer, run_main, small, torch
from fpdm.settings import UserError

class Planted(Trainer):
    def local_step(self, step):
        super().local_step(step)
        if self.ranks.rank == 1 and step == 5:
            raise UserError("planted")

torch.set_num_threads(1)
run_main("fpdm.train", lambda argv: Planted(small(Path({out!r}))).run() and None)
"""


class RowOnFullDisk(Trainer):
    """Rank 0 cannot write the row of step 9."""

    def _row_if_due(self) -> None:
        if self.step == 9 and self.ranks.rank == 0:
            self.directory.metrics = Path("/dev/full")
        super()._row_if_due()


class NoteOnFullDisk(PoisonedTrainer):
    """Rank 1 cannot note the samples that it skips."""

    def _skip(self, mine: bool) -> None:
        if self.ranks.rank == 1:
            self.directory.nonfinite = Path("/dev/full")
        super()._skip(mine)


@pytest.mark.parametrize(
    ("kind", "rank", "what"),
    [
        (RowOnFullDisk, 0, "/dev/full"),
        (FullDisk, 0, "step_0000012"),
        (NoteOnFullDisk, 1, "/dev/full"),
    ],
)
def test_a_full_disk_on_one_rank_ends_the_other(tmp_path, kind, rank, what):
    config = pair_config(tmp_path, steps=24, save_every=4, accumulate=1)
    children = start_pair(config, tmp_path / "log", kind)
    assert finish(children[rank]) == 2
    begin = time.monotonic()
    assert finish(children[1 - rank], 10.0) == 2
    print(f"the other left after {time.monotonic() - begin:.3f} s")
    logs = [(tmp_path / f"log.{r}").read_text() for r in (rank, 1 - rank)]
    lines = [log.strip().splitlines()[-1] for log in logs]
    assert "fpdm.train: error: cannot write" in lines[0]
    assert what in lines[0]
    assert f"rank {rank} failed, see its message; rank {1 - rank} leaves" in lines[1]
    assert "Traceback" not in "".join(logs)
    # the same command goes on
    done = checkpoint.load_newest(Trainer(config).directory.checkpoints).step
    assert done == (8 if rank == 0 else 4)
    root = Trainer(config).directory.root
    for name in root.glob("hashes.*"):
        name.unlink()
    assert len(run_pair(config, tmp_path / "log")[0]) == 24 - done


def test_a_failing_rank_takes_the_other_along(tmp_path):
    config = pair_config(tmp_path, steps=10**6, accumulate=1)
    children = start_pair(config, tmp_path / "log", FailingTrainer)
    assert [finish(child, 20.0) != 0 for child in children] == [True, True]
    assert "rank 1 failed, see its message; rank 0 leaves" in (tmp_path / "log.0").read_text()
    assert "planted" in (tmp_path / "log.1").read_text()


def test_a_bad_batch_on_one_rank_is_skipped_by_both(tmp_path):
    config = pair_config(tmp_path, steps=6, accumulate=1)
    first, second = run_pair(config, tmp_path / "log", PoisonedTrainer)
    assert first == second
    assert first[3] == first[2]
    assert len(set(first)) == 5
    rows = Trainer(config).directory.nonfinite.read_text().splitlines()
    assert len(rows) == 1
    assert '"rank": 1' in rows[0]


@pytest.mark.slow
def test_torchrun_shows_the_cause_last(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*argv, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("Failures:") :]
    assert summary.index("rank 1 failed, see its message; rank 0 leaves") < summary.index("Root")
    last = summary.strip().splitlines()[-2]
    assert last.split(" : ")[1] == "fpdm.train: error: planted"


@pytest.mark.slow
def test_a_frozen_rank_ends_the_other_at_the_timeout(tmp_path):
    config = pair_config(tmp_path, steps=10**6, save_every=5, ddp_timeout_s=5)
    children = start_pair(config, tmp_path / "log")
    wait_for(lambda: len(list(Trainer(config).directory.checkpoints.glob("step_*"))) >= 1)
    os.kill(children[1].pid, signal.SIGSTOP)
    assert finish(children[0], 40.0) != 0
    children[1].kill()
    assert "a peer stopped or froze" in (tmp_path / "log.0").read_text()
