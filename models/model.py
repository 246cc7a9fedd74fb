"""`Model`: a declaration of parameters and pure functions, with a config and a strategy bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optree
import torch

from ..layouts.layout import resolve
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh
from ..ops import nn
from ..ops.random import Key
from .cache import empty as empty_cache
from .names import Source


def expect(model: str, config: Any, kind: type, strategy: Any) -> Strategy:
    """The strategy, if it is one and the config is this model's.

    Raises:
        TypeError: something else stands in their place.
    """
    if not isinstance(config, kind):
        raise TypeError(f"{model}: config = {config!r}; expected a {kind.__name__}")
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"{model}: strategy = {strategy!r}; expected a Strategy, such as strategies.data()"
        )
    return strategy


def expect_tokens(tokens: Any, longest: int | None = None) -> None:
    """Refuse what is no ShardedTensor [batch seq], or longer than the learned positions.

    Raises:
        TypeError: a plain tensor.
        ValueError: another number of dims, or too many tokens.
    """
    if not isinstance(tokens, ShardedTensor):
        raise TypeError(
            f"tokens are a {type(tokens).__name__}; expected a ShardedTensor: "
            'sw.shard(tokens, mesh, model.strategy["tokens"])'
        )
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [batch seq]")
    if longest is not None and tokens.shape[1] > longest:
        raise ValueError(
            f"{tokens.shape[1]} tokens, but the model has learned position = {longest}"
        )


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
        files: what the JSON files of the folder that it was loaded from say, by name; `save` keeps
            what no config of ours has.
    """

    config: Any
    strategy: Strategy
    declaration: Any
    apply: Callable[..., ShardedTensor]
    loss: Callable[..., ShardedTensor]
    names: Mapping[str, Source] = field(default_factory=dict)
    decode: Callable[..., tuple[ShardedTensor, Any]] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def init(self, key: Key, mesh: Mesh) -> Any:
        """Initial parameters at rest; equal values on every mesh, padded or not. Padding is zero.

        Raises:
            TypeError: the key is none: `random.key(seed)` makes one.
            LayoutError: as `check`, of parameters.
        """
        self.check_heads(mesh)
        params = nn.init(key, self.declaration, self.config, mesh, self.strategy)
        if not getattr(self.config, "pad", None):
            return params
        return optree.tree_map(self._without_padding, self.declaration, params)

    def check(self, mesh: Mesh, *, batch: int, seq: int) -> None:
        """Refuse, before anything runs, sizes that the strategy's axes do not divide.

        Raises:
            LayoutError: all problems: dim, axes and sizes, of parameters and of activations; more
                tokens than learned positions; query heads padded away from key-value heads.
        """
        problems = []
        longest = getattr(self.config, "position", None)
        if "pos" in self.declaration and longest is not None and seq > longest:
            problems.append(f"seq = {seq}, but the model has learned position = {longest}")
        for check in (
            lambda: self.check_heads(mesh),
            lambda: self.strategy.check(self.config, mesh, batch=batch, seq=seq),
        ):
            try:
                check()
            except LayoutError as error:
                problems.append(str(error))
        if problems:
            raise LayoutError("\n".join(problems), kind="indivisible")
        self.strategy.layouts(self.declaration, self.config, mesh)

    def check_heads(self, mesh: Mesh) -> None:
        """Refuse padding that sends query heads to other devices than their keys and values.

        Raises:
            LayoutError: the numbers of heads, and the ways out.
        """
        sizes = getattr(self.config, "sizes", {})
        if not getattr(self.config, "pad", None) or "kv_heads" not in sizes:
            return
        heads, kv_heads, group = sizes["heads"], sizes["kv_heads"], self.config.group
        axes = resolve(self.strategy["kv"], 4).dims[2]
        if heads != group * kv_heads and mesh.group_size(axes) > 1:
            raise LayoutError(
                f"pad makes {heads} heads and {kv_heads} kv_heads, which {'/'.join(axes)!r} cuts: "
                f"blocks of {group} heads to a kv_head no longer lie with it; "
                "pad kv_heads alone, which pads heads along (pad.kv_heads), "
                'or leave keys and values whole: kv="replicate" of the preset',
                kind="indivisible",
            )

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
