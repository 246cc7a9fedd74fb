"""Collectives that run under computation: the same numbers as those that wait, and their order."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch

import shardwise as sw
from shardwise import models, strategies
from shardwise.meshlib import distributed, record
from shardwise.ops.transforms import scan as scans

pytestmark = pytest.mark.processes
F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
MIXED = sw.Precision(torch.float64, torch.float32, torch.float64)
LAYERS = 3
CONFIG = models.GPT2Config(layer=LAYERS, embed=8, heads=4, vocab=16, position=8)

Case = tuple[sw.Strategy, dict[str, int], dict[str, Any]]


def cases(size: int) -> dict[str, Case]:
    """Strategy, mesh and options of `value_and_grad` by name."""
    fsdp, data = strategies.fsdp(), strategies.data()
    n = {"data": size}
    found: dict[str, Case] = {
        "fsdp": (fsdp, n, {}),
        "fsdp, kept": (strategies.fsdp(save="gathered"), n, {}),
        "fsdp, all again": (fsdp.replace(recompute="all"), n, {}),
        "fsdp, cheap again": (fsdp.replace(recompute="cheap"), n, {}),
        "fsdp, mixed": (fsdp.replace(precision=MIXED), n, {}),
        "data": (data, n, {}),
        "data, all again": (data.replace(recompute="all"), n, {}),
        "data, mixed": (data.replace(precision=MIXED), n, {}),
        "scattered gradients": (data, n, {"grads": scattered}),
    }
    if size == 4:
        found = {name: found[name] for name in ("fsdp", "data", "scattered gradients")}
        both = {"data": 2, "tensor": 2}
        found["fsdp x 1D"] = (fsdp * strategies.tensor_1d(), both, {})
        found["fsdp x sequence, all again"] = (
            (fsdp * strategies.sequence_parallel()).replace(recompute="all"),
            both,
            {},
        )
        found["data x fsdp"] = (
            strategies.data("replica") * fsdp,
            {"replica": 2, "data": 2},
            {},
        )
    return {
        name: (s if "mixed" in name else s.replace(precision=F64), axes, options)
        for name, (s, axes, options) in found.items()
    }


def scattered(params: Any) -> Any:
    """Each gradient cut along the first dim of a layer that the axis divides (ZeRO-2)."""

    layouts = []
    for path, x in sw.tree.items(params):
        names = [f"d{i}" for i in range(x.ndim)]
        names[int(path.startswith("blocks"))] += "/data"
        layouts.append(" ".join(names))
    at = iter(layouts)
    return sw.tree.map(lambda _: next(at), params)


def step(case: Case) -> Callable[[], Any]:
    """A call of one training step's loss and gradients on a mesh."""
    strategy, axes, options = case
    mesh = sw.make_mesh(axes)
    model = models.gpt2(CONFIG, strategy)
    params = model.init(sw.random.key(3), mesh)
    rng = torch.Generator().manual_seed(5)
    raw = torch.randint(CONFIG.vocab, (4, CONFIG.position + 1), generator=rng)
    batch = sw.shard({"tokens": raw[:, :-1], "labels": raw[:, 1:]}, mesh, strategy["tokens"])
    gradient = sw.value_and_grad(model.loss, **options)
    return lambda: gradient(params, batch)


@contextmanager
def waiting() -> Iterator[None]:
    """Nothing runs ahead inside."""
    asked = scans.can_run_ahead
    scans.can_run_ahead = lambda _values: False
    try:
        yield
    finally:
        scans.can_run_ahead = asked


class Watched:
    """What the transport did, in order: (event, kind, number of the collective).

    Attributes:
        events: start, wait, and what a program adds.
        most: gathered tensors that were alive at a time, from the start of a gather on.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []
        self.most = 0
        self._live = 0

    def starting(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The method, which tells."""

        def start(transport: Any, shards: Any, axes: Any, *extra: Any) -> Any:
            number = sum(event == "start" for event, *_ in self.events)
            self.events.append(("start", kind, number))
            finish = real(transport, shards, axes, *extra)
            if kind == "all_gather":
                self._live += 1
                self.most = max(self.most, self._live)

            def finished() -> Any:
                self.events.append(("wait", kind, number))
                out = finish()
                if kind == "all_gather":
                    weakref.finalize(out[0].untyped_storage(), self._freed)
                return out

            return finished

        return start

    def _freed(self) -> None:
        self._live -= 1

    def marks(self, event: str, number: int) -> None:
        """Add one of the program's own."""
        self.events.append((event, "", number))

    def began(self) -> list[str]:
        """Kinds of the collectives in the order of their starts."""
        return [kind for event, kind, _ in self.events if event == "start"]


