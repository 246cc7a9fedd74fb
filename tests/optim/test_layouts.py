"""Every optimizer does the same on every layout of parameters and gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from optimizers import AXES, LAYOUTS, close, matrices, run, values

import shardwise as sw
from shardwise import optim

STEPS = 6
OPTIMIZERS: dict[str, optim.Transform] = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optim.adam(0.01),
    "adamw": optim.adamw(optim.schedules.linear(0.0, 0.01, 5), weight_decay=0.1, mask="w*"),
    "lion": optim.lion(0.01, weight_decay=0.1),
    "lamb": optim.lamb(0.01, weight_decay=0.1, stacked="stack"),
    "lamb whole": optim.lamb(0.01),
    "lars": optim.lars(0.1, weight_decay=0.1, stacked="stack"),
    "adafactor": optim.adafactor(0.05, weight_decay=0.1, stacked="stack"),
    "came": optim.came(0.01, stacked="stack", weight_decay=0.1),
    "galore": optim.galore(0.01, rank=3, every=4),
    "muon": optim.muon(0.02, dtype=None, weight_decay=0.1),
    "adam8bit": optim.adam8bit(0.01, block=4, least=100),
    "adam8bit across": optim.adam8bit(0.01, block=6, least=100),
    "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01)),
    "by value": optim.chain(optim.clip_by_value(0.5), optim.sgd(0.1)),
    "multi": optim.multi(
        {"b": optim.sgd(0.1), "s": optim.adam(0.1), "*": optim.muon(0.02, dtype=None)}
    ),
    "masked": optim.masked(optim.adam(0.01), "w"),
    "ema": optim.ema(optim.adam(0.01), 0.9),
    "master": optim.master(optim.adamw(0.01), dtype=torch.float64),
    "injected": optim.inject(optim.adamw, lr=0.01, b1=0.8, weight_decay=0.1),
    "skipping": optim.skip_nonfinite(optim.adamw(0.01)),
    "scaled": optim.loss_scale(optim.adamw(0.01)),
}
ONLY_MATRICES = {"muon"}


@cache
def case(name: str) -> tuple[Any, list[Any], Any, Any]:
    """Parameters, gradients, and what one device makes of them."""
    take = matrices if name in ONLY_MATRICES else dict
    params, grads = take(values(0)), [take(values(i + 1)) for i in range(STEPS)]
    whole, state = run(OPTIMIZERS[name], params, grads)
    return params, grads, whole, state


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "replicated"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_any_layout_equal_one_device(name: str, layout: str) -> None:
    params, grads, whole, state = case(name)
    ours, ours_state = run(OPTIMIZERS[name], params, grads, layout)
    close(ours, whole, 1e-11 if "galore" in name else 1e-12)
    for (path, a), (other, b) in zip(sw.tree.items(ours_state), sw.tree.items(state), strict=True):
        assert path == other
        if a is not None:
            torch.testing.assert_close(
                a.full_tensor(),
                b.full_tensor(),
                rtol=1e-10,
                atol=1e-10,
                msg=lambda m, path=path: f"{path}: {m}",
            )


@pytest.mark.parametrize("pair", [("three axes", "replicated"), ("dim 0", "layers")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_come_in_other_layouts(name: str, pair: tuple[str, str]) -> None:
    params, grads, _, _ = case(name)
    expected, _ = run(OPTIMIZERS[name], params, grads[:3])
    ours, _ = run(OPTIMIZERS[name], params, grads[:3], *pair)
    close(ours, expected, 1e-11)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"clipped"}))
def test_sums_that_are_owed_are_taken(name: str) -> None:
    mesh = sw.make_mesh(AXES)
    params, grads, _, _ = case(name)
    opt = OPTIMIZERS[name]
    expected, _ = run(opt, params, grads[:1])
    place = {k: LAYOUTS["dim 1"][k] + " {R:y}" for k in params}
    owed = {k: LAYOUTS["dim 1"][k] + " {U:y}" for k in params}
    sharded = sw.shard(params, mesh, place)
    new, state = opt.step(sw.shard(grads[0], mesh, owed), opt.init(sharded), sharded)
    for k, p in new.items():
        assert p.layout is sharded[k].layout
        torch.testing.assert_close(p.full_tensor(), expected[k], rtol=1e-12, atol=1e-12)
    assert not any(
        x.layout.unreduced for x in sw.tree.leaves(state) if isinstance(x, sw.ShardedTensor)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_and_their_state_stay(name: str) -> None:
    mesh = sw.make_mesh(AXES)
    params, grads, _, _ = case(name)
    opt = OPTIMIZERS[name]
    place = {k: LAYOUTS["dim 0"][k] for k in params}
    sharded = sw.shard(params, mesh, place)
    state = opt.init(sharded)
    g = sw.shard(grads[0], mesh, place) | {"w": None}
    new, after = opt.step(g, state, sharded)
    assert torch.equal(new["w"].full_tensor(), params["w"])
    assert not torch.equal(new["stack"].full_tensor(), params["stack"]) or name in (
        "masked",
        "adamw",
    )
    for (path, a), (_, b) in zip(sw.tree.items(after), sw.tree.items(state), strict=True):
        if path.endswith(".w") and isinstance(b, sw.ShardedTensor):
            assert torch.equal(a.full_tensor(), b.full_tensor()), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_writes_nothing_unless_donated_and_is_layout_stable(name: str) -> None:
    mesh = sw.make_mesh(AXES)
    params, grads, _, _ = case(name)
    opt = OPTIMIZERS[name]
    sharded = sw.shard(params, mesh, {k: LAYOUTS["two dims"][k] for k in params})
    g = sw.shard(grads[0], mesh, {k: LAYOUTS["two dims"][k] for k in params})
    state = opt.init(sharded)
    held = [x for x in sw.tree.leaves([sharded, state, g]) if isinstance(x, sw.ShardedTensor)]
    before = [s.clone() for x in held for s in x.shards]
    new, after = opt.step(g, state, sharded)
    assert all(
        torch.equal(a, s) for a, s in zip(before, (s for x in held for s in x.shards), strict=True)
    )
    sw.check_stable(lambda p, s: opt.step(p, s, p), sharded, state)
    alone = sw.tree.map(lambda p: p * 1, sharded)  # every replica with memory of its own
    given, donated = opt.step(g, opt.init(alone), alone, donate=True)
    for a, b in zip(sw.tree.leaves([new, after]), sw.tree.leaves([given, donated]), strict=True):
        if isinstance(a, sw.ShardedTensor):
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["momentum", "adamw", "sgd"])
def test_a_donated_step_needs_no_new_buffers_and_its_arguments_cannot_be_read(name: str) -> None:
    mesh = sw.make_mesh({"x": 2})
    params = sw.shard({"w": values(0)["w"]}, mesh, "i/x o")
    grads = sw.shard({"w": values(1)["w"]}, mesh, "i/x o")
    opt = OPTIMIZERS[name]
    state = opt.init(params)
    state = sw.tree.map(lambda x: x * 1, state)
    pointers = {s.data_ptr() for x in sw.tree.leaves([params, state]) for s in x.shards if s.ndim}
    new, after = opt.step(grads, state, params, donate=True)
    assert pointers == {
        s.data_ptr() for x in sw.tree.leaves([new, after]) for s in x.shards if s.ndim
    }
    with pytest.raises(sw.LayoutError, match="was donated") as error:
        params["w"] + 1
    assert error.value.kind == "donated"
    with pytest.raises(sw.LayoutError, match="was donated"):
        opt.step(grads, state, new)
    opt.step(grads, after, new)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scalars_that_stay_on_the_device_give_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator kernels get 0-d tensors in place of numbers."""
    params, grads, _, _ = case(name)
    expected, _ = run(OPTIMIZERS[name], params, grads[:3], "two dims")
    monkeypatch.setattr("shardwise.optim.flat.ON_HOST", ())
    ours, _ = run(OPTIMIZERS[name], params, grads[:3], "two dims")
    close(ours, expected)
