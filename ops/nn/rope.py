"""`rope`: rotary positions, halves of each head rotated by angles that grow with the position."""

from __future__ import annotations

from typing import Any

import torch

from ...layouts.sharded import ShardedTensor


def rope(x: ShardedTensor, positions: Any, *, theta: float = 1e4) -> ShardedTensor:
    """Rotary positions: halves of each head rotated by angles position * theta^(-2i/head_dim).

    Args:
        x: [batch, seq, heads, head_dim].
        positions: integers [seq] or [batch, seq], sharded as x's own dims or plain.
        theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.mesh.shard_device)
    inverse = theta ** (-steps / half)
    angles = positions[..., None].to(torch.float32) * inverse
    angles = angles[..., None, :]
    cos, sin = torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype)
    first, second = torch.split(x, half, -1)  # pyright: ignore
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)  # pyright: ignore
