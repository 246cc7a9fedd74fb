"""Compute values again instead of keeping them, until the graph of a step fits a memory budget.

The graph holds forward, backward and optimizer, so what the backward needs is simply a value with a
long pause between two uses. At the worst moment of the step, values in such a pause are candidates:
dropped after their last use before it and computed again right before the next one, from values
that are there at that time or are computed again themselves. The candidate that frees the most
bytes for the longest time per cost goes first; then the step is simulated anew.

The same ops run again on the same operands, so every bit stays. Random ops, ops that write to their
operands, and collectives (unless allowed) never run twice.

Source: Chen et al. 2016 (arXiv 1604.06174); greedy by memory and time over cost as in Kirisame et
al. 2021 (arXiv 2006.09616), section 3, here before the step runs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from ...meshlib.errors import format_bytes
from ..budget import BudgetError, parse_bytes
from ..meter import formulas
from .lifetimes import Lives, Step, lives, steps
from .order import KINDS, is_random, is_view, is_wait, name_of, size, writes

PER_BYTE = 100  # FLOPs a device does while it moves a byte to or from its memory
PER_BYTE_SENT = 1000  # ... to or from another device
LONGEST = 200  # nodes that one candidate may compute again
TIMES = 8  # runs of a node in all
ROUNDS = 32  # a round frees about this part of the peak; the next looks at what is worst then
CONSIDERED = 256  # largest values in a pause that are weighed at a time
INDUCTOR_FUSES = ("_foreach_",)  # an optimizer's ops on lists of tensors: one kernel
PURE = ("aten", "prims", "shardwise")  # namespaces of ops that depend on their operands alone


def recomputed(
    module: GraphModule,
    budget: int | str | None,
    *,
    again: Collection[str] = (),
    fused: Sequence[str] = (),
    devices: int = 1,
) -> GraphModule:
    """Recompute values until the graph's peak is within a budget.

    Args:
        module: the graph of a whole step, with `meta["val"]`; changed in place.
        budget: bytes per device, inputs included, or a text such as "70GiB". None: change nothing.
        again: kinds of collectives that may run again, such as ("all_gather",): gathers of
            parameters that are kept as shards.
        fused: ops whose values for each other take no memory, as in `peak_bytes`; for a graph that
            inductor compiles, INDUCTOR_FUSES.
        devices: whose tensors the graph holds; those of a simulated mesh have a budget each.

    Returns:
        The module: the same results, bit for bit. Nodes that run again are marked by
        `meta["recomputed"]`.

    Raises:
        BudgetError: the peak stays above the budget; the message says the least peak that was
            reached and what is held then. The module is as it was.

    Cost: FLOPs instead of bytes: pointwise work and norms first, then matmuls and attention. The
    search simulates the graph some hundred times at most.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> def step(x):
    ...     kept = x.exp()  # read at the end
    ...     return (x.sin() + 1).sum() + kept.sum()
    >>> module = make_fx(step, tracing_mode="fake")(torch.ones(256))
    >>> [n.name for n in recomputed(module, "3KiB").graph.nodes]
    ['x_1', 'sin', 'add', 'sum_1', 'exp', 'sum_2', 'add_1', 'output']
    """
    if budget is None:
        return module
    allowed = (budget if isinstance(budget, int) else parse_bytes(budget)) * devices
    search = _Search(steps(module, fused), allowed, frozenset(again))
    if search.lives.peak <= allowed:
        return module
    search.go()
    if search.lives.peak > allowed:
        text = _too_small(search.run, search.lives, allowed, devices)
        raise BudgetError(text, -((allowed - search.lives.peak) // devices))
    module.graph = _written(module, search.run)
    module.recompile()
    return module


@dataclass
class _Choice:
    """A memory that may be free during a pause.

    Attributes:
        memory: number of it.
        before: place before which it is there again.
        copies: what runs again.
        reads: memories that those runs need and that are there.
        freed: bytes, less what has to be kept instead.
        cost: in FLOPs.
        score: bytes freed times length of the pause, per cost.
    """

    memory: int
    before: int
    copies: list[Step]
    reads: dict[int, None]
    freed: int
    cost: float
    score: float

    @property
    def key(self) -> tuple[Node, ...]:
        """The same for the same attempt in a later round."""
        return tuple(step.node for step in self.copies)


Kept = Callable[["_Search", Step], bool]


class _Search:
    """Greedy choice of what to recompute."""

    def __init__(self, run: Sequence[Step], budget: int, again: frozenset[str]) -> None:
        self.run = list(run)
        self.budget = budget
        self.again = again
        self.lives = lives(self.run)
        self.times: dict[Node, int] = {}
        self.costs: dict[Node, float] = {}
        self.refused: dict[tuple[int, tuple[Node, ...]], None] = {}
        written = [i for i, step in enumerate(self.run) if writes(step.node)]
        # Operands may have changed behind the first op that writes.
        self.first_write = self.run[written[0]] if written else None

    def go(self) -> None:
        """Recompute until the peak is within the budget, or nothing helps any more.

        The way down is the same for every budget, so that the least peak is one that can be had.
        """
        while self.lives.peak > self.budget:
            choices = self._choices()
            if not choices:
                return
            peak = self.lives.peak
            missing, share = peak - self.budget, peak // ROUNDS
            if missing < share and self._try(self._together(choices, missing), self.budget):
                return
            chosen = self._together(choices, share)
            if not self._try(chosen, peak) and (
                len(chosen) == 1 or not self._try(chosen[:1], peak)
            ):
                self.refused[len(self.run), chosen[0].key] = None

    def _try(self, chosen: Sequence[_Choice], limit: int) -> bool:
        """Carry out; take back if the peak is above the limit then."""
        old = self.run, self.lives, [step.inputs for step in self.run]
        for choice in sorted(chosen, key=lambda c: -c.before):
            self._carry_out(choice)
        self._drop_unread([step for choice in chosen for step in choice.copies])
        self.lives = lives(self.run)
        if self.lives.peak > limit:
            self.run, self.lives = old[0], old[1]
            for step, inputs in zip(self.run, old[2], strict=True):
                step.inputs = inputs
            return False
        for choice in chosen:
            for step in choice.copies:
                self.times[step.node] = self.times.get(step.node, 1) + 1
        return True

    def _carry_out(self, choice: _Choice) -> None:
        """Insert the runs and let every later use read them."""
        new: dict[Step, Step] = {}
        for step in choice.copies:
            inputs = tuple(new.get(s, s) for s in step.inputs)
            new[step] = Step(step.node, inputs, step.leaves, is_again=True)
        later = self.run[choice.before :]
        for step in later:
            if any(s in new for s in step.inputs):
                step.inputs = tuple(new.get(s, s) for s in step.inputs)
        self.run = [*self.run[: choice.before], *new.values(), *later]

    def _drop_unread(self, runs: Sequence[Step]) -> None:
        """Leave out first runs that nothing reads any more: the value is only computed later."""
        reads: dict[Step, int] = {}
        for step in self.run:
            for operand in step.inputs:
                reads[operand] = reads.get(operand, 0) + 1
        gone: dict[Step, None] = {}
        for step in sorted(dict.fromkeys(runs), key=lambda s: -self.lives.at[s]):
            if not reads.get(step):
                gone[step] = None
                for operand in step.inputs:
                    reads[operand] -= 1
        self.run = [step for step in self.run if step not in gone]

    def _together(self, choices: Sequence[_Choice], missing: int) -> list[_Choice]:
        """The best choices that do not touch each other's memories, until they free enough."""
        chosen: list[_Choice] = []
        dropped: dict[int, None] = {}
        read: dict[int, None] = {}
        for choice in choices:
            if choice.memory in read or any(memory in dropped for memory in choice.reads):
                continue
            chosen.append(choice)
            dropped[choice.memory] = None
            read.update(choice.reads)
            missing -= choice.freed
            if missing <= 0:
                break
        return chosen

    def _choices(self) -> list[_Choice]:
        """Candidates at the worst moment, the best first."""
        now = self.lives
        worst = now.level.index(now.peak)
        pauses: list[tuple[int, int, int]] = []
        for memory, holders in enumerate(now.holders):
            if not now.sizes[memory] or holders[0].is_given or now.at[holders[0]] >= worst:
                continue
            if max(now.until[step] for step in holders) > worst:
                pauses.append((-now.sizes[memory], memory, worst))
        uses = self._uses([memory for _, memory, _ in sorted(pauses)[:CONSIDERED]])
        found: list[_Choice] = []
        for memory, places in uses.items():
            if worst in places:
                continue
            start = max((i for i in places if i < worst), default=worst)
            end = min(i for i in places if i > worst)
            for kept in (_everything, _heavy, _nothing):
                choice = self._choice(memory, worst, start, end, kept)
                if choice is not None and (len(self.run), choice.key) not in self.refused:
                    found.append(choice)
        return sorted(found, key=lambda c: (-c.score, c.memory, c.before))

    def _uses(self, memories: Sequence[int]) -> dict[int, list[int]]:
        """Places at which each memory is made or read."""
        found: dict[int, list[int]] = {memory: [] for memory in memories}
        for i, step in enumerate(self.run):
            for source in (step, *step.inputs):
                for memory in self.lives.memory[source]:
                    if memory in found:
                        found[memory].append(i)
        return found

    def _choice(self, memory: int, worst: int, start: int, end: int, kept: Kept) -> _Choice | None:
        """How to have a memory's values again at `end`; None if that cannot be or frees nothing."""
        now = self.lives
        if self.first_write is not None and end > now.at[self.first_write]:
            return None
        copies: dict[Step, None] = {}
        reads: dict[int, None] = {}
        instead: dict[int, None] = {}
        # Views that are made after the pause are made of these.
        stack = [s for s in now.holders[memory] if now.at[s] < worst < now.until[s]]
        while stack:
            step = stack.pop()
            if step in copies:
                continue
            held = now.memory[step]
            is_gone = memory in held
            is_there = step.is_given or (now.until[step] >= end and not is_gone)
            if is_there or (not is_gone and (kept(self, step) or not self._may_run(step))):
                reads.update(dict.fromkeys(held))
                if not is_there:
                    instead.update(dict.fromkeys(held))
                continue
            if not self._may_run(step) or len(copies) >= LONGEST:
                return None
            copies[step] = None
            stack += step.inputs
        extra = [m for m in instead if max(now.until[s] for s in now.holders[m]) <= worst]
        freed = now.sizes[memory] - sum(now.sizes[m] for m in extra)
        if freed <= 0:
            return None
        cost = sum(self._cost(step.node) for step in copies)
        ordered = sorted(copies, key=lambda s: now.at[s])
        score = freed * (end - start) / (cost + 1.0)
        return _Choice(memory, end, ordered, reads, freed, cost, score)

    def _may_run(self, step: Step) -> bool:
        """Whether a node may run again."""
        node = step.node
        if self.times.get(node, 1) >= TIMES or node.op != "call_function":
            return False
        if node.target is operator.getitem:
            return True
        if not isinstance(node.target, torch._ops.OpOverload) or is_random(node) or writes(node):
            return False
        if is_wait(node):
            return True
        kind = KINDS.get(name_of(node))
        return kind in self.again if kind else node.target.namespace in PURE

    def _cost(self, node: Node) -> float:
        """Of one run, in FLOPs."""
        if node not in self.costs:
            self.costs[node] = cost(node)
        return self.costs[node]


