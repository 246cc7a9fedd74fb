"""GPT-2: a decoder of pre-norm blocks with learned positions, GELU and a tied head.

Reference: Radford et al. 2019, "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn, random
from .config import EqualHeads
from .model import Model, expect
from .names import Source
from .transformer import Params, Place, attend, causal_model, mlp, project


@dataclass(frozen=True)
class GPT2Config(EqualHeads):
    """Sizes of a GPT-2; `ffn` 0 means four times `embed`."""

    layer: int = 12
    embed: int = 768
    heads: int = 12
    vocab: int = 50257
    position: int = 1024
    ffn: int = 0
    dropout: float = 0.0
    eps: float = 1e-5


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


def _names() -> dict[str, Source]:
    """Where each parameter lies on disk: weights are [in, out], q, k and v share one tensor."""

    def fused(part: int, dims: str, along: int, kind: str) -> Source:
        thirds = ("heads head_dim",) * 3
        return Source(f"transformer.h.{{layer}}.attn.c_attn.{kind}", dims, thirds, part, along)

    table = {
        "attn_norm": Source("transformer.h.{layer}.ln_1.weight", "embed"),
        "attn_norm_bias": Source("transformer.h.{layer}.ln_1.bias", "embed"),
        "w_o": Source("transformer.h.{layer}.attn.c_proj.weight", "(heads head_dim) embed"),
        "b_o": Source("transformer.h.{layer}.attn.c_proj.bias", "embed"),
        "mlp_norm": Source("transformer.h.{layer}.ln_2.weight", "embed"),
        "mlp_norm_bias": Source("transformer.h.{layer}.ln_2.bias", "embed"),
        "w_up": Source("transformer.h.{layer}.mlp.c_fc.weight", "embed ffn"),
        "b_up": Source("transformer.h.{layer}.mlp.c_fc.bias", "ffn"),
        "w_down": Source("transformer.h.{layer}.mlp.c_proj.weight", "ffn embed"),
        "b_down": Source("transformer.h.{layer}.mlp.c_proj.bias", "embed"),
    }
    for part, (letter, heads) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        table[f"w_{letter}"] = fused(part, f"embed ({heads} head_dim)", 1, "weight")
        table[f"b_{letter}"] = fused(part, f"({heads} head_dim)", 0, "bias")
    return {
        "embed": Source("transformer.wte.weight", "vocab embed"),
        "pos": Source("transformer.wpe.weight", "position embed"),
        **{f"blocks.{role}": source for role, source in table.items()},
        "final_norm": Source("transformer.ln_f.weight", "embed"),
        "final_norm_bias": Source("transformer.ln_f.bias", "embed"),
    }


NAMES = _names()


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
    s = expect("gpt2", config, GPT2Config, strategy)

    def norm(p: Params, role: str, x: ShardedTensor) -> ShardedTensor:
        return nn.layer_norm(x, p[role], p[f"{role}_bias"], eps=config.eps)

    def embed(params: Params, tokens: ShardedTensor, positions: Any) -> ShardedTensor:
        p = s.use({role: params[role] for role in ("embed", "pos")})
        x = nn.embedding(tokens, p["embed"], out=s["hidden"])
        return reshard(x + nn.embedding(positions, p["pos"]), s["hidden"])

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        drop = place.key is not None and config.dropout > 0
        keys: Any = random.split(place.key, 2) if drop else (None, None)  # pyright: ignore
        h = reshard(norm(p, "attn_norm", x), s["block_in"])
        y = project(p, attend(p, h, s, place), s)
        x = x + nn.dropout(y, config.dropout, keys[0])
        h = reshard(norm(p, "mlp_norm", x), s["block_in"])
        y = mlp(p, h, s, lambda u: F.gelu(u, approximate="tanh"))
        return x + nn.dropout(y, config.dropout, keys[1])

    def last(params: Params, x: ShardedTensor) -> ShardedTensor:
        p = s.use({role: params[role] for role in ("final_norm", "final_norm_bias")})
        return norm(p, "final_norm", x)

    return causal_model(
        config, s, declare(config), embed=embed, block=block, last=last, names=NAMES
    )


# our field -> Hugging Face's key
_KEYS = {
    "layer": "n_layer",
    "embed": "n_embd",
    "heads": "n_head",
    "vocab": "vocab_size",
    "position": "n_positions",
    "dropout": "resid_pdrop",
    "eps": "layer_norm_epsilon",
}
_FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_TANH = ("gelu_new", "gelu_pytorch_tanh")  # two names of GELU by tanh


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> GPT2Config:
    """The config of a Hugging Face config.json.

    Raises:
        ValueError: another activation or attention, an untied head.
    """
    wanted = {**_FIXED, "activation_function": found.get("activation_function", _TANH[0])}
    for key, value in wanted.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"gpt2: config.json has {key} = {found[key]!r}; only {value!r} is read"
            )
    if wanted["activation_function"] not in _TANH:
        raise ValueError(
            f"gpt2: config.json has activation_function = {wanted['activation_function']!r}; "
            f"only {_TANH[0]!r} is read"
        )
    given = {ours: found[key] for ours, key in _KEYS.items() if key in found}
    return GPT2Config(**given, ffn=found.get("n_inner") or 0, pad=pad or {})


def config_to(config: GPT2Config) -> dict[str, Any]:
    """What Hugging Face's config.json says of this config.

    >>> config_from(config_to(GPT2Config(layer=2))) == GPT2Config(layer=2)
    True
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop"), config.dropout),
        "n_inner": config.ffn,
        "activation_function": _TANH[0],
        **_FIXED,
    }


PRESETS = {
    "gpt2": GPT2Config(embed=768, layer=12, heads=12),
    "gpt2-medium": GPT2Config(embed=1024, layer=24, heads=16),
    "gpt2-large": GPT2Config(embed=1280, layer=36, heads=20),
    "gpt2-xl": GPT2Config(embed=1600, layer=48, heads=25),
    "gpt3-175b": GPT2Config(embed=12288, layer=96, heads=96, position=2048),
}
