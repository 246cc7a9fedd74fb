"""`rope`: rotary positions. Pairs of each head's entries turn by angles that grow with position.

Frequencies, angles, cos and sin are float32 whatever `x` is, as in Hugging Face's models, and
depend on the position alone, so no layout changes them.

    scaling (Hugging Face's rope_type)    frequencies f_i = theta^(-2i/dims)
    None, "default"                       f
    "linear"                              f / factor
    "dynamic"                             f of a larger theta, once the sequence is too long
    "llama3"                              long waves slowed, short ones kept, a ramp between
    "yarn"                                the same ramp over i; cos and sin are scaled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...layouts.sharded import ShardedTensor
from ...meshlib.errors import nearest
from ..given import check_sharded

Scaling = Mapping[str, Any]


def rope(
    x: ShardedTensor,
    positions: Any,
    *,
    theta: float = 1e4,
    scaling: Scaling | None = None,
    interleaved: bool = False,
    dims: int | None = None,
    length: int | None = None,
) -> ShardedTensor:
    """Rotary positions: pairs of entries turned by angles position * theta^(-2i/dims).

    Args:
        x: [batch, seq, heads, head_dim]; head_dim uncut. A sum that is owed stays owed.
        positions: integers [seq] or [batch, seq], plain or cut as x's own dims.
        theta: base of the wavelengths.
        scaling: Hugging Face's `rope_scaling` (or `rope_parameters`) of types "default", "linear",
            "dynamic", "llama3", "yarn". "dynamic" reads the length that the model was trained on
            from its "original_max_position_embeddings" or "max_position_embeddings".
        interleaved: pairs are neighbours (2i, 2i + 1), not halves (i, i + dims/2).
        dims: how many leading entries of a head turn; None is all.
        length: longest position + 1, for "dynamic"; None is x's seq.

    Cost: nothing moves; the gradient is the inverse turn.

    Raises:
        ValueError: odd `dims`, an unknown type, or a missing entry of `scaling`.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(1, 3, 2, 4), mesh, "batch seq heads/tensor head_dim")
    >>> y = sw.nn.rope(x, torch.arange(3))
    >>> y
    f32[1 3 2/tensor 4] local[1 3 1 4] on mesh(tensor=2)
    >>> y.full_tensor()[0, :, 0, 0]
    tensor([ 1.0000, -0.3012, -1.3254])
    """
    check_sharded("rope", x=x)
    if x.ndim != 4:
        raise ValueError(f"rope takes [batch seq heads head_dim], got {list(x.shape)}")
    _check_positions(positions, x)
    turned = x.shape[-1] if dims is None else dims
    if turned % 2 or not 0 < turned <= x.shape[-1]:
        raise ValueError(f"rope: {turned} of {x.shape[-1]} entries cannot turn in pairs")
    frequency, amplitude = frequencies(
        turned, theta, scaling, x.shape[1] if length is None else length, x.mesh.shard_device
    )
    if isinstance(positions, Tensor):
        positions = positions.to(frequency.device)
    angles = (positions[..., None].to(torch.float32) * frequency)[..., None, :]
    cos, sin = ((f(angles) * amplitude).to(x.dtype) for f in (torch.cos, torch.sin))
    t: Any = torch
    head, rest = t.split(x, [turned, x.shape[-1] - turned], -1) if dims else (x, None)
    if interleaved:
        first, second = head.unflatten(-1, (turned // 2, 2)).unbind(-1)
    else:
        first, second = t.split(head, turned // 2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    done = t.stack(pair, -1).flatten(-2) if interleaved else t.cat(pair, -1)
    return done if rest is None or not rest.shape[-1] else t.cat((done, rest), -1)


def _check_positions(positions: Any, x: ShardedTensor) -> None:
    if not isinstance(positions, Tensor | ShardedTensor):
        raise TypeError(f"rope: positions must be a tensor, got {type(positions).__name__}")
    batch, seq = x.shape[:2]
    ahead = positions.shape[:-1] in ((), (1,), (batch,))
    if not ahead or positions.ndim == 0 or positions.shape[-1] not in (1, seq):
        raise ValueError(
            f"rope: positions {list(positions.shape)} must be [{seq}] or [{batch}, {seq}], "
            f"as x [batch seq heads head_dim] {list(x.shape)}"
        )


def frequencies(
    dims: int,
    theta: float = 1e4,
    scaling: Scaling | None = None,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Angles per position [dims / 2], float32, and the factor of cos and sin.

    >>> frequencies(4, 100.0)
    (tensor([1.0000, 0.1000]), 1.0)
    """
    options = scaling or {}
    name = options.get("rope_type", options.get("type", "default"))
    if name not in _TYPES:
        raise ValueError(f"rope: unknown type {name!r} of scaling{nearest(name, list(_TYPES))}")
    try:
        made, amplitude = _TYPES[name](_Waves(dims, theta, device), options, length)
    except KeyError as missing:
        raise ValueError(f"rope: scaling of type {name!r} lacks {missing}") from None
    return made, amplitude


