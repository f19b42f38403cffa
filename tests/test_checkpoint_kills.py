"""Saving under SIGKILL at named and random moments, beside readers, and at a file size limit."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import equal, must_hold, names, put, refuse_reports, state

from fpdm import checkpoint, files
from fpdm.checkpoint import CheckpointError, load_newest


def start_child(work: Callable[[], object]) -> int:
    """Fork a child that runs ``work``; torch is not imported again."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # a forked child has no thread pool
        work()
        code = 0
    finally:
        os._exit(code)


def wait_child(pid: int) -> int:
    """The signal that ended it, or minus its exit status."""
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


class Progress:
    """A pipe on which a child tells which step it is done with."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()

    def tell(self, step: int) -> None:
        os.write(self.into, step.to_bytes(4, "little"))

    def wait(self) -> int:
        return int.from_bytes(os.read(self.out, 4), "little")

    def last(self, default: int) -> int:
        os.close(self.into)
        data = b"".join(iter(lambda: os.read(self.out, 1 << 16), b""))
        os.close(self.out)
        return int.from_bytes(data[-4:], "little") if data else default


def saver(root: Path, progress: Progress, arm: str, keep: int, size: int = 400) -> None:
    """Two saves in peace, then the failpoint is armed and saving goes on."""
    for step in itertools.count(1):
        if step == 3 and arm:
            os.environ["FPDM_FAILPOINT"] = arm
        put(root, step, keep, size)
        progress.tell(step)


def check_after_kill(root: Path, done: int, keep: int, size: int = 400) -> int:
    """The newest valid checkpoint is the last that was reported, or the one being made."""
    found = load_newest(root, refuse_reports)
    if done or found:
        assert found is not None, f"step {done} was saved and is lost"
        assert found.step in (done, done + 1)
        must_hold(found, found.step, size)
    put(root, done + 2, keep, size)
    assert not [name for name in names(root) if not name.startswith("step_")], "orphans"
    assert len(names(root)) <= keep
    must_hold(load_newest(root, refuse_reports), done + 2, size)
    return done


@pytest.mark.parametrize("occurrence", [1, 2, 3])
@pytest.mark.parametrize("name", checkpoint.FAILPOINTS)
def test_sigkill_at_failpoint(tmp_path: Path, name: str, occurrence: int) -> None:
    progress = Progress()
    pid = start_child(lambda: saver(tmp_path, progress, f"{name}:{occurrence}", keep=2))
    assert wait_child(pid) == signal.SIGKILL
    orphans = [entry for entry in names(tmp_path) if entry.startswith(".tmp-")]
    # so that "no orphans" afterwards is a finding; after its rename a save has left none
    assert bool(orphans) == (name != "before-dir-fsync")
    assert check_after_kill(tmp_path, progress.last(0), keep=2) >= 2


def kill_at_random(work: Callable[[Progress], object], rng: random.Random) -> int:
    """Start a saver, kill it at a random moment after its first save; the last step it told."""
    progress = Progress()
    pid = start_child(lambda: work(progress))
    progress.wait()
    time.sleep(rng.uniform(0.0, 0.12))
    os.kill(pid, signal.SIGKILL)
    assert wait_child(pid) == signal.SIGKILL
    return progress.last(1)


@pytest.mark.parametrize("kills", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(tmp_path: Path, kills: int) -> None:
    seed, size = 1234, 20_000
    rng = random.Random(seed)
    with_orphans = 0
    for attempt in range(kills):
        root = tmp_path / str(attempt)
        done = kill_at_random(lambda p, r=root: saver(r, p, "", 2, size), rng)  # type: ignore[misc]
        with_orphans += any(name.startswith(".tmp-") for name in names(root))
        check_after_kill(root, done, 2, size)
    print(f"seed {seed}: {with_orphans} of {kills} kills hit a save")
    assert with_orphans > 0


def test_naive_writer_loses_data_under_the_same_kills(tmp_path: Path) -> None:
    """The negative control: one file, written in place."""

    def naive(root: Path, progress: Progress) -> None:
        root.mkdir()
        for step in itertools.count(1):
            with open(root / "latest.safetensors", "wb") as file:
                files.write_safetensors(file.write, state(step, 20_000)["model"])
            progress.tell(step)

    rng = random.Random(1234)
    lost = 0
    for attempt in range(20):
        root = tmp_path / str(attempt)
        kill_at_random(lambda p, r=root: naive(r, p), rng)  # type: ignore[misc]
        try:
            files.read_safetensors(root / "latest.safetensors")
        except CheckpointError:
            lost += 1
    print(f"written in place: {lost} of 20 kills lost the only checkpoint")
    assert lost > 0


def test_readers_see_whole_checkpoints_while_the_writer_prunes(tmp_path: Path) -> None:
    progress = Progress()
    pid = start_child(lambda: saver(tmp_path, progress, "", keep=1))
    try:
        progress.wait()
        seen: list[int] = []
        until = time.monotonic() + 30.0
        while len(set(seen)) < 20 and time.monotonic() < until:
            found = load_newest(tmp_path, refuse_reports)
            assert found is not None
            assert equal(found.tensors, state(found.step))
            seen.append(found.step)
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_child(pid)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_LOCK_WAIT_S", 0.1)
    fd = os.open(tmp_path / files.LOCK, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    (tmp_path / ".tmp-9-1").mkdir()
    with pytest.raises(CheckpointError, match="another process is writing"):
        put(tmp_path, 2)
    must_hold(load_newest(tmp_path, refuse_reports), 1)
    assert ".tmp-9-1" in names(tmp_path)  # a live writer's
    os.close(fd)
    must_hold(load_newest(tmp_path, refuse_reports), 1)
    assert names(tmp_path) == ["step_0000001"]


def test_file_size_limit(tmp_path: Path) -> None:
    put(tmp_path, 1)
    out, into = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            put(tmp_path, 2)
        except CheckpointError as error:
            os.write(into, str(error).encode())

    assert wait_child(start_child(work)) == 0
    os.close(into)
    line = os.read(out, 4096).decode()
    os.close(out)
    assert "disk space" in line
    assert str(tmp_path / "step_0000002") in line
    assert "\n" not in line
    assert names(tmp_path) == ["step_0000001"]
    must_hold(load_newest(tmp_path, refuse_reports), 1)


@pytest.mark.parametrize("copies", [0, 1])
def test_saving_copies_nothing(tmp_path: Path, copies: int) -> None:
    """64 MB are written and read back with a few more; with a copy, as a control, they are not."""

    def work() -> None:
        tensors = {"x": torch.ones(1 << 23), "y": torch.ones(1 << 24, dtype=torch.bfloat16)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if copies:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        checkpoint.save(tmp_path, 1, {"model": tensors}, {}, 1)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert (grown > 40_000) if copies else (grown < 25_000), grown

    assert wait_child(start_child(work)) == 0
