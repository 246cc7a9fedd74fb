"""`shardwise train FILE`: the whole of a run, from the file to the text that the model writes.

It prints the mesh, each parameter's layout and the step's collectives before the first step; then a
progress bar; at the end the validation loss in bits per byte beside simple baselines, the loss
curve as a PNG and some text. One process prints and writes; all of them compute.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..layouts.layout import resolve
from ..layouts.place import shard
from ..layouts.sharded import ShardedTensor
from ..meshlib.mesh import Mesh
from ..models import Model
from ..ops import random
from ..ops.plan import Plan, plan
from ..ops.transforms.accumulate import accumulate
from ..ops.transforms.grad import value_and_grad
from ..ops.transforms.shapes import check_stable
from ..optim import Transform
from . import build, text
from .baselines import baselines
from .config import Config
from .sample import sample

PROMPT, LENGTH = "ROMEO", 240  # of the sample: its beginning, and bytes to add
Step = Callable[[Any, Any, Any], tuple[Any, Any, ShardedTensor]]


@dataclass
class Curve:
    """Loss in nats per token, by step; validation in bits per byte."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def train(config: Config, console: Console | None = None) -> Curve:
    """Run a configuration to its end.

    Args:
        config: from `read_config`.
        console: where to print; None is the terminal, silent in all processes but the first.

    Returns:
        The loss curve.

    Raises:
        LayoutError: a strategy that does not fit model and mesh; before anything runs.
    """
    mesh = build.build_mesh(config)
    if mesh.transport == "simulated" and mesh.device.type == "cpu":
        torch.set_num_threads(1)  # many small ops: waking a second thread costs more than it does
    console = console or Console(quiet=not mesh.is_first, highlight=False, soft_wrap=True)
    strategy = build.build_strategy(config.strategy, config.precision)
    model, loaded = build.build_model(config.model, config.data.seq, strategy, mesh)
    model.check(mesh, batch=config.data.batch // config.data.micro_batches, seq=config.data.seq)
    optimizer = build.build_optimizer(config.optimizer, config.run.steps)
    corpus = build.build_corpus(config)
    step = make_step(model, optimizer, config.data.micro_batches)
    where = f"{mesh.size} {mesh.transport} devices on {mesh.device.type}"
    console.print(f"[bold]{mesh}[/bold]: {where}\n{model.num_parameters:,} parameters")
    table = str(strategy.table(model.declaration, model.config, mesh))
    console.print(table + "\n", markup=False)

    params = model.init(random.key(config.run.seed), mesh) if loaded is None else loaded
    state = optimizer.init(params)
    batch = place(text.batches(corpus.train, seq=config.data.seq, batch=config.data.batch, seed=config.run.seed, step=0), model, mesh)  # fmt: skip  # noqa: E501
    check_stable(step, params, state, batch)
    console.print(collectives(plan(step, params, state, batch)))

    curve = Curve()
    began = time.perf_counter()
    with _progress(console) as progress:
        bar = progress.add_task("train", total=config.run.steps, loss="", rate="")
        for number in range(config.run.steps):
            raw = text.batches(corpus.train, seq=config.data.seq, batch=config.data.batch, seed=config.run.seed, step=number)  # fmt: skip  # noqa: E501
            params, state, loss = step(params, state, place(raw, model, mesh))
            curve.steps.append(number)
            curve.losses.append(float(loss))
            if not math.isfinite(curve.losses[-1]):
                raise FloatingPointError(f"step {number}: the loss is {curve.losses[-1]}")
            rate = (number + 1) * raw["tokens"].numel() / (time.perf_counter() - began)
            progress.update(bar, advance=1, loss=f"{curve.losses[-1]:.4f}", rate=f"{rate:,.0f}")
            if not console.is_terminal and (number + 1) % config.run.log_every == 0:
                shown = f"loss {curve.losses[-1]:.4f}, {rate:,.0f} tokens/s"
                console.print(f"step {number + 1}: {shown}")
            if (number + 1) % config.run.eval_every == 0 and number + 1 < config.run.steps:
                bits = evaluate(model, params, corpus, config, mesh, most=8)
                curve.validation.append((number + 1, bits))
                console.print(f"step {number + 1}: validation {bits:.3f} bits per byte")
    seconds = time.perf_counter() - began
    final = evaluate(model, params, corpus, config, mesh)
    curve.validation.append((config.run.steps, final))
    tokens = config.run.steps * config.data.batch * config.data.seq
    console.print(f"\n{seconds:.0f} s, {tokens / seconds:,.0f} tokens/s")
    console.print(_scores(final, corpus))
    texts = sample(
        model, params, mesh, PROMPT, length=LENGTH, rows=_rows(model, mesh), seed=config.run.seed
    )
    console.print(f"[bold]a sample[/bold]\n{'-' * 60}")
    console.print(texts[0], markup=False)
    if mesh.is_first:
        folder = Path(config.run.out)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, curve)
        console.print(f"{'-' * 60}\nwrote {folder}/loss.png and {folder}/loss.json", markup=False)
    return curve


