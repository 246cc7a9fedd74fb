"""Kinds of values in a file: a type, and what else must hold."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from ..layouts.notation import parse
from ..ops.budget import parse_bytes
from .reader import Check


class Switch(str):
    """One of "true", "false", "auto"."""

    PARSES = (str, bool)

    @staticmethod
    def parse(value: str | bool) -> Switch:
        """Read a boolean or "auto"."""
        if isinstance(value, str) and value != "auto":
            raise ValueError(f'expected true, false or "auto", found {json.dumps(value)}')
        return Switch(str(value).lower())


OFF = Switch("false")


def _is_layout(text: str) -> bool:
    parse(text)
    return True


Count = Annotated[int, Check("an integer of at least 1", lambda n: n >= 1)]
Natural = Annotated[int, Check("an integer of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Check("an integer of at least 0, below 2**63", lambda n: 0 <= n < 2**63)]
Positive = Annotated[float, Check("a number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Check("a number of at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Check("a number between 0 and 1", lambda x: 0 < x < 1)]
Momentum = Annotated[float, Check("a number of at least 0, below 1", lambda x: 0 <= x < 1)]
Device = Annotated[
    str, Check('"auto", "cpu", "cuda" or "cuda:N"', re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch)
]
AxisName = Annotated[str, Check("the name of an axis", str.isidentifier)]
AxisNames = Annotated[
    str,
    Check(
        "the name of an axis, or several as in data/depth",
        lambda text: all(name.isidentifier() for name in text.split("/")),
    ),
]
AxisSize = Annotated[
    int, Check("a size of at least 1, or -1 for what is left", lambda n: n >= 1 or n == -1)
]
Bytes = Annotated[str, Check('a size above 0, such as "70GiB"', parse_bytes)]
LayoutText = Annotated[str, Check("a layout string", _is_layout)]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
