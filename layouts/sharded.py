"""`ShardedTensor`: shards and their type.

The type, (mesh, layout, global shape, dtype, grad), is interned. A plain object, not a
`torch.Tensor` subclass: its layout survives `torch.func`, and an op costs one dict lookup keyed by
the operands' types. To every tree function it is a leaf; only the library opens it, by an optree
registration in the namespace "shardwise".

Operators and methods are not written here: `ops` installs each op that has a rule (`install`), so a
name that nobody installed is exactly an op without a rule, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import optree
import torch
from torch import Tensor

from ..meshlib.errors import LayoutError, word
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from . import notation
from .layout import Layout

DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_TYPES: dict[tuple[Any, ...], Type] = {}
TORCH: dict[Any, Callable[..., Any]] = {}  # torch function -> ours; `ops` fills it
HELPERS: dict[
    str, Callable[..., Any]
] = {}  # what the class needs from rooms above; filled on import


class Type:
    """What the planner knows of a tensor: interned, so that two equal types are the same object."""

    __slots__ = ("dtype", "grad", "layout", "local_shape", "mesh", "moves", "shape")

    mesh: Mesh
    layout: Layout
    shape: torch.Size
    dtype: torch.dtype
    grad: bool
    local_shape: torch.Size
    moves: dict[Any, Any]  # conversions already planned from here

    def with_layout(self, layout: Layout, grad: bool | None = None) -> Type:
        """The same tensor's type in another layout."""
        return make_type(
            self.mesh, layout, self.shape, self.dtype, self.grad if grad is None else grad
        )

    def __deepcopy__(self, memo: Any) -> Type:
        return self

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return write_type(self.dtype, self.shape, self.layout)


def make_type(
    mesh: Mesh, layout: Layout, shape: Sequence[int], dtype: torch.dtype, grad: bool = False
) -> Type:
    """The interned type; checks divisibility once per type."""
    key = (mesh, layout, tuple(shape), dtype, grad)
    found = _TYPES.get(key)
    if found is None:
        self = object.__new__(Type)
        self.mesh, self.layout, self.dtype, self.grad = mesh, layout, dtype, grad
        self.shape = torch.Size(shape)
        self.local_shape = torch.Size(layout.local_shape(shape, mesh))
        self.moves = {}
        found = _TYPES.setdefault(key, self)
    return found


def write_type(dtype: torch.dtype, shape: Sequence[int], layout: Layout) -> str:
    """`bf16[64/data 2048 512/tensor]{U:pipe}`: dtype, global sizes with their axes, states."""
    dims = " ".join("/".join((str(n), *axes)) for n, axes in zip(shape, layout.dims, strict=True))
    states = notation.write_states(
        {"U": layout.unreduced, "R": layout.reduced, "V": layout.varying}
    )
    place = "" if layout.memory == "device" else f"@{layout.memory}"
    return f"{DTYPES.get(dtype, str(dtype).removeprefix('torch.'))}[{dims}]{states}{place}"


