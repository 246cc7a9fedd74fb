"""What is saved on any mesh and layout comes back bit for bit on any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch
from disks import Watched, same
from gallery import MESHES, mesh, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts

import shardwise as sw
from shardwise import strategies
from shardwise.checkpoint import files
from shardwise.checkpoint.manifest import DTYPES


def bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bytes seen as this dtype: every pattern, NaNs and denormals among them."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=rng(seed)) < 0.5
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=rng(seed), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def whole(x: Any) -> torch.Tensor:
    """The bytes of a global value."""
    value = x.full_tensor() if isinstance(x, sw.ShardedTensor) else x
    return value.contiguous().reshape(-1).view(torch.uint8)


class Moments(NamedTuple):
    m: Any
    v: Any


def test_every_kind_of_leaf_and_container(tmp_path: Path) -> None:
    on = mesh(data=2, tensor=2)
    tree = {
        "params": {"w": sw.shard(bits(torch.float32, 4, 6), on, "a/data b/tensor")},
        "opt": Moments([sw.shard(bits(torch.float64, 8), on, "a/data/tensor")], (None, 1)),
        "key": sw.random.key(2**63 + 5),
        "plain": bits(torch.bfloat16, 3, 1),
        "empty": [torch.zeros(0, 4), sw.shard(torch.zeros(0, 4), on, "a/data b")],
        "scalar": sw.shard(torch.tensor(3, dtype=torch.int32), on),
        "numbers": [7, -(2**80), 0.1, -0.0, math.inf, math.nan, 5e-324, True, False],
        "texts": ["", 'a\n"b" \u00e9\ud800 \U0001f600', "__metadata__"],
    }
    sw.checkpoint.save(tmp_path, tree, step=0)
    back = sw.checkpoint.restore(tmp_path, tree)
    assert same(back, tree)
    assert type(back["opt"]) is Moments
    assert math.copysign(1, back["numbers"][3]) == -1
    sw.checkpoint.verify(tmp_path)


def test_a_tree_that_is_one_leaf(tmp_path: Path) -> None:
    x = sw.shard(torch.arange(4), mesh(a=2), "n/a")
    sw.checkpoint.save(tmp_path, x, step=1)
    assert torch.equal(sw.checkpoint.restore(tmp_path, x).full_tensor(), torch.arange(4))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_bit_for_bit(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    value = bits(dtype, 4, 3)
    x = sw.from_local(list(value.chunk(2)), mesh(a=2), "n/a _")
    sw.checkpoint.save(tmp_path, {"x": x, "p": value}, step=1)
    back = sw.checkpoint.restore(tmp_path, {"x": value, "p": x})
    assert torch.equal(whole(back["x"]), whole(value))
    assert torch.equal(torch.cat([whole(s) for s in back["p"].shards]), whole(value))
    assert back["x"].dtype == back["p"].dtype == dtype


def test_views_are_stored_as_they_read(tmp_path: Path) -> None:
    base = torch.randn(4, 6, dtype=torch.complex64, generator=rng())
    views = {
        "t": base.T, "step": base[:, ::2], "expand": base[:1].expand(4, 6), "conj": base.conj(),
        "imag": base.conj().imag, "needs_grad": torch.randn(3, requires_grad=True),
    }  # fmt: skip
    sw.checkpoint.save(tmp_path, views, step=1)
    back = sw.checkpoint.restore(tmp_path, views)
    assert all(torch.equal(back[name], views[name]) for name in views)
    assert not back["needs_grad"].requires_grad


@st.composite
def moves(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[sw.Mesh, sw.Layout]]]:
    """A value, a mesh and layout to save it in, others to restore it in."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 6, 12, 24]), max_size=3)))
    ways = []
    for number in range(3):
        on = mesh(**draw(st.sampled_from(MESHES)))
        states = ["replicated", "reduced"] + ["unreduced"] * (number > 0)
        ways.append((on, draw(layouts(shape, on, states))))
    return bits(torch.float32, *shape, seed=draw(st.integers(0, 99))).nan_to_num(), ways


