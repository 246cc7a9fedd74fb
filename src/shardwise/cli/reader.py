"""TOML into frozen dataclasses: the annotations of a dataclass are the schema of a table.

A field is a key: its annotation says the type and, in `Annotated`, what else must hold (`Check`,
`Known`); its default is the key's default; `async_` is the key `async`. A type with a static method
`parse` reads strings, or what its `PARSES` lists. The reader knows no key by name. Nothing is
guessed and nothing is skipped: an unknown key, a wrong type and a bad value are problems, and all
problems are reported together, each with file, line and key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..meshlib.errors import nearest
from .places import Keys, dotted, lines, path_of


class ConfigError(ValueError):
    """Everything that is wrong with a configuration.

    Attributes:
        problems: one line each, "file:line: table.key: what is wrong", in the file's order.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Check:
    """What else must hold for a value. `ok` may also raise a ValueError that says why not."""

    says: str
    ok: Callable[[Any], Any]


@dataclass(frozen=True)
class Known:
    """The value is one of these names; a string means those that the reader was given under it."""

    names: str | Sequence[str] | None


@dataclass(frozen=True)
class Rest:
    """The field takes every key of its table that is no other field.

    Attributes:
        schema: a field of the same table whose value is, by its `Known`, the name of the dataclass
            that these keys are fields of. Without it the field's own type says what they are.
    """

    schema: str = ""


@dataclass(frozen=True)
class Rules:
    """What a reader is told besides the dataclasses.

    Attributes:
        known: group to its names, for `Known`.
        derived: fields that may be missing though they have no default: the caller fills them in.
        later: dotted tables and keys of the format that this version does not support.
        together: conditions between two keys of different tables: both keys, the condition on their
            values, and the text, formatted with first value, second key, second value.
    """

    known: Mapping[str, Collection[str]]
    derived: Collection[str] = ()
    later: Collection[str] = ()
    together: Sequence[tuple[str, str, Callable[[Any, Any], bool], str]] = ()


