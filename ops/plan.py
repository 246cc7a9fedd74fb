"""`Plan`: every collective and op of a program, by phase, axis, bytes, line and reason.

`record()` keeps what runs; `plan(f, *args)` runs `f` on the abstract twin of its arguments' mesh,
so that the step of a 4096-device job is planned on a laptop. Bytes are per device, by the ring
convention of `meshlib/record.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import optree
import torch

from ..layouts.memory import away
from ..layouts.picture import Bars, Lines, Part
from ..layouts.sharded import DTYPES, ShardedTensor, make_type
from ..layouts.show import register
from ..meshlib import record as logs
from ..meshlib.errors import format_bytes, nearest
from ..meshlib.mesh import Mesh, abstract_twin, make_mesh
from ..meshlib.record import Collective, Copy, Log, OpRecord
from .meter import Meter

_NAMES = {dtype: name for dtype, name in DTYPES.items()}
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_KNOWN = {"kind": get_args(logs.Kind), "phase": get_args(logs.Phase), "why": get_args(logs.Why)}
_KEYS = ("kind", "axis", "phase", "op", "source", "path", "why")


class Plan:
    """What ran, or would run: collectives, copies, ops, FLOPs and bytes per device.

    Attributes:
        mesh: of the collectives; None if there were none.
        result: what the planned function returns, as types without memory (`plan` only).
        flops: of local arithmetic, per device.
        peak_memory: bytes per device alive at once (`plan` only; 0 for a record).
        memory: bytes per device by kind: parameters, gradients, optimizer, activations, buffers.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> x = sw.shard(torch.ones(4, 2), mesh, "b/data d")
    >>> with sw.record() as plan:
    ...     _ = sw.reshard(x, "b d")
    >>> plan.count(kind="all_gather", axis="data"), plan.bytes()
    (1, 16)
    """

    def __init__(self, log: Log | None = None) -> None:
        self._log = log or Log()
        self.result: Any = None
        self.flops = 0.0
        self.peak_memory = 0

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the first collective or op."""
        return self._log.mesh

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """In the order in which they ran."""
        return tuple(self._log.collectives)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Transfers between device, host and disk."""
        return tuple(self._log.copies)

    @property
    def ops(self) -> tuple[OpRecord, ...]:
        """Ops of the forward, in order."""
        return tuple(self._log.ops)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Tensors that are gathered or reduced twice."""
        return tuple(dict.fromkeys(self._log.warnings))

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes per device by kind."""
        kinds = ("parameters", "gradients", "optimizer", "activations", "buffers")
        return {kind: self._log.memory.get(kind, 0) for kind in kinds}

    def matching(self, **match: Any) -> Iterator[Collective]:
        """Collectives with these attributes.

        They are kind, axis (any of the group's), phase, op, source, path, why.

        Raises:
            TypeError: an attribute that there is not.
            ValueError: a kind, phase or reason that there is not; MeshError: an unknown axis.
        """
        unknown = set(match) - set(_KEYS)
        if unknown:
            raise TypeError(f"plan: unknown {sorted(unknown)} (known: {', '.join(_KEYS)})")
        for key, known in _KNOWN.items():
            if key in match and match[key] not in known:
                raise ValueError(f"plan: {key} {match[key]!r}{nearest(match[key], known)}")
        if "axis" in match and self.mesh is not None:
            self.mesh.check_axes((match["axis"],))
        for c in self._log.collectives:
            if all(v in c.axes if k == "axis" else getattr(c, k) == v for k, v in match.items()):
                yield c

    def count(self, **match: Any) -> int:
        """How many collectives match, repeats counted."""
        return sum(c.repeat for c in self.matching(**match))

    def elements(self, **match: Any) -> float:
        """Elements that one device moves in the collectives that match."""
        return _total(c.elements * c.repeat for c in self.matching(**match))

    def bytes(self, **match: Any) -> float:
        """Bytes that one device moves in the collectives that match."""
        return _total(c.bytes * c.repeat for c in self.matching(**match))

    def diff(self, other: Plan) -> PlanDiff:
        """Rows whose count or bytes differ from another plan's."""
        mine, theirs = self.rows(), other.rows()
        changed = []
        for key in dict.fromkeys([*mine, *theirs]):
            a, b = mine.get(key, (0, 0.0, "")), theirs.get(key, (0, 0.0, ""))
            if a[:2] != b[:2]:
                changed.append((key, a[:2], b[:2]))
        return PlanDiff(tuple(changed))

    def rows(self) -> dict[tuple[str, ...], tuple[int, float, str]]:
        """Count, bytes and reason per (phase, kind, axes, op, source)."""
        table: dict[tuple[str, ...], tuple[int, float, str]] = {}
        for c in self._log.collectives:
            key = (c.phase, c.kind, ",".join(c.axes), c.op, c.source)
            count, size, why = table.get(key, (0, 0.0, c.why))
            table[key] = (
                count + c.repeat,
                size + c.bytes * c.repeat,
                why if c.why in why.split(",") else f"{why},{c.why}",
            )
        return table

    def __str__(self) -> str:
        if not self._log.collectives:
            return "no collectives" + _tail(self)
        head = ("phase", "kind", "axes", "op", "source", "count", "bytes", "why")
        body = [
            (*key, str(count), format_bytes(size), why)
            for key, (count, size, why) in self.rows().items()
        ]
        axes = dict.fromkeys(a for c in self._log.collectives for a in c.axes)
        lines = [_aligned([head, *body])]
        lines += [
            f"over {axis}: {self.count(axis=axis)} collectives, "
            f"{format_bytes(self.bytes(axis=axis))}"
            for axis in axes
        ]
        return "\n".join(lines) + _tail(self)

    __repr__ = __str__

    def to_json(self) -> str:
        """The plan without its result, as JSON."""
        return json.dumps(
            {
                "mesh": dict(self.mesh.axes) if self.mesh else None,
                "collectives": [_plain(c) for c in self.collectives],
                "copies": [_plain(c) for c in self.copies],
                "ops": [_plain(o) for o in self.ops],
                "warnings": list(self.warnings),
                "flops": self.flops,
                "peak_memory": self.peak_memory,
                "memory": dict(self.memory),
            },
            indent=1,
        )

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """A plan from its file, on an abstract mesh.

        Raises:
            ValueError: a file that is no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            log = Log(
                [_typed(Collective, c) for c in data["collectives"]],
                [_typed(Copy, c) for c in data["copies"]],
                [_typed(OpRecord, o) for o in data["ops"]],
                warnings=list(data["warnings"]),
                memory=dict(data["memory"]),
                mesh=make_mesh(data["mesh"], transport="abstract") if data["mesh"] else None,
            )
            loaded = Plan(log)
            loaded.flops, loaded.peak_memory = float(data["flops"]), int(data["peak_memory"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no plan: {error}") from error
        return loaded


@dataclass(frozen=True)
class PlanDiff:
    """Rows that differ between two plans: key, (count, bytes) before and after."""

    rows: tuple[tuple[tuple[str, ...], tuple[int, float], tuple[int, float]], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no difference"
        head = ("phase", "kind", "axes", "op", "source", "count", "bytes")
        return _aligned(
            [
                head,
                *(
                    (*key, f"{a[0]} -> {b[0]}", f"{format_bytes(a[1])} -> {format_bytes(b[1])}")
                    for key, a, b in self.rows
                ),
            ]
        )


def _total(shares: Iterable[float]) -> float:
    """The sum, whole where it is: thirds of a block add up without a rounding error."""
    total = math.fsum(shares)
    return int(total) if total.is_integer() else total


def _tail(plan: Plan) -> str:
    lines = [f"warning: {text}" for text in plan.warnings]
    if plan.flops:
        lines.append(f"{plan.flops:.4g} FLOPs per device")
    if plan.peak_memory:
        lines.append(f"peak {format_bytes(plan.peak_memory)} per device")
    return "".join("\n" + line for line in lines)


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _plain(entry: Any) -> dict[str, Any]:
    data = dataclasses.asdict(entry)
    if "dtype" in data:
        data["dtype"] = _NAMES.get(data["dtype"], str(data["dtype"]))
    return data


def _typed(kind: type, data: Mapping[str, Any]) -> Any:
    values = dict(data)
    if "dtype" in values:
        values["dtype"] = _DTYPES[values["dtype"]]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@contextmanager
def record() -> Iterator[Plan]:
    """Keep what runs inside the block.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4), sw.make_mesh({"data": 2}), "n/data")
    >>> with sw.record() as plan:
    ...     _ = x.sum().full_tensor()
    >>> plan.collectives[0].kind
    'all_reduce'
    """
    made = Plan()
    meter = Meter()
    with logs.opened(made._log), meter:
        yield made
    shards = len(made.mesh.held) if made.mesh is not None else 1
    made.flops = meter.flops / shards


def abstract(tree: Any, mesh: Mesh | None = None) -> Any:
    """The same types without memory: meta tensors on the abstract twin of their mesh or `mesh`."""

    def one(x: Any) -> Any:
        if not isinstance(x, ShardedTensor):
            return x
        to = abstract_twin(mesh or x.mesh)
        kind = make_type(to, x.layout, x.shape, x.dtype, x._type.grad)
        shard = torch.empty(kind.local_shape, dtype=x.dtype, device="meta")
        if x.layout.memory != "device":
            away(shard)
        made = ShardedTensor((shard,), kind)
        path = getattr(x, "_path", None)
        if path is not None:
            made._path = path
        return made

    return optree.tree_map(lambda x: None if x is None else one(x), tree, none_is_leaf=True)


def plan(f: Callable[..., Any], *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> Plan:
    """What `f(*args)` would run, without data and without devices.

    Args:
        f: a function of trees of ShardedTensors; it must not read values.
        *args: its arguments, on any mesh: only their types are used.
        mesh: plan for this mesh instead; the arguments keep their layouts.
        **kwargs: passed on.

    Returns:
        The plan; its `result` holds the types of what `f` returns.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 512, "tensor": 8}, transport="abstract")
    >>> x, w = sw.zeros((4096, 64), mesh, "b/data d"), sw.zeros((64, 64), mesh, "d f/tensor")
    >>> made = sw.plan(sw.value_and_grad(lambda w: (x @ w).sum()), w)
    >>> made.count(phase="backward", axis="data"), made.result[1]
    (1, f32[64 64/tensor] local[64 8] on mesh(data=512, tensor=8))
    """
    made = Plan()
    args, kwargs = abstract(args, mesh), abstract(kwargs, mesh)
    meter = Meter()
    flat = optree.tree_leaves((args, kwargs))  # pyright: ignore
    leaves = [x for x in flat if isinstance(x, ShardedTensor)]
    for x in leaves:
        meter.hold(x._shards[0])
    held = meter.live
    with logs.opened(made._log), meter:
        made.result = f(*args, **kwargs)
    made.flops, made.peak_memory = meter.flops, meter.peak
    memory = made._log.memory
    memory["buffers"] = max(0, held - memory.get("parameters", 0))
    known = sum(memory.get(k, 0) for k in ("parameters", "gradients", "buffers"))
    memory["activations"] = max(0, meter.peak - known)
    if made._log.mesh is None and leaves:
        made._log.mesh = leaves[0].mesh
    return made


def local_bytes(tree: Any) -> int:
    """Bytes in device memory that one device holds of the ShardedTensors in a tree."""
    return sum(
        math.prod(x.local_shape) * x.element_size()
        for x in optree.tree_leaves(tree)
        if isinstance(x, ShardedTensor) and x.layout.memory == "device"
    )


def _picture(made: Plan) -> tuple[Part, ...]:
    """The plan as it prints, and what each mesh axis carries."""
    axes = tuple(dict.fromkeys(a for c in made.collectives for a in c.axes))
    sizes = tuple(made.bytes(axis=axis) for axis in axes)
    bars = (Bars(axes, sizes, tuple(map(format_bytes, sizes))),) if axes else ()
    return Lines(str(made)), *bars


register(Plan, "a plan", _picture)
