"""GPT-2 under every strategy equals one in plain torch: loss and every gradient, in float64.

And it equals Hugging Face's, padding and given positions included.
"""

from __future__ import annotations

import math
from typing import Any

import parity
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.gpt2 import PRESETS, config_from, config_to

CONFIG = models.GPT2Config(layer=2, embed=16, heads=4, vocab=24, position=8)
BATCH = 8


def plain(params: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """The same model in plain torch: an independent reading of the paper."""
    p = params
    x = p["embed"][tokens] + p["pos"][: tokens.shape[1]]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for i in range(CONFIG.layer):
        b = {k: v[i] for k, v in p["blocks"].items()}
        h = F.layer_norm(x, (16,), b["attn_norm"], b["attn_norm_bias"])
        q, k, v = (
            torch.einsum("bsd,dhk->bhsk", h, b[f"w_{n}"]) + b[f"b_{n}"][None, :, None]
            for n in "qkv"
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(4)).masked_fill(~causal, -math.inf)
        a = torch.einsum("bhsk,hkd->bsd", scores.softmax(-1) @ v, b["w_o"]) + b["b_o"]
        x = x + a
        h = F.layer_norm(x, (16,), b["mlp_norm"], b["mlp_norm_bias"])
        x = x + F.gelu(h @ b["w_up"] + b["b_up"], approximate="tanh") @ b["w_down"] + b["b_down"]
    logits = F.layer_norm(x, (16,), p["final_norm"], p["final_norm_bias"]) @ p["embed"].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def inputs() -> tuple[Any, Tensor, Tensor]:
    """Parameters drawn wide, so that every term matters, and a batch with an ignored label."""
    rng = torch.Generator().manual_seed(0)
    declaration = models.gpt2(CONFIG, strategies.data()).declaration
    params = sw.tree.map(
        lambda d: torch.randn(d.shape(CONFIG), generator=rng, dtype=torch.float64) * 0.3,
        declaration,
    )
    tokens = torch.randint(24, (BATCH, 8), generator=rng)
    labels = torch.randint(24, (BATCH, 8), generator=rng)
    labels[0, :3] = -100
    return params, tokens, labels


MESHES = {
    "one": ({"data": 1, "tensor": 1}, strategies.data() * strategies.tensor_1d()),
    "data": ({"data": 4}, strategies.data()),
    "tensor": ({"tensor": 4}, strategies.tensor_1d()),
    "data x tensor": ({"data": 2, "tensor": 2}, strategies.data() * strategies.tensor_1d()),
    "three axes": (
        {"data": 2, "depth": 2, "tensor": 2},
        strategies.data() * strategies.data("depth") * strategies.tensor_1d(),
    ),
    "fsdp": ({"data": 4}, strategies.fsdp()),
    "fsdp gathered": ({"data": 4}, strategies.fsdp(save="gathered")),
    "fsdp x tensor": ({"data": 2, "tensor": 2}, strategies.fsdp() * strategies.tensor_1d()),
    "remat": (
        {"data": 2, "tensor": 2},
        (strategies.data() * strategies.tensor_1d()).replace(recompute="all"),
    ),
    "cheap remat": (
        {"data": 2, "tensor": 2},
        (strategies.fsdp() * strategies.tensor_1d()).replace(recompute="cheap"),
    ),
    "tied once": (
        {"data": 2, "tensor": 2},
        (strategies.fsdp() * strategies.tensor_1d()).replace(tied="once"),
    ),
}


def double(strategy: sw.Strategy) -> sw.Strategy:
    f64 = torch.float64
    return strategy.replace(precision=sw.Precision(f64, f64, f64))


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_equal_plain_torch(name: str) -> None:
    axes, strategy = MESHES[name]
    strategy = double(strategy)
    mesh = sw.make_mesh(axes)
    model = models.gpt2(CONFIG, strategy)
    values, tokens, labels = inputs()
    leaves = sw.tree.map(lambda v: v.clone().requires_grad_(), values)
    expected = plain(leaves, tokens, labels)
    wanted = torch.autograd.grad(expected, sw.tree.leaves(leaves))

    params = sw.shard(values, mesh, strategy.layouts(model.declaration, CONFIG, mesh))
    batch = sw.shard({"tokens": tokens, "labels": labels}, mesh, strategy["tokens"])
    loss, grads = sw.value_and_grad(model.loss)(params, batch)
    assert abs(loss.item() - expected.item()) < 1e-12
    for (path, g), p, want in zip(
        sw.tree.items(grads), sw.tree.leaves(params), wanted, strict=True
    ):
        assert g.layout is p.layout.dual, path
        torch.testing.assert_close(g.full_tensor(), want, rtol=1e-10, atol=1e-10, msg=path)


def test_initial_weights_are_equal_on_every_mesh() -> None:
    drawn = []
    for name in ("one", "three axes", "fsdp x tensor"):
        axes, strategy = MESHES[name]
        params = models.gpt2(CONFIG, strategy).init(sw.random.key(3), sw.make_mesh(axes))
        drawn.append([p.full_tensor() for p in sw.tree.leaves(params)])
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))


