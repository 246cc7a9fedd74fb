"""The cross-entropy kernels, interpreted (collected by test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
from canaries import compare, guarded

from shardwise.kernels import cross_entropy as twins
from shardwise.kernels import cross_entropy_triton as kernels

SIZES = [(5, 31), (3, 1000), (2, 8192 + 77), (4, 2048)]
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}
PER_ROW = {"atol": 2e-5, "rtol": 2e-5}  # kept in float32 whatever the logits are
MODULES = (kernels,)
each_size = pytest.mark.parametrize("shape", SIZES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_order = pytest.mark.parametrize("backwards", [False, True], ids=["", "reversed"])


def last(size: int) -> int:
    """The number of the first logit that is padding: none in the smallest size."""
    return 100 + size - (0 if size == 31 else 9)


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * size)
    labels = torch.randint(100, 100 + size - 9, (rows,))
    labels[0], labels[1] = -100, 100 + size  # ignored; held by the next block
    return (torch.randn(rows, size) * 4).to(dtype), labels


@each_order
@each_dtype
@each_size
def test_parts(shape: tuple[int, int], dtype: torch.dtype, backwards: bool) -> None:
    args = (*inputs(*shape, dtype), 100, last(shape[1]))
    compare(kernels.parts, twins._parts, args, MODULES, backwards=backwards, **PER_ROW)


@each_order
@each_dtype
@each_size
def test_gradient_of_parts(shape: tuple[int, int], dtype: torch.dtype, backwards: bool) -> None:
    logits, labels = inputs(*shape, dtype)
    lse, _ = twins._parts(logits.float(), labels, 100, last(shape[1]))
    args = (torch.randn(shape[0]), torch.randn(shape[0]), logits, labels, lse, 100, last(shape[1]))
    tolerance = TOLERANCE[dtype]
    twin = twins._parts_backward
    compare(kernels.parts_backward, twin, args, MODULES, backwards=backwards, **tolerance)


@each_dtype
@each_size
def test_loss_and_gradient_in_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = inputs(*shape, dtype)
    scale, loss = torch.rand(shape[0]), torch.full((shape[0],), float("nan"))
    found = guarded(logits)
    kernels.launch_loss_and_grad(found, labels - 100, scale, loss, last(shape[1]) - 100)
    exact = logits.double()
    lse, target = twins._parts(exact, labels, 100, last(shape[1]))
    grads = scale.double(), -scale.double()
    wanted = twins._parts_backward(*grads, exact, labels, lse, 100, last(shape[1]))
    torch.testing.assert_close(loss.double(), lse - target, **PER_ROW)
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    around = found.untyped_storage().nbytes() // found.element_size() - found.numel()
    whole = torch.empty(0, dtype=dtype).set_(found.untyped_storage(), 0, (around + found.numel(),))
    assert int(whole.isnan().sum()) == around, "a write outside the logits"


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the log, in numpy
def test_rows_of_minus_infinity_and_with_nan() -> None:
    logits = torch.randn(4, 9000)
    logits[0], logits[1, 8500], logits[2, :8192] = float("-inf"), float("nan"), float("-inf")
    labels = torch.zeros(4, dtype=torch.long)
    lse, _ = kernels.parts(logits, labels, 0, 9000)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1), equal_nan=True)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_block_of_padding_alone() -> None:
    logits, labels, one = torch.randn(3, 40), torch.zeros(3, dtype=torch.long), torch.ones(3)
    lse, target = kernels.parts(logits, labels, 100, 60)
    assert (lse == float("-inf")).all()
    assert not target.any()
    for parts_backward in (kernels.parts_backward, twins._parts_backward):
        assert not parts_backward(one, one, logits, labels, lse, 100, 60).any()


@pytest.mark.parametrize("chunk", [3, 100])
def test_linear_forms(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(7, 33), torch.randn(1000, 33), torch.arange(7) * 150
    scale = torch.rand(7)
    close = {"atol": 2e-4, "rtol": 2e-4}
    whole = (hidden, weight, labels, scale, 950, chunk)
    compare(kernels.linear, twins._linear, whole, MODULES, **close)
    parts = (hidden, weight, labels, 100, 1050, chunk)
    compare(kernels.linear_parts, twins._linear_parts, parts, (), **close)
    lse, _ = twins._linear_parts(*parts)
    args = (scale, -scale, hidden, weight, labels, lse, 100, 1050, chunk)
    compare(kernels.linear_parts_backward, twins._linear_parts_backward, args, MODULES, **close)
