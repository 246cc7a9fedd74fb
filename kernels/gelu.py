"""The gradient of gelu together with its sum over rows: a bias's gradient, without another reading.

`gelu_backward_sum(grad, x, tanh)` gives grad_x = grad gelu'(x) and the sum of grad_x over all dims
but the last, formed in float32 of what is rounded to grad_x's dtype. gelu is x Phi(x), or with
`tanh` its usual approximation x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2.

Shapes: grad and x [..., width]; the sum [width], in the dtype of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define

ROOT, KAPPA = math.sqrt(2 / math.pi), 0.044715  # of the approximation


def _backward_sum(grad: Tensor, x: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    v = x.to(wide(x.dtype))
    if tanh:
        t = torch.tanh(ROOT * (v + KAPPA * v**3))
        slope = 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * ROOT * (1 + 3 * KAPPA * v * v)
    else:
        density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
        slope = 0.5 * (1 + torch.erf(v / math.sqrt(2))) + v * density
    grad_x = (grad.to(v.dtype) * slope).to(x.dtype).contiguous()
    return grad_x, grad_x.to(v.dtype).reshape(-1, x.shape[-1]).sum(0).to(x.dtype)


gelu_backward_sum = define(
    "gelu_backward_sum(Tensor grad, Tensor x, bool tanh) -> (Tensor grad_x, Tensor total)",
    twin=_backward_sum,
    cuda="gelu_triton:backward_sum",
    backward=by_twin("gelu_backward_sum"),
    fake=lambda grad, x, tanh: (x.new_empty(x.shape), x.new_empty(x.shape[-1:])),
)
