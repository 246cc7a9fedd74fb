"""`shardwise train FILE`: the whole of a run, from the file to the text that the model writes.

It prints the mesh, each parameter's layout, the step's collectives and what speed is measured by
before the first step; then a progress bar; at the end the validation loss in bits per byte beside
simple baselines, the loss curve as a PNG and some text. One process prints and writes; all of them
compute.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import optim
from ..layouts.sharded import ShardedTensor
from ..meshlib.mesh import Mesh, abstract_twin
from ..models import Model
from ..ops import random
from ..ops.plan import abstract, plan
from ..ops.transforms.shapes import check_stable
from ..optim import Transform
from . import build, jitting, report, text
from .claim import claimed
from .config import Config, ConfigError
from .optimizer import build_optimizer, skips
from .report import Curve, write
from .sample import sample
from .speed import Clock, ruler
from .state import Keeper
from .step import averaged, evaluate, make_step, place, rows
from .stop import Stop, any_of

PROMPT, LENGTH = "ROMEO", 240  # of the sample: its beginning, and bytes to add

__all__ = ["Curve", "train"]


def train(config: Config, console: Console | None = None, *, resume: bool = False) -> Curve:
    """Run a configuration to its end, or until SIGTERM or SIGINT if it is saved.

    Args:
        config: from `read_config`.
        console: where to print; None is the terminal, silent in all processes but the first.
        resume: whether to go on from the newest checkpoint; from the start if there is none.

    Returns:
        The loss curve.

    Raises:
        LayoutError: a strategy that does not fit model and mesh; before anything runs.
        ConfigError: a checkpoint of another run; directories that cannot be had.
        CheckpointError: one that cannot be written or read.
    """
    if resume and config.checkpoint is None:
        raise ConfigError(["--resume: the file has no [checkpoint], so nothing was saved"])
    mesh = build.build_mesh(config)
    if mesh.transport == "simulated" and mesh.device.type == "cpu":
        torch.set_num_threads(1)  # many small ops: waking a second thread costs more than it does
    console = console or Console(quiet=not mesh.is_first, highlight=False, soft_wrap=True)
    strategy = build.build_strategy(config)
    model, loaded = build.build_model(config.model, config.data.seq, strategy, mesh)
    model.check(mesh, batch=config.data.batch // config.data.micro_batches, seq=config.data.seq)
    optimizer = build_optimizer(config, model.declaration)
    is_jitted, told = jitting.is_wanted(config, mesh)
    corpus = build.build_corpus(config)
    run = _Run(config, console, mesh, model, optimizer, corpus, is_jitted)
    with claimed(config, mesh):
        where = f"{mesh.size} {mesh.transport} devices on {mesh.device.type}"
        console.print(f"[bold]{mesh}[/bold]: {where}\n{model.num_parameters:,} parameters")
        table = str(strategy.table(model.declaration, model.config, mesh))
        console.print(table + "\n", markup=False)
        run.begin(loaded, resume)
        run.plan()
        console.print(f"{run.ruler}\n{told}", markup=False)
        with Stop() if run.keeper else nullcontext(Stop()) as stop:
            if run.loop(stop):
                run.end()
    return run.curve


class _Run:
    """A run under way: what it holds, and its three parts."""

    def __init__(
        self,
        config: Config,
        console: Console,
        mesh: Mesh,
        model: Model,
        optimizer: Transform,
        corpus: build.Corpus,
        is_jitted: bool,
    ) -> None:
        self.config, self.console, self.mesh = config, console, mesh
        self.model, self.optimizer, self.corpus = model, optimizer, corpus
        self.keeper = Keeper(config, mesh, model, corpus) if config.checkpoint else None
        self.key = random.key(config.run.seed)
        self.plain = make_step(
            model,
            optimizer,
            config.data.micro_batches,
            is_scaled=config.optimizer.loss_scale is not None,
            donate=not is_jitted,  # the compiled step takes them as a whole
        )
        budget = config.memory.budget
        self.jitted = jitting.compiled(self.plain, budget) if is_jitted else None
        self.programs = 0
        self.ruler = ruler(model, mesh, batch=config.data.batch, seq=config.data.seq)
        self.curve = Curve()
        self.pending: list[ShardedTensor] = []  # losses of the latest steps, not read yet
        self.done = 0
        self.params: Any = None
        self.state: Any = None

    def begin(self, loaded: Any, resume: bool) -> None:
        """Parameters and state: new, from a folder, or from a checkpoint."""
        if self.keeper is not None and resume:
            twin = abstract_twin(self.mesh)
            types = self.model.init(self.key, twin) if loaded is None else abstract(loaded)
            found = self.keeper.resume(types, self.optimizer.init(types))
            if found is not None:
                self.params, self.state, self.done, self.curve, notes = found
                self.console.print(
                    f"going on from step {self.done} in {self.keeper.path}", markup=False
                )
                for note in ("changed since it was saved:", *notes) if notes else ():
                    self.console.print(note, markup=False)
                return
            self.console.print(f"no checkpoint in {self.keeper.path} yet", markup=False)
        elif self.keeper is not None:
            self.keeper.check_new()
        self.params = self.model.init(self.key, self.mesh) if loaded is None else loaded
        self.state = self.optimizer.init(self.params)

    def plan(self) -> None:
        """Check that the step keeps its layouts, and print what it moves."""
        given = (self.params, self.state, place(self.batch(0), self.model, self.mesh), self.key)
        check_stable(self.plain, *given)
        self.console.print(report.collectives(plan(self.plain, *given)))

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of a step: a function of seed and number."""
        data, seed = self.config.data, self.config.run.seed
        return text.batches(
            self.corpus.train, seq=data.seq, batch=data.batch, seed=seed, step=number
        )

    def loop(self, stop: Stop) -> bool:
        """All steps that are left, with reports, evaluations and saves; False if told to stop.

        The device is waited for only where a line is printed, or something is evaluated or saved.
        """
        run, console = self.config.run, self.console
        self.clock = Clock(self.ruler, self.mesh)
        is_stopped = False
        with report.progress(console) as progress:
            bar = progress.add_task("train", total=run.steps, completed=self.done, line="")
            while self.done < run.steps and not is_stopped:
                self._step()
                progress.update(bar, advance=1)
                is_last = self.done == run.steps
                if self.done % run.log_every == 0 or is_last:
                    self._settle()
                    line = f"loss {self.curve.losses[-1]:.4f}, {self.clock.line(self.done)}"
                    progress.update(bar, line=line)
                    if not console.is_terminal:
                        console.print(f"step {self.done}: {line}")
                if self.done % run.eval_every == 0 and not is_last:
                    self._settle()
                    with self.clock.paused():
                        bits = self.evaluated(most=8)
                    self.curve.validation.append((self.done, bits))
                    console.print(f"step {self.done}: validation {bits:.3f} bits per byte")
                is_stopped = self._keep(stop)
        self._settle()
        if self.keeper is not None:
            self.keeper.save(self.params, self.state, self.done, self.curve, wait=True)
            console.print(f"saved step {self.done} in {self.keeper.path}", markup=False)
        if is_stopped:
            told = stop.signal or "another process"
            console.print(f"stopped by {told}; go on with --resume")
            return False
        average = self.clock.average(self.done)
        if average is not None:
            after = "" if average.is_first else " after the first line"
            console.print(f"\n{average}{after}")
        return True

    def _step(self) -> None:
        """One step; its loss is read later."""
        number = self.done
        batch = place(self.batch(number), self.model, self.mesh)
        key = random.fold_in(self.key, number)
        step = self.plain if self.jitted is None else self.jitted
        self.params, self.state, loss = step(self.params, self.state, batch, key)
        self.pending.append(loss)
        self.done += 1
        self.clock.tick()
        if self.jitted is not None and len(self.jitted.programs) > self.programs:
            self.programs = len(self.jitted.programs)
            text = jitting.told(self.jitted, self.config.memory.budget)
            self.console.print(f"step {self.done}: {text}", markup=False)

    def _settle(self) -> None:
        """Read the losses of the latest steps, and whether too many were skipped.

        Raises:
            FloatingPointError: a loss that is not finite, where no step is skipped; too many
                skipped ones in a row.
        """
        limit = skips(self.config)
        may_skip = limit > 0 or self.config.optimizer.loss_scale is not None
        for loss in self.pending:
            number = len(self.curve.steps)
            self.curve.steps.append(number)
            self.curve.losses.append(float(loss))
            if not (may_skip or math.isfinite(self.curve.losses[-1])):
                raise FloatingPointError(f"step {number}: the loss is {self.curve.losses[-1]}")
        self.pending.clear()
        if limit and self.config.optimizer.loss_scale is None:
            count = int(optim.get(self.state, "streak"))
            if count >= limit:
                raise FloatingPointError(
                    f"step {self.done - 1}: {count} steps in a row had gradients that are not "
                    f"finite, and optimizer.skip_nonfinite is {limit}"
                )

    def _keep(self, stop: Stop) -> bool:
        """Save if it is time; whether to stop. All processes decide alike.

        While an earlier save is still being written a new one waits for a later step, so that no
        step waits for the disk.
        """
        if self.keeper is None:
            return False
        is_stopped, is_busy = any_of(self.mesh, bool(stop.signal), self.keeper.is_busy)
        if not is_stopped and not is_busy and self.keeper.is_due(self.done):
            self._settle()
            wait = not self.keeper.table.async_
            with self.clock.paused():
                self.keeper.save(self.params, self.state, self.done, self.curve, wait=wait)
        return is_stopped

    def evaluated(self, most: int | None = None) -> float:
        """Validation loss of the parameters, or of their running mean."""
        params = averaged(self.params, self.state)
        return evaluate(self.model, params, self.corpus, self.config, self.mesh, most)

    def end(self) -> None:
        """Scores, a sample and the curve."""
        console, run = self.console, self.config.run
        final = self.evaluated()
        self.curve.validation.append((self.done, final))
        console.print(report.scores(final, self.corpus))
        texts = sample(
            self.model,
            averaged(self.params, self.state),
            self.mesh,
            PROMPT,
            length=LENGTH,
            rows=rows(self.model, self.mesh),
            seed=run.seed,
        )
        console.print(f"[bold]a sample[/bold]\n{'-' * 60}")
        console.print(texts[0], markup=False)
        if self.mesh.is_first:
            folder = Path(run.out)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, self.curve, self.clock.as_json())
            console.print(
                f"{'-' * 60}\nwrote {folder}/loss.png and {folder}/loss.json", markup=False
            )
