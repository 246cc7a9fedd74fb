"""What `like` and `rename` ask for, what does not fit, and what cannot be stored at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gallery import mesh

import shardwise as sw
from shardwise.checkpoint import CheckpointError


def saved(root: Path) -> dict[str, Any]:
    on = mesh(a=2)
    tree = {
        "params": {
            "blocks": {"w_up": sw.shard(torch.arange(8.0), on, "n/a"), "w_down": torch.ones(2)},
            "norm": torch.zeros(3),
        },
        "step": 5,
        "key": sw.random.key(1),
    }
    sw.checkpoint.save(root, tree, step=5)
    return tree


def test_part_of_a_tree_by_its_paths(tmp_path: Path) -> None:
    tree = saved(tmp_path)
    like = {"params": {"blocks": {"w_up": torch.zeros(8)}}, "step": 0}
    back = sw.checkpoint.restore(tmp_path, like)
    assert back["step"] == 5
    assert torch.equal(back["params"]["blocks"]["w_up"], torch.arange(8.0))
    assert torch.equal(like["params"]["blocks"]["w_up"], torch.zeros(8))  # not written to
    assert tree["step"] == 5


@pytest.mark.parametrize(
    ("rename", "path"),
    [
        ({"params": ""}, "blocks.w_up"),
        ({"params.blocks": "layers"}, "layers.w_up"),
        ({"params": "p", "params.blocks": "layers"}, "layers.w_up"),
        ({"params.blocks.w_up": "w"}, "w"),
        ({"params": "model.params"}, "model.params.blocks.w_up"),
        ({"": "old"}, "old.params.blocks.w_up"),
        ({"params.blocks.w_up": "params.blocks.w_down"}, "params.blocks.w_down"),
    ],
)
def test_renamed_paths(tmp_path: Path, rename: dict[str, str], path: str) -> None:
    saved(tmp_path)
    like: Any = torch.zeros(8)
    for name in reversed(path.split(".")):
        like = {name: like}
    back = sw.checkpoint.restore(tmp_path, like, rename=rename)
    assert torch.equal(dict(sw.tree.items(back))[path], torch.arange(8.0))


@pytest.mark.parametrize(
    ("rename", "match"),
    [
        ({"w_up": "w"}, r"'w_up' is not stored"),
        ({"params.block": "w"}, r"is not stored; did you mean 'params.blocks"),
        ({"params.norm": "x", "params.blocks.w_up": "x"}, "to two stored paths"),
    ],
)
def test_renames_that_mean_nothing(tmp_path: Path, rename: dict[str, str], match: str) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        sw.checkpoint.restore(tmp_path, {"step": 0}, rename=rename)


ZEROS = torch.zeros(8)
MISFITS: dict[str, tuple[Any, str]] = {
    "a missing key": (
        {"params": {"blocks": {"w_upp": ZEROS}}},
        "did you mean 'params.blocks.w_up'",
    ),
    "another shape": ({"params": {"norm": torch.zeros(4)}}, r"expected f32\[4\], found f32\[3\]"),
    "another ndim": (
        {"params": {"norm": torch.zeros(3, 1)}},
        r"expected f32\[3, 1\], found f32\[3\]",
    ),
    "another dtype": ({"params": {"norm": torch.zeros(3).half()}}, r"expected f16\[3\], found f32"),
    "an int dtype": ({"params": {"norm": torch.zeros(3).int()}}, r"expected i32\[3\], found f32"),
    "a number for a tensor": ({"params": {"norm": 1.0}}, r"expected float, found f32\[3\]"),
    "a tensor for a number": ({"step": torch.tensor(5)}, r"expected i64\[\], found int"),
    "a float for an int": ({"step": 5.0}, "expected float, found int"),
    "a bool for an int": ({"step": True}, "expected bool, found int"),
    "None for an int": ({"step": None}, "expected none, found int"),
    "an int for a key": ({"key": 1}, "expected int, found key"),
    "a tree for a leaf": (
        {"params": {"norm": {"scale": torch.zeros(3)}}},
        "params.norm.scale.*not",
    ),
    "a leaf for a tree": ({"params": {"blocks": ZEROS}}, "params.blocks.*not stored"),
    "an unknown kind": ({"step": {1, 2}}, "expected set, found int"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    saved(tmp_path)
    like, match = MISFITS[case]
    with pytest.raises(CheckpointError, match=match) as caught:
        sw.checkpoint.restore(tmp_path, like)
    assert caught.value.tensor == sw.tree.items(like)[0][0]


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    saved(tmp_path)
    like = {"params": {"norm": torch.zeros(9)}, "step": 1.0, "lr": 0.1, "key": sw.random.key(0)}
    with pytest.raises(CheckpointError) as caught:
        sw.checkpoint.restore(tmp_path, like)
    text = str(caught.value)
    assert text.splitlines()[1:] == [
        "  lr: not stored",
        "  params.norm: another type: expected f32[9], found f32[3]",
        "  step: another type: expected float, found int",
    ]


def test_shapes_alone_say_what_to_read(tmp_path: Path) -> None:
    tree = saved(tmp_path)
    on = sw.make_mesh({"a": 2}, transport="abstract", device="cpu")
    like = sw.eval_shape(
        lambda x: {"params": {"blocks": {"w_up": x}, "norm": x}}, sw.zeros((8,), on, "n/a")
    )
    like["params"].pop("norm")
    back = sw.checkpoint.restore(tmp_path, like)["params"]["blocks"]["w_up"]
    assert back.mesh.transport == "simulated"
    assert str(back) == "f32[8/a]"
    assert torch.equal(back.full_tensor(), torch.arange(8.0))
    real = mesh(a=2).at(a=(0, 1))
    both = {"params": {"blocks": like["params"]["blocks"], "norm": sw.zeros((3,), real)}}
    assert sw.checkpoint.restore(tmp_path, both)["params"]["blocks"]["w_up"].mesh is real
    meta = torch.empty(3, device="meta")
    back = sw.checkpoint.restore(tmp_path, {"params": {"norm": meta}})["params"]["norm"]
    assert torch.equal(back, tree["params"]["norm"])


UNFIT: dict[str, tuple[Any, str]] = {
    "a sum that is owed": (
        {"x": sw.full((4,), 1.0, mesh(a=2), "n {U:a}")},
        r'x: f32\[4\]\{U:a\} is still a sum over a; save the sum: sw.reshard\(x, "_"\)',
    ),
    "an abstract tensor": (
        {"x": sw.zeros((4,), sw.make_mesh({"a": 2}, transport="abstract", device="cpu"))},
        "x: .* has no numbers",
    ),
    "a meta tensor": ({"x": torch.empty(3, device="meta")}, "x: a meta tensor has no numbers"),
    "complex128": ({"x": torch.zeros(2, dtype=torch.complex128)}, "no name for torch.complex128"),
    "a sparse tensor": ({"x": torch.zeros(2, 2).to_sparse()}, "only dense"),
    "a set": ({"x": {1}}, "x: a set is none of"),
    "bytes": ({"x": b"1"}, "x: a bytes is none of"),
    "a function": ({"x": len}, "x: a builtin_function_or_method is none of"),
    "a huge integer": ({"x": 10**5000}, "more than 900 digits"),
    "one path twice": ({"a.b": 1, "a": {"b": 2}}, "a.b: two leaves of the tree have this path"),
    "the header's own name": ({"__metadata__": torch.zeros(1)}, "keeps this name"),
}


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, case: str, wait: bool) -> None:
    tree, match = UNFIT[case]
    with pytest.raises(CheckpointError, match=match):
        sw.checkpoint.save(tmp_path / "new", tree, step=1, wait=wait)
    assert not (tmp_path / "new").exists()


def test_the_table(tmp_path: Path) -> None:
    saved(tmp_path)
    assert str(sw.checkpoint.inspect(tmp_path)).splitlines() == [
        "step 5: 3 tensors, 13 elements, 52 B in 2 files",
        "  params.blocks.w_down  f32[2]  8 B   1 block   plain",
        "  params.blocks.w_up    f32[8]  32 B  2 blocks  _/a",
        "  params.norm           f32[3]  12 B  1 block   plain",
        "  key                   key                     key(0000000100000000)",
        "  step                  int                     5",
    ]
