"""[optimizer], [precision], [zero] and [memory]: the transform is what the file describes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.cli import hyper
from shardwise.cli.config import Config, ConfigError, OptimizerTable
from shardwise.cli.optimizer import build_optimizer, schedule
from shardwise.optim import schedules

MODEL = models.gpt2(
    models.GPT2Config(layer=2, embed=8, heads=2, vocab=16, position=4), strategies.data()
)
STEPS = 6  # of the file


def read(folder: Path, *overrides: str) -> Config:
    return runs.config(runs.file(folder), *overrides)


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(folder, *overrides)
    return str(error.value)


def optimizer(name: str, *keys: str) -> tuple[str, ...]:
    """Overrides that leave nothing but one optimizer at a constant rate of 0.5."""
    table = f'optimizer={{name = "{name}", lr = 0.5, schedule = "constant", skip_nonfinite = 0}}'
    return (table, *(f"optimizer.{key}" for key in keys))


def stepped(opt: optim.Transform) -> dict[str, torch.Tensor]:
    """The parameters after three steps on fixed gradients."""
    mesh = sw.make_mesh({"data": 2})
    params = MODEL.init(sw.random.key(0), mesh)
    state = opt.init(params)
    for number in range(3):
        key = sw.random.fold_in(sw.random.key(1), number)
        drawn = {path: sw.random.fold_in(key, path) for path, _ in sw.tree.items(params)}
        keys = iter(drawn.values())
        grads = sw.tree.map(lambda p: sw.random.normal_like(next(keys), p), params)  # noqa: B023
        params, state = opt.step(grads, state, params)
    return {path: p.full_tensor() for path, p in sw.tree.items(params)}


def decays(path: str, _leaf: Any) -> bool:
    return path.split(".")[-1].startswith(("w_", "embed"))


BLOCKS = "blocks.*"
DIRECT: dict[str, tuple[tuple[str, ...], optim.Transform]] = {
    "sgd": (("momentum=0.9", "nesterov=true"), optim.sgd(0.5, momentum=0.9, nesterov=True)),
    "adam": (("b1=0.8", "b2=0.9"), optim.adam(0.5, b1=0.8, b2=0.9)),
    "adamw": (("weight_decay=0.1",), optim.adamw(0.5, weight_decay=0.1, mask=decays)),
    "lion": (("weight_decay=0.1",), optim.lion(0.5, weight_decay=0.1, mask=decays)),
    "lamb": (("eps=1e-3",), optim.lamb(0.5, eps=1e-3, mask=decays, stacked=BLOCKS)),
    "lars": (("trust=0.1",), optim.lars(0.5, trust=0.1, mask=decays, stacked=BLOCKS)),
    "adafactor": (
        ("decay_rate=-0.5",),
        optim.adafactor(0.5, decay=-0.5, mask=decays, stacked=BLOCKS),
    ),
    "came": (
        ("eps=[1e-30, 1e-8]",),
        optim.came(0.5, eps=(1e-30, 1e-8), mask=decays, stacked=BLOCKS),
    ),
    "galore": (("rank=2", "every=2"), optim.galore(0.5, rank=2, every=2, mask=decays)),
    "muon": (
        ("momentum=0.5", "weight_decay=0.1", "dtype=float32"),
        optim.multi(
            {
                "blocks.w_*": optim.muon(
                    0.5, momentum=0.5, weight_decay=0.1, mask=decays, match="adamw",
                    fold=lambda path, _: (1, 2 if path.endswith("w_o") else 1), dtype=torch.float32,
                ),
                "*": optim.adamw(0.5, weight_decay=0.1, mask=decays),
            }
        ),
    ),
    "adam8bit": (("block=8", "least=1"), optim.adam8bit(0.5, block=8, least=1, mask=decays)),
}  # fmt: skip


def test_every_optimizer_is_there() -> None:
    found = {
        name
        for name in dir(optim)
        if callable(make := getattr(optim, name)) and not isinstance(make, type)
        if "lr" in inspect.signature(make).parameters
    }
    assert found == set(hyper.FACTORIES) == set(DIRECT)


@pytest.mark.parametrize("name", DIRECT)
def test_a_file_gives_the_librarys_optimizer(name: str, tmp_path: Path) -> None:
    keys, expected = DIRECT[name]
    made = build_optimizer(read(tmp_path, *optimizer(name, *keys)), MODEL.declaration)
    plain = build_optimizer(read(tmp_path, *optimizer(name)), MODEL.declaration)
    found, other = stepped(made), stepped(plain)
    for path, value in stepped(expected).items():
        torch.testing.assert_close(found[path], value, rtol=0, atol=0, msg=path)
    assert any(not torch.equal(found[path], other[path]) for path in found)  # the keys do something


@pytest.mark.parametrize("name", hyper.FACTORIES)
def test_every_keyword_of_an_optimizer_is_a_key_or_the_programs(name: str) -> None:
    keywords = inspect.signature(hyper.FACTORIES[name]).parameters
    assert set(keywords) <= set(hyper.KEYS) | hyper.GIVEN
    table = {key.name for key in dataclasses.fields(hyper.OPTIMIZERS[name])}
    assert table.isdisjoint(key.name for key in dataclasses.fields(Config))
    own = {key.name for key in dataclasses.fields(OptimizerTable)}
    assert table.isdisjoint(own)  # else the schedule's key would hide the optimizer's


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("name=sgd", "b1=0.5"), "optimizer.b1: unknown key (known: 'momentum', 'nesterov')"),
        (("name=lion", "esp=1"), "optimizer.esp: unknown key (known: 'b1', 'b2', 'weight_decay'"),
        (("name=adamv",), "optimizer.name: unknown value 'adamv'; did you mean 'adam'?"),
        (("name=came", "eps=[1e-8]"), "optimizer.eps: expected two numbers, found [1e-08]"),
        (("b2=1.0",), "optimizer.b2: expected a number of at least 0, below 1, found 1.0"),
        (("power=2.0",), "power belongs to schedule polynomial, not to cosine"),
        (
            ("schedule=constant", "decay=5"),
            "decay belongs to schedule linear or cosine or polynomial or wsd, not to constant",
        ),
        (("schedule=wsd",), 'schedule = "wsd" needs decay, the number of steps of its fall'),
        (("schedule=piecewise",), "needs factors = { <step> = <factor>, ... }"),
        (("schedule=piecewise", "factors={ half = 0.5 }"), "needs factors = { <step>"),
        (("schedule=join",), 'schedule = "join" needs two parts or more'),
        (("schedule=join", "parts=[{lr = 1}, {lr = 2}]"), "only the last part may go without"),
        (("schedule=join", 'parts=[{lr = 1, schedule = "wsd"}]'), "a part is no wsd"),
        (("loss_scale=big",), 'optimizer.loss_scale: expected "dynamic" or a number above 0'),
        (
            ("loss_scale=0",),
            'optimizer.loss_scale: expected "dynamic" or a number above 0, found 0',
        ),
        (("loss_scale=true",), 'expected "dynamic" or a number above 0, found true (a boolean)'),
        (("loss_scale=8", "skip_nonfinite=3"), "loss_scale skips steps by itself"),
        (("ema=1.0",), "optimizer.ema: expected a number between 0 and 1"),
    ],
)
def test_a_key_that_does_not_belong_in_words(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    assert words in refused(tmp_path, *(f"optimizer.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("zero.stage=4",), "zero.stage: expected 0, 1, 2 or 3, found 4"),
        (("zero.axis=a b",), "zero.axis: expected the name of an axis, or several"),
        (("memory.optimizer=tape",), "memory.optimizer: unknown value 'tape'"),
        (("memory.optimizer=disk", "optimizer.skip_nonfinite=3"), "cannot take a step back"),
        (("memory.optimizer=disk", "optimizer.loss_scale=8"), "cannot take a step back"),
        (("precision.rounding=stochastic",), 'is for param = "bfloat16", not float32'),
        (
            ("precision={param='bfloat16', master=true, rounding='stochastic'}",),
            "drop rounding",
        ),
        (("checkpoint.every=0",), "checkpoint.every: expected an integer of at least 1"),
        (("checkpoint.async=1",), "checkpoint.async: expected a boolean, found 1"),
        (("checkpoint.async_=true",), "checkpoint.async_: unknown key; did you mean 'async'?"),
    ],
)
def test_tables_that_do_not_fit_in_words(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    assert words in refused(tmp_path, *overrides)


PART = '{lr = 1.0, steps = 2}, {lr = 0.5, schedule = "linear"}'
JOINED = schedules.join([schedules.constant(1.0), schedules.linear(0.5, 0.0, 4)], [2])
SCHEDULES: dict[str, tuple[tuple[str, ...], schedules.Function]] = {
    "constant": ((), schedules.constant(0.5)),
    "linear": (("end=0.1",), schedules.linear(0.5, 0.1, STEPS)),
    "cosine": (("warmup=2", "decay=5"), schedules.warmup_cosine(0.5, warmup=2, steps=5)),
    "polynomial": (("power=2.0",), schedules.polynomial(0.5, 0.0, STEPS, power=2.0)),
    "wsd": (("warmup=1", "decay=2"), schedules.wsd(0.5, warmup=1, steps=STEPS, decay=2)),
    "piecewise": (("factors={2 = 0.5, 4 = 0.1}",), schedules.piecewise(0.5, {2: 0.5, 4: 0.1})),
    "join": ((f"parts=[{PART}]", "warmup=2"), schedules.warm(JOINED, 2)),
}


@pytest.mark.parametrize("name", hyper.SCHEDULES)
def test_a_schedule_is_the_librarys(name: str, tmp_path: Path) -> None:
    keys, expected = SCHEDULES[name]
    table = f'optimizer={{lr = 0.5, schedule = "{name}"}}'
    config = read(tmp_path, table, *(f"optimizer.{key}" for key in keys))
    made = schedule(config.optimizer, config.run.steps)
    values = [float(made(torch.tensor(step))) for step in range(STEPS + 2)]
    assert values == [float(expected(torch.tensor(step))) for step in range(STEPS + 2)]


def test_wrappers_go_around_in_their_order(tmp_path: Path) -> None:
    config = read(
        tmp_path, "optimizer.ema=0.9", "optimizer.clip_value=1.0", "precision.param=bfloat16",
        "precision.master=true", "optimizer.loss_scale=dynamic", "zero.stage=2",
    )  # fmt: skip
    params = MODEL.init(
        sw.random.key(0), sw.make_mesh({"data": 2, "tensor": 2}, transport="abstract")
    )
    state = build_optimizer(config, MODEL.declaration).init(params)
    assert set(state) == {"scale", "good", "left", "skipped", "inner"}
    inner = state["inner"]
    assert list(inner) == ["clip_by_value", "clip_by_global_norm", "adamw"]
    assert set(inner["adamw"]) == {"ema", "inner"}
    assert set(inner["adamw"]["inner"]) == {"master", "inner"}
    mean = inner["adamw"]["ema"]["blocks"]["w_up"]
    assert str(mean) == "f32[2 8/data 32]"  # a mean in bfloat16 would stand still
    fixed = build_optimizer(read(tmp_path, "optimizer.loss_scale=64"), MODEL.declaration)
    mesh = sw.make_mesh({"data": 2})
    assert optim.get(fixed.init(MODEL.init(sw.random.key(0), mesh)), "scale").item() == 64.0


def test_stages_and_memories_change_nothing_but_where_things_lie(tmp_path: Path) -> None:
    file = runs.file(tmp_path)
    text = Path(file).read_text().replace("[checkpoint]\nevery = 2\n", "")
    Path(file).write_text(text)
    plain = runs.run(file, "run.steps=4")[0].losses
    for option in ("zero.stage=1", "zero.stage=2", "zero.stage=3"):
        losses, shown = runs.run(file, "run.steps=4", option)
        assert losses.losses == pytest.approx(plain, abs=1e-5), option
        assert "reduce_scatter" in shown
    _, shown = runs.run(file, "run.steps=1", "zero.stage=3")
    assert "[1 16/data 64/tensor]" in shown
    for memory in ("host", "disk"):
        option = f"memory.optimizer={memory}"
        assert runs.run(file, "run.steps=4", option)[0].losses == plain, memory
    for option in ("memory.parameters=host", "memory.activations=host"):
        losses, shown = runs.run(file, "run.steps=4", option)
        assert losses.losses == pytest.approx(plain, abs=1e-5), option
    everything = ("memory.parameters=host", "memory.activations=host", "memory.optimizer=host")
    losses = runs.run(file, "run.steps=4", *everything, "zero.stage=3")[0].losses
    assert losses == pytest.approx(plain, abs=1e-5)
    both = runs.run(file, "run.steps=4", "zero.stage=2", "memory.optimizer=host")[0].losses
    assert both == pytest.approx(plain, abs=1e-5)


def test_stage_3_wants_something_to_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"puts fsdp\(tensor\) in the place of data\(tensor\)"):
        runs.run(runs.file(tmp_path), "zero.stage=3", "zero.axis=tensor")


def test_zero_takes_several_axes(tmp_path: Path) -> None:
    _, shown = runs.run(
        runs.file(tmp_path), "run.steps=1", "mesh={data = 2, depth = 2}", "zero.stage=3",
        'strategy.preset=["data", "data(depth)"]', "zero.axis=data/depth",
    )  # fmt: skip
    assert "[1 16/data/depth 64]" in shown


def test_master_copies_learn_what_bfloat16_alone_loses(tmp_path: Path) -> None:
    """Steps of 1e-5 of weights of 0.02: below half the distance of two bfloat16 numbers."""
    options = ("precision.param=bfloat16", "optimizer.lr=2e-5", "optimizer.schedule=constant")
    nearest = runs.run(runs.file(tmp_path, "a"), *options)[0].losses
    master = runs.run(runs.file(tmp_path, "b"), *options, "precision.master=true")[0].losses
    drawn = runs.run(runs.file(tmp_path, "c"), *options, "precision.rounding=stochastic")[0].losses
    exact = runs.run(runs.file(tmp_path, "d"), *options[1:])[0].losses
    error = [abs(losses[-1] - exact[-1]) for losses in (nearest, master, drawn)]
    assert error[1] < error[0]
    assert drawn != nearest


def test_a_bad_loss_is_skipped_so_many_times_or_ends_the_run(tmp_path: Path) -> None:
    wild = ("optimizer.lr=1e30", "optimizer.schedule=constant", "optimizer.clip_norm=1e9")
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        runs.run(runs.file(tmp_path, "a"), *wild, "optimizer.skip_nonfinite=0")
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        runs.run(runs.file(tmp_path, "b"), *wild, "optimizer.skip_nonfinite=2")


def test_the_running_mean_is_what_is_evaluated(tmp_path: Path) -> None:
    """A mean that keeps all of its past stays at the first parameters: log2(256) bits."""
    still = runs.run(runs.file(tmp_path, "a"), "optimizer.ema=0.999999")[0]
    moved = runs.run(runs.file(tmp_path, "b"))[0]
    assert still.losses == moved.losses
    assert still.validation[-1][1] == pytest.approx(8.0, abs=0.05)
    assert moved.validation[-1][1] < still.validation[-1][1] - 0.05
