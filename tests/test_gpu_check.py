"""bench/gpu_check.sh and bench.gpu without a GPU: what starts, what a failure and a hang leave, and
that no number is of something else than it says."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as bench
from bench import gpu, gpu_rows, machine, published, rows, timing
from fpdm import graphs
from fpdm.config import ModelConfig
from fpdm.settings import UserError

# records its arguments; writes what --out names; fails or ignores signals where asked to
STUB = r"""#!/usr/bin/env bash
# one write: two pieces run at a time
line="$(printf '%s\x1f' "$@")"
printf '%s\n' "$line" >>"$CALLS"
[ "$1" = -c ] && exit "${NO_DEVICE:-0}"
words="$*"
while [ $# -gt 0 ]; do
  [ "$1" = --out ] && case "$2" in *.json) echo '[]' >"$2" ;; esac
  shift
done
echo "words of $words"
case "$words" in *"${FAILS:-nothing}"*) exit 3 ;; esac
case "$words" in *"${HANGS:-nothing}"*) trap '' TERM; while :; do sleep 0.1; done ;; esac
exit 0
"""


@dataclass
class Check:
    """The script with stubs in the place of python and compute-sanitizer."""

    folder: Path
    status: int = 0
    said: list[str] = field(default_factory=list)

    def run(self, part: str, **variables: str) -> list[list[str]]:
        """The commands that were started, without the questions for modules."""
        tools, calls, self.out = self.folder / "bin", self.folder / "calls", self.folder / "out"
        tools.mkdir(exist_ok=True)
        for name, text in (("python3", STUB), ("compute-sanitizer", '#!/bin/sh\nshift 4; "$@"\n')):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        calls.write_text("")
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "CALLS": str(calls), "OUT": str(self.out), "JOBS": "2"}
        env.pop("PYTHON", None)
        done = subprocess.run(
            ["bash", machine.ROOT / "bench" / "gpu_check.sh", part],
            env={**env, **variables}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        self.status, self.said = done.returncode, done.stdout.splitlines()
        started = [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]
        return [words for words in started if words[0] != "-c"]

    def table(self) -> dict[str, str]:
        """Piece -> how it ended, from the last lines."""
        lines = self.said[len(self.said) - 1 - self.said[::-1].index("") + 1 : -1]
        return {line[:16].strip(): line[17:35].strip() for line in lines}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def test_a_piece_that_fails_is_told_and_the_rest_goes_on(check: Check) -> None:
    check.run("tables", FAILS="gemm_large")
    assert check.status == 1
    names = ("gemm", "gemm_large", "attention")
    assert check.table() == dict.fromkeys(names, "passed") | {"gemm_large": "exit 3"}
    assert check.said[-1].startswith("tables: 1 failed after")
    log = (check.out / "tables.log").read_text()
    assert all(f"== {name}:" in log for name in names)
    # words, results, and the tables that a run would have written
    assert {p.name for p in check.out.iterdir()} == {
        "tables.log", "gemm.json", "gemm_large.json", "attention.json", "tables.tar",
    }  # fmt: skip
    check.run("train")
    assert check.status == 0
    assert set(check.table().values()) == {"passed"}


def test_a_piece_that_hangs_is_killed_and_the_part_keeps_its_time(check: Check) -> None:
    """Deaf to SIGTERM: stopped when the part's time is over; the later ones have none."""
    check.run("train", HANGS="bench.gpu digits", BUDGET="3")
    assert check.status == 1
    ended = list(check.table().values())
    assert ended[0] == "passed"
    assert ended[1].startswith("stopped at ")
    assert ended[2:] == ["not started"] * 2
    assert check.said[-1].startswith("train: 3 failed after")
    # 3 s, 3 until SIGKILL, and a busy machine
    assert int(check.said[-1].split()[4]) <= 20


