"""Linear maps with int8 and int4 weights, for the few rows of x that decoding has.

A weight is quantised once, to the nearest code, from [in, out] as the library's layers keep it:

    int8    w[k, n] = scale[n] q[n, k]                            symmetric, one scale per output
    int4    w[k, n] = scales[n, g] (code[n, k] - zeros[n, g])     g = k // group, codes 0 to 15

and y = x w. Codes are stored as [out, in], an output's codes one after the other, since that is
what a kernel for one row of x streams: 16 bytes a load, dequantised in registers, summed in
float32, never written back. `packed` is [out, in / 8] int32: word i of a group (of group / 8 words)
has in its bits 4j to 4j + 3 the code of the group's column j (group / 8) + i. So the j-th codes of
neighbouring words are neighbouring columns, and x is read as it lies.

Beyond LARGEST_ROWS rows of x the weight is dequantised, rounded to the dtype of x, and torch's
matmul is used, as on a CPU. Derivatives are those of that form, with respect to x, the scales and
the zeros; in a traced step those that nobody wants are not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define, rows

CODES = 8  # int4 codes in a word


def _outputs(w: Tensor) -> Tensor:
    if w.dim() != 2:
        raise ValueError(f"a weight is [in, out]; got {tuple(w.shape)}")
    return w.detach().to(wide(w.dtype)).t()


def quantize_int8(w: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 from -127 to 127, and a scale [out] of each output.

    Args:
        w: the weight [in, out].
        dtype: of the scales; codes are those nearest to the rounded scale's.

    Raises:
        ValueError: the weight has not two dims.

    >>> import torch
    >>> from shardwise.kernels.gemv import quantize_int8
    >>> quantize_int8(torch.tensor([[127.0, 0.5], [-3.2, -1.0]]))
    (tensor([[ 127,   -3],
            [  64, -127]], dtype=torch.int8), tensor([1.0000, 0.0079]))
    """
    v = _outputs(w)
    scale = v.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1).to(dtype)
    codes = (v / scale.to(v.dtype)[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8).contiguous(), scale.contiguous()


def quantize_int4(
    w: Tensor, group: int = 128, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [out, in / 8] int32, and scales and zeros [out, in / group].

    The zero is the real number (rounded to `dtype`) that makes the least weight of a group code 0;
    the greatest is code 15.

    Args:
        w: the weight [in, out].
        group: inputs that share a scale, a multiple of 8; it divides `in`.
        dtype: of scales and zeros; codes are those nearest to the rounded ones'.

    Raises:
        ValueError: the weight has not two dims, or the group does not fit.

    >>> import torch
    >>> from shardwise.kernels.gemv import dequantize_int4, quantize_int4
    >>> w = torch.linspace(-1, 2, 16).reshape(16, 1)
    >>> packed, scales, zeros = quantize_int4(w, group=16)
    >>> packed.shape, scales, zeros
    (torch.Size([1, 2]), tensor([[0.2000]]), tensor([[5.]]))
    >>> torch.allclose(dequantize_int4(packed, scales, zeros, 16), w, atol=1e-6)
    True
    """
    v = _outputs(w)
    out, size = v.shape
    if group <= 0 or group % CODES or size % group:
        raise ValueError(
            f"groups of {group} of {size} inputs: a group is a multiple of {CODES} and divides them"
        )
    v = v.reshape(out, size // group, group)
    low, high = v.aminmax(dim=2)
    scales = (high - low) / 15
    scales = torch.where(scales > 0, scales, torch.where(low != 0, low.abs(), 1)).to(dtype)
    held = scales.to(v.dtype)
    zeros = (-low / held).to(dtype)
    codes = (v / held[..., None] + zeros.to(v.dtype)[..., None]).round().clamp(0, 15)
    return pack_int4(codes.reshape(out, size), group), scales.contiguous(), zeros.contiguous()


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """Codes [out, in] from 0 to 15 as words [out, in / 8] int32, in the order told above."""
    out, size = codes.shape
    parts = codes.to(torch.int64).reshape(out, size // group, CODES, group // CODES)
    place = 4 * torch.arange(CODES, device=codes.device)[:, None]
    words = (parts << place).sum(2).reshape(out, size // CODES)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """The codes [out, in] int32 of words [out, in / 8]: `pack_int4` backwards."""
    out, words = packed.shape
    parts = packed.reshape(out, words * CODES // group, 1, group // CODES)
    place = 4 * torch.arange(CODES, device=packed.device, dtype=torch.int32)[:, None]
    return ((parts >> place) & 15).reshape(out, words * CODES)


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """The weight [in, out] of int8 codes, in float32 (float64 for scales of float64)."""
    return (q.to(wide(scale.dtype)) * scale.to(wide(scale.dtype))[:, None]).t()


def dequantize_int4(packed: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """The weight [in, out] of int4 codes, in float32 (float64 for scales of float64)."""
    form = wide(scales.dtype)
    codes = unpack_int4(packed, group).to(form).unflatten(1, (-1, group))
    held = (codes - zeros.to(form)[..., None]) * scales.to(form)[..., None]
    return held.flatten(1).t()


def _int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return (x @ dequantize_int8(q, scale).to(x.dtype)).contiguous()


def _int4(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    return (x @ dequantize_int4(packed, scales, zeros, group).to(x.dtype)).contiguous()


int8_linear_op = define(
    "int8_linear(Tensor x, Tensor q, Tensor scale) -> (Tensor y)",
    twin=_int8,
    cuda="gemv_triton:int8_linear",
    backward=by_twin("int8_linear"),
    fake=lambda x, q, scale: x.new_empty(*x.shape[:-1], q.shape[0]),
    vmap=rows(lambda: int8_linear_op, "x"),
)

int4_linear_op = define(
    "int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros, int group) -> (Tensor y)",
    twin=_int4,
    cuda="gemv_triton:int4_linear",
    backward=by_twin("int4_linear"),
    fake=lambda x, packed, scales, zeros, group: x.new_empty(*x.shape[:-1], packed.shape[0]),
    vmap=rows(lambda: int4_linear_op, "x"),
)


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x times a weight of int8 codes.

    Cost for few rows of x on a GPU: in * out bytes read, half of those of a bf16 weight.

    Args:
        x: [..., in].
        q: codes [out, in] of `quantize_int8`.
        scale: their scales [out].

    Returns:
        [..., out] in the dtype of x; sums in float32, rounded once.

    Raises:
        ValueError: the shapes do not fit together.

    >>> import torch
    >>> from shardwise.kernels.gemv import int8_linear, quantize_int8
    >>> w = torch.tensor([[127.0, 1.0], [-3.0, 0.0]])
    >>> int8_linear(torch.tensor([[1.0, 2.0]]), *quantize_int8(w))
    tensor([[121.,   1.]])
    """
    if q.dim() != 2 or x.shape[-1:] != q.shape[1:] or scale.shape != q.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)}, codes {tuple(q.shape)} and scale {tuple(scale.shape)} do not fit:"
            " they are [..., in], [out, in] and [out]"
        )
    return int8_linear_op(x, q, scale)


