"""The keys of [optimizer] that belong to one optimizer or one schedule, read off their signatures.

An optimizer's keyword is a key if `KEYS` knows what values it takes; its default is the function's
own. So the file's keys are always those of the library, and a key of another optimizer is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Literal

from .. import optim
from .reader import Check
from .values import Count, Dtype, Momentum, Natural, NotNegative, Positive

FACTORIES: dict[str, Callable[..., optim.Transform]] = {
    "sgd": optim.sgd,
    "adam": optim.adam,
    "adamw": optim.adamw,
    "lion": optim.lion,
    "lamb": optim.lamb,
    "lars": optim.lars,
    "adafactor": optim.adafactor,
    "came": optim.came,
    "galore": optim.galore,
    "muon": optim.muon,
    "adam8bit": optim.adam8bit,
}

_TwoNumbers = Annotated[tuple[Positive, ...], Check("two numbers", lambda pair: len(pair) == 2)]
KEYS: dict[str, Any] = {
    "b1": Momentum,
    "b2": Momentum,
    "b3": Momentum,
    "momentum": Momentum,
    "nesterov": bool,
    "eps": NotNegative,
    "eps_scale": Positive,
    "weight_decay": NotNegative,
    "trust": Positive,
    "clip": Positive,
    "decay": float,
    "rank": Count,
    "every": Count,
    "scale": Positive,
    "steps": Count,
    "match": Literal["spectral", "adamw", "none"],
    "block": Count,
    "least": Natural,
    "state_dtype": Dtype,
    "dtype": Dtype,
}
OWN: dict[tuple[str, str], Any] = {("came", "eps"): _TwoNumbers}
# Muon leaves vectors and tables to AdamW, at the same rate: so its updates are as long as AdamW's.
DEFAULTS: dict[tuple[str, str], Any] = {("muon", "match"): "adamw"}
RENAMED = {"decay": "decay_rate"}  # [optimizer] decay is the schedule's
# Keywords that are no keys: the program gives them.
GIVEN = frozenset({"lr", "mask", "stacked", "fold", "weights", "coefficients", "rounding", "seed"})


def _keys(name: str, make: Callable[..., Any]) -> type:
    """A dataclass whose fields are the keys of one optimizer."""
    fields = [
        (
            RENAMED.get(key, key),
            OWN.get((name, key), KEYS[key]),
            field(default=DEFAULTS.get((name, key), p.default)),
        )
        for key, p in inspect.signature(make).parameters.items()
        if key in KEYS
    ]
    return make_dataclass(name, fields, frozen=True)


def takes(make: Callable[..., Any], keyword: str) -> bool:
    """Whether a function has this keyword."""
    return keyword in inspect.signature(make).parameters


OPTIMIZERS: Mapping[str, type] = {name: _keys(name, make) for name, make in FACTORIES.items()}

# Schedule to the keys that it takes besides lr and warmup.
SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("decay", "end"),
    "cosine": ("decay", "end"),
    "polynomial": ("decay", "end", "power"),
    "wsd": ("decay", "end"),
    "piecewise": ("factors",),
    "join": ("parts",),
}
