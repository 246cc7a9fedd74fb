"""`jit`: one graph of a step equals the step; donation, plans, printing, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moves import KINDS, everything, kinds
from steps import STEPS, shards, training

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.ops.budget import BudgetError
from shardwise.ops.transforms import lowering, passes
from shardwise.ops.transforms.graph import printed
from shardwise.ops.transforms.lifetimes import peak_bytes
from shardwise.optim import flat

EAGER = {"backend": "eager"}
F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
CASES = {
    "one device": (strategies.data(), {"data": 1}),
    "data x 1D": (strategies.data() * strategies.tensor_1d(), {"data": 2, "tensor": 2}),
    "fsdp": (strategies.fsdp(), {"data": 2}),
    "2D streamed": (strategies.tensor_2d(), {"row": 2, "col": 2}),
    "3D": (strategies.tensor_3d(), {"i": 2, "j": 2, "k": 2}),
}


def prepared(name: str, dtype: sw.Precision = F64) -> tuple[Any, Any, Any, Any]:
    """A training step and its arguments."""
    strategy, axes = CASES[name]
    strategy = strategy.replace(precision=dtype)
    mesh = sw.make_mesh(axes)
    config = models.LlamaConfig(layer=2, embed=16, heads=4, kv_heads=4, ffn=24, vocab=32)
    model = models.llama(config, strategy)
    params = model.init(sw.random.key(0), mesh)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    tokens = torch.arange(8 * 6).reshape(8, 6) % 32
    rows = sw.shard({"tokens": tokens, "labels": tokens.roll(-1, 1)}, mesh, strategy["tokens"])
    gradient = sw.value_and_grad(model.loss)

    def step(params: Any, state: Any, rows: Any) -> tuple[Any, Any, Any]:
        loss, grads = gradient(params, rows)
        return *optimizer.step(grads, state, params), loss

    return step, params, optimizer.init(params), rows


def same(a: Any, b: Any, tolerance: float) -> None:
    for (path, x), (_, y) in zip(sw.tree.items(a), sw.tree.items(b), strict=True):
        assert x._type is y._type or x.layout is y.layout, path
        torch.testing.assert_close(
            x.full_tensor(), y.full_tensor(), rtol=tolerance, atol=tolerance, msg=path
        )


@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_the_function_itself(name: str) -> None:
    step, params, state, rows = prepared(name)
    jitted = sw.jit(step, options=EAGER)
    expected = step(*step(params, state, rows)[:2], rows)
    found = jitted(*jitted(params, state, rows)[:2], rows)
    same(found, expected, 1e-12)
    assert len(jitted.programs) == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_graph_is_the_function_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulated, scanned and recomputed steps too; each collective of the plan is one op."""
    monkeypatch.setattr(flat, "ON_HOST", ())  # read scalars as on a GPU, and as a trace does
    step, params, state, rows = training(name, sw.make_mesh({"data": 2, "tensor": 2}), layer=1)
    jitted = sw.jit(step, options=EAGER)
    expected, found = step(params, state, rows), jitted(params, state, rows)
    for one, other in zip(shards(found), shards(expected), strict=True):
        assert torch.equal(one, other)
    assert jitted.captured.collectives == jitted.plan.collectives
    assert {c.phase for c in jitted.plan.collectives} >= {"forward", "backward"}


