"""Where the keys of a TOML text stand, and how they are written: what tomllib does not tell."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

Keys = tuple[str, ...]


def lines(text: str) -> Iterator[tuple[Keys, int]]:
    """Each table and key of a valid TOML text, with the number of the line where it first stands.

    A statement (a header, or a key with its value) is the fewest lines that are valid TOML by
    themselves, so the parser itself finds where it ends.
    """
    header: Keys = ()
    seen: set[Keys] = set()
    start, statement = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            found = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            header = list(paths(found))[-1]
            found_here = [header]
        else:
            found_here = [header + keys for keys in paths(found)]
        for keys in found_here:
            for depth in range(1, len(keys) + 1):
                if keys[:depth] not in seen:
                    seen.add(keys[:depth])
                    yield keys[:depth], start
        start, statement = number + 1, ""


def paths(table: Any) -> Iterator[Keys]:
    """Paths to everything in nested tables, each table before what is in it."""
    if isinstance(table, dict):
        for key, value in table.items():
            yield (key,)
            yield from ((key, *keys) for keys in paths(value))


def path_of(name: str) -> Keys:
    """The keys of a dotted TOML key; () if it is none."""
    try:
        return list(paths(tomllib.loads(f"{name} = 0")))[-1]
    except (tomllib.TOMLDecodeError, IndexError):
        return ()


def dotted(keys: Keys) -> str:
    """Keys as TOML writes them."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k, re.ASCII) else json.dumps(k) for k in keys)