def int4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 128
) -> Tensor:
    """x times a weight of int4 codes with a scale and a zero for each group of inputs.

    Cost for few rows of x on a GPU: in * out / 2 bytes of codes read, and 2 / group numbers a code.

    Args:
        x: [..., in].
        packed: words [out, in / 8] of `quantize_int4`.
        scales: [out, in / group].
        zeros: [out, in / group].
        group: that of `quantize_int4`.

    Returns:
        [..., out] in the dtype of x; sums in float32, rounded once.

    Raises:
        ValueError: the shapes do not fit together.

    >>> import torch
    >>> from shardwise.kernels.gemv import int4_linear, quantize_int4
    >>> w = torch.arange(16.0).reshape(16, 1)
    >>> int4_linear(torch.ones(1, 16), *quantize_int4(w, group=16), group=16)
    tensor([[120.]])
    """
    size = packed.shape[-1] * CODES
    table = (packed.shape[0], size // group) if group > 0 else None
    if packed.dim() != 2 or x.shape[-1] != size or not scales.shape == zeros.shape == table:
        raise ValueError(
            f"x {tuple(x.shape)}, words {tuple(packed.shape)}, scales {tuple(scales.shape)} and"
            f" zeros {tuple(zeros.shape)} do not fit for groups of {group}: they are [..., in],"
            f" [out, in / {CODES}] and twice [out, in / group]"
        )
    return int4_linear_op(x, packed, scales, zeros, group)
