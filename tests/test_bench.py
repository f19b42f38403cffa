"""A planted slowdown is told and nothing else; bytes by hand; tables and page say what the JSON
says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as bench
from bench import (
    against,
    cost,
    machine,
    operators,
    page,
    processes,
    published,
    report,
    rows,
    suites,
    timing,
)
from fpdm.config import ConfigError, ModelConfig
from fpdm.kernels import implementations

CPU = torch.device("cpu")
# ten samples: two of them again are 1.2 times the loop
SETTING = rows.Setting("test", ModelConfig(hidden_size=192, num_heads=4), 10, torch.float32, CPU)
TINY = replace(SETTING, config=ModelConfig(input_size=8, hidden_size=16, num_heads=4))
PLANTED = "gate_residual_backward"


class Clock:
    """Seconds that operators spend, with the noise of a shared machine: every call takes up to a
    third longer, one in ten twice as long. Seeded, so that the tests always see the same noise."""

    def __init__(self, seed: int) -> None:
        self.now, self.random = 0.0, random.Random(seed)

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        slower = 1 + abs(self.random.gauss(0, 0.1))
        self.now += seconds * slower * (2 if self.random.random() < 0.1 else 1)

    def operators(self, factor: float) -> SimpleNamespace:
        """An operator set that computes nothing and takes a time by operator and sample."""

        def make(seconds: float) -> Callable[..., Tensor]:
            def call(x: Tensor, *_: Any, out: Tensor | None = None, **__: Any) -> Tensor:
                self.spend(seconds * factor * len(x))
                return x if out is None else out

            return call

        names = enumerate(operators.OPERATORS)
        return SimpleNamespace(**{name: make(1e-3 * (1 + i)) for i, name in names})


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Only the operators of one setting, on the clock above: ours and the plain ones."""
    clock = Clock(0)
    found = {"auto": clock.operators(1.0), "reference": clock.operators(2.5)}
    monkeypatch.setattr(timing, "time", clock)
    idle = SimpleNamespace(isenabled=bool, collect=int, disable=int)
    monkeypatch.setattr(timing, "gc", idle)
    monkeypatch.setattr(machine, "ceilings", lambda device: {"gemm float32": 1e11, "copy": 1e10})
    monkeypatch.setattr(suites, "cpu_rows", lambda: list(operators.operators(TINY)))
    monkeypatch.setattr(operators.implementations, "resolve", lambda impl, *_: found[impl])
    return found


