"""The count of a step's FLOPs against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.flops import flops_per_token, multiplied

BATCH, SEQ = 2, 6
SIZES = {"layer": 2, "embed": 12, "heads": 3, "vocab": 20, "position": SEQ, "ffn": 28}
MODELS: dict[str, tuple[Callable[..., models.Model], Any]] = {
    "gpt2": (models.gpt2, models.GPT2Config(**SIZES)),
    "llama": (models.llama, models.LlamaConfig(**{**SIZES, "heads": 6, "kv_heads": 2})),
    "llama, tied": (models.llama, models.LlamaConfig(**SIZES, kv_heads=3, tied=True)),
    "opt": (models.opt, models.OPTConfig(**SIZES, word=8)),
    "palm": (models.palm, models.PaLMConfig(**SIZES, head_dim=4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_multiply_so_often(name: str) -> None:
    make, config = MODELS[name]
    mesh = sw.make_mesh({"data": 1}, transport="simulated")
    model = make(config, strategies.data())
    params = model.init(sw.random.key(0), mesh)
    tokens = sw.shard(torch.arange(BATCH * SEQ).reshape(BATCH, SEQ), mesh)
    rows = {"tokens": tokens, "labels": tokens}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sw.value_and_grad(model.loss)(params, rows)
    expected = BATCH * SEQ * flops_per_token(model, SEQ, causal=False)
    assert counter.get_total_flops() == expected
    pairs = 6 * config.layer * config.heads * config.head_dim * SEQ
    assert flops_per_token(model, SEQ, causal=False) - flops_per_token(model, SEQ) == pairs


def test_padding_does_not_count() -> None:
    config = models.GPT2Config(**{**SIZES, "vocab": 21})
    padded = models.GPT2Config(**{**SIZES, "vocab": 21}, pad={"vocab": 16})
    counts = {flops_per_token(models.gpt2(c, strategies.data()), SEQ) for c in (config, padded)}
    assert len(counts) == 1


def test_gpt2_124m() -> None:
    """Its 124,439,808 parameters without positions, gains and biases."""
    model = models.gpt2(models.GPT2Config(), strategies.data())
    weights = 50257 * 768 + 12 * (4 * 768**2 + 2 * 4 * 768**2)
    assert multiplied(model) == weights == 123_532_032


def test_an_encoder_has_no_count_per_token() -> None:
    model = models.bert(models.BERTConfig(layer=1, embed=8, heads=2), strategies.data())
    with pytest.raises(TypeError, match="models that decode"):
        flops_per_token(model, 4)