@contextmanager
def watched() -> Iterator[Watched]:
    seen = Watched()
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    of = distributed.DistributedTransport
    real = {kind: getattr(of, f"start_{kind}") for kind in kinds}
    for kind in kinds:
        setattr(of, f"start_{kind}", seen.starting(kind, real[kind]))
    try:
        yield seen
    finally:
        for kind in kinds:
            setattr(of, f"start_{kind}", real[kind])


def listed(log: record.Log) -> list[str]:
    """Every collective as it was written."""
    return [
        f"{c.kind} {c.axes} {c.shape} {c.dtype} {c.phase} {c.path} {c.source} {c.why}"
        for c in log.collectives
    ]


def ahead(size: int) -> dict[str, Any]:
    """Loss and gradients of every case, ahead and waiting; records and the order of starts."""
    found: dict[str, Any] = {}
    for name, case in cases(size).items():
        call = step(case)
        with watched() as seen, record.opened(record.Log()) as plan:
            loss, grads = call()
        with waiting(), record.opened(record.Log()) as plain:
            slow_loss, slow = call()
        slow_of = dict(sw.tree.items(slow))
        found[f"{name}: loss"] = loss.full_tensor()
        assert torch.equal(found[f"{name}: loss"], slow_loss.full_tensor())
        for path, grad in sw.tree.items(grads):
            value = found[f"{name}: {path}"] = grad.full_tensor()
            gap = (value - slow_of[path].full_tensor()).abs().max()
            # An all_reduce over more than two adds in an order that depends on the place; on a GPU
            # rows of an embedding's gradient are added in any order.
            exact = size == 2 and value.device.type == "cpu"
            assert gap <= (0 if exact else 1e-6 if "mixed" in name else 1e-14), (name, path, gap)
        ours, theirs = listed(plan), listed(plain)
        if " x " in name:  # the second sum of a gradient, over another axis, comes a layer later
            ours, theirs = sorted(ours), sorted(theirs)
        assert ours == theirs, name
        found[f"{name}: starts"] = seen.began()
        overlapped = sum(
            a[0] == "start" and b[0] == "start" for a, b in itertools.pairwise(seen.events)
        )
        assert overlapped, f"{name}: each collective was waited for at once"
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ahead_equals_waiting_and_the_simulated_mesh(size: int) -> None:
    first, *others = launch(ahead, size, size, timeout=240)
    for outcome in others:
        for key, value in first.value.items():
            if key.endswith("starts"):
                assert outcome.value[key] == value, key
    for name, case in cases(size).items():
        loss, grads = step(case)()
        eps = 1e-5 if "mixed" in name else 1e-11
        for key, value in [("loss", loss), *sw.tree.items(grads)]:
            torch.testing.assert_close(
                first.value[f"{name}: {key}"],
                value.full_tensor(),
                rtol=eps,
                atol=eps,
                msg=f"{name}: {key}",
            )


def loop(strategy: str, recompute: str) -> dict[str, Any]:
    """Three layers of one parameter: the events of a step, and gathers alive at a time."""
    mesh = sw.make_mesh({"data": 2})
    stack = torch.linspace(-1, 1, LAYERS * 16, dtype=torch.float64).reshape(LAYERS, 4, 4)
    rest = {"fsdp": "layer m/data n", "data": "layer m n"}[strategy]
    w = sw.shard(stack, mesh, rest)
    x = sw.shard(torch.ones(4, 4, dtype=torch.float64), mesh, "b/data m")
    runs: list[int] = []

    gc.disable()  # what is let go of must go without it
    with watched() as seen:

        def use(w: sw.ShardedTensor) -> sw.ShardedTensor:
            return sw.reshard(w, "m n {R:data}", save="shard")

        def layer(carry: tuple[Any, int], w: sw.ShardedTensor) -> tuple[Any, None]:
            x, number = carry
            runs.append(number)
            seen.marks("compute" if len(runs) <= LAYERS else "again", number)
            y = (x @ w).sin()
            y.shards[0].register_hook(lambda _: seen.marks("back", number))
            return (y, number + 1), None

        def loss(w: sw.ShardedTensor, x: sw.ShardedTensor) -> sw.ShardedTensor:
            (y, _), _ = sw.scan(layer, (x, 0), w, use=use, recompute=recompute)  # pyright: ignore
            return y.sum()

        grad, _ = sw.grad(loss, argnums=(0, 1))(w, x)
    return {"events": [list(e) for e in seen.events], "most": seen.most, "grad": grad.full_tensor()}


