"""How long the values of a graph live, and how much memory they take at the worst moment.

A graph is run in order; a value is dropped after its last use, and memory is free again when no
value lies in it. Views lie in the memory of what they view, and a wait in that of its collective.
Inputs and constants are held by the caller all the time. Workspace inside an op is not seen, as in
`ops.meter`, with which the figures agree byte for byte when the graph runs op by op.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from .order import is_wait


@dataclass(frozen=True)
class Leaf:
    """One tensor that a node yields.

    Attributes:
        bytes: of new memory; 0 where it lies in that of another tensor.
        of: that tensor: number of the operand among `all_input_nodes` and of its leaf; operand -1
            is the node itself.
    """

    bytes: int
    of: tuple[int, int] | None = None


Leaves = Mapping[Node, tuple[Leaf, ...]]


@dataclass(eq=False, repr=False, slots=True)
class Step:
    """One run of a node; a node that is recomputed has several."""

    node: Node
    inputs: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    is_again: bool = False

    @property
    def is_given(self) -> bool:
        """Whether the caller holds it: an input or a constant."""
        return self.node.op in ("placeholder", "get_attr")


@dataclass
class Lives:
    """What a run of steps holds.

    Attributes:
        at: place of each step.
        until: place of each step's last use; its own place where it has none.
        memory: numbers of the memories that a step's value lies in.
        sizes: bytes of each memory.
        holders: for each memory, the steps whose values lie in it.
        level: bytes held while each step runs.
    """

    at: dict[Step, int] = field(default_factory=dict)
    until: dict[Step, int] = field(default_factory=dict)
    memory: dict[Step, tuple[int, ...]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    holders: list[list[Step]] = field(default_factory=list)
    level: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes at the worst step."""
        return max(self.level, default=0)


def peak_bytes(module: GraphModule, fused: Sequence[str] = ()) -> int:
    """Bytes that running the graph op by op holds at its worst moment, inputs included.

    Args:
        module: a graph whose placeholders have `meta["val"]`.
        fused: beginnings of names of ops of which a compiler makes one kernel, such as "_foreach_":
            what one of them yields for others of them alone takes no memory.

    Cost: one run of the graph on fake tensors.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> module = make_fx(lambda x: (x + 1).sum(), tracing_mode="fake")(torch.ones(256))
    >>> peak_bytes(module)  # the input, the sum's operand, the sum
    2052
    """
    return lives(steps(module, fused)).peak


def steps(module: GraphModule, fused: Sequence[str] = ()) -> list[Step]:
    """The graph as a list of runs, one a node."""
    known = leaves(module)
    if fused:
        known = {node: _without_inner(node, mine, tuple(fused)) for node, mine in known.items()}
    made: dict[Node, Step] = {}
    for node in module.graph.nodes:
        made[node] = Step(node, tuple(made[n] for n in node.all_input_nodes), known[node])
    return list(made.values())


def leaves(module: GraphModule) -> Leaves:
    """Which memory each node's tensors lie in, from a run on fake tensors."""
    values: dict[Node, Any] = {}
    found: dict[Node, tuple[Leaf, ...]] = {}
    given: dict[int, None] = {}  # memories of inputs, which may share them
    mode = _mode(module)
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "placeholder":
            values[node] = node.meta.get("val")
        elif node.op == "get_attr":
            values[node] = _fake(mode, _attribute(module, str(node.target)))
        elif is_wait(node):
            values[node] = values[operands[0]]
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            with mode:
                values[node] = node.target(*args, **kwargs)
        else:
            found[node] = ()
            continue
        known: dict[int, tuple[int, int]] = {}
        for number, operand in enumerate(operands):
            for i, key in enumerate(_keys(values[operand])):
                known.setdefault(key, (number, i))
        mine: list[Leaf] = []
        for key, size in _pairs(values[node]):
            mine.append(Leaf(0, known[key]) if key in known else Leaf(0 if key in given else size))
            known.setdefault(key, (-1, len(mine) - 1))
            if node.op != "call_function":
                given[key] = None
        found[node] = tuple(mine)
    return found


def _without_inner(node: Node, mine: tuple[Leaf, ...], fused: tuple[str, ...]) -> tuple[Leaf, ...]:
    """Leaves that only ops of the same kernel read take no memory."""

    def is_fused(n: Node) -> bool:
        return getattr(n.target, "_opname", "").startswith(fused)

    if not is_fused(node) or any(u.target is not operator.getitem for u in node.users):
        return mine
    read = [item.args[1] for item in node.users if not all(map(is_fused, item.users))]
    return tuple(
        leaf if leaf.of is not None or i in read else Leaf(0) for i, leaf in enumerate(mine)
    )


def lives(run: Sequence[Step]) -> Lives:
    """Simulate the run."""
    found = Lives()
    for i, step in enumerate(run):
        found.at[step] = found.until[step] = i
        for operand in step.inputs:
            found.until[operand] = i
    ends: list[list[Step]] = [[] for _ in run]
    for step, i in found.until.items():
        if not step.is_given:
            ends[i].append(step)
    counts: list[int] = []
    # What the caller holds is there before the first op runs, wherever the graph names it.
    now = sum(leaf.bytes for step in run if step.is_given for leaf in step.leaves)
    for i, step in enumerate(run):
        mine: list[int] = []
        for leaf in step.leaves:
            if leaf.of is None:
                mine.append(len(counts))
                counts.append(0)
                found.sizes.append(leaf.bytes)
                found.holders.append([])
                now += 0 if step.is_given else leaf.bytes
            else:
                operand, number = leaf.of
                source = mine if operand < 0 else found.memory[step.inputs[operand]]
                mine.append(source[number])
        found.memory[step] = tuple(mine)
        for memory in dict.fromkeys(mine):
            counts[memory] += 1
            found.holders[memory].append(step)
        found.level.append(now)
        for ended in ends[i]:
            for memory in dict.fromkeys(found.memory[ended]):
                counts[memory] -= 1
                if not counts[memory]:
                    now -= found.sizes[memory]
    return found


def _mode(module: GraphModule) -> Any:
    for node in module.graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
    return torch._subclasses.FakeTensorMode()


def _fake(mode: Any, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _attribute(module: GraphModule, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _keys(value: Any) -> list[int]:
    return [key for key, _ in _pairs(value)]


def _pairs(value: Any) -> list[tuple[int, int]]:
    """Identity and bytes of the memory of each tensor in a value."""
    storages = [x.untyped_storage() for x in tree_leaves(value) if isinstance(x, Tensor)]
    return [(s._cdata, s.nbytes()) for s in storages]
