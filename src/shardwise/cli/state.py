"""The state of a run on disk: when it is saved, what is in it, and how a run goes on from it.

    params, optimizer     in any layout; another mesh may read them
    key                   of the run's random numbers; a step's own is folded from it
    step                  how many are done
    data                  the text's hash, and the number of the next batch
    curve                 losses and validation so far
    settings              the file that the run was started with, as JSON

A batch and a step's key are functions of (seed, step), so nothing else is needed to go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..layouts import tree
from ..layouts.sharded import ShardedTensor, make_type
from ..meshlib.mesh import Mesh
from ..models import Model
from ..ops import random
from .build import Corpus
from .claim import checkpoints
from .config import Config, ConfigError
from .report import Curve
from .settings import compare, saved_settings, settings_of


class Resumed(NamedTuple):
    """What a run goes on from."""

    params: Any
    state: Any
    step: int
    curve: Curve
    notes: list[str]


class Keeper:
    """Saves a run and restores it.

    Args:
        config: of the run.
        mesh: its mesh.
        model: its model.
        corpus: its text.

    Attributes:
        path: the directory of checkpoints.
    """

    def __init__(self, config: Config, mesh: Mesh, model: Model, corpus: Corpus) -> None:
        assert config.checkpoint is not None
        self.table = config.checkpoint
        self.path = checkpoints(config) or Path()
        self.mesh = mesh
        self.key = random.key(config.run.seed)
        self.settings = settings_of(config, model, corpus)
        self._due = self.table.every
        self._last = -1  # the newest step that is saved, or being saved
        self._pending: checkpoint.Pending | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an earlier save of this process is still being written."""
        return self._pending is not None and not self._pending.is_done

    def is_due(self, step: int) -> bool:
        """Whether a save should be made after this many steps, or a little later."""
        return step >= self._due

    def save(self, params: Any, state: Any, step: int, curve: Curve, *, wait: bool) -> None:
        """Save, unless this step is saved already.

        Args:
            params: the parameters.
            state: of the optimizer.
            step: how many steps are done.
            curve: so far.
            wait: whether to return only once the checkpoint is committed.

        Raises:
            CheckpointError: what the writer met; or what an earlier one did.
        """
        self._due = (step // self.table.every + 1) * self.table.every
        if step > self._last:
            saved = self._saved(params, state, step, curve)
            self._last = step
            self._pending = checkpoint.save(
                self.path, saved, step=step, keep=self.table.keep, wait=wait
            )
        if wait and self._pending is not None:
            self._pending.wait()

    def _saved(self, params: Any, state: Any, step: int, curve: Curve) -> dict[str, Any]:
        return {
            "params": params,
            "optimizer": state,
            "key": self.key,
            "step": step,
            "data": {"text": self.settings["data.text"], "batch": step},
            "curve": _tensors(curve),
            "settings": json.dumps(self.settings),
        }

    def check_new(self) -> None:
        """Refuse to start a run in a directory where another one has been saved.

        Raises:
            ConfigError: there is a checkpoint.
        """
        found = self._newest()
        if found is not None:
            raise ConfigError(
                [
                    f"{self.path} holds a run saved at step {found}: go on with it by --resume, or "
                    "choose another checkpoint.path"
                ]
            )

    def _newest(self) -> int | None:
        """The newest step that has been saved, whatever has become of it since."""
        names = (entry.name for entry in self.path.glob("step-*"))
        found = (re.fullmatch(r"step-(\d{8,19})", name) for name in names)
        return max((int(match[1]) for match in found if match), default=None)

    def resume(self, params: Any, state: Any) -> Resumed | None:
        """The newest checkpoint, or None where there is no checkpoint at all.

        Args:
            params: abstract parameters; the real ones come in their layouts on the run's mesh.
            state: the optimizer's, likewise.

        Raises:
            ConfigError: the run that was saved is another one.
            CheckpointError: it is damaged, which names an older one; or the state has another form.
        """
        step = self._newest()
        if step is None:
            return None
        try:
            return self._resumed(params, state, step)
        except CheckpointError as error:
            if error.is_damage:
                error.args = (
                    f"{error}\n  to go on from an older one, move step-{step:08d} out of "
                    f"{self.path}",
                )
            raise

    def _resumed(self, params: Any, state: Any, step: int) -> Resumed:
        manifest = checkpoint.inspect(self.path)
        notes = compare(saved_settings(manifest), self.settings, str(self.path))
        curve = {
            name: torch.empty(entry.shape, dtype=entry.dtype)
            for path, entry in manifest.tensors.items()
            if path.startswith("curve.") and (name := path.removeprefix("curve."))
        }
        like = {
            "params": _on(self.mesh, params),
            "optimizer": _on(self.mesh, state),
            "key": self.key,
            "step": 0,
            "curve": curve,
        }
        try:
            found = checkpoint.restore(self.path, like)
        except CheckpointError as error:
            if error.is_damage or not notes:
                raise
            said = [str(error), "the run was saved with other settings", *notes]
            raise CheckpointError("\n".join(said)) from error
        self._last = step
        self._due = (step // self.table.every + 1) * self.table.every
        return Resumed(found["params"], found["optimizer"], step, _curve(found["curve"]), notes)


def _on(mesh: Mesh, types: Any) -> Any:
    """Abstract tensors as tensors of a mesh that hold nothing: what `restore` reads into."""

    def one(x: Any) -> Any:
        if not isinstance(x, ShardedTensor):
            return x
        return ShardedTensor((), make_type(mesh, x.layout, x.shape, x.dtype))

    return tree.map(one, types)


def _tensors(curve: Curve) -> dict[str, Tensor]:
    at = [step for step, _ in curve.validation]
    bits = [bits for _, bits in curve.validation]
    return {
        "steps": torch.tensor(curve.steps, dtype=torch.int64),
        "losses": torch.tensor(curve.losses, dtype=torch.float64),
        "validated": torch.tensor(at, dtype=torch.int64),
        "validation": torch.tensor(bits, dtype=torch.float64),
    }


def _curve(saved: Mapping[str, Tensor]) -> Curve:
    lists = {name: values.tolist() for name, values in saved.items()}
    pairs = list(zip(lists["validated"], lists["validation"], strict=True))
    return Curve(lists["steps"], lists["losses"], pairs)
