"""A real pretrained model: SmolLM2-135M-Instruct on simulated meshes against transformers.

Its 9 query and 3 key-value heads divide neither 2 nor 4: they are padded, or the keys and values
are whole on each device.
"""

from __future__ import annotations

import filecmp
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import smollm
import torch
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies

NEW = 12  # tokens of each answer
WINDOWS, LENGTH = 4, 512  # of the text: 2,048 tokens
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Tell me a story about a fox.",
    "Who wrote Hamlet?",
)
MESHES: dict[str, tuple[dict[str, int], sw.Strategy, dict[str, int]]] = {
    "1d, 4 devices, padded": ({"tensor": 4}, strategies.tensor_1d(), {"kv_heads": 4}),
    "1d, 4 devices, whole": (
        {"tensor": 4}, strategies.tensor_1d(kv="replicate"), {"heads": 4},
    ),
    "1d, 2 devices, padded": ({"tensor": 2}, strategies.tensor_1d(), {"kv_heads": 2}),
    "1d, 2 devices, whole": (
        {"tensor": 2}, strategies.tensor_1d(kv="replicate"), {"heads": 2},
    ),
    "fsdp": ({"data": 4}, strategies.fsdp(), {}),
    "3d": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d(), {"kv_heads": 2}),
}  # fmt: skip


class Known(NamedTuple):
    """What transformers says of the model.

    Attributes:
        path: its folder.
        prompts: [4, longest], padded on the left.
        mask: which of their tokens are there.
        answers: prompts and `NEW` greedy tokens.
        text: tokens of Hamlet [WINDOWS, LENGTH].
        losses: negative log-likelihood of each but the first [WINDOWS, LENGTH - 1].
        said: the answers as text.
    """

    path: Path
    prompts: Tensor
    mask: Tensor
    answers: Tensor
    text: Tensor
    losses: Tensor
    said: list[str]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    """The model as a folder, and what transformers computes with it; once."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("smollm")
    file = smollm.to_folder(path)
    tokens = smollm.tokenizer(file)
    asked = [tokens.encode(smollm.chat(q)).ids for q in QUESTIONS]
    longest = max(map(len, asked))
    prompts = torch.tensor([[0] * (longest - len(ids)) + ids for ids in asked])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in asked])
    ids = tokens.encode(smollm.hamlet()[:12_000]).ids
    text = torch.tensor(ids[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)
    module: Any = LlamaForCausalLM.from_pretrained(path).eval()
    module.generation_config.eos_token_id = None  # to the full length
    module.generation_config.pad_token_id = 0
    with torch.no_grad():
        answers = module.generate(prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        losses = torch.stack(
            [
                torch.nn.functional.cross_entropy(module(w[None]).logits[0, :-1], w[1:],
                                                  reduction="none")
                for w in text
            ]
        )  # fmt: skip
    said = [tokens.decode(row[longest:].tolist()) for row in answers]
    yield Known(path, prompts, mask, answers, text, losses, said)
    shutil.rmtree(path)  # half a gigabyte


def opened(known: Known, on: str) -> tuple[models.Model, Any, sw.Mesh]:
    axes, strategy, pad = MESHES[on]
    mesh = sw.make_mesh(axes)
    model, params = models.load(known.path, mesh, strategy, pad=pad)
    return model, params, mesh


def perplexity(model: models.Model, params: Any, mesh: sw.Mesh, text: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first of a window."""
    labels = torch.cat([text[:, 1:], torch.full((len(text), 1), -100)], 1)
    batch = sw.shard({"tokens": text, "labels": labels}, mesh, model.strategy["tokens"])
    with torch.no_grad():
        return math.exp(model.loss(params, batch).full_tensor().item())


def test_the_model_is_the_one_that_was_trained(known: Known) -> None:
    assert known.said[0].startswith("The capital of France is Paris.")
    assert 20 < float(known.losses.mean().exp()) < 30


@pytest.mark.parametrize(
    "on",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "2 devices" in name else [])
        for name in MESHES
    ],
)
def test_answers_and_perplexity_are_those_of_transformers(on: str, known: Known) -> None:
    model, params, mesh = opened(known, on)
    found = models.generate(model, params, known.prompts, max_new_tokens=NEW, mask=known.mask)
    assert torch.equal(found, known.answers)
    length = 64  # of each window; all of it in the tests below
    wanted = float(known.losses[:, : length - 1].mean().exp())
    assert abs(perplexity(model, params, mesh, known.text[:, :length]) / wanted - 1) < 1e-3


@pytest.mark.parametrize(
    "on",
    [pytest.param(name, marks=[] if name == "fsdp" else [pytest.mark.slow]) for name in MESHES],
)
def test_perplexity_of_2048_tokens(on: str, known: Known) -> None:
    model, params, mesh = opened(known, on)
    wanted = float(known.losses.mean().exp())
    assert abs(perplexity(model, params, mesh, known.text) / wanted - 1) < 1e-3


def test_it_is_written_back_bit_by_bit(known: Known, tmp_path: Path) -> None:
    model, params, _ = opened(known, "1d, 4 devices, padded")
    models.save(tmp_path / "out", model, params)
    written, source = (p / "model.safetensors" for p in (tmp_path / "out", known.path))
    try:
        assert filecmp.cmp(written, source, shallow=False)
    finally:
        shutil.rmtree(tmp_path / "out")