if TYPE_CHECKING:

    class _Installed:
        """What `ops` installs, for type checkers; a name not listed is Any."""

        T: ShardedTensor
        mT: ShardedTensor

        def __add__(self, other: Any) -> ShardedTensor: ...
        def __radd__(self, other: Any) -> ShardedTensor: ...
        def __sub__(self, other: Any) -> ShardedTensor: ...
        def __rsub__(self, other: Any) -> ShardedTensor: ...
        def __mul__(self, other: Any) -> ShardedTensor: ...
        def __rmul__(self, other: Any) -> ShardedTensor: ...
        def __truediv__(self, other: Any) -> ShardedTensor: ...
        def __rtruediv__(self, other: Any) -> ShardedTensor: ...
        def __floordiv__(self, other: Any) -> ShardedTensor: ...
        def __rfloordiv__(self, other: Any) -> ShardedTensor: ...
        def __mod__(self, other: Any) -> ShardedTensor: ...
        def __rmod__(self, other: Any) -> ShardedTensor: ...
        def __pow__(self, other: Any) -> ShardedTensor: ...
        def __rpow__(self, other: Any) -> ShardedTensor: ...
        def __matmul__(self, other: Any) -> ShardedTensor: ...
        def __rmatmul__(self, other: Any) -> ShardedTensor: ...
        def __and__(self, other: Any) -> ShardedTensor: ...
        def __rand__(self, other: Any) -> ShardedTensor: ...
        def __or__(self, other: Any) -> ShardedTensor: ...
        def __ror__(self, other: Any) -> ShardedTensor: ...
        def __xor__(self, other: Any) -> ShardedTensor: ...
        def __rxor__(self, other: Any) -> ShardedTensor: ...
        def __lt__(self, other: Any) -> ShardedTensor: ...
        def __le__(self, other: Any) -> ShardedTensor: ...
        def __gt__(self, other: Any) -> ShardedTensor: ...
        def __ge__(self, other: Any) -> ShardedTensor: ...
        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...
        def __hash__(self) -> int: ...
        def __neg__(self) -> ShardedTensor: ...
        def __pos__(self) -> ShardedTensor: ...
        def __abs__(self) -> ShardedTensor: ...
        def __invert__(self) -> ShardedTensor: ...
        def __getitem__(self, index: Any) -> ShardedTensor: ...
        def argmax(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def clamp(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def mean(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def permute(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def reshape(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def squeeze(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def sum(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def to(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def transpose(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def unsqueeze(self, *args: Any, **keywords: Any) -> ShardedTensor: ...
        def view(self, *args: Any, **keywords: Any) -> ShardedTensor: ...

else:
    _Installed = object


class ShardedTensor(_Installed):
    """A tensor cut, repeated or summed over a mesh as its layout says.

    Made by `shard`, `full`, ops.

    Attributes:
        shape: global shape.
        layout: where the numbers are.
        mesh: the devices.
        shards: the local tensors that this process holds: N simulated, 1 distributed, 1 meta
            abstract.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(8.0).reshape(2, 4), sw.make_mesh({"data": 2}), "b/data d")
    >>> x
    f32[2/data 4] local[1 4] on mesh(data=2)
    >>> x.sum()
    f32[]{U:data} local[] on mesh(data=2)
    """

    __slots__ = ("__weakref__", "_entry", "_memo", "_origin", "_path", "_shards", "_type")

    __array_ufunc__ = None  # numpy leaves its operators to ours

    _shards: tuple[Tensor, ...]
    _type: Type
    _memo: dict[Any, tuple[Tensor, ...]]  # remembered casts: shards of the result
    _origin: ShardedTensor  # what a remembered cast came from
    _path: str  # tree path of a parameter
    _entry: Any  # how a parameter's gradient leaves (see ops/transforms/grad.py)

    def __init__(self, shards: tuple[Tensor, ...], type: Type) -> None:
        self._shards = shards
        self._type = type

    @property
    def shape(self) -> torch.Size:
        """Global shape."""
        return self._type.shape

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self._type.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._type.dtype

    @property
    def layout(self) -> Layout:
        """Where the numbers are."""
        return self._type.layout

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self._type.mesh

    @property
    def device(self) -> torch.device:
        """Where this process keeps its shards; "meta" on an abstract mesh."""
        return self._shards[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows through it."""
        return self._type.grad

    @property
    def local_shape(self) -> torch.Size:
        """Shape of one shard."""
        return self._type.local_shape

    @property
    def shards(self) -> tuple[Tensor, ...]:
        """The local tensors that this process holds; none outside a sub-mesh."""
        return () if self._type.mesh.is_outside else self._shards

    def full_tensor(self) -> Tensor:
        """The global value, on every process: a collective, so every process must call it.

        Cost: an all_gather of each cut dim, an all_reduce of each owed sum. Asserts that replicas
        agree.

        >>> import shardwise as sw
        >>> sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n/data").full_tensor()
        tensor([1., 1., 1., 1.])
        """
        return HELPERS["full_tensor"](self)

    def to_local(self) -> Tensor:
        """This process's only shard.

        Raises:
            LayoutError: if the process holds several (a simulated mesh) or none.
        """
        if len(self.shards) != 1:
            raise LayoutError(
                f"to_local: this process holds {len(self.shards)} shards of {self}; use .shards"
            )
        return self._shards[0]

    def item(self) -> Any:
        """The value of a replicated or reduced scalar.

        Raises:
            LayoutError: kind "unreduced" or "meaningless" where the local number is not the value.
        """
        return scalar(self, "item")

    def __bool__(self) -> bool:
        return bool(scalar(self, "bool"))

    def __float__(self) -> float:
        return float(scalar(self, "float"))

    def __int__(self) -> int:
        return int(scalar(self, "int"))

    def __format__(self, spec: str) -> str:
        return format(scalar(self, "format"), spec) if spec else str(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        """Global shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dims."""
        return self.ndim

    def numel(self) -> int:
        """Elements of the global tensor."""
        return self._type.shape.numel()

    def element_size(self) -> int:
        """Bytes of one element."""
        return self._type.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Whether the dtype is a real floating type."""
        return self._type.dtype.is_floating_point

    def detach(self) -> ShardedTensor:
        """The same value with no gradient."""
        kind = self._type
        return ShardedTensor(
            tuple(s.detach() for s in self._shards),
            make_type(kind.mesh, kind.layout, kind.shape, kind.dtype, False),
        )

    def __str__(self) -> str:
        return str(self._type)

    def __repr__(self) -> str:
        local = " ".join(map(str, self.local_shape))
        grad = " grad" if self._type.grad else ""
        return f"{self._type} local[{local}] on {self.mesh}{grad}"

    def _repr_html_(self) -> str:
        from .show import show  # a room above this one

        return show(self)._repr_html_()

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError(
            "nothing is written in place: "
            "build the new tensor with ops.where, ops.cat or scatter_add"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ShardedTensor.__slots__ or name.startswith("__"):
            raise AttributeError(name)
        if hasattr(Tensor, name):
            if name not in INSTEAD:
                _in_place(name)
            no_rule(name, [self])
        raise AttributeError(f"ShardedTensor has no attribute {name!r}")

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        ours = TORCH.get(func)
        if ours is None:
            _in_place(getattr(func, "__name__", ""))
            flat = optree.tree_leaves(list(args))  # pyright: ignore
            tensors = [a for a in flat if isinstance(a, ShardedTensor)]
            no_rule(getattr(func, "__name__", str(func)), tensors)
        if not kwargs:
            return ours(*args)
        # torch's wrappers spell out every default; None is each one's "not given"
        return ours(*args, **{name: value for name, value in kwargs.items() if value is not None})


def _in_place(name: str) -> None:
    """Raise for a torch name that writes into its argument."""
    if name.endswith("_") and not name.endswith("__"):
        raise TypeError(f"{name}: nothing is written in place; use x = x.{name.rstrip('_')}(...)")


def install(name: str, method: Callable[..., Any]) -> None:
    """Give ShardedTensor a method or operator; `ops` calls it once per op."""
    setattr(ShardedTensor, name, method)


# What to use instead, for names of torch that cannot mean here what they mean there.
INSTEAD = {
    "backward": "gradients are values here: sw.value_and_grad(f)(params, ...)",
    "requires_grad_": "say which arguments to differentiate: sw.grad(f, argnums=...)",
    "dropout": "keys are explicit: sw.nn.dropout(x, rate, key)",
    "rand_like": "keys are explicit: sw.random.uniform(key, x.shape, x.mesh, x.layout)",
    "randn_like": "keys are explicit: sw.random.normal_like(key, x)",
    "bernoulli": "keys are explicit: sw.random.bernoulli(key, shape, mesh, layout, p=...)",
    "multinomial": "keys are explicit: sw.random.categorical(key, logits)",
    **dict.fromkeys(("numpy", "tolist", "cpu", "data"), "read the global value: x.full_tensor()"),
    "cuda": "a mesh has one device: sw.make_mesh(..., device=...)",
}


def no_rule(name: str, operands: Sequence[ShardedTensor]) -> NoReturn:
    """Raise the error of an op that nobody wrote a rule for."""
    instead = INSTEAD.get(
        name, f'write one: @sw.op("rule") def {name}(...): ...   or use sw.shard_map'
    )
    raise LayoutError(
        word(
            f"no rule is written for this op; nothing falls back silently.\n{instead}",
            op=name,
            source=user_line(),
            operands=[(f"operand {i}", str(x)) for i, x in enumerate(operands)],
        ),
        kind="no rule",
        op=name,
        source=user_line(),
    )


def scalar(x: ShardedTensor, what: str) -> Any:
    """The Python number of a replicated or reduced scalar."""
    layout = x.layout
    if x.numel() != 1 or layout.unreduced or layout.varying or any(layout.dims):
        if layout.unreduced:
            verdict = (
                f"the value is still a sum over {sorted(layout.unreduced)}; "
                "each device holds a part"
            )
        elif layout.varying:
            verdict = (
                f"the value differs over {sorted(layout.varying)}; no one number stands for it"
            )
        elif x.numel() == 1:
            verdict = f"the value is cut over {sorted(a for axes in layout.dims for a in axes)}"
        else:
            verdict = f"needs a scalar of one element, got {x.numel()}"
        whole = notation.write(((),) * x.ndim, {})
        fix = f'sw.reshard(x, "{whole}").item()'
        raise LayoutError(
            word(
                verdict + (f"\nreduce it first: {fix}" if layout.unreduced else ""),
                op=what,
                source=user_line(),
                operands=[("x", str(x))],
            ),
            kind="unreduced" if layout.unreduced else "meaningless",
            op=what,
            source=user_line(),
        )
    if x.mesh.is_outside or x.mesh.transport == "abstract":
        raise LayoutError(
            word(
                "the tensor has no value here: it lives on meta shards",
                op=what,
                operands=[("x", str(x))],
            )
        )
    return x._shards[0].item()


def wrap(
    shards: Sequence[Tensor], mesh: Mesh, layout: Layout, shape: Sequence[int]
) -> ShardedTensor:
    """A ShardedTensor of shards whose shapes are known to fit."""
    first = shards[0]
    kind = make_type(mesh, layout, shape, first.dtype, first.requires_grad)
    return ShardedTensor(tuple(shards), kind)


def _flatten(x: ShardedTensor) -> tuple[tuple[Tensor, ...], Type, tuple[int, ...]]:
    return x._shards, x._type, tuple(range(len(x._shards)))


def _unflatten(kind: Type, shards: Sequence[Tensor]) -> ShardedTensor:
    for shard in shards:
        if isinstance(shard, Tensor) and shard.shape != kind.local_shape:
            raise LayoutError(
                f"a shard of {kind} has shape {tuple(shard.shape)}, "
                f"expected {tuple(kind.local_shape)}"
            )
    return ShardedTensor(tuple(shards), kind)


optree.register_pytree_node(ShardedTensor, _flatten, _unflatten, namespace="shardwise")  # pyright: ignore
