"""What is wrapped around optimizers: masks, parts, injection, copies, skipped steps, scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import AXES, LAYOUTS, close, run, values

import shardwise as sw
from shardwise import optim
from shardwise.optim import schedules

GRADS = [values(i + 1) for i in range(6)]


def mesh_and_params(layout: str = "two dims") -> tuple[sw.Mesh, Any]:
    mesh = sw.make_mesh(AXES)
    return mesh, sw.shard(values(0), mesh, LAYOUTS[layout])


def grads_of(tree: Any, layout: str = "two dims") -> Any:
    return sw.shard(tree, sw.make_mesh(AXES), LAYOUTS[layout])


def same_bits(a: Any, b: Any) -> bool:
    return all(
        x is y or x == y
        if not isinstance(x, sw.ShardedTensor)
        else torch.equal(x.full_tensor(), y.full_tensor())
        for x, y in zip(sw.tree.leaves(a), sw.tree.leaves(b), strict=True)
    )


# names


def test_state_paths_are_stable_names() -> None:
    mesh = sw.make_mesh({"x": 2})
    params = {"blocks": {"w_up": sw.zeros((4, 4), mesh)}, "norm": [sw.zeros((4,), mesh)]}
    opt = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.ema(optim.multi({"blocks.*": optim.muon(0.1), "*": optim.adamw(0.1)}), 0.9),
    )
    assert [path for path, leaf in sw.tree.items(opt.init(params)) if leaf is not None] == [
        "clip_by_global_norm.norm",
        "multi.ema.blocks.w_up",
        "multi.ema.norm.0",
        "multi.inner.*.mu.norm.0",
        "multi.inner.*.nu.norm.0",
        "multi.inner.*.step",
        "multi.inner.blocks.*.mu.blocks.w_up",
        "multi.inner.blocks.*.step",
    ]


@pytest.mark.parametrize(
    ("opt", "paths"),
    [
        (optim.sgd(0.1), {"step"}),
        (optim.sgd(0.1, momentum=0.9), {"step", "mu.w"}),
        (optim.adam(0.1), {"step", "mu.w", "nu.w"}),
        (optim.adamw(0.1, rounding="stochastic"), {"step", "mu.w", "nu.w", "key"}),
        (optim.lion(0.1), {"step", "mu.w"}),
        (optim.lamb(0.1), {"step", "mu.w", "nu.w"}),
        (optim.lars(0.1), {"step", "mu.w"}),
        (optim.adafactor(0.1), {"step", "row.w", "col.w"}),
        (optim.came(0.1), {"step", "mu.w", "row.w", "col.w", "steady_row.w", "steady_col.w"}),
        (optim.galore(0.1, rank=2), {"step", "mu.w", "nu.w", "basis.w"}),
        (optim.muon(0.1), {"step", "mu.w"}),
        (optim.adam8bit(0.1, least=1), {"step", "mu.w", "nu.w", "mu_scale.w", "nu_scale.w"}),
        (optim.inject(optim.sgd, lr=0.1), {"hyper.lr", "inner.step"}),
        (optim.master(optim.sgd(0.1)), {"master.w", "inner.step"}),
        (optim.ema(optim.sgd(0.1)), {"ema.w", "inner.step"}),
        (optim.skip_nonfinite(optim.sgd(0.1)), {"skipped", "streak", "inner.step"}),
        (optim.loss_scale(optim.sgd(0.1)), {"scale", "good", "left", "skipped", "inner.step"}),
    ],
)
def test_paths_of_each_state(opt: optim.Transform, paths: set[str]) -> None:
    params = {"w": sw.zeros((4, 8), sw.make_mesh({"x": 2}), "i/x o")}
    state = opt.init(params)
    assert {path for path, leaf in sw.tree.items(state) if leaf is not None} == paths
    assert optim.get(state, "step").item() == 0
    _, after = opt.step(params, state, params)
    assert {path for path, leaf in sw.tree.items(after) if leaf is not None} == paths
    assert optim.get(after, "step").item() == 1


def test_what_each_transform_needs() -> None:
    assert optim.adamw(0.1).needs == "elementwise"
    assert optim.lamb(0.1).needs == optim.adafactor(0.1).needs == "reduction"
    assert optim.muon(0.1).needs == optim.galore(0.1).needs == "matrix"
    both = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1))
    assert both.needs == "reduction"
    assert optim.chain(both, optim.muon(0.1)).needs == "matrix"
    assert optim.ema(optim.skip_nonfinite(optim.muon(0.1))).needs == "matrix"


def test_grads_names_layouts_that_value_and_grad_takes() -> None:
    mesh = sw.make_mesh({"x": 2})
    opt = optim.adamw(0.1)
    params = {"w": sw.full((4, 4), 1.0, mesh, "i/x o"), "v": sw.full((4,), 1.0, mesh)}
    loss = lambda p: (p["w"] * p["w"]).sum() + (p["v"] * p["v"]).sum()  # noqa: E731
    _, grads = sw.value_and_grad(loss, grads=opt.grads)(params)
    assert grads["w"].layout is params["w"].layout
    assert grads["v"].layout is params["v"].layout


def test_named_lets_two_of_a_kind_into_a_chain() -> None:
    opt = optim.chain(optim.scale(2.0), optim.named(optim.scale(-0.25), "down"))
    _, p = mesh_and_params()
    new, state = opt.step(p, opt.init(p), p)
    assert set(state) == {"scale", "down"}
    close({k: v.full_tensor() for k, v in new.items()}, {k: v * 0.5 for k, v in values(0).items()})


# masks


def test_masked_and_multi_take_leaves_by_path() -> None:
    parts = {"w*": optim.sgd(0.1), "[bs]": optim.sgd(1.0), "*": optim.adam(0.01)}
    ours, state = run(optim.multi(parts), values(0), GRADS, "three axes")
    slow, _ = run(optim.sgd(0.1), values(0), GRADS)
    fast, _ = run(optim.sgd(1.0), values(0), GRADS)
    adam, _ = run(optim.adam(0.01), values(0), GRADS)
    close(
        ours,
        {
            "w": slow["w"],
            "tall": adam["tall"],
            "b": fast["b"],
            "stack": adam["stack"],
            "s": fast["s"],
        },
    )
    assert state["*"]["mu"]["w"] is None
    assert state["*"]["mu"]["tall"] is not None

    matrix = lambda path, p: p.ndim > 1  # noqa: E731
    decay = optim.chain(optim.masked(optim.add_decayed_weights(0.5), matrix), optim.sgd(1.0))
    zero = [{k: torch.zeros_like(v) for k, v in values(0).items()}]
    ours, _ = run(decay, values(0), zero)
    close(ours, {k: v * (0.5 if v.ndim > 1 else 1.0) for k, v in values(0).items()})


def test_masks_that_take_nothing_are_refused() -> None:
    _, p = mesh_and_params()
    with pytest.raises(ValueError, match=r"masked: 'v\*' takes no parameter of \['b', 's', "):
        optim.masked(optim.sgd(0.1), "v*").init(p)
    with pytest.raises(ValueError, match=r"multi: none of \['w'\] matches \['b', 's', 'stack'"):
        optim.multi({"w": optim.sgd(0.1)}).init(p)
    with pytest.raises(ValueError, match=r"multi: \['w'\] come first for no parameter"):
        optim.multi({"*": optim.sgd(0.1), "w": optim.adam(0.1)}).init(p)


# injection


def test_injected_numbers_are_read_from_the_state() -> None:
    _, p = mesh_and_params()
    g = grads_of(GRADS[0])
    opt = optim.inject(optim.adamw, lr=0.01, weight_decay=0.0, mask="w")
    state = opt.init(p)
    state["hyper"]["weight_decay"] = state["hyper"]["weight_decay"] + 0.3
    new, after = opt.step(g, state, p)
    plain = optim.adamw(0.01, weight_decay=0.3, mask="w")
    expected, _ = plain.step(g, plain.init(p), p)
    close(
        {k: v.full_tensor() for k, v in new.items()},
        {k: v.full_tensor() for k, v in expected.items()},
    )
    assert optim.get(after, "weight_decay").item() == pytest.approx(0.3)


def test_injected_schedules_are_followed_and_kept() -> None:
    lr, b2 = schedules.linear(0.1, 0.0, 4), lambda step: 1 - 1 / (step.to(torch.float64) + 2)
    ours, state = run(
        optim.inject(optim.adam, lr=lr, b2=optim.Scheduled(b2)), values(0), GRADS[:3], "dim 0"
    )
    assert optim.get(state, "lr").item() == pytest.approx(0.05)
    assert optim.get(state, "b2").item() == pytest.approx(0.75)
    p, m, v = values(0)["w"], 0.0, 0.0
    for t, g in enumerate(g["w"] for g in GRADS[:3]):
        beta = 1 - 1 / (t + 2)
        m, v = 0.9 * m + 0.1 * g, beta * v + (1 - beta) * g * g
        mean, square = m / (1 - 0.9 ** (t + 1)), v / (1 - beta ** (t + 1))
        p = p - (0.1 - 0.025 * t) * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(ours["w"], p, rtol=1e-7, atol=1e-7)  # schedules are float32


# averages and copies


def test_ema_of_the_new_parameters() -> None:
    _, state = run(optim.ema(optim.sgd(0.1), 0.8), values(0), GRADS, "layers")
    mean = p = values(0)
    for g in GRADS:
        p = {k: v - 0.1 * g[k] for k, v in p.items()}
        mean = {k: 0.8 * m + 0.2 * p[k] for k, m in mean.items()}
    close({k: v.full_tensor() for k, v in state["ema"].items()}, mean)


@pytest.mark.parametrize("chained", [False, True])
def test_bfloat16_parameters_follow_a_float32_master(chained: bool) -> None:
    low = {k: v.to(torch.bfloat16) for k, v in values(0).items()}
    grads = [{k: v.to(torch.bfloat16) for k, v in g.items()} for g in GRADS]
    inner = optim.adamw(1e-3, weight_decay=0.1)
    opt = optim.master(inner)
    if chained:
        opt = optim.chain(optim.clip_by_value(100.0), opt)
    ours, state = run(opt, low, grads, "three axes")
    wide, _ = run(
        inner,
        {k: v.float() for k, v in low.items()},
        [{k: v.float() for k, v in g.items()} for g in grads],
    )
    for k, p in ours.items():
        assert p.dtype is torch.bfloat16
        torch.testing.assert_close(p, wide[k].to(torch.bfloat16), rtol=0, atol=0)
    inside = state["adamw"] if chained else state
    close({k: v.full_tensor() for k, v in inside["master"].items()}, wide, 1e-6)
    assert inside["inner"]["mu"]["w"].dtype is torch.float32


def test_a_masters_update_reaches_the_rounded_copy() -> None:
    mesh = sw.make_mesh({"x": 2})
    p = {"w": sw.shard(values(0)["w"].to(torch.bfloat16), mesh, "i/x o")}
    opt = optim.master(optim.sgd(0.01))
    updates, state = opt.update(p, opt.init(p), p)
    new = optim.apply_updates(p, updates)
    assert torch.equal(
        new["w"].full_tensor(), state["master"]["w"].full_tensor().to(torch.bfloat16)
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "lamb", "lars", "came", "muon"])
def test_low_precision_parameters_keep_their_dtype(name: str) -> None:
    opt = getattr(optim, name)(10.0 if name == "lars" else 0.01)
    low = {k: values(0)[k].to(torch.bfloat16) for k in ("w", "stack")}
    grads = [{k: g[k].to(torch.bfloat16) for k in low} for g in GRADS]
    ours, _ = run(opt, low, grads, "three axes")
    whole, _ = run(opt, low, grads)
    for k, p in ours.items():
        assert p.dtype is torch.bfloat16
        assert not torch.equal(p, low[k])
        torch.testing.assert_close(p, whole[k], rtol=2e-2, atol=2e-2)


# stochastic rounding


def test_stochastic_rounding_keeps_the_mean_and_does_not_depend_on_the_mesh() -> None:
    start = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    grad = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    step = 2.0**-11  # an eighth of the gap below 1 ... lost by rounding to nearest
    found = {}
    for layout in ("i o", "i/x o/y", "i o/y/x"):
        mesh = sw.make_mesh({"x": 2, "y": 4})
        p, g = ({"w": sw.shard(v, mesh, layout)} for v in (start, grad))
        opt = optim.stochastic(optim.sgd(step), seed=3)
        state = opt.init(p)
        for _ in range(16):
            p, state = opt.step(g, state, p)
        found[layout] = p["w"].full_tensor()
    first = found["i o"]
    assert all(torch.equal(first, other) for other in found.values())
    mean = float(first.double().mean())
    assert mean == pytest.approx(1 - 16 * step, abs=3e-4)
    assert len(first.unique()) > 2
    nearest = optim.sgd(step)
    p = {"w": sw.shard(start, sw.make_mesh({"x": 2}))}
    assert torch.equal(nearest.step(p, nearest.init(p), p)[0]["w"].full_tensor(), start)


def test_each_step_and_each_leaf_rounds_with_bits_of_its_own() -> None:
    mesh = sw.make_mesh({"x": 2})
    p = {k: sw.full((4096,), 1.0, mesh, "n/x", dtype=torch.bfloat16) for k in "ab"}
    opt = optim.adamw(2.0**-9, weight_decay=0.0, rounding="stochastic", state_dtype=torch.float32)
    state = opt.init(p)
    once, after = opt.step(p, state, p)
    again, _ = opt.step(p, state, p)
    assert same_bits(once, again)
    other, _ = opt.step(p, {**state, "step": after["step"]}, p)
    a, b = once["a"].full_tensor(), once["b"].full_tensor()
    assert not torch.equal(a, b)
    assert not torch.equal(a, other["a"].full_tensor())
    assert 0.3 < float((a < 1).double().mean()) < 0.7  # 2**-9 is half of the gap below 1
    with pytest.raises(ValueError, match='rounding is "nearest" or "stochastic"'):
        optim.adamw(0.1, rounding="up")  # pyright: ignore


# steps that are not taken


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["adamw", "lamb", "galore", "adam8bit"])
def test_a_skipped_step_changes_no_bit(poison: float, name: str) -> None:
    inner = {
        "adamw": optim.adamw(schedules.linear(0.1, 0.0, 9)),
        "lamb": optim.lamb(0.1),
        "galore": optim.galore(0.1, rank=3, every=1),
        "adam8bit": optim.adam8bit(0.1, block=4, least=100),
    }[name]
    opt = optim.skip_nonfinite(inner)
    _, p = mesh_and_params()
    state = opt.init(p)
    p, state = opt.step(grads_of(GRADS[0]), state, p)
    bad = values(9)
    bad["stack"][3, 7, 15] = poison  # on the last device alone
    new, after = opt.step(grads_of(bad), state, p)
    assert same_bits(new, p)
    assert same_bits(after["inner"], state["inner"])
    assert (after["skipped"].item(), after["streak"].item()) == (1, 1)
    new, after = opt.step(grads_of(GRADS[1]), after, new)
    assert (after["skipped"].item(), after["streak"].item()) == (1, 0)
    plain = inner.init(mesh_and_params()[1])
    q = mesh_and_params()[1]
    for g in GRADS[:2]:
        q, plain = inner.step(grads_of(g), plain, q)
    assert same_bits(new, q)
    assert same_bits(after["inner"], plain)


def test_too_many_skipped_steps_raise_and_name_the_leaf() -> None:
    _, p = mesh_and_params()
    opt = optim.skip_nonfinite(optim.sgd(0.1), limit=2)
    bad = values(1)
    bad["tall"][0, 0] = float("nan")
    state = opt.init(p)
    for _ in range(2):
        p, state = opt.step(grads_of(bad), state, p)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*\['tall'\]"):
        opt.step(grads_of(bad), state, p)
    assert same_bits(p, mesh_and_params()[1])


def test_loss_scale_follows_its_table() -> None:
    """Overflow, forgiven overflow, growth: scale, good and left after each step."""
    _, p = mesh_and_params()
    opt = optim.loss_scale(
        optim.sgd(0.1), initial=8.0, every=2, hysteresis=2, minimum=4.0, maximum=16.0
    )
    bad = values(1)
    bad["w"][0, 0] = float("inf")
    state = opt.init(p)
    table = [  # gradient, scale, good, left, skipped
        ("good", 8.0, 1, 2, 0),
        ("bad", 8.0, 0, 1, 1),
        ("bad", 4.0, 0, 2, 2),
        ("good", 4.0, 1, 2, 2),
        ("good", 8.0, 0, 2, 2),
        ("good", 8.0, 1, 2, 2),
        ("good", 16.0, 0, 2, 2),
        ("good", 16.0, 1, 2, 2),
        ("good", 16.0, 0, 2, 2),
    ]
    for kind, *expected in table:
        before = p
        scale = state["scale"].item()
        g = bad if kind == "bad" else {k: v * scale for k, v in values(2).items()}
        p, state = opt.step(grads_of(g), state, p)
        got = [state[k].item() for k in ("scale", "good", "left", "skipped")]
        assert got == expected
        if kind == "bad":
            assert same_bits(p, before)
        else:
            close(
                {k: v.full_tensor() for k, v in p.items()},
                {k: before[k].full_tensor() - 0.1 * v for k, v in values(2).items()},
            )


def test_an_overflow_at_the_least_scale_raises_and_a_static_scale_stays() -> None:
    _, p = mesh_and_params()
    bad = values(1)
    bad["w"][0, 0] = float("inf")
    opt = optim.loss_scale(optim.sgd(0.1), initial=1.0, minimum=1.0)
    with pytest.raises(FloatingPointError, match=r"minimal scale 1; .*\['w'\]"):
        opt.step(grads_of(bad), opt.init(p), p)
    fixed = optim.loss_scale(optim.sgd(0.1), initial=1.0, dynamic=False)
    new, state = fixed.step(grads_of(bad), fixed.init(p), p)
    assert same_bits(new, p)
    assert state["scale"].item() == 1.0
    assert state["skipped"].item() == 1


def test_float16_gradients_are_unscaled_in_float32() -> None:
    mesh = sw.make_mesh({"x": 2})
    p = {"w": sw.full((4,), 1.0, mesh, "n/x", dtype=torch.float16)}
    opt = optim.loss_scale(optim.master(optim.sgd(1.0)), initial=2.0**15)
    g = {"w": sw.full((4,), 0.5, mesh, "n/x", dtype=torch.float16)}  # 2**-16 of the loss itself
    _, state = opt.step(g, opt.init(p), p)
    assert optim.get(state["inner"]["master"], "w").full_tensor()[0].item() == 1 - 2.0**-16
