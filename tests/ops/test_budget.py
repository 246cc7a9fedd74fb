"""Placements fit their budget, move no more than simple rules, and are decided without memory."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from gallery import mesh
from hypothesis import given
from hypothesis import strategies as st

import shardwise as sw
from shardwise import optim
from shardwise.ops.budget import BudgetError, parse_bytes, place
from shardwise.ops.paging import NEVER, RULES, Schedule, decide, paging


@st.composite
def schedules(draw: st.DrawFn, *, plain: bool) -> Schedule:
    """Short schedules; plain ones have one size, and all tensors on the host to begin with."""
    count = draw(st.integers(2, 5))
    ops = draw(
        st.lists(
            st.lists(st.integers(0, count - 1), min_size=1, max_size=2, unique=True),
            min_size=1,
            max_size=7,
        )
    )
    uses = tuple(map(tuple, ops))
    if plain:
        same = (3,) * count
        return Schedule(uses, same, (True,) * count, (NEVER,) * count, (True,) * count)
    numbers = range(count)
    given_ = draw(st.tuples(*[st.booleans()] * count))
    last = [max((at for at, op in enumerate(uses) if i in op), default=0) for i in numbers]
    stays = draw(st.tuples(*[st.integers(0, 2)] * count))
    until = tuple(NEVER if given_[i] or not stays[i] else last[i] + stays[i] - 1 for i in numbers)
    can_leave = tuple(
        a or b for a, b in zip(given_, draw(st.tuples(*[st.booleans()] * count)), strict=True)
    )
    sizes = draw(st.tuples(*[st.integers(1, 6)] * count))
    return Schedule(uses, sizes, given_, until, can_leave)


def fewest(schedule: Schedule, capacity: int) -> int | None:
    """The least traffic of all, by trying everything."""
    times = schedule.times

    def bytes_of(some) -> int:
        return sum(schedule.sizes[i] for i in some)

    @cache
    def best(at: int, here: frozenset[int], clean: frozenset[int]) -> int | None:
        if at == len(schedule.uses):
            return 0
        needed = frozenset(schedule.uses[at])
        free = [i for i in here - needed if schedule.can_leave[i]]
        found = None
        for size in range(len(free) + 1):
            for gone in itertools.combinations(free, size):
                now = (here - set(gone)) | needed
                if bytes_of(now) > capacity:
                    continue
                came = bytes_of(i for i in needed - here if schedule.given[i] or times[i][0] != at)
                went = bytes_of(set(gone) - clean)
                left = frozenset(i for i in now if schedule.until[i] != at)
                rest = best(at + 1, left, clean | set(gone))
                if rest is not None and (found is None or came + went + rest < found):
                    found = came + went + rest
        return found

    return best(0, frozenset(), frozenset(i for i, g in enumerate(schedule.given) if g))


@given(schedules(plain=True), st.integers(0, 5))
def test_the_farthest_next_use_is_optimal_for_tensors_of_one_size(schedule, more):
    capacity = schedule.least()[0] + 3 * more
    made = paging(schedule, capacity)
    assert made is not None
    assert made.traffic == fewest(schedule, capacity)


@given(schedules(plain=False), st.integers(0, 8))
def test_every_rule_fits_and_none_beats_the_best_of_all(schedule, more):
    capacity = schedule.least()[0] + more
    least = fewest(schedule, capacity)
    assert least is not None
    for rule in RULES:
        made = paging(schedule, capacity, rule)
        assert made is not None
        assert made.peak <= capacity
        assert made.traffic >= least


@given(schedules(plain=False))
def test_the_least_budget_is_the_least(schedule):
    need, worst = schedule.least()
    assert fewest(schedule, need) is not None
    assert fewest(schedule, need - 1) is None
    assert all(paging(schedule, need - 1, rule) is None for rule in RULES)
    assert 0 <= worst < len(schedule.uses)


@given(schedules(plain=False), st.integers(0, 8))
def test_the_decision_fits_and_is_no_worse_than_least_recent(schedule, more):
    budget = schedule.least()[0] + more
    arguments = [i for i, g in enumerate(schedule.given) if g]
    made, pinned = decide(schedule, budget, arguments)
    assert made.peak <= budget
    assert pinned <= set(arguments)
    assert not pinned & made.left
    simple = paging(schedule, budget, "least recent")
    assert simple is not None
    assert made.traffic <= simple.traffic


@given(schedules(plain=False))
def test_a_larger_budget_never_moves_more(schedule):
    arguments = [i for i, g in enumerate(schedule.given) if g]
    need = schedule.least()[0]
    moved = [decide(schedule, need + more, arguments)[0].traffic for more in range(12)]
    assert moved == sorted(moved, reverse=True)
    everything = sum(schedule.sizes) + need
    assert decide(schedule, everything, arguments)[0].traffic == 0


def training():
    """A step of three layers with Adam, its arguments, and sizes per device in bytes."""
    on = sw.make_mesh({"data": 2}, transport="abstract")
    params = {f"w{i}": sw.zeros((64, 64), on) for i in range(3)}
    opt = optim.adam(0.1)

    def loss(params, x):
        for w in params.values():
            x = torch.tanh(x @ w)
        return (x * x).mean()

    def step(params, state, x):
        _, grads = sw.value_and_grad(loss)(params, x)
        return opt.step(grads, state, params)

    return step, (params, opt.init(params), sw.zeros((32, 64), on, "b/data d"))


def test_with_room_for_everything_nothing_moves():
    step, args = training()
    made = place(step, *args, budget="1GiB")
    assert set(made.memory.values()) == {"device"}
    assert made.traffic == 0
    assert not made.activations
    assert made.peak == made.resident == sw.plan(step, *args).peak_memory
    assert list(made.memory)[:3] == ["params.w0", "params.w1", "params.w2"]
    assert "state.mu.w0" in made.memory
    assert made["x"] == "device"
    assert made.sizes["params.w0"] == 64 * 64 * 4


def test_the_budget_is_met_to_the_byte_or_refused_with_what_is_missing():
    step, args = training()
    with pytest.raises(BudgetError) as caught:
        place(step, *args, budget=0)
    least = caught.value.shortfall
    made = place(step, *args, budget=least)
    assert made.peak <= least
    assert "host" in made.memory.values()
    with pytest.raises(BudgetError) as caught:
        place(step, *args, budget=least - 1)
    assert caught.value.shortfall == 1
    text = str(caught.value)
    assert f"no placement fits {least - 1:,} B per device: 1 B are missing" in text
    assert f"needs {least:,} B at once" in text
    assert "16,384 B" in text
    assert "test_budget.py:" in text


def test_states_that_are_used_last_leave_first():
    step, args = training()
    whole = place(step, *args, budget="1GiB").peak
    made = place(step, *args, budget=whole - 64 * 64 * 4)
    gone = {path for path, where in made.memory.items() if where == "host"}
    assert gone
    assert not any(path.startswith("params.") for path in gone)
    assert made.traffic < 8 * 64 * 64 * 4


def test_saved_activations_leave_when_nothing_else_can():
    on = sw.make_mesh({"data": 1}, transport="abstract")
    w, x = sw.zeros((4, 4), on), sw.zeros((1024, 4), on)

    def step(w, x):
        def loss(w):
            y = x
            for _ in range(6):
                y = torch.tanh(y @ w)
            return y.sum()

        return sw.grad(loss)(w)

    size = 1024 * 4 * 4
    whole = place(step, w, x, budget="1GiB")
    made = place(step, w, x, budget=whole.peak - 2 * size)
    assert sum(made.activations.values()) >= size
    assert all("tanh" in name for name in made.activations)
    assert made.peak <= whole.peak - 2 * size
    assert made.to_host >= size


def test_a_placed_step_keeps_to_its_budget():
    on = mesh(data=2)
    ws = [sw.shard(torch.full((64, 64), 0.1), on) for _ in range(4)]
    x = sw.shard(torch.ones(8, 64), on, "b/data d")

    def step(ws, x):
        for w in ws:
            x = x @ sw.reshard(w, "... @device")
        return x

    budget = parse_bytes("40 KiB")
    assert sw.plan(step, ws, x).peak_memory > budget
    made = place(step, ws, x, budget=budget)
    placed = made.put(ws, "ws"), made.put(x, "x")
    assert [w.layout.memory for w in placed[0]] == [made[f"ws.{i}"] for i in range(4)]
    planned = sw.plan(step, *placed)
    assert planned.peak_memory <= budget
    assert sum(c.bytes for c in planned.copies if c.kind == "to_device") == made.to_device
    assert torch.equal(step(*placed).full_tensor(), step(ws, x).full_tensor())
    again = place(step, *placed, budget=budget)  # where they lie now makes no difference
    assert again.memory == made.memory


def test_a_placement_prints():
    step, args = training()
    text = str(place(step, *args, budget="1GiB"))
    assert "params.w0" in text
    assert "16 KiB" in text
    assert "of 1 GiB allowed" in text


def test_a_large_step_is_decided_in_seconds():
    on = sw.make_mesh({"data": 8}, transport="abstract")
    ws = {f"w{i}": sw.zeros((256, 256), on) for i in range(60)}
    opt = optim.adamw(0.1)

    def step(params, state, x):
        def loss(params):
            y = x
            for w in params.values():
                y = torch.tanh(y @ w)
            return y.sum()

        return opt.step(sw.grad(loss)(params), state, params)

    x = sw.zeros((512, 256), on, "b/data d")
    whole = place(step, ws, opt.init(ws), x, budget="1TiB").peak
    made = place(step, ws, opt.init(ws), x, budget=whole // 2)
    assert made.peak <= whole // 2


@pytest.mark.parametrize(("text", "size"), [("70GiB", 70 << 30), ("512 B", 512), ("1.5KiB", 1536)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="'70GB' is no size"):
        parse_bytes("70GB")
