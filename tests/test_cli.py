from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import fpdm
from fpdm import __main__ as main
from fpdm import data, request
from fpdm.cli import run_main, stoppable, take_option
from fpdm.config import ConfigError, SamplerConfig
from fpdm.distributed import PeerError
from fpdm.recipes import load_config


def ends(
    capsys: pytest.CaptureFixture[str], fn: Any, argv: tuple[str, ...] = ()
) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.x", fn, argv)
    return left.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Any:
    def fn(argv: list[str]) -> NoReturn:
        raise error

    return fn


def test_the_users_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    told = ends(capsys, raising(ConfigError("train.batch: got 0,\n  expected 1")))
    assert told == (2, "fpdm.x: error: train.batch: got 0, expected 1\n")


def test_the_systems_error_names_the_file_and_is_status_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(argv: list[str]) -> None:
        Path(argv[0]).write_text("x")

    told = ends(capsys, write, ("/nowhere/at/all",))
    assert told == (1, "fpdm.x: error: /nowhere/at/all: No such file or directory\n")
    full = OSError(28, os.strerror(28))
    assert ends(capsys, raising(full)) == (1, "fpdm.x: error: No space left on device\n")
    two = OSError(18, "no link", "a", None, "b")
    assert ends(capsys, raising(two)) == (1, "fpdm.x: error: a -> b: no link\n")


def test_an_interrupt_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(capsys, raising(KeyboardInterrupt())) == (130, "fpdm.x: interrupted\n")


def test_what_to_do_about_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    """By SIGTERM too, inside; outside the handler is the old one, and other errors pass."""
    handler = signal.getsignal(signal.SIGTERM)

    def stopped(argv: list[str]) -> None:
        with stoppable("do it again"):
            if argv[0] == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            raise ConfigError("x") if argv[0] == "x" else KeyboardInterrupt

    for how in ("SIGTERM", "Ctrl-C"):
        told = ends(capsys, stopped, (how,))
        assert told == (130, "fpdm.x: interrupted; do it again\n")
        assert signal.getsignal(signal.SIGTERM) == handler
    assert ends(capsys, stopped, ("x",)) == (2, "fpdm.x: error: x\n")
    # another thread has no handlers
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError):
        pool.submit(stopped, ["x"]).result()


def test_statuses_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(capsys, lambda argv: None) == (0, "")
    assert ends(capsys, lambda argv: 3) == (3, "")
    assert ends(capsys, raising(SystemExit(4))) == (4, "")


def test_a_warning_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of fpdm; what others say goes its usual way."""
    usual: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda text, *rest: usual.append(str(text)))
    inside, outside = (compile(WARNING, f"{home}/x.py", "exec") for home in (HOME, "/nowhere"))

    def warn(argv: list[str]) -> None:
        exec(inside, {"text": "a.b: got 1,\n  expected 2"})
        exec(outside, {"text": "elsewhere"})

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert ends(capsys, warn) == (0, "fpdm.x: warning: a.b: got 1, expected 2\n")
        assert usual == ["elsewhere"]
        exec(inside, {"text": "after the command"})
    assert usual[1:] == ["after the command"]


def test_torchrun_is_told_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the form that ``torch.distributed.elastic`` reads; the earliest is its root cause."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def recorded(error: Exception) -> ProcessFailure:
        code = 1
        try:
            code, _ = ends(capsys, raising(error))
        except RuntimeError:
            capsys.readouterr()
        return ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))

    failure = recorded(ConfigError("a.b: got 1,\n  expected 2"))
    consequence = recorded(PeerError("rank 1 failed"))
    told: Any = failure.message
    assert told["message"] == "fpdm.x: error: a.b: got 1, expected 2"
    assert ChildFailedError("x", {0: consequence, 1: failure}).get_first_failure()[0] == 1
    assert "fpdm.x: error: a.b: got 1" in str(ChildFailedError("x", {0: failure}))
    bug: Any = recorded(RuntimeError("a bug")).message
    assert "Traceback" in bug["extraInfo"]["py_callstack"]
    file.unlink()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/at/all")
    assert ends(capsys, raising(ConfigError("x"))) == (2, "fpdm.x: error: x\n")
    assert ends(capsys, lambda argv: None)[0] == 0


HOME = Path(fpdm.__file__).parent
WARNING = "import warnings; warnings.warn(text)"


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("no number")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_main("fpdm.x", raising(error), ())
    assert caught.value is error


def run_python(code: str, *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv], text=True, capture_output=True, timeout=60, **kwargs
    )


def test_a_real_process_exits_2_with_one_line() -> None:
    code = (
        "import sys; from fpdm.cli import run_main; from fpdm.recipes import load_config\n"
        "run_main('fpdm.train', lambda argv: print(load_config(argv[0], argv[1:]).recipe))"
    )
    done = run_python(code, "digits", "--train.batch", "many")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fpdm.train: error: train.batch: got 'many', ")
    assert done.stderr.count("\n") == 1
    # control: without the mistake it runs
    done = run_python(code, "digits", "--train.batch", "8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "digits\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_and_a_closed_pipe_are_quiet() -> None:
    code = "from fpdm.cli import run_main; run_main('fpdm.x', lambda argv: print('x' * 9))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "fpdm.x: error: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_take_option() -> None:
    assert take_option("--a", ["x", "--a", "1", "--b", "2"]) == ("1", ["x", "--b", "2"])
    assert take_option("--a", ["--a=1", "--a=2"]) == ("2", [])
    assert take_option("--a", ["--ab", "1"]) == (None, ["--ab", "1"])
    for argv in (["--a"], ["--a", "--b"]):
        with pytest.raises(ConfigError, match="--a: got no value"):
            take_option("--a", argv)


def test_texts_of_any_kind() -> None:
    for text in ("--x", "-", "", "=", "a b", "none"):
        assert load_config("digits", [f"--train.name={text}"]).train.name == text


@pytest.mark.parametrize("module", ["fpdm.train", "fpdm.evaluate"])
def test_every_option_is_explained(module: str) -> None:
    """Its default alone is no help."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], text=True, capture_output=True, timeout=60
    )
    lines = [line.strip("│ ") for line in done.stdout.splitlines()]
    options = [i for i, line in enumerate(lines) if line.startswith("--") and lines[i - 1] != ""]
    bare = [lines[i] for i in options if lines[i + 1].startswith("(default")]
    assert len(options) > 20
    assert bare == []