def again() -> dict[str, Any]:
    """A pullback called twice, and a gradient that is differentiated; a parameter is frozen."""
    mesh = sw.make_mesh({"data": 2})
    rng = torch.Generator().manual_seed(1)
    value = torch.rand(LAYERS, 4, 4, generator=rng, dtype=torch.float64)
    x = sw.shard(torch.rand(4, 4, generator=rng, dtype=torch.float64), mesh, "b/data m")
    found: dict[str, Any] = {}
    for rest, recompute in itertools.product(("layer m/data n", "layer m n"), ("none", "all")):
        w, frozen = sw.shard(value, mesh, rest), sw.shard(value + 1, mesh, rest)

        def loss(
            w: sw.ShardedTensor, recompute: Any = recompute, frozen: sw.ShardedTensor = frozen
        ) -> sw.ShardedTensor:
            def layer(x: Any, p: Any) -> tuple[Any, None]:
                return (x @ p["w"]).sin() * p["frozen"], None

            def use(p: Any) -> Any:
                return sw.reshard(p, "m n {R:data}", save="shard")

            stacks = {"w": w, "frozen": frozen}
            return sw.scan(layer, x, stacks, use=use, recompute=recompute)[0].sum()

        name = f"{rest}, {recompute}"
        y, pull = sw.vjp(loss, w)
        seed = sw.reshard(sw.full((), 1.0, mesh, dtype=torch.float64), y.layout.dual)
        first, second = pull(seed)[0], pull(seed)[0]
        assert torch.equal(first.shards[0], second.shards[0]), name
        found[f"{name}: twice"] = first.full_tensor()
        leaf = w.shards[0].clone().requires_grad_()
        inner = sw.ShardedTensor((leaf,), w._type.with_layout(w.layout, True))
        g = sw.grad(loss)(inner)
        (found[f"{name}: second"],) = torch.autograd.grad((g.shards[0] ** 2).sum(), leaf)
        with waiting():
            g = sw.grad(loss)(inner)
            (plain,) = torch.autograd.grad((g.shards[0] ** 2).sum(), leaf)
        torch.testing.assert_close(found[f"{name}: second"], plain, rtol=0, atol=0)
        assert plain.abs().max() > 1e-3
    return found


def test_pullbacks_run_again_and_gradients_are_differentiated() -> None:
    first, _ = launch(again, 2)
    twice = [v for k, v in first.value.items() if k.endswith("twice")]
    assert len(twice) == 4
    for value in twice[1:]:
        torch.testing.assert_close(value, twice[0], rtol=1e-14, atol=1e-14)


LOOPS = [("fsdp", "none"), ("fsdp", "all"), ("data", "none"), ("data", "all")]


def loops() -> dict[str, Any]:
    return {f"{s}, {r}": loop(s, r) for s, r in LOOPS}


def test_order_of_starts_computation_and_waits() -> None:
    first, second = launch(loops, 2)
    for name, found in first.value.items():
        assert second.value[name]["events"] == found["events"], name
        assert torch.equal(found["grad"], first.value["fsdp, none"]["grad"]), name
        is_cut = name.startswith("fsdp")
        at = {tuple(event): i for i, event in enumerate(found["events"])}
        compute = [at["compute", "", i] for i in range(LAYERS)]
        back = [at["back", "", i] for i in range(LAYERS)]
        assert back == sorted(back, reverse=True)
        gathers = _bounds(found["events"], "all_gather")
        assert len(gathers) == (2 * LAYERS if is_cut else 0), name
        assert found["most"] == (2 if is_cut else 0), name  # layers gathered at a time
        for i, (start, wait) in enumerate(gathers[1:LAYERS]):  # layer i + 1 under layer i
            assert start < compute[i] < wait < compute[i + 1], name
        again = dict(zip(reversed(range(LAYERS)), gathers[LAYERS:], strict=False))
        for i in range(LAYERS - 1) if is_cut else ():  # gathered again under layer i + 1
            assert back[i + 1] < again[i][0] < back[i] < again[i][1], name
        sums = _bounds(found["events"], "reduce_scatter" if is_cut else "all_reduce")
        gone = dict(zip(reversed(range(LAYERS)), sums, strict=False))
        for i in range(1, LAYERS):  # the gradient of layer i under layer i - 1
            assert back[i] < gone[i][0] < back[i - 1] < gone[i][1], name


SMOKE = """
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
BENCHMARK = str(Path(__file__).parents[2] / "benchmarks" / "overlap.py")


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    first, second = launch(SMOKE, 2, BENCHMARK, "--rounds", "1", "--layers", "2", "--rows", "1")
    lines = first.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["strategy", "fsdp", "data"]
    assert not second.out


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ahead_equals_waiting_on_two_gpus() -> None:
    first, second = launch(ahead, 2, 2, timeout=240)
    for key, value in first.value.items():
        if key.endswith("starts"):
            assert second.value[key] == value, key


def _bounds(events: list[list[Any]], kind: str) -> list[tuple[int, int]]:
    """Where each collective of a kind starts and is waited for."""
    at = {tuple(event): i for i, event in enumerate(events)}
    numbers = [number for event, of, number in events if event == "start" and of == kind]
    return [(at["start", kind, n], at["wait", kind, n]) for n in numbers]
