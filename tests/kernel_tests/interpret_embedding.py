"""The embedding, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

import pytest
import torch
from canaries import compare
from torch import Tensor

from shardwise.kernels import embedding, embedding_triton

MODULES = (embedding_triton,)
TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 2e-6},
    torch.float16: {"atol": 6e-5, "rtol": 6e-4},  # half a unit in the last place
}
KINDS = pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)
# (ids, width, size of the block, where it starts)
SIZES = [(33, 96, 11, 5), (7, 1000, 3, 0), (1, 40, 1, 0), (5, 2304, 9, 2)]


def ids(name: str, count: int, size: int, start: int) -> Tensor:
    """Ids around the block [start, start + size), of each kind that the kernels tell apart."""
    torch.manual_seed(count)
    drawn = torch.randint(start - 2, start + size + 2, (count,))
    return {
        "drawn": drawn,
        "one": torch.full((count,), start + size // 2),
        "elsewhere": torch.full((count,), start + size),
        "skewed": torch.where(torch.rand(count) < 0.8, start, drawn),
    }[name]


@KINDS
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_lookup(shape: tuple[int, int, int, int], dtype: torch.dtype, backwards: bool) -> None:
    count, width, size, start = shape
    args = (torch.randn(size, width).to(dtype), ids("drawn", count, size, start), start, size)
    compare(
        embedding_triton.lookup, embedding._lookup, args, MODULES,
        backwards=backwards, atol=0, rtol=0,
    )  # fmt: skip


@KINDS
@pytest.mark.parametrize("kind", ["drawn", "one", "elsewhere", "skewed"])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 65, 200])
def test_backward(count: int, kind: str, dtype: torch.dtype, backwards: bool) -> None:
    """Segments that are shorter and longer than a chunk, and that start at and between borders."""
    found = ids(kind, count, 7, 3)
    args = (torch.randn(count, 40).to(dtype), found, 3, 7)
    tolerance = dict(TOLERANCE[dtype])
    tolerance["atol"] *= max(1, count // 4)  # sums grow with the number of rows
    compare(
        embedding_triton.backward, embedding._backward, args, MODULES,
        backwards=backwards, **tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_backward_of_odd_widths(shape: tuple[int, int, int, int]) -> None:
    count, width, size, start = shape
    found = ids("drawn", count, size, start).to(torch.int32)
    args = (torch.randn(count, width), found, start, size)
    compare(embedding_triton.backward, embedding._backward, args, MODULES, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("size", [65534, 65535])
def test_keys_of_two_and_of_four_bytes(size: int) -> None:
    """The largest block whose keys have two bytes, and the smallest whose keys have four."""
    found = torch.tensor([0, size - 1, 32767, 32768, size, -1, size - 1])
    keys, order, starts, _ = embedding_triton.sorted_ids(found, 0, size)
    assert keys.dtype == (torch.int16 if size == 65534 else torch.int32)
    assert order.tolist() == [0, 2, 3, 1, 6, 4, 5]
    assert starts[[0, 1, 32767, 32768, 32769, size - 1, size]].tolist() == [0, 1, 1, 2, 3, 3, 5]


def test_strided_gradients_and_many_dims() -> None:
    found = torch.tensor([[3, 4], [4, 9]])
    wanted = torch.tensor([1.0, 2.0]).unsqueeze(-1).expand(2, 5)
    grad = torch.ones(()).expand(2, 2, 5)
    torch.testing.assert_close(embedding_triton.backward(grad, found, 3, 2), wanted)
    table = torch.randn(5, 2).T
    rows = embedding_triton.lookup(table, found, 3, 2)
    torch.testing.assert_close(rows, embedding._lookup(table, found, 3, 2))


def test_nothing_gives_zeros() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert embedding_triton.backward(torch.zeros(0, 5), none, 0, 3).equal(torch.zeros(3, 5))
    assert embedding_triton.lookup(torch.ones(3, 5), none, 0, 3).shape == (0, 5)
    assert embedding_triton.lookup(torch.ones(0, 5), none + 1, 0, 0).shape == (0, 5)
