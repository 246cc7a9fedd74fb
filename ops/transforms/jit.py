"""`jit`: a whole step (forward, backward, optimizer) as one graph of local ops and collectives.

The function runs once on fake tensors, where `make_fx` writes down every op of every shard; the
types of its results are known then, so nothing of the library is left in the graph. Passes go over
it, then inductor turns it into code. A later call looks its arguments' types up, hands their shards
to the code and wraps what comes back.

Plain numbers and strings among the arguments are part of the program: other values are another
program. Random keys are data: one program serves all of them.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...layouts.sharded import ShardedTensor
from ...meshlib.traced import capturing
from ..keys import beside
from ..plan import Plan, record
from . import passes
from .donation import give_up
from .graph import Graph
from .leaves import under_functorch
from .options import Options, parsed

NAMESPACE = "shardwise"  # in which a ShardedTensor opens into its shards


@dataclass(frozen=True)
class Program:
    """One signature of a function, compiled.

    Attributes:
        graph: what runs, after the passes.
        captured: the graph before them: each collective is one op.
        plan: what the step communicates and computes, recorded while it was captured.
        seconds: that capture and compilation took.
        run: shards in, shards out.
        result: the structure of what the function returns.
        constants: leaves of it that are no tensors, by position.
    """

    graph: Graph
    captured: Graph
    plan: Plan
    seconds: float
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    result: Any
    constants: tuple[tuple[int, Any], ...]

    def __call__(self, shards: Sequence[Tensor]) -> Any:
        """The function's result."""
        leaves = list(self.run(shards))
        for position, value in self.constants:
            leaves.insert(position, value)
        return optree.tree_unflatten(self.result, leaves)


