"""Which kernel of torch runs training attention on a GPU: cuDNN's, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shardwise as sw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Seen(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_training_attention_is_cudnn_s(kv_heads: int) -> None:
    mesh = sw.make_mesh({"data": 1}, device="cuda")
    q, k, v = (
        sw.shard(torch.randn(2, 256, heads, 64).bfloat16(), mesh, "b/data s h d")
        for heads in (4, kv_heads, kv_heads)
    )

    def loss(operands: Any) -> Any:
        return (sw.nn.attention(*operands, causal=True).float() ** 2).sum()

    with Seen() as seen:
        sw.value_and_grad(loss)((q, k, v))
    ran = [name for name in seen.names if "_scaled_dot_product" in name]
    assert ran == [
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_cudnn_attention_backward",
    ]
