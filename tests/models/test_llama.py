"""Llama and its kin equal Hugging Face's, and themselves under every strategy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import parity
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.llama import PRESETS, config_from, config_to

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 29,
    "max_position_embeddings": 16,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-5,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class, what differs from SIZES
    "llama 1": ("Llama", {"num_key_value_heads": 6}),
    "llama 2": ("Llama", {}),
    "llama 3": ("Llama", {"rope_scaling": tiny.LLAMA3, "tie_word_embeddings": True}),
    "other head_dim": ("Llama", {"head_dim": 8}),
    "linear": ("Llama", {"rope_scaling": LINEAR}),
    "dynamic": ("Llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 6}),
    "yarn": ("Llama", {"rope_scaling": YARN}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen 2": ("Qwen2", {}),
    "qwen 3": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}
MESH = {"data": 2}


def reference(name: str) -> Any:
    """A Hugging Face model with weights that matter."""
    import transformers

    kind, more = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    return parity.redraw(getattr(transformers, f"{kind}ForCausalLM")(config))


def inputs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(29, (2, 4, 10), generator=rng)
    labels[0, :3] = -100
    return tokens, labels


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's norms in float64: its own round to float32 there."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


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
    model = models.llama(config_from(hf.config.to_dict()), strategy)
    params = parity.to_params(parity.state_of(hf), model)
    ours = parity.run_ours(model, sw.make_mesh(MESH), params, batch, **known)
    assert ours.grads.keys() == wanted.grads.keys()
    parity.check(ours, wanted, tolerance, None if mask is None else mask != 0)


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face_in_float32(name: str) -> None:
    compare(reference(name), 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("exact_norms")
def test_equals_hugging_face_in_float64(name: str) -> None:
    # the dynamic base is a float32 there
    compare(reference(name).double(), 1e-6 if name == "dynamic" else 1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama 2", "mistral"])
def test_padding_is_not_seen(name: str, side: str) -> None:
    mask = torch.ones(4, 10, dtype=torch.int64)
    for row, count in enumerate((0, 1, 4, 9)):
        there = slice(0, count) if side == "left" else slice(10 - count, 10)
        mask[row, there] = 0
    compare(reference(name), 1e-5, mask)


@pytest.mark.parametrize("name", parity.SHARDED)
@pytest.mark.parametrize("family", ["llama1", "llama3", "qwen"])
def test_strategies_change_no_result(family: str, name: str) -> None:
    parity.check_sharded(family, name)


HEADS = {  # 9 heads in groups of 3, as SmolLM2 has: axes of 2 and 4 divide neither 9 nor 3
    "padded heads, whole keys": ({"heads": 4}, "replicate"),
    "padded groups": ({"kv_heads": 4}, "cut"),
    "padded heads beyond padded groups": ({"kv_heads": 4, "heads": 16}, "replicate"),
}
UNDER: dict[str, tuple[dict[str, int], parity.Maker]] = {
    "tensor_1d of 2": ({"tensor": 2}, strategies.tensor_1d),
    "tensor_1d of 4": ({"tensor": 4}, strategies.tensor_1d),
    **{name: parity.SHARDED[name] for name in ("tensor_2d, streamed", "tensor_3d")},
    **{name: parity.SHARDED[name] for name in ("tensor_2p5d", "fsdp * tensor_1d")},
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_do_not_divide_are_padded(name: str, under: str) -> None:
    pad, kv = HEADS[name]
    axes, make = UNDER[under]
    config = models.LlamaConfig(
        layer=2, embed=16, heads=9, kv_heads=3, head_dim=4, ffn=10, vocab=23, position=12,
        qkv_bias=True,
    )  # fmt: skip
    batch = {k: v.clamp(max=22) for k, v in tiny.padded_batch(8).items()}
    plain = models.llama(config, parity.double(strategies.data()))
    params = tiny.drawn(plain)
    one = sw.make_mesh({"data": 1})
    wanted = parity.run_ours(plain, one, params, batch, mask=batch["mask"])

    padded = replace(config, pad={**pad, "ffn": 4, "vocab": 4})
    model = models.llama(padded, parity.double(make(kv=kv)))
    laid = parity.to_params(parity.to_state(params, plain), model)
    ours = parity.run_ours(model, sw.make_mesh(axes), laid, batch, mask=batch["mask"])
    parity.check(ours, wanted, 1e-10)


def test_given_positions_decide_what_is_seen() -> None:
    """Tokens in another order, with their positions, have the same logits in that order."""
    case = tiny.TINY["llama1"]()
    model = case.make(case.config, parity.double(strategies.data()))
    mesh = sw.make_mesh({"data": 2})
    params = sw.shard(tiny.drawn(model), mesh, "...")
    tokens = case.batch(4)["tokens"]
    order = torch.tensor([0, 11, 3, 7, 1, 2, 4, 10, 5, 9, 8, 6])
    place = model.strategy["tokens"]
    straight = model.apply(params, sw.shard(tokens, mesh, place)).full_tensor()
    mixed = model.apply(params, sw.shard(tokens[:, order], mesh, place), positions=order)
    torch.testing.assert_close(mixed.full_tensor(), straight[:, order], rtol=1e-12, atol=1e-12)


COUNTS = {
    "llama-7b": 6_738_415_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    assert models.llama(PRESETS[name], strategies.data()).num_parameters == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name: str) -> None:
    assert config_from(config_to(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("name", CASES)
def test_hugging_face_reads_the_config_that_we_write(name: str) -> None:
    import transformers

    hf = reference(name).config
    config = config_from(hf.to_dict())
    again = type(hf).from_dict(config_to(config))
    assert config_to(config)["model_type"] == hf.model_type
    assert config_from(again.to_dict()) == config
    assert again.rope_parameters == {"rope_type": "default", **hf.rope_parameters}
    assert hasattr(transformers, config_to(config)["architectures"][0])


def test_both_spellings_of_rotary_positions_are_read() -> None:
    old = {**SIZES, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in SIZES.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    first, second = config_from(old), config_from(new)
    assert first.theta == second.theta == 500.0
    assert first.scaling == {"type": "linear", "factor": 2.0}
    assert second.scaling == {"rope_type": "linear", "factor": 2.0}


def test_the_older_key_of_rotary_positions_wins_as_in_transformers() -> None:
    import transformers

    both: dict[str, Any] = {
        **SIZES,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    theirs = transformers.LlamaConfig(**copy.deepcopy(both)).rope_parameters
    assert theirs["rope_type"] == "linear"
    assert config_from(both).scaling == {"rope_type": "linear", "factor": 2.0}
    both["rope_scaling"] = {"rope_type": "longrope", "factor": 2.0}
    with pytest.raises(ValueError, match="longrope"):
        config_from(both)


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "type": ({"model_type": "lama"}, "model_type 'lama' is unknown"),
    "waves": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "lacking": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "windows": ({"model_type": "qwen2", "use_sliding_window": True}, "windows in some layers"),
    "biases": ({"model_type": "mistral", "mlp_bias": True}, "which its class has not"),
    "heads": ({"num_key_value_heads": 4}, "heads 6 is not a multiple of kv_heads 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused(name: str) -> None:
    more, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        config_from({**SIZES, **more})


def test_a_missing_size_is_named() -> None:
    with pytest.raises(KeyError, match="hidden_size"):
        config_from({k: v for k, v in SIZES.items() if k != "hidden_size"})


def test_switches_that_no_class_has_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="no Hugging Face class"):
        config_to(replace(config_from(SIZES), qk_norm=True, mlp_bias=True))
