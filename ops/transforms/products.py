"""Fewer, larger products in a graph: those that share an operand become one, and sums of them too.

    x w, plus a bias             ->  one product that starts from the bias
    x w1, x w2, x w3             ->  x [w1 w2 w3], in slices       queries, keys, values; gate, up
    g1 v1 + g2 v2 + g3 v3        ->  [g1 g2 g3] [v1; v2; v3]       the gradient of that x
    xT g1, xT g2, xT g3          ->  xT [g1 g2 g3], in slices      the gradients of those weights

A product of few columns does not fill a GPU, and each term of a sum would be written and read once
more; the sum inside one product is formed in float32. What is joined is copied, so it must be small
beside what is saved: weights always are, beside activations with more rows than `x` has columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .nodes import in_order, maker, stretches
from .order import Ancestry, is_view

Node = torch.fx.Node
Module = torch.fx.GraphModule
aten: Any = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten.reshape.default)


def biased(module: Module) -> None:
    """Let products start from the biases that are added to them, in place."""
    stretch = stretches(module)
    for node in list(module.graph.nodes):
        if node.target is aten.mm.default and len(node.users) == 1:
            _add_bias(module, node, stretch)
    in_order(module)
    module.graph.eliminate_dead_code()


def _add_bias(module: Module, product: Node, stretch: dict[Node, int]) -> None:
    """bias + x w, seen in any shape, as one product."""
    shown = product
    (user,) = product.users
    if user.target in _VIEWS and len(user.users) == 1:
        shown = user
        (user,) = shown.users
    if user.target is not aten.add.Tensor or user.kwargs or user.args[0] is not shown:
        return
    if stretch[user] != stretch[product]:  # a factor may have been written to in between
        return
    bias: Any = user.args[1]
    if not isinstance(bias, Node) or bias.meta["val"].dtype != product.meta["val"].dtype:
        return
    shape, width = _shape(bias), _shape(product)[1]
    fits = shape == _shape(shown)[len(_shape(shown)) - len(shape) :]
    if not fits or math.prod(shape) != width or len(shape) == len(_shape(shown)):
        return
    make = maker(module, user)
    flat = make(aten.reshape.default, bias, [width])
    found = make(aten.addmm.default, flat, *product.args)
    user.replace_all_uses_with(make(aten.view.default, found, list(_shape(user))))


def joined(module: Module) -> None:
    """Join products, in place."""
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    beside = _Beside(module)
    for total, terms in _sums(module):
        _join_sum(module, total, terms, place, beside)
    in_order(module)  # sums may share what stands side by side
    for group in _sharing(module):
        _join_columns(module, sorted(group, key=lambda n: place.get(_factors(n)[1], 0)), beside)
    in_order(module)
    module.graph.eliminate_dead_code()


class _Beside:
    """Matrices side by side, each such matrix made once between two writes."""

    def __init__(self, module: Module) -> None:
        self._module, self._stretch = module, stretches(module)
        self._made: dict[tuple[Any, ...], Node] = {}

    def __call__(self, parts: Sequence[Node], place: Node) -> Node:
        key = self._stretch[place], *parts
        if key not in self._made:
            self._made[key] = maker(self._module, place)(aten.cat.default, list(parts), 1)
        return self._made[key]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _factors(product: Node) -> Any:
    """x and w of x w, with or without a bias."""
    return product.args[-2:]


def _pays(node: Node) -> bool:
    """Whether the product's rows outnumber its contracted columns, or it contracts long rows."""
    rows, inner = _shape(_factors(node)[0])
    return rows >= 2 * inner or inner >= 2 * rows


def _is_plain(node: Node) -> bool:
    """Whether the product has no factors of its own, and its bias is one row."""
    bias: Any = node.args[0]
    one_row = node.target is aten.mm.default or _shape(bias) == _shape(node)[1:]
    return one_row and not node.kwargs