@settings(max_examples=60)
@given(moves())
def test_any_layout_comes_back_in_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    move: tuple[torch.Tensor, list[tuple[sw.Mesh, sw.Layout]]],
) -> None:
    value, ways = move
    folder = tmp_path_factory.mktemp("any")
    sw.checkpoint.save(folder, {"x": sw.shard(value, *ways[0])}, step=1)
    written = sum(body.bytes for body in sw.checkpoint.inspect(folder).files.values())
    headers = sum(
        len(sw.checkpoint.inspect(folder).header(name))
        for name in sw.checkpoint.inspect(folder).files
    )
    assert written - headers == value.numel() * 4  # each element once
    for on, layout in ways[1:]:
        like = sw.zeros(value.shape, on, layout)
        back = sw.checkpoint.restore(folder, {"x": like})["x"]
        assert (back.mesh, back.layout, back.dtype) == (on, layout, value.dtype)
        assert torch.equal(whole(back), whole(value + 0.0 if layout.unreduced else value))


CHAIN = (
    (mesh(tensor=8), "rows cols/tensor"),
    (mesh(data=2, tensor=2), "rows/data cols/tensor"),
    (mesh(data=6), "rows/data cols"),
    (mesh(one=1), "rows cols"),
    (mesh(x=2, y=2, z=2), "rows/x/z cols/y"),
    (mesh(data=16), "rows cols/data"),
)


def test_8_to_4_to_6_to_1_to_8_to_16_devices(tmp_path: Path) -> None:
    value, moment = bits(torch.float32, 24, 48), bits(torch.bfloat16, 24, 48, seed=1)
    tree = {"w": sw.from_callback(lambda i: value[i], value.shape, *CHAIN[0]), "m": moment}
    for step, (on, layout) in enumerate(CHAIN):
        like = {
            "w": sw.zeros(value.shape, on, layout),
            "m": sw.zeros(value.shape, on, layout, dtype=torch.bfloat16),
        }
        if step:
            tree = sw.checkpoint.restore(tmp_path, like)
            whole_w = torch.empty_like(value)
            for coord, shard in zip(on.coords, tree["w"].shards, strict=True):
                whole_w[tree["w"].layout.index(value.shape, on, coord)] = shard
            assert torch.equal(whole(whole_w), whole(value))
        sw.checkpoint.save(tmp_path, tree, step=step, keep=1)
    sw.checkpoint.verify(tmp_path)


PRESETS = {
    "data": (mesh(data=4), strategies.data()),
    "fsdp": (mesh(data=4), strategies.fsdp()),
    "1d": (mesh(data=2, tensor=2), strategies.tensor_1d()),
    "1d and fsdp": (mesh(data=2, tensor=2), strategies.tensor_1d() * strategies.fsdp()),
    "2d": (mesh(row=2, col=2), strategies.tensor_2d()),
    "3d": (mesh(i=2, j=2, k=2), strategies.tensor_3d()),
}


CONFIG = sw.models.GPT2Config(layer=2, embed=16, heads=4, vocab=32, position=8)


@pytest.mark.parametrize("after", PRESETS)
@pytest.mark.parametrize("before", ["data", "fsdp", "1d", "3d"])
def test_a_model_moves_between_strategies(tmp_path: Path, before: str, after: str) -> None:
    def params(name: str, seed: int) -> Any:
        on, strategy = PRESETS[name]
        return sw.models.gpt2(CONFIG, strategy).init(sw.random.key(seed), on)

    saved = params(before, 1)
    sw.checkpoint.save(tmp_path, {"params": saved}, step=1)
    like = params(after, 2)
    back = sw.checkpoint.restore(tmp_path, {"params": like})["params"]
    assert same(back, saved)
    assert not same(back, like)
    for path, leaf in sw.tree.items(like):
        assert str(dict(sw.tree.items(back))[path]) == str(leaf)


def test_a_reader_touches_only_the_blocks_it_needs(tmp_path: Path) -> None:
    on = mesh(a=8)
    value = torch.randn(8, 4096, generator=rng())
    sw.checkpoint.save(tmp_path, {"x": sw.shard(value, on, "n/a d"), "y": value}, step=1)
    files.CURRENT = disk = Watched()
    part = on.at(a=(2, 3))
    like = {"x": sw.zeros((8, 4096), part, "n d")}
    assert torch.equal(sw.checkpoint.restore(tmp_path, like)["x"].full_tensor(), value)
    names = [name for name, _ in disk.calls]
    assert names.count("open_file") == 1 + 8  # the manifest, and each device's file
    assert names.count("read") == 1 + 8 * 2  # a header and one block each; y is not read


