"""Typed settings from Python, YAML and text: the machinery under ``fpdm.config``.

It knows no setting by name. Values are checked against the annotations of a frozen dataclass; what
does not fit is a ConfigError of one line that says what was got and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can mend: one line that says what was got and what was expected.

    Commands print it without a traceback and exit with status 2. ``consequence``: of an error of
    another process, which tells the cause.
    """

    consequence: ClassVar[bool] = False


class ConfigError(UserError):
    """A setting that cannot be met."""


def integer(value: object) -> int | None:
    """``value`` as an integer, numpy's or a tensor's too; None for a bool and for what is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def one_line(error: Exception, most: int = 200) -> str:
    """What an error of somebody else's says, on one line, or its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class Settings:
    """Base of a frozen dataclass of settings: every value fits its annotation, then ``check``.

    ints are accepted as floats, lists as tuples, NumPy scalars as numbers; NaN and Inf are refused.
    """

    section: ClassVar[str] = ""
    modes: ClassVar[tuple[str, ...]] = ()  # as of ``needs``, for every field

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = coerce(f"{self.section}.{name}", hint, getattr(self, name))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """What annotations cannot say. Raises ConfigError."""

    def require(self, ok: bool, names: str, expected: str) -> None:
        """Raises ConfigError for the fields in ``names`` ("a, b") unless ``ok``."""
        if not ok:
            got = ", ".join(str(getattr(self, name)) for name in names.split(", "))
            raise ConfigError(f"{self.section}.{names}: got {got}, expected {expected}")

    def at_least(self, bound: float, *names: str) -> None:
        """Raises ConfigError for the first of ``names`` below ``bound``; None passes."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= bound, name, f"at least {bound}")


def needs(default: T, *modes: str) -> T:
    """The default of a field that does something in some modes only, of which all must be on:
    "reuse=blend" (a field of its own section), "data.kind=images|latents", "guidance!=1",
    "a.b=c or d.e=f"."""
    return dataclasses.field(default=default, metadata={"needs": modes})


def idle(kind: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Settings whose mode is off, by dotted name, each with the modes that are and that should be.

    ``kind`` is a section or a dataclass of sections, ``values`` are its ``flat`` ones. What is not
    among them decides nothing.
    """
    sections: list[Any] = [kind] if issubclass(kind, Settings) else list(hints(kind).values())
    found: dict[str, str] = {}
    for section in (section for section in sections if hasattr(section, "modes")):
        for field in dataclasses.fields(section):
            modes = (*section.modes, *field.metadata.get("needs", ()))
            off = [why for mode in modes if (why := _off(mode, section.section, values))]
            if off:
                found[f"{section.section}.{field.name}"] = off[0]
    return found


def _off(mode: str, section: str, values: Mapping[str, Any]) -> str:
    """How ``mode`` is off; empty when it is on."""
    now, expected = [], []
    for condition in mode.split(" or "):
        name, sign, options = re.split("(!?=)", condition)
        name = name if "." in name else f"{section}.{name}"
        if name not in values:
            return ""
        value = values[name]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if (text in options.split("|")) == (sign == "="):
            return ""
        now.append(f"{name} {text}")
        expected.append(
            f"{name} {'' if sign == '=' else 'other than '}{options.replace('|', ' or ')}"
        )
    return f"with {' and '.join(now)}, expected {' or '.join(expected)}"


def used(config: T, given: Iterable[str], *others: T) -> T:
    """``config``, of which the user gave the settings ``given`` (dotted; of a section its fields).

    Raises ConfigError for one whose mode is off, also in ``others`` that have it from here, and
    which would be ignored; none may be said in every mode.
    """
    prefix = f"{config.section}." if isinstance(config, Settings) else ""
    values = flat(config, prefix)
    off = idle(type(config), values)
    for other in others:
        off = {name: off[name] for name in idle(type(other), flat(other, prefix)) if name in off}
    for name in (prefix + name for name in given):
        if name in off and values[name] not in (None, "none", "", []):
            raise ConfigError(f"{name}: got {values[name]} {off[name]}")
    return config


def hints(cls: Any) -> dict[str, Any]:
    """Field name -> resolved annotation of a dataclass, in the order of its fields."""
    return _hints(cls)


