"""Memories: a tensor on the host or on disk is the same tensor; files are private and go away."""

from __future__ import annotations

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from check import close, placed
from gallery import MESHES, SHAPES, mesh, values

import shardwise as sw
from shardwise.layouts import memory, spill
from shardwise.ops.audit import layouts_of

AWAY = ("host", "disk")


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path) -> Iterator[None]:
    spill.spill_to(tmp_path / "spill")
    yield
    spill.remove_all()
    spill.spill_to(None)


def files() -> list[Path]:
    """The spill files there are now."""
    gc.collect()
    return sorted(p for p in spill.home().iterdir() if p.name != "lock")


@pytest.mark.parametrize("place", AWAY)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_there_and_back_is_identity_for_every_layout(sizes, place):
    on = mesh(**sizes)
    for shape in SHAPES:
        for layout in list(layouts_of(shape, on))[:12]:
            x = placed(values(*shape), on, layout)
            there = sw.reshard(x, f"... @{place}")
            assert there.layout.memory == place
            assert str(there) == f"{x}@{place}"
            back = sw.reshard(there, "... @device")
            assert back.layout is x.layout
            for a, b, c in zip(x.shards, there.shards, back.shards, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("place", AWAY)
def test_every_dtype_keeps_its_bits(dtype, place):
    x = sw.shard((values(4, 6) * 3).to(dtype), mesh(a=2), "_/a _")
    back = sw.reshard(sw.reshard(x, f"... @{place}"), "... @device")
    for a, b in zip(x.shards, back.shards, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("place", AWAY)
def test_a_move_gives_storage_of_its_own(place):
    x = sw.shard(values(4), mesh(a=2), "_/a")
    there = sw.reshard(x, f"... @{place}")
    back = sw.reshard(there, "... @device")
    every = [s.untyped_storage().data_ptr() for y in (x, there, back) for s in y.shards]
    assert len(set(every)) >= 5  # the shards of x are parts of one value, copied apart


def test_other_layouts_and_memory_in_one_reshard():
    x = sw.shard(values(4, 6), mesh(a=2, b=3), "_/a _")
    for text in ("_ _/b @host", "_ _/a @disk", "_ _ {R:a} @host"):
        y = sw.reshard(sw.reshard(x, text), "_/a _/b")
        close(y, values(4, 6))


def test_dots_keep_the_memory_and_a_whole_layout_means_the_device():
    x = sw.reshard(sw.shard(values(4), mesh(a=2), "_/a"), "... @host")
    assert sw.reshard(x, "...") is x
    assert sw.reshard(x, "_").layout.memory == "device"
    assert sw.reshard(x, "... @disk").layout.memory == "disk"
    with pytest.raises(sw.LayoutError, match="second place"):
        sw.reshard(x, "... @host @device")


@pytest.mark.parametrize(
    ("text", "there", "back"),
    [
        ("... @host", ["to_host"], ["to_device"]),
        ("... @disk", ["to_host", "write"], ["read", "to_device"]),
    ],
)
@pytest.mark.parametrize("transport", ["simulated", "abstract"])
def test_copies_are_on_the_record_with_bytes_per_device(text, there, back, transport):
    on = sw.make_mesh({"a": 2}, transport=transport)
    x = sw.zeros((4, 6), on, "_/a _", dtype=torch.float64)
    x._path = "w"
    with sw.record() as plan:
        sw.reshard(sw.reshard(x, text), "... @device")
    assert [c.kind for c in plan.copies] == there + back
    assert {(c.bytes, c.path, c.phase) for c in plan.copies} == {(2 * 6 * 8, "w", "forward")}
    assert {c.source.split(":")[0] for c in plan.copies} == {"test_memory.py"}
    assert not plan.collectives


@pytest.mark.parametrize("place", AWAY)
@pytest.mark.parametrize("layout", ["_/a _", "_ _", "_ _ {R:a}"])
def test_the_gradient_travels_back(place, layout):
    p = sw.reshard(placed(values(4, 6), mesh(a=2), layout), f"... @{place}")

    def f(p):
        w = sw.reshard(p, "... @device")
        return (w * w * w).sum()

    with sw.record() as plan:
        g = sw.grad(f)(p)
    assert g.layout is p.layout.dual
    assert g.layout.memory == place
    close(g, 3 * values(4, 6) ** 2)
    kinds = [c.kind for c in plan.copies if c.phase == "backward"]
    assert kinds == {"host": ["to_host"], "disk": ["to_host", "write"]}[place]
    planned = sw.plan(sw.grad(f), p)
    assert [(c.kind, c.bytes, c.phase) for c in planned.copies] == [
        (c.kind, c.bytes, c.phase) for c in plan.copies
    ]


def test_moves_under_the_other_transforms():
    on = mesh(a=2)
    x, v = (sw.shard(values(4, seed=i), on, "_/a") for i in range(2))
    f = lambda x: (sw.reshard(sw.reshard(x, "... @host"), "... @device") ** 3).sum()  # noqa: E731
    plain = lambda x: (x**3).sum()  # noqa: E731
    close(sw.jvp(f, (x,), (v,))[1], sw.jvp(plain, (x,), (v,))[1].full_tensor())
    close(sw.hvp(f, x, v), sw.hvp(plain, x, v).full_tensor())
    rows = sw.shard(values(3, 4), on, "_ _/a")
    close(sw.vmap(sw.grad(f))(rows), 3 * values(3, 4) ** 2)


def test_math_runs_on_the_host_and_memories_do_not_mix():
    on = mesh(a=2)
    x = sw.shard(values(4), on, "_/a")
    h = sw.reshard(x, "... @host")
    y: sw.ShardedTensor = torch.exp(h * 2 + torch.ones(4, dtype=torch.float64))  # pyright: ignore
    assert y.layout.memory == "host"
    close(y, torch.exp(values(4) * 2 + 1))
    with pytest.raises(sw.LayoutError, match="operands lie in different memories"):
        torch.add(x, h)  # pyright: ignore
    with pytest.raises(sw.LayoutError, match="is on disk, where nothing is computed"):
        torch.exp(sw.reshard(x, "... @disk"))


def test_makers_take_places():
    on = mesh(a=2)
    for place in AWAY:
        close(sw.full((4,), 2.0, on, f"_/a @{place}"), torch.full((4,), 2.0))
        close(sw.shard(values(4), on, f"_/a @{place}"), values(4))
        made = sw.from_local([values(2), values(2)], on, f"_/a @{place}")
        close(made, torch.cat([values(2)] * 2))
        assert all(memory.is_away(s) for s in made.shards)
    value = values(4)
    x = sw.shard(value, on, "_ @host")
    value.zero_()
    close(x, values(4))


def test_layers_on_disk_are_read_one_by_one():
    on = mesh(a=2)
    w = sw.shard(values(3, 4, 4), on, "l _/a _ @disk")
    x = sw.shard(values(2, 4, seed=1), on)

    def f(w, x):
        def body(x, w):
            return torch.tanh(x @ sw.reshard(w, "_ _ {R:a} @device")), None

        return sw.scan(body, x, w)[0].sum()

    with sw.record() as plan:
        got = f(w, x)
    close(got, f(sw.reshard(w, "... @device"), x).full_tensor())
    assert [(c.kind, c.bytes) for c in plan.copies] == [("read", 64), ("to_device", 64)] * 3


@pytest.mark.parametrize("place", AWAY)
def test_the_meter_counts_device_memory_only(place):
    on = sw.make_mesh({"a": 2}, transport="abstract")
    size = 64 * 64 * 4 // 2
    w = sw.zeros((8, 64, 64), on, f"l _/a _ @{place}")

    def one_at_a_time(w):
        total = 0
        for layer in w.unbind(0):
            total = total + sw.reshard(layer, "... @device").sum()
        return total

    at_rest = sw.plan(lambda w: w, w)
    assert at_rest.peak_memory == 0
    planned = sw.plan(one_at_a_time, w)
    assert size <= planned.peak_memory < 2 * size + 1000
    on_host = sw.plan(lambda w: torch.exp(sw.reshard(w, "... @host")), w)
    assert on_host.peak_memory == 0
    everything = sw.plan(one_at_a_time, sw.zeros((8, 64, 64), on, "l _/a _"))
    assert everything.peak_memory >= 8 * size


def test_a_row_of_a_strategy_places_a_parameter_and_its_use_brings_it():
    on = mesh(data=2)
    s = sw.strategies.fsdp("data").replace(
        rest={"w": ".../data @host"}, compute={"w": "... {R:data}"}
    )
    s = s.replace(precision=sw.Precision(compute=torch.float64, reduce=torch.float64))
    w = sw.shard(values(4, 6), on, "_/data _ @host")
    with sw.record() as plan:
        used = s.use({"w": w})["w"]
    assert used.layout is sw.Layout("_ _ {R:data}")
    assert [c.kind for c in plan.copies] == ["to_device"]
    assert plan.count(kind="all_gather") == 1
    grads = sw.grad(lambda p: (s.use(p)["w"] ** 2).sum())({"w": w})
    assert grads["w"].layout is w.layout
    close(grads["w"], 2 * values(4, 6))
    kept = s.replace(compute={"w": "... {R:data} @host"}).use({"w": w})["w"]
    assert kept.layout.memory == "host"
    assert (s * sw.strategies.data("data")).rest["w"].endswith("@host")


# -- files --------------------------------------------------------------------------------------


def test_files_and_their_directory_are_private():
    x = sw.shard(values(4), mesh(a=2), "_/a @disk")
    home = spill.home()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    (file,) = files()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(home).startswith(str(spill._ROOT[0]))
    del x
    assert files() == []


def test_a_file_lives_as_long_as_a_tensor_on_it():
    x = sw.shard(values(4, 2), mesh(a=2), "_ _/a @disk")
    parts = x.unbind(0)
    del x
    assert len(files()) == 1
    close(sw.reshard(parts[3], "... @device"), values(4, 2)[3])
    del parts
    assert files() == []


def test_replicas_share_one_copy_on_disk():
    sw_one = sw.shard(values(512), mesh(a=2, b=3), "_ @disk")
    (file,) = files()
    assert file.stat().st_size == 4096
    close(sw_one, values(512))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_the_root_can_be_chosen(how, tmp_path, monkeypatch):
    if how == "argument":
        spill.spill_to(tmp_path / "there")
    else:
        spill.spill_to(None)
        monkeypatch.setenv("SHARDWISE_SPILL", str(tmp_path / "there"))
    kept = sw.shard(values(4), mesh(a=2), "_/a @disk")
    assert spill.home().parent == tmp_path / "there"
    close(kept, values(4))


class Failing(spill.Calls):
    """One kind of call raises."""

    def __init__(self, name: str, code: int, after: int = 0) -> None:
        self.left = after

        def fail(*args):
            self.left -= 1
            if self.left < 0:
                raise OSError(code, os.strerror(code))
            return getattr(spill.Calls, name)(self, *args)

        setattr(self, name, fail)


@pytest.mark.parametrize("call", ["create", "allocate", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_loses_nothing(call, code, monkeypatch):
    x = sw.shard(values(4, 6), mesh(a=2), "_/a _")
    earlier = sw.reshard(x, "... @disk")
    monkeypatch.setattr(spill, "CALLS", Failing(call, code))
    says = "the disk is full: 8,192 B are needed" if code == errno.ENOSPC else "Input/output error"
    with pytest.raises(spill.SpillError, match=says) as caught:
        sw.reshard(x, "... @disk")
    assert caught.value.errno == code
    assert "SHARDWISE_SPILL" in str(caught.value)
    assert "f64[4/a 6]" in str(caught.value)
    monkeypatch.undo()
    assert len(files()) == 1  # nothing is left of the second
    close(x, values(4, 6))
    close(earlier, values(4, 6))


def test_a_write_that_stops_half_way_leaves_no_file(monkeypatch):
    monkeypatch.setattr(spill, "CALLS", Failing("write", errno.ENOSPC, after=1))
    x = sw.shard(values(4, 6), mesh(a=2), "_/a _")  # two shards, two writes
    with pytest.raises(spill.SpillError, match="full"):
        sw.reshard(x, "... @disk")
    assert files() == []


def test_short_writes_and_reads_are_gone_on_with(monkeypatch):
    class Short(spill.Calls):
        def write(self, descriptor, data, at):
            return super().write(descriptor, data[:7], at)

        def read(self, descriptor, into, at):
            return super().read(descriptor, into[:5], at)

    monkeypatch.setattr(spill, "CALLS", Short())
    close(sw.reshard(sw.shard(values(4, 6), mesh(a=2), "_/a _ @disk"), "... @device"), values(4, 6))


@pytest.mark.parametrize("harm", ["cut", "longer", "gone", "link"])
def test_a_damaged_file_is_an_error_not_a_wrong_value(harm, tmp_path):
    x = sw.shard(values(4, 6), mesh(a=2), "_/a _ @disk")
    (file,) = files()
    if harm == "cut":
        os.truncate(file, 100)
    elif harm == "longer":
        os.truncate(file, 10000)
    elif harm == "gone":
        file.unlink()
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(spill.SpillError, match="f64") as caught:
        sw.reshard(x, "... @device")
    assert str(file) in str(caught.value)


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    spill.spill_to(tmp_path / "file")
    with pytest.raises(spill.SpillError, match="no directory for @disk tensors can be made under"):
        sw.shard(values(4), mesh(a=2), "_/a @disk")


PROGRAM = """if True:
    import os, signal, sys, time, torch, shardwise as sw
    x = sw.shard(torch.ones(8), sw.make_mesh({"a": 2}), "_/a @disk")
    from shardwise.layouts import spill
    print(spill.home(), flush=True)
    FILE = spill.home() / 'lock'
    {end}
"""


def start(end: str, root: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a tensor on disk, and its directory."""
    env = {**os.environ, "SHARDWISE_SPILL": str(root), "PYTHONPATH": "src"}
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{end}", end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout is not None
    home = Path(done.stdout.readline().strip())
    done.stdout.close()
    assert home.parent == root
    return done, home


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(0)", 0),
        ("raise RuntimeError", 1),
        ("time.sleep(60)", -signal.SIGTERM),
        (
            "pid = os.fork(); pid or sys.exit(0); os.waitpid(pid, 0); open(FILE).close()",
            0,
        ),
    ],
    ids=["exit", "exception", "SIGTERM", "fork"],
)
def test_the_directory_goes_with_the_process(end, code, tmp_path):
    done, home = start(end, tmp_path)
    if code < 0:
        assert home.exists()
        done.terminate()
    assert done.wait(timeout=60) == code
    assert not home.exists()


def test_left_overs_of_the_killed_are_cleaned_and_of_the_living_kept(tmp_path):
    killed, old = start("time.sleep(60)", tmp_path)
    living, other = start("time.sleep(60)", tmp_path)
    try:
        killed.kill()
        killed.wait(timeout=60)
        assert old.exists()
        (tmp_path / "precious").mkdir()
        (tmp_path / f"{spill.PREFIX}-1-link").symlink_to(tmp_path / "precious")
        (tmp_path / f"{spill.PREFIX}-{os.getpid()}-new").mkdir()  # its lock is not there yet
        assert spill.sweep(tmp_path) == [old]
        assert not old.exists()
        assert other.exists()
        assert (tmp_path / "precious").exists()
        assert (tmp_path / f"{spill.PREFIX}-{os.getpid()}-new").exists()
    finally:
        living.terminate()
        living.wait(timeout=60)
    assert not other.exists()