def test_large_blocks_are_read_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.checkpoint import plan, read

    for module in (files, plan, read):
        monkeypatch.setattr(module, "CHUNK", 64)
    value = bits(torch.float32, 10, 6)
    on = mesh(a=2)
    tree = {"x": sw.from_local(list(value.chunk(2)), on, "n/a d"), "s": torch.tensor(1.5)}
    sw.checkpoint.save(tmp_path, tree, step=1)
    other = mesh(b=3)
    back = sw.checkpoint.restore(tmp_path, {"x": sw.zeros((10, 6), other, "n d/b"), "s": tree["s"]})
    found = torch.cat([shard for shard in back["x"].shards], 1)
    assert torch.equal(whole(found), whole(value))
    assert back["s"] == 1.5
    sw.checkpoint.verify(tmp_path)


def test_files_are_safetensors_and_say_where_their_blocks_lie(tmp_path: Path) -> None:
    value = torch.arange(24.0).reshape(4, 6)
    x = sw.shard(value, mesh(a=2, b=3), "n/a d/b")
    sw.checkpoint.save(tmp_path, {"x": x, "flag": sw.shard(torch.tensor(True), x.mesh)}, step=1)
    found = torch.empty(4, 6)
    for path in sorted((tmp_path / "step-00000001").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            text = file.metadata()["x"]
            box = text.removeprefix("[").partition("] of ")[0]
            index = tuple(slice(*map(int, part.split(":"))) for part in box.split(", "))
            found[index] = file.get_tensor("x")
    assert torch.equal(found, value)


def test_a_replicated_tree_is_spread_over_the_devices(tmp_path: Path) -> None:
    on = mesh(data=4)
    tree = {f"w{i}": sw.shard(torch.zeros(100), on) for i in range(40)}
    sw.checkpoint.save(tmp_path, tree, step=1)
    found = sw.checkpoint.inspect(tmp_path)
    assert len(found.files) == 4
    assert sum(len(entry.blocks) for entry in found.tensors.values()) == 40


def test_meshes_of_one_tree_may_differ(tmp_path: Path) -> None:
    pipe = mesh(pipe=2, data=2)
    tree = {
        "first": sw.shard(torch.arange(4.0), pipe.at(pipe=0), "n/data"),
        "last": sw.shard(torch.arange(4.0) + 9, pipe.at(pipe=1), "n/data"),
        "all": sw.shard(torch.arange(4.0) + 5, pipe, "n/data/pipe"),
    }
    sw.checkpoint.save(tmp_path, tree, step=1)
    entry = sw.checkpoint.inspect(tmp_path).tensors
    assert [b.file for b in entry["last"].blocks] == [f"shard-0000{i}.safetensors" for i in (2, 3)]
    assert same(sw.checkpoint.restore(tmp_path, tree), tree)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wait", [True, False])
def test_from_a_gpu_and_back_to_it(tmp_path: Path, wait: bool) -> None:
    on = sw.make_mesh({"a": 4}, transport="simulated", device="cuda")
    tree = {
        "x": sw.shard(torch.randn(8, 6, generator=rng()), on, "n/a d"),
        "h": sw.reshard(sw.shard(torch.arange(4.0), on, "n/a"), "n/a @host"),
        "p": torch.arange(3, device="cuda"),
    }
    sw.checkpoint.save(tmp_path, tree, step=1, wait=wait).wait()
    back = sw.checkpoint.restore(tmp_path, tree)
    assert same(back, tree)
    assert (back["x"].device.type, back["h"].device.type, back["p"].device.type) == (
        "cuda", "cpu", "cuda",
    )  # fmt: skip
    other = {"x": sw.zeros((8, 6), mesh(b=2, c=3), "n/b d/c"), "p": torch.zeros(3).long()}
    cpu = sw.checkpoint.restore(tmp_path, other)
    assert torch.equal(cpu["x"].full_tensor(), tree["x"].full_tensor().cpu())


def test_host_memory_is_kept(tmp_path: Path) -> None:
    on = mesh(a=2)
    x = sw.reshard(sw.shard(torch.arange(4.0), on, "n/a"), "n/a @host")
    sw.checkpoint.save(tmp_path, {"x": x}, step=1)
    back = sw.checkpoint.restore(tmp_path, {"x": x})["x"]
    assert back.layout.memory == "host"
    assert torch.equal(back.full_tensor(), torch.arange(4.0))
