"""ShardedTensor: its type, its text, a leaf of public trees, an honest Python object."""

from __future__ import annotations

import copy
import pickle

import optree
import pytest
import torch
import torch.utils._pytree as pytree
from check import close, placed
from gallery import mesh, values

import shardwise as sw
from shardwise.layouts.sharded import DTYPES, make_type

TEXTS = [  # layout, shape, dtype, str
    ("b/data s d/tensor {U:pipe}", (8, 3, 4), torch.bfloat16, "bf16[8/data 3 4/tensor]{U:pipe}"),
    ("", (), torch.float32, "f32[]"),
    ("{U:data,tensor R:pipe}", (), torch.float64, "f64[]{U:data,tensor R:pipe}"),
    ("b/data/tensor", (8,), torch.int64, "i64[8/data/tensor]"),
    ("b d @host", (8, 2), torch.bool, "bool[8 2]@host"),
    ("b/pipe", (8,), torch.uint8, "u8[8/pipe]"),
]


@pytest.mark.parametrize(("layout", "shape", "dtype", "text"), TEXTS)
def test_a_tensor_prints_as_its_type(layout, shape, dtype, text):
    on = sw.make_mesh({"data": 2, "tensor": 4, "pipe": 2}, transport="abstract")
    x = sw.zeros(shape, on, layout, dtype=dtype)
    assert str(x) == text
    local = " ".join(map(str, x.local_shape))
    assert repr(x) == f"{text} local[{local}] on mesh(data=2, tensor=4, pipe=2)"


def test_dtypes_have_short_names():
    assert {
        "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
        "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "i64": torch.int64,
        "i32": torch.int32, "u8": torch.uint8, "bool": torch.bool,
    }.items() <= {name: dtype for dtype, name in DTYPES.items()}.items()  # fmt: skip


def test_repr_says_when_a_gradient_flows():
    x = placed(values(4), mesh(a=2), "_/a")
    seen = []
    sw.grad(lambda x: (seen.append(repr(x * 2)), x.sum())[1])(x)
    assert seen == ["f64[4/a] local[2] on mesh(a=2) grad"]


def test_types_are_one_object():
    x, y = placed(values(4), mesh(a=2), "_/a"), placed(values(4, seed=1), mesh(a=2), "_/a")
    assert x._type is y._type is make_type(mesh(a=2), sw.Layout("_/a"), (4,), torch.float64, False)
    assert (x + y)._type is x._type


def test_properties_are_global():
    x = placed(values(8, 6), mesh(a=2, b=3), "_/a _/b")
    assert (x.shape, x.ndim, x.dim(), len(x), x.numel()) == ((8, 6), 2, 2, 8, 48)
    assert (x.size(), x.size(1), x.local_shape, x.device.type) == ((8, 6), 6, (4, 2), "cpu")
    assert (x.dtype, x.element_size(), x.is_floating_point()) == (torch.float64, 8, True)
    assert len(x.shards) == 6
    assert isinstance(x.shape, torch.Size)
    with pytest.raises(TypeError, match="0-d"):
        len(placed(values(), mesh(a=2), ""))


def test_every_public_tree_takes_it_for_a_leaf():
    x = placed(values(4), mesh(a=2), "_/a")
    tree = {"w": x, "b": [1, x]}
    assert [v is x for v in optree.tree_leaves(tree)] == [False, True, True]
    assert [v is x for v in pytree.tree_leaves(tree)] == [True, False, True]
    assert [v is x for v in sw.tree.leaves(tree)] == [False, True, True]
    assert isinstance(x, torch.Tensor) is False


def test_only_the_library_opens_it_and_checks_what_comes_back():
    x = placed(values(4, 6), mesh(a=2), "_/a _")
    shards, spec = optree.tree_flatten({"w": x}, namespace="shardwise")
    assert [s.shape for s in shards] == [(2, 6), (2, 6)]
    back = optree.tree_unflatten(spec, shards)["w"]
    assert back._type is x._type
    close(back, values(4, 6))
    with pytest.raises(sw.LayoutError, match=r"shape \(4, 6\), expected \(2, 6\)"):
        optree.tree_unflatten(spec, [values(4, 6), values(4, 6)])


def test_it_hashes_by_identity_and_compares_by_element():
    x, y = placed(values(4), mesh(a=2), "_/a"), placed(values(4), mesh(a=2), "_/a")
    assert {x: 1, y: 2}[x] == 1
    assert (x == y).full_tensor().all()
    assert not (x != y).full_tensor().any()
    assert (x == None) is False  # noqa: E711 - as torch does
    assert (x != None) is True  # noqa: E711
    assert x in [x, y]


@pytest.mark.parametrize("other", ["text", object(), [1, 2], {}])
def test_an_operand_of_another_kind_is_a_type_error(other):
    x = placed(values(4), mesh(a=2), "_/a")
    for attempt in (lambda: x + other, lambda: other * x, lambda: x < other):
        with pytest.raises(TypeError):
            attempt()


def test_copies_are_tensors_of_the_same_type():
    x = placed(values(4), mesh(a=2), "_/a")
    deep, shallow = copy.deepcopy({"w": x})["w"], copy.copy(x)
    assert deep._type is shallow._type is x._type
    assert deep.shards[0] is not x.shards[0]
    close(deep, values(4))
    with pytest.raises(TypeError, match="belongs to this process"):
        pickle.dumps(x)


def test_detach_cuts_the_gradient():
    x = placed(values(4), mesh(a=2), "_/a")
    close(sw.grad(lambda x: (x.detach() * x).sum())(x), values(4))
    close(sw.grad(lambda x: (torch.detach(x) * x).sum())(x), values(4))


def test_to_local_is_for_one_shard(golden):
    one = placed(values(4), mesh(a=1), "_/a")
    assert torch.equal(one.to_local(), values(4))
    with pytest.raises(sw.LayoutError) as caught:
        placed(values(4), mesh(a=2), "_/a").to_local()
    golden("to_local", str(caught.value))


def test_full_tensor_is_differentiable_and_finds_replicas_that_differ(golden):
    on = mesh(a=2)
    for layout in ("_/a", "_", "_ {R:a}", "_ {U:a}"):
        x = placed(values(4), on, layout)
        g = sw.grad(
            lambda x: (
                sw.shard(torch.tensor(0.0), on)
                + (x.full_tensor() * 0).sum().detach()
                + (x * x).sum()
            )
        )(x)
        close(g, 2 * values(4))
    odd = sw.from_local([torch.zeros(2), torch.ones(2)], on, "_")
    with pytest.raises(sw.LayoutError) as caught:
        odd.full_tensor()
    golden("full_tensor", str(caught.value))


def test_names_that_torch_has_not_are_attribute_errors():
    x = placed(values(4), mesh(a=2), "_/a")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = x.nonsense
    assert not hasattr(x, "__array__")
    with pytest.raises(TypeError, match="dtype"):
        x.to("cpu")


def test_unused_and_integer_leaves_give_zero_and_none():
    on = mesh(a=2)
    tree = {
        "w": placed(values(4), on, "_/a"),
        "n": sw.shard(torch.arange(4), on),
        "free": placed(values(4), on, "_ {R:a}"),
    }
    g = sw.grad(lambda p: (p["w"] * 2).sum())(tree)
    assert g["n"] is None
    assert g["free"].layout is sw.Layout("_ {U:a}")
    close(g["free"], torch.zeros(4, dtype=torch.float64))