# mypy takes no class for hashable
@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    resolved = typing.get_type_hints(cls)
    return {f.name: resolved[f.name] for f in dataclasses.fields(cls)}


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, else the annotation itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def describe(hint: Any) -> str:
    """An annotation in words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    words = {
        bool: "true or false", int: "an integer", float: "a finite number", str: "text",
        type(None): "none",
    }  # fmt: skip
    if typing.get_origin(hint) is tuple:
        return "a list of integers"
    return " or ".join(words[option] for option in _options(hint))


def _fit(hint: Any, value: Any) -> Any:
    """``value`` as ``hint`` wants it. Raises ValueError when it does not fit."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        if isinstance(value, str) and value in typing.get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_fit(typing.get_args(hint)[0], item) for item in value)
    elif hint is bool or hint is str:
        if isinstance(value, hint):
            return value
    elif isinstance(value, bool):
        pass
    elif hint is int:
        if isinstance(value, numbers.Integral):
            return int(value)
    elif hint is float and isinstance(value, (numbers.Real, str)):
        # YAML 1.1 reads 1e-4 as text
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError


def coerce(name: str, hint: Any, value: Any) -> Any:
    """``value`` checked against ``hint``. Raises ConfigError naming ``name``."""
    options = _options(hint)
    if type(None) in options and (value is None or value in ("none", "None")):
        return None
    for option in options:
        try:
            return _fit(option, value)
        except (ValueError, OverflowError):
            continue
    near = ""
    if typing.get_origin(hint) is Literal:
        near = suggest(str(value), typing.get_args(hint))
    raise ConfigError(f"{name}: got {value!r}, expected {describe(hint)}{near}")


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean X?"`` for the nearest of the dotted names ``known``, else ``""``.

    The same last part in another section comes first: ``train.lr`` is answered with ``optim.lr``.
    """
    known = list(known)
    leaf = name.split(".")[-1]
    found = [k for k in known if "." in k and k.split(".")[-1] == leaf]
    if not found and known:
        near = {k: max(_likeness(name, k), _likeness(leaf, k.split(".")[-1])) for k in known}
        best = max(known, key=lambda k: near[k])
        found = [best] if near[best] >= 0.6 else []
    return f"; did you mean {' or '.join(prefix + k for k in found)}?" if found else ""


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, for a (nested) dataclass or mapping."""
    if dataclasses.is_dataclass(value):
        items: Iterable[tuple[str, Any]] = ((n, getattr(value, n)) for n in hints(type(value)))
    else:
        items = value.items()
    out: dict[str, Any] = {}
    for name, item in items:
        if dataclasses.is_dataclass(item) or isinstance(item, Mapping):
            out.update(flat(item, f"{prefix}{name}."))
        else:
            out[prefix + name] = list(item) if isinstance(item, tuple) else item
    return out


def plain(value: Any) -> Any:
    """A (nested) dataclass as dicts, lists and scalars, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in hints(type(value))}
    return list(value) if isinstance(value, tuple) else value


def update(base: T, data: Mapping[str, Any], path: str = "", known: Iterable[str] = ()) -> T:
    """``base`` (a dataclass) with the values of the nested mapping ``data``.

    Raises ConfigError for an unknown key, naming the nearest known one, and for a bad value.
    """
    known = list(known) or list(flat(base))
    changed: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{path}{key}"
        if key not in hints(type(base)):
            raise ConfigError(f"unknown key {name}{suggest(name, known)}")
        old = getattr(base, key)
        if not dataclasses.is_dataclass(old):
            changed[key] = coerce(name, hints(type(base))[key], value)
        elif value is None or isinstance(value, Mapping):
            changed[key] = update(old, value or {}, f"{name}.", known)
        else:
            raise ConfigError(f"{name}: got {value!r}, expected a section with keys")
    return dataclasses.replace(base, **changed)  # type: ignore[type-var]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError naming the file and line; a key given twice is
    an error, not a value lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what the safe loader would drop in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{path}: key {name} given again in line {line}")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # yaml's name for text that is no stream
        where = " ".join(str(error).replace(' in "<unicode string>",', " in").split())
        raise ConfigError(f"{path}: got no YAML: {where}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, expected a mapping of sections")
    return data


def write_yaml(data: Mapping[str, Any]) -> str:
    """YAML text of a nested mapping, in its order."""
    import yaml

    return yaml.safe_dump(dict(data), sort_keys=False, default_flow_style=False)
