"""Norms and clipping over mixed layouts and sub-meshes; how many collectives optimizers take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizers import AXES, LAYOUTS, matrices, values

import shardwise as sw
from shardwise import optim


def test_norm_of_replicated_and_cut_leaves_counts_each_element_once() -> None:
    mesh = sw.make_mesh(AXES)
    expected = math.sqrt(sum(float(v.square().sum()) for v in values(0).values()))
    for place in LAYOUTS.values():
        with sw.record() as plan:
            norm = optim.global_norm(sw.shard(values(0), mesh, place))
        assert norm.item() == pytest.approx(expected, rel=1e-13)
        assert not norm.layout.axes
        assert plan.count() <= 1


def two_stages(tree: dict[str, torch.Tensor]) -> tuple[dict[str, Any], sw.Mesh]:
    """Leaves on the two halves of a mesh, cut and replicated there, and one on the whole."""
    mesh = sw.make_mesh({"pipe": 2, "x": 2})
    first, last = mesh.at(pipe=0), mesh.at(pipe=1)
    return {
        "w": sw.shard(tree["w"], first, "i/x o"),
        "tall": sw.shard(tree["tall"], last, "i o/x"),
        "b": sw.shard(tree["b"], last, "o"),
        "stack": sw.shard(tree["stack"], mesh, "l/pipe i/x o"),
        "s": sw.shard(tree["s"], first, ""),
    }, mesh


@pytest.mark.parametrize("with_whole", [True, False])
def test_norm_over_sub_meshes(with_whole: bool) -> None:
    tree, _ = two_stages(values(0))
    if not with_whole:
        del tree["stack"]
    kept = {k: values(0)[k] for k in tree}
    expected = math.sqrt(sum(float(v.square().sum()) for v in kept.values()))
    norm = optim.global_norm(tree)
    assert norm.item() == pytest.approx(expected, rel=1e-13)
    assert norm.mesh.size == 4  # every device of any leaf holds it


OPTS = {
    "adamw": optim.adamw(0.01),
    "clipped": optim.chain(
        optim.clip_by_global_norm(0.5), optim.adamw(optim.schedules.linear(0.1, 0.0, 9))
    ),
    "lamb": optim.lamb(0.01),
    "lars": optim.lars(0.1),
    "adafactor": optim.adafactor(0.05),
    "came": optim.came(0.01),
    "adam8bit": optim.adam8bit(0.01, block=4, least=100),
    "skipping": optim.skip_nonfinite(optim.sgd(0.1, momentum=0.9)),
    "injected": optim.inject(optim.lion, lr=0.1),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", OPTS)
def test_parameters_live_on_several_sub_meshes(name: str, whole: bool) -> None:
    opt = OPTS[name]
    alone = sw.make_mesh({"x": 1})
    ours, _ = two_stages(values(0))
    if not whole:
        del ours["stack"]
    theirs = {k: sw.shard(values(0)[k], alone) for k in ours}
    state, other = opt.init(ours), opt.init(theirs)
    for seed in range(1, 4):
        grads = {k: g for k, g in two_stages(values(seed))[0].items() if k in ours}
        ours, state = opt.step(grads, state, ours)
        theirs, other = opt.step({k: sw.shard(values(seed)[k], alone) for k in ours}, other, theirs)
    for k, p in ours.items():
        torch.testing.assert_close(p.full_tensor(), theirs[k].full_tensor(), rtol=1e-12, atol=1e-12)


def test_clipping_by_norm_leaves_small_gradients_alone_and_keeps_the_norm() -> None:
    mesh = sw.make_mesh(AXES)
    params = sw.shard(values(0), mesh, LAYOUTS["three axes"])
    grads = sw.shard(values(1), mesh, LAYOUTS["three axes"])
    norm = math.sqrt(sum(float(v.square().sum()) for v in values(1).values()))
    clip = optim.clip_by_global_norm(2 * norm)
    same, state = clip.update(grads, clip.init(params), params)
    assert optim.get(state, "norm").item() == pytest.approx(norm, rel=1e-13)
    assert all(
        torch.equal(a.full_tensor(), b.full_tensor())
        for a, b in zip(same.values(), grads.values(), strict=True)
    )
    clip = optim.clip_by_global_norm(norm / 4)
    small, _ = clip.update(grads, clip.init(params), params)
    assert optim.global_norm(small).item() == pytest.approx(norm / 4, rel=1e-6)


def test_gradients_that_are_sums_are_refused_by_the_norm() -> None:
    mesh = sw.make_mesh({"x": 2, "y": 2})
    grads = {"w": {"up": sw.full((4, 4), 1.0, mesh, "i/x o {U:y}")}}
    clip = optim.clip_by_global_norm(1.0)
    with pytest.raises(sw.LayoutError) as error:
        clip.update(grads, clip.init(grads), grads)
    text = str(error.value)
    assert "global_norm: w.up is f32[4/x 4]{U:y}, still a sum over ['y']" in text
    assert 'sw.reshard(w.up, "_/x _")' in text
    assert error.value.kind == "unreduced"


@pytest.mark.parametrize(
    ("name", "opt", "most"),
    [
        ("sgd", optim.sgd(0.1, momentum=0.9), 0),
        ("adamw", optim.adamw(0.1), 0),
        ("lion", optim.lion(0.1), 0),
        ("adam8bit", optim.adam8bit(0.1, block=4, least=100), 0),
        ("clip", optim.clip_by_global_norm(1.0), 1),
        ("skip", optim.skip_nonfinite(optim.adam(0.1)), 1),
        ("lamb", optim.lamb(0.1), 1),
        ("lars", optim.lars(0.1), 1),
        ("adafactor", optim.adafactor(0.1), 4),
        ("came", optim.came(0.1), 5),
    ],
)
def test_collectives_of_a_step(name: str, opt: optim.Transform, most: int) -> None:
    """Scalars and rows of all tensors go together: a few collectives whatever the tree's size."""
    mesh = sw.make_mesh({"x": 4})
    params = {f"{k}{i}": values(i)[k] for i in range(5) for k in ("w", "tall")}
    layouts = dict.fromkeys(params, "i/x o")
    sharded, grads = sw.shard(params, mesh, layouts), sw.shard(params, mesh, layouts)
    state = opt.init(sharded)
    with sw.record() as plan:
        opt.step(grads, state, sharded)
    assert plan.count() <= most
    assert plan.count(kind="all_gather") == 0
    if name == "lamb":  # two numbers per tensor, all_reduced on four devices
        assert plan.bytes() == 2 * 3 / 4 * 2 * len(params) * 8


