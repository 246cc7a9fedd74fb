"""Models whose blocks multiply in fp8: which layers do, and that they learn as others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery import rng

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.kernels import fp8
from shardwise.models import transformer

BF16 = sw.Precision(torch.float32, torch.bfloat16, torch.float32)
FP8 = sw.Precision(torch.float32, torch.bfloat16, torch.float32, fp8=True)
WIDE = models.GPT2Config(layer=1, embed=512, heads=8, vocab=64, position=16)
CONFIG = models.GPT2Config(layer=2, embed=64, heads=4, vocab=64, position=16)
# Rounding of the products by 4 % is some 1 % of the loss at most, in value and on the way down.
LOSS, CURVE = 0.01, 0.02


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """Counting modulo the vocabulary from a random start: easily learnt."""
    start = torch.randint(CONFIG.vocab, (4, 1), generator=rng(step))
    row = (start + torch.arange(17)) % CONFIG.vocab
    return {"tokens": row[:, :-1].contiguous(), "labels": row[:, 1:].contiguous()}


def made(precision: sw.Precision, axes: dict[str, int]) -> tuple[Any, Any, Any]:
    """Model, mesh, parameters."""
    strategy = strategies.data() if "data" in axes else strategies.tensor_1d()
    model = models.gpt2(CONFIG, strategy.replace(precision=precision))
    on = sw.make_mesh(axes)
    return model, on, model.init(sw.random.key(0), on)


def curve(precision: sw.Precision, axes: dict[str, int], steps: int) -> list[float]:
    model, on, params = made(precision, axes)
    opt = optim.adamw(3e-3)
    state, losses = opt.init(params), []
    for step in range(steps):
        batch = sw.shard(batch_of(step), on, model.strategy["tokens"])
        loss, grads = sw.value_and_grad(model.loss)(params, batch)
        params, state = opt.step(grads, state, params)
        losses.append(loss.item())
    return losses


@pytest.fixture
def _everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in fp8 too, which is quick to test."""
    monkeypatch.setattr(transformer, "WIDE", 64)


@pytest.mark.usefixtures("_everything_is_wide")
def test_it_learns_as_in_bfloat16() -> None:
    plain, quick = (curve(p, {"data": 1}, 30) for p in (BF16, FP8))
    assert plain[-1] < 0.5 * plain[0]
    assert quick != plain
    for a, b in zip(quick, plain, strict=True):
        assert abs(a - b) < CURVE * plain[0]


@pytest.mark.usefixtures("_everything_is_wide")
@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}], ids=str)
def test_the_loss_is_that_of_bfloat16_on_every_mesh(axes: dict[str, int]) -> None:
    (plain,), (quick,), (alone,) = (
        curve(BF16, axes, 1), curve(FP8, axes, 1), curve(FP8, {"data": 1}, 1),
    )  # fmt: skip
    assert abs(quick - plain) < LOSS * plain
    assert abs(quick - alone) < 1e-3 * plain  # bfloat16 sums in another order


LLAMA = models.LlamaConfig(
    layer=2, embed=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=64, position=16
)
MESHES: dict[str, tuple[dict[str, int], sw.Strategy]] = {
    "fsdp": ({"data": 2}, strategies.fsdp()),
    "tensor": ({"tensor": 2}, strategies.tensor_1d()),
    "tensor, key-value heads whole": ({"tensor": 2}, strategies.tensor_1d(kv="replicate")),
    "sequence": ({"tensor": 2}, strategies.sequence_parallel()),
    "square": ({"row": 2, "col": 2}, strategies.tensor_2d(method="direct")),
    "cube": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d()),
    "recomputed": ({"data": 2}, strategies.data().replace(recompute="cheap")),
}


def loss_and_gradients(axes: dict[str, int], strategy: sw.Strategy) -> tuple[Any, Any]:
    """Of the small Llama, in float32 but for the products."""
    model = models.llama(LLAMA, strategy.replace(precision=sw.Precision(fp8=True)))
    on = sw.make_mesh(axes)
    batch = sw.shard(batch_of(0), on, model.strategy["tokens"])
    loss, grads = sw.value_and_grad(model.loss)(model.init(sw.random.key(0), on), batch)
    return loss, {path: g.full_tensor() for path, g in sw.tree.items(grads)}


@pytest.mark.usefixtures("_everything_is_wide")
@pytest.mark.parametrize("name", MESHES)
def test_every_strategy_gives_the_same(name: str) -> None:
    loss, grads = loss_and_gradients(*MESHES[name])
    alone, wanted = loss_and_gradients({"data": 1}, strategies.data())
    assert abs(loss.item() - alone.item()) < 1e-3
    for path, g in grads.items():
        # A number near the middle between two of 8 bits is rounded up here and down there.
        assert (g - wanted[path]).norm() < 0.03 * wanted[path].norm(), path


def shapes(
    monkeypatch: pytest.MonkeyPatch, config: Any, make: Any, precision: sw.Precision
) -> list[tuple[int, ...]]:
    """Shapes of the weights that are multiplied in fp8, in order."""
    seen: list[tuple[int, ...]] = []
    real = fp8.fp8_linear

    def noted(x: Any, w: Any, *largest: Any) -> Any:
        seen.append(tuple(w.shape))
        return real(x, w, *largest)

    monkeypatch.setattr(fp8, "fp8_linear", noted)
    model = make(config, strategies.data().replace(precision=precision))
    on = sw.make_mesh({"data": 1})
    tokens = sw.shard(torch.zeros(1, 16, dtype=torch.int64), on, model.strategy["tokens"])
    model.apply(model.init(sw.random.key(0), on), tokens)
    return seen


def test_wide_layers_of_the_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shapes(monkeypatch, WIDE, models.gpt2, FP8)
    assert found == [(512, 3 * 512), (512, 512), (512, 2048), (2048, 512)]
    assert not shapes(monkeypatch, WIDE, models.gpt2, BF16)
    narrow = models.GPT2Config(layer=1, embed=256, heads=4, vocab=64, position=16)
    assert not shapes(monkeypatch, narrow, models.gpt2, FP8)


def test_gated_layers_share_their_quantised_input(monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.LlamaConfig(
        layer=1, embed=512, heads=8, kv_heads=2, head_dim=64, ffn=1024, vocab=64, position=16
    )
    found = shapes(monkeypatch, config, models.llama, FP8)
    assert found == [(512, 512 + 2 * 128), (512, 512), (512, 2048), (1024, 512)]


def test_how_a_weight_is_multiplied() -> None:
    on = sw.make_mesh({"data": 1})
    s = strategies.data().replace(precision=FP8)

    def how(*shape: int, inputs: int = 1) -> str:
        return transformer.product(s, sw.shard(torch.zeros(shape), on, "..."), inputs=inputs)[
            "precision"
        ]

    assert how(512, 512) == how(8, 64, 512, inputs=2) == how(512, 8, 64) == "fp8"
    assert how(512, 496) == how(496, 512) == how(520, 512) == how(512, 1000) == "default"
