"""Trees of tensors: nested dicts, lists, tuples and NamedTuples, a ShardedTensor being a leaf.

None is a leaf and is kept. Paths such as "blocks.w_up" or "layers.0.bias" are checkpoint keys, mask
arguments and the names in errors.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import optree

Mask = str | Callable[[str, Any], bool]


def map(f: Callable[..., Any], *trees: Any) -> Any:
    """`f` on corresponding leaves; a None leaf of the first tree stays None.

    >>> map(lambda a, b: a + b, {"x": 1, "y": None}, {"x": 2, "y": 3})
    {'x': 3, 'y': None}
    """
    first, *rest = trees
    return optree.tree_map(
        lambda x, *xs: None if x is None else f(x, *xs), first, *rest, none_is_leaf=True
    )


def leaves(tree: Any) -> list[Any]:
    """All leaves, None among them, in the order of `items`.

    >>> leaves({"b": 1, "a": [2, None]})
    [2, None, 1]
    """
    return optree.tree_leaves(tree, none_is_leaf=True)


def items(tree: Any) -> list[tuple[str, Any]]:
    """Paths and leaves.

    >>> items({"blocks": {"w_up": 1}, "norm": [2]})
    [('blocks.w_up', 1), ('norm.0', 2)]
    """
    values, spec = optree.tree_flatten(tree, none_is_leaf=True)
    return list(zip(_paths(spec), values, strict=True))


@lru_cache(maxsize=4096)
def _paths(spec: Any) -> tuple[str, ...]:
    """The path of each leaf: keys, indices, and the field names of NamedTuples."""
    return tuple(
        ".".join(
            str(key.field if isinstance(key, optree.NamedTupleEntry) else key.entry)
            for key in accessor
        )
        for accessor in spec.accessors()
    )


def matches(mask: Mask, path: str, leaf: Any) -> bool:
    """Whether a mask, a glob over paths or a function of (path, leaf), takes a leaf."""
    return fnmatch.fnmatchcase(path, mask) if isinstance(mask, str) else bool(mask(path, leaf))


def partition(tree: Any, mask: Mask) -> tuple[Any, Any]:
    """Two trees of the same shape: leaves that the mask takes, and the rest; None elsewhere.

    >>> partition({"w": 1, "b": 2}, "w*")
    ({'w': 1, 'b': None}, {'w': None, 'b': 2})
    """
    values, spec = optree.tree_flatten(tree, none_is_leaf=True)
    taken = [matches(mask, path, value) for path, value in zip(_paths(spec), values, strict=True)]
    kept = [v if t else None for v, t in zip(values, taken, strict=True)]
    rest = [None if t else v for v, t in zip(values, taken, strict=True)]
    return spec.unflatten(kept), spec.unflatten(rest)


def combine(a: Any, b: Any) -> Any:
    """The inverse of `partition`.

    >>> combine({"w": 1, "b": None}, {"w": None, "b": 2})
    {'w': 1, 'b': 2}
    """
    return optree.tree_map(lambda x, y: y if x is None else x, a, b, none_is_leaf=True)