def _everything(search: _Search, step: Step) -> bool:
    """Keep all operands: only the value itself is computed again."""
    return not is_view(step.node)


def _heavy(search: _Search, step: Step) -> bool:
    """Keep the results of matmuls and attention; compute again what lies behind them."""
    return flops(step.node) > 0 or bool(name_of(step.node))


def _nothing(search: _Search, step: Step) -> bool:
    """Compute all of it again, from what is there."""
    return False


def flops(node: Node) -> float:
    """Floating-point operations of a matmul, a convolution or attention; 0 of other ops."""
    formula = formulas().get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return float(formula(*args, **kwargs, out_val=node.meta["val"]))


def cost(node: Node) -> float:
    """Of one run of a node, in FLOPs; bytes read and written count by what they take as long as."""
    if is_view(node) or is_wait(node) or node.target is operator.getitem:
        return 0.0
    if name_of(node):
        return PER_BYTE_SENT * float(size(node))
    moved = size(node) + sum(size(operand) for operand in node.all_input_nodes)
    return flops(node) + PER_BYTE * float(moved)


def _written(module: GraphModule, run: Sequence[Step]) -> Graph:
    """The graph in which the steps run in this order."""
    graph = Graph(owning_module=module)
    made: dict[Step, Node] = {}
    for step in run:
        operand = dict(zip(step.node.all_input_nodes, step.inputs, strict=True))
        made[step] = node = graph.node_copy(step.node, lambda n: made[operand[n]])  # noqa: B023
        if step.is_again:
            node.meta["recomputed"] = True
            entry = node.meta.get("collective")
            if entry is not None:
                node.meta["collective"] = dataclasses.replace(entry, phase="regather")
    graph.lint()
    return graph


