"""Every defined op under every transform equals its twin; a wrong derivative is seen by each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_samples import KERNELS, SAMPLES
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shardwise.kernels.registry import Kernel, by_twin, define, rows

# Forward mode imports torch's decompositions for it, which use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

F = torch.func
Loss = Callable[..., Tensor]


def test_every_op_has_a_sample() -> None:
    assert set(SAMPLES) == set(KERNELS)


def flat(results: Any) -> tuple[Any, ...]:
    return tuple(torch.utils._pytree.tree_leaves(results))


def split(kernel: Kernel) -> tuple[list[int], list[Tensor], Callable[..., list[Any]]]:
    """Places and values of the differentiable inputs, and a function that fills them in."""
    values = list(SAMPLES[kernel.name]())
    at = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point()]

    def filled(*reals: Tensor) -> list[Any]:
        new = dict(zip(at, reals, strict=True))
        return [new.get(i, v) for i, v in enumerate(values)]

    return at, [values[i] for i in at], filled


def loss(call: Callable[..., Any], filled: Callable[..., list[Any]]) -> Loss:
    """A number that depends on every result, in a way that has second derivatives."""

    def value(*reals: Tensor) -> Tensor:
        results = flat(call(*filled(*reals)))
        total = torch.zeros((), dtype=torch.float64)
        for k, r in enumerate(results):
            weights = torch.arange(1.0, r.numel() + 1, dtype=r.dtype).view(r.shape)
            total = total + (torch.sin(r + k) * weights).sum()
        return total

    return value


def first(f: Loss, n: int) -> Callable[..., Any]:
    return F.grad(f, tuple(range(n)))


def squared(f: Loss, n: int) -> Loss:
    """Sum of squares of the gradient: its gradient is a second derivative."""
    return lambda *a: sum((g * g).sum() for g in first(f, n)(*a))  # type: ignore[return-value]


def by_backward(f: Loss, n: int) -> Callable[..., Any]:
    def run(*a: Tensor) -> Any:
        leaves = [x.clone().requires_grad_() for x in a]
        f(*leaves).backward()
        return [x.grad for x in leaves]

    return run


def by_double_backward(f: Loss, n: int) -> Callable[..., Any]:
    def run(*a: Tensor) -> Any:
        leaves = [x.clone().requires_grad_() for x in a]
        grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)

    return run


def batched(a: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([x, x * 0.5 + 0.25]) for x in a]


def by_compile(f: Loss, n: int) -> Callable[..., Any]:
    torch._dynamo.reset()
    return by_backward(torch.compile(f, backend="aot_eager", fullgraph=True), n)


def by_compiled_grad(f: Loss, n: int) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(first(f, n), backend="aot_eager", fullgraph=True)


def graph(f: Loss, n: int, a: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The gradient's graph; labels and the like are constants in it."""
    return make_fx(first(f, n), tracing_mode="fake", _allow_non_fake_inputs=True)(*a)


def by_make_fx(f: Loss, n: int) -> Callable[..., Any]:
    return lambda *a: graph(f, n, a)(*a)


def by_make_fx_then_compile(f: Loss, n: int) -> Callable[..., Any]:
    torch._dynamo.reset()
    return lambda *a: torch.compile(graph(f, n, a), backend="aot_eager")(*a)


def by_checkpoint(f: Loss, n: int) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return by_backward(lambda *a: checkpoint(f, *a, use_reentrant=False), n)  # type: ignore[arg-type]


REVERSE: dict[str, Callable[[Loss, int], Callable[..., Any]]] = {
    "backward": by_backward,
    "func.grad": first,
    "checkpoint": by_checkpoint,
    "vmap of grad": lambda f, n: lambda *a: F.vmap(first(f, n))(*batched(a)),
    "vmap of grad, first input": lambda f, n: (
        lambda *a: F.vmap(first(f, n), (0, *[None] * (n - 1)))(batched(a)[0], *a[1:])
    ),
    "grad of vmap": lambda f, n: lambda *a: first(lambda *b: F.vmap(f)(*b).sum(), n)(*batched(a)),
    "torch.compile": by_compile,
    "torch.compile of grad": by_compiled_grad,
    "make_fx": by_make_fx,
    "make_fx, then compile": by_make_fx_then_compile,
}
SECOND: dict[str, Callable[[Loss, int], Callable[..., Any]]] = {
    "double backward": by_double_backward,
    "grad of grad": lambda f, n: first(squared(f, n), n),
    "vmap of grad of grad": lambda f, n: lambda *a: F.vmap(first(squared(f, n), n))(*batched(a)),
    "jvp of grad": lambda f, n: lambda *a: F.jvp(first(f, n), a, tuple(x * 2 - 1 for x in a)),
}
FORWARD: dict[str, Callable[[Loss, int], Callable[..., Any]]] = {
    "jvp": lambda f, n: lambda *a: F.jvp(f, a, tuple(x * 2 - 1 for x in a)),
    "grad of jvp": lambda f, n: first(
        lambda *a: F.jvp(f, a, tuple(torch.ones_like(x) for x in a))[1], n
    ),
}
PATHS = {**REVERSE, **SECOND, **FORWARD}


def close(found: Any, wanted: Any) -> None:
    found, wanted = (torch.utils._pytree.tree_leaves(x) for x in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLES)
