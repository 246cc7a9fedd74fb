"""Eight-bit codes: one byte per value and one scale per block.

A block is a run of `size` values along the last dim of the GLOBAL tensor, so codes and scales do
not depend on the mesh. Codes have the tensor's shape and layout; scales [..., blocks].

Source: Dettmers et al. 2022 (arXiv 2110.02861), section 2: dynamic tree quantization, blockwise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def codebook(signed: bool) -> Tensor:
    """256 values in [-1, 1] or [0, 1], denser near 0: seven decades with fractions of their own.

    >>> book = codebook(True)
    >>> len(book), float(book[0]) < 0, float(book[-1]), 0.0 in book
    (256, True, 1.0, True)
    """
    values: list[float] = []
    for decade in range(7):
        steps = 2 ** (decade + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += means + ([-m for m in means] if signed else [])
    values += [0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode(x: Tensor, size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 like x, and scales [..., blocks]: the largest magnitude of each block.

    Args:
        x: [..., n]; n may end inside a block.
        size: of a block.
        signed: whether values may be negative. If not, no positive value gets the code of 0: they
            are mean squares, whose root divides.
    """
    blocks = _blocks(x.to(torch.float32), size)
    scales = blocks.abs().amax(-1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    book = codebook(signed).to(x.device)
    middle = (book[:-1] + book[1:]) / 2
    codes = torch.bucketize(unit, middle)
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).to(codes.dtype))
    codes = codes.to(torch.uint8)
    return codes.flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def decode(codes: Tensor, scales: Tensor, size: int, signed: bool) -> Tensor:
    """Float32 values of codes and scales.

    >>> x = torch.tensor([0.0, 0.5, -2.0])
    >>> bool((decode(*encode(x, 2, True), 2, True) - x).abs().max() < 0.02)
    True
    """
    book = codebook(signed).to(codes.device)
    values = book[codes.to(torch.int64)]
    return (_blocks(values, size) * scales.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]


def _blocks(x: Tensor, size: int) -> Tensor:
    """[..., blocks, size], zeros after the end."""
    n = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -n % size))
    return padded.unflatten(-1, (-1, size))
