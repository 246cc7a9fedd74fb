"""The gradient of gelu, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

import pytest
import torch
from canaries import compare

from shardwise.kernels import gelu, gelu_triton

SIZES = [(7, 64), (5, 1000), (131, 33), (2, 3, 4, 96)]
TOLERANCE = {
    torch.float32: {"atol": 3e-5, "rtol": 3e-5},
    torch.float16: {"atol": 8e-3, "rtol": 2e-3},
}
MODULES = (gelu_triton,)


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_kernel_equals_its_twin(
    shape: tuple[int, ...], dtype: torch.dtype, backwards: bool, tanh: bool
) -> None:
    torch.manual_seed(sum(shape))
    args = (torch.randn(shape).to(dtype), (torch.randn(shape) * 3).to(dtype), tanh)
    twin = gelu._backward_sum
    launcher = gelu_triton.backward_sum
    compare(launcher, twin, args, MODULES, backwards=backwards, **TOLERANCE[dtype])


@pytest.mark.parametrize("tanh", [False, True])
def test_far_out_and_without_rows(tanh: bool) -> None:
    x = torch.tensor([[-1e4, -50.0, 50.0, 1e4] * 8])
    found, total = gelu_triton.backward_sum(torch.ones_like(x), x, tanh)
    assert torch.equal(found, (x > 0).float())
    assert torch.equal(total, found[0])
    none = torch.zeros(0, 32)
    assert not gelu_triton.backward_sum(none, none, tanh)[1].any()


def test_twin_is_torch_s_gradient() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for tanh, name in ((False, "none"), (True, "tanh")):
        y = torch.nn.functional.gelu(x, approximate=name)
        (wanted,) = torch.autograd.grad(y.sum(), x)
        found, total = gelu._backward_sum(torch.ones_like(x), x, tanh)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(total, wanted.sum(0))