def slowed(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fn`` whose loop over the batch runs 1.2 times."""

    def run(*args: Any, out: Tensor) -> Tensor:
        fn(*args, out=out)
        part = len(out) // 5
        fn(*(a[:part] if isinstance(a, Tensor) else a for a in args), out=out[:part])
        return out

    return run


def test_a_slow_loop_is_told(
    sets: dict[str, SimpleNamespace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    few = ["--rounds", "11", "--strict", "--processes", "1"]
    assert bench.main([*few, "--out", str(before)]) == 0
    found = json.loads(before.read_text())["rows"]
    ours = {r["name"].rsplit(" ", 1)[1]: r["arms"]["fpdm"]["best_s"] for r in found}
    assert 0.03 <= ours[PLANTED] / sum(ours.values()) <= 0.08
    # the control: nothing was planted, nothing is told, however often it is measured
    for _ in range(5):
        assert bench.main([*few, "--out", str(after), "--against", str(before)]) == 0
        assert "no row got slower" in capsys.readouterr().out
    setattr(sets["auto"], PLANTED, slowed(getattr(sets["auto"], PLANTED)))
    for _ in range(5):
        assert bench.main([*few, "--out", str(after), "--against", str(before)]) == 1
        told = [line for line in capsys.readouterr().out.splitlines() if "times slower" in line]
        assert len(told) == 1
        assert told[0].startswith(f"operators: {TINY.name} {PLANTED}: 1.")


@pytest.mark.slow
def test_a_slow_loop_is_told_of_a_real_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on one thread in processor time, beside itself and plain PyTorch."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=time.process_time))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = implementations.resolve("auto", CPU, torch.float32)
    slow = SimpleNamespace(**{**vars(ours), "attention": slowed(ours.attention)})
    v = operators.tensors(SETTING)
    sets = {"fpdm": ours, "plain PyTorch": implementations.resolve("reference", CPU), "again": ours,
            "planted": slow}  # fmt: skip
    arms = {name: operators.calls(o, v, 4)["attention"].fn for name, o in sets.items()}
    try:
        times = timing.interleave(arms, 61, seconds=120.0)
    finally:
        torch.set_num_threads(threads)

    def result(name: str) -> dict[str, Any]:
        plain = times["plain PyTorch"].best
        return {"rows": [row(plain / times[name].best)]}

    assert not against.slower(result("fpdm"), result("again"), 0.12)
    assert against.slower(result("fpdm"), result("planted"), 0.12)


def row(ratio: float, name: str = "a") -> dict[str, Any]:
    """A row against one baseline, which takes ``ratio`` times ours."""
    times = {"fpdm": 1.0, "plain PyTorch": ratio}
    arms = {
        n: {"median_s": 1e-3 * r, "best_s": 1e-3 * r, "spread": 0.01, "ratio": r}
        for n, r in times.items()
    }
    return {"suite": "operators", "name": name, "arms": arms, "missing": {}}


def test_what_slower_means() -> None:
    old = {"rows": [row(3.0), row(2.0, "b")]}
    assert not against.slower(
        old, {"rows": [row(3.0 / 1.11), row(2.5, "b"), row(1.0, "new")]}, 0.12
    )
    told = against.slower(old, {"rows": [row(2.5), row(2.0, "b")]}, 0.12)
    assert told == ["operators: a: 1.20 times slower against plain PyTorch"]


def test_what_slower_means_of_several_processes() -> None:
    """Best rounds and ratios have to say so."""

    def pooled(best: float, ratio: float) -> dict[str, Any]:
        found = row(best)
        for arm in found["arms"].values():
            arm["ratios"] = [arm["ratio"]] * 11
        found["arms"]["plain PyTorch"]["ratio"] = ratio
        return {"rows": [found]}

    old = pooled(3.0, 3.0)
    assert against.slower(old, pooled(2.5, 3.0), 0.12) == []
    assert against.slower(old, pooled(3.0, 2.5), 0.12) == []
    told = against.slower(old, pooled(2.0, 2.5), 0.12)
    assert told == ["operators: a: 1.20 times slower against plain PyTorch"]


def test_a_burst_is_measured_again_and_a_slowdown_stays() -> None:
    old, calls = {"rows": [row(3.0), row(3.0, "b")]}, []

    def again(ratio: float) -> Callable[[list[int]], list[dict[str, Any]]]:
        def measured(places: list[int]) -> list[dict[str, Any]]:
            calls.append(places)
            return [row(ratio, "ab"[i]) for i in places]

        return measured

    good = row(3.0, "b")
    assert against.confirm(old, [row(3.0), good], again(1.0), 0.12) == [row(3.0), good]
    assert calls == []
    assert against.confirm(old, [row(2.0), good], again(3.1), 0.12) == [row(3.1), good]
    assert calls == [[0]]
    assert against.confirm(old, [good, row(2.5, "b")], again(2.4), 0.12) == [good, row(2.5, "b")]
    assert calls == [[0], [1], [1]]

    def failing(places: list[int]) -> list[dict[str, Any]]:
        return [{**row(3.0), "arms": {}, "error": "no"} for _ in places]

    assert against.confirm(old, [row(2.0)], failing, 0.12) == [row(2.0)]


def test_how_many_ratios_agree() -> None:
    old = {"rows": [row(3.0), row(2.0, "b"), row(1.0, "gone")]}
    new = {"rows": [row(3.4), row(1.7, "b"), row(1.0, "new")]}
    assert against.agreement(old, new) == [
        "1 of 2 ratios agree within 15%", "operators: b: plain PyTorch 1.70x, was 2.00x"
    ]  # fmt: skip


def test_compare_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"rows": [row(3.0)]}))
    after.write_text(json.dumps({"rows": [row(2.0)]}))
    options = ["--compare", "--out", str(after)]
    assert bench.main([*options, "--against", str(before)]) == 1
    told = capsys.readouterr().out
    assert "0 of 1 ratios agree" in told
    assert "1.50 times slower" in told
    with pytest.raises(ConfigError, match="expected a JSON file or a commit"):
        bench.main(options)


def test_processes_are_pooled_by_their_middle() -> None:
    """Of a baseline with two modes the range is told, of one outlier among seven it is not."""
    ceilings = {"gemm float32": 1e12, "copy": 1e9}
    counts = {"bytes": 1e6, "flops": 0, "dtype": "float32", "rounds": 7}

    def pooled(ratios: tuple[float, ...]) -> dict[str, Any]:
        return processes.pool([{**row(r), **counts} for r in ratios], ceilings)

    found = pooled((3.0, 4.2, 3.1, 4.4, 3.2, 3.1, 3.0))
    arm = found["arms"]["plain PyTorch"]
    assert arm["ratio"] == pytest.approx((3.0 + 3.1 + 3.1 + 3.2 + 4.2) / 5)
    assert (found["rounds"], found["copy_share"]) == (49, 1.0)
    assert arm["ratios"] == [3.0, 4.2, 3.1, 4.4, 3.2, 3.1, 3.0]
    assert report.times(arm) == "3.32x (3.00 to 4.40)"
    assert [processes.middle(v) for v in ([1.0, 2.0], [5.0, 1.0, 9.0])] == [1.5, 5.0]
    assert report.times(pooled((3.0, 14.0, *(3.0,) * 5))["arms"]["plain PyTorch"]) == "3.00x"
    failed = {**row(1.0), "error": "no kernel"}
    assert processes.pool([row(1.0), failed], ceilings) is failed


def test_a_process_that_dies_leaves_rows_that_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    out = tmp_path / "bench.json"
    options = ["--suite", "operators", "--row", "gelu$", "--out", str(out)]
    assert bench.main(options) == 1
    found = json.loads(out.read_text())["rows"]
    assert len(found) == 8
    assert all("its process ended with 1" in row["error"] for row in found)
    with pytest.raises(RuntimeError, match="its process ended with 1"):
        bench.main([*options, "--strict"])


def test_each_process_is_a_fresh_one(tmp_path: Path) -> None:
    """A row by its whole name, in two processes that tell the same implementation."""
    out = tmp_path / "bench.json"
    options = ["--suite", "operators", "--row", "^digits B64 float32 gelu$", "--rounds", "5"]
    assert bench.main([*options, "--strict", "--processes", "2", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["rows"]
    arm = found["arms"]["plain PyTorch"]
    assert len(arm["ratios"]) == 2
    assert arm["ratio"] == sum(arm["ratios"]) / 2
    assert found["rounds"] == 10
    assert found["impl"] == implementations.choose("auto", "cpu", torch.float32)


def test_against_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match="expected a JSON file or a commit"):
        against.load("no-such-file-or-commit", machine.name())


def test_a_baseline_that_fails_leaves_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel here")

    arms = rows.Arms({"fpdm": lambda: None, "other": broken, "absent": "not installed"})
    found = bench.run_row(rows.Row("data", "a", lambda: arms), 5, {})
    assert list(found["arms"]) == ["fpdm"]
    assert found["missing"] == {"other": "RuntimeError: no kernel here", "absent": "not installed"}
    skipped = bench.run_row(suites.skipped("data", "b", "too slow"), 5, {})
    assert report.reason(skipped) == "not measured: too slow"


def test_a_first_call_that_compiles_is_no_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second once, then 0.1 ms: twenty calls are 2 ms, and 200 the 20 ms of a GPU."""
    now, calls = [0.0], [0]

    def compiled() -> None:
        now[0] += 1e-4 if calls[0] else 0.5
        calls[0] += 1

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert timing.inner_calls(compiled) == 20
    monkeypatch.setattr(timing, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert timing.inner_calls(compiled, warmed=True) == 200
    assert calls == [3]


def test_rows_are_bounded_in_time() -> None:
    calls: list[int] = []
    times = timing.interleave({"a": lambda: calls.append(0)}, 1000, seconds=0.0)
    assert len(times["a"].rounds) == timing.LEAST


def test_rounds_go_on_until_the_ratio_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    drawn = random.Random(0)

    def arm(seconds: float, noise: float) -> timing.Arm:
        def run() -> None:
            clock[0] += seconds * (1 + noise * drawn.gauss())

        return run

    def rounds(noise: float, known: float, most: int = 99) -> int:
        arms = {"fpdm": arm(1.0, 0.0), "steady": arm(2.0, 0.0), "other": arm(2.0, noise)}
        times = timing.interleave(arms, most, 1e9, known)
        if len(times["other"].rounds) < most:
            assert timing.doubt(times["other"].rounds, times["fpdm"].rounds) <= known
        return len(times["fpdm"].rounds)

    assert rounds(0.001, 0.04) == timing.LEAST
    assert timing.LEAST < rounds(0.1, 0.04) < 99
    assert rounds(0.1, 0.04, most=7) == 7
    assert rounds(0.001, 0.0, most=20) == 20


@pytest.mark.parametrize(
    ("name", "units"),
    [("adaln", 2), ("adaln_backward", 4), ("gate_residual", 3), ("gate_residual_backward", 3),
     ("gate_residual_adaln", 4), ("gelu", 8), ("gelu_backward", 12), ("linear_add_gelu", 9),
     ("linear_wgrad", 5), ("attention", 4), ("attention_backward", 8)],
)  # fmt: skip
def test_bytes_of_an_operator(name: str, units: int) -> None:
    """Hand count in units of B T D elements, beside weights and vectors of each sample."""
    s = replace(SETTING, batch=3)
    call = operators.calls(None, operators.tensors(s), 4)[name]
    t, d = s.config.tokens, s.config.hidden_size
    weights = {"linear_add_gelu": 4 * d * d + 4 * d, "linear_wgrad": 2 * (4 * d * d + 4 * d)}
    vectors = {"adaln": 2, "adaln_backward": 5, "gate_residual": 1, "gate_residual_backward": 3,
               "gate_residual_adaln": 3}  # fmt: skip
    beside = weights.get(name, 0) + vectors.get(name, 0) * s.batch * d
    assert call.bytes == 4 * (units * s.batch * t * d + beside)


def test_the_parts_of_an_iteration_add_up() -> None:
    """Their FLOPs and, up to vectors and buffers shared between two parts, their bytes."""
    s = replace(SETTING, batch=2)
    found = [r.build() for r in operators.iteration(s)]
    parts, whole = found[:-1], found[-1]
    assert len(parts) == len(operators.PARTS)
    assert sum(p.flops for p in parts) == whole.flops == cost.flops(cost.iteration(s.config, 2))
    # proj writes z' and the next adaln's result, which the count writes and reads as one of two
    assert sum(p.bytes for p in parts) == pytest.approx(whole.bytes, rel=0.06)


def test_every_operator_has_a_row() -> None:
    found = operators.calls(None, operators.tensors(TINY), TINY.config.num_heads)
    assert tuple(found) == operators.OPERATORS


def test_the_page_holds_every_picture_and_needs_no_other_file(
    sets: dict[str, SimpleNamespace], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    few = ["--rounds", "5", "--strict", "--processes", "1"]
    assert bench.main([*few, "--out", str(out)]) == 0
    counted = report.load(machine.ROOT / "bench" / "results")[1]
    result = json.loads(out.read_text())
    names = {
        "network": [f"S/2 B2 float32 k={k}" for k in (1, 4, 16)],
        "sampler": [f"digits B{b} float32 S=5 k=3 guidance 1" for b in (1, 8)],
        "training": ["S/2 B2 float32 n=1 m=3 full"],
        "iteration": [f"S/2 B2 float32 {p}" for p in (*operators.PARTS, "whole")],
    }
    for suite, some in names.items():
        for k, name in zip((1, 4, 16, *range(5)), some):
            arms = row(2.0)["arms"]
            arms["fpdm"]["peak_bytes"] = 1000
            result["rows"].append({"suite": suite, "name": name, "arms": arms, "missing": {},
                                   "k": k, "images": 2, "flops": 10, "bytes": 10,
                                   "dtype": "float32"})  # fmt: skip
    result["rows"].append({"suite": "data", "name": "a<b", "arms": {}, "missing": {"fpdm": "no"}})
    text = page.page(result, counted)
    for title in ("At a glance", "Parts of an iteration", "Cost against k", "Images per second",
                  "Memory", "Other devices", "Operators", "Not measured"):  # fmt: skip
        assert f"<h2>{title}" in text
    assert text.count("<img") == text.count('src="data:image/svg+xml;base64,') == text.count("src=")
    assert "http" not in text
    assert "a&lt;b" in text
    for r in result["rows"][:-1]:
        assert f"<td>{r['name']}</td>" in text
    # the tables tell the machine, and a result of one suite has a page too
    tables = report.document([result], counted)
    assert f"commit {result['commit']}" in tables
    assert "| S/2 B2 float32 n=1 m=3 full | 1 ms ±1% | 2.00x |" in tables
    one = {**result, "rows": [r for r in result["rows"] if r["suite"] == "training"]}
    for title in ("Cost against k", "Operators against their floor"):
        assert f"<h2>{title}</h2><p class=note>Not measured" in page.page(one, None)
        assert f"<h2>{title}</h2><p class=note>Not measured" not in text


def test_what_other_programs_take_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A child that was not waited for is another program; our own work is none."""
    others = machine.Others()
    spin = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"]
    with subprocess.Popen(spin) as child:
        while child.poll() is None and time.perf_counter() - others.began[0] < 30:
            time.sleep(0.01)
            share = others.share()
            seconds = time.perf_counter() - others.began[0]
        assert share is not None
        assert share * seconds * (os.cpu_count() or 1) > 0.2
    clock = iter([(10.0, 1.0), (13.0, 2.5)])
    busy, own = zip(*clock)
    for name, values in (("_busy", busy), ("_own", own)):
        monkeypatch.setattr(machine, name, iter(values).__next__)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 1.5]).__next__)
    # 3 s of processors were busy, 1.5 of them ours, of the 3 that there were
    assert machine.Others().share() == 0.5
    monkeypatch.undo()
    monkeypatch.setattr(machine.Others, "share", lambda self: 0.25)
    out = tmp_path / "bench.json"
    few = ["--suite", "optimizer", "--row", "digits", "--rounds", "1", "--processes", "1"]
    assert bench.main([*few, "--out", str(out)]) == 0
    assert "optimizer, digits cpu: other programs took 25% of the processors" in (
        capsys.readouterr().out
    )
    result = json.loads(out.read_text())
    assert (result["others"], result["rows"][0]["others"]) == (0.25, 0.25)
    assert "; other programs took 25% of the processors" in report.document([result], None)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_busy", lambda: None)
    assert machine.Others().share() is None


def test_a_compiled_baseline_never_goes_on_uncompiled() -> None:
    """Three shapes where two may be compiled; torch alone would run the third in eager."""
    config = torch._dynamo.config

    def run(compiled: Callable[[Tensor], Tensor]) -> None:
        torch._dynamo.reset()
        for n in (2, 3, 4):
            assert compiled(torch.ones(n)).shape == (n,)

    how: dict[str, Any] = {"backend": "eager", "dynamic": False}
    with config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        run(torch.compile(lambda x: x + 1, **how))
        with pytest.raises(Exception, match="recompile_limit"):
            run(published.optimised(lambda x: x + 1, **how))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--compare --against x --row zzz", "--row: got zzz, expected it with a measurement only"),
        ("--compare --against x --rounds 3", "--rounds: got 3, expected it with a measurement"),
        ("--render --against nosuch", "--against: got nosuch, expected it with a measurement only"),
        ("--render --suite data network", "--suite: got data network, expected it with"),
        ("--count --render", "--render: got True, expected it with a measurement only"),
        ("--count --threads 1", "--threads: got 1, expected it with a measurement only"),
        ("--tolerance 0.2 --suite data", "--tolerance: got 0.2, expected it with --against only"),
    ],
)
def test_options_that_a_mode_would_ignore(argv: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        bench.main(argv.split())


def test_suites_are_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--suite", "operatros", "data"])
    assert "invalid choice: 'operatros'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {row.suite for row in (*suites.cpu_rows(), *bench.gpu_rows.rows())}
    assert found <= set(bench.SUITES)
