"""A tiny model of every family, that fits every strategy on small meshes, and a batch for it.

Sizes are such that 2, 3 and 4 divide them (and q^2 where a preset cuts a dim twice); batches have
any size, `batch(72)`, since meshes want different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from gallery import rng, values
from torch import Tensor

import shardwise as sw
from shardwise import models
from shardwise.models import Model


@dataclass(frozen=True)
class Tiny:
    """A model to try.

    Attributes:
        config: its sizes.
        make: (config, strategy) -> Model.
        batch: size of the batch -> plain tensors that `Model.loss` reads, global.
        kv: how strategies must treat key-value heads.
    """

    config: Any
    make: Callable[[Any, sw.Strategy], Model]
    batch: Callable[..., Mapping[str, Tensor]]
    kv: Literal["cut", "replicate"] = "cut"


SEQ, VOCAB = 12, 24


def text_batch(size: int = 36, seed: int = 0) -> Mapping[str, Tensor]:
    """Tokens and labels [size, SEQ]; some labels do not count, unevenly over the batch."""
    r = rng(seed)
    tokens = torch.randint(VOCAB, (size, SEQ), generator=r)
    labels = torch.randint(VOCAB, (size, SEQ), generator=r)
    labels[0, : SEQ // 2] = -100
    labels[-1, -1] = -100
    return {"tokens": tokens, "labels": labels}


def padded_batch(size: int = 36, seed: int = 0) -> Mapping[str, Tensor]:
    """The same with a mask: the first tokens of every second row are padding, and do not count."""
    batch = text_batch(size, seed)
    mask = torch.ones(size, SEQ, dtype=torch.int64)
    for row in range(1, size, 2):
        mask[row, : 1 + row % 4] = 0
    labels = torch.where(mask != 0, batch["labels"], -100)
    return {**batch, "labels": labels, "mask": mask}


def drawn(model: Model, seed: int = 0, std: float = 0.25) -> Any:
    """Plain float64 parameters, wide enough that every term matters, gains near 1; padding is 0."""
    r, config = rng(seed), model.config

    def draw(path: str, param: sw.nn.Param) -> Tensor:
        value = torch.randn(param.shape(config.true_sizes), generator=r, dtype=torch.float64)
        role = path.split(".")[-1]
        value = 1 + 0.2 * value if "norm" in role and "bias" not in role else std * value
        more = [a - b for a, b in zip(param.shape(config), value.shape, strict=True)]
        return F.pad(value, [n for extra in reversed(more) for n in (0, extra)])

    leaves = iter([draw(path, param) for path, param in sw.tree.items(model.declaration)])
    return sw.tree.map(lambda _: next(leaves), model.declaration)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _gpt2() -> Tiny:
    config = models.GPT2Config(layer=2, embed=36, heads=12, vocab=VOCAB, position=SEQ)
    return Tiny(config, models.gpt2, text_batch)


def _llama1() -> Tiny:
    config = models.LlamaConfig(
        layer=2, embed=48, heads=12, ffn=36, vocab=VOCAB, position=SEQ, theta=100.0
    )
    return Tiny(config, models.llama, text_batch)


def _llama3() -> Tiny:
    """Grouped queries, a head of another width than embed / heads, scaled waves, a tied head."""
    config = models.LlamaConfig(
        layer=2, embed=36, heads=24, kv_heads=12, head_dim=4, ffn=48, vocab=VOCAB, position=SEQ,
        theta=100.0, scaling=LLAMA3, tied=True,
    )  # fmt: skip
    return Tiny(config, models.llama, padded_batch)


def _qwen() -> Tiny:
    """Every bias, normed queries and keys, and a window."""
    config = models.LlamaConfig(
        layer=2, embed=36, heads=24, kv_heads=12, head_dim=4, ffn=36, vocab=VOCAB, position=SEQ,
        qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, window=5,
    )  # fmt: skip
    return Tiny(config, models.llama, text_batch)


def _opt() -> Tiny:
    config = models.OPTConfig(layer=2, embed=36, heads=12, ffn=48, vocab=VOCAB, position=SEQ)
    return Tiny(config, models.opt, padded_batch)


def _opt_post() -> Tiny:
    config = models.OPTConfig(
        layer=2, embed=36, heads=12, ffn=36, vocab=VOCAB, position=SEQ, word=24, order="post"
    )
    return Tiny(config, models.opt, text_batch)


def _palm() -> Tiny:
    config = models.PaLMConfig(
        layer=2, embed=72, heads=12, head_dim=4, ffn=72, vocab=VOCAB, position=SEQ
    )
    return Tiny(config, models.palm, text_batch, kv="replicate")


def _bert() -> Tiny:
    """Padding, segments, labels on some tokens, and which sentence follows."""
    config = models.BERTConfig(layer=2, embed=36, heads=12, ffn=48, vocab=VOCAB, position=SEQ + 2)

    def batch(size: int = 8) -> Mapping[str, Tensor]:
        r = rng(1)
        labels = torch.randint(VOCAB, (size, SEQ), generator=r)
        labels[torch.rand(size, SEQ, generator=r) < 0.5] = -100
        labels[:2] = -100  # a device may hold no label at all
        lengths = torch.randint(3, SEQ + 1, (size, 1), generator=r)
        return {
            "tokens": torch.randint(VOCAB, (size, SEQ), generator=r),
            "labels": labels,
            "mask": (torch.arange(SEQ) < lengths).long(),
            "types": torch.randint(2, (size, SEQ), generator=r),
            "next_labels": torch.randint(2, (size,), generator=r),
        }

    return Tiny(config, models.bert, batch)


def _vit() -> Tiny:
    """CLS and 9 patches: 10 tokens, which an axis of 2 cuts and one of 4 does not."""
    config = models.ViTConfig(
        layer=2, embed=36, heads=12, ffn=48, image=12, patch=4, channel=3, classes=5
    )

    def batch(size: int = 8) -> Mapping[str, Tensor]:
        labels = torch.randint(5, (size,), generator=rng(2))
        return {"images": values(size, 3, 12, 12, seed=3), "labels": labels}

    return Tiny(config, models.vit, batch)


TINY: dict[str, Callable[[], Tiny]] = {
    "gpt2": _gpt2,
    "llama1": _llama1,
    "llama3": _llama3,
    "qwen": _qwen,
    "opt": _opt,
    "opt post": _opt_post,
    "palm": _palm,
    "bert": _bert,
    "vit": _vit,
}
