"""A linear layer whose products are taken in 8-bit floating point: y = x w, and both gradients.

Values become e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57344). One scale
belongs to a whole tensor: the smallest power of two by which its largest magnitude fits, so with
q = cast(x / scale) an element is q scale. A power of two loses nothing of an element by itself:
e4m3 rounds it by 2^-4 of its size at most whatever the scale is, and only what is some 2^-14 of
the largest element, or less, is rounded more. So the parts of a tensor may have scales of their
own, as they have on the devices of a mesh, and keep the values that the whole would have.

    forward     y      = x w        e4m3 e4m3        rows of x, columns of w
    backward    grad_x = g wᵀ       e5m2 e4m3        rows of g, rows of w
                grad_w = xᵀ g       e4m3 e5m2        columns of x, columns of g

Hopper multiplies 8-bit operands only along their contiguous dim, so each tensor is quantised into
two copies, itself and its transpose, in one read. The backward keeps one copy of x and one of w,
a byte an element. A scale a row would need another largest magnitude for each copy, and gains
nothing in rounding beside a power of two.

The derivative is the straight-through one: the quantiser counts as the identity, so gradients are
those of the product at the quantised x and w, from a quantised gradient. It has no derivative
itself: a second derivative through fp8 raises. Float64 is not quantised: there the op is the
product, with its derivatives of any order.

The ops take the largest magnitudes as operands, so that whatever makes x can make its largest
magnitude on the way (under `jit` the compiler sees to that); None: the op reads x for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .registry import by_twin, define

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MULTIPLE = 16  # of every dim of an 8-bit product
# Bits of a float32: the largest magnitude is held between 2^-100 and infinity. Both formats end at
# 1.75 times a power of two: adding CARRY steps up to the next power where the mantissa is beyond.
SMALLEST, INFINITE, CARRY, STEP = 27 << 23, 255 << 23, 0x1FFFFF, 1 << 23
EXPONENT = {E4M3: 8, E5M2: 15}  # of the largest value, 1.75 * 2^exponent


def fits(rows: int, inner: int, outer: int) -> bool:
    """Whether [rows, inner] times [inner, outer] and its gradients can be 8-bit products."""
    return min(rows, inner, outer) > 0 and not any(n % MULTIPLE for n in (rows, inner, outer))


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of x, a scalar on its device; not differentiated."""
    return torch.linalg.vector_norm(x.detach(), float("inf"))


def linear(x: Tensor, w: Tensor) -> Tensor:
    """The product [rows, in] x [in, out] in fp8, or the plain one where `fits` says no.

    Args:
        x: float32, bfloat16 or float16; float64 is multiplied as it is.
        w: in the dtype of x.

    Returns:
        [rows, out] in the dtype of x. With elements of independent sign its error is about 4 % of
        its size (root mean square): e4m3 rounds each factor by some 2.6 %.

    >>> import torch
    >>> from shardwise.kernels import fp8
    >>> x = torch.arange(256.0).reshape(16, 16)
    >>> y = fp8.linear(x, torch.eye(16))
    >>> y[0], ((y - x).abs() <= x / 16).all()
    (tensor([ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10., 11., 12., 13.,
            14., 15.]), tensor(True))
    """
    known = x.dtype in DTYPES and x.dtype == w.dtype
    if not known or not fits(x.shape[0], x.shape[1], w.shape[1]):
        return x @ w
    return fp8_linear(x, w, largest(x), largest(w))[0]