def _too_small(run: Sequence[Step], now: Lives, budget: int, devices: int) -> str:
    """The text of a budget, of all devices together, that cannot be met."""
    worst = now.level.index(now.peak)
    held: dict[int, str] = {}
    for memory, holders in enumerate(now.holders):
        first = holders[0]
        until = max(now.until[step] for step in holders)
        if first.is_given or now.at[first] <= worst <= until:
            held[memory] = str(first.node)
    given = [m for m in held if now.holders[m][0].is_given]
    total = sum(now.sizes[m] for m in given)
    largest = sorted((m for m in held if m not in given), key=lambda m: (-now.sizes[m], m))
    rows = [f"  {total:>16,} B  arguments and constants"]
    rows += [f"  {now.sizes[m]:>16,} B  {held[m]}" for m in largest[:6]]
    if len(largest) > 6:
        rest = sum(now.sizes[m] for m in largest[6:])
        rows.append(f"  {rest:>16,} B  {len(largest) - 6} more")
    return "\n".join(
        [
            f"no choice of values to recompute fits {budget // devices:,} B per device"
            f"{f', {budget:,} B on {devices} of them' if devices > 1 else ''}: "
            f"{now.peak - budget:,} B are missing",
            f"the least peak is {now.peak:,} B ({format_bytes(now.peak)}), at {run[worst].node}, "
            "which holds:",
            *rows,
            "cut these tensors over more devices, or take smaller micro-batches",
        ]
    )
