"""`save="shard"`: the same gradients, a second gather on the record, nothing kept alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from check import close, placed
from gallery import mesh, values

import shardwise as sw
from shardwise.layouts import saving


def layer(x, w, save):
    return torch.tanh(x @ sw.reshard(w, "_ _ {R:a}", save=save))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rest", ["_/a _", "_ _/a"])
def test_gradients_are_those_of_a_kept_gather(n, rest):
    on = mesh(a=n)
    x, w = placed(values(6, 6), on, "_/a _"), placed(values(6, 6, seed=1), on, rest)
    found = {}
    for save in ("gathered", "shard"):
        with sw.record() as plan:
            found[save] = sw.grad(
                lambda w, x, save=save: layer(layer(x, w, save), w, save).sum(), argnums=(0, 1)
            )(w, x)[0]
        assert plan.count(kind="all_gather", phase="forward") == (2 if n > 1 else 0)
        assert plan.count(kind="all_gather", phase="regather") == (
            2 if n > 1 and save == "shard" else 0
        )
    for a, b in zip(found["gathered"].shards, found["shard"].shards, strict=True):
        assert torch.equal(a, b)
    plain = values(6, 6, seed=1).requires_grad_()
    torch.tanh(torch.tanh(values(6, 6) @ plain) @ plain).sum().backward()
    close(found["shard"], plain.grad)


@pytest.mark.parametrize(("save", "alive"), [("gathered", True), ("shard", False)])
def test_what_was_gathered_does_not_outlive_its_use(save, alive):
    on = mesh(a=2)
    x, w = placed(values(6, 6), on, "_/a _"), placed(values(6, 6, seed=1), on, "_/a _")
    watched = []

    def loss(w, x):
        whole = sw.reshard(w, "_ _ {R:a}", save=save)
        watched.extend(weakref.ref(s.untyped_storage()) for s in whole.shards)
        y = torch.tanh(x) @ whole
        del whole
        gc.collect()
        assert any(ref() is not None for ref in watched) is alive
        return (y * y).sum()

    sw.grad(loss, argnums=(0, 1))(w, x)
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_nothing_is_left_behind():
    before = len(saving._RECIPES)
    on = mesh(a=2)
    x, w = placed(values(6, 6), on, "_/a _"), placed(values(6, 6, seed=1), on, "_/a _")
    for _ in range(3):
        sw.grad(lambda w: layer(x, w, "shard").sum())(w)
    gc.collect()
    assert len(saving._RECIPES) == before
    assert not saving._SCOPES


def test_second_derivatives_with_a_saved_shard():
    on = mesh(a=2)
    value = values(6, 6, seed=1)
    x, w = placed(values(6, 6), on, "_/a _"), placed(value, on, "_/a _")
    v = placed(values(6, 6, seed=2), on, "_ _")

    def along(w):
        return (sw.grad(lambda w: layer(x, w, "shard").sum())(w) * v).sum()

    def plain(w):
        inner = torch.func.grad(lambda w: torch.tanh(values(6, 6) @ w).sum())
        return (inner(w) * values(6, 6, seed=2)).sum()

    close(sw.grad(along)(w), torch.func.grad(plain)(value))
