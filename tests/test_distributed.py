"""Two ranks: they agree at every step, and what ends one ends the other, with its reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    FailingTrainer,
    FullDisk,
    HashingTrainer,
    UnequalTrainer,
    changed,
    finish,
    small,
    start,
    start_pair,
    wait_for,
)  # fmt: skip

from fpdm import checkpoint
from fpdm.config import ConfigError
from fpdm.distributed import place
from fpdm.train import Trainer


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


@pytest.mark.parametrize(
    ("other", "told"),
    [({"lr": 1e-6, "seed": 7}, "optim.lr: 0.001 -> 1e-06; train.seed: 3 -> 7"),
     ({"steps": 9}, "train.steps: 50 -> 9")],
)  # fmt: skip
def test_ranks_with_other_settings_are_refused(tmp_path, other, told):
    """A stale YAML on one node: the replicas would drift apart in silence."""
    config = pair_config(tmp_path)
    children = start_pair([config, pair_config(tmp_path, **other)], tmp_path / "log")
    assert [finish(child, 20.0) for child in children] == [2, 2]
    assert (
        f"rank 1: got other settings or data than rank 0, expected the same: {told}"
        in (tmp_path / "log.1").read_text()
    )
    assert "rank 1 failed, see its message; rank 0 leaves" in (tmp_path / "log.0").read_text()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "1"}, "RANK: got 1 with WORLD_SIZE 1, expected less"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got 2 with WORLD_SIZE 2, expected less"),
        ({"RANK": "x"}, "RANK: got 'x', expected a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 without MASTER_ADDR"),
    ],
)
def test_an_environment_that_is_no_rank(monkeypatch, environment, says):
    """A job array exports RANK: its process would train, write nothing and say nothing."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1, 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        place()


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
