"""PaLM: attention and MLP side by side behind one norm, and one key-value head for all queries.

Both read the same normed input, and their results are summed before one reduction. The single key
and value head cannot be cut: build strategies with kv="replicate".

Reference: Chowdhery et al. 2022 (arXiv 2204.02311). Names on disk are those of palm-pytorch, since
no weights were published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn
from .config import Config
from .model import Model, expect
from .names import Source
from .transformer import Params, Place, attend, causal_model, gated, project_both


@dataclass(frozen=True)
class PaLMConfig(Config):
    """Sizes of a PaLM; `ffn` 0 means four times `embed`."""

    layer: int = 32
    embed: int = 4096
    heads: int = 16
    head_dim: int = 256
    ffn: int = 0
    vocab: int = 256000
    position: int = 2048
    theta: float = 10000.0
    eps: float = 1e-5

    DERIVED = ("kv_heads",)

    def __post_init__(self) -> None:
        self.check_types()
        if not self.ffn:
            object.__setattr__(self, "ffn", 4 * self.embed)
        super().__post_init__()

    @property
    def kv_heads(self) -> int:
        """One key and value head."""
        return 1


def declare(config: PaLMConfig) -> dict[str, Any]:
    """The parameters of a PaLM."""
    weight, one = nn.fan_in(), nn.constant(1.0)
    block = {
        "norm": nn.Param("embed", one),
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        "w_o": nn.Param("heads head_dim -> embed", weight),
        "w_up": nn.Param("embed -> ffn", weight),
        "w_gate": nn.Param("embed -> ffn", weight),
        "w_down": nn.Param("ffn -> embed", weight),
    }
    return {
        "embed": nn.Param("vocab embed", nn.normal(0.02)),
        "blocks": nn.stack(block),
        "final_norm": nn.Param("embed", one),
    }


def names(config: PaLMConfig) -> dict[str, Source]:
    """Where each parameter lies on disk: blocks are numbered from 1, the last norm behind them."""
    parts = {
        "w_q": "heads head_dim",
        "w_k": "kv_heads head_dim",
        "w_v": "kv_heads head_dim",
        "w_up": "ffn",
        "w_gate": "ffn",
    }
    fused = tuple(parts.values())
    table = {
        role: Source(
            "{layer}.fn.fused_attn_ff_proj.weight", f"({dims}) embed", fused, part, first=1
        )
        for part, (role, dims) in enumerate(parts.items())
    }
    table |= {
        "norm": Source("{layer}.fn.norm.gamma", "embed", first=1),
        "w_o": Source("{layer}.fn.attn_out.weight", "embed (heads head_dim)", first=1),
        "w_down": Source("{layer}.fn.ff_out.1.weight", "embed ffn", first=1),
    }
    return {
        "embed": Source("0.weight", "vocab embed"),
        **{f"blocks.{role}": source for role, source in table.items()},
        "final_norm": Source(f"{config.layer + 1}.gamma", "embed"),
    }


def palm(config: PaLMConfig, strategy: Strategy) -> Model:
    """A PaLM under a strategy.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.tensor_1d(kv="replicate")
    >>> config = models.PaLMConfig(layer=2, embed=8, heads=4, head_dim=4, vocab=16)
    >>> model = models.palm(config, s)
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> params["blocks"]["w_k"]
    f32[2 8 1 4] local[2 8 1 4] on mesh(tensor=2)
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, s["tokens"])
    >>> model.apply(params, tokens)
    f32[2 4 16/tensor] local[2 4 8] on mesh(tensor=2)
    """
    s = expect("palm", config, PaLMConfig, strategy)

    def embed(params: Params, tokens: ShardedTensor, positions: Any) -> ShardedTensor:
        return nn.embedding(tokens, s.use({"embed": params["embed"]})["embed"], out=s["hidden"])

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        def rotate(q: ShardedTensor, k: ShardedTensor) -> tuple[ShardedTensor, ShardedTensor]:
            turned = (nn.rope(x, place.positions, theta=config.theta) for x in (q, k))
            return tuple(turned)  # pyright: ignore

        h = reshard(nn.layer_norm(x, p["norm"], eps=config.eps), s["block_in"])
        a = attend(p, h, s, place, rotate=rotate, config=config)
        return x + project_both(p, a, gated(p, h, s, F.silu), s)

    def last(params: Params, x: ShardedTensor) -> ShardedTensor:
        gain = s.use({"final_norm": params["final_norm"]})["final_norm"]
        return nn.layer_norm(x, gain, eps=config.eps)

    return causal_model(
        config, s, declare(config), embed=embed, block=block, last=last, names=names(config)
    )


# our field -> an argument of palm-pytorch's PaLM, or what it has built in
_KEYS = {
    "layer": "depth",
    "embed": "dim",
    "heads": "heads",
    "head_dim": "dim_head",
    "vocab": "num_tokens",
    "position": "max_position_embeddings",
    "theta": "rope_theta",
    "eps": "layer_norm_eps",
}
_OPTIONAL: dict[str, Any] = {
    "heads": 8,
    "dim_head": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
}


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> PaLMConfig:
    """The config of a config.json that holds the arguments of palm-pytorch's `PaLM`.

    Raises:
        KeyError: a size is missing.
    """
    known = {**_OPTIONAL, **found}
    given = {name: known[key] for name, key in _KEYS.items()}
    return PaLMConfig(**given, ffn=found.get("ff_mult", 4) * given["embed"], pad=pad or {})


def config_to(config: PaLMConfig) -> dict[str, Any]:
    """The arguments of palm-pytorch's `PaLM`, as a config.json.

    Raises:
        ValueError: `ffn` is no multiple of `embed`.

    >>> config_from(config_to(PRESETS["palm-8b"])) == PRESETS["palm-8b"]
    True
    """
    if config.ffn % config.embed:
        raise ValueError(f"palm: ffn {config.ffn} is not a multiple of embed {config.embed}")
    return {
        "architectures": ["PaLM"],
        "model_type": "palm",
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        "ff_mult": config.ffn // config.embed,
    }


PRESETS = {
    "palm-8b": PaLMConfig(embed=4096, layer=32, heads=16),
    "palm-62b": PaLMConfig(embed=8192, layer=64, heads=32),
    "palm-540b": PaLMConfig(embed=18432, layer=118, heads=48),
}
