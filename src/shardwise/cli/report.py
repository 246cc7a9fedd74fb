"""What a run shows: collectives, progress, scores, and its curve as numbers and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..ops.plan import Plan
from .baselines import baselines
from .build import Corpus


@dataclass
class Curve:
    """Loss in nats per token, by step; validation in bits per byte."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


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


def scores(final: float, corpus: Corpus) -> Table:
    """The run's bits per byte beside those of the baselines."""
    table = Table(title="validation text, bits per byte", title_justify="left")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for line in baselines(corpus.train_bytes, corpus.validation_bytes):
        table.add_row(f"{line.name}, having seen {line.given}", f"{line.bits_per_byte:.3f}")
    table.add_row("this run", f"{final:.3f}", style="bold")
    return table


def progress(console: Console) -> Progress:
    """The bar: steps, time, and what the latest line says: loss and speed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeElapsedColumn(),
        console=console,
    )


def write(folder: Path, curve: Curve, speed: Mapping[str, Any]) -> None:
    """The curve, and the speed since this program was started, as numbers; the curve as a picture.

    Args:
        folder: where to.
        curve: of the whole run.
        speed: what `Clock.as_json` gives.
    """
    shown = {"steps": curve.steps, "losses": curve.losses, "validation": curve.validation}
    (folder / "loss.json").write_text(json.dumps({**shown, "speed": speed}))
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