class Jitted:
    """What `jit` returns: call it like the function."""

    def __init__(
        self,
        f: Callable[..., Any],
        donated: frozenset[int],
        static: frozenset[int],
        options: Options,
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
    def captured(self) -> Graph:
        """The graph of the latest call before any pass: each collective is one line."""
        return self._latest().captured

    @property
    def plan(self) -> Plan:
        """The plan of the latest call."""
        return self._latest().plan

    @property
    def compile_seconds(self) -> float:
        """Seconds that capturing and compiling the latest call's program took."""
        return self._latest().seconds

    def _latest(self) -> Program:
        if self.last is None:
            raise ValueError("jit: nothing is compiled before the first call")
        return self.last

    def __call__(self, *args: Any) -> Any:
        """The function's result, from compiled code; inside another transform, from the function.

        Raises:
            ValueError: a number among donate_argnums that is no argument's.
        """
        if self.donated and max(self.donated) >= len(args):
            raise ValueError(f"jit: donate_argnums={max(self.donated)} of {len(args)} arguments")
        fixed = tuple(args[i] if i in self.static else None for i in range(len(args)))
        free: Any = tuple(None if i in self.static else x for i, x in enumerate(args))
        leaves, spec = optree.tree_flatten(free, none_is_leaf=False, namespace=NAMESPACE)
        leaves = beside(leaves)
        if _is_inside(leaves):
            return self.f(*args)
        shards = [x.detach() for x in leaves if isinstance(x, Tensor)]
        given = self._given(free)
        key = (
            spec,
            tuple(map(_exact, fixed)),
            tuple(None if isinstance(x, Tensor) else _exact(x) for x in leaves),
            tuple((x.shape, x.dtype, x.device, x.stride()) for x in shards),
            tuple(given),
            torch.is_grad_enabled(),
        )
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = self._program(
                spec, fixed, leaves, shards, given, _where(free)
            )
        self.last = program
        with torch.no_grad():
            result = program(shards)
        if self.donated:
            give_up([args[number] for number in self.donated], result)
        return result

    def _program(
        self,
        spec: Any,
        fixed: Sequence[Any],
        leaves: Sequence[Any],
        shards: Sequence[Tensor],
        given: Sequence[int],
        where: tuple[bool, int],
    ) -> Program:
        from . import lowering, pipeline

        between, devices = where
        start = time.perf_counter()
        found: dict[str, Any] = {}

        def flat(*inputs: Tensor) -> list[Tensor]:
            rest = iter(inputs)
            filled = [next(rest) if isinstance(x, Tensor) else x for x in leaves]
            args = list(optree.tree_unflatten(spec, filled))
            for number in self.static & set(range(len(args))):
                args[number] = fixed[number]
            with record() as made, capturing(made._log):
                result = self.f(*args)
            results, found["spec"] = optree.tree_flatten(result, namespace=NAMESPACE)
            found["plan"] = made
            found["constants"] = tuple(
                (i, x) for i, x in enumerate(results) if not isinstance(x, Tensor)
            )
            return [x for x in results if isinstance(x, Tensor)]

        module = lowering.captured(flat, shards)
        lowering.annotated(module, found["plan"]._log)
        lowering.named(module, _names(self.f, spec, leaves))
        captured = Graph(lowering.copied(module))
        lowering.simulated(module)
        passes.simplified(module)
        between = between or lowering.is_distributed(module)
        if between and (self.options.backend != "eager" or self.options.chosen):
            lowering.lowered(module)
        module = pipeline.optimized(module, self.options, None if between else devices)
        passes.reuse(module, given)
        run = passes.compiled(module, shards, self.options)
        seconds = time.perf_counter() - start
        plan, result, constants = found["plan"], found["spec"], found["constants"]
        return Program(Graph(module), captured, plan, seconds, run, result, constants)

    def _given(self, args: Sequence[Any]) -> list[int]:
        """Positions, among the shards, of those whose memory the results may take.

        Not where storages are shared, as replicas of a simulated mesh do: the code would write over
        what another shard has yet to read.
        """
        if not self.donated:
            return []
        positions: list[tuple[int, int]] = []
        counts: dict[int, int] = {}
        at = 0
        for number, arg in enumerate(args):
            several = any(
                isinstance(x, ShardedTensor) and len(x._shards) > 1 for x in optree.tree_leaves(arg)
            )
            for leaf in optree.tree_leaves(arg, namespace=NAMESPACE):
                if not isinstance(leaf, Tensor):
                    continue
                storage = leaf.untyped_storage()._cdata
                counts[storage] = counts.get(storage, 0) + 1
                if number in self.donated and not several:
                    positions.append((at, storage))
                at += 1
        return [position for position, storage in positions if counts[storage] == 1]


def _names(f: Callable[..., Any], spec: Any, leaves: Sequence[Any]) -> list[str]:
    """What the tensors among the leaves are called: the parameter of `f`, the keys, the device."""
    try:
        known = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a builtin
        known = ()
    parameters = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = []
    for (number, *keys), leaf in zip(spec.paths(), leaves, strict=True):
        if isinstance(leaf, Tensor):
            first = parameters[number] if number < len(parameters) else f"argument_{number}"
            names.append(".".join([first, *map(str, keys)]))
    return names


def _is_inside(leaves: Sequence[Any]) -> bool:
    """Whether the call is part of what is differentiated, mapped or captured.

    Then the function runs as it is: compiled code is no part of such a program.
    """
    return (
        under_functorch()
        or forward_ad._current_level >= 0
        or get_proxy_mode() is not None
        or (
            torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        )
    )


def _exact(value: Any) -> Any:
    """A value as part of a key: 2 is not 2.0, nor 0.0 -0.0, and nan is itself."""
    if isinstance(value, tuple):
        return tuple(map(_exact, value))
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _where(args: Any) -> tuple[bool, int]:
    """Whether several processes hold these tensors, alike in all; devices that this one holds."""
    known = [x for x in optree.tree_leaves(args) if isinstance(x, ShardedTensor)]
    between = any(x.mesh.transport == "distributed" for x in known)
    return between, max((len(x._shards) for x in known), default=1)


def jit(
    f: Callable[..., Any] | None = None,
    *,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The function as one compiled graph; also a decorator.

    Args:
        f: a pure function of trees of ShardedTensors; positional arguments only.
        donate_argnums: arguments whose memory the results may take; they raise if used again.
        static_argnums: arguments that are part of the program whatever they are; hashable.
        options: "backend" ("eager" runs the graph as it is), "passes", "bucket_bytes",
            "window_bytes", "memory_budget" (see `Options`); the others are inductor's.

    Returns:
        A callable with `.graph` (what runs) and `.captured` (each collective one op; both print),
        `.plan` and `.compile_seconds` of its latest call.

    Cost: the first call with given types captures and compiles; inductor keeps compiled code on
    disk, so that another process starts faster (`benchmarks/compile.py`). On a distributed mesh all
    processes have to make that call, and run the same collectives in the same order.

    Raises:
        ValueError: an unknown option, backend or pass.
        BudgetError: on a call; the step does not fit the memory_budget, on one rank at least.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(4, 4), mesh, "a b/tensor")
    >>> w = sw.shard(torch.ones(4, 2), mesh, "b/tensor c")
    >>> f = sw.jit(lambda x, w: sw.reshard(x @ w, "a c"), options={"backend": "eager"})
    >>> f(x, w)
    f32[4 2] local[4 2] on mesh(tensor=2)
    >>> f.plan.count(kind="all_reduce")
    1
    """
    if f is None:
        return functools.partial(
            jit, donate_argnums=donate_argnums, static_argnums=static_argnums, options=options
        )

    def numbers(given: int | Sequence[int]) -> frozenset[int]:
        return frozenset((given,) if isinstance(given, int) else given)

    return Jitted(f, numbers(donate_argnums), numbers(static_argnums), parsed(options or {}))
