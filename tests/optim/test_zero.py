"""ZeRO moves nothing but where things lie: parameters equal the unsharded optimizer's."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from check import placed as split
from gallery import values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zeros import ONE, PLACES, begun, placed, start, train, trained

import shardwise as sw
from shardwise import optim

STEPS = 5
STAGES = (1, 2, 3)
MATRICES = {"*w_*": optim.muon(0.02, dtype=None, weight_decay=0.1), "*": optim.adamw(0.01)}
OPTIMIZERS: dict[str, optim.Transform] = {
    "sgd": optim.sgd(0.1),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optim.adam(0.01),
    "adamw": optim.adamw(optim.schedules.linear(0.0, 0.01, 5), weight_decay=0.1, mask="*w_*"),
    "lion": optim.lion(0.01, weight_decay=0.1),
    "lamb": optim.lamb(0.01, weight_decay=0.1, stacked="blocks.*"),
    "lamb whole": optim.lamb(0.01),
    "lars": optim.lars(0.1, weight_decay=0.1, stacked="blocks.*"),
    "adafactor": optim.adafactor(0.05, weight_decay=0.1, stacked="blocks.*"),
    "came": optim.came(0.01, stacked="blocks.*", weight_decay=0.1),
    "galore": optim.galore(0.01, rank=2, every=3),
    "muon and adamw": optim.multi(MATRICES),
    "adam8bit": optim.adam8bit(0.01, block=6, least=100),
    "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01)),
    "by value": optim.chain(optim.clip_by_value(0.5), optim.sgd(0.1)),
    "masked": optim.masked(optim.adam(0.01), "*w_*"),
    "ema": optim.ema(optim.adam(0.01), 0.9),
    "master": optim.master(optim.adamw(0.01), dtype=torch.float64),
    "injected": optim.inject(optim.adamw, lr=0.01, b1=0.8, weight_decay=0.1),
    "skipping": optim.skip_nonfinite(optim.adamw(0.01)),
    "scaled": optim.loss_scale(optim.adamw(0.01), initial=4.0),
}
ONE_OF_EACH_NEED = ("clipped", "adafactor", "muon and adamw")
FULL = ("data x 1D", "two data axes")
ALSO = ("data x 2.5D", "data x 3D")
CASES = [
    (name, stage, place)
    for name in OPTIMIZERS
    for place in PLACES
    for stage in STAGES
    if place in FULL or (place in ALSO and name in ONE_OF_EACH_NEED)
]
# A key's bias has no gradient but rounding, which Adam would divide by eps: here that is large.
TRAINED = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01, weight_decay=0.1, eps=1e-4))


@cache
def gradients() -> list[Any]:
    """Global gradients of each step."""
    return [
        sw.tree.map(lambda p, at=at: values(*p.shape, seed=at + p.numel()), start())
        for at in range(STEPS)
    ]


@cache
def given(place: str, stage: int) -> tuple[Any, list[Any]]:
    """Parameters in the layouts of a strategy, and gradients as the stage asks for them."""
    at = PLACES.get(place, ONE)
    params = placed(at, stage)[1]
    wanted = optim.zero(optim.sgd(0.1), stage, axis=at.axes).grads(params)
    return params, [
        sw.tree.map(lambda g, p, to, n=n: split(g, p.mesh, to, n), grads, params, wanted)
        for n, grads in enumerate(gradients())
    ]


def fed(name: str, stage: int, place: str) -> tuple[dict[str, Tensor], Any]:
    """Global parameters and the state after steps with fixed gradients."""
    params, steps = given(place, stage)
    opt = optim.zero(OPTIMIZERS[name], stage, axis=PLACES.get(place, ONE).axes)
    state = begun(opt, stage, PLACES.get(place, ONE), params)
    before = params
    for grads in steps:
        params, state = opt.step(grads, state, params)
    for a, b in zip(sw.tree.leaves(params), sw.tree.leaves(before), strict=True):
        assert a._type is b._type
    return {path: p.full_tensor() for path, p in sw.tree.items(params)}, state


@cache
def unsharded(name: str) -> tuple[dict[str, Tensor], Any]:
    return fed(name, 0, "one")


@pytest.mark.parametrize(("name", "stage", "place"), CASES)
def test_steps_equal_the_unsharded_optimizer(name: str, stage: int, place: str) -> None:
    expected, state = unsharded(name)
    found, ours = fed(name, stage, place)
    for path, p in found.items():
        torch.testing.assert_close(
            p, expected[path], rtol=1e-12, atol=1e-12, msg=lambda m, k=path: f"{k}: {m}"
        )
    for (path, a), (other, b) in zip(sw.tree.items(ours), sw.tree.items(state), strict=True):
        assert path == other
        if isinstance(a, sw.ShardedTensor):
            assert a.shape == b.shape, path  # a checkpoint does not depend on the mesh
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", PLACES)
def test_training_equals_one_device(place: str, stage: int) -> None:
    found = trained(PLACES[place], stage, TRAINED, STEPS)
    for path, p in one_device().items():
        torch.testing.assert_close(
            found[path], p, rtol=1e-12, atol=1e-12, msg=lambda m, k=path: f"{k}: {m}"
        )


@cache
def one_device() -> dict[str, Tensor]:
    return trained(ONE, 0, TRAINED, STEPS)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "lion", "master", "by value"])
def test_stages_are_bitwise_equal_in_float32(name: str) -> None:
    runs = [
        trained(PLACES["data"], stage, OPTIMIZERS[name], 3, dtype=torch.float32, tied="once")
        for stage in (0, *STAGES)
    ]  # tied once: else stage 3 adds up devices before uses, the others uses before devices
    for other in runs[1:]:
        assert all(torch.equal(other[path], p) for path, p in runs[0].items())


@pytest.mark.parametrize("name", ["clipped", "lamb", "adafactor"])
def test_stages_1_and_2_are_bitwise_equal_in_float32(name: str) -> None:
    one, two = (
        trained(PLACES["data x 1D"], stage, OPTIMIZERS[name], 3, dtype=torch.float32)
        for stage in (1, 2)
    )
    assert all(torch.equal(two[path], p) for path, p in one.items())


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_add_up(stage: int) -> None:
    t = optim.adamw(0.01, eps=1e-4)
    expected = trained(ONE, 0, t, 2)
    found = trained(PLACES["data x 1D"], stage, t, 2, micro=2)
    for path, p in found.items():
        torch.testing.assert_close(p, expected[path], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", ["data x sequence", "data x 2D"])
def test_a_training_step_is_layout_stable(place: str, stage: int) -> None:
    model, params, batch = placed(PLACES[place], stage)
    opt = optim.zero(optim.master(TRAINED), stage)
    vg = sw.value_and_grad(model.loss, grads=opt.grads)

    def step(params: Any, state: Any, batch: Any) -> Any:
        return opt.step(vg(params, batch)[1], state, params)

    sw.check_stable(step, params, opt.init(params), batch)


@pytest.mark.parametrize("stage", STAGES)
def test_a_donated_step_equals_one_that_is_not(stage: int) -> None:
    plain = trained(PLACES["data x 1D"], stage, TRAINED, 3)
    params: Any = None
    for number, (grads, after, state) in enumerate(
        train(PLACES["data x 1D"], stage, TRAINED, 3, donate=True)
    ):
        if number:
            with pytest.raises(sw.LayoutError, match="was donated"):
                params["embed"] + 1
        assert all(g.full_tensor().isfinite().all() for g in sw.tree.leaves(grads))
        assert all(x.full_tensor().isfinite().all() for x in sw.tree.leaves(state))
        params = after
    for path, p in sw.tree.items(params):
        torch.testing.assert_close(p.full_tensor(), plain[path], rtol=1e-14, atol=1e-14)


def owned(mesh: sw.Mesh, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """Parameters whose replicas have memory of their own."""
    found = sw.shard({f"p{i}": values(*shape, seed=i) for i, shape in enumerate(shapes)}, mesh)
    return sw.tree.map(
        lambda p: sw.ShardedTensor(tuple(s.clone() for s in p.shards), p._type), found
    )


@pytest.mark.parametrize("name", ["adam", "master"])
@pytest.mark.parametrize("bucket", [None, 0])
def test_a_donated_step_writes_into_the_parameters_and_the_state(
    bucket: int | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bucket is not None:
        monkeypatch.setattr("shardwise.optim.buckets.SIZE", bucket)
    params = owned(sw.make_mesh({"data": 2}), (4, 6), (2, 3, 8), (8,))
    opt = optim.zero(OPTIMIZERS[name], 1)
    state = sw.tree.map(lambda x: x * 1, opt.init(params))
    held = [s.data_ptr() for x in sw.tree.leaves([params, state]) for s in x.shards if s.ndim]
    wanted = opt.grads(params)
    grads = {k: split(p.full_tensor(), p.mesh, wanted[k]) for k, p in params.items()}
    expected, _ = opt.step(grads, state, params)
    new, after = opt.step(grads, state, params, donate=True)
    assert held == [s.data_ptr() for x in sw.tree.leaves([new, after]) for s in x.shards if s.ndim]
    for a, b in zip(sw.tree.leaves(new), sw.tree.leaves(expected), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-14, atol=1e-14)


def test_a_step_without_donation_writes_nothing() -> None:
    params = owned(sw.make_mesh({"data": 2}), (4, 6), (8,))
    opt = optim.zero(optim.adamw(0.1), 2)
    state = opt.init(params)
    before = [s.clone() for x in sw.tree.leaves([params, state]) for s in x.shards]
    opt.step(sw.tree.map(lambda p: p * 1, params), state, params)
    now = [s for x in sw.tree.leaves([params, state]) for s in x.shards]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize(
    ("shape", "layout", "axes", "expected"),
    [
        ((4, 6), "a b", "x", "a b/x"),  # behind dim 0, which may be a stack of layers
        ((4, 5), "a b", "x", "a/x b"),
        ((8,), "a", "x", "a/x"),
        ((4, 6, 8), "l a/y b", "x", "l a/y b/x"),
        ((4, 8, 8), "l a/y b", "x", "l a/y/x b"),
        ((4, 8, 5), "l a/x b", "x", "l a/x b"),  # cut already
        ((4, 4), "a b", ("x", "y"), "a b/x/y"),
        ((2, 2), "a b", ("x", "y"), "a/y b/x"),  # no dim can be cut by both
        ((2, 3), "a b", ("x", "y"), "a/x b"),  # y finds none
        ((3, 5), "a b", "x", "a b"),
        ((), "", "x", ""),
        ((6, 4), "a b", "z", "a/z b"),
        ((4, 4), "a b {R:x}", "x", "a b/x"),
    ],
)
def test_which_dim_is_cut(shape: Any, layout: str, axes: Any, expected: str) -> None:
    mesh = sw.make_mesh({"x": 2, "y": 2, "z": 3})
    p = sw.zeros(shape, mesh, layout)
    state = optim.zero(optim.adam(0.1), 1, axis=axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert state.init({"p": p})["mu"]["p"].layout is sw.Layout(expected, len(shape))


def test_parameters_that_no_dim_lets_be_cut_stay_whole_and_are_reported() -> None:
    mesh = sw.make_mesh({"data": 2})
    shapes = {"a": (4, 6), "odd": (3, 5), "s": ()}
    plain = {k: values(*shape, seed=n) for n, (k, shape) in enumerate(shapes.items())}
    opt = optim.zero(TRAINED, 1)
    params = sw.shard(plain, mesh)
    assert optim.left_whole(params) == [("odd", 15 * 8), ("s", 8)]
    with pytest.warns(
        UserWarning, match=r"2 parameters .* 128 B .*: odd \(120 B\), s \(8 B\)"
    ) as seen:
        state = opt.init(params)
    assert [warning.filename for warning in seen] == [__file__]
    expected, whole = sw.shard(plain, mesh), TRAINED.init(params)
    for stage in (1, 2):
        params, after = sw.shard(plain, mesh), state
        expected, whole = sw.shard(plain, mesh), TRAINED.init(params)
        opt = optim.zero(TRAINED, stage)
        assert optim.left_whole(params, stage=stage) == [("odd", 120), ("s", 8)]
        for step in range(3):
            g = {k: values(*shape, seed=10 * step) for k, shape in shapes.items()}
            there = {k: split(g[k], mesh, to) for k, to in opt.grads(params).items()}
            params, after = opt.step(there, after, params)
            expected, whole = TRAINED.step(sw.shard(g, mesh), whole, expected)
        assert [str(m.layout) for m in after["adamw"]["mu"].values()] == ["_ _/data", "_ _", ""]
        for k, p in params.items():
            torch.testing.assert_close(
                p.full_tensor(), expected[k].full_tensor(), rtol=1e-12, atol=1e-12
            )


def test_stage_3_refuses_parameters_that_are_whole() -> None:
    _, params, _ = placed(PLACES["data"], 1)
    _, cut, _ = placed(PLACES["data"], 3)
    opt = optim.zero(optim.sgd(0.1), 3)
    with pytest.raises(sw.LayoutError) as error:
        opt.init({**params, "blocks": cut["blocks"]})
    assert str(error.value) == (
        "zero: stage 3 wants parameters that are cut at rest\n"
        "embed is f64[24 36], whole over 'data'\n"
        "final_norm is f64[36], whole over 'data'\n"
        "final_norm_bias is f64[36], whole over 'data'\n"
        "pos is f64[12 36], whole over 'data'\n"
        "cut them by the strategy: strategies.fsdp('data') in the place of "
        "strategies.data('data'), "
        'or by hand: sw.reshard(params, ".../data")'
    )
    state = opt.init(cut)
    assert optim.left_whole(cut, stage=3) == []
    for step in (opt.step, opt.update):
        with pytest.raises(sw.LayoutError, match="stage 3"):
            step(params, state, params)


def test_stage_3_takes_and_reports_what_the_strategy_leaves_whole() -> None:
    mesh = sw.make_mesh({"data": 2})
    layouts = {"w": "layer a/data b", "bias": "layer b"}
    params = sw.shard({"w": values(2, 4, 3), "bias": values(2, 3)}, mesh, layouts)
    with pytest.warns(UserWarning, match=r"bias \(48 B\)"):
        optim.zero(optim.adam(0.1), 3).init(params)
    assert optim.left_whole(params, stage=3) == [("bias", 48)]
    assert optim.left_whole(params, stage=1) == []  # zero cuts the stack of layers


def test_stage_0_is_the_transform_and_other_numbers_are_refused() -> None:
    t = optim.adam(0.1)
    assert optim.zero(t, 0) is t
    with pytest.raises(ValueError, match="one of"):
        optim.zero(t, 4)
    with pytest.raises(sw.MeshError, match="date"):
        optim.zero(t, 1, axis="date").init(owned(sw.make_mesh({"data": 2}), (4,)))


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parameters_stay_and_are_not_gathered(stage: int) -> None:
    mesh = sw.make_mesh({"data": 2})
    params = owned(mesh, (4, 6), (8,))
    opt = optim.zero(optim.adamw(0.1), stage)
    state = opt.init(params)
    grads = {"p0": None, "p1": params["p1"] * 1}
    with sw.record() as plan:
        new, after = opt.step(grads, state, params)
    assert new["p0"] is params["p0"]
    assert plan.elements() == 8 // 2
    assert not after["mu"]["p0"].full_tensor().any()
    assert after["mu"]["p1"].full_tensor().any()
    updates, _ = opt.update(grads, state, params)
    assert updates["p0"] is None
    torch.testing.assert_close(
        new["p1"].full_tensor(), (params["p1"] + updates["p1"]).full_tensor(), rtol=0, atol=1e-15
    )


def test_it_may_be_the_last_of_a_chain() -> None:
    mesh = sw.make_mesh({"data": 2})
    params = owned(mesh, (4, 6), (8,))
    inside = optim.zero(optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.1)), 1)
    outside = optim.chain(optim.clip_by_global_norm(0.1), optim.zero(optim.adamw(0.1), 1))
    results = [t.step(params, t.init(params), params)[0] for t in (inside, outside)]
    for a, b in zip(*map(sw.tree.leaves, results), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-12, atol=1e-12)


FREE = {  # views and allocations
    "view", "slice", "split", "split_with_sizes", "permute", "transpose", "detach", "alias",
    "narrow", "select", "expand", "unflatten", "new_empty", "empty", "empty_like",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f.name().split("::")[-1].split(".")[0]
        if name not in FREE:
            self.names.append(name)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "t", [optim.adamw(0.1), optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.1))]
)
def test_a_step_takes_few_launches_however_many_leaves(t: Any, stage: int, donate: bool) -> None:
    mesh = sw.make_mesh({"data": 2})
    counts = []
    for leaves in (4, 40):
        params = owned(mesh, *[(4, 6)] * leaves)
        if stage == 3:
            params = sw.reshard(params, "a b/data")
        opt = optim.zero(t, stage)
        wanted = opt.grads(params)
        grads = {k: split(p.full_tensor(), mesh, wanted[k]) for k, p in params.items()}
        state = opt.init(params)
        opt.step(grads, state, sw.tree.map(lambda p: p * 1, params))
        with Launches() as seen:
            opt.step(grads, state, params, donate=donate)
        counts.append(len(seen.names))
    assert counts[0] == counts[1] < 80, counts
