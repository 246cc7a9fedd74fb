"""OPT: a decoder with learned positions, ReLU, biases everywhere and a tied head.

Positions start at 2 in their table and count the tokens that are there, so left padding shifts
nothing. The size of 350 million parameters is another shape: norms behind the residual sums, no
final norm, and a narrower table of words that is projected in and out of the stream.
The padding token's row learns like any other: mask it.

Reference: Zhang et al. 2022 (arXiv 2205.01068).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn, random
from .config import EqualHeads
from .model import Model, expect
from .names import Source
from .transformer import Params, Place, attend, causal_model, mlp, project

OFFSET = 2  # rows of the table of positions ahead of the first one


@dataclass(frozen=True)
class OPTConfig(EqualHeads):
    """Sizes of an OPT; `ffn` 0 means four times `embed`, `word` 0 as wide as `embed`.

    Attributes:
        layer: blocks.
        embed: width of the stream.
        heads: of attention.
        ffn: width inside the MLP.
        vocab: rows of the table of words.
        position: longest sequence; its table has two rows more.
        word: width of the table of words.
        order: "pre": norms ahead of attention and MLP, and a final one; "post": behind the sums.
        dropout: of attention's and the MLP's results.
        eps: of norms.
    """

    layer: int = 12
    embed: int = 768
    heads: int = 12
    ffn: int = 0
    vocab: int = 50272
    position: int = 2048
    word: int = 0
    order: Literal["pre", "post"] = "pre"
    dropout: float = 0.0
    eps: float = 1e-5

    DERIVED = (*EqualHeads.DERIVED, "place")

    def __post_init__(self) -> None:
        self.check_types()
        if not self.word:
            object.__setattr__(self, "word", self.embed)
        super().__post_init__()
        if self.order not in ("pre", "post"):
            raise ValueError(f"order = {self.order!r}; expected 'pre' or 'post'")

    @property
    def place(self) -> int:
        """Rows of the table of positions."""
        return self.position + OFFSET


def declare(config: OPTConfig) -> dict[str, Any]:
    """The parameters of an OPT."""
    weight, zero, one = nn.normal(0.006), nn.constant(0.0), nn.constant(1.0)
    block = {
        "attn_norm": nn.Param("embed", one),
        "attn_norm_bias": nn.Param("embed", zero),
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "b_q": nn.Param("heads head_dim", zero),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "b_k": nn.Param("kv_heads head_dim", zero),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        "b_v": nn.Param("kv_heads head_dim", zero),
        "w_o": nn.Param("heads head_dim -> embed", weight),
        "b_o": nn.Param("embed", zero),
        "mlp_norm": nn.Param("embed", one),
        "mlp_norm_bias": nn.Param("embed", zero),
        "w_up": nn.Param("embed -> ffn", weight),
        "b_up": nn.Param("ffn", zero),
        "w_down": nn.Param("ffn -> embed", weight),
        "b_down": nn.Param("embed", zero),
    }
    declared: dict[str, Any] = {
        "embed": nn.Param("vocab word", weight),
        "pos": nn.Param("place embed", weight),
        "blocks": nn.stack(block),
    }
    if config.word != config.embed:
        declared["w_in"] = nn.Param("word -> embed", weight)
        declared["w_out"] = nn.Param("embed -> word", weight)
    if config.order == "pre":
        declared["final_norm"] = nn.Param("embed", one)
        declared["final_norm_bias"] = nn.Param("embed", zero)
    return declared


_BLOCK = {
    "attn_norm": ("self_attn_layer_norm.weight", "embed"),
    "attn_norm_bias": ("self_attn_layer_norm.bias", "embed"),
    "w_q": ("self_attn.q_proj.weight", "(heads head_dim) embed"),
    "b_q": ("self_attn.q_proj.bias", "(heads head_dim)"),
    "w_k": ("self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    "b_k": ("self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "w_v": ("self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    "b_v": ("self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "w_o": ("self_attn.out_proj.weight", "embed (heads head_dim)"),
    "b_o": ("self_attn.out_proj.bias", "embed"),
    "mlp_norm": ("final_layer_norm.weight", "embed"),
    "mlp_norm_bias": ("final_layer_norm.bias", "embed"),
    "w_up": ("fc1.weight", "ffn embed"),
    "b_up": ("fc1.bias", "ffn"),
    "w_down": ("fc2.weight", "embed ffn"),
    "b_down": ("fc2.bias", "embed"),
}
_DECODER = "model.decoder"
NAMES = {
    "embed": Source(f"{_DECODER}.embed_tokens.weight", "vocab word"),
    "pos": Source(f"{_DECODER}.embed_positions.weight", "place embed"),
    "w_in": Source(f"{_DECODER}.project_in.weight", "embed word"),
    "w_out": Source(f"{_DECODER}.project_out.weight", "word embed"),
    **{
        f"blocks.{role}": Source(f"{_DECODER}.layers.{{layer}}.{name}", dims)
        for role, (name, dims) in _BLOCK.items()
    },
    "final_norm": Source(f"{_DECODER}.final_layer_norm.weight", "embed"),
    "final_norm_bias": Source(f"{_DECODER}.final_layer_norm.bias", "embed"),
}


def count_tokens(mask: Any) -> Any:
    """Positions from a mask [batch seq]: how many tokens stand ahead; -1 where there is none."""
    there = (mask != 0).long()
    return there.cumsum(1) * there - 1


def opt(config: OPTConfig, strategy: Strategy) -> Model:
    """An OPT under a strategy.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> config = models.OPTConfig(layer=2, embed=8, heads=2, vocab=16, position=4)
    >>> model = models.opt(config, s)
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> params["pos"]
    f32[6 8] local[6 8] on mesh(data=2, tensor=2)
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, s["tokens"])
    >>> model.apply(params, tokens)
    f32[2/data 4 16/tensor] local[1 4 8] on mesh(data=2, tensor=2)
    """
    s = expect("opt", config, OPTConfig, strategy)
    is_pre = config.order == "pre"

    def norm(p: Params, role: str, x: ShardedTensor) -> ShardedTensor:
        return nn.layer_norm(x, p[role], p[f"{role}_bias"], eps=config.eps)

    def at_use(params: Params, *roles: str) -> Params:
        return s.use({role: params[role] for role in roles if role in params})

    def embed(params: Params, tokens: ShardedTensor, positions: Any) -> ShardedTensor:
        p = at_use(params, "embed", "pos", "w_in")
        x = nn.embedding(tokens, p["embed"], out=s["hidden"])
        if "w_in" in p:
            x = nn.dense(x, p["w_in"], out=s["hidden"])
        return reshard(x + nn.embedding(positions + OFFSET, p["pos"]), s["hidden"])

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        drop = place.key is not None and config.dropout > 0
        keys: Any = random.split(place.key, 2) if drop else (None, None)  # pyright: ignore
        h = reshard(norm(p, "attn_norm", x) if is_pre else x, s["block_in"])
        y = project(p, attend(p, h, s, place), s)
        x = x + nn.dropout(y, config.dropout, keys[0])
        x = x if is_pre else norm(p, "attn_norm", x)
        h = reshard(norm(p, "mlp_norm", x) if is_pre else x, s["block_in"])
        x = x + nn.dropout(mlp(p, h, s, F.relu), config.dropout, keys[1])
        return x if is_pre else norm(p, "mlp_norm", x)

    def last(params: Params, x: ShardedTensor) -> ShardedTensor:
        p = at_use(params, "final_norm", "final_norm_bias", "w_out")
        x = norm(p, "final_norm", x) if is_pre else x
        return nn.dense(x, p["w_out"], out=s["hidden"]) if "w_out" in p else x

    return causal_model(
        config,
        s,
        declare(config),
        embed=embed,
        block=block,
        last=last,
        names=NAMES,
        positions_of=count_tokens,
    )


# our field -> Hugging Face's key
_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "ffn_dim",
    "vocab": "vocab_size",
    "position": "max_position_embeddings",
    "word": "word_embed_proj_dim",
    "dropout": "dropout",
}
_OPTIONAL: dict[str, Any] = {"word_embed_proj_dim": None, "dropout": 0.1}  # as its class assumes
_FIXED: dict[str, Any] = {
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> OPTConfig:
    """The config of a Hugging Face config.json. Dropout of attention's weights is ignored.

    Raises:
        KeyError: a size is missing.
        ValueError: another activation, no biases, norms without gains or no final norm.
    """
    for key, value in _FIXED.items():
        if found.get(key, value) != value:
            raise ValueError(f"opt: config.json has {key} = {found[key]!r}; only {value!r} is read")
    known = {**_OPTIONAL, **found}
    given = {name: known[key] for name, key in _KEYS.items()}
    order = "pre" if found.get("do_layer_norm_before", True) else "post"
    return OPTConfig(**{**given, "word": given["word"] or 0}, order=order, pad=pad or {})


def config_to(config: OPTConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of this config.

    Raises:
        ValueError: another `eps` than 1e-5, which its class has built in.

    >>> config_from(config_to(PRESETS["opt-350m"])) == PRESETS["opt-350m"]
    True
    """
    if config.eps != 1e-5:
        raise ValueError(f"opt: Hugging Face's class has eps 1e-05, not {config.eps}")
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        "do_layer_norm_before": config.order == "pre",
        **_FIXED,
    }


PRESETS = {
    "opt-125m": OPTConfig(layer=12, embed=768, heads=12),
    "opt-350m": OPTConfig(layer=24, embed=1024, heads=16, word=512, order="post"),
    "opt-1.3b": OPTConfig(layer=24, embed=2048, heads=32),
    "opt-2.7b": OPTConfig(layer=32, embed=2560, heads=32),
    "opt-6.7b": OPTConfig(layer=32, embed=4096, heads=32),
    "opt-13b": OPTConfig(layer=40, embed=5120, heads=40),
    "opt-30b": OPTConfig(layer=48, embed=7168, heads=56),
    "opt-66b": OPTConfig(layer=64, embed=9216, heads=72),
    "opt-175b": OPTConfig(layer=96, embed=12288, heads=96),
}
