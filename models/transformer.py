"""Pieces of transformers, each written once; a model is a table of parameters and one block.

Legend: batch, seq, embed, heads, kv_heads, head_dim, ffn, vocab, position, layer are the dims of
the roles' rows. In every piece `p` holds one layer's parameters at use, `s` is the strategy, and
the stream `x` is [batch seq embed] in the row `hidden`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn, random
from ..ops.contract import einsum
from ..ops.random import Key
from ..ops.transforms.scan import scan
from .model import Model
from .names import Source

Params = Mapping[str, Any]
Unary = Callable[[Any], Any]


class Place(NamedTuple):
    """What a block may depend on besides its parameters and the stream.

    Attributes:
        positions: of the tokens, [seq] or [batch seq].
        key: of this layer's dropout; None is evaluation.
        recall: (keys, values) -> (keys, values, their positions): a cache that remembers; None
            where the sequence is all there is.
    """

    positions: Any
    key: Key | None = None
    recall: Callable[[Any, Any], tuple[Any, Any, Any]] | None = None


Block = Callable[[Params, ShardedTensor, Place], ShardedTensor]


def attend(
    p: Params,
    h: ShardedTensor,
    s: Strategy,
    place: Place,
    *,
    rotate: Unary | None = None,
    causal: bool = True,
    **options: Any,
) -> ShardedTensor:
    """Multi-head attention without its output projection.

    Args:
        p: w_q, w_k, w_v and, where the model has them, b_q, b_k, b_v.
        h: the block's input, in the row `block_in`.
        s: the strategy.
        place: positions, and the cache if there is one.
        rotate: of queries and keys, before the cache.
        causal: a query sees keys at its own position and before.
        **options: of `nn.attention`.

    Returns:
        [batch seq heads head_dim] in the row `attended`.
    """
    q, k, v = nn.dense(
        h,
        (p["w_q"], p["w_k"], p["w_v"]),
        (p.get("b_q"), p.get("b_k"), p.get("b_v")),
        out=(s["heads"], s["kv"], s["kv"]),
        method=s.option("matmul"),  # pyright: ignore
    )
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    if place.recall is not None:
        k, v, seen = place.recall(k, v)
        options |= {"positions": place.positions, "kv_positions": seen}
    return nn.attention(q, k, v, causal=causal, out=s["attended"], **options)


def project(p: Params, a: ShardedTensor, s: Strategy) -> ShardedTensor:
    """Attention's output projection: [batch seq heads head_dim] -> the stream."""
    method: Any = s.option("matmul")
    return nn.dense(a, p["w_o"], p.get("b_o"), out=s["hidden"], inputs=2, method=method)


def mlp(p: Params, h: ShardedTensor, s: Strategy, activate: Unary) -> ShardedTensor:
    """Up, activation, down: the block's input [batch seq embed] -> the stream."""
    method: Any = s.option("matmul")
    up = activate(nn.dense(h, p["w_up"], p.get("b_up"), out=s["ffn"], method=method))
    return nn.dense(up, p["w_down"], p.get("b_down"), out=s["hidden"], method=method)


def gated_mlp(p: Params, h: ShardedTensor, s: Strategy, activate: Unary) -> ShardedTensor:
    """SwiGLU (activate = silu), GeGLU (gelu): activate(gate) * up, then down -> the stream."""
    method: Any = s.option("matmul")
    gate, up = nn.dense(
        h,
        (p["w_gate"], p["w_up"]),
        (p.get("b_gate"), p.get("b_up")),
        out=(s["ffn"], s["ffn"]),
        method=method,
    )
    mixed = activate(gate) * up
    return nn.dense(mixed, p["w_down"], p.get("b_down"), out=s["hidden"], method=method)


def head(h: ShardedTensor, table: ShardedTensor, s: Strategy) -> ShardedTensor:
    """Logits: [batch seq embed] and [vocab embed] -> [batch seq vocab]."""
    method: Any = s.option("matmul")
    pattern = "batch seq embed, vocab embed -> batch seq vocab"
    return einsum(pattern, h, table, out=s["logits"], method=method)


def run_blocks(
    block: Block, x: ShardedTensor, stacked: Params, s: Strategy, place: Place
) -> ShardedTensor:
    """The stream through all layers; each layer's parameters are brought to use on their slice."""

    def layer(carry: tuple[ShardedTensor, int], p: Any) -> tuple[Any, None]:
        x, number = carry
        own = random.fold_in(place.key, number) if place.key is not None else None
        return (block(s.use(p), x, place._replace(key=own)), number + 1), None

    (x, _), _ = scan(layer, (x, 0), stacked, recompute=s.option("recompute"))  # pyright: ignore
    return x


def causal_model(
    config: Any,
    s: Strategy,
    declaration: Mapping[str, Any],
    *,
    embed: Callable[[Params, ShardedTensor, Any], ShardedTensor],
    block: Block,
    last: Callable[[Params, ShardedTensor], ShardedTensor],
    names: Mapping[str, Source],
    scale: float = 1.0,
) -> Model:
    """A decoder that predicts the next token.

    Args:
        config: of the model.
        s: the strategy.
        declaration: with embed, blocks and, where it is not tied, head.
        embed: (params, tokens, positions) -> the stream; params are at rest.
        block: one layer.
        last: (params, x) -> the head's input before it is converted to `block_in`.
        names: parameter path to its place in a Hugging Face checkpoint.
        scale: of the logits.
    """

    def apply(
        params: Params, tokens: ShardedTensor, *, positions: Any = None, key: Key | None = None
    ) -> ShardedTensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.mesh.shard_device)
        if s.option("tied") == "once":
            params = {**params, "embed": s.use({"embed": params["embed"]})["embed"]}
        x = embed(params, tokens, positions)
        x = run_blocks(block, x, params["blocks"], s, Place(positions, key))
        logits = predict(params, x)
        return logits if scale == 1 else logits * scale

    def predict(params: Params, x: ShardedTensor) -> ShardedTensor:
        h = reshard(last(params, x), s["block_in"])
        role = "head" if "head" in declaration else "embed"
        return head(h, s.use({role: params[role]})[role], s)

    def loss(params: Params, batch: Mapping[str, Any], *, key: Key | None = None) -> Any:
        logits = apply(params, batch["tokens"], positions=batch.get("positions"), key=key)
        return nn.cross_entropy(logits, batch["labels"], classes=config.vocab)

    return Model(config, s, declaration, apply, loss, names)
