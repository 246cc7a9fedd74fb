"""Plans: what is recorded is what ran, abstract plans equal records, files round-trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardwise as sw


def program(sizes: dict[str, int]) -> tuple[Any, ...]:
    mesh = sw.make_mesh(sizes)
    rng = torch.Generator().manual_seed(0)
    x, y = (
        sw.shard(torch.randn(64, 512, generator=rng), mesh, "batch/data embed") for _ in range(2)
    )
    params = {
        "up": sw.shard(torch.randn(512, 2048, generator=rng), mesh, "embed ffn/tensor"),
        "down": sw.shard(torch.randn(2048, 512, generator=rng), mesh, "ffn/tensor embed"),
    }
    return params, x, y


def loss(params: Any, x: sw.ShardedTensor, y: sw.ShardedTensor) -> Any:
    return F.mse_loss(F.gelu(x @ params["up"]) @ params["down"], y)


def step(*args: Any) -> Any:
    """One line, so that records of different calls name one source."""
    return sw.value_and_grad(loss)(*args)


def test_readme_program_communicates_as_it_says() -> None:
    params, x, y = program({"data": 2, "tensor": 4})
    with sw.record() as plan:
        sw.value_and_grad(loss)(params, x, y)
    seen = [(c.phase, c.kind, c.axes, c.bytes, c.op, c.path, c.why) for c in plan.collectives]
    assert seen == [
        ("forward", "all_reduce", ("tensor",), 98304, "mse_loss", None, "planned"),
        ("backward", "all_reduce", ("data",), 1048576, "matmul", "down", "gradient"),
        ("backward", "all_reduce", ("data",), 1048576, "matmul", "up", "gradient"),
        ("report", "all_reduce", ("data",), 4, "value_and_grad", None, "value"),
    ]
    assert {c.source.split(":")[0] for c in plan.collectives} == {"test_plan.py"}
    assert plan.count(axis="data", phase="backward") == 2
    assert plan.bytes(kind="all_reduce", axis="tensor") == 98304


def test_an_abstract_plan_equals_the_record() -> None:
    args = program({"data": 2, "tensor": 4})
    with sw.record() as ran:
        step(*args)
    would = sw.plan(step, *args)
    assert not ran.diff(would)
    assert [o.name for o in ran.ops] == [o.name for o in would.ops]
    assert [o.output for o in ran.ops] == [o.output for o in would.ops]
    assert would.flops == ran.flops == 3 * 2 * 2 * 32 * 512 * 512 - 2 * 32 * 512 * 512
    assert would.result[1]["up"].layout is args[0]["up"].layout


def test_a_plan_for_another_mesh_takes_types_only() -> None:
    args = program({"data": 2, "tensor": 4})
    big = sw.make_mesh({"data": 32, "tensor": 64}, transport="abstract")
    made = sw.plan(sw.value_and_grad(loss), *args, mesh=big)
    assert made.mesh is big
    assert made.elements(axis="tensor", phase="forward") == 2 * 63 * 2 * 512 // 64


def test_memory_counts_parameters_gradients_and_peak() -> None:
    args = program({"data": 2, "tensor": 4})
    made = sw.plan(sw.value_and_grad(loss), *args)
    size = 2 * 512 * 512 * 4
    assert made.memory["parameters"] == size
    assert made.memory["gradients"] == size
    assert made.memory["buffers"] == 2 * 32 * 512 * 4
    assert made.peak_memory >= 2 * size + 2 * 32 * 512 * 4


def test_a_tensor_gathered_twice_is_a_warning() -> None:
    mesh = sw.make_mesh({"data": 2})
    x = sw.shard(torch.ones(4, 2), mesh, "a/data b")
    with sw.record() as plan:
        sw.reshard(x, "a b")
        sw.reshard(x, "a b")
    assert len(plan.warnings) == 1
    assert "is gathered over data again at test_plan.py:" in plan.warnings[0]


def test_files_round_trip(tmp_path: Path) -> None:
    args = program({"data": 2, "tensor": 4})
    made = sw.plan(sw.value_and_grad(loss), *args)
    made.save(tmp_path / "plan.json")
    back = sw.Plan.load(tmp_path / "plan.json")
    assert back.collectives == made.collectives
    assert back.ops == made.ops
    assert (back.flops, back.peak_memory) == (made.flops, made.peak_memory)
    assert str(back) == str(made)
    (tmp_path / "bad.json").write_text('{"mesh": 3}')
    with pytest.raises(ValueError, match="holds no plan"):
        sw.Plan.load(tmp_path / "bad.json")


def test_a_diff_names_rows_that_changed() -> None:
    a = sw.plan(sw.value_and_grad(loss), *program({"data": 2, "tensor": 4}))
    b = sw.plan(sw.value_and_grad(loss), *program({"data": 4, "tensor": 2}))
    assert "->" in str(a.diff(b))
    assert not a.diff(a)
    assert str(a.diff(a)) == "no difference"


def test_axes_of_size_one_leave_no_record() -> None:
    params, x, y = program({"data": 1, "tensor": 1})
    with sw.record() as plan:
        sw.value_and_grad(loss)(params, x, y)
    assert plan.collectives == ()
    assert "no collectives" in str(plan)


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(TypeError, match="unknown"):
        sw.Plan().count(colour="red")
