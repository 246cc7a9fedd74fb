"""`shardwise train FILE`: the whole of a run, from the file to the text that the model writes.

It prints the mesh, each parameter's layout and the step's collectives before the first step; then a
progress bar; at the end the validation loss in bits per byte beside simple baselines, the loss
curve as a PNG and some text. One process prints and writes; all of them compute.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..meshlib.mesh import Mesh, abstract_twin
from ..models import Model
from ..ops import random
from ..ops.plan import abstract, plan
from ..ops.transforms.shapes import check_stable
from ..optim import Transform
from . import build, report, text
from .claim import claimed
from .config import Config, ConfigError
from .optimizer import build_optimizer, skips
from .report import Curve, peak_memory, write
from .sample import sample
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
    corpus = build.build_corpus(config)
    run = _Run(config, console, mesh, model, optimizer, corpus)
    with claimed(config, mesh):
        where = f"{mesh.size} {mesh.transport} devices on {mesh.device.type}"
        console.print(f"[bold]{mesh}[/bold]: {where}\n{model.num_parameters:,} parameters")
        table = str(strategy.table(model.declaration, model.config, mesh))
        console.print(table + "\n", markup=False)
        run.begin(loaded, resume)
        run.plan()
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
    ) -> None:
        self.config, self.console, self.mesh = config, console, mesh
        self.model, self.optimizer, self.corpus = model, optimizer, corpus
        self.keeper = Keeper(config, mesh, model, corpus) if config.checkpoint else None
        self.key = random.key(config.run.seed)
        self.step = make_step(
            model,
            optimizer,
            config.data.micro_batches,
            is_scaled=config.optimizer.loss_scale is not None,
            donate=True,
        )
        self.curve = Curve()
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
        check_stable(self.step, *given)
        self.console.print(report.collectives(plan(self.step, *given)))

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of a step: a function of seed and number."""
        data, seed = self.config.data, self.config.run.seed
        return text.batches(
            self.corpus.train, seq=data.seq, batch=data.batch, seed=seed, step=number
        )

    def loop(self, stop: Stop) -> bool:
        """All steps that are left, with reports, evaluations and saves; False if told to stop."""
        run, console, curve = self.config.run, self.console, self.curve
        first, is_stopped, began = self.done, False, time.perf_counter()
        size = self.config.data.batch * self.config.data.seq
        may_skip = skips(self.config) > 0 or self.config.optimizer.loss_scale is not None
        with report.progress(console) as progress:
            bar = progress.add_task(
                "train", total=run.steps, completed=first, loss="", rate="", memory=""
            )
            while self.done < run.steps and not is_stopped:
                number = self.done
                batch = place(self.batch(number), self.model, self.mesh)
                key = random.fold_in(self.key, number)
                self.params, self.state, loss = self.step(self.params, self.state, batch, key)
                self.done += 1
                curve.steps.append(number)
                curve.losses.append(float(loss))
                if not (may_skip or math.isfinite(curve.losses[-1])):
                    raise FloatingPointError(f"step {number}: the loss is {curve.losses[-1]}")
                rate = (self.done - first) * size / (time.perf_counter() - began)
                memory = peak_memory(self.mesh)
                progress.update(
                    bar,
                    advance=1,
                    loss=f"{curve.losses[-1]:.4f}",
                    rate=f"{rate:,.0f}",
                    memory=memory,
                )
                if not console.is_terminal and self.done % run.log_every == 0:
                    shown = f"loss {curve.losses[-1]:.4f}, {rate:,.0f} tokens/s{memory}"
                    console.print(f"step {self.done}: {shown}")
                if self.done % run.eval_every == 0 and self.done < run.steps:
                    bits = self.evaluated(most=8)
                    curve.validation.append((self.done, bits))
                    console.print(f"step {self.done}: validation {bits:.3f} bits per byte")
                is_stopped = self._keep(stop)
        seconds = time.perf_counter() - began
        if self.keeper is not None:
            self.keeper.save(self.params, self.state, self.done, curve, wait=True)
            console.print(f"saved step {self.done} in {self.keeper.path}", markup=False)
        if is_stopped:
            told = stop.signal or "another process"
            console.print(f"stopped by {told}; go on with --resume")
            return False
        tokens = (self.done - first) * size
        console.print(
            f"\n{seconds:.0f} s, {tokens / seconds:,.0f} tokens/s{peak_memory(self.mesh)}"
        )
        return True

    def _keep(self, stop: Stop) -> bool:
        """Save if it is time; whether to stop. All processes decide alike.

        While an earlier save is still being written a new one waits for a later step, so that no
        step waits for the disk.
        """
        if self.keeper is None:
            return False
        is_stopped, is_busy = any_of(self.mesh, bool(stop.signal), self.keeper.is_busy)
        if not is_stopped and not is_busy and self.keeper.is_due(self.done):
            wait = not self.keeper.table.async_
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
            write(folder, self.curve)
            console.print(
                f"{'-' * 60}\nwrote {folder}/loss.png and {folder}/loss.json", markup=False
            )