def test_without_a_device_nothing_passes(check: Check) -> None:
    assert check.run("tests", NO_DEVICE="1") == []
    assert check.status == 2
    assert check.run("everything") == []
    assert check.status == 2
    # numbers of no commit are no evidence
    nowhere = {"GIT_DIR": str(check.folder), "FPDM_COMMIT": ""}
    assert check.run("train", **nowhere) == []
    assert check.status == 2
    assert check.run("train", **{**nowhere, "FPDM_COMMIT": "abc"})


def parses(words: list[str]) -> None:
    """Raises for a command that its program does not understand, or that finds nothing to do."""
    assert words[0] == "-m"
    program, argv = words[1], words[2:]
    if program == "bench":
        args = bench.parser().parse_args(argv)
        assert bench.chosen(args)
        return
    module = __import__(program, fromlist=["main"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        if program == "bench.gpu":
            assert module.main(argv) == 2
            return
        with pytest.raises(UserError, match="got no CUDA device"):
            module.main(argv)


def test_every_command_of_the_script_parses(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = ("tests", "tables", "sample", "train", "compiled")
    found = []
    for part in parts:
        commands = check.run(part)
        found += commands
        # one file a piece, the log and the tables: as many as a lent machine gives back
        assert len(commands) + 2 <= 8
    pytests = [words for words in found if words[1] == "pytest"]
    assert len(found) == 5 + 3 + 5 + 4 + 3
    for words in found:
        if words not in pytests:
            parses(words)
    with pytest.raises(Exception, match="rows: got none"):
        parses(["-m", "bench", "--suite", "sampler", "--row", "B65.*compiled"])
    # two of the three run at a time: their order says nothing
    marks = {words[words.index("-m", 2) + 1]: words for words in pytests}
    alone = "gpu and not slow and alone"
    assert marks.keys() == {"gpu and not slow and not alone", "gpu and slow", alone}
    # what measures the device is found, and nothing of it among the others
    done = subprocess.run(
        [sys.executable, *marks[alone], "--collect-only", "-q"],
        cwd=machine.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_memory_pressure" in done.stdout
    assert "test_a_thousand_replays" not in done.stdout


class Counting:
    """A backend of fpdm.graphs whose replays run the work again."""

    loops = False

    def capture(self, work: Any) -> Any:
        return SimpleNamespace(replay=work, release=lambda: None)

    def release(self) -> None:
        pass


def test_replays_are_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any (n, m), not of the recipe's largest m alone; a launch under the name of a replay is an
    error."""
    monkeypatch.setattr(graphs, "backend_for", lambda device: Counting())
    how: dict[str, Any] = {"impl": "reference"}
    for pair in ((1, 1), (1, 2)):
        gpu.micro_step("digits", 2, pair, "fp32", "on", how, "cpu")
    gpu.micro_step("digits", 2, (1, 1), "fp32", "off", how, "cpu")
    # graphs of smaller pairs after one of the largest m
    run = gpu.micro_batches("digits", 2, (1, 2), "fp32", "on", how, "cpu")
    for pair in ((1, 2), (1, 2), (0, 1), (0, 1)):
        cache = run(*pair).graphs
    assert cache is not None
    assert (cache.captures, cache.replays) == (2, 2)

    def refuse(self: Any, work: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Counting, "capture", refuse)
    failed = pytest.warns(UserWarning, match="capture failed")
    with failed, pytest.raises(RuntimeError, match="got no replay"):
        gpu.micro_step("digits", 2, (1, 1), "fp32", "on", how, "cpu")


def test_a_replayed_arm_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses: without its work the buffers would go, and others get their memory."""

    class Buffers:
        pass

    def arm() -> tuple[Any, Any]:
        buffers = Buffers()
        return lambda: str(buffers), weakref.ref(buffers)

    nothing: Any = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        "is_available": lambda: True, "Stream": lambda: nothing, "current_stream": lambda: nothing,
        "stream": lambda stream: nullcontext(), "synchronize": lambda: None,
        "current_device": lambda: 0,
    }  # fmt: skip
    for name, stub in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    # a graph that knows nothing of its work
    graph = SimpleNamespace(replay=lambda: None)
    backend = SimpleNamespace(capture=lambda work: (work(), graph)[1])
    monkeypatch.setattr(timing, "CudaBackend", lambda device: backend)
    fn, buffers = arm()
    replay = timing.replayed(fn)
    del fn
    gc.collect()
    assert buffers() is not None
    replay()
    del replay
    gc.collect()
    assert buffers() is None


def test_an_arm_that_fails_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="none", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def part(report: gpu.Report) -> None:
        for arm in ("good", "bad"):
            with report.row(arm=arm) as found:
                found["ms"] = 1.0
                assert arm == "good"

    monkeypatch.setitem(gpu.PARTS, "syncs", part)
    assert gpu.main(["syncs", "--out", str(tmp_path)]) == 1
    good, bad = json.loads((tmp_path / "syncs.json").read_text())["rows"]
    assert good == {"arm": "good", "ms": 1.0}
    assert bad["error"].startswith("AssertionError")


def test_the_compiled_baseline_runs_the_compiled_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in sampling every iteration goes through what was compiled."""
    calls: list[str] = []

    def optimised(fn: Any, **how: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(fn.__name__)
            return fn(*args)

        return run

    monkeypatch.setattr(published, "optimised", optimised)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = ModelConfig(input_size=8, hidden_size=16, num_heads=2)
    s = rows.Setting("test", config, 2, torch.bfloat16, torch.device("cpu"))
    row = gpu_rows.training(s, [(1, 2)], "none", True, False)
    row.build().run["published compiled"]()
    assert calls.count("fixed_point_map") == 3
    calls.clear()
    gpu_rows.sampling(s, 1.0, True, steps=2, iters=3).build().run["published compiled"]()
    assert calls.count("fixed_point_map") == 2 * 3
    assert calls.count("_final") == 2


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Report:
    properties = SimpleNamespace(name="none", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return gpu.Report(tmp_path / "part.json")


def test_memory_beyond_its_limit_fails(report: gpu.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"full": 3.4, "elementwise": 9.1, "none": 14.0}
    monkeypatch.setattr(gpu, "published_peak", dict)
    monkeypatch.setattr(
        gpu, "peak_of_step", lambda *a, recompute, **k: {"peak_gb": peaks[recompute]}
    )
    gpu.memory(report)
    failed = {
        (r["model"], r["recompute"], r["chunks"]) for r in report.data["rows"] if "error" in r
    }
    assert failed == {("fpdm-xl-2", "elementwise", 4)}


@pytest.mark.parametrize(
    ("half", "bad"), [(0.4, False), (0.43, True), (0.37, True), (float("nan"), True)]
)
def test_digits_in_half_precision_follow_float32(
    report: gpu.Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, half: float, bad: bool
) -> None:
    from fpdm import train

    def trainer(config: Any) -> Any:
        loss = 0.4 if config.train.precision != "fp16" else half
        metrics = tmp_path / "metrics.jsonl"
        row = json.dumps({"loss": loss, "skipped": 0, "scale": 1.0})
        metrics.write_text((row + "\n") * 30)
        return SimpleNamespace(run=lambda: 300, directory=SimpleNamespace(metrics=metrics))

    monkeypatch.setattr(train, "Trainer", trainer)
    gpu.digits(report)
    assert ["error" in row for row in report.data["rows"]] == [False, False, bad]


def test_digits_that_a_signal_ends_are_no_result(
    report: gpu.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit's signal: the trainer saves and returns, and the piece must not go on."""
    from fpdm import train

    monkeypatch.setattr(train, "Trainer", lambda config: SimpleNamespace(run=lambda: 17))
    with pytest.raises(SystemExit, match="fp32: stopped at step 17 of 300"):
        gpu.digits(report)
    assert report.data["rows"] == []