def _sharing(module: Module) -> list[list[Node]]:
    """Groups of products with the same left operand, none of which needs another.

    Nor would it if all groups found before were one product each.
    """
    groups: dict[tuple[Any, ...], list[Node]] = {}
    stretch = stretches(module)
    for node in module.graph.nodes:
        if node.target in _PRODUCTS and _pays(node) and _is_plain(node):
            key = (node.target, _factors(node)[0], node.meta["val"].dtype, stretch[node])
            groups.setdefault(key, []).append(node)
    nodes = list(module.graph.nodes)
    before = Ancestry(nodes, {n: tuple(n.all_input_nodes) for n in nodes})
    found = []
    for group in groups.values():
        free: list[Node] = []
        for node in group:
            # either way: as parts of one product, earlier nodes may follow later ones
            if not any(before.follows(*two) for n in free for two in ((node, n), (n, node))):
                free.append(node)
        if len(free) > 1:
            before.unite(free)
            found.append(free)
    return found


def _join_columns(module: Module, group: Sequence[Node], beside: _Beside) -> None:
    """x w1, x w2 as slices of x [w1 w2]."""
    factors = [_factors(node) for node in group]
    make = maker(module, group[-1])
    operands = factors[0][0], beside([w for _, w in factors], group[-1])
    if group[0].target is aten.addmm.default:
        biases = make(aten.cat.default, [node.args[0] for node in group])
        whole = make(aten.addmm.default, biases, *operands)
    else:
        whole = make(aten.mm.default, *operands)
    start = 0
    for node in group:
        width = _shape(node)[1]
        part = make(aten.slice.Tensor, whole, 1, start, start + width)
        _let_copy(node)
        node.replace_all_uses_with(part)
        start += width


def _let_copy(node: Node) -> None:
    """Let views of a tensor copy it: rows of a slice do not follow each other."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if is_view(user) or user.target is aten.reshape.default:
            _let_copy(user)


def _sums(module: Module) -> list[tuple[Node, list[Node]]]:
    """Sums of products of the same shape, and the products."""
    found, stretch = [], stretches(module)
    taken: set[Node] = set()
    for node in reversed(module.graph.nodes):
        if node.target is aten.add.Tensor and node not in taken:
            inner: set[Node] = set()
            terms = _terms(node, inner)
            if terms is None or len(terms) < 2 or not all(map(_pays, terms)):
                continue
            if len({stretch[n] for n in (node, *terms)}) == 1:
                found.append((node, terms))
                taken |= inner
    return found


def _terms(node: Any, taken: set[Node]) -> list[Node] | None:
    """The products that a tree of additions adds up, or None if it adds anything else."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), FakeTensor):
        return None
    if node.target is aten.mm.default:
        return [node]
    if node.target in _VIEWS:
        inner: Any = node.args[0]
        return _terms(inner, taken) if len(inner.users) == 1 else None
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    left, right = node.args
    if not all(isinstance(n, Node) and len(n.users) == 1 for n in (left, right)):
        return None
    parts = [_terms(n, taken) for n in (left, right)]
    if None in parts or _shape(left) != _shape(right):  # pyright: ignore
        return None
    taken.add(node)
    return parts[0] + parts[1]  # pyright: ignore


def _join_sum(
    module: Module, total: Node, terms: Sequence[Node], place: dict[Node, int], beside: _Beside
) -> None:
    """g1 v1 + g2 v2 as [g1 g2] [v1; v2].

    Where each v is a weight's transpose, all are in the order of the weights, so that the joined
    weights are those of the forward product, and the joined g those of the weights' gradients.
    """
    if len({(_shape(t), t.meta["val"].dtype) for t in terms}) > 1:
        return
    make = maker(module, total)
    transposed = all(t.args[1].target is aten.t.default for t in terms)  # pyright: ignore
    if transposed:
        terms = sorted(terms, key=lambda t: place.get(t.args[1].args[0], 0))  # pyright: ignore
        place |= {t.args[0]: place.get(t.args[1].args[0], 0) for t in terms}  # pyright: ignore
    left = beside([t.args[0] for t in terms], total)  # pyright: ignore
    rights: list[Any] = [t.args[1] for t in terms]
    if transposed:
        right = make(aten.t.default, beside([r.args[0] for r in rights], total))
    else:
        right = make(aten.cat.default, rights, 0)
    product = make(aten.mm.default, left, right)
    total.replace_all_uses_with(make(aten.view.default, product, list(_shape(total))))
