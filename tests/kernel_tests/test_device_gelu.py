"""The gradient of gelu on a GPU: bf16 within half a unit in the last place of float64."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from device_check import BITS, DEVICE, check

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("shape", [(301, 768), (1000, 1000), (4096, 3072), (5, 20000)], ids=str)
def test_gradient(shape: tuple[int, int], tanh: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    grad, x = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    # the sum is of what was rounded: apart from it by the square root of its rows' roundings
    slack = 2e-5 + shape[0] ** 0.5 * 2.0 ** (1 - BITS[dtype])
    check("gelu_backward_sum", (grad, x * 3, tanh), (2e-5, slack))


def test_two_runs_are_equal_to_the_bit() -> None:
    grad, x = torch.randn(2, 5000, 3072, device=DEVICE).bfloat16()
    op = torch.ops.shardwise.gelu_backward_sum.default
    assert all(map(torch.equal, op(grad, x, True), op(grad, x, True)))
