"""MoE's permutation, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from canaries import compare

from shardwise.kernels import moe, moe_triton

MODULES = (moe_triton,)
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-6},
    torch.float16: {"atol": 2e-3, "rtol": 6e-4},
}
KINDS = pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)
# (tokens, copies, experts, width): odd sizes, one copy, more copies than a power of two
SIZES = [(9, 2, 4, 40), (5, 1, 3, 1000), (7, 8, 5, 96), (3, 5, 2, 2304)]


def held(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    tokens, copies, experts, width = shape
    torch.manual_seed(tokens)
    expert = torch.randint(-1, experts + 1, (tokens, copies))
    return {
        "x": torch.randn(tokens, width).to(dtype),
        "y": torch.randn(tokens * copies, width).to(dtype),
        "position": moe._order(expert, experts)[1],
        "weights": torch.rand(tokens, copies),
        "none": None,
        "expert": expert,
        "experts": experts,
    }


OPS = {
    "order": ("expert experts", moe._order),
    "permute": ("x position none", moe._permute),
    "permute, weighted": ("x position weights", moe._permute),
    "unpermute": ("y position none", moe._unpermute),
    "unpermute, weighted": ("y position weights", moe._unpermute),
    "dots": ("x y position", moe._dots),
    "unpermute_backward": ("x y position weights", moe._both),
}


@KINDS
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_kernel_equals_its_twin(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, backwards: bool
) -> None:
    names, twin = OPS[name]
    made = held(shape, dtype)
    args = tuple(made[n] for n in names.split())
    launcher = getattr(moe_triton, name.split(",")[0])
    compare(launcher, twin, args, MODULES, backwards=backwards, **TOLERANCE[dtype])


@pytest.mark.parametrize("experts", [1, 255, 256, 3000, 40000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_order_for_each_size_of_key(experts: int, dtype: torch.dtype) -> None:
    expert = torch.randint(-2, experts + 2, (150, 3)).to(dtype)
    expert[0, 0], expert[1, 1] = experts - 1, experts
    for a, b in zip(moe_triton.order(expert, experts), moe._order(expert, experts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy sees inf * 0
def test_copies_that_are_nobody_s_read_and_spread_no_nan() -> None:
    expert = torch.tensor([[0, 5], [5, 5]])
    _, position = moe_triton.order(expert, 1)
    x = torch.tensor([[1.0], [float("inf")]]).expand(2, 4)
    nan = torch.full((4, 4), float("nan"))
    rows = moe_triton.permute(x, position, torch.ones(2, 2))
    assert rows.equal(torch.tensor([[1.0], [0.0], [0.0], [0.0]]).expand(4, 4))
    y = torch.cat([torch.full((1, 4), 3.0), nan[1:]])
    tokens = moe_triton.unpermute(y, position, None)
    assert tokens.equal(torch.tensor([[3.0], [0.0]]).expand(2, 4))
    assert moe_triton.dots(x, y, position).equal(torch.tensor([[12.0, 0.0], [0.0, 0.0]]))


def test_strided_gradients() -> None:
    position = moe._order(torch.tensor([[0, 1], [1, 0]]), 2)[1]
    grad, y, weights = torch.ones(()).expand(2, 8), torch.randn(8, 4).T, torch.rand(2, 2).T
    found = moe_triton.unpermute_backward(grad, y, position, weights)
    torch.testing.assert_close(found, moe._both(grad, y, position, weights))


def test_no_tokens_and_too_many_copies() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64)
    offsets, position = moe_triton.order(none, 3)
    assert offsets.tolist() == [0, 0, 0]
    assert moe_triton.permute(torch.zeros(0, 5), position, None).shape == (0, 5)
    assert moe_triton.unpermute(torch.zeros(0, 5), position, None).shape == (0, 5)
    many = moe._order(torch.zeros(2, 33, dtype=torch.int64), 1)[1]
    found = moe_triton.unpermute(torch.ones(66, 3), many, None)
    assert found.equal(torch.full((2, 3), 33.0))
