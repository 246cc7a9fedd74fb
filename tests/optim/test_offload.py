"""Offload moves the state and the arithmetic, and changes no bit of the result."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery import mesh
from optimizers import AXES, LAYOUTS, SHAPES, values

import shardwise as sw
from shardwise import optim
from shardwise.layouts import spill

pytestmark = pytest.mark.filterwarnings("ignore:zero. ")  # a scalar is left whole
GROUP = 300  # bytes per device: several groups of the leaves above
OPTIMIZERS: dict[str, optim.Transform] = {
    "sgd": optim.sgd(0.1, momentum=0.9),
    "adamw": optim.adamw(optim.schedules.linear(0.0, 0.01, 5), weight_decay=0.1, mask="w*"),
    "lion": optim.lion(0.01),
    "lamb": optim.lamb(0.01),
    "adafactor": optim.adafactor(0.05),
    "came": optim.came(0.01),
    "galore": optim.galore(0.01, rank=2, every=3),
    "adam8bit": optim.adam8bit(0.01, block=4, least=10),
    "muon and adamw": optim.multi({"w": optim.muon(0.02, dtype=None), "*": optim.adamw(0.01)}),
    "two adams": optim.multi({"w": optim.sgd(0.1), "*": optim.adam(0.1)}),
    "masked": optim.masked(optim.adam(0.01), "*t*"),
    "clipped by value": optim.chain(optim.clip_by_value(0.5), optim.adamw(0.01)),
    "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01)),
    "ema": optim.ema(optim.adam(0.01), 0.9),
    "master": optim.master(optim.adamw(0.01), dtype=torch.float64),
    "rounded": optim.stochastic(optim.adamw(0.01)),
    "injected": optim.inject(optim.adamw, lr=0.01, weight_decay=0.1),
    "skipping": optim.skip_nonfinite(optim.adamw(0.01)),
    "scaled": optim.loss_scale(optim.adamw(0.01), initial=4.0),
}
MEMORIES = ("host", "disk")
WAYS: dict[str, Callable[[optim.Transform, Any], optim.Transform]] = {
    "alone": lambda t, off: off(t),
    "inside zero": lambda t, off: optim.zero(off(t), 2, axis="z"),
    "around zero": lambda t, off: off(optim.zero(t, 2, axis="z")),
}


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path) -> Iterator[None]:
    spill.spill_to(tmp_path / "spill")
    yield
    spill.remove_all()
    spill.spill_to(None)


def fed(
    opt: optim.Transform,
    *,
    donate: bool = False,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    owed: str = "",
    frozen: tuple[str, ...] = (),
) -> tuple[Any, Any]:
    """Parameters and state after some steps."""
    on = sw.make_mesh(AXES)
    at = LAYOUTS["dim 1"]
    params = sw.shard(values(0, dtype), on, at)
    state = opt.init(params)
    for number in range(steps):
        grads: dict[str, Any] = sw.shard(values(number + 1, dtype), on, at)
        if owed:
            grads = {k: sw.reshard(g, f"... {{U:{owed}}}") for k, g in grads.items()}
        grads |= dict.fromkeys(frozen)
        before = {k: str(p) for k, p in params.items()}
        params, state = opt.step(grads, state, params, donate=donate)
        assert {k: str(p) for k, p in params.items()} == before
    return params, state


def same(ours: tuple[Any, Any], theirs: tuple[Any, Any], memory: str) -> None:
    """Parameters and states are equal to the bit; the state lies where it was sent."""
    for k, p in ours[0].items():
        assert p.layout.memory == "device"
        assert torch.equal(p.full_tensor(), theirs[0][k].full_tensor()), k
    for (path, a), (other, b) in zip(sw.tree.items(ours[1]), sw.tree.items(theirs[1]), strict=True):
        assert path == other
        if isinstance(a, sw.ShardedTensor):
            assert a.layout.memory == (memory if a.ndim else "host"), path
            assert torch.equal(a.full_tensor(), b.full_tensor()), path
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), path


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_resident_optimizer_to_the_bit(name, memory):
    dtype = torch.bfloat16 if name == "rounded" else torch.float32
    t = OPTIMIZERS[name]
    want = fed(t, dtype=dtype)
    for donate in (False, True):
        got = fed(optim.offload(t, memory, group=GROUP), donate=donate, dtype=dtype)
        same(got, want, memory)


@pytest.mark.parametrize("way", ["inside zero", "around zero"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["adamw", "clipped", "muon and adamw", "adam8bit", "master"])
def test_inside_and_around_zero(name, memory, way):
    t = OPTIMIZERS[name]
    off = lambda t: optim.offload(t, memory, group=GROUP)  # noqa: E731
    want = fed(optim.zero(t, 2, axis="z"), owed="z")
    for donate in (False, True):
        same(fed(WAYS[way](t, off), donate=donate, owed="z"), want, memory)
    assert want[1] is not None


def test_zero_scatters_on_the_devices_and_only_parts_go_to_the_host():
    on = mesh(z=4)
    p = {"w": sw.shard(torch.ones(8, 16), on)}
    opt = optim.offload(optim.zero(optim.adam(0.1), 1, axis="z"))
    state = opt.init(p)
    g = {"w": sw.reshard(p["w"], "... {U:z}")}
    with sw.record() as plan:
        opt.step(g, state, p)
    part = 8 * 16 * 4 // 4
    assert plan.count(kind="reduce_scatter") == plan.count(kind="all_gather") == 1
    assert [(c.kind, c.bytes, c.path) for c in plan.copies] == [
        ("to_host", part, "w"),
        ("to_host", part, "w"),
        ("to_device", part, "w"),
    ]


def test_the_third_stage_keeps_its_check():
    on = mesh(z=2)
    opt = optim.offload(optim.zero(optim.adam(0.1), 3, axis="z"))
    with pytest.raises(sw.LayoutError, match="stage 3 wants parameters that are cut"):
        opt.init({"w": sw.shard(torch.ones(8, 16), on)})
    cut = {"w": sw.shard(torch.ones(8, 16), on, "_ _/z")}
    assert opt.init(cut)["mu"]["w"].layout.memory == "host"


@pytest.mark.parametrize("memory", MEMORIES)
def test_frozen_parameters_and_their_state_stay_as_they_are(memory):
    off = optim.offload(optim.adamw(0.1), memory, group=GROUP)
    want = fed(optim.adamw(0.1), frozen=("w", "b"))
    same(fed(off, frozen=("w", "b")), want, memory)
    with sw.record() as plan:
        fed(off, frozen=tuple(k for k in SHAPES if k != "b"), steps=1)
    assert {c.path for c in plan.copies if c.kind == "to_device"} == {"b"}


@pytest.mark.parametrize("memory", MEMORIES)
def test_updates_without_the_step_are_the_same(memory):
    scaled = lambda off: optim.chain(off(optim.scale_by_adam()), optim.scale(-0.1))  # noqa: E731
    want = fed(scaled(lambda t: t))
    got = fed(scaled(lambda t: optim.offload(t, memory, group=GROUP)))
    for k, p in got[0].items():
        assert torch.equal(p.full_tensor(), want[0][k].full_tensor())


def test_parameters_at_rest_on_the_host_need_no_copies():
    on = sw.make_mesh(AXES)
    at = {k: f"{v} @host" for k, v in LAYOUTS["dim 1"].items()}
    p, g = (sw.shard(values(i, torch.float32), on, at) for i in range(2))
    opt = optim.offload(optim.adamw(0.1), group=GROUP)
    state = opt.init(p)
    with sw.record() as plan:
        new, state = opt.step(g, state, p)
    assert not plan.copies
    assert {x.layout.memory for x in sw.tree.leaves((new, state))} == {"host"}
    resident, _ = optim.adamw(0.1).step(g, optim.adamw(0.1).init(p), p)
    for k, x in new.items():
        assert torch.equal(x.full_tensor(), resident[k].full_tensor())


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("master", [False, True])
def test_traffic_of_a_step_is_the_formula(memory, master):
    on = sw.make_mesh({"data": 4}, transport="abstract")
    dtype = torch.bfloat16 if master else torch.float32
    p = {f"w{i}": sw.zeros((64, 64), on, "_ _/data", dtype=dtype) for i in range(4)}
    inner = optim.master(optim.adamw(0.1)) if master else optim.adamw(0.1)
    opt = optim.offload(inner, memory, group=1 << 10)
    made = sw.plan(lambda p, g, s: opt.step(g, s, p), p, p, opt.init(p))
    count = 4 * 64 * 64 // 4
    item = dtype.itemsize
    moved = {
        kind: sum(c.bytes for c in made.copies if c.kind == kind)
        for kind in ("to_host", "to_device", "read", "write")
    }
    on_disk = count * (12 if master else 8) if memory == "disk" else 0
    assert moved == {
        "to_host": count * item * (1 if master else 2),  # the master copies are there already
        "to_device": count * item,
        "read": on_disk,
        "write": on_disk,
    }


def test_the_devices_see_gradients_and_parameters_only():
    on = sw.make_mesh({"data": 4}, transport="abstract")
    p = {f"w{i}": sw.zeros((64, 64), on, "_ _/data") for i in range(8)}
    size = 8 * 64 * 64 * 4 // 4
    opt = optim.offload(optim.adamw(0.1), group=1)
    made = sw.plan(lambda p, g, s: opt.step(g, s, p), p, p, opt.init(p))
    # Old and new parameters, and the gradients: no state, and nothing of the arithmetic.
    assert 3 * size <= made.peak_memory <= 3 * size + 200
    resident = optim.adamw(0.1)
    all_there = sw.plan(lambda p, g, s: resident.step(g, s, p), p, p, resident.init(p))
    assert all_there.peak_memory > 6 * size


def test_a_given_up_parameter_is_written_over_in_place():
    on = mesh(data=2)
    p = {"w": sw.from_local([torch.ones(4), torch.ones(4)], on, "n/data")}
    g = {"w": sw.full((8,), 1.0, on, "n/data")}
    opt = optim.offload(optim.sgd(0.5), "host")
    state = opt.init(p)
    old = [s.data_ptr() for s in p["w"].shards]
    new, _ = opt.step(g, state, p, donate=True)
    assert [s.data_ptr() for s in new["w"].shards] == old
    with pytest.raises(sw.LayoutError, match="was donated"):
        p["w"].full_tensor()


def test_a_given_up_state_is_written_over_on_disk_and_a_kept_one_stays_readable():
    on = sw.make_mesh(AXES)
    p, g = (sw.shard(values(i, torch.float32), on, LAYOUTS["dim 1"]) for i in range(2))
    opt = optim.offload(optim.sgd(0.1, momentum=0.9), "disk", group=GROUP)
    names = lambda: {f.name for f in spill.home().iterdir()}  # noqa: E731
    _, first = opt.step(g, opt.init(p), p)
    before = {k: m.full_tensor() for k, m in first["mu"].items()}
    _, second = opt.step(g, first, p)
    assert all(torch.equal(m.full_tensor(), before[k]) for k, m in first["mu"].items())
    had = names()
    spare = {k: sw.reshard(x, "...") * 1 for k, x in p.items()}
    _, third = opt.step(g, second, spare, donate=True)
    assert names() == had
    assert len(third["mu"]) == len(SHAPES)


class Counting(spill.Calls):
    """Notes which thread reads and writes which files, and can fail."""

    def __init__(self, fail: str = "", after: int = 0) -> None:
        self.events: list[tuple[str, str]] = []
        self.fail, self.left = fail, after

    def open(self, path, flags):
        self.events.append(("open", threading.current_thread().name.split("_")[0]))
        return super().open(path, flags)

    def allocate(self, descriptor, size):
        self.events.append(("write", threading.current_thread().name))
        self.left -= 1
        if self.fail == "allocate" and self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(descriptor, size)


def test_states_are_read_one_group_ahead_by_a_thread(monkeypatch):
    """Never more than one group is waiting while one is updated."""
    on = mesh(data=2)
    p = {f"w{i}": sw.full((64,), 1.0, on, "n/data") for i in range(6)}
    opt = optim.offload(optim.sgd(0.1, momentum=0.9), "disk", group=128)
    state = opt.init(p)
    calls = Counting()
    monkeypatch.setattr(spill, "CALLS", calls)
    opt.step(p, state, p)
    kinds = [kind for kind, _ in calls.events]
    assert {who for kind, who in calls.events if kind == "open"} == {"spill"}
    ahead = 0
    for kind in kinds:
        ahead += 1 if kind == "open" else -2  # one leaf: its two shards are opened one by one
        assert ahead <= 4
    assert ahead == 0


@pytest.mark.parametrize("donate", [False, True])
def test_a_full_disk_in_a_step_loses_nothing(monkeypatch, donate):
    on = sw.make_mesh(AXES)
    p, g = (sw.shard(values(i, torch.float32), on, LAYOUTS["dim 1"]) for i in range(2))
    opt = optim.offload(optim.adam(0.1), "disk", group=GROUP)
    _, state = opt.step(g, opt.init(p), p)
    before = {path: x.full_tensor() for path, x in sw.tree.items((p, state))}
    monkeypatch.setattr(spill, "CALLS", Counting("allocate", after=2))
    if donate:  # written over: no space is needed
        opt.step(g, state, p, donate=True)
        return
    with pytest.raises(spill.SpillError, match="the disk is full") as caught:
        opt.step(g, state, p)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    for path, x in sw.tree.items((p, state)):
        assert torch.equal(x.full_tensor(), before[path]), path
    adam = optim.adam(0.1)
    want, _ = adam.step(g, adam.step(g, adam.init(p), p)[1], p)
    got, _ = opt.step(g, state, p)
    for k, x in got.items():
        assert torch.equal(x.full_tensor(), want[k].full_tensor())


def test_a_damaged_state_stops_the_step_and_names_the_tensor():
    on = mesh(data=2)
    p = {"w": sw.full((64,), 1.0, on, "n/data")}
    opt = optim.offload(optim.sgd(0.1, momentum=0.9), "disk")
    _, state = opt.step(p, opt.init(p), p)
    for file in spill.home().iterdir():
        if file.name != "lock":
            os.truncate(file, 10)
    with pytest.raises(spill.SpillError, match=r"of w has 10 B, not 8,192 B"):
        opt.step(p, state, p)


def test_a_step_is_layout_stable():
    on = sw.make_mesh({"data": 2}, transport="abstract")
    p = {"w": sw.zeros((8, 8), on)}
    for memory in MEMORIES:
        opt = optim.offload(optim.skip_nonfinite(optim.adamw(0.1)), memory)
        sw.check_stable(lambda p, s, opt=opt: opt.step(p, s, p), p, opt.init(p))


def test_unknown_memories_are_refused():
    with pytest.raises(ValueError, match="memory is 'host' or 'disk', got 'tape'"):
        optim.offload(optim.sgd(0.1), "tape")  # pyright: ignore


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_checkpoint_does_not_know_where_the_state_lay(memory, tmp_path):
    on = mesh(data=2)
    p = {"w": sw.full((8, 4), 1.0, on, "i/data o")}
    opts = {"there": optim.adam(0.1), "away": optim.offload(optim.adam(0.1), memory)}
    after = {name: opt.step(p, opt.init(p), p)[1] for name, opt in opts.items()}
    for name, other in (("there", "away"), ("away", "there")):
        sw.checkpoint.save(tmp_path / name, after[name], step=1)
        back = sw.checkpoint.restore(tmp_path / name, opts[other].init(p))
        for (path, a), (_, b) in zip(sw.tree.items(back), sw.tree.items(after[other]), strict=True):
            assert str(a) == str(b), path
            assert torch.equal(a.full_tensor(), b.full_tensor()), path