class _Waves:
    """The unscaled frequencies, computed exactly as Hugging Face does."""

    def __init__(self, dims: int, theta: float, device: Any) -> None:
        self.dims, self.theta, self.device = dims, theta, device

    def powers(self, theta: float | None = None) -> Tensor:
        """theta^(2i/dims): float32."""
        steps = torch.arange(0, self.dims, 2, dtype=torch.float32, device=self.device)
        return (theta or self.theta) ** (steps / self.dims)

    def plain(self) -> Tensor:
        return 1.0 / self.powers()


def _default(waves: _Waves, options: Scaling, length: int | None) -> tuple[Tensor, float]:
    return waves.plain(), 1.0


def _linear(waves: _Waves, options: Scaling, length: int | None) -> tuple[Tensor, float]:
    return waves.plain() / options["factor"], 1.0


def _dynamic(waves: _Waves, options: Scaling, length: int | None) -> tuple[Tensor, float]:
    """A larger base where the sequence is longer than in training (NTK-aware)."""
    known = options.get("original_max_position_embeddings")
    known = options["max_position_embeddings"] if known is None else known
    stretch = options["factor"] * max(length or 0, known) / known - (options["factor"] - 1)
    return 1.0 / waves.powers(waves.theta * stretch ** (waves.dims / (waves.dims - 2))), 1.0


def _llama3(waves: _Waves, options: Scaling, length: int | None) -> tuple[Tensor, float]:
    """Waves longer than trained / low are slowed by `factor`, shorter than trained / high kept."""
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    trained = options["original_max_position_embeddings"]
    plain = waves.plain()
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > trained / low, plain / options["factor"], plain)
    share = (trained / wavelength - low) / (high - low)
    between = (1 - share) * slowed / options["factor"] + share * slowed
    middle = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return torch.where(middle, between, slowed), 1.0


def _yarn(waves: _Waves, options: Scaling, length: int | None) -> tuple[Tensor, float]:
    """Peng et al. 2023 (arXiv 2309.00071): a ramp over i between kept and slowed; scaled output."""
    trained = options["original_max_position_embeddings"]
    factor = options.get("factor")
    factor = options["max_position_embeddings"] / trained if factor is None else factor

    def growth(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    amplitude = options.get("attention_factor")
    if amplitude is None:
        over, under = options.get("mscale"), options.get("mscale_all_dim")
        amplitude = growth(over) / growth(under) if over and under else growth()

    def turns(count: float) -> float:
        """The index whose wave turns this often in the trained length."""
        ratio = math.log(trained / (count * 2 * math.pi))
        return waves.dims * ratio / (2 * math.log(waves.theta))

    first = turns(options.get("beta_fast") or 32)
    last = turns(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, waves.dims - 1)
    if first == last:
        last += 0.001  # no division by zero
    steps = torch.arange(waves.dims // 2, dtype=torch.float32, device=waves.device)
    kept = 1 - ((steps - first) / (last - first)).clamp(0, 1)
    powers = waves.powers()
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(amplitude)


_Made = Callable[[_Waves, Scaling, int | None], tuple[Tensor, float]]
_TYPES: dict[str, _Made] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
