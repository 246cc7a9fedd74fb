"""`Model`: a declaration of parameters and pure functions, with a config and a strategy bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optree
import torch

from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.mesh import Mesh
from ..ops import nn
from ..ops.random import Key
from .cache import empty as empty_cache
from .names import Source


@dataclass(frozen=True)
class Model:
    """A model as data: nothing in it holds parameters.

    Attributes:
        config: sizes and switches; its field names are the dims.
        strategy: role -> layout.
        declaration: tree of `nn.Param`.
        apply: (params, tokens, *, positions=None, key=None) -> logits [batch seq vocab].
        loss: (params, batch, *, key=None) -> scalar; the batch has tokens and labels [batch seq].
        names: parameter path to its place in a Hugging Face checkpoint.
        decode: (params, tokens, cache, *, mask=None, only_last=False) -> (logits, cache): causal
            models read new tokens [batch seq] after those that the cache remembers. `mask`, plain
            [batch seq], is false at padding; `only_last` gives the logits of the last token.
    """

    config: Any
    strategy: Strategy
    declaration: Any
    apply: Callable[..., ShardedTensor]
    loss: Callable[..., ShardedTensor]
    names: Mapping[str, Source] = field(default_factory=dict)
    decode: Callable[..., tuple[ShardedTensor, Any]] | None = None

    def init(self, key: Key, mesh: Mesh) -> Any:
        """Initial parameters at rest; equal values on every mesh. Padding is zero."""
        params = nn.init(key, self.declaration, self.config, mesh, self.strategy)
        if not getattr(self.config, "pad", None):
            return params
        return optree.tree_map(self._without_padding, self.declaration, params)

    def check(self, mesh: Mesh, *, batch: int, seq: int) -> None:
        """Refuse, before anything runs, sizes that the strategy's axes do not divide.

        Raises:
            LayoutError: all problems: dim, axes and sizes, of parameters and of activations.
        """
        self.strategy.check(self.config, mesh, batch=batch, seq=seq)
        self.strategy.layouts(self.declaration, self.config, mesh)

    def cache(self, batch: int, length: int, mesh: Mesh) -> Any:
        """An empty cache for `decode`: room for `length` tokens of each of `batch` sequences.

        Raises:
            TypeError: the model does not decode.
            LayoutError: the row `kv` does not divide the batch or the heads.
        """
        if self.decode is None:
            raise TypeError("this model does not decode: it has no next token")
        return empty_cache(self.config.sizes, self.strategy, batch, length, mesh)

    def _without_padding(self, param: nn.Param, value: ShardedTensor) -> ShardedTensor:
        true, sizes = self.config.true_sizes, self.config.sizes
        for dim, name in enumerate(param.names):
            if name in true and true[name] != sizes[name]:
                inside = torch.arange(sizes[name], device=value.device) < true[name]
                inside = inside.reshape([-1 if d == dim else 1 for d in range(value.ndim)])
                value = value * inside.to(value.dtype)
        return value

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, without padding."""
        sizes = getattr(self.config, "true_sizes", self.config)
        return sum(math.prod(p.shape(sizes)) for p in optree.tree_leaves(self.declaration))