def test_every_option_of_argparse_is_explained() -> None:
    parsers = [request.parser()]
    (commands,) = data._parser()._subparsers._group_actions  # type: ignore[union-attr]
    parsers += commands.choices.values()  # type: ignore[union-attr,arg-type]
    actions = [action for parser in parsers for action in parser._actions]
    assert len(actions) > 40
    assert [action.dest for action in actions if not action.help] == []


def test_mistakes_that_argparse_finds() -> None:
    def told(*argv: str) -> str:
        with pytest.raises(ConfigError) as caught:
            request.parser().parse_args([*argv])
        return str(caught.value)

    assert told("--steps", "many") == "steps: got 'many', expected an integer"
    assert told("--tol", "x") == "tol: got 'x', expected a finite number"
    near = "reuse: got 'ful', expected one of none, full, blend, extrapolate; did you mean full?"
    assert told("--reuse", "ful") == near
    assert told("runs/a", "runs/b") == "got 'runs/b', expected no more than --help names"
    assert "did you mean --budget-macs?" in told("--budget-mac", "3")
    assert request.parser().parse_args(["--budget_macs", "1e9"]).budget_macs == 1e9
    with pytest.raises(ConfigError, match=r"unknown option --dtipe; did you mean --dtype\?"):
        data._parser().parse_args(["convert-fastdit", "a", "b", "c", "--dtipe", "float16"])


def test_a_new_cost_replaces_the_old_one(tmp_path: Path) -> None:
    sampled = load_config("digits", ["--sample.budget", "100"]).sample
    assert (sampled.iters, sampled.budget) == (None, 100)
    assert load_config("digits", ["--sample.steps", "5"]).sample.iters == 3
    file = tmp_path / "x.yaml"
    file.write_text("recipe: digits\nsample: {budget: 100}\n")
    sampled = load_config(str(file)).sample
    assert (sampled.iters, sampled.budget) == (None, 100)


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main.main([])
    told = capsys.readouterr().out
    assert all(f"python -m fpdm.{name} " in told for name in main.COMMANDS)
    with pytest.raises(ConfigError, match=r"got trian, expected .*; did you mean train\?"):
        main.main(["trian"])
    done = subprocess.run(
        [sys.executable, "-m", "fpdm", "evaluate", "--sets", "x"],
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "fpdm.evaluate: error: sets: got 'x', expected an integer\n"


def test_options_of_a_single_section() -> None:
    from fpdm.cli import parse_options

    parsed = parse_options(SamplerConfig(), ["--steps", "5", "--schedule", "1", "2"], "fpdm.sample")
    assert parsed == SamplerConfig(steps=5, schedule=(1, 2))
    with pytest.raises(ConfigError, match="unknown option --step; did you mean --steps"):
        parse_options(SamplerConfig(), ["--step", "5"], "fpdm.sample")
    with pytest.raises(ConfigError, match=r"sample\.steps: got 0, expected at least 1$"):
        parse_options(SamplerConfig(), ["--steps", "0"], "fpdm.sample")


def test_a_narrow_terminal_does_not_cut_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(ConfigError) as caught:
        load_config("digits", ["--train.batch", "10", "--train.accumulate", "3"])
    assert str(caught.value) == "train.batch: got 10, expected a multiple of train.accumulate = 3"