def powers(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale of a tensor whose largest magnitude is `amax`, and its inverse: powers of two.

    Where `amax` is infinite or NaN they are infinity and 0, and all of the product is NaN.
    """
    bits = amax.float().view(torch.int32).clamp(SMALLEST, INFINITE)
    bits = (bits + CARRY) & INFINITE
    bits = torch.where(bits < INFINITE, bits - EXPONENT[dtype] * STEP, INFINITE)
    return bits.view(torch.float32), (254 * STEP - bits).clamp(min=0).view(torch.float32)


def scaled_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    """Product of [m, k] and the transpose of [n, k], both scaled; sums are float32.

    Args:
        a: e4m3 or e5m2, contiguous.
        a_scale: float32 scalar.
        b: e4m3, or e5m2 beside an e4m3 `a`, contiguous.
        b_scale: float32 scalar.
        out_dtype: of the result.
        fast: whether the tensor cores may keep the sums of a long row to themselves, in some 14
            bits; else they are added in float32 every 128 terms.

    Without 8-bit tensor cores the operands are multiplied in float32.
    """
    if has_fp8(a.device):
        b = b.t()  # the column-major operand that cuBLAS wants
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=out_dtype, use_fast_accum=fast
        )
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    return ((a.to(wide) * a_scale) @ (b.to(wide) * b_scale).t()).to(out_dtype)


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device has 8-bit tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _quantize(x: Tensor, amax: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _copy(x), _copy(x.t()), x.new_ones(())
    dtype = E5M2 if gradient else E4M3
    end = torch.finfo(dtype).max
    scale, inverse = powers(largest(x) if amax is None else amax, dtype)
    rows = (x.float() * inverse).clamp(-end, end).to(dtype).contiguous()
    return rows, _copy(rows.t()), scale


def _through(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """The quantised x in float32, with the derivative of x."""
    return rows.float() * scale + (x - x.detach()).float()


def _linear(
    x: Tensor, w: Tensor, x_amax: Tensor | None, w_amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        one = x.new_ones(())
        return x @ w, _copy(x.t()), one, _copy(w), one.clone()
    x_rows, x_columns, x_scale = _quantize(x.detach(), x_amax, False)
    w_rows, _, w_scale = _quantize(w.detach(), w_amax, False)
    y = _through(x, x_rows, x_scale) @ _through(w, w_rows, w_scale)
    return y.to(x.dtype), x_columns, x_scale, w_rows, w_scale


def _linear_backward(
    grad: Tensor,
    grad_amax: Tensor | None,
    x_columns: Tensor,
    x_scale: Tensor,
    w_rows: Tensor,
    w_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    g, _, g_scale = _quantize(grad, grad_amax, True)
    g = g.to(wide) * g_scale
    grad_x = g @ (w_rows.to(wide) * w_scale).t()
    grad_w = (x_columns.to(wide) * x_scale) @ g
    return grad_x.to(grad.dtype), grad_w.to(grad.dtype)


def _derivative(
    grad_y: Tensor | None,
    grad_x_columns: Tensor | None,
    grad_w_rows: Tensor | None,
    x_columns: Tensor,
    x_scale: Tensor,
    w_rows: Tensor,
    w_scale: Tensor,
) -> Sequence[Tensor | None]:
    if forward_ad._current_level >= 0:
        _refuse_second(x_columns)
    if grad_y is None:  # only a second derivative comes, so all is float64
        grad_y = x_columns.new_zeros((x_columns.shape[1], w_rows.shape[1]))
    saved = (x_columns, x_scale, w_rows, w_scale)
    grad_x, grad_w = fp8_linear_backward(grad_y, largest(grad_y), *saved)
    # Only float64 has second derivatives, and its copies are x and w themselves.
    if grad_x_columns is not None:
        grad_x = grad_x + grad_x_columns.t()
    if grad_w_rows is not None:
        grad_w = grad_w + grad_w_rows
    return grad_x, grad_w, None, None


def _refuse_second(x_columns: Tensor) -> None:
    if x_columns.dtype != torch.float64:
        raise RuntimeError(
            "fp8 has no second derivative: compute it with the default precision, or in float64"
        )


def _second_derivative(**kept: Any) -> Sequence[Tensor | None]:
    _refuse_second(kept["x_columns"])
    return by_twin("fp8_linear_backward")(**kept)


def _kind(x: Tensor, gradient: bool) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else E5M2 if gradient else E4M3


def _scale_like(x: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=wide)


def _fake_quantize(x: Tensor, amax: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    kind = _kind(x, gradient)
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns), dtype=kind),
        x.new_empty((columns, rows), dtype=kind),
        _scale_like(x),
    )


def _fake_linear(
    x: Tensor, w: Tensor, x_amax: Tensor | None, w_amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, x_columns, x_scale = _fake_quantize(x, x_amax, False)
    w_rows, _, w_scale = _fake_quantize(w, w_amax, False)
    return x.new_empty((x.shape[0], w.shape[1])), x_columns, x_scale, w_rows, w_scale


def _fake_linear_backward(
    grad: Tensor,
    grad_amax: Tensor | None,
    x_columns: Tensor,
    x_scale: Tensor,
    w_rows: Tensor,
    w_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x_columns.shape[::-1]), grad.new_empty(w_rows.shape)


fp8_quantize = define(
    "fp8_quantize(Tensor x, Tensor? amax, bool gradient)"
    " -> (Tensor rows, Tensor columns, Tensor scale)",
    twin=_quantize,
    cuda="fp8_triton:quantize",
    fake=_fake_quantize,
)

fp8_linear_backward = define(
    "fp8_linear_backward(Tensor grad, Tensor? grad_amax, Tensor x_columns, Tensor x_scale,"
    " Tensor w_rows, Tensor w_scale) -> (Tensor grad_x, Tensor grad_w)",
    twin=_linear_backward,
    cuda="fp8_triton:linear_backward",
    backward=_second_derivative,
    fake=_fake_linear_backward,
)

fp8_linear = define(
    "fp8_linear(Tensor x, Tensor w, Tensor? x_amax, Tensor? w_amax) -> (Tensor y, Tensor x_columns,"
    " Tensor x_scale, Tensor w_rows, Tensor w_scale)",
    twin=_linear,
    cuda="fp8_triton:linear",
    backward=_derivative,
    fake=_fake_linear,
)


def _linear_flops(x: Tensor, w: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x.shape[0] * x.shape[1] * w.shape[1]


def _backward_flops(grad: Tensor, _: Any, x_columns: Tensor, *__: Any, out_val: Any = None) -> int:
    return 4 * grad.shape[0] * grad.shape[1] * x_columns.shape[0]


# As in torch's registry of formulas, which is not filled here: importing it loads Triton.
FLOPS = {
    fp8_linear.overloadpacket: _linear_flops,
    fp8_linear_backward.overloadpacket: _backward_flops,
}
