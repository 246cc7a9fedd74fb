"""A GPT from scratch under 3D tensor parallelism: 8 devices as a 2 x 2 x 2 cube.

Run it with `python examples/gpt_3d.py` (8 simulated devices in this process), or on 8 real ones
with `torchrun --nproc-per-node 8 examples/gpt_3d.py`. For another parallelism, change STRATEGY and
MESH: the model does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import shardwise as sw
from shardwise import nn, optim, strategies

STRATEGY = strategies.tensor_3d("i", "j", "k")
MESH = {"i": 2, "j": 2, "k": 2}
TEXTS = sorted((Path(__file__).parent / "data" / "shakespeare").rglob("*.md"))


@dataclass(frozen=True)
class Config:
    layer: int = 2
    embed: int = 64
    heads: int = 4
    head_dim: int = 16
    ffn: int = 256
    vocab: int = 256
    position: int = 64


DECLARED = {
    "embed": nn.Param("vocab embed", nn.normal(0.05)),
    "pos": nn.Param("position embed", nn.normal(0.02)),
    "blocks": nn.stack(
        {
            "attn_norm": nn.Param("embed", nn.constant(1.0)),
            "w_q": nn.Param("embed -> heads head_dim"),
            "w_k": nn.Param("embed -> heads head_dim"),
            "w_v": nn.Param("embed -> heads head_dim"),
            "w_o": nn.Param("heads head_dim -> embed"),
            "mlp_norm": nn.Param("embed", nn.constant(1.0)),
            "w_up": nn.Param("embed -> ffn"),
            "b_up": nn.Param("ffn", nn.constant(0.0)),
            "w_down": nn.Param("ffn -> embed"),
            "b_down": nn.Param("embed", nn.constant(0.0)),
        }
    ),
    "final_norm": nn.Param("embed", nn.constant(1.0)),
}


def block(p: Any, x: sw.ShardedTensor, s: sw.Strategy) -> sw.ShardedTensor:
    """Attention and MLP on the stream [batch seq embed]; rows of `s` say where tensors lie."""
    h = sw.reshard(nn.rms_norm(x, p["attn_norm"]), s["block_in"])
    q, k, v = nn.dense(h, (p["w_q"], p["w_k"], p["w_v"]), out=(s["heads"], s["kv"], s["kv"]))
    a = nn.attention(q, k, v, causal=True, out=s["attended"])
    x = x + nn.dense(a, p["w_o"], out=s["hidden"], inputs=2)
    h = sw.reshard(nn.rms_norm(x, p["mlp_norm"]), s["block_in"])
    up: Any = F.gelu(nn.dense(h, p["w_up"], p["b_up"], out=s["ffn"]))
    return x + nn.dense(up, p["w_down"], p["b_down"], out=s["hidden"])


def loss(params: Any, batch: Any, s: sw.Strategy = STRATEGY) -> sw.ShardedTensor:
    """Mean cross-entropy of the next byte; logits are cut over the vocabulary, never gathered."""
    p = s.use({role: params[role] for role in ("embed", "pos", "final_norm")})
    x = nn.embedding(batch["tokens"], p["embed"], out=s["hidden"])
    x = sw.reshard(x + p["pos"][: batch["tokens"].shape[1]], s["hidden"])
    x, _ = sw.scan(lambda x, p: (block(s.use(p), x, s), None), x, params["blocks"])
    h = sw.reshard(nn.rms_norm(x, p["final_norm"]), s["block_in"])
    logits = nn.dense(h, p["embed"].mT, out=s["logits"])
    return nn.cross_entropy(logits, batch["labels"])


def main(steps: int = 60, batch: int = 16) -> list[float]:
    """Train on Shakespeare's bytes; returns the losses."""
    config, mesh = Config(), sw.make_mesh(MESH)
    STRATEGY.check(config, mesh, batch=batch, seq=config.position)
    params = nn.init(sw.random.key(0), DECLARED, config, mesh, STRATEGY)
    opt = optim.adamw(3e-3)
    state = opt.init(params)
    text = torch.tensor(list(b"".join(path.read_bytes() for path in TEXTS)))
    rng = torch.Generator().manual_seed(0)

    def draw() -> Any:
        start = torch.randint(len(text) - config.position - 1, (batch, 1), generator=rng)
        rows = text[start + torch.arange(config.position + 1)]
        rows = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
        return sw.shard(rows, mesh, STRATEGY["tokens"])

    step = sw.value_and_grad(loss)
    plan = sw.plan(step, params, draw())
    if mesh.is_first:
        print(STRATEGY.table(DECLARED, config, mesh))
        print(plan)
    losses = []
    for number in range(steps):
        value, grads = step(params, draw())
        params, state = opt.step(grads, state, params)
        losses.append(value.item())
        if mesh.is_first and number % 10 == 0:
            print(f"step {number}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
