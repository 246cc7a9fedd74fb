"""`Graph`: a captured step as a reader wants it: one line an op, and what each collective moves.

all_gather = all_gather(p1_embed, dim=0)  f32[32 16]  # all_gather over data, 1 KiB, w_up
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layouts.sharded import DTYPES
from ...meshlib.errors import format_bytes
from ...meshlib.record import Collective

_MOVING = ("shardwise_comm", "_c10d_functional")
# In the comment of a collective, or the same for all ops of a graph.
_HIDDEN = ("mesh", "axes", "number", "group_name", "device", "pin_memory", "layout")


@dataclass(frozen=True)
class Graph:
    """A captured step: prints one line an op; `module` is the torch.fx.GraphModule."""

    module: torch.fx.GraphModule

    def __str__(self) -> str:
        return printed(self.module)

    def __len__(self) -> int:
        return len(self.module.graph.nodes)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What the graph moves between devices, in its order, as in a plan."""
        found: list[Collective] = []
        for node in self.module.graph.nodes:
            entries = node.meta.get("collective", ())
            found += [entries] if isinstance(entries, Collective) else entries
        return tuple(found)


def printed(module: torch.fx.GraphModule) -> str:
    """One line an op: name, op, operands, type of the result, and what a collective moves."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {', '.join(map(str, node.all_input_nodes))}")
        elif node.target is not operator.getitem:
            lines.append("  ".join(filter(None, (_call(node), _type(node), _comment(node)))))
    return "\n".join(lines)


def _call(node: torch.fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    results = _results(node)
    if node.op == "get_attr":
        return f"{results} = {node.target}"
    arguments = _arguments(node)
    return f"{results} = {_name(node.target)}({', '.join(arguments)})"


def _results(node: torch.fx.Node) -> str:
    """The node's name; of an op with several results the names of those that are used."""
    items = {u.args[1]: u.name for u in node.users if u.target is operator.getitem}
    if not items:
        return node.name
    return ", ".join(items.get(i, "_") for i in range(max(items) + 1))  # pyright: ignore


def _name(target: Any) -> str:
    """The op alone: aten.mm.default is mm."""
    if isinstance(target, torch._ops.OpOverload):
        return target._opname if target.namespace in ("aten", *_MOVING) else target._schema.name
    return getattr(target, "__name__", str(target))


def _arguments(node: torch.fx.Node) -> list[str]:
    target = node.target
    named = [""] * len(node.args)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _MOVING:
        named = [argument.name for argument in target._schema.arguments]
    shown = []
    for name, value in zip(named, node.args, strict=False):
        if name not in _HIDDEN:
            shown.append(f"{name}={_text(value)}" if shown and name else _text(value))
    shown += [f"{k}={_text(v)}" for k, v in node.kwargs.items() if k not in _HIDDEN]
    return shown


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    return str(value)


def _type(node: torch.fx.Node) -> str:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(first, Tensor):
        return ""
    dtype = DTYPES.get(first.dtype, str(first.dtype).removeprefix("torch."))
    return f"{dtype}[{' '.join(map(str, first.shape))}]"


def _comment(node: torch.fx.Node) -> str:
    parts: list[str] = []
    entries = node.meta.get("collective", ())
    entries = (entries,) if isinstance(entries, Collective) else tuple(entries)
    if entries:
        parts += sorted({f"{e.kind} over {'/'.join(e.axes)}" for e in entries})
        parts.append(format_bytes(sum(e.bytes for e in entries)))
        if len(entries) > 1:
            parts.append(f"{len(entries)} in one")
        parts += _unique(e.path for e in entries)
        parts += _unique(e.source for e in entries)
    if "path" in node.meta:
        parts.append(node.meta["path"])
    return f"# {', '.join(parts)}" if parts else ""


def _unique(texts: Iterable[str | None], most: int = 3) -> list[str]:
    found = list(dict.fromkeys(text for text in texts if text))
    return found[:most] + (["..."] if len(found) > most else [])
