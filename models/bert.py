"""BERT: an encoder of post-norm blocks whose tokens see each other both ways.

Three uses share the encoder, and `BERTConfig.task` names the one that a model is for: "pretrain"
(masked tokens and next sentence), "masked" (masked tokens), "encode" (hidden states and a pooled
vector). Each is a class of Hugging Face's transformers, whose checkpoints it reads.

Reference: Devlin et al. 2018 (arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..layouts.layout import Layout, make
from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.errors import nearest
from ..ops import nn, random
from ..ops.random import Key
from .config import EqualHeads
from .model import Model, expect, expect_tokens
from .names import Source
from .transformer import Params, Place, attend, first_token, mlp, project, run_blocks, seen_keys

Task = Literal["pretrain", "masked", "encode"]
_CLASSES: dict[Task, str] = {
    "pretrain": "BertForPreTraining",
    "masked": "BertForMaskedLM",
    "encode": "BertModel",
}


@dataclass(frozen=True)
class BERTConfig(EqualHeads):
    """Sizes of a BERT; `ffn` 0 means four times `embed`.

    Attributes:
        layer: number of blocks.
        embed: width of the stream.
        heads: of attention.
        vocab: number of tokens.
        position: longest sequence.
        types: segments that a token can belong to.
        ffn: inner width of the MLP.
        dropout: of embeddings, attention's output and the MLP's output.
        eps: of the norms.
        task: what the model is for, and so which heads it has.
    """

    layer: int = 12
    embed: int = 768
    heads: int = 12
    vocab: int = 30522
    position: int = 512
    types: int = 2
    ffn: int = 0
    dropout: float = 0.0
    eps: float = 1e-12
    task: Task = "pretrain"

    # `mixed` is embed again: the two dims of a square weight need different names
    DERIVED = (*EqualHeads.DERIVED, "mixed", "relations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in _CLASSES:
            raise ValueError(f"task: unknown {self.task!r}{nearest(self.task, _CLASSES)}")

    @property
    def mixed(self) -> int:
        """Width of the pooled vector and of the transform before the vocabulary."""
        return self.embed

    @property
    def relations(self) -> int:
        """What a second sentence can be: the next one, or one drawn at random."""
        return 2


PRESETS: dict[str, dict[str, int]] = {
    "bert-base": {"layer": 12, "embed": 768, "heads": 12},
    "bert-large": {"layer": 24, "embed": 1024, "heads": 16},
}


def declare(config: BERTConfig) -> dict[str, Any]:
    """The parameters of a BERT with the heads that its task needs."""
    weight, zero, one = nn.normal(0.02), nn.constant(0.0), nn.constant(1.0)
    block = {
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "b_q": nn.Param("heads head_dim", zero),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "b_k": nn.Param("kv_heads head_dim", zero),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        "b_v": nn.Param("kv_heads head_dim", zero),
        "w_o": nn.Param("heads head_dim -> embed", weight),
        "b_o": nn.Param("embed", zero),
        "attn_norm": nn.Param("embed", one),
        "attn_norm_bias": nn.Param("embed", zero),
        "w_up": nn.Param("embed -> ffn", weight),
        "b_up": nn.Param("ffn", zero),
        "w_down": nn.Param("ffn -> embed", weight),
        "b_down": nn.Param("embed", zero),
        "mlp_norm": nn.Param("embed", one),
        "mlp_norm_bias": nn.Param("embed", zero),
    }
    pooler = {"w_pool": nn.Param("embed -> mixed", weight), "b_pool": nn.Param("mixed", zero)}
    masked = {
        "w_mix": nn.Param("embed -> mixed", weight),
        "b_mix": nn.Param("mixed", zero),
        "mix_norm": nn.Param("mixed", one),
        "mix_norm_bias": nn.Param("mixed", zero),
        "b_vocab": nn.Param("vocab", zero),
    }
    follows = {
        "w_next": nn.Param("mixed -> relations", weight),
        "b_next": nn.Param("relations", zero),
    }
    heads: dict[Task, dict[str, Any]] = {
        "pretrain": {**pooler, **masked, **follows},
        "masked": masked,
        "encode": pooler,
    }
    return {
        "embed": nn.Param("vocab embed", weight),
        "pos": nn.Param("position embed", weight),
        "types": nn.Param("types embed", weight),
        "embed_norm": nn.Param("embed", one),
        "embed_norm_bias": nn.Param("embed", zero),
        "blocks": nn.stack(block),
        **heads[config.task],
    }


def _names() -> dict[str, Source]:
    """Where each parameter lies on disk; weights are [out, in], the decoder is tied."""
    layer, heads = "bert.encoder.layer.{layer}", "embed (heads head_dim)"

    def pair(roles: tuple[str, str], name: str, weight: str, bias: str) -> dict[str, Source]:
        kinds = zip(roles, ("weight", "bias"), (weight, bias), strict=True)
        return {role: Source(f"{name}.{kind}", dims) for role, kind, dims in kinds}

    def norm(role: str, name: str, dim: str = "embed") -> dict[str, Source]:
        return pair((role, f"{role}_bias"), f"{name}.LayerNorm", dim, dim)

    block = {
        **pair(("w_o", "b_o"), f"{layer}.attention.output.dense", heads, "embed"),
        **norm("attn_norm", f"{layer}.attention.output"),
        **pair(("w_up", "b_up"), f"{layer}.intermediate.dense", "ffn embed", "ffn"),
        **pair(("w_down", "b_down"), f"{layer}.output.dense", "embed ffn", "embed"),
        **norm("mlp_norm", f"{layer}.output"),
    }
    for word, kind in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
        roles, dims = (f"w_{word[0]}", f"b_{word[0]}"), f"({kind} head_dim)"
        block |= pair(roles, f"{layer}.attention.self.{word}", f"{dims} embed", dims)
    return {
        "embed": Source("bert.embeddings.word_embeddings.weight", "vocab embed"),
        "pos": Source("bert.embeddings.position_embeddings.weight", "position embed"),
        "types": Source("bert.embeddings.token_type_embeddings.weight", "types embed"),
        **norm("embed_norm", "bert.embeddings"),
        **{f"blocks.{role}": source for role, source in block.items()},
        **pair(("w_pool", "b_pool"), "bert.pooler.dense", "mixed embed", "mixed"),
        **pair(("w_mix", "b_mix"), "cls.predictions.transform.dense", "mixed embed", "mixed"),
        **norm("mix_norm", "cls.predictions.transform", "mixed"),
        "b_vocab": Source("cls.predictions.bias", "vocab"),
        **pair(("w_next", "b_next"), "cls.seq_relationship", "relations mixed", "relations"),
    }


NAMES = _names()


def bert(config: BERTConfig, strategy: Strategy) -> Model:
    """A BERT under a strategy.

    `apply(params, tokens, *, mask=None, types=None, positions=None, key=None)` gives the logits of
    masked tokens [batch seq vocab]; for the task "encode", the hidden states [batch seq embed].
    `mask` [batch seq] is 1 at real tokens and 0 at padding, which no token sees; `types`
    [batch seq] tells segments apart. `loss(params, batch, *, key=None)` takes these by name, with
    tokens and labels [batch seq]: the mean over all labels of the global batch that are not -100,
    plus, where the batch has next_labels [batch], the mean of the next sentence's.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> config = models.BERTConfig(layer=2, embed=8, heads=2, vocab=16, position=4)
    >>> model = models.bert(config, s)
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, s["tokens"])
    >>> model.apply(params, tokens)
    f32[2/data 4 16/tensor] local[1 4 8] on mesh(data=2, tensor=2)
    """
    s = expect("bert", config, BERTConfig, strategy)

    def once(params: Params) -> Params:
        """The tied table brought to use once, where the strategy asks for that."""
        if s.option("tied") != "once":
            return params
        return {**params, **s.use({"embed": params["embed"]})}

    def apply(params: Params, tokens: ShardedTensor, **inputs: Any) -> ShardedTensor:
        params = once(params)
        x = _encoded(config, s, params, tokens, **inputs)
        return x if config.task == "encode" else _predicted(config, s, params, x)

    def loss(params: Params, batch: Mapping[str, Any], *, key: Key | None = None) -> Any:
        if config.task == "encode":
            raise ValueError("bert: task 'encode' has no loss; use 'pretrain' or 'masked'")
        params = once(params)
        inputs = {name: batch.get(name) for name in ("mask", "types", "positions")}
        x = _encoded(config, s, params, batch["tokens"], **inputs, key=key)
        logits = _predicted(config, s, params, x)
        total = nn.cross_entropy(logits, batch["labels"], classes=config.vocab)
        if batch.get("next_labels") is None:
            return total
        follows = next_sentence(s, params, _pooled(s, params, x))
        return total + nn.cross_entropy(follows, batch["next_labels"])

    declaration = declare(config)
    held = {*declaration, *(f"blocks.{role}" for role in declaration["blocks"])}
    cut = "bert." if config.task == "encode" else ""
    names = {
        path: Source(source.name.removeprefix(cut), source.dims)
        for path, source in NAMES.items()
        if path in held
    }
    return Model(config, s, declaration, apply, loss, names)


def encode(
    model: Model, params: Params, tokens: ShardedTensor, **inputs: Any
) -> tuple[ShardedTensor, ShardedTensor | None]:
    """Hidden states [batch seq embed] in the row `hidden`, and the pooled vector [batch embed].

    Args:
        model: of `bert`, of any task.
        params: at rest.
        tokens: [batch seq].
        **inputs: mask, types, positions and key of the model's `apply`.

    Returns:
        The hidden states of the last layer, and tanh of a linear map of the first token's; None
        for the task "masked", which has no pooler.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> config = models.BERTConfig(layer=1, embed=8, heads=2, vocab=16, position=4, task="encode")
    >>> model = models.bert(config, strategies.data())
    >>> mesh = sw.make_mesh({"data": 2})
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, model.strategy["tokens"])
    >>> hidden, pooled = models.encode(model, model.init(sw.random.key(0), mesh), tokens)
    >>> hidden.shape, pooled.shape
    (torch.Size([2, 4, 8]), torch.Size([2, 8]))
    """
    x = _encoded(model.config, model.strategy, params, tokens, **inputs)
    return x, _pooled(model.strategy, params, x) if "w_pool" in params else None


def next_sentence(s: Strategy, params: Params, pooled: ShardedTensor) -> ShardedTensor:
    """Logits [batch 2] of the pooled vector: the second sentence follows, or was drawn."""
    p = s.use({role: params[role] for role in ("w_next", "b_next")})
    return nn.dense(pooled, p["w_next"], p["b_next"])


def _encoded(
    config: BERTConfig,
    s: Strategy,
    params: Params,
    tokens: ShardedTensor,
    *,
    mask: Any = None,
    types: Any = None,
    positions: Any = None,
    key: Key | None = None,
) -> ShardedTensor:
    """Hidden states of the last layer, in the row `hidden`."""

    def norm(p: Params, role: str, x: ShardedTensor) -> ShardedTensor:
        return nn.layer_norm(x, p[role], p[f"{role}_bias"], eps=config.eps)

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        keys: Any = (None, None) if place.key is None else random.split(place.key, 2)
        a = attend(p, reshard(x, s["block_in"]), s, place, causal=False)
        x = norm(p, "attn_norm", x + nn.dropout(project(p, a, s), config.dropout, keys[0]))
        y = mlp(p, reshard(x, s["block_in"]), s, F.gelu)
        return norm(p, "mlp_norm", x + nn.dropout(y, config.dropout, keys[1]))

    expect_tokens(tokens, config.position if positions is None else None)
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.mesh.shard_device)
    roles = ("embed", "pos", "types", "embed_norm", "embed_norm_bias")
    p = s.use({role: params[role] for role in roles})
    if types is None:
        segment = p["types"][0]
    else:  # cut as the stream is, so that a gradient moves the small table and not the stream
        cut = make(Layout(s["hidden"], 3).dims[:2])
        segment = nn.embedding(reshard(types, cut), p["types"])
    x = nn.embedding(tokens, p["embed"], out=s["hidden"]) + nn.embedding(positions, p["pos"])
    x = norm(p, "embed_norm", reshard(x + segment, s["hidden"]))
    x = nn.dropout(x, config.dropout, None if key is None else random.fold_in(key, "embed"))
    return run_blocks(block, x, params["blocks"], s, Place(positions, key, mask=seen_keys(mask, s)))


def _predicted(config: BERTConfig, s: Strategy, params: Params, x: ShardedTensor) -> ShardedTensor:
    """Logits of masked tokens: a transform, then the transposed table and its bias."""
    method: Any = s.option("matmul")
    roles = ("w_mix", "b_mix", "mix_norm", "mix_norm_bias", "embed", "b_vocab")
    p = s.use({role: params[role] for role in roles})
    h = reshard(x, s["block_in"])
    mixed = F.gelu(nn.dense(h, p["w_mix"], p["b_mix"], out=s["ffn"], method=method))
    mixed = reshard(mixed, s["hidden"])  # where the rows of norms fit
    mixed = nn.layer_norm(mixed, p["mix_norm"], p["mix_norm_bias"], eps=config.eps)
    h, table = reshard(mixed, s["block_in"]), p["embed"].transpose(0, 1)
    return nn.dense(h, table, p["b_vocab"], out=s["logits"], method=method)


def _pooled(s: Strategy, params: Params, x: ShardedTensor) -> ShardedTensor:
    """The tanh of a linear map of the first token's hidden state: [batch embed]."""
    p = s.use({role: params[role] for role in ("w_pool", "b_pool")})
    return torch.tanh(nn.dense(first_token(x, s), p["w_pool"], p["b_pool"]))  # pyright: ignore


# our field -> Hugging Face's key
_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "position": "max_position_embeddings",
    "types": "type_vocab_size",
    "ffn": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "eps": "layer_norm_eps",
}


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> BERTConfig:
    """The config of a Hugging Face config.json; an unknown class of heads is read as an encoder.

    Raises:
        ValueError: another activation, relative positions, a decoder, an untied table.
    """
    for key, wanted in _FIXED.items():
        if found.get(key, wanted) != wanted:
            raise ValueError(
                f"bert: config.json has {key} = {found[key]!r}; only {wanted!r} is read"
            )
    names = found.get("architectures") or ["BertModel"]
    tasks: list[Task] = [task for task, name in _CLASSES.items() if name in names]
    given = {ours: found[key] for ours, key in _KEYS.items() if key in found}
    return BERTConfig(**given, task=(*tasks, "encode")[0], pad=pad or {})


def config_to(config: BERTConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of this config.

    >>> config_from(config_to(BERTConfig(layer=2))) == BERTConfig(layer=2)
    True
    """
    ours = {key: getattr(config, name) for name, key in _KEYS.items()}
    return {"architectures": [_CLASSES[config.task]], "model_type": "bert", **ours, **_FIXED}


_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
