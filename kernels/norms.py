"""RMSNorm and LayerNorm over the last dim, alone or with the residual addition fused in.

With x of `rows` rows and N elements a row, m = mean(x) (0 for RMSNorm), r = 1/sqrt(mean((x-m)^2)
+ eps) and n = (x-m) r, the result is y = n w + b. With h = grad_y w the gradients are

    grad_x = r (h - n mean(h n) - mean(h)) + extra,    grad_w = sum grad_y n,    grad_b = sum grad_y

where RMSNorm leaves mean(h) out, and `extra` is what reaches the sum x + residual by other ways.
All sums are formed in float32 (float64 for float64), and each result is rounded once.
The row statistics are results as any other: what a caller does with them is differentiated too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define, rows

# Elements of a row that a kernel holds in registers; torch computes longer ones.
LARGEST_FORWARD, LARGEST_BACKWARD = 32768, 8192


def _rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    v = x.to(wide(x.dtype))
    rstd = torch.rsqrt((v * v).mean(-1) + eps)
    y = v * rstd.unsqueeze(-1) * weight
    return y.to(x.dtype).contiguous(), rstd


def _rms_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor]:
    w = wide(x.dtype)
    r, g = rstd.unsqueeze(-1), grad.to(w)
    n, h = x.to(w) * r, g * weight
    grad_x = r * (h - n * (h * n).mean(-1, keepdim=True))
    if extra is not None:
        grad_x = grad_x + extra
    grad_weight = (g * n).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _add_rms(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, rstd = _rms(total, weight, eps)
    return y, total, rstd


def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    v = x.to(wide(x.dtype))
    mean = v.mean(-1)
    d = v - mean.unsqueeze(-1)
    rstd = torch.rsqrt((d * d).mean(-1) + eps)
    y = d * rstd.unsqueeze(-1) * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype).contiguous(), mean, rstd


def _layer_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    w = wide(x.dtype)
    r, g = rstd.unsqueeze(-1), grad.to(w)
    n, h = (x.to(w) - mean.unsqueeze(-1)) * r, g * weight
    grad_x = r * (h - n * (h * n).mean(-1, keepdim=True) - h.mean(-1, keepdim=True))
    if extra is not None:
        grad_x = grad_x + extra
    grad_weight = (g * n).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    grad_bias = g.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_weight, grad_bias


def _add_layer(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, mean, rstd = _layer(total, weight, bias, eps)
    return y, total, mean, rstd


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def _by_rstd(grad_rstd: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """Gradient of x through rstd: d rstd / d x = -rstd^3 (x - mean) / N."""
    centred = x if mean is None else x - mean.unsqueeze(-1)
    return centred * (grad_rstd * rstd.pow(3) / -x.shape[-1]).unsqueeze(-1)


def _rms_derivative(
    grad_y: Tensor | None,
    grad_rstd: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_x, grad_weight = rms_norm_backward(grad_y, x, weight, rstd, extra)
    if grad_rstd is not None:
        grad_x = grad_x + _by_rstd(grad_rstd, x, None, rstd)
    return grad_x, grad_weight


def _layer_derivative(
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grads = layer_norm_backward(grad_y, x, weight, mean, rstd, extra)
    grad_x, grad_weight, grad_bias = grads
    if grad_mean is not None:
        grad_x = grad_x + grad_mean.unsqueeze(-1) / x.shape[-1]
    if grad_rstd is not None:
        grad_x = grad_x + _by_rstd(grad_rstd, x, mean, rstd)
    return grad_x, grad_weight, grad_bias


def _rms_norm_backward(
    grad_y: Tensor | None, grad_rstd: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return _rms_derivative(grad_y, grad_rstd, x, weight, rstd)


def _add_rms_norm_backward(
    grad_y: Tensor | None,
    grad_total: Tensor | None,
    grad_rstd: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = _rms_derivative(grad_y, grad_rstd, total, weight, rstd, grad_total)
    return grad_x, grad_x, grad_weight


def _layer_norm_backward(
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    grads = _layer_derivative(grad_y, grad_mean, grad_rstd, x, weight, mean, rstd)
    return (*grads[:2], None if bias is None else grads[2])


def _add_layer_norm_backward(
    grad_y: Tensor | None,
    grad_total: Tensor | None,
    grad_mean: Tensor | None,
    grad_rstd: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _layer_derivative(
        grad_y, grad_mean, grad_rstd, total, weight, mean, rstd, grad_total
    )
    return grad_x, grad_x, grad_weight, None if bias is None else grad_bias


rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? extra)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    twin=_rms_backward,
    cuda="norms_triton:rms_norm_backward",
    backward=by_twin("rms_norm_backward"),
    fake=lambda grad, x, weight, rstd, extra: (_like(x), _like(weight)),
)

rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    twin=_rms,
    cuda="norms_triton:rms_norm",
    backward=_rms_norm_backward,
    fake=lambda x, weight, eps: (_like(x), _statistic(x)),
    vmap=rows(lambda: rms_norm, "x"),
)

add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    twin=_add_rms,
    cuda="norms_triton:add_rms_norm",
    backward=_add_rms_norm_backward,
    fake=lambda x, residual, weight, eps: (_like(x), _like(x), _statistic(x)),
    vmap=rows(lambda: add_rms_norm, "x", "residual"),
)

layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd,"
    " Tensor? extra) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    twin=_layer_backward,
    cuda="norms_triton:layer_norm_backward",
    backward=by_twin("layer_norm_backward"),
    fake=lambda grad, x, weight, mean, rstd, extra: (_like(x), _like(weight), _like(weight)),
)

layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    twin=_layer,
    cuda="norms_triton:layer_norm",
    backward=_layer_norm_backward,
    fake=lambda x, weight, bias, eps: (_like(x), _statistic(x), _statistic(x)),
    vmap=rows(lambda: layer_norm, "x"),
)

add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    twin=_add_layer,
    cuda="norms_triton:add_layer_norm",
    backward=_add_layer_norm_backward,
    fake=lambda x, residual, weight, bias, eps: (_like(x), _like(x), _statistic(x), _statistic(x)),
    vmap=rows(lambda: add_layer_norm, "x", "residual"),
)
