"""Output that ends before the work does: a reader that has gone, a closed terminal, a full disk."""

from __future__ import annotations

import copy
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fpdm import checkpoint
from fpdm.process import lasting_output


def broken(kind: str) -> int:
    """A descriptor that cannot be written any more."""
    if kind == "disk":
        return os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("kind", ["reader", "terminal", "disk"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_cannot_be_written_is_dropped(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    stream = os.fdopen(broken(kind), "w")
    monkeypatch.setattr(sys, name, stream)
    with lasting_output():
        for _ in range(3):
            print("x" * 9000, file=getattr(sys, name), flush=True)
    assert getattr(sys, name) is stream
    # nothing is left that could fail when the interpreter ends
    stream.close()


def test_what_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output():
        print("shown", flush=True)
        print("told", file=sys.stderr)
    assert capsys.readouterr() == ("shown\n", "told\n")


CODE = """
import os, subprocess, sys
from fpdm.process import open_streams
open_streams()
print("no ü"); print("told", file=sys.stderr); sys.stdout.flush()
assert os.open({file!r}, os.O_WRONLY | os.O_CREAT) > 2
# a child has them too
code = "import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))"
assert subprocess.run([sys.executable, "-c", code], close_fds=False).returncode == 0
"""


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_were_closed(tmp_path: Path, closed: str) -> None:
    """A file that is opened next does not take their place."""
    code = CODE.format(file=str(tmp_path / "next"))
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if ">&-" in closed.split() else "no \\xfc\n")
    assert done.stderr == ("" if "2>&-" in closed else "told\n")


def test_a_stream_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to redirect: what cannot be written is lost, and no descriptor with it."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stdout", Broken())
    before = len(os.listdir("/proc/self/fd"))
    with lasting_output():
        for _ in range(20):
            print("x", flush=True)
        assert copy.copy(sys.stdout) is not None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_whose_reader_has_gone_is_saved(tmp_path: Path) -> None:
    """``train | tee log``, Ctrl-C: tee is gone before the step ends."""
    argv = ("--train.out", str(tmp_path), "--train.name", "run", "--train.log_every", "1",
            "--train.grid_every", "0", "--train.batch", "8", "--optim.lr_final", "none",
            "--train.steps", "100000")  # fmt: skip
    command = [sys.executable, "-m", "fpdm.train", "digits", *argv]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    child.stdout.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 1000):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 128 + signal.SIGINT
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == len(metrics.read_text().splitlines())
