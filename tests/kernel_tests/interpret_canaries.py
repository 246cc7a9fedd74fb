"""The interpreter tests notice what they are there for (collected by test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from canaries import compare
from torch import Tensor

from shardwise.kernels import launch

CLOSE = {"atol": 0.0, "rtol": 0.0}


@triton.jit
def copy_some(x, y, first, last, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < last, other=0.0), mask=(at >= first) & (at < last))


@triton.jit
def add_previous(x, y):
    at = tl.program_id(0)
    before = tl.load(y + at - 1, mask=at > 0, other=0.0)
    tl.store(y + at, tl.load(x + at) + before)


def copy(x: Tensor, first: int, last: int) -> Tensor:
    y = launch.empty(x.shape, x)
    copy_some[(1,)](x, y, first, last, BLOCK=16)
    return y


def running_sum(x: Tensor) -> Tensor:
    y = launch.empty(x.shape, x)
    add_previous[(len(x),)](x, y)
    return y


def test_a_right_kernel_passes() -> None:
    compare(lambda x: copy(x, 0, 9), torch.clone, (torch.randn(9),), (), **CLOSE)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [(0, 10, "outside a result"), (1, 9, "not written"), (0, 8, "not written")],
)
def test_a_wrong_mask_is_noticed(first: int, last: int, text: str) -> None:
    x = torch.randn(9)
    with pytest.raises(AssertionError, match=text):
        compare(lambda x: copy(x, first, last), torch.clone, (x,), (), **CLOSE)


def test_a_dependence_on_the_order_of_programs_is_noticed() -> None:
    x = torch.randn(5)
    close = {"atol": 1e-6, "rtol": 1e-6}
    compare(running_sum, lambda x: x.cumsum(0), (x,), (), **close)
    with pytest.raises(AssertionError):
        compare(running_sum, lambda x: x.cumsum(0), (x,), (), backwards=True, **close)


def test_a_changed_input_is_noticed() -> None:
    def overwrite(x: Tensor) -> Tensor:
        copy_some[(1,)](torch.zeros(9), x, 0, 9, BLOCK=16)
        return torch.zeros(9)

    with pytest.raises(AssertionError, match="an input was changed"):
        compare(overwrite, torch.zeros_like, (torch.randn(9),), (), **CLOSE)
