"""The loss of decoders from hidden states, which GPUs take, equals the one from all logits."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch

import shardwise as sw
from shardwise import models, strategies
from shardwise.models import transformer

CONFIGS: dict[str, tuple[Any, Any]] = {
    "gpt2": (
        models.gpt2,
        models.GPT2Config(layer=1, embed=8, heads=4, vocab=13, position=8, pad={"vocab": 8}),
    ),
    "llama": (
        models.llama,
        models.LlamaConfig(layer=1, embed=8, heads=4, kv_heads=2, ffn=16, vocab=16),
    ),
}
STRATEGIES: dict[str, tuple[Any, dict[str, int]]] = {
    "data": (strategies.data(), {"data": 2}),
    "fsdp": (strategies.fsdp(), {"data": 2}),
    "1D": (strategies.tensor_1d(), {"tensor": 2}),
    "3D": (strategies.tensor_3d("a", "b", "c"), {"a": 2, "b": 2, "c": 2}),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(name: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, config = CONFIGS[name]
    s, axes = STRATEGIES[strategy]
    wide = sw.Precision(torch.float64, torch.float64, torch.float64)
    mesh = sw.make_mesh(axes)
    model = make(config, s.replace(precision=wide))
    params = model.init(sw.random.key(0), mesh)
    tokens = torch.randint(config.vocab, (4, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[0, :3] = -100
    tokens, labels = (sw.shard(x, mesh, s["tokens"]) for x in (tokens, labels))
    batch = {"tokens": tokens, "labels": labels}
    plain, grads = sw.value_and_grad(model.loss)(params, batch)
    monkeypatch.setattr(transformer, "LINEAR_LOSS_ON", ("cpu",))
    found, found_grads = sw.value_and_grad(model.loss)(params, batch)
    assert found.layout == plain.layout
    torch.testing.assert_close(found.full_tensor(), plain.full_tensor(), rtol=1e-12, atol=0)
    for a, b in zip(*map(optree.tree_leaves, (found_grads, grads)), strict=True):
        assert a.layout == b.layout
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-10, atol=1e-13)


def test_scaled_logits_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PaLM's: the linear loss does not scale."""
    config = models.PaLMConfig(layer=1, embed=8, heads=2, head_dim=4, vocab=16)
    model = models.palm(config, strategies.data())
    mesh = sw.make_mesh({"data": 1})
    params = model.init(sw.random.key(0), mesh)
    tokens = sw.shard(torch.arange(8).view(1, 8), mesh, "batch/data seq")
    batch = {"tokens": tokens, "labels": tokens}
    plain = model.loss(params, batch).full_tensor()
    monkeypatch.setattr(transformer, "LINEAR_LOSS_ON", ("cpu",))
    assert torch.equal(model.loss(params, batch).full_tensor(), plain)
