"""`jit`: a whole step (forward, backward, optimizer) as one graph of local ops and collectives.

The function runs once on fake tensors, where every op of every shard is written down by `make_fx`;
what it returns is known by type, so the graph has no branches left. Passes go over the graph, then
inductor turns it into code. A call looks its arguments' types up, hands their shards to the code
and wraps the results: nothing of the library runs in between.

The values of plain numbers among the arguments, and of keys, are part of the graph.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.sharded import ShardedTensor
from ..plan import Plan, record
from . import passes
from .donation import give_up

NAMESPACE = "shardwise"


@dataclass(frozen=True)
class Graph:
    """A captured step: prints one line an op, each collective with its axes and bytes."""

    module: torch.fx.GraphModule

    def __str__(self) -> str:
        return passes.printed(self.module)

    def __len__(self) -> int:
        return len(self.module.graph.nodes)


@dataclass(frozen=True)
class Program:
    """One compiled signature of a function.

    Attributes:
        graph: after the passes.
        plan: what it communicates and computes, as recorded while it was captured.
        seconds: that capture and compilation took.
        run: shards in, shards out.
        result: the structure of what the function returns; its leaves that are no tensors.
    """

    graph: Graph
    plan: Plan
    seconds: float
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    result: Any
    constants: tuple[tuple[int, Any], ...]

    def __call__(self, shards: Sequence[Tensor]) -> Any:
        leaves = list(self.run(shards))
        for position, value in self.constants:
            leaves.insert(position, value)
        return optree.tree_unflatten(self.result, leaves)


class Jitted:
    """What `jit` returns: call it like the function."""

    def __init__(
        self, f: Callable[..., Any], donated: frozenset[int], static: frozenset[int], options: Any
    ) -> None:
        self.f = f
        self.donated = donated
        self.static = static
        self.options = options
        self.programs: dict[Any, Program] = {}
        self.last: Program | None = None
        functools.update_wrapper(self, f, updated=())

    @property
    def graph(self) -> Graph:
        """The graph of the latest call."""
        return self._latest().graph

    @property
    def plan(self) -> Plan:
        """The plan of the latest call."""
        return self._latest().plan

    @property
    def compile_seconds(self) -> float:
        """Seconds that capturing and compiling the latest call's signature took."""
        return self._latest().seconds

    def _latest(self) -> Program:
        if self.last is None:
            raise ValueError("jit: nothing is compiled before the first call")
        return self.last

    def __call__(self, *args: Any) -> Any:
        leaves, spec = optree.tree_flatten(args, namespace=NAMESPACE)
        shards = [x for x in leaves if isinstance(x, Tensor)]
        others = tuple(None if isinstance(x, Tensor) else x for x in leaves)
        key = (
            spec,
            others,
            tuple((x.shape, x.dtype, x.device) for x in shards),
            torch.is_grad_enabled(),
        )
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = self._compiled(spec, leaves, args)
        self.last = program
        with torch.no_grad():
            result = program([x.detach() for x in shards])
        for number in self.donated:
            give_up(args[number], result)
        return result

    def _compiled(self, spec: Any, leaves: Sequence[Any], args: Any) -> Program:
        start = time.perf_counter()
        found: dict[str, Any] = {}

        def flat(*shards: Tensor) -> list[Tensor]:
            given = iter(shards)
            filled = [next(given) if isinstance(x, Tensor) else x for x in leaves]
            with record() as made:
                result = self.f(*optree.tree_unflatten(spec, filled))
            results, found["spec"] = optree.tree_flatten(result, namespace=NAMESPACE)
            found["plan"] = made
            found["constants"] = tuple(
                (i, x) for i, x in enumerate(results) if not isinstance(x, Tensor)
            )
            return [x for x in results if isinstance(x, Tensor)]

        inputs = [x.detach() for x in leaves if isinstance(x, Tensor)]
        module = passes.captured(flat, inputs)
        passes.reuse(module, self._given(args))
        run = passes.compiled(module, inputs, self.options)
        seconds = time.perf_counter() - start
        return Program(Graph(module), found["plan"], seconds, run, found["spec"], found["constants"])

    def _given(self, args: Sequence[Any]) -> list[int]:
        """Positions, among the shards, of those that the code may write into."""
        positions: list[int] = []
        at = 0
        for number, arg in enumerate(args):
            count = sum(
                isinstance(x, Tensor) for x in optree.tree_leaves(arg, namespace=NAMESPACE)
            )
            if number in self.donated:
                positions += range(at, at + count)
            at += count
        return positions


def jit(
    f: Callable[..., Any] | None = None,
    *,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    options: Any = None,
) -> Any:
    """The function as one compiled graph; also a decorator.

    Args:
        f: a pure function of trees of ShardedTensors, on any mesh but an abstract one.
        donate_argnums: arguments whose memory the results may take; they raise if used again.
        static_argnums: arguments that are part of the program, compared by `==`.
        options: of inductor.

    Returns:
        A callable with `.graph` (prints), `.plan` and `.compile_seconds` of its latest call.

    Cost: the first call with given types captures and compiles; inductor keeps compiled code on
    disk, so that another process starts faster.
    """
    if f is None:
        return functools.partial(
            jit, donate_argnums=donate_argnums, static_argnums=static_argnums, options=options
        )

    def numbers(given: int | Sequence[int]) -> frozenset[int]:
        return frozenset((given,) if isinstance(given, int) else given)

    return Jitted(f, numbers(donate_argnums), numbers(static_argnums), options)
