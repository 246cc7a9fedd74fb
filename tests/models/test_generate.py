"""Decoding with a cache, greedy and drawn, against transformers and the full forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import redraw
from processes import launch
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.generate import choose

COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 23}
TOKENS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **COMMON,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
    "mistral": (  # sees its last 4 tokens only
        "MistralForCausalLM",
        "MistralConfig",
        {
            **COMMON,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "sliding_window": 4,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 23, "n_positions": 64},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **COMMON,
            "hidden_size": 16,
            "ffn_dim": 32,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
    ),
}
MESHES: dict[str, tuple[dict[str, int], sw.Strategy]] = {
    "one": ({"data": 1}, strategies.data()),
    "data": ({"data": 2}, strategies.data()),
    "1d": ({"tensor": 2}, strategies.tensor_1d()),
    "whole kv": ({"tensor": 4}, strategies.tensor_1d(kv="replicate")),
    "fsdp": ({"data": 4}, strategies.fsdp()),
    "fsdp x 1d": ({"data": 2, "tensor": 2}, strategies.fsdp() * strategies.tensor_1d()),
    "3d": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d()),
}
F64 = torch.float64
DOUBLE = sw.Precision(F64, F64, F64)
PAD = {"vocab": 4}
Find = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """Name to a random model of transformers in float64, and its folder; made once."""
    import transformers

    made: dict[str, tuple[Any, Path]] = {}

    def find(name: str) -> tuple[Any, Path]:
        if name not in made:
            cls, config, arguments = REFERENCES[name]
            settings = getattr(transformers, config)(**arguments, **TOKENS)
            module = redraw(getattr(transformers, cls)(settings).to(F64), std=0.7)
            for where, bias in module.named_parameters():
                if where.endswith(("ln_f.bias", "decoder.final_layer_norm.bias")):
                    bias.data *= 0.05  # else it alone decides each token
            path = tmp_path_factory.mktemp("hf") / name
            module.save_pretrained(path)
            made[name] = module, path
        return made[name]

    return find


def opened(path: Path, on: str) -> tuple[models.Model, Any, sw.Mesh]:
    axes, strategy = MESHES[on]
    mesh = sw.make_mesh(axes)
    model, params = models.load(path, mesh, strategy.replace(precision=DOUBLE), pad=PAD)
    return model, params, mesh


def prompts(rows: int = 4, length: int = 5) -> Tensor:
    return torch.randint(1, 23, (rows, length), generator=torch.Generator().manual_seed(2))


def greedy(module: Any, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    """What transformers generates."""
    return module.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False)


@pytest.mark.parametrize("on", MESHES)
@pytest.mark.parametrize("name", REFERENCES)
def test_greedy_tokens_are_those_of_transformers(name: str, on: str, folders: Find) -> None:
    module, path = folders(name)
    model, params, _ = opened(path, on)
    tokens = prompts()
    wanted = greedy(module, tokens, torch.ones_like(tokens), 12)
    assert wanted[:, 5:].unique(dim=0).shape[0] > 2  # answers differ,
    assert wanted[:, 5:].unique().numel() > 2  # and are not one token over and over
    assert torch.equal(models.generate(model, params, tokens, max_new_tokens=12), wanted)


@pytest.mark.parametrize("on", ["one", "fsdp x 1d", "3d"])
@pytest.mark.parametrize("name", REFERENCES)
def test_shorter_prompts_are_padded_on_the_left(name: str, on: str, folders: Find) -> None:
    module, path = folders(name)
    model, params, _ = opened(path, on)
    tokens, mask = prompts(), torch.ones(4, 5, dtype=torch.int64)
    mask[1, :3], mask[2, :1] = 0, 0
    tokens = torch.where(mask == 1, tokens, 0)
    wanted = greedy(module, tokens, mask, 8)
    found = models.generate(model, params, tokens, max_new_tokens=8, mask=mask)
    assert torch.equal(found, wanted)
    alone = models.generate(model, params, tokens[1:2, 3:], max_new_tokens=8)
    assert torch.equal(alone[0], found[1, 3:])


@pytest.mark.parametrize("on", ["1d", "fsdp", "3d"])
@pytest.mark.parametrize("name", [*REFERENCES, "palm"])
def test_cached_logits_equal_the_full_forward(name: str, on: str, folders: Find) -> None:
    if name == "palm":
        axes, strategy = MESHES[on]
        mesh = sw.make_mesh(axes)
        if on != "fsdp":  # one key-value head
            kinds = {"1d": strategies.tensor_1d, "3d": strategies.tensor_3d}
            strategy = kinds[on](kv="replicate")
        config = models.PaLMConfig(layer=2, embed=16, heads=4, head_dim=4, vocab=24)
        model = models.palm(config, strategy.replace(precision=DOUBLE))
        params = model.init(sw.random.key(0), mesh)
        params = sw.tree.map(lambda p: p * 10 if p.ndim > 1 else p, params)
    else:
        model, params, mesh = opened(folders(name)[1], on)
    tokens = prompts(4, 9)
    given = sw.shard(tokens, mesh, model.strategy["tokens"])
    wanted = model.apply(params, given).full_tensor()
    cache = model.cache(4, 11, mesh)
    found, start = [], 0
    for size in (4, 1, 1, 3):  # a prompt, single tokens, a later chunk; two slots stay empty
        piece = sw.shard(tokens[:, start : start + size], mesh, model.strategy["tokens"])
        logits, cache = model.decode(params, piece, cache)  # type: ignore[misc]
        found.append(logits.full_tensor())
        start += size
    assert cache["used"] == 9
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"9 \+ 3 tokens do not fit in a cache of length 11"):
        model.decode(params, piece, cache)  # type: ignore[misc]


def test_a_cache_lies_as_the_kv_row_says_and_a_step_keeps_its_types(folders: Find) -> None:
    model, params, mesh = opened(folders("llama")[1], "fsdp x 1d")
    cache = model.cache(4, 8, mesh)
    assert str(cache["k"]) == "f64[2 4/data 8 2/tensor 4]"
    piece = sw.shard(prompts(4, 1), mesh, model.strategy["tokens"])
    _, after = model.decode(params, piece, cache)  # type: ignore[misc]
    for name in "kv":
        assert after[name].layout is cache[name].layout
        assert after[name].dtype == cache[name].dtype
        assert not cache[name].full_tensor().any()  # nothing is written in place
    with pytest.raises(ValueError, match="2 sequences, but the cache was made for 4"):
        model.decode(params, sw.shard(prompts(2), mesh, "batch/data seq"), after)  # type: ignore


def test_a_step_moves_one_token_whatever_the_cache_holds(folders: Find) -> None:
    model, params, mesh = opened(folders("llama")[1], "1d")
    cache = model.cache(2, 32, mesh)
    seen = []
    for size in (7, 1, 1):
        piece = sw.shard(prompts(2, size), mesh, model.strategy["tokens"])
        planned = sw.plan(model.decode, params, piece, cache)  # type: ignore[arg-type]
        with sw.record() as plan:
            _, cache = model.decode(params, piece, cache)  # type: ignore[misc]
        seen.append(plan.elements())
        assert planned.elements() == plan.elements()
    assert seen[1] == seen[2] == seen[0] / 7
    assert seen[1] == (2 * 2 + 1) * 2 * 16  # two all_reduces a layer and the embedding's


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}])
def test_draws_are_equal_on_every_mesh(options: dict[str, Any], folders: Find) -> None:
    path = folders("llama")[1]
    found = []
    for on in ("one", "1d", "fsdp", "3d"):
        axes, strategy = MESHES[on]
        mesh = sw.make_mesh(axes)
        pad = {} if on in ("one", "fsdp") else PAD  # other padding, the same draws
        model, params = models.load(path, mesh, strategy.replace(precision=DOUBLE), pad=pad)
        for seed in (0, 1):
            key = sw.random.key(seed)
            found.append(
                models.generate(
                    model,
                    params,
                    prompts(3),
                    max_new_tokens=10,
                    key=key,
                    temperature=2.0,
                    **options,
                )
            )
    for i, other in enumerate(found):
        assert torch.equal(other, found[i % 2])
    assert not torch.equal(found[0], found[1])
    assert int(found[0].max()) < 23


def chi_square(draws: Tensor, expected: Tensor) -> float:
    """Of counts against probabilities; those of zero must not be drawn at all."""
    counts = torch.bincount(draws, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    wanted = (expected * len(draws))[expected > 0]
    return float(((counts[expected > 0] - wanted) ** 2 / wanted).sum())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 5),
        ({"top_k": 3}, 3),
        ({"top_p": 0.6}, 2),  # 0.5 + 0.24: the first alone does not reach it
        ({"top_p": 0.45}, 1),
        ({"top_k": 4, "top_p": 0.9}, 3),  # of the four that are left: 0.52 + 0.25 + 0.16
    ],
)
def test_the_distribution_of_draws(options: dict[str, Any], kept: int) -> None:
    p = torch.tensor([0.15, 0.5, 0.04, 0.24, 0.07])
    temperature = 1.7
    logits = (p.log() * temperature).expand(20_000, -1)
    padded = torch.nn.functional.pad(logits, (0, 1), value=50.0)  # padding, never drawn
    order = p.argsort(descending=True)
    expected = torch.zeros(5, dtype=F64)
    expected[order[:kept]] = p[order[:kept]].double()
    expected /= expected.sum()
    x = sw.shard(padded, sw.make_mesh({"data": 2, "tensor": 3}), "batch/data vocab/tensor")
    drawn = choose(x, sw.random.key(3), 5, temperature, **options).full_tensor()
    assert chi_square(drawn, expected) < 18.5  # 1 in 1000 for 4 degrees of freedom
    # one row, many keys, as in the steps of one answer
    row = sw.shard(padded[:1], sw.make_mesh({"tensor": 2}), "batch vocab/tensor")
    keys = sw.random.split(sw.random.key(4), 300)
    drawn = torch.cat([choose(row, k, 5, temperature, **options).full_tensor() for k in keys])
    assert chi_square(drawn, expected) < 18.5


def test_a_wrong_distribution_would_show() -> None:
    p = torch.tensor([0.15, 0.5, 0.04, 0.24, 0.07])
    x = sw.shard(p.log().expand(20_000, -1), sw.make_mesh({"data": 2}), "batch/data vocab")
    drawn = choose(x, sw.random.key(3), 5, 1.1).full_tensor()
    assert chi_square(drawn, p.double()) > 18.5


def test_greedy_ties_go_to_the_first_and_padding_is_never_chosen() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 9.0], [-9.0, -9.0, -8.0, 0.0]])
    for layout in ("b v", "b v/tensor"):
        on = sw.shard(x, sw.make_mesh({"tensor": 2}), layout)
        assert choose(on, None, 3).full_tensor().tolist() == [1, 2]


def answers(index: int) -> list[list[int]]:
    """Greedy and drawn tokens of a small model on a mesh of this process, or of these processes."""
    kinds = (strategies.fsdp() * strategies.tensor_1d(), strategies.tensor_1d())
    axes: dict[str, int] = ({"data": 2, "tensor": 2}, {"tensor": 4})[index]
    config = models.GPT2Config(layer=2, embed=16, heads=4, vocab=22, position=16, pad={"vocab": 8})
    model = models.gpt2(config, kinds[index].replace(precision=DOUBLE))
    params = model.init(sw.random.key(0), sw.make_mesh(axes))
    params = sw.tree.map(lambda p: p * 20 if p.ndim > 1 else p, params)
    options: dict[str, Any] = {
        "key": sw.random.key(1),
        "temperature": 1.0,
        "top_k": 9,
        "top_p": 0.9,
    }
    return [
        row
        for given in ({}, options)
        for row in models.generate(
            model, params, prompts(3) % config.vocab, max_new_tokens=8, **given
        ).tolist()
    ]


@pytest.mark.processes
@pytest.mark.parametrize("index", [0, 1])
def test_processes_agree_on_each_token(index: int) -> None:
    wanted = answers(index)
    assert len({tuple(row[5:]) for row in wanted}) > 3
    for process in launch(answers, 4, index):
        assert process.value == wanted


def test_stop_ends_sequences_one_by_one(folders: Find) -> None:
    model, params, _ = opened(folders("gpt2")[1], "data")
    tokens = prompts()
    free = models.generate(model, params, tokens, max_new_tokens=12)
    stop = int(free[0, 7])
    found = models.generate(model, params, tokens, max_new_tokens=12, stop=stop)
    assert found.shape[1] <= 17
    ends = 0
    for row, whole in zip(found, free, strict=True):
        at = next((i for i in range(5, 17) if whole[i] == stop), 17)
        ends += at < 17
        known = min(at + 1, found.shape[1])
        assert torch.equal(row[:known], whole[:known])
        assert bool((row[known:] == stop).all())
    assert ends
    every = models.generate(model, params, tokens, max_new_tokens=12, stop=range(23))
    assert every.shape == (4, 6)  # all ended at once


def test_any_number_of_prompts(folders: Find) -> None:
    model, params, _ = opened(folders("opt")[1], "3d")
    whole = models.generate(model, params, prompts(4), max_new_tokens=6)
    for rows in (1, 3):
        assert torch.equal(
            models.generate(model, params, prompts(4)[:rows], max_new_tokens=6), whole[:rows]
        )


def test_what_cannot_be_generated_is_refused(folders: Find) -> None:
    model, params, mesh = opened(folders("gpt2")[1], "1d")
    tokens = prompts(2)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            models.generate(model, params, tokens, **{"max_new_tokens": 2, **options})

    refused("needs a key", temperature=1.0)
    refused("are negative", temperature=-1.0)
    refused("are negative", max_new_tokens=-1)
    refused("top_k = 0", top_k=0)
    refused("top_p = 1.5", top_p=1.5)
    refused("has 64 positions", max_new_tokens=60)
    refused("true at each last token", mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))
    with pytest.raises(ValueError, match="must be"):
        models.generate(model, params, tokens[0], max_new_tokens=2)
    cut = models.gpt2(model.config, strategies.sequence_parallel().replace(precision=DOUBLE))
    with pytest.raises(ValueError, match=r"cuts the sequence.*tensor_1d"):
        models.generate(cut, params, tokens, max_new_tokens=2)
    encoder = models.bert(
        models.BERTConfig(layer=1, embed=8, heads=2, vocab=16, position=4), strategies.data()
    )
    with pytest.raises(TypeError, match="does not decode"):
        models.generate(encoder, params, tokens, max_new_tokens=2)
    with pytest.raises(TypeError, match="does not decode"):
        encoder.cache(1, 4, mesh)