def test_every_collective_means_the_same_in_a_graph() -> None:
    inputs = kinds(sw.make_mesh({"data": 2, "tensor": 2}))
    jitted = sw.jit(everything, options=EAGER)
    for one, other in zip(shards(jitted(inputs)), shards(everything(inputs)), strict=True):
        assert torch.equal(one, other)
    assert jitted.captured.collectives == jitted.plan.collectives
    assert {c.kind for c in jitted.plan.collectives} == KINDS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_inductor_gives_a_simulated_step_to_a_few_ulps() -> None:
    step, params, state, rows = training(
        "data x 1D", sw.make_mesh({"data": 2, "tensor": 1}), torch.float32, layer=1
    )
    loss, expected = sw.jit(step)(params, state, rows)[2], step(params, state, rows)[2]
    torch.testing.assert_close(loss.full_tensor(), expected.full_tensor(), rtol=3e-6, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_inductor_gives_the_same_step() -> None:
    step, params, state, rows = prepared("one device")
    jitted = sw.jit(step, donate_argnums=(0, 1))
    expected = step(params, state, rows)
    same(jitted(params, state, rows), expected, 1e-12)
    assert jitted.compile_seconds > 0


def test_donated_arguments_give_their_memory_and_raise() -> None:
    step, params, state, rows = prepared("one device")
    jitted = sw.jit(step, donate_argnums=(0, 1), options=EAGER)
    addresses = {x.shards[0].data_ptr() for x in sw.tree.leaves(params)}
    expected = step(params, state, rows)
    new, _, _ = found = jitted(params, state, rows)
    same(found, expected, 1e-12)
    assert {x.shards[0].data_ptr() for x in sw.tree.leaves(new)} == addresses
    with pytest.raises(sw.LayoutError, match=r"donated at test_jit\.py:\d+") as caught:
        params["embed"].full_tensor()
    assert caught.value.kind == "donated"


def test_a_memory_budget_holds_for_each_device_of_a_simulated_mesh() -> None:
    x = sw.shard(torch.rand(512), sw.make_mesh({"data": 2}), "n/data")

    def step(x: Any) -> Any:
        kept = torch.exp(x)  # read at the end
        return (torch.sin(x) + 1.0).sum() + kept.sum()

    jitted = sw.jit(step, options=EAGER)
    jitted(x)
    budget = int(peak_bytes(jitted.graph.module) / 2 * 0.95)
    small = sw.jit(step, options={**EAGER, "memory_budget": budget})
    for one, other in zip(shards(small(x)), shards(step(x)), strict=True):
        assert torch.equal(one, other)
    assert peak_bytes(small.graph.module) <= 2 * budget
    assert any("recomputed" in node.meta for node in small.graph.module.graph.nodes)
    with pytest.raises(BudgetError, match="1,000 B per device, 2,000 B on 2") as caught:
        sw.jit(step, options={**EAGER, "memory_budget": 1000})(x)
    least = 1000 + caught.value.shortfall
    assert least < budget
    sw.jit(step, options={**EAGER, "memory_budget": least})(x)


def test_replicas_that_share_memory_are_not_written_over() -> None:
    """On a simulated mesh replicas are one tensor: a donated step must read before it writes."""
    mesh = sw.make_mesh({"data": 3})
    x = sw.full((4,), 1.0, mesh, "n", dtype=torch.float64)

    def double(x: Any) -> Any:
        return x + x

    assert sw.jit(double, donate_argnums=0, options=EAGER)(x).full_tensor().tolist() == [2.0] * 4


def test_the_plan_and_the_graph_are_of_the_whole_step() -> None:
    step, params, state, rows = prepared("data x 1D")
    jitted = sw.jit(step, options=EAGER)
    with pytest.raises(ValueError, match="nothing is compiled"):
        _ = jitted.graph
    jitted(params, state, rows)
    with sw.record() as plan:
        step(params, state, rows)
    kinds = [(c.kind, c.axes, c.elements, c.phase) for c in plan.collectives]
    assert [(c.kind, c.axes, c.elements, c.phase) for c in jitted.plan.collectives] == kinds
    lines = str(jitted.graph).splitlines()
    assert lines[0].startswith("params_blocks_attn_norm_0  f64[2 16]")
    assert lines[-1].startswith("return ")
    assert any(" = mm(" in line for line in lines)


def test_numbers_and_static_arguments_are_part_of_the_program() -> None:
    mesh = sw.make_mesh({"data": 1})
    x = sw.shard(torch.ones(3), mesh)
    jitted = sw.jit(
        lambda x, n, how: x * n if how == "times" else x + n, static_argnums=2, options=EAGER
    )
    assert jitted(x, 2, "times").full_tensor().tolist() == [2.0] * 3
    assert jitted(x, 3, "times").full_tensor().tolist() == [3.0] * 3
    assert jitted(x, 3, "plus").full_tensor().tolist() == [4.0] * 3
    assert len(jitted.programs) == 3
    jitted(x, 3, "plus")
    assert len(jitted.programs) == 3


def test_it_is_a_decorator_and_returns_plain_values() -> None:
    @sw.jit(options=EAGER)
    def f(x: Any) -> Any:
        return {"y": F.relu(x), "name": "y", "n": 3}

    x = sw.shard(torch.tensor([-1.0, 2.0]), sw.make_mesh({"data": 2}), "n/data")
    found = f(x)
    assert found["y"].full_tensor().tolist() == [0.0, 2.0]
    assert (found["name"], found["n"]) == ("y", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "unknown backend 'tvm'"),
        ({"bucket_byte": 3}, "unknown option 'bucket_byte'; did you mean 'bucket_bytes'"),
        ({"max_autotun": True}, "unknown option 'max_autotun'; did you mean 'max_autotune'"),
        ({"passes": "overlapped"}, "unknown pass 'overlapped'; did you mean 'overlap'"),
        ({"bucket_bytes": -1}, "bucket_bytes is a number of bytes, got -1"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sw.jit(lambda x: x, options=options)


def test_a_graph_prints_one_line_an_op(golden: Any) -> None:
    """In the captured graph a collective is one line, with its axis, bytes, path and source."""
    mesh = sw.make_mesh({"data": 2})
    params = {"w": sw.shard(torch.ones(4, 2), mesh, "a/data b"), "b": sw.zeros((2,), mesh)}
    x = sw.shard(torch.ones(6, 4), mesh, "n/data a")

    def loss(params: Any, x: Any) -> Any:
        w = sw.reshard(params["w"], "a b {R:data}")
        return torch.relu(x @ w + params["b"]).mean()

    @sw.jit(options=EAGER)
    def jitted(params: Any, x: Any) -> Any:
        return sw.grad(loss)(params, x)

    jitted(params, x)
    golden("jit_captured", str(jitted.captured))
    golden("jit_graph", str(jitted.graph))


def simplified(f: Any, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
    module = lowering.captured(f, inputs)
    passes.simplified(module)
    return module


def test_the_gradient_of_a_label_is_no_scatter() -> None:
    """`spread`: a scatter of one entry a row into zeros becomes a comparison, with equal values."""
    step, params, state, rows = prepared("one device")
    jitted = sw.jit(step, options=EAGER)
    jitted(params, state, rows)
    assert "scatter" not in str(jitted.graph)
    plain = simplified(
        lambda x, i: [torch.zeros_like(x).scatter_add(-1, i, x[:, :1])],
        [torch.rand(3, 4), torch.tensor([[1], [0], [3]])],
    )
    assert "scatter_add" in str(printed(plain))  # zeros_like is not new_zeros: left alone


def test_tables_of_constants_are_folded() -> None:
    """Angles of rotary positions depend on no input: no sine is left in the graph."""
    step, params, state, rows = prepared("one device")
    jitted = sw.jit(step, options=EAGER)
    jitted(params, state, rows)
    assert " sin(" not in str(jitted.graph)
    assert " cos(" not in str(jitted.graph)


def test_random_numbers_are_not_folded() -> None:
    module = simplified(lambda x: [x + torch.rand(4)], [torch.zeros(4)])
    first, second = module(torch.zeros(4))[0], module(torch.zeros(4))[0]
    assert not torch.equal(first, second)
