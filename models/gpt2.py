"""GPT-2: a decoder of pre-norm blocks with learned positions, GELU and a tied head.

Legend: batch, seq, embed, heads, head_dim, ffn, vocab, position, layer are the dims of the roles'
rows.

Reference: Radford et al. 2019, "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn, random
from ..ops.contract import einsum
from ..ops.random import Key
from ..ops.transforms.scan import scan
from .model import Model


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; `ffn` 0 means four times `embed`."""

    layer: int = 12
    embed: int = 768
    heads: int = 12
    vocab: int = 50257
    position: int = 1024
    ffn: int = 0
    dropout: float = 0.0
    eps: float = 1e-5
    pad: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("layer", "embed", "heads", "vocab", "position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1")
        if self.embed % self.heads:
            raise ValueError(f"embed {self.embed} is not a multiple of heads {self.heads}")
        if not self.ffn:
            object.__setattr__(self, "ffn", 4 * self.embed)
        vocab = self.pad.get("vocab", 1)
        object.__setattr__(self, "classes", self.vocab)
        object.__setattr__(self, "vocab", -(-self.vocab // vocab) * vocab)

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.embed // self.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.heads


def declare(config: GPT2Config) -> dict[str, Any]:
    """The parameters of a GPT-2; projections into the residual stream start smaller with depth."""
    std = 0.02
    into_stream = nn.normal(std / math.sqrt(2 * config.layer))
    weight, zero, one = nn.normal(std), nn.constant(0.0), nn.constant(1.0)
    block = {
        "attn_norm": nn.Param("embed", one),
        "attn_norm_bias": nn.Param("embed", zero),
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "b_q": nn.Param("heads head_dim", zero),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "b_k": nn.Param("kv_heads head_dim", zero),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        "b_v": nn.Param("kv_heads head_dim", zero),
        "w_o": nn.Param("heads head_dim -> embed", into_stream),
        "b_o": nn.Param("embed", zero),
        "mlp_norm": nn.Param("embed", one),
        "mlp_norm_bias": nn.Param("embed", zero),
        "w_up": nn.Param("embed -> ffn", weight),
        "b_up": nn.Param("ffn", zero),
        "w_down": nn.Param("ffn -> embed", into_stream),
        "b_down": nn.Param("embed", zero),
    }
    return {
        "embed": nn.Param("vocab embed", weight),
        "pos": nn.Param("position embed", nn.normal(0.01)),
        "blocks": nn.stack(block),
        "final_norm": nn.Param("embed", one),
        "final_norm_bias": nn.Param("embed", zero),
    }


def block(
    p: Mapping[str, Any], x: ShardedTensor, s: Strategy, config: GPT2Config, key: Key | None
) -> ShardedTensor:
    """Attention and MLP, each on the normed stream and added to it: [batch seq embed] -> same."""
    keys = random.split(key, 2) if key is not None and config.dropout else [None, None]
    h = nn.layer_norm(x, p["attn_norm"], p["attn_norm_bias"], eps=config.eps)
    h = reshard(h, s["block_in"])
    q, k, v = nn.dense(
        h,
        (p["w_q"], p["w_k"], p["w_v"]),
        (p["b_q"], p["b_k"], p["b_v"]),
        out=(s["heads"], s["kv"], s["kv"]),
    )
    a = nn.attention(q, k, v, causal=True, out=s["attended"])
    y = nn.dense(a, p["w_o"], p["b_o"], out=s["hidden"], inputs=2)
    x = x + nn.dropout(y, config.dropout, keys[0])
    h = nn.layer_norm(x, p["mlp_norm"], p["mlp_norm_bias"], eps=config.eps)
    h = reshard(h, s["block_in"])
    h = F.gelu(nn.dense(h, p["w_up"], p["b_up"], out=s["ffn"]), approximate="tanh")
    y = nn.dense(h, p["w_down"], p["b_down"], out=s["hidden"])  # pyright: ignore
    return x + nn.dropout(y, config.dropout, keys[1])


def gpt2(config: GPT2Config, strategy: Strategy) -> Model:
    """A GPT-2 under a strategy.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> config = models.GPT2Config(layer=2, embed=8, heads=2, vocab=16, position=4)
    >>> model = models.gpt2(config, s)
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> params["blocks"]["w_up"]
    f32[2 8 32/tensor] local[2 8 16] on mesh(data=2, tensor=2)
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, s["tokens"])
    >>> model.apply(params, tokens)
    f32[2/data 4 16/tensor] local[1 4 8] on mesh(data=2, tensor=2)
    """
    s = strategy

    def apply(
        params: Mapping[str, Any],
        tokens: ShardedTensor,
        *,
        positions: ShardedTensor | None = None,
        key: Key | None = None,
    ) -> ShardedTensor:
        table = s.use({"embed": params["embed"]})["embed"]
        places = s.use({"pos": params["pos"]})["pos"]
        x = nn.embedding(tokens, table, out=s["hidden"])
        at = places[: tokens.shape[1]] if positions is None else nn.embedding(positions, places)
        x = reshard(x + at, s["hidden"])

        def layer(
            carry: tuple[ShardedTensor, int], p: Any
        ) -> tuple[tuple[ShardedTensor, int], None]:
            x, number = carry
            own = random.fold_in(key, number) if key is not None else None
            return (block(s.use(p), x, s, config, own), number + 1), None

        (x, _), _ = scan(layer, (x, 0), params["blocks"], recompute=s.option("recompute"))  # pyright: ignore
        last = s.use({k: params[k] for k in ("final_norm", "final_norm_bias")})
        h = nn.layer_norm(x, last["final_norm"], last["final_norm_bias"], eps=config.eps)
        if s.option("tied") == "per_use":
            table = s.use({"embed": params["embed"]})["embed"]
        return head(reshard(h, s["block_in"]), table, s["logits"])

    def loss(params: Mapping[str, Any], batch: Mapping[str, Any], *, key: Key | None = None) -> Any:
        logits = apply(params, batch["tokens"], key=key)
        return nn.cross_entropy(logits, batch["labels"], classes=config.classes)  # pyright: ignore

    return Model(config, s, declare(config), apply, loss)


def head(h: ShardedTensor, table: ShardedTensor, out: str) -> ShardedTensor:
    """Logits of the tied head: [batch seq embed] and [vocab embed] -> [batch seq vocab]."""
    return einsum("batch seq embed, vocab embed -> batch seq vocab", h, table, out=out)
