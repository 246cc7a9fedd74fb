"""Kernels of several families in one step on a GPU, under every transform.

Needs torch, Triton and pytest alone; on a machine that has no more than these:

    python -m pytest --confcutdir=tests/kernel_tests tests/kernel_tests/test_device*.py
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from device_check import DEVICE, norm_inputs
from torch import Tensor

from shardwise.kernels import cross_entropy, norms

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")


def step(x: Tensor, residual: Tensor, weight: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """A loss through all kinds of ops, for the transforms."""
    y, total, _ = norms.add_rms_norm(x, residual, weight, 1e-5)
    z, _, _ = norms.layer_norm(total, weight, None, 1e-5)
    lse, target = cross_entropy.cross_entropy_parts((y + z) @ head, labels, 0, head.shape[1])
    scale = torch.full_like(lse, 1 / len(lse))
    linear = cross_entropy.linear_cross_entropy(
        y, head.T.contiguous(), labels, scale, head.shape[1], 8
    )
    return (lse - target).mean() + linear[0]


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    held = norm_inputs(24, 256, dtype)
    head = torch.randn(256, 512, device=DEVICE).mul(0.05).to(dtype)
    labels = torch.randint(0, 512, (24,), device=DEVICE)
    return held["x"], held["extra"], held["weight"], head, labels


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_step_equals_eager(backend: str) -> None:
    *reals, labels = operands(torch.float32)
    leaves = [x.clone().requires_grad_() for x in reals]
    wanted = torch.autograd.grad(step(*leaves, labels), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, labels), leaves), wanted)
    compiled_grad = torch.compile(torch.func.grad(step, (0, 1, 2, 3)), backend=backend)
    torch.testing.assert_close(compiled_grad(*reals, labels), wanted)


def test_gradient_equals_that_of_the_twins() -> None:
    *reals, labels = operands(torch.float32)
    wide = [x.double() for x in reals]  # float64 runs the twins
    found = torch.func.grad(step, (0, 1, 2, 3))(*reals, labels)
    wanted = torch.func.grad(step, (0, 1, 2, 3))(*wide, labels)
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-5


def test_vmap_of_grad_equals_a_loop() -> None:
    *reals, labels = operands(torch.float32)
    grad = torch.func.grad(step, (0, 2))
    xs = torch.stack([reals[0], reals[0] + 1])
    found = torch.func.vmap(grad, (0, None, None, None, None))(xs, *reals[1:], labels)
    each = [grad(x, *reals[1:], labels) for x in xs]
    torch.testing.assert_close(found, tuple(torch.stack(g) for g in zip(*each, strict=True)))
