"""The layout grammar: text to its parts and back.

One grammar for input, printing, files and errors.

layout  =  item*  states*  place*
item    =  name axes | "..." axes          name: identifier, "_" or a number, for the reader only
axes    =  ("/" axis)*                     major to minor
states  =  "{" (U|R|V) ":" axis ("," axis)* ... "}"
place   =  "@device" | "@host" | "@disk" | "@" axis "=" int ("," int)*

>>> parse("batch/data ... vocab/tensor {U:pipe} @host").dims
(('data',), ('tensor',))
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..meshlib.errors import LayoutError

Dims = tuple[tuple[str, ...], ...]
At = tuple[tuple[str, tuple[int, ...]], ...]
STATES = {"U": "unreduced", "R": "reduced", "V": "varying"}

_ITEM = re.compile(r"(?P<name>\.\.\.|[A-Za-z_]\w*|\d+)(?P<axes>(?:/[A-Za-z_]\w*)*)$")
_GROUP = re.compile(r"\{([^{}]*)\}")
_STATE = re.compile(r"([A-Za-z]):([A-Za-z_]\w*(?:,[A-Za-z_]\w*)*)$")
_PLACE = re.compile(
    r"@(?:(?P<memory>device|host|disk)|(?P<axis>[A-Za-z_]\w*)=(?P<at>-?\d+(?:,-?\d+)*))$"
)


@dataclass(frozen=True)
class Parsed:
    """A layout string's parts.

    `rest` is the position of "...", or None; `rest_axes` what follows it. `names_memory` says
    whether a memory was written: "..." keeps the one that a tensor is in.
    """

    names: tuple[str, ...]
    dims: Dims
    rest: int | None
    rest_axes: tuple[str, ...]
    states: dict[str, frozenset[str]]
    memory: str
    at: At
    names_memory: bool = False


def parse(text: str) -> Parsed:
    """Parts of a layout string.

    Raises:
        LayoutError: kind "parse", naming the token at fault.
    """
    if not isinstance(text, str):
        raise TypeError(f"a layout is a string or a Layout, got {type(text).__name__}")

    def wrong(why: str) -> LayoutError:
        return LayoutError(f"layout {text!r}: {why}", kind="parse")

    states: dict[str, set[str]] = {"U": set(), "R": set(), "V": set()}
    for group in _GROUP.findall(text):
        for token in re.sub(r"\s*,\s*", ",", group).split():
            found = _STATE.match(token)
            if found is None or found[1] not in states:
                raise wrong(f"{token!r} is no state; write {{U:axis}} or {{R:axis}}")
            for axis in found[2].split(","):
                if any(axis in axes for axes in states.values()):
                    raise wrong(f"axis {axis!r} has two states")
                states[found[1]].add(axis)
    plain = _GROUP.sub(" ", text)
    if "{" in plain or "}" in plain:
        raise wrong("braces do not pair up")
    names: list[str] = []
    dims: list[tuple[str, ...]] = []
    rest: int | None = None
    rest_axes: tuple[str, ...] = ()
    memory: str | None = None
    at: dict[str, tuple[int, ...]] = {}
    for token in plain.split():
        if token.startswith("@"):
            place = _PLACE.match(token)
            if place is None:
                raise wrong(f"{token!r} is no place; write @device, @host, @disk or @axis=0,-1")
            if memory is not None if place["memory"] else place["axis"] in at:
                raise wrong(f"{token!r} is a second place of one kind")
            if place["memory"]:
                memory = place["memory"]
            else:
                at[place["axis"]] = tuple(int(n) for n in place["at"].split(","))
            continue
        item = _ITEM.match(token)
        if item is None:
            raise wrong(f"{token!r} is no dim; write name, name/axis or ...")
        axes = tuple(item["axes"].split("/")[1:])
        if item["name"] == "...":
            if rest is not None:
                raise wrong("'...' stands twice")
            rest, rest_axes = len(dims), axes
        else:
            names.append(item["name"])
            dims.append(axes)
    check((*dims, rest_axes), states, text)
    return Parsed(
        tuple(names),
        tuple(dims),
        rest,
        rest_axes,
        {key: frozenset(value) for key, value in states.items()},
        memory or "device",
        tuple(sorted(at.items())),
        memory is not None,
    )


def check(dims: Dims, states: dict[str, set[str]], text: str) -> None:
    """Raise unless every axis has one use."""
    seen: dict[str, int] = {}
    for number, axes in enumerate(dims):
        for axis in axes:
            if axis in seen:
                where = (
                    f"dims {seen[axis]} and {number}" if seen[axis] != number else f"dim {number}"
                )
                raise LayoutError(
                    f"layout {text!r}: axis {axis!r} is used twice, by {where}", kind="parse"
                )
            seen[axis] = number
    for letter, axes_ in states.items():
        for axis in sorted(axes_ & set(seen)):
            raise LayoutError(
                f"layout {text!r}: axis {axis!r} is used twice, "
                f"by dim {seen[axis]} and {{{letter}:{axis}}}",
                kind="parse",
            )


def write(
    dims: Dims,
    states: dict[str, frozenset[str]],
    memory: str = "device",
    at: At = (),
    names: tuple[str, ...] | None = None,
) -> str:
    """The text of a layout; names default to "_"."""
    parts = ["/".join((names[i] if names else "_", *axes)) for i, axes in enumerate(dims)]
    parts.append(write_states(states))
    parts.append("" if memory == "device" else f"@{memory}")
    parts += [f"@{axis}={','.join(map(str, where))}" for axis, where in at]
    return " ".join(part for part in parts if part)


def write_states(states: dict[str, frozenset[str]]) -> str:
    """`{U:data,pipe R:tensor}`, or nothing: U before R before V, axes alphabetical."""
    shown = [f"{key}:{','.join(sorted(states[key]))}" for key in "URV" if states.get(key)]
    return f"{{{' '.join(shown)}}}" if shown else ""