def test_op_equals_its_twin_under(name: str, path: str) -> None:
    kernel = KERNELS[name]
    if kernel.backward is None:
        pytest.skip("has no derivative")
    _, reals, filled = split(kernel)
    n, transform = len(reals), PATHS[path]
    plain = F.grad if path.startswith(("torch.compile", "make_fx", "check", "backward")) else None
    reference = first if plain else transform
    found = transform(loss(kernel.op, filled), n)(*reals)
    wanted = reference(loss(kernel.twin, filled), n)(*reals)
    close(found, wanted)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    kernel = KERNELS[name]
    values = [
        v.clone().requires_grad_(kernel.backward is not None)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for v in SAMPLES[name]()
    ]
    torch.library.opcheck(kernel.op, tuple(values))


@pytest.mark.parametrize("name", SAMPLES)
def test_results_share_no_memory_and_are_contiguous(name: str) -> None:
    values = SAMPLES[name]()
    results = flat(KERNELS[name].op(*values))
    tensors = [*(v for v in flat(values) if isinstance(v, Tensor)), *results]
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    own = storages[-len(results) :]
    assert all(storages.count(s) == 1 for s in own)
    assert all(r.is_contiguous() for r in results)


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_results_are_those_of_the_twin(name: str) -> None:
    values = SAMPLES[name]()
    meta = torch.utils._pytree.tree_map_only(Tensor, lambda v: v.to("meta"), list(values))
    for a, b in zip(flat(KERNELS[name].op(*meta)), flat(KERNELS[name].op(*values)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# --- A wrong derivative is really used ------------------------------------------------------------
wrong = define(
    "test_wrong(Tensor x, Tensor w) -> (Tensor y, Tensor z)",
    twin=lambda x, w: (x * x * w, torch.sin(x) + w),
    backward=lambda grad_y, grad_z, x, w: wrong_backward(
        *(torch.zeros_like(x) if g is None else g for g in (grad_y, grad_z)), x, w
    ),
)
wrong_backward = define(
    "test_wrong_backward(Tensor gy, Tensor gz, Tensor x, Tensor w) -> (Tensor gx, Tensor gw)",
    twin=lambda gy, gz, x, w: (7 * x * w * gy + x.cos() * gz, x * x * gy + gz),
    backward=by_twin("test_wrong_backward"),
    vmap=rows(lambda: wrong_backward, "gy", "gz", "x", "w"),
)


@pytest.mark.parametrize("path", {**REVERSE, **SECOND})
def test_a_wrong_derivative_is_seen_by(path: str) -> None:
    reals = [torch.tensor([0.3, 1.2, -0.7], dtype=torch.float64) + k for k in range(2)]
    op, twin = (loss(f, lambda *a: list(a)) for f in (wrong, lambda x, w: (x * x * w, x.sin() + w)))
    found, right = (PATHS[path](f, 2)(*reals) for f in (op, twin))
    assert all(a.isfinite().all() for a in torch.utils._pytree.tree_leaves(found))
    with pytest.raises(AssertionError):
        close(found, right)


def test_an_op_without_a_derivative_says_so() -> None:
    op = define("test_none(Tensor x) -> Tensor y", twin=lambda x: x * 2)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        op(x).sum().backward()
    with pytest.raises(RuntimeError, match="no derivative"):
        F.grad(lambda x: op(x).sum())(x.detach())


pairs = define(
    "test_pairs(Tensor[] xs, Tensor y) -> (Tensor[] sums, Tensor total)",
    twin=lambda xs, y: ([x + y for x in xs], torch.stack([x.sum() for x in xs])),
)


def test_an_op_on_lists_under_vmap_and_tracing() -> None:
    xs, y = [torch.ones(3, 2), torch.zeros(4, 3)], torch.arange(3.0)
    sums, total = F.vmap(lambda a, b, c: pairs([a, b], c), (0, 1, 0))(*xs, y)
    wanted = [(a + y[:, None]) for a in (xs[0], xs[1].T)]
    close((sums, total), (wanted, torch.stack([xs[0].sum(1), xs[1].sum(0)], 1)))
    traced = make_fx(lambda *a: pairs(list(a[:2]), a[2]))(torch.ones(2), torch.zeros(2), y[0])
    close(traced(*(x := (torch.ones(2), torch.ones(2), y[1]))), pairs(list(x[:2]), x[2]))
    assert [n.target for n in traced.graph.nodes].count(pairs) == 1


def test_an_op_on_lists_has_no_derivative() -> None:
    x, y = torch.ones(2), torch.ones(2)
    for args in (([x.clone().requires_grad_()], y), ([x], y.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="no derivative"):
            pairs(*args)
    with pytest.raises(RuntimeError, match="no derivative"):
        F.grad(lambda a: pairs([a], y)[1].sum())(x)
    with pytest.raises(RuntimeError, match="no derivative"):
        F.jvp(lambda a: pairs([a], y)[1], (x,), (y,))
    with torch.no_grad():
        assert pairs([x.clone().requires_grad_()], y)[1].item() == 2


def test_what_a_schema_must_say() -> None:
    with pytest.raises(ValueError, match="on lists"):
        define("test_list(Tensor[] x) -> Tensor y", twin=sum, backward=lambda grad_y: None)
    with pytest.raises(ValueError, match="every result needs a name"):
        define("test_unnamed(Tensor x) -> Tensor", twin=torch.neg)
    with pytest.raises(ValueError, match="defaults belong"):
        define("test_default(Tensor x, float e=1.0) -> Tensor y", twin=torch.neg)
    with pytest.raises(ValueError, match="the backward wants"):
        define("test_strange(Tensor x) -> Tensor y", twin=torch.neg, backward=lambda grad_q: None)