def read_toml(path: Path, cls: type, rules: Rules, overrides: Sequence[str] = ()) -> Any:
    """An instance of the dataclass `cls`, whose fields are the file's tables.

    Args:
        path: the file.
        cls: a dataclass of dataclasses.
        rules: see there.
        overrides: "table.key=value" each, put over the file in order.

    Raises:
        ConfigError: with all problems, in the file's order.
    """
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(
            r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error)
        )
        assert found is not None
        line = found[2] or text.rstrip().count("\n") + 1
        column = f", column {found[3]}" if found[3] else " at the end"
        raise ConfigError([f"{path}:{line}: not TOML: {found[1]}{column}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8: {error.reason} at byte {error.start}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    reader = _Reader(path, text, rules)
    for override in overrides:
        reader.override(raw, override)
    return reader.read(cls, raw)


class _Reader:
    """One reading: where each key stands, and the problems so far."""

    def __init__(self, path: Path, text: str, rules: Rules) -> None:
        self.path = path
        self.rules = rules
        self.end = text.count("\n") + 1
        # Where a key stands, as (order, place); overrides come after the last line.
        self.places = {keys: (line, f"{path}:{line}") for keys, line in lines(text)}
        self.num_overrides = 0
        self.overridden: list[Keys] = []
        self.problems: list[tuple[int, str]] = []

    def override(self, raw: dict[str, Any], text: str) -> None:
        """Put one "table.key=value" into `raw`."""
        name, equals, value = (part.strip() for part in text.partition("="))
        keys = path_of(name)
        self.num_overrides += 1
        place = (self.end + self.num_overrides, f"--set {text}")
        if not keys or not equals:
            self.problems.append((place[0], f"{place[1]}: expected table.key=value"))
            return
        table: Any = raw
        for depth, key in enumerate(keys[:-1], 1):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                self.problems.append((place[0], f"{place[1]}: {dotted(keys[:depth])} is no table"))
                return
        table[keys[-1]] = _toml_or_text(value)
        self.overridden.append(keys)
        self.places = {at: p for at, p in self.places.items() if at[: len(keys)] != keys}
        for depth in range(1, len(keys) + 1):
            self.places.setdefault(keys[:depth], place)

    def read(self, cls: type, raw: Mapping[str, Any]) -> Any:
        """The whole file as `cls`, or ConfigError."""
        tables = self._fields(cls, raw, ())
        for first, second, holds, text in self.rules.together:
            (table, key), (other_table, other_key) = first.split("."), second.split(".")
            a = getattr(tables.get(table), key, None)
            b = getattr(tables.get(other_table), other_key, None)
            if a is not None and b is not None and not holds(a, b):
                self._problem((table, key), text.format(a, second, b))
        if self.problems:
            self.problems.sort(key=lambda problem: problem[0])
            raise ConfigError([text for _, text in self.problems])
        return _make(cls, tables)

    def _fields(self, cls: type, raw: Mapping[str, Any], at: Keys) -> dict[str, Any]:
        """Values for fields of the dataclass `cls`; those left to their defaults are not in it."""
        hints = {_key(n): hint for n, hint in get_type_hints(cls, include_extras=True).items()}
        fields = {_key(field.name): field for field in dataclasses.fields(cls) if field.init}
        rest = next((name for name in fields if _extra(hints[name], Rest)), None)
        known = [n for n in fields if n != rest and dotted((*at, n)) not in self.rules.later]
        values: dict[str, Any] = {}
        left: dict[str, Any] = {}
        for key, value in raw.items():
            if key in known:
                values[key] = self._value(value, hints[key], (*at, key))
            elif dotted((*at, key)) in self.rules.later:
                self._problem((*at, key), "not supported by this version")
            else:
                left[key] = value
        for name in known:
            field, path = fields[name], (*at, name)
            if name in raw:
                continue
            if isinstance(field.default, str):
                values[name] = self._text(field.default)
            elif field.default is not MISSING or field.default_factory is not MISSING:
                continue
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self._value({}, hints[name], path)
            elif name not in self.rules.derived:
                self._problem(path, f"missing; expected {_expected(hints[name])}")
        if rest is None:
            for key, value in left.items():
                what = "table" if isinstance(value, dict) else "key"
                self._problem((*at, key), f"unknown {what}{nearest(key, known)}")
        elif schema := _extra(hints[rest], Rest).schema:
            classes: Any = self.rules.known[_extra(hints[schema], Known).names]
            chosen = classes.get(values.get(schema))
            values[rest] = self._built(chosen, left, at) if chosen else {}
            for key in left if schema not in values else ():
                self._problem((*at, key), f"depends on {dotted((*at, schema))}, which is missing")
        else:
            values[rest] = self._value(left, hints[rest], at)
        return values

    def _made(self, cls: Any, values: Mapping[str, Any], at: Keys) -> Any:
        """A table, after the checks of its own dataclass."""
        try:
            return _make(cls, values)
        except ValueError as error:
            return self._problem(at, str(error))

    def _built(self, cls: Any, raw: Mapping[str, Any], at: Keys) -> dict[str, Any]:
        """The fields of `cls` that are given, after a trial of its own checks on them."""
        before = len(self.problems)
        values = self._fields(cls, raw, at)
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory}
        if len(self.problems) == before and required <= set(values):
            try:
                _make(cls, values)
            except ValueError as error:
                self._problem(at, str(error))
        return values

    def _value(self, given: Any, hint: Any, at: Keys) -> Any:
        """`given` as the type `hint` says; None, and a problem, if it is not of that type."""
        base, extras = _split_hint(hint)
        origin = get_origin(base) or base
        before = len(self.problems)
        value: Any = given
        if hasattr(base, "parse") and type(value) in getattr(base, "PARSES", (str,)):
            value = self._parse(value, base, at)
        elif isinstance(value, dict) and _is_table(base):
            values = self._fields(base, value, at)
            value = None if len(self.problems) > before else self._made(base, values, at)
        elif origin in (Mapping, dict) and isinstance(value, dict):
            of_key, of_value = get_args(base)
            value = {
                self._value(key, of_key, (*at, key)): self._value(each, of_value, (*at, key))
                for key, each in value.items()
            }
        elif origin is tuple and isinstance(value, list):
            value = tuple(self._value(each, get_args(base)[0], at) for each in value)
        elif origin is Literal and isinstance(value, str):
            if value not in get_args(base):
                self._problem(at, f"unknown value {value!r}{nearest(value, get_args(base))}")
        elif base is Path and isinstance(value, str):
            # In the file relative to the file, on the command line to the shell.
            value = (Path() if self._is_override(at) else self.path.parent) / value
            if not value.exists():
                self._problem(at, f"no such file or folder: {value}")
        elif not _is_a(value, base):
            kind = f" ({_NAMES[type(value)]})" if type(value) in _NAMES else ""
            self._problem(at, f"expected {_expected(hint)}, found {_shown(value)}{kind}")
        elif base is float:
            value = float(given)
        elif base is str:
            value = self._text(given)
        for extra in extras if len(self.problems) == before else ():
            self._check(value, extra, at)
        return value if len(self.problems) == before else None

    def _parse(self, given: Any, cls: Any, at: Keys) -> Any:
        try:
            parsed = cls.parse(given)
        except ValueError as error:
            return self._problem(at, str(error))
        for name, hint in get_type_hints(cls, include_extras=True).items():
            for extra in _split_hint(hint)[1]:
                self._check(getattr(parsed, name), extra, at)
        return parsed

    def _check(self, value: Any, extra: Any, at: Keys) -> None:
        if isinstance(extra, Known):
            names = extra.names
            known = self.rules.known[names] if isinstance(names, str) else names or ()
            if value not in known:
                self._problem(at, f"unknown value {value!r}{nearest(value, known)}")
        if isinstance(extra, Check):
            try:
                if not extra.ok(value):
                    self._problem(at, f"expected {extra.says}, found {_shown(value)}")
            except ValueError as error:
                self._problem(at, str(error))

    def _text(self, value: str) -> str:
        return value.replace("<file>", self.path.stem)

    def _is_override(self, at: Keys) -> bool:
        return any(at[: len(keys)] == keys for keys in self.overridden)

    def _problem(self, at: Keys, text: str) -> None:
        """Collect a problem at the place of the key; a missing key has that of its table."""
        nowhere = (self.end, str(self.path))
        known = (at[:depth] for depth in range(len(at), 0, -1) if at[:depth] in self.places)
        order, place = self.places.get(next(known, ()), nowhere)
        self.problems.append((order, f"{place}: {dotted(at)}: {text}"))


def _toml_or_text(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text


def _key(field: str) -> str:
    """The key of a field: a Python keyword is spelled with an underscore behind it."""
    return field.removesuffix("_")


def _make(cls: Any, values: Mapping[str, Any]) -> Any:
    """An instance from values by key."""
    keys = {_key(field.name): field.name for field in dataclasses.fields(cls)}
    return cls(**{keys[key]: value for key, value in values.items()})


def _split_hint(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and its extras; `X | None` counts as X, since TOML has no null."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _extra(hint: Any, kind: type) -> Any:
    return next((extra for extra in _split_hint(hint)[1] if isinstance(extra, kind)), None)


_NAMES = {int: "an integer", float: "a number", bool: "a boolean", str: "a string"}
_NAMES |= {list: "an array", tuple: "an array", dict: "a table", Mapping: "a table"}


def _is_table(base: Any) -> bool:
    return dataclasses.is_dataclass(base) and not hasattr(base, "parse")


def _expected(hint: Any) -> str:
    """What a type accepts, for a reader."""
    base, extras = _split_hint(hint)
    check = _extra(hint, Check)
    if check or extras:
        return check.says if check else "a name"
    if get_origin(base) is Literal:
        return " or ".join(map(json.dumps, get_args(base)))
    if base is Path:
        return "a path"
    if hasattr(base, "parse"):
        return "a string"
    return _NAMES.get(get_origin(base) or base, "a table")


def _is_a(value: Any, base: Any) -> bool:
    if base is float:
        return type(value) in (int, float) and math.isfinite(value)
    return base is Any or type(value) is base


def _shown(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dotted((k,))} = {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else str(value)
