"""Load a Llama from a Hugging Face folder and shard it five ways; its logits do not notice.

    python examples/llama_five_ways.py [FOLDER]

Each device reads its own blocks of the safetensors files; nobody holds the whole model. Without a
folder a small random Llama is written first and loaded like any other.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

import shardwise as sw
from shardwise import models, strategies

WAYS: Mapping[str, tuple[sw.Strategy, Mapping[str, int]]] = {
    "fsdp": (strategies.fsdp(), {"data": 8}),
    "1D, sequence parallel": (strategies.sequence_parallel(kv="replicate"), {"tensor": 8}),
    "data x 1D": (strategies.data() * strategies.tensor_1d(), {"data": 2, "tensor": 4}),
    "2.5D": (strategies.tensor_2p5d(), {"depth": 2, "row": 2, "col": 2}),
    "3D": (strategies.tensor_3d(), {"i": 2, "j": 2, "k": 2}),
}
PAD = {"heads": 8, "kv_heads": 4}  # for axes that do not divide a model's heads; cut off by `save`


def small(folder: Path) -> None:
    """Write a random Llama: 8 query heads, 4 for keys and values."""
    config = models.LlamaConfig(
        layer=4, embed=128, heads=8, kv_heads=4, ffn=256, vocab=512, position=64
    )
    model = models.llama(config, strategies.data())
    params = model.init(sw.random.key(0), sw.make_mesh({"data": 1}, transport="simulated"))
    models.save(folder, model, params)


def main(folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Load the folder under every strategy; returns the logits of one batch by strategy."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "llama"
            small(folder)
        found: dict[str, torch.Tensor] = {}
        tokens = torch.arange(8 * 16).reshape(8, 16) % 256
        print(f"{'strategy':<24}{'parameters a device':>20}{'bytes moved':>14}{'off by':>12}")
        for name, (strategy, axes) in WAYS.items():
            mesh = sw.make_mesh(axes)
            model, params = models.load(folder, mesh, strategy, pad=PAD)
            model.check(mesh, batch=8, seq=16)
            held = sum(p.shards[0].numel() for p in sw.tree.leaves(params))
            with sw.record() as plan, torch.no_grad():
                logits = model.apply(params, sw.shard(tokens, mesh, strategy["tokens"]))
            found[name] = logits.full_tensor()
            first = next(iter(found.values()))
            off = (found[name] - first).abs().max().item()
            if mesh.is_first:
                print(f"{name:<24}{held:>20,}{plan.bytes():>14,.0f}{off:>12.1e}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    main(parser.parse_args().folder)