def test_dropout_is_equal_on_every_mesh() -> None:
    config = models.GPT2Config(layer=2, embed=16, heads=4, vocab=24, position=8, dropout=0.3)
    losses = []
    for name in ("one", "three axes", "fsdp x tensor", "remat"):
        axes, strategy = MESHES[name]
        mesh, strategy = sw.make_mesh(axes), double(strategy)
        model = models.gpt2(config, strategy)
        values, tokens, labels = inputs()
        params = sw.shard(values, mesh, strategy.layouts(model.declaration, config, mesh))
        batch = sw.shard({"tokens": tokens, "labels": labels}, mesh, strategy["tokens"])
        key = sw.random.key(5)
        loss, grads = sw.value_and_grad(lambda p: model.loss(p, batch, key=key))(params)  # noqa: B023
        losses.append((loss.item(), grads["blocks"]["w_up"].full_tensor()))
    for loss, grad in losses[1:]:
        assert abs(loss - losses[0][0]) < 1e-12
        torch.testing.assert_close(grad, losses[0][1], rtol=1e-10, atol=1e-12)


def test_tensor_parallel_layers_communicate_as_megatron_does() -> None:
    axes, strategy = MESHES["tensor"]
    mesh = sw.make_mesh(axes)
    model = models.gpt2(CONFIG, strategy)
    params = model.init(sw.random.key(0), mesh)
    _, tokens, labels = inputs()
    batch = sw.shard({"tokens": tokens, "labels": labels}, mesh, strategy["tokens"])
    with sw.record() as plan:
        sw.value_and_grad(model.loss)(params, batch)
    stream = BATCH * 8 * CONFIG.embed
    big = [c for c in plan.collectives if c.shape == (BATCH, 8, CONFIG.embed)]
    forward = [c for c in big if c.phase == "forward"]
    backward = [c for c in big if c.phase == "backward"]
    # two per layer and way, the embedding's sum forward, the head's gradient backward
    assert len(forward) == 2 * CONFIG.layer + 1
    assert len(backward) == 2 * CONFIG.layer + 1
    assert all(c.kind == "all_reduce" and c.elements == 2 * 3 * stream // 4 for c in big)


def test_fsdp_gathers_each_parameter_and_scatters_its_gradient() -> None:
    axes, strategy = MESHES["fsdp"]
    mesh = sw.make_mesh(axes)
    model = models.gpt2(CONFIG, strategy.replace(tied="once"))
    params = model.init(sw.random.key(0), mesh)
    _, tokens, labels = inputs()
    batch = sw.shard({"tokens": tokens, "labels": labels}, mesh, strategy["tokens"])
    with sw.record() as plan:
        sw.value_and_grad(model.loss)(params, batch)
    size = sum(p.numel() for p in sw.tree.leaves(params))
    assert plan.elements(kind="all_gather", phase="forward") == size * 3 // 4
    assert plan.elements(kind="reduce_scatter", phase="backward") == size * 3 // 4
    assert plan.elements(phase="regather") > 0
    assert plan.count(kind="all_reduce", phase="backward") == 0


def test_one_step_is_planned_for_four_thousand_devices() -> None:
    mesh = sw.make_mesh({"data": 512, "tensor": 8}, transport="abstract")
    strategy = strategies.data() * strategies.tensor_1d()
    config = models.GPT2Config(layer=12, embed=768, heads=16, vocab=50304, position=1024)
    model = models.gpt2(config, strategy)
    params = model.init(sw.random.key(0), mesh)
    tokens = sw.zeros((1024, 1024), mesh, strategy["tokens"], dtype=torch.int64)
    plan = sw.plan(sw.value_and_grad(model.loss), params, {"tokens": tokens, "labels": tokens})
    stream = 2 * 1024 * 768
    # two a layer, the embedding, and the loss: a maximum and a sum (the labels' logits stay owed)
    assert plan.count(kind="all_reduce", axis="tensor", phase="forward") == 2 * 12 + 1 + 2
    assert plan.elements(axis="tensor", phase="backward") == (2 * 12 + 1) * 2 * 7 * stream // 8
    size = sum(p.numel() // (8 if p.layout.axes else 1) for p in sw.tree.leaves(params))
    moved = plan.elements(axis="data", phase="backward")
    tied_twice = (
        params["embed"].numel() // 8
    )  # cast per use: its gradient is reduced once all the same
    assert moved == pytest.approx(2 * 511 / 512 * size, rel=1e-9) or moved == pytest.approx(
        2 * 511 / 512 * (size + tied_twice), rel=1e-9
    )
    assert plan.flops > 0
    assert plan.peak_memory > 0


def hugging_face(dtype: torch.dtype) -> Any:
    """A Hugging Face model with weights that matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=6, n_inner=20, vocab_size=29, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return parity.redraw(GPT2LMHeadModel(config)).to(dtype)


def compare(hf: Any, tolerance: float, **known: Tensor) -> None:
    """Logits, loss and every gradient of ours equal those of the Hugging Face model."""
    rng = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(29, (2, 4, 10), generator=rng)
    there = known.get("mask", torch.ones(4, 10)) != 0
    labels[0, :3] = -100
    labels = labels.where(there, -100)
    theirs = {"attention_mask": known.get("mask"), "position_ids": known.get("positions")}
    wanted = parity.run_reference(hf, lambda m: m(tokens, **theirs).logits, labels)
    strategy = strategies.data()
    strategy = parity.double(strategy) if hf.dtype == torch.float64 else strategy
    model = models.gpt2(config_from(hf.config.to_dict()), strategy)
    params = parity.to_params(parity.state_of(hf), model)
    batch = {"tokens": tokens, "labels": labels, **known}
    ours = parity.run_ours(model, sw.make_mesh({"data": 2}), params, batch, **known)
    assert len(ours.grads) == len(wanted.grads)
    parity.check(ours, wanted, tolerance, there)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_hugging_face(dtype: torch.dtype, tolerance: float) -> None:
    compare(hugging_face(dtype), tolerance)


@pytest.mark.parametrize("given", [False, True])
def test_padding_is_not_seen(given: bool) -> None:
    mask = torch.ones(4, 10, dtype=torch.int64)
    for row, count in enumerate((0, 1, 4, 9)):
        mask[row, :count] = 0
    positions = {"positions": (mask.cumsum(1) - 1).clamp(min=0)} if given else {}
    compare(hugging_face(torch.float64), 1e-10, mask=mask, **positions)


@pytest.mark.parametrize("name", parity.SHARDED)
def test_strategies_change_no_result(name: str) -> None:
    parity.check_sharded("gpt2", name)


def test_padding_changes_no_result() -> None:
    sizes: Any = {"layer": 2, "embed": 15, "heads": 3, "ffn": 10, "vocab": 23, "position": 12}
    batch = {k: v.clamp(max=22) for k, v in tiny.text_batch(4).items()}
    plain = models.gpt2(models.GPT2Config(**sizes), double(strategies.data()))
    params = tiny.drawn(plain)
    wanted = parity.run_ours(plain, sw.make_mesh({"data": 1}), params, batch)
    config = models.GPT2Config(**sizes, pad={"heads": 4, "ffn": 4, "vocab": 4})
    model = models.gpt2(config, double(strategies.tensor_1d()))
    padded = parity.to_params(parity.to_state(params, plain), model)
    ours = parity.run_ours(model, sw.make_mesh({"tensor": 4}), padded, batch)
    parity.check(ours, wanted, 1e-10)


COUNTS = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    assert models.gpt2(PRESETS[name], strategies.data()).num_parameters == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name: str) -> None:
    assert config_from(config_to(PRESETS[name])) == PRESETS[name]
