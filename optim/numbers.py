"""What the numbers of a constructor may be: a wrong one is named where it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[float], bool], str]

RATE: Rule = (lambda x: 0 <= x < math.inf, "finite and at least 0")
SHARE: Rule = (lambda x: 0 <= x < 1, "at least 0 and less than 1")
POSITIVE: Rule = (lambda x: x > 0, "more than 0")
COUNT: Rule = (lambda x: x >= 1 and x == int(x), "a whole number, at least 1")
NUMBER: Rule = (math.isfinite, "finite")

RULES: dict[str, Rule] = {
    "lr": RATE,
    "weight_decay": RATE,
    "trust": RATE,
    "eps_scale": RATE,
    "b1": SHARE,
    "b2": SHARE,
    "b3": SHARE,
    "momentum": SHARE,
    "decay": SHARE,
    "eps": POSITIVE,
    "clip": POSITIVE,
    "limit": POSITIVE,
    "initial": POSITIVE,
    "growth": POSITIVE,
    "backoff": POSITIVE,
    "minimum": POSITIVE,
    "maximum": POSITIVE,
    "rank": COUNT,
    "every": COUNT,
    "block": COUNT,
    "hysteresis": COUNT,
    "scale": NUMBER,
    "factor": NUMBER,
}


def check(who: str, rules: dict[str, Rule] | None = None, **numbers: Any) -> None:
    """Raise a ValueError that names the first number that breaks its rule.

    Args:
        who: the constructor.
        rules: by name, for those whose rule is another one here.
        **numbers: what was given. Schedules, tensors and None are not read.

    >>> check("adamw", lr=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: adamw: lr is finite and at least 0, got -1.0
    """
    table = RULES | (rules or {})
    for name, value in numbers.items():
        fits, meaning = table[name]
        each = value if isinstance(value, tuple) else (value,)
        for x in each:
            if isinstance(x, str) or (isinstance(x, int | float) and not fits(x)):
                raise ValueError(f"{who}: {name} is {meaning}, got {value!r}")
