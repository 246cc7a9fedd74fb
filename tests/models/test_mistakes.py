"""What a model refuses, in words about the model: configs, strategies, tokens, sizes; and padding.

Each mistake is met where it is made, before anything is computed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import models, strategies

LLAMA = models.LlamaConfig(layer=1, embed=16, heads=4, kv_heads=2, ffn=32, vocab=61)
GPT2 = models.GPT2Config(layer=1, embed=8, heads=2, vocab=16, position=4)
wrong: Any = models  # untyped, for values that no type checker lets through
KEY = sw.random.key(0)
TOKENS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pad", "axes", "strategy"),
    [
        ({"kv_heads": 4, "vocab": 8, "ffn": 5}, {"x": 1}, strategies.data("x")),
        ({"kv_heads": 4, "vocab": 4}, {"tensor": 4}, strategies.tensor_1d()),
        ({"heads": 6, "vocab": 4}, {"tensor": 2}, strategies.tensor_1d(kv="replicate")),
        ({"vocab": 4}, {"data": 2, "tensor": 2}, strategies.fsdp() * strategies.tensor_1d()),
        ({"kv_heads": 4, "vocab": 4}, {"row": 2, "col": 2}, strategies.tensor_2d()),
    ],
)
@pytest.mark.parametrize("std", [None, 0.02])
def test_padded_weights_start_as_those_without_padding(
    pad: dict[str, int], axes: dict[str, int], strategy: sw.Strategy, std: float | None
) -> None:
    one = models.llama(LLAMA, strategies.data())
    if std is None:  # the deviation that follows from a contracted dim, which may be padded
        declared = sw.tree.map(lambda p: replace(p, init=sw.nn.fan_in()), one.declaration)
    else:
        declared = one.declaration
    plain = replace(one, declaration=declared).init(KEY, sw.make_mesh({"data": 1}))
    model = models.llama(replace(LLAMA, pad=pad), strategy)
    padded = replace(model, declaration=declared).init(KEY, sw.make_mesh(axes))
    for (path, a), b in zip(sw.tree.items(plain), sw.tree.leaves(padded), strict=True):
        want, found = a.full_tensor(), b.full_tensor()
        inside = tuple(slice(n) for n in want.shape)
        assert torch.equal(found[inside], want), path
        found[inside] = 0
        assert not found.any(), path


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: wrong.LlamaConfig(heads="4"), TypeError, "heads = '4'; expected an integer"),
        (lambda: wrong.LlamaConfig(embed=16.0), TypeError, "embed = 16.0; expected an integer"),
        (lambda: models.GPT2Config(embed=True), TypeError, "embed = True; expected an integer"),
        (lambda: wrong.OPTConfig(eps="x"), TypeError, "eps = 'x'; expected a number"),
        (lambda: wrong.LlamaConfig(tied=1), TypeError, "tied = 1; expected True or False"),
        (lambda: wrong.LlamaConfig(window=2.5), TypeError, "window = 2.5; expected an integer or"),
        (lambda: wrong.BERTConfig(pad={"vocab": "4"}), TypeError, "pad.vocab = '4'"),
        (lambda: wrong.PaLMConfig(pad={"vocab": 2.5}), TypeError, "pad.vocab = 2.5"),
        (lambda: wrong.ViTConfig(pad=3), TypeError, "pad = 3; expected dim to multiple"),
        (lambda: models.GPT2Config(dropout=1.5), ValueError, r"dropout = 1.5; .* \[0, 1\)"),
        (lambda: models.LlamaConfig(theta=0.0), ValueError, "theta = 0.0; expected above 0"),
        (lambda: models.LlamaConfig(eps=-1.0), ValueError, "eps = -1.0; expected at least 0"),
        (lambda: wrong.llama(LLAMA, "data"), TypeError, "llama: strategy = 'data'; expected a"),
        (lambda: wrong.gpt2(LLAMA, strategies.data()), TypeError, "expected a GPT2Config"),
    ],
)
def test_configs_and_strategies_of_a_wrong_kind(make: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_what_is_no_key_and_no_tokens() -> None:
    mesh = sw.make_mesh({"data": 2})
    bert = models.BERTConfig(layer=1, embed=8, heads=2, vocab=16, position=4)
    for model in (models.gpt2(GPT2, strategies.data()), models.bert(bert, strategies.data())):
        with pytest.raises(TypeError, match=r"key = 0; expected a key, such as random\.key"):
            model.init(0, mesh)  # pyright: ignore
        params = model.init(KEY, mesh)
        with pytest.raises(TypeError, match=r"tokens are a Tensor; .*sw\.shard"):
            model.apply(params, TOKENS)
        with pytest.raises(ValueError, match=r"shape \(4,\); expected \[batch seq\]"):
            model.apply(params, sw.shard(TOKENS[0], mesh))
        long = sw.shard(torch.zeros(2, 5, dtype=torch.int64), mesh)
        with pytest.raises(ValueError, match=r"5 tokens.*position = 4"):
            model.apply(params, long)
        with pytest.raises(sw.LayoutError, match=r"seq = 5, but .* position = 4"):
            model.check(mesh, batch=2, seq=5)
        model.check(mesh, batch=2, seq=4)
    with pytest.raises(TypeError, match="load: strategy = 'data'"):
        models.load(".", mesh, "data")  # pyright: ignore


def test_rotary_positions_have_no_end() -> None:
    config = replace(LLAMA, position=2)
    models.llama(config, strategies.data()).check(sw.make_mesh({"data": 2}), batch=2, seq=5)


@pytest.mark.parametrize("pad", [{"heads": 8}, {"heads": 3}, {"heads": 6, "kv_heads": 4}])
def test_heads_padded_away_from_their_keys_are_refused(pad: dict[str, int]) -> None:
    config, mesh = replace(LLAMA, vocab=64, pad=pad), sw.make_mesh({"tensor": 2})
    model = models.llama(config, strategies.tensor_1d())
    words = 'pad.kv_heads.*kv="replicate"'
    with pytest.raises(sw.LayoutError, match=words):
        model.check(mesh, batch=2, seq=4)
    with pytest.raises(sw.LayoutError, match=words):
        model.init(KEY, mesh)
    whole = models.llama(config, strategies.tensor_1d(kv="replicate"))
    whole.check(mesh, batch=2, seq=4)
    whole.apply(whole.init(KEY, mesh), sw.shard(TOKENS, mesh))


def test_palm_is_told_of_whole_keys() -> None:
    config = models.PaLMConfig(layer=1, embed=8, heads=4, head_dim=4, vocab=16)
    model, mesh = models.palm(config, strategies.tensor_1d()), sw.make_mesh({"tensor": 2})
    words = r"""'kv_heads' of size 1 .*kv="replicate\""""
    for run in (lambda: model.init(KEY, mesh), lambda: model.check(mesh, batch=2, seq=4)):
        with pytest.raises(sw.LayoutError, match=words):
            run()


@pytest.mark.parametrize("token", [-1, 61, 63])
def test_ids_in_the_padding_of_the_vocabulary_are_no_prompt(token: int) -> None:
    mesh = sw.make_mesh({"tensor": 2})
    model = models.llama(replace(LLAMA, pad={"vocab": 4}), strategies.tensor_1d())
    params = model.init(KEY, mesh)
    models.generate(model, params, torch.full((1, 2), 60), max_new_tokens=1)
    with pytest.raises(ValueError, match=f"token {token} is out of range; .* 61 tokens"):
        models.generate(model, params, torch.full((1, 2), token), max_new_tokens=1)


def test_a_model_and_its_config_can_be_copied() -> None:
    model = models.llama(replace(LLAMA, pad={"vocab": 4}), strategies.data())
    other = copy.deepcopy(model)
    assert other.config == model.config
    assert other.strategy == model.strategy
    assert hash(other.config) == hash(model.config)
