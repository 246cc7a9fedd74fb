"""The embedding on a GPU: gradients within half a unit in the last place, equal in every run."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import torch.nn.functional as F
from device_check import BITS, DEVICE, check
from torch import Tensor

from shardwise.kernels import embedding

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)
# (ids, width, size of the block, where it starts)
SHAPES = [(4099, 768, 1000, 500), (1, 40, 3, 0), (2500, 2048, 301, 7), (777, 1000, 70000, 0)]


def ids(kind: str, count: int, size: int, start: int) -> Tensor:
    torch.manual_seed(count)
    drawn = torch.randint(max(0, start - 9), start + size + 9, (count,), device=DEVICE)
    rare = torch.rand(count, device=DEVICE) < 0.1
    return {"drawn": drawn, "skewed": torch.where(rare, drawn, start + size // 2)}[kind]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookup_copies(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    count, width, size, start = shape
    table = torch.randn(size, width, device=DEVICE).to(dtype)
    check("embedding_lookup", (table, ids("drawn", count, size, start), start, size), (0.0,))


@DTYPES
@pytest.mark.parametrize("kind", ["drawn", "skewed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Sums of positive numbers, whose error in float32 is relative to the sum.

    A sum of N terms, at most CHUNK / 4 + N / (4 CHUNK) of them one after the other, is off by that
    number times 2^-24: 4099 rows make 40 of them, 2.4e-6 of the sum.
    """
    count, width, size, start = shape
    grad = (torch.rand(count, width, device=DEVICE) + 0.5).to(dtype)
    args = (grad, ids(kind, count, size, start), start, size)
    check("embedding_backward", args, (5e-6,))


def test_unaligned_rows() -> None:
    grad = torch.rand(500, 777, device=DEVICE).bfloat16()
    found = ids("skewed", 500, 50, 0)
    check("embedding_backward", (grad, found, 0, 50), (5e-6,), shift=1)
    check("embedding_lookup", (grad, found, 0, 500), (0.0,), shift=1)


@pytest.mark.parametrize("kind", ["drawn", "skewed"])
def test_two_runs_are_equal_to_the_bit(kind: str) -> None:
    grad = torch.randn(20000, 768, device=DEVICE).bfloat16()
    found = ids(kind, 20000, 5000, 0)
    first, *others = (embedding.embedding_backward(grad, found, 0, 5000) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_blocks_of_the_vocabulary_make_the_whole() -> None:
    """Of whole numbers to the bit: in a block other ids share the chunks, so other sums round."""
    grad = torch.randn(3000, 64, device=DEVICE).mul(2).round().bfloat16()
    found = ids("skewed", 3000, 120, 0)
    whole = embedding.embedding_backward(grad, found, 0, 120)
    parts = [embedding.embedding_backward(grad, found, s, 40) for s in (0, 40, 80)]
    assert torch.equal(torch.cat(parts), whole)
    rows = [embedding.embedding_lookup(whole[s : s + 40], found, s, 40) for s in (0, 40, 80)]
    inside = (found < 120).unsqueeze(-1)
    assert torch.equal(
        rows[0] + rows[1] + rows[2], torch.where(inside, whole[found.clamp(max=119)], 0)
    )


def test_gradients_equal_torch_s_in_exact_numbers() -> None:
    """Whole numbers: no sum is rounded, so torch's own order of addition is no matter."""
    found = torch.randint(0, 300, (4, 2000), device=DEVICE)
    grad = torch.randint(-3, 4, (4, 2000, 96), device=DEVICE).float()
    table = torch.randn(300, 96, device=DEVICE, requires_grad=True)
    rows = embedding.embedding_lookup(table, found, 0, 300)
    assert torch.equal(rows, F.embedding(found, table))
    (ours,) = torch.autograd.grad(rows, table, grad)
    (theirs,) = torch.autograd.grad(F.embedding(found, table), table, grad)
    assert torch.equal(ours, theirs)


def test_a_captured_graph_gives_the_same() -> None:
    grad = torch.randn(3000, 256, device=DEVICE).bfloat16()
    found = ids("drawn", 3000, 500, 0)
    wanted = embedding.embedding_backward(grad, found, 0, 500)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = embedding.embedding_backward(grad, found, 0, 500)
    graph.replay()
    assert torch.equal(result, wanted)


def test_large_tables_need_offsets_of_64_bits() -> None:
    """A table of 2^31 elements and more: the last row is found and written."""
    size, width = (1 << 20) + 3, 2048
    found = torch.tensor([size - 1, 0, size - 1], device=DEVICE)
    grad = torch.full((3, width), 1.5, device=DEVICE, dtype=torch.bfloat16)
    table = embedding.embedding_backward(grad, found, 0, size)
    assert table[-1].eq(3.0).all()
    assert table[0].eq(1.5).all()
    assert not table[1:-1].any()
    assert embedding.embedding_lookup(table, found, 0, size).sum(1).tolist() == [
        6144.0,
        3072.0,
        6144.0,
    ]