def test_muon_shares_matrices_out_and_gathers_only_few() -> None:
    mesh = sw.make_mesh({"x": 4})
    opt = optim.muon(0.1, dtype=None)

    def planned(count: int, layout: str) -> Any:
        params = {f"w{i}": values(i)["w"] for i in range(count)}
        sharded = sw.shard(params, mesh, dict.fromkeys(params, layout))
        state = opt.init(sharded)
        with sw.record() as plan:
            opt.step(sharded, state, sharded)
        return plan

    many = planned(8, "i/x o")
    assert {c.kind for c in many.collectives} == {"all_to_all"}
    assert many.count() == 2
    assert many.bytes() == 2 * 3 / 4 * 8 * (8 * 16 / 4) * 8  # (n-1)/n of the blocks, twice
    one = planned(1, "i/x o")
    assert {c.kind for c in one.collectives} == {"all_gather"}
    assert one.count() == 1
    assert planned(8, "i o").count() == 0

    stack = sw.shard(matrices(values(0))["stack"], mesh, "l/x i o")
    state = opt.init({"stack": stack})
    with sw.record() as plan:
        opt.step({"stack": stack}, state, {"stack": stack})
    assert plan.count() == 0  # layers are matrices of their own


def test_muon_names_what_is_no_matrix_and_takes_a_fold() -> None:
    mesh = sw.make_mesh({"x": 2})
    bias = {"blocks": {"b": sw.zeros((8,), mesh)}}
    opt = optim.muon(0.1)
    with pytest.raises(ValueError, match=r"muon: blocks\.b is f32\[8\], no matrix"):
        opt.step(bias, opt.init(bias), bias)
    # heads and head_dim together are the columns: the step of the flat matrix
    value = values(0)["stack"]
    folded = optim.muon(0.1, dtype=None, fold=lambda path, p: (0, 1))
    p = {"w": sw.shard(value, mesh, "i h d/x")}
    q = {"w": sw.shard(value.reshape(4, -1), mesh)}
    plain = optim.muon(0.1, dtype=None)
    a, _ = folded.step(p, folded.init(p), p)
    b, _ = plain.step(q, plain.init(q), q)
    torch.testing.assert_close(
        a["w"].full_tensor().reshape(4, -1), b["w"].full_tensor(), rtol=1e-12, atol=1e-12
    )
    wrong = optim.muon(0.1, fold=lambda path, p: (2, 1))
    with pytest.raises(ValueError, match="none is left for the columns"):
        wrong.step(p, wrong.init(p), p)
