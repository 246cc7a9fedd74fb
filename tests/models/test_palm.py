"""PaLM equals a plain reading of the paper and palm-pytorch, and itself under every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.palm import PRESETS, config_from, config_to

ARGUMENTS = {"dim": 24, "num_tokens": 29, "depth": 2, "dim_head": 8, "heads": 6, "ff_mult": 2}


def turned(x: Tensor) -> Tensor:
    """Rotary positions of [batch seq ... head_dim] by complex numbers: half j with half j + d/2."""
    half = x.shape[-1] // 2
    frequency = 1 / 10000 ** (torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    angle = torch.arange(x.shape[1]).float()[:, None] * frequency
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    turn = turn.reshape(1, x.shape[1], *[1] * (x.ndim - 3), half)
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((y.real, y.imag), -1)


class Plain(nn.Module):
    """The model in plain torch, apart from palm-pytorch, with its names of tensors."""

    def __init__(self, heads: int, head_dim: int, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.tensors = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(v.clone()) for name, v in values.items()}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        p = {name.replace("/", "."): v for name, v in self.tensors.items()}
        depth = max(int(name.split(".")[0]) for name in p) - 1
        x = p["0.weight"][tokens]
        seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for number in range(1, depth + 1):
            b = {k.removeprefix(f"{number}.fn."): v for k, v in p.items()}
            h = F.layer_norm(x, x.shape[-1:], b["norm.gamma"])
            inner, d = self.heads * self.head_dim, self.head_dim
            fused = h @ b["fused_attn_ff_proj.weight"].T
            wide = (fused.shape[-1] - inner - 2 * d) // 2
            q, k, v, value, gate = fused.split((inner, d, d, wide, wide), -1)
            q = turned(q.unflatten(-1, (self.heads, d)))
            scores = torch.einsum("bshd,btd->bhst", q, turned(k)) / d**0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            a = torch.einsum("bhst,btd->bshd", weights, v).flatten(-2)
            mixed = gate * torch.sigmoid(gate) * value
            x = x + a @ b["attn_out.weight"].T + mixed @ b["ff_out.1.weight"].T
        x = F.layer_norm(x, x.shape[-1:], p[f"{depth + 1}.gamma"])
        return x @ p["0.weight"].T

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name.replace("/", "."): v for name, v in self.tensors.items()}


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of weights that matter."""
    model = models.palm(config_from(ARGUMENTS), strategies.data())
    sizes = model.config.true_sizes
    zeros = sw.tree.map(lambda d: torch.zeros(d.shape(sizes)), model.declaration)
    rng = torch.Generator().manual_seed(0)

    def draw(name: str, like: Tensor) -> Tensor:
        value = torch.randn(like.shape, generator=rng, dtype=torch.float64)
        return (1 + 0.2 * value if name.endswith("gamma") else 0.25 * value).to(dtype)

    return {name: draw(name, v) for name, v in parity.to_state(zeros, model).items()}


def inputs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(29, (2, 4, 10), generator=rng)
    labels[0, :3] = -100
    return tokens, labels


def compare(module: nn.Module, state: Mapping[str, Tensor], tolerance: float) -> None:
    """Logits, loss and every gradient of ours equal those of the reference."""
    tokens, labels = inputs()
    wanted = parity.run_reference(module, lambda m: m(tokens), labels)
    strategy = strategies.data()
    is_double = state["0.weight"].dtype == torch.float64
    model = models.palm(config_from(ARGUMENTS), parity.double(strategy) if is_double else strategy)
    params = parity.to_params(state, model)
    ours = parity.run_ours(
        model, sw.make_mesh({"data": 2}), params, {"tokens": tokens, "labels": labels}
    )
    assert ours.grads.keys() == state.keys()
    parity.check(ours, wanted, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_plain_reading(dtype: torch.dtype) -> None:
    state = weights(dtype)
    compare(Plain(6, 8, state), state, 1e-5 if dtype == torch.float32 else 1e-10)


def test_equals_palm_pytorch() -> None:
    oracle = pytest.importorskip("palm_pytorch", reason="pip install --no-deps palm-pytorch")
    module = oracle.PaLM(**ARGUMENTS)
    state = weights(torch.float32)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    buffers = ("beta", "inv_freq", "3.gamma", "4.weight")  # the head is the table of tokens
    assert all(name.endswith(buffers) for name in missing), missing
    compare(module, state, 1e-5)


@pytest.mark.parametrize("name", parity.SHARDED)
def test_strategies_change_no_result(name: str) -> None:
    parity.check_sharded("palm", name)


def test_attention_and_mlp_share_one_reduction() -> None:
    config = models.PaLMConfig(layer=3, embed=16, heads=4, head_dim=4, vocab=24)
    model = models.palm(config, strategies.tensor_1d(kv="replicate"))
    mesh = sw.make_mesh({"tensor": 4})
    params = model.init(sw.random.key(0), mesh)
    tokens = sw.zeros((2, 6), mesh, "batch seq", dtype=torch.int64)
    with sw.record() as plan:
        model.apply(params, tokens)
    assert plan.count(kind="all_reduce", phase="forward") == 3 + 1  # and the embedding's


def test_published_size_has_the_published_parameters() -> None:
    assert models.palm(PRESETS["palm-8b"], strategies.data()).num_parameters == 8_632_012_800


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json_and_are_about_as_large_as_their_names(name: str) -> None:
    assert config_from(config_to(PRESETS[name])) == PRESETS[name]
    size = float(name.removeprefix("palm-")[:-1]) * 1e9
    count = models.palm(PRESETS[name], strategies.data()).num_parameters
    assert abs(count / size - 1) < 0.08


def test_an_ffn_that_the_class_has_not_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="ffn 30 is not a multiple of embed 24"):
        config_to(replace(config_from(ARGUMENTS), ffn=30))


def test_a_missing_size_is_named() -> None:
    with pytest.raises(KeyError, match="depth"):
        config_from({k: v for k, v in ARGUMENTS.items() if k != "depth"})
