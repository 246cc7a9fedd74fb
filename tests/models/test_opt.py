"""OPT equals Hugging Face's, in both of its shapes, and itself under every strategy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import parity
import pytest
import torch
from tiny import TINY, drawn, padded_batch
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.opt import PRESETS, config_from, config_to, count_tokens

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "ffn_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 29,
    "max_position_embeddings": 16,
    "dropout": 0.1,
    "word_embed_proj_dim": 24,
    "pad_token_id": None,  # its row would have no gradient from the lookup there
    "bos_token_id": 2,
    "eos_token_id": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "as 125m": {},
    "as 350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "projected, norms ahead": {"word_embed_proj_dim": 16},
    "norms behind": {"do_layer_norm_before": False},
}


def reference(name: str) -> Any:
    """A Hugging Face model with weights that matter."""
    from transformers import OPTConfig, OPTForCausalLM

    return parity.redraw(OPTForCausalLM(OPTConfig(**{**SIZES, **CASES[name]})))


def inputs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(29, (2, 4, 10), generator=rng)
    labels[0, :3] = -100
    return tokens, labels


def compare(hf: Any, tolerance: float, mask: Tensor | None = None) -> None:
    """Logits, loss and every gradient of ours equal those of the Hugging Face model."""
    tokens, labels = inputs()
    batch, known = {"tokens": tokens, "labels": labels}, {}
    if mask is not None:
        batch = {**batch, "labels": labels.where(mask != 0, -100), "mask": mask}
        known = {"mask": mask}
    wanted = parity.run_reference(
        hf, lambda m: m(tokens, attention_mask=mask).logits, batch["labels"]
    )
    strategy = strategies.data()
    strategy = parity.double(strategy) if hf.dtype == torch.float64 else strategy
    model = models.opt(config_from(hf.config.to_dict()), strategy)
    params = parity.to_params(parity.state_of(hf), model)
    ours = parity.run_ours(model, sw.make_mesh({"data": 2}), params, batch, **known)
    assert ours.grads.keys() == wanted.grads.keys()
    parity.check(ours, wanted, tolerance, None if mask is None else mask != 0)


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face_in_float32(name: str) -> None:
    compare(reference(name), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face_in_float64(name: str) -> None:
    compare(reference(name).double(), 1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["as 125m", "as 350m"])
def test_padding_is_not_seen_and_not_counted(name: str, side: str) -> None:
    mask = torch.ones(4, 10, dtype=torch.int64)
    for row, count in enumerate((0, 1, 4, 9)):
        there = slice(0, count) if side == "left" else slice(10 - count, 10)
        mask[row, there] = 0
    compare(reference(name).double(), 1e-10, mask)


def test_positions_count_the_tokens_that_are_there() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    wanted = torch.tensor([[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, -1, -1]])
    assert torch.equal(count_tokens(mask), wanted)
    cut = sw.shard(mask, sw.make_mesh({"data": 3}), "batch/data seq")
    assert torch.equal(count_tokens(cut).full_tensor(), wanted)


def test_left_padding_shifts_nothing() -> None:
    hf = reference("as 125m").double()
    model = models.opt(config_from(hf.config.to_dict()), parity.double(strategies.data()))
    mesh = sw.make_mesh({"data": 1})
    params = sw.shard(parity.to_params(parity.state_of(hf), model), mesh, "...")
    tokens, _ = inputs()
    padded = torch.cat((torch.full((4, 3), 1), tokens), 1)
    mask = torch.cat((torch.zeros(4, 3), torch.ones(4, 10)), 1)
    alone = model.apply(params, sw.shard(tokens, mesh, "..."))
    beside = model.apply(params, sw.shard(padded, mesh, "..."), mask=sw.shard(mask, mesh, "..."))
    torch.testing.assert_close(
        beside.full_tensor()[:, 3:], alone.full_tensor(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", parity.SHARDED)
@pytest.mark.parametrize("family", ["opt", "opt post"])
def test_strategies_change_no_result(family: str, name: str) -> None:
    parity.check_sharded(family, name)


def test_dropout_is_equal_on_every_mesh() -> None:
    config = replace(TINY["opt"]().config, dropout=0.3)
    found = []
    for name in ("data", "tensor_3d"):
        axes, make = parity.SHARDED[name]
        model = models.opt(config, parity.double(make()))
        mesh, batch = sw.make_mesh(axes), padded_batch(12)
        layouts = model.strategy.layouts(model.declaration, config, mesh)
        params = sw.shard(drawn(model), mesh, layouts)
        given = {k: parity.place(v, mesh, model.strategy) for k, v in batch.items()}
        for key in (sw.random.key(5), None):
            found.append(model.loss(params, given, key=key).full_tensor().item())
    assert abs(found[0] - found[2]) < 1e-10
    assert abs(found[1] - found[3]) < 1e-10
    assert abs(found[0] - found[1]) > 1e-3


COUNTS = {"opt-125m": 125_239_296, "opt-350m": 331_196_416}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    assert models.opt(PRESETS[name], strategies.data()).num_parameters == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json_and_are_about_as_large_as_their_names(name: str) -> None:
    assert config_from(config_to(PRESETS[name])) == PRESETS[name]
    told = name.removeprefix("opt-")
    size = float(told[:-1]) * {"m": 1e6, "b": 1e9}[told[-1]]
    count = models.opt(PRESETS[name], strategies.data()).num_parameters
    assert abs(count / size - 1) < 0.06


@pytest.mark.parametrize("name", CASES)
def test_hugging_face_reads_the_config_that_we_write(name: str) -> None:
    hf = reference(name).config
    config = config_from(hf.to_dict())
    again = type(hf).from_dict(config_to(config))
    assert config_from(again.to_dict()) == config


REFUSED = {
    "activation": ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
    "biases": ({"enable_bias": False}, "enable_bias = False"),
    "gains": ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    "final norm": ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
    "head": ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    "heads": ({"num_attention_heads": 5}, "embed 24 is not a multiple of heads 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused(name: str) -> None:
    more, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        config_from({**SIZES, **more})


def test_an_eps_that_the_class_has_not_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="eps"):
        config_to(replace(config_from(SIZES), eps=1e-6))
