"""What every command shares: options from a dataclass of settings, and how a command ends.

Exit status: 0 done; 2 the user can mend it (``prog: error: ...``, one line); 1 the system refused a
file; 130 interrupted (``stoppable``: by SIGTERM too). A traceback means a bug. Warnings of fpdm are
``prog: warning: ...``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import textwrap
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar

from fpdm import settings
from fpdm.process import drop, keep_freed_memory, open_streams
from fpdm.settings import ConfigError, UserError

T = TypeVar("T")


def run_main(
    prog: str, fn: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs ``fn(argv)`` (default ``sys.argv[1:]``) and exits with its status.

    A UserError, an OSError and an interrupt become one line on stderr; anything else keeps its
    traceback.
    """
    open_streams()
    keep_freed_memory()
    try:
        with _warnings_of(prog), _recorded(prog):
            status = fn(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except UserError as error:
        status = _tell(prog, f"error: {error}", 2)
    except BrokenPipeError:
        status = 1  # the reader has left (``| head``)
        # the interpreter flushes once more at exit, which must not fail a second time
        drop(sys.stdout)
    except OSError as error:
        if error.errno is None:
            raise  # a library's own use of the class, not the system's
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        where = " -> ".join(names)
        what = f"{where}: {error.strerror}" if where else str(error.strerror)
        status = _tell(prog, f"error: {what}", 1)
        drop(sys.stdout)
    except KeyboardInterrupt as error:
        status = _tell(prog, f"interrupted{f'; {error}' if error.args else ''}", 130)
    sys.exit(status)


@contextlib.contextmanager
def _recorded(prog: str) -> Iterator[None]:
    """An error goes into the file that torchrun names, too: its summary, the last lines on the
    screen, shows what stands there instead of how to get a traceback."""
    try:
        yield
    except Exception as error:
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            known = isinstance(error, UserError)
            told = f"{prog}: error: {_line(str(error))}" if known else traceback.format_exc()
            # the earliest is the root cause there, in whole seconds
            when = int(time.time()) + getattr(error, "consequence", False)
            extra = {"py_callstack": told, "timestamp": str(when)}
            with contextlib.suppress(OSError), open(path, "w") as file:
                json.dump({"message": {"message": told, "extraInfo": extra}}, file)
        raise


@contextlib.contextmanager
def _warnings_of(prog: str) -> Iterator[None]:
    """A UserWarning that fpdm gives is one line, without the line of code that it came from."""
    show, home = warnings.showwarning, os.path.dirname(__file__)

    def told(
        message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any
    ) -> None:
        if category is UserWarning and filename.startswith(home):
            _tell(prog, f"warning: {message}", 0)
        else:
            show(message, category, filename, *where, **more)

    warnings.showwarning = told
    try:
        yield
    finally:
        warnings.showwarning = show


def _tell(prog: str, message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"{prog}: {_line(message)}", file=sys.stderr, flush=True)
    return status


def _line(message: str) -> str:
    return " ".join(message.split())


@contextlib.contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does, and the command's one line says ``advice`` too."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = None
    with contextlib.suppress(ValueError):  # of a thread that is not the main one
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def take_option(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The last value of ``--name value`` or ``--name=value`` in ``argv``, and the rest."""
    value, rest, tokens = None, [], iter(argv)
    for token in tokens:
        if token == name:
            value = next(tokens, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{name}: got no value")
        elif token.startswith(name + "="):
            value = token[len(name) + 1 :]
        else:
            rest.append(token)
    return value, rest


def given_names(argv: Iterable[str]) -> list[str]:
    """The options in ``argv`` as fields are called: ``--sample.guidance-low=0`` is
    ``sample.guidance_low``."""
    names = [token[2:].partition("=")[0] for token in argv if token.startswith("--")]
    return [name.replace("-", "_") for name in names]


def unknown_option(token: str, known: Iterable[str]) -> ConfigError:
    """What to raise for an option (``--name`` or ``--name=value``) that is none of ``known``."""
    name = token.partition("=")[0]
    near = settings.suggest(name.lstrip("-"), [k.lstrip("-") for k in known], prefix="--")
    return ConfigError(f"unknown option {name}{near}")


class Parser(argparse.ArgumentParser):
    """Mistakes become one ConfigError, like every other mistake of a user; ``--a_b`` is ``--a-b``,
    as it is for ``parse_options``."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values; ConfigError for an option or a position that is none."""
        given, tokens = sys.argv[1:] if args is None else args, []
        known = dict(self._option_string_actions)
        commands: Any = self._subparsers._group_actions if self._subparsers else ()
        for name, command in ((n, c) for action in commands for n, c in action.choices.items()):
            known |= command._option_string_actions if name in given else {}
        for token in given:
            if token.startswith("--"):
                name, equals, value = token.partition("=")
                # before argparse, which takes the value of an unknown option for a position
                if (dashed := name.replace("_", "-")) not in known:
                    raise unknown_option(token, known)
                token = dashed + equals + value
            tokens.append(token)
        found, rest = super().parse_known_args(tokens, namespace)
        if rest:
            raise ConfigError(f"got {' '.join(rest)!r}, expected no more than --help names")
        return found

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            kind = settings.describe(action.type) if action.type in (int, float) else "another"
            raise ConfigError(f"{_named(action)}: got {text!r}, expected {kind}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            near = settings.suggest(str(value), choices)
            raise ConfigError(
                f"{_named(action)}: got {value!r}, expected one of {', '.join(choices)}{near}"
            )

    def error(self, message: str) -> NoReturn:
        """Whatever else argparse finds."""
        raise ConfigError(message)


COST = ("iters", "budget", "budget_macs")


def replace_cost(argv: Sequence[str]) -> list[str]:
    """``argv`` in which a cost of ``sample`` that is given (``--sample.budget 100``) takes the
    place of the one that was there: exactly one may be left."""
    others = [name for name in COST if f"sample.{name}" not in given_names(argv)]
    if len(others) == len(COST):
        return list(argv)
    return [*(token for name in others for token in (f"--sample.{name}", "none")), *argv]


def _named(action: argparse.Action) -> str:
    return (action.option_strings or [action.dest])[-1].lstrip("-")


def parse_options(
    default: T,
    argv: Sequence[str],
    prog: str,
    extra: Mapping[str, str] = MappingProxyType({}),
    fixed: Sequence[str] = (),
    about: str = "",
) -> T:
    """``default`` (a dataclass, sections allowed) with ``--section.key value`` and ``--key=value``.

    ``extra`` are options that the caller has taken already (name: its help), for suggestions and
    the help, which begins with ``about``; ``fixed`` are fields that are no options. Raises
    ConfigError of one line, also for what is given and would be ignored (``settings.used``);
    ``--help`` prints the options with their present values and exits.
    """
    if not argv:
        return default
    import tyro

    kind: Any = type(default)
    fields = {name: hint for name, hint in settings.hints(kind).items() if name not in fixed}
    now = {name: getattr(default, name) for name in fields}
    helps = {f.name: f.metadata.get("help") for f in dataclasses.fields(kind)}
    shown: list[Any] = [
        (
            name,
            typing.Annotated[hint, tyro.conf.arg(help=helps[name])] if helps[name] else hint,
            dataclasses.field(default=now[name]),
        )
        for name, hint in fields.items()
    ]
    options = dataclasses.make_dataclass("Options", shown, frozen=True)
    args = _tokens(argv, _leaves(fields, now), extra)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            parsed: Any = tyro.cli(
                options,
                prog=prog,
                description=about + "\n".join(map(_paragraph, extra.items())),
                args=args,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(_sentence(told.getvalue())) from None
    found = {name: getattr(parsed, name) for name in fields}
    return settings.used(dataclasses.replace(default, **found), given_names(argv))  # type: ignore[type-var]


def _paragraph(option: tuple[str, str]) -> str:
    return textwrap.fill(" ".join(option), 80, subsequent_indent="    ", break_on_hyphens=False)


def _leaves(hints: dict[str, Any], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted option name -> annotation."""
    out: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            section = values[name]
            inner = settings.hints(type(section))
            out.update(_leaves(inner, {n: getattr(section, n) for n in inner}, f"{prefix}{name}."))
        else:
            out[prefix + name] = hint
    return out


def _tokens(argv: Sequence[str], known: dict[str, Any], extra: Mapping[str, str]) -> list[str]:
    """``argv`` checked, in the spelling of tyro: underscores in names, True, False and None."""
    args: list[str] = []
    for name, values in _grouped(argv, known, extra):
        if name == "help":
            return ["--help"]
        hint = known[name]
        read = [_read(value, hint) for value in values]
        if typing.get_origin(hint) is tuple:
            settings.coerce(name, hint, read)
        elif len(read) == 1:
            settings.coerce(name, hint, read[0])
        else:
            got = " ".join(values) or "no value"
            raise ConfigError(f"{name}: got {got}, expected {settings.describe(hint)}")
        # a text may begin with dashes
        args += [f"--{name}={read[0]}"] if hint is str else [f"--{name}", *map(str, read)]
    return args


def _grouped(
    argv: Sequence[str], known: dict[str, Any], extra: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """Option names, checked, each with its values."""
    groups: list[tuple[str, list[str]]] = []
    for token in argv:
        if token in ("-h", "--help"):
            return [("help", [])]
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            if name not in known:
                taken = [option for names in extra for option in names.split(", ")]
                raise unknown_option(token, [*known, *taken])
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise ConfigError(f"got {token!r}, expected --section.key value")
    return groups


def _read(text: str, hint: Any) -> Any:
    """What YAML would make of ``text``, where ``hint`` is not text itself."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text)
    except ValueError:
        return text


def _sentence(box: str) -> str:
    """The first paragraph of an error box of tyro, on one line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip().strip("│").strip()
        if not text or set(text) <= set("─╰╯"):
            break
        lines.append(text)
    message = " ".join(lines) or " ".join(box.split())
    # a section refused its fields, which it names itself
    return message.partition(": ")[2] if message.startswith("Error parsing ") else message
