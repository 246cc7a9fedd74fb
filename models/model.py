"""`Model`: a declaration of parameters and pure functions, with a config and a strategy bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree

from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.mesh import Mesh
from ..ops import nn
from ..ops.random import Key


@dataclass(frozen=True)
class Model:
    """A model as data: nothing in it holds parameters.

    Attributes:
        config: sizes and switches; its field names are the dims.
        strategy: role -> layout.
        declaration: tree of `nn.Param`.
        apply: (params, tokens, *, positions=None, key=None) -> logits [batch seq vocab].
        loss: (params, batch, *, key=None) -> scalar; the batch has tokens and labels [batch seq].
    """

    config: Any
    strategy: Strategy
    declaration: Any
    apply: Callable[..., ShardedTensor]
    loss: Callable[..., ShardedTensor]

    def init(self, key: Key, mesh: Mesh) -> Any:
        """Initial parameters at rest; equal values on every mesh."""
        return nn.init(key, self.declaration, self.config, mesh, self.strategy)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(math.prod(p.shape(self.config)) for p in optree.tree_leaves(self.declaration))
