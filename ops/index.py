"""Looking entries up by integer tensors: embedding, one_hot, gather, index_select.

A dim that an index picks from is a *lookup* factor: where an axis cuts it, each device looks up
what lies in its own range, zero elsewhere, and the result is unreduced: nothing moves. All are
linear in the values; index operands are integers, replicated or cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import embedding as kernels
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import LayoutError, word
from ..meshlib.source import user_line
from . import slicing
from .broadcast import expand
from .dispatch import Info, Local, Op, export
from .rules import Dims, Rule, letters
from .shape import flatten, one_dim

Over = Mapping[str, str] | None
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8}
_functorch = torch._C._are_functorch_transforms_active


def _check_known(index: Tensor, total: int) -> None:
    """Raise, on a GPU later, unless all of an index lies in the whole; not under functorch."""
    if not _functorch():
        known = ((index >= 0) & (index < total)).all()
        torch._assert_async(known, f"an index lies outside 0..{total - 1}")  # pyright: ignore


def owned(index: Tensor, offset: int, size: int, total: int) -> tuple[Tensor, Tensor]:
    """An index into the whole as one into a block, and where it lies in the block (elsewhere 0).

    An index outside the whole raises, as torch's own lookups do; it would otherwise count as
    nobody's.
    """
    _check_known(index, total)
    local = index - offset
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, 0), inside


def per_block(
    info: Info, factor: str, make: Callable[[int, int, int], Callable[..., Any]]
) -> Local:
    """One function per held shard, made from offset, size and total of a cut factor."""
    size, total = info.size(factor), info.rule.sizes[factor]
    return [make(offset, size, total) for offset in info.offsets(factor)]


def _pick_rule(shapes: Sequence[Any], dim: int) -> Rule:
    x, index = shapes
    dims = tuple((n,) for n in letters(len(x)))
    new = tuple((n,) for n in letters(len(index), "i"))
    sizes = {d[0]: n for d, n in zip((*dims, *new), (*x, *index), strict=True)}
    return Rule(
        (dims, new),
        ((*dims[:dim], *new, *dims[dim + 1 :]),),
        sizes,
        lookup=frozenset(dims[dim]),
        linear=frozenset((0,)),
    )


def _pick_local(info: Info) -> Local:
    dim = info.static[0]
    (factor,) = info.rule.inputs[0][dim]
    lead = (slice(None),) * dim
    behind = len(info.rule.inputs[0]) - dim - 1

    def masked(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(x: Tensor, index: Tensor) -> Tensor:
            index = torch.where(index < 0, index + total, index)
            here, inside = owned(index, offset, size, total)
            return torch.where(inside.reshape(*inside.shape, *[1] * behind), x[(*lead, here)], 0)

        return local

    if info.axes(factor):
        return per_block(info, factor, masked)
    return lambda x, index: x[(*lead, index)]


_PICK = {name: Op(name, _pick_rule, _pick_local) for name in ("getitem", "index_select")}


def check_integer(name: str, index: Any) -> None:
    """Raise unless an index operand holds integers."""
    if index.dtype not in INTEGERS:
        raise TypeError(f"{name}: the index must hold integers, got {index.dtype}")


def _by_tensor(x: ShardedTensor, index: Any, dim: int) -> ShardedTensor:
    """`x[..., index, ...]` at a dim."""
    check_integer("getitem", index)
    return _PICK["getitem"]((x, index), (dim,))


slicing.LOOKUP[:] = [_by_tensor]


@export(torch.index_select, methods=["index_select"])
def index_select(
    x: Any, dim: int, index: Any, *, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """The entries of a dim that a 1-D index names.

    Returns:
        The index's cut on that dim; unreduced over axes that cut the dim of `x`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> y = x.index_select(0, torch.tensor([3, 0]))
    >>> y, y.full_tensor()
    (f32[2]{U:data} local[2] on mesh(data=2), tensor([3., 0.]))
    """
    check_integer("index_select", index)
    if index.ndim != 1:
        raise ValueError(f"index_select: the index must have 1 dim, got {index.ndim}")
    return _PICK["index_select"]((x, index), (one_dim(dim, x.ndim),), out, over)


def _embedding_rule(shapes: Sequence[Any], padding: int | None) -> Rule:
    ids, table = shapes
    if len(table) != 2:
        raise ValueError(f"the table must have 2 dims, got {len(table)}")
    dims = tuple((n,) for n in letters(len(ids), "i"))
    sizes = {d[0]: n for d, n in zip(dims, ids, strict=True)}
    return Rule(
        (dims, (("vocab",), ("embed",))),
        ((*dims, ("embed",)),),
        {**sizes, "vocab": table[0], "embed": table[1]},
        lookup=frozenset(("vocab",)),
        linear=frozenset((1,)),
    )


def _embedding_local(info: Info) -> Local:
    padding, cut = info.static[0], bool(info.axes("vocab"))

    def block(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(ids: Tensor, table: Tensor) -> Tensor:
            if _in_order(table, cut):
                _check_known(ids, total)
                rows = kernels.embedding_lookup(table, ids, offset, size)
            elif cut:
                here, inside = owned(ids, offset, size, total)
                rows = torch.where(inside.unsqueeze(-1), F.embedding(here, table), 0)
            else:
                return F.embedding(ids, table, padding)
            if padding is not None:  # its row is looked up, but gets no gradient
                rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
            return rows

        return local

    made = per_block(info, "vocab", block)
    return made if cut else made[0]  # pyright: ignore


def _in_order(table: Tensor, cut: bool) -> bool:
    """Whether our kernels look rows up, for a gradient that is summed in the same order each run.

    Under functorch they could not refuse an id outside a whole table; torch's lookup does.
    """
    return kernels.ON_CUDA and table.is_cuda and (cut or not _functorch())


_EMBEDDING = Op("embedding", _embedding_rule, _embedding_local)


@export(F.embedding)
def embedding(
    ids: Any,
    table: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Rows of a table [vocab, embed] by integer ids.

    Args:
        ids: any shape, replicated or cut.
        table: the vocabulary, the embedding dim or neither may be cut.
        padding_idx: an id whose row gets no gradient.
        max_norm: must be None: torch writes to the table there.
        norm_type: of max_norm.
        scale_grad_by_freq: must be False.
        sparse: must be False.
        out: the result's layout; it reduces a sum that a cut vocabulary leaves.
        over: mesh axis to factor: "vocab", "embed", or i0, i1, ... of the ids' dims.

    Returns:
        [*ids, embed]; unreduced over axes that cut the vocabulary, at no cost.

    >>> import torch, shardwise as sw
    >>> table = sw.shard(torch.eye(4), sw.make_mesh({"tensor": 2}), "vocab/tensor embed")
    >>> y = sw.ops.embedding(torch.tensor([3, 1]), table)
    >>> y, y.full_tensor()[0]
    (f32[2 4]{U:tensor} local[2 4] on mesh(tensor=2), tensor([0., 0., 0., 1.]))
    """
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise TypeError("embedding: max_norm, scale_grad_by_freq and sparse have no rule")
    check_integer("embedding", ids)
    size = table.shape[0]
    if padding_idx is not None and not -size <= padding_idx < size:
        raise ValueError(f"embedding: padding_idx {padding_idx} is out of range for {size} rows")
    padding = None if padding_idx is None else padding_idx % size
    return _EMBEDDING((ids, table), (padding,), out, over)


