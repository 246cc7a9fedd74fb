"""eval_shape gives types without memory; check_stable holds a step to the types of its state."""

import pytest
import torch

import shardwise as sw


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def setting():
    grid = mesh(data=2, tensor=2)
    params = {"w": sw.zeros((4, 4), grid, "_ _/tensor"), "b": sw.zeros((4,), grid, "_/tensor")}
    state = {"m": params, "count": 0}
    return params, state, sw.zeros((8, 4), grid, "b/data d")


def loss(params, x):
    return (x @ params["w"] + params["b"]).mean()


def step(params, state, x):
    value, g = sw.value_and_grad(loss)(params, x)
    m = {k: state["m"][k] * 0.9 + g[k] for k in g}
    new = {k: params[k] - m[k] * 0.1 for k in g}
    return new, {"m": m, "count": state["count"] + 1}, value


def test_eval_shape_types_a_step_and_holds_nothing():
    args = setting()
    with sw.record() as plan:
        params, state, value = sw.eval_shape(step, *args)
    assert str(params["w"]) == "f32[4 4/tensor]"
    assert str(value) == "f32[]"
    assert params["w"].mesh.transport == "abstract"
    assert dict(params["w"].mesh.axes) == {"data": 2, "tensor": 2}
    assert params["w"].shards[0].is_meta
    assert state["count"] == 1
    assert not plan.collectives


def test_eval_shape_takes_keywords_and_plain_values():
    x = sw.zeros((4,), mesh(a=2), "_/a")
    got = sw.eval_shape(lambda x, k, t: {"y": x * k + t, "k": k}, x, k=2, t=torch.ones(4))
    assert str(got["y"]) == "f32[4/a]"
    assert got["k"] == 2


def test_a_stable_step_passes():
    sw.check_stable(step, *setting())
    sw.check_stable(lambda p: {k: v * 2 for k, v in p.items()}, setting()[0])
    sw.check_stable(lambda s, x: (s, (x * 2).sum()), setting()[0], setting()[2])


def test_drift_lists_every_path_with_both_types():
    params, state, x = setting()

    def drifting(params, state, x):
        new, state, value = step(params, state, x)
        new = {"w": sw.reshard(new["w"], "_/tensor _"), "b": new["b"].to(torch.bfloat16)}
        state["m"]["w"] = state["m"]["w"].sum(0)
        return new, state, value

    with pytest.raises(sw.LayoutError) as error:
        sw.check_stable(drifting, params, state, x)
    assert error.value.kind == "drift"
    assert str(error.value) == (
        "check_stable: the state changes its type in 3 places\n"
        "  params.b   f32[4/tensor] -> bf16[4/tensor]\n"
        "  params.w   f32[4 4/tensor] -> f32[4/tensor 4]\n"
        "  state.m.w  f32[4 4/tensor] -> f32[4/tensor]"
    )


def test_a_missing_leaf_is_drift():
    params, _, _ = setting()
    with pytest.raises(sw.LayoutError, match=r"p.b  f32\[4/tensor\] -> nothing"):
        sw.check_stable(lambda p: {"w": p["w"]}, params)
    with pytest.raises(TypeError, match="needs its state"):
        sw.check_stable(lambda: 1)


def test_a_loss_beside_a_batch_is_no_state():
    params, _, x = setting()
    sw.check_stable(lambda params, x: (params, loss(params, x)), params, x)


def test_the_real_run_and_the_abstract_one_type_alike():
    args = setting()
    real, shapes = step(*args), sw.eval_shape(step, *args)
    assert str(real) == str(real)
    for a, b in zip(sw.tree.leaves(real), sw.tree.leaves(shapes), strict=True):
        assert str(a) == str(b)
