"""What a run was started with, as it is kept in its checkpoints, and what may change afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import Manifest
from ..models import Model
from .build import Corpus
from .config import Config, ConfigError
from .optimizer import skips

# What may not change when a run goes on: other numbers would be learned, or another state is kept.
MATTERS = (
    "run.seed",
    "data.text",
    "data.seq",
    "data.batch",
    "data.split",
    "data.tokenizer",
    "model.",
    "optimizer.name",
    "precision.param",
    "precision.master",
    "precision.rounding",
)
WHETHER = ("clip_norm", "ema", "loss_scale", "skip_nonfinite")  # of [optimizer]: they keep state
SILENT = ("run.out", "run.log_every", "run.eval_every", "run.device", "run.check", "checkpoint.")

Settings = Mapping[str, Any]


def settings_of(config: Config, model: Model, corpus: Corpus) -> dict[str, Any]:
    """Dotted keys and plain values; the text by its hash, the model by all sizes of its config."""
    digest = hashlib.blake2b(corpus.train_bytes + corpus.validation_bytes, digest_size=16)
    tables = dataclasses.asdict(config) | {"model": dataclasses.asdict(model.config)}
    found = dict(_flat(json.loads(json.dumps(tables, default=str))))
    found["data.text"] = digest.hexdigest()
    found["optimizer.skip_nonfinite"] = skips(config)
    return found


def saved_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings in a checkpoint.

    Raises:
        ConfigError: it has none: something else saved it.
    """
    text = manifest.values.get("settings")
    if not isinstance(text, str):
        raise ConfigError(
            [f"step {manifest.step} was not saved by `shardwise train`: it has no settings"]
        )
    return json.loads(text)


def compare(saved: Settings, now: Settings, where: str) -> list[str]:
    """A line for each setting that has changed without harm.

    Args:
        saved: when it was saved.
        now: of the run that goes on.
        where: the checkpoints, for the error.

    Raises:
        ConfigError: one that matters has changed.

    >>> compare({"zero.stage": 0, "run.seed": 3}, {"zero.stage": 2, "run.seed": 3}, "run")
    ['  zero.stage: 0 when it was saved, now 2']
    """
    saved, now = _named(saved), _named(now)
    lines = {
        key: f"  {key}: {_shown(saved, key)} when it was saved, now {_shown(now, key)}"
        for key in {**saved, **now}
        if saved.get(key) != now.get(key) and not key.startswith(SILENT)
    }
    limit, place = "optimizer.skip_nonfinite", "memory.optimizer"
    if limit in lines and place in lines and "disk" in (saved.get(place), now.get(place)):
        reason = f"a state on disk takes no step back: {lines[limit].strip()}"
        lines[limit] = f"{lines.pop(place)}; {reason}"  # the first decides the second
    fatal = [line for key, line in lines.items() if _matters(key, saved, now)]
    if fatal:
        advice = "set these back, or choose another path"
        raise ConfigError([f"{where} holds another run: {advice}", *fatal])
    return list(lines.values())


def _named(settings: Settings) -> dict[str, Any]:
    """The settings by the keys of the file, of which the flat ones hold some names of fields."""
    found: dict[str, Any] = {}
    scale = "optimizer.loss_scale"
    for key, value in settings.items():
        if not key.startswith(f"{scale}."):
            name = key.replace("optimizer.hyper.", "optimizer.", 1)
            found[name.replace("mesh.axes.", "mesh.", 1)] = value
        elif key == f"{scale}.initial":
            found[scale] = "dynamic" if settings.get(f"{scale}.is_dynamic") else value
    return found


def _matters(key: str, saved: Settings, now: Settings) -> bool:
    table, _, name = key.partition(".")
    if table == "optimizer" and name.split(".")[0] in WHETHER:
        return bool(saved.get(key)) != bool(now.get(key))
    # A key that only one side knows is one that another version has: the state itself will tell.
    return key.startswith(MATTERS) and key in saved and key in now


def _flat(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _shown(settings: Settings, key: str) -> str:
    return json.dumps(settings[key]) if settings.get(key) is not None else "not set"