def make_step(model: Model, optimizer: Transform, micro_batches: int = 1) -> Step:
    """A training step as a pure function: (params, state, batch) -> (params, state, loss)."""
    gradient = value_and_grad(model.loss)
    if micro_batches > 1:
        gradient = accumulate(gradient, micro_batches)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, ShardedTensor]:
        loss, grads = gradient(params, batch)
        params, state = optimizer.step(grads, state, params)
        return params, state, loss

    return step


def place(raw: dict[str, torch.Tensor], model: Model, mesh: Mesh) -> dict[str, ShardedTensor]:
    """A global batch on the mesh, as the strategy's `tokens` row says."""
    return shard(raw, mesh, model.strategy["tokens"])


def evaluate(
    model: Model,
    params: Any,
    corpus: build.Corpus,
    config: Config,
    mesh: Mesh,
    most: int | None = None,
) -> float:
    """Validation loss in bits per byte: of the whole text, or of `most` batches spread over it."""
    every = list(
        text.validation_batches(corpus.validation, seq=config.data.seq, batch=config.data.batch)
    )
    chosen = every if most is None else every[:: max(1, len(every) // most)][:most]
    total, count = 0.0, 0
    with torch.no_grad():
        for raw in chosen:
            counted = int((raw["labels"] != text.IGNORE).sum())
            loss = model.loss(params, place(raw, model, mesh))
            total += float(loss.full_tensor()) * counted
            count += counted
    return total / count / math.log(2)


def collectives(made: Plan) -> Table:
    """The step's collectives, summed by phase, kind, axes and op."""
    rows: dict[tuple[str, str, str, str], tuple[int, float]] = {}
    for c in made.collectives:
        key = (c.phase, c.kind, " ".join(c.axes), c.op)
        count, size = rows.get(key, (0, 0.0))
        rows[key] = (count + c.repeat, size + c.bytes * c.repeat)
    table = Table(title="collectives of one step, per device", title_justify="left")
    for name in ("phase", "kind", "axes", "op"):
        table.add_column(name)
    for name in ("count", "bytes"):
        table.add_column(name, justify="right")
    for key, (count, size) in rows.items():
        table.add_row(*key, f"{count:,}", f"{size:,.0f}")
    return table


def _rows(model: Model, mesh: Mesh) -> int:
    """The smallest batch that the strategy can cut."""
    return mesh.group_size(resolve(model.strategy["tokens"], 2).dims[0])


def _scores(final: float, corpus: build.Corpus) -> Table:
    table = Table(title="validation text, bits per byte", title_justify="left")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for line in baselines(corpus.train_bytes, corpus.validation_bytes):
        table.add_row(f"{line.name}, having seen {line.given}", f"{line.bits_per_byte:.3f}")
    table.add_row("this run", f"{final:.3f}", style="bold")
    return table


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        console=console,
    )


def write(folder: Path, curve: Curve) -> None:
    """The curve as numbers and as a picture."""
    (folder / "loss.json").write_text(
        json.dumps({"steps": curve.steps, "losses": curve.losses, "validation": curve.validation})
    )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    bits = [loss / math.log(2) for loss in curve.losses]
    axes.plot(curve.steps, bits, linewidth=0.8, label="training")
    if curve.validation:
        axes.plot(*zip(*curve.validation, strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)
