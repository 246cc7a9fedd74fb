"""Activations and parameters on the host: the same bits, less on the device, all on the record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import close
from gallery import mesh, values

import shardwise as sw

CHOICES = ("none", "cheap", "all")
LAYERS = 6
ROWS = 512


def block(w, x):
    return torch.tanh(torch.exp(-((x @ w) ** 2)) @ w)


def stacked(ws, x, wrap):
    """The loss of a stack of layers, each brought to the device where it is used."""

    def body(x, w):
        return wrap(block)(sw.reshard(w, "... @device"), x), None

    return sw.scan(body, x, ws["w"])[0].sum()


def setting(place="device", transport: Any = "simulated"):
    on = sw.make_mesh({"data": 2}, transport=transport)
    text = "" if place == "device" else f" @{place}"
    if transport == "abstract":
        ws = sw.zeros((LAYERS, 16, 16), on, f"_ _ _{text}")
        return {"w": ws}, sw.zeros((ROWS, 16), on, "b/data d")
    ws = sw.shard(values(LAYERS, 16, 16) / 4, on, f"_ _ _{text}")
    return {"w": ws}, sw.shard(values(64, 16, seed=1), on, "b/data d")


def offloaded(recompute):
    return lambda f: sw.remat(f, recompute=recompute, offload=True)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("recompute", CHOICES)
def test_gradients_are_the_same_bits(recompute, place):
    ws, x = setting()
    want = sw.grad(lambda ws, x: stacked(ws, x, lambda f: f), argnums=(0, 1))(ws, x)
    ws, x = setting(place)
    got = sw.grad(lambda ws, x: stacked(ws, x, offloaded(recompute)), argnums=(0, 1))(ws, x)
    assert got[0]["w"].layout is ws["w"].layout
    for a, b in zip(sw.tree.leaves(got), sw.tree.leaves(want), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())


@pytest.mark.parametrize("recompute", CHOICES)
def test_what_is_saved_leaves_the_device(recompute):
    ws, x = setting(transport="abstract")
    peaks = {}
    for name, wrap in {
        "kept": lambda f: sw.remat(f, recompute=recompute),
        "offloaded": offloaded(recompute),
    }.items():
        made = sw.plan(sw.grad(lambda ws, wrap=wrap: stacked(ws, x, wrap)), ws)
        peaks[name] = made.peak_memory
    activation = ROWS * 16 * 4 // 2
    # What "cheap" keeps beside the arguments stays.
    saved = {"none": 4, "cheap": 1, "all": 1}[recompute]
    assert peaks["kept"] - peaks["offloaded"] >= (LAYERS - 3) * saved * activation


def test_each_activation_goes_once_and_parameters_do_not_go():
    on = sw.make_mesh({"data": 2}, transport="abstract")
    params = {"a": sw.zeros((16, 16), on), "b": sw.zeros((16, 16), on)}
    x = sw.zeros((64, 16), on, "b/data d")

    def f(params, x):
        h = torch.exp(x)

        def heads(params, h):
            return (h @ params["a"]) * (h @ params["b"])  # h is saved twice

        return offloaded("none")(heads)(params, h).sum()

    made = sw.plan(sw.grad(f, argnums=(0, 1)), params, x)
    size = 64 * 16 * 4 // 2
    # h, and the two factors
    assert [c.bytes for c in made.copies if c.kind == "to_host"] == [size] * 3
    # Each of its two readers brings h again: in between it takes no room.
    assert [c.bytes for c in made.copies if c.kind == "to_device"] == [size] * 4
    assert {c.phase for c in made.copies if c.kind == "to_device"} == {"backward"}


def test_all_keeps_the_input_of_each_layer_on_the_host_only():
    ws, x = setting(transport="abstract")
    made = sw.plan(sw.grad(lambda ws: stacked(ws, x, offloaded("all"))), ws)
    size = ROWS * 16 * 4 // 2
    # The first layer's input is the caller's and needs no gradient: it stays.
    assert [c.bytes for c in made.copies if c.kind == "to_host"] == [size] * (LAYERS - 1)


def test_the_record_is_the_plan():
    ws, x = setting()
    f = sw.grad(lambda ws, x: stacked(ws, x, offloaded("all")))
    with sw.record() as ran:
        f(ws, x)
    planned = sw.plan(f, ws, x)

    def moved(plan, kind):
        assert {c.phase for c in plan.copies} == {"forward", "backward"}
        return sum(c.bytes for c in plan.copies if c.kind == kind)

    for kind in ("to_host", "to_device"):
        assert moved(ran, kind) == moved(planned, kind) == (LAYERS - 1) * 64 * 16 * 8 // 2


@pytest.mark.parametrize("place", ["host", "disk"])
def test_parameters_at_rest_elsewhere_are_there_one_layer_at_a_time(place):
    ws, x = setting(place, "abstract")
    resident = setting(transport="abstract")[0]
    layer = 16 * 16 * 4
    f = lambda ws: stacked(ws, x, lambda f: f)  # noqa: E731
    away, there = sw.plan(f, ws), sw.plan(f, resident)
    assert there.peak_memory - away.peak_memory >= (LAYERS - 2) * layer
    assert [c.bytes for c in away.copies if c.kind == "to_device"] == [layer] * LAYERS
    # The gradients leave layer by layer, too.
    grads = sw.plan(sw.grad(f), ws)
    assert sum(c.bytes for c in grads.copies if c.kind == "to_host") == LAYERS * layer
    assert grads.result["w"].layout.memory == place


def test_second_order_through_offload():
    on = mesh(data=2)
    x = sw.shard(values(8), on, "n/data")
    cubes = offloaded("none")(lambda x: (torch.exp(x) * x * x).sum())
    plain = lambda x: (torch.exp(x) * x * x).sum()  # noqa: E731
    twice = lambda f: sw.grad(lambda x: (sw.grad(f)(x) ** 2).sum())(x)  # noqa: E731
    close(twice(cubes), twice(plain).full_tensor())
