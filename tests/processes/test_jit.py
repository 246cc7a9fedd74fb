"""`jit` on Gloo processes: bit for bit the function itself, one order of collectives on all ranks.

Two steps each, plainly and jitted: the graph as captured, the graph of functional collectives after
the passes, and that graph compiled.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any

import pytest
import torch
from moves import KINDS, everything, kinds
from processes import launch
from steps import STEPS, gathered, shards, training

import shardwise as sw
from shardwise.ops.budget import BudgetError
from shardwise.ops.transforms import pipeline
from shardwise.ops.transforms.agreement import Call, agreed
from shardwise.ops.transforms.lifetimes import peak_bytes
from shardwise.optim import flat

pytestmark = pytest.mark.processes
EAGER = {"backend": "eager"}
PASSES = {"backend": "eager", "passes": ("duplicates", "bucket", "overlap")}
TORCH = ("torch._dynamo", "torch._inductor.pattern_matcher")  # what every capture imports


def row(c: Any) -> str:
    return f"{c.kind} over {'/'.join(c.axes)}, {c.bytes} B"


def trained(name: str, mesh: sw.Mesh, layer: int) -> dict[str, Any]:
    """Shards after two steps, and what the graphs move."""
    found: dict[str, Any] = {}
    for label, options in {"plain": None, "graph": EAGER, "passes": PASSES}.items():
        step, params, state, rows = training(name, mesh, layer=layer)
        if options is not None:
            step = sw.jit(step, donate_argnums=(0, 1), options=options)
        for _ in range(2):
            params, state, loss = step(params, state, rows)
        found[label] = shards((params, state, loss))
        if options is not None:
            assert len(step.programs) == 1
            found[f"{label} moves"] = list(map(row, step.graph.collectives))
            captured = Counter(map(row, step.captured.collectives))
            assert captured == Counter(map(row, step.plan.collectives))
    return found


def all_trained(axes: dict[str, int], names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    flat.ON_HOST = ()  # read scalars as on a GPU and in a trace, not as Python's numbers
    mesh = sw.make_mesh(axes)
    return {name: trained(name, mesh, 1) for name in names}


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"data": 2, "tensor": 1}, ["fsdp, all again", "accumulated"]),
        ({"data": 2, "tensor": 2}, ["data x 1D"]),
        pytest.param({"data": 2, "tensor": 2}, ["zero"], marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 1}, list(STEPS), marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_the_function_bit_for_bit(
    axes: dict[str, int], names: list[str]
) -> None:
    size = axes["data"] * axes["tensor"]
    outcomes = launch(all_trained, size, axes, names, preload=TORCH, timeout=400)
    for outcome, (name, first) in itertools.product(outcomes, outcomes[0].value.items()):
        found = outcome.value[name]
        for label in ("graph", "passes"):
            for one, other in zip(found[label], found["plain"], strict=True):
                assert torch.equal(one, other), (outcome.rank, name, label)
            assert found[f"{label} moves"] == first[f"{label} moves"]
        assert len(found["passes moves"]) < len(found["graph moves"])


def all_kinds(axes: dict[str, int], folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    mesh = sw.make_mesh(axes)
    inputs = kinds(mesh)
    found: dict[str, Any] = {"plain": shards(everything(inputs))}
    ways = {"graph": EAGER, "passes": PASSES} | ({"compiled": {}} if folder else {})
    for label, options in ways.items():
        jitted = sw.jit(everything, options=options)
        found[label] = shards(jitted(inputs))
        captured = Counter(map(row, jitted.captured.collectives))
        assert captured == Counter(map(row, jitted.plan.collectives))
        assert {c.kind for c in jitted.captured.collectives} == KINDS
    return found


@pytest.mark.parametrize(
    "axes",
    [  # of two processes, also through inductor
        pytest.param({"data": 2, "tensor": 1}, marks=pytest.mark.slow),
        {"data": 2, "tensor": 2},
    ],
)
def test_every_collective_means_the_same_in_a_graph(axes: dict[str, int], tmp_path: Any) -> None:
    size = axes["data"] * axes["tensor"]
    folder = str(tmp_path) if size == 2 else ""
    outcomes = launch(all_kinds, size, axes, folder, preload=TORCH, timeout=400)
    for outcome in outcomes:
        plain = outcome.value.pop("plain")
        for label, found in outcome.value.items():
            for number, (one, other) in enumerate(zip(found, plain, strict=True)):
                assert torch.equal(one, other), (outcome.rank, label, number)
    assert len(outcomes[0].value) == (3 if folder else 2)


def disagreeing() -> dict[str, Any]:
    """Orders of three ranks; and a jitted function whose passes do nothing on one of them."""
    rank = sw.make_mesh({"data": -1}).coords[0]["data"]
    a, b, c = Call((0, 1, 2), "a"), Call((0, 1, 2), "b"), Call((0, 1), "c")
    verdicts = {
        "equal": agreed([a, b]),
        "crossed": agreed([b, a] if rank == 2 else [a, b]),
        "one less": agreed([a] if rank == 0 else [a, b]),
        "others' group": agreed([a, b] if rank == 2 else [a, c, b]),
        "crossed groups": agreed({0: [a, c], 1: [c, a], 2: [a]}[rank]),
    }
    if rank == 1:
        pipeline._run = lambda name, module, options: module
    mesh = sw.make_mesh({"data": -1})
    xs = [sw.full((n,), 1.0, mesh, "n {U:data}") for n in (3, 6)]

    @sw.jit(options={"backend": "eager", "passes": "bucket"})
    def summed(xs: Any) -> Any:
        return [sw.reshard(x, "n") for x in xs]

    values = [x.full_tensor().tolist() for x in summed(xs)]
    return {"verdicts": verdicts, "values": values, "moves": len(summed.graph.collectives)}


def test_an_order_that_ranks_disagree_on_is_not_used() -> None:
    for outcome in launch(disagreeing, 3, preload=TORCH):
        assert outcome.value["verdicts"] == {
            "equal": True,
            "crossed": False,
            "one less": False,
            "others' group": True,
            "crossed groups": False,
        }
        assert outcome.value["values"] == [[1.0] * 3, [1.0] * 6]
        assert outcome.value["moves"] == 2  # not the one that two of the three had made of them


ALL = {"backend": "eager", "passes": ("duplicates", "recompute", "bucket", "overlap")}


def budgeted() -> dict[str, Any]:
    """A step at several budgets; at last one that only rank 0 can keep."""
    torch.set_num_threads(1)
    mesh = sw.make_mesh({"data": -1})
    step, params, x = gathered(mesh)
    found: dict[str, Any] = {"plain": shards(step(params, x))}
    jitted = sw.jit(step, options=EAGER)
    jitted(params, x)
    peak = found["peak"] = peak_bytes(jitted.graph.module)
    for share in (4.0, 1.0, 0.8):  # passes fit, they do not, values run again
        jitted = sw.jit(step, options=ALL | {"memory_budget": int(peak * share)})
        found[f"values {share}"] = shards(jitted(params, x))
        found[f"peak {share}"] = peak_bytes(jitted.graph.module)
        found[f"moves {share}"] = [f"{row(c)} {c.phase}" for c in jitted.graph.collectives]
    for label, budget in {"all": 1000, "one": 1000 if mesh.coords[0]["data"] else 10**9}.items():
        with pytest.raises(BudgetError) as caught:
            sw.jit(step, options=ALL | {"memory_budget": budget})(params, x)
        found[f"refused {label}"] = [str(caught.value), caught.value.shortfall]
    return found


def test_a_budget_is_kept_on_all_ranks_or_refused_on_all() -> None:
    outcomes = launch(budgeted, 2, preload=TORCH, timeout=200)
    first, second = (outcome.value for outcome in outcomes)
    for found, share in itertools.product((first, second), (4.0, 1.0, 0.8)):
        assert found[f"peak {share}"] <= int(found["peak"] * share)
        for one, other in zip(found[f"values {share}"], found["plain"], strict=True):
            assert torch.equal(one, other)
        assert found[f"moves {share}"] == first[f"moves {share}"]
    assert len(first["moves 4.0"]) < len(first["moves 1.0"]) < len(first["moves 0.8"])
    assert any("regather" in move for move in first["moves 0.8"])
    for label, rank in {"all": 0, "one": 1}.items():
        text, shortfall = first[f"refused {label}"]
        assert second[f"refused {label}"] == [text, shortfall]
        assert text.startswith(f"rank {rank}: no choice of values to recompute fits 1,000 B per")
        assert f"{shortfall:,} B are missing" in text
