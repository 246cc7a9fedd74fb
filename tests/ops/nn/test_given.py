"""Arguments that do not fit: one error in the words of the function that was called."""

from __future__ import annotations

import pytest
import torch
from gallery import mesh

import shardwise as sw
from shardwise import nn, ops

P = torch.ones(4, 4)
X = sw.shard(P, mesh(a=2))
IDS = sw.shard(torch.arange(4), X.mesh)
KEY = sw.random.key(0)
PLAIN = {
    "einsum: an operand": lambda: ops.einsum("m k -> k", P),
    "einsum: an operand must be a ShardedTensor, got no operands": lambda: ops.einsum("m k -> k"),
    "matmul: an operand": lambda: ops.matmul(P, P),
    "linear: an operand": lambda: ops.linear(P, P),
    "dense: an operand": lambda: nn.dense(P, P),
    "layer_norm: x": lambda: nn.layer_norm(P),
    "rms_norm: x": lambda: nn.rms_norm(P),
    "dropout: x": lambda: nn.dropout(P, 0.5, KEY),
    "embedding: table": lambda: nn.embedding(IDS, P),
    "cross_entropy: logits": lambda: nn.cross_entropy(P, IDS),
    "cross_entropy: labels": lambda: nn.cross_entropy(X, torch.arange(4)),
    "log_prob: labels": lambda: nn.log_prob(X, torch.arange(4)),
    "rope: x": lambda: nn.rope(P[None, None], torch.arange(1)),
    "patch_embedding: images": lambda: nn.patch_embedding(P[None, None], X, patch=2),
}


@pytest.mark.parametrize("words", PLAIN)
def test_plain_tensors_are_refused_by_name(words):
    with pytest.raises(TypeError, match=words) as caught:
        PLAIN[words]()
    assert "sw.shard(" in str(caught.value)


FOUR = sw.shard(torch.ones(2, 8, 4, 4), X.mesh)
WRONG = {
    r"labels \[3\] must be \[4\]": lambda: nn.cross_entropy(X, sw.shard(torch.arange(3), X.mesh)),
    r"rope: positions \[5\] must be \[8\]": lambda: nn.rope(FOUR, torch.arange(5)),
    "einsum: unknown save 'x'": lambda: ops.einsum("m k -> m", X, save="x"),
    "dense: inputs=0 must be at least 1": lambda: nn.dense(X, X, inputs=0),
    r"dense: b \[1\] must be \[4\]": lambda: nn.dense(X, X, torch.ones(1)),
    r"dense: b \[2, 4\] must be \[4\]": lambda: nn.dense(X, (X, X), torch.ones(2, 4)),
    "cannot read '=>'": lambda: nn.Param("embed => x"),
    "has 'embed' twice": lambda: nn.Param("embed -> embed"),
    "has no dims": lambda: nn.Param(""),
    "nothing before its arrow": lambda: nn.Param("-> embed"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_a_value_error(words):
    with pytest.raises(ValueError, match=words):
        WRONG[words]()


def test_dtypes_and_ids():
    half = X.to(torch.bfloat16)
    for method in ("direct", "streamed", "ring"):
        with pytest.raises(TypeError, match=r"einsum at test_given.py:\d+: .* several dtypes"):
            ops.einsum("m k, k n -> m n", X, half, method=method)
    with pytest.raises(TypeError, match=r"matmul at test_given.py:\d+: .* several dtypes"):
        X @ half
    with pytest.raises(TypeError, match="cross_entropy: labels must hold integers"):
        nn.cross_entropy(X, X[0])
    for at in ("...", "v/a e"):
        table = sw.reshard(X, at)
        with pytest.raises(IndexError, match=r"embedding: an id lies outside 0\.\.3"):
            nn.embedding(IDS + 1, table)
    declared = {"w": nn.Param("4 -> 4")}
    with pytest.raises(TypeError, match=r"init: key = 0; expected a key"):
        nn.init(0, declared, {}, X.mesh, sw.strategies.data("a"))