def _one_hot_rule(shapes: Sequence[Any], num_classes: int) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0]), "i"))
    sizes = {d[0]: n for d, n in zip(dims, shapes[0], strict=True)}
    return Rule((dims,), ((*dims, ("classes",)),), {**sizes, "classes": num_classes})


def _one_hot_local(info: Info) -> Local:
    def block(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(ids: Tensor) -> Tensor:
            here, inside = owned(ids, offset, size, total)
            places = torch.arange(size, device=ids.device)
            return ((here.unsqueeze(-1) == places) & inside.unsqueeze(-1)).long()

        return local

    made = per_block(info, "classes", block)
    return made if info.axes("classes") else made[0]  # pyright: ignore


_ONE_HOT = Op("one_hot", _one_hot_rule, _one_hot_local, differentiable=False)


@export(F.one_hot)
def one_hot(
    ids: ShardedTensor, num_classes: int = -1, *, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """1 at each id, 0 elsewhere, along a new last dim of `num_classes`.

    Raises:
        LayoutError: kind "meaningless", without num_classes: the shape would depend on values.

    >>> import torch, shardwise as sw
    >>> ids = sw.shard(torch.tensor([2, 0]), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.ops.one_hot(ids, 3).full_tensor()
    tensor([[0, 0, 1],
            [1, 0, 0]])
    """
    if num_classes < 0:
        _refuse("one_hot", "the largest id would give the shape; name num_classes", ids)
    check_integer("one_hot", ids)
    return _ONE_HOT((ids,), (num_classes,), out, over)


def aligned(
    x: Sequence[int], index: Sequence[int], dim: int
) -> tuple[Dims, Dims, dict[str, int], set[str]]:
    """Dims of values and of an index: one factor where sizes agree, else a blocked prefix."""
    if len(x) != len(index):
        raise ValueError(f"the index has {len(index)} dims, the tensor {len(x)}")
    mine, theirs = [], []
    sizes: dict[str, int] = {}
    blocked: set[str] = set()
    for k, (n, m) in enumerate(zip(x, index, strict=True)):
        a, b = (f"d{k}", "k") if k == dim else (f"d{k}", f"d{k}") if n == m else (f"d{k}", f"i{k}")
        if k != dim and m > n:
            raise ValueError(f"the index is longer ({m}) than the tensor ({n}) in dim {k}")
        if k != dim and n != m:
            blocked |= {a, b}
        sizes[a], sizes[b] = n, m
        mine.append((a,))
        theirs.append((b,))
    return tuple(mine), tuple(theirs), sizes, blocked


def _gather_rule(shapes: Sequence[Any], dim: int) -> Rule:
    x, index, sizes, blocked = aligned(shapes[0], shapes[1], dim)
    return Rule(
        (x, index),
        (index,),
        sizes,
        frozenset(blocked),
        lookup=frozenset(x[dim]),
        linear=frozenset((0,)),
    )


def _gather_local(info: Info) -> Local:
    dim = info.static[0]

    def masked(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(x: Tensor, index: Tensor) -> Tensor:
            here, inside = owned(index, offset, size, total)
            return torch.where(inside, torch.gather(x, dim, here), 0)

        return local

    factor = f"d{dim}"
    if info.axes(factor):
        return per_block(info, factor, masked)
    return lambda x, index: torch.gather(x, dim, index)


_GATHER = {name: Op(name, _gather_rule, _gather_local) for name in ("gather", "take_along_dim")}


@export(torch.gather, methods=["gather"])
def gather(
    x: Any,
    dim: int,
    index: Any,
    *,
    sparse_grad: bool = False,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """`torch.gather`: entries of `dim` at an index of as many dims.

    Returns:
        The index's shape; unreduced over axes that cut `dim` of x. Other dims are pointwise where
        both have the same size; where the index is shorter, they are needed whole.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> logits = sw.shard(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mesh, "n vocab/tensor")
    >>> logits.gather(1, torch.tensor([[0], [1]])).full_tensor()
    tensor([[1.],
            [4.]])
    """
    if sparse_grad:
        raise TypeError("gather: sparse_grad has no rule")
    check_integer("gather", index)
    return _GATHER["gather"]((x, index), (one_dim(dim, x.ndim),), out, over)


@export(torch.take_along_dim, methods=["take_along_dim"])
def take_along_dim(
    x: Any,
    indices: Any,
    dim: int | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """`torch.take_along_dim`: as `gather`, the other dims broadcast."""
    check_integer("take_along_dim", indices)
    if dim is None:
        x, indices, dim = flatten(x), indices.reshape(-1), 0
    at = one_dim(dim, x.ndim)
    if x.ndim != indices.ndim:
        raise ValueError(f"take_along_dim: {x.ndim} and {indices.ndim} dims differ")
    shape = torch.broadcast_shapes(
        *(tuple(1 if k == at else n for k, n in enumerate(v.shape)) for v in (x, indices))
    )
    x, indices = (_spread(v, (*shape[:at], v.shape[at], *shape[at + 1 :])) for v in (x, indices))
    return _GATHER["take_along_dim"]((x, indices), (at,), out, over)


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    if tuple(x.shape) == shape:
        return x
    return expand(x, shape) if isinstance(x, ShardedTensor) else x.expand(shape)


def _refuse(name: str, why: str, *operands: Any) -> NoReturn:
    shown = [
        (f"operand {i}", str(x)) for i, x in enumerate(operands) if isinstance(x, ShardedTensor)
    ]
    source = user_line()
    raise LayoutError(word(why, op=name, source=source, operands=shown), op=name, source=source)


def _shape_by_value(name: str) -> Callable[..., NoReturn]:
    def call(*operands: Any, **_: Any) -> NoReturn:
        _refuse(
            name,
            "the shape of the result would depend on values, which differ per device\n"
            "keep the shape: ops.where(mask, x, 0), and count with mask.sum()",
            *operands,
        )

    return call


for _name in ("masked_select", "nonzero", "argwhere"):
    export(getattr(torch, _name), methods=[_name])(_shape_by_value(_name))
