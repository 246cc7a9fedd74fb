"""The kernels on a GPU: bf16 within half a unit in the last place of float64, results poisoned.

Needs torch, Triton and pytest alone; on a machine that has no more than these:

    python -m pytest --confcutdir=tests/kernel_tests tests/kernel_tests/test_device.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from torch import Tensor

from shardwise.kernels import cross_entropy, cross_entropy_triton, norms, norms_triton
from shardwise.kernels.registry import KERNELS

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

MODULES = (norms_triton, cross_entropy_triton)
DEVICE = torch.device("cuda")
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of the significand
DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)


def within_half_ulp(found: Tensor, exact: Tensor, slack: float) -> None:
    """Each element rounds the exact one, up to `slack` times the largest of its row, in float32.

    The slack covers sums in float32, whose error is relative to their terms, not to their value.
    """
    assert found.isfinite().all()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) + 1 - BITS[found.dtype])
    if found.dtype == torch.float16:
        ulp = ulp.clamp(min=2.0**-24)
    largest = exact.abs().amax(-1, keepdim=True) if exact.dim() else exact.abs()
    excess = (found.double() - exact).abs() - 0.5 * ulp - slack * largest.clamp(min=1e-3)
    assert excess.max() <= 0, f"by {(excess / ulp).max():.3f} ulp"


def check(name: str, args: tuple[Any, ...], slacks: tuple[float, ...], shift: int = 0) -> None:
    """Op `name` on guarded inputs and poisoned results against its twin in float64."""
    kernel = KERNELS[name]
    held = [guarded(a, shift) if isinstance(a, Tensor) else a for a in args]
    with watched(*MODULES) as canaries:
        found = kernel.op(*held)
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = kernel.twin(*wide)
    found, exact = (r if isinstance(r, tuple) else (r,) for r in (found, exact))
    for a, b, slack in zip(found, exact, slacks, strict=True):
        within_half_ulp(a, b, slack)
    for a, b in zip(held, args, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "an input was changed"


def inputs(rows: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(rows + size)
    made = {n: torch.randn(rows, size, device=DEVICE).to(dtype) for n in ("x", "extra", "grad")}
    made |= {n: (torch.randn(size, device=DEVICE) + 1).to(dtype) for n in ("weight", "bias")}
    _, mean, rstd = norms._layer(made["x"].float(), made["weight"].float(), None, 1e-5)
    return {**made, "mean": mean, "rstd": rstd}


SLACK = 3e-6  # of a row's largest element; a sum of N terms in float32 by halves has log2(N) 2^-24
STATISTIC = 1e-5
NORMS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "rms_norm": ("x weight", (1e-5,), (SLACK, STATISTIC)),
    "layer_norm": ("x weight bias", (1e-5,), (SLACK, STATISTIC, STATISTIC)),
    "rms_norm_backward": ("grad x weight rstd extra", (), (SLACK, STATISTIC)),
    "layer_norm_backward": ("grad x weight mean rstd extra", (), (SLACK, STATISTIC, STATISTIC)),
}
SHAPES = [(33, 64), (301, 768), (1000, 1000), (517, 4096), (40, 8192), (7, 16384), (5, 20000)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    names, static, slacks = NORMS[name]
    if "backward" in name and shape[1] > norms_triton.LARGEST_BACKWARD:
        pytest.skip("torch computes it")
    held = inputs(*shape, dtype)
    check(name, (*(held[n] for n in names.split()), *static), slacks)


@DTYPES
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_norm_of_a_sum_sees_the_rounded_sum(centred: bool, dtype: torch.dtype) -> None:
    held = inputs(129, 4096, dtype)
    x, extra, weight, bias = (held[n] for n in ("x", "extra", "weight", "bias"))
    if centred:
        y, total, *rest = norms.add_layer_norm(x, extra, weight, bias, 1e-5)
        alone = norms.layer_norm(total, weight, bias, 1e-5)
    else:
        y, total, *rest = norms.add_rms_norm(x, extra, weight, 1e-5)
        alone = norms.rms_norm(total, weight, 1e-5)
    assert torch.equal(total, x + extra)
    for a, b in zip((y, *rest), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0 ** (1 - BITS[a.dtype]), atol=1e-6)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm_backward"])
def test_unaligned_rows(name: str) -> None:
    names, static, slacks = NORMS[name]
    held = inputs(37, 777, torch.bfloat16)
    check(name, (*(held[n] for n in names.split()), *static), slacks, shift=1)


def logits_and_labels(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + size)
    labels = torch.randint(50, 50 + size, (rows,), device=DEVICE)
    labels[0], labels[1] = -100, 50 + size
    return (torch.randn(rows, size, device=DEVICE) * 4).to(dtype), labels


@DTYPES
@pytest.mark.parametrize("shape", [(65, 1000), (9, 32000), (5, 50257), (7, 128256)], ids=str)
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(*shape, dtype)
    check("cross_entropy_parts", (logits, labels, 50), (STATISTIC, 0.0))
    lse, _ = cross_entropy._parts(logits.double(), labels, 50)
    grads = torch.randn(2, shape[0], device=DEVICE)
    check("cross_entropy_parts_backward", (*grads, logits, labels, lse.float(), 50), (STATISTIC,))


def test_more_elements_than_an_int32_counts() -> None:
    rows, size = 16400, 131072
    logits = torch.zeros(rows, size, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 8.0
    labels = torch.full((rows,), 5, device=DEVICE)
    lse, target = cross_entropy.cross_entropy_parts(logits, labels, 0)
    wanted = torch.logsumexp(logits[-1].double(), -1)
    assert abs(lse[-1].double() - wanted) < 1e-4
    assert target[-1] == 8
    one = torch.ones(rows, device=DEVICE)
    grad = cross_entropy.cross_entropy_parts_backward(one, -one, logits, labels, lse, 0)
    torch.testing.assert_close(grad[-1, 5].item(), (8 - wanted).exp().item() - 1, rtol=0.01, atol=0)


@pytest.mark.parametrize("chunk", [100, 4096])
def test_linear_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 512, device=DEVICE).bfloat16()
    weight = torch.randn(5000, 512, device=DEVICE).mul(0.05).bfloat16()
    labels = torch.randint(0, 5000, (300,), device=DEVICE)
    scale = torch.full((300,), 1 / 300, device=DEVICE)
    with watched(*MODULES):
        found = cross_entropy.linear_cross_entropy(hidden, weight, labels, scale, chunk)
    exact = cross_entropy._linear(hidden.double(), weight.double(), labels, scale.double(), 300)
    for a, b in zip(found, exact, strict=True):  # logits and their gradient are rounded to bf16
        assert ((a.double() - b).norm() / b.norm()).item() < 6e-3
    args = (hidden, weight, labels, 0, chunk)
    lse, target = cross_entropy.linear_cross_entropy_parts(*args)
    torch.testing.assert_close(lse - target, found[1], rtol=1e-3, atol=1e-3)
    grads = cross_entropy.linear_cross_entropy_parts_backward(
        scale, -scale, hidden, weight, labels, lse, 0, chunk
    )
    for a, b in zip(grads, exact[2:], strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 6e-3


def test_linear_cross_entropy_holds_one_chunk_of_logits() -> None:
    hidden = torch.randn(4096, 256, device=DEVICE).bfloat16()
    weight = torch.randn(32000, 256, device=DEVICE).bfloat16()
    labels, scale = (
        torch.zeros(4096, dtype=torch.long, device=DEVICE),
        hidden.new_ones(4096).float(),
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = cross_entropy.linear_cross_entropy(hidden, weight, labels, scale, 512)
    used = torch.cuda.max_memory_allocated() - before
    kept = sum(r.numel() * r.element_size() for r in results)
    assert used <= kept + 512 * 32000 * 2 + (8 << 20)


def step(x: Tensor, residual: Tensor, weight: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """A loss through all kinds of ops, for the transforms."""
    y, total, _ = norms.add_rms_norm(x, residual, weight, 1e-5)
    z, _, _ = norms.layer_norm(total, weight, None, 1e-5)
    lse, target = cross_entropy.cross_entropy_parts((y + z) @ head, labels, 0)
    scale = torch.full_like(lse, 1 / len(lse))
    linear = cross_entropy.linear_cross_entropy(y, head.T.contiguous(), labels, scale, 8)
    return (lse - target).mean() + linear[0]


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    held = inputs(24, 256, dtype)
    head = torch.randn(256, 512, device=DEVICE).mul(0.05).to(dtype)
    labels = torch.randint(0, 512, (24,), device=DEVICE)
    return held["x"], held["extra"], held["weight"], head, labels


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_step_equals_eager(backend: str) -> None:
    *reals, labels = operands(torch.float32)
    leaves = [x.clone().requires_grad_() for x in reals]
    wanted = torch.autograd.grad(step(*leaves, labels), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, labels), leaves), wanted)
    compiled_grad = torch.compile(torch.func.grad(step, (0, 1, 2, 3)), backend=backend)
    torch.testing.assert_close(compiled_grad(*reals, labels), wanted)


def test_gradient_equals_that_of_the_twins() -> None:
    *reals, labels = operands(torch.float32)
    wide = [x.double() for x in reals]  # float64 runs the twins
    found = torch.func.grad(step, (0, 1, 2, 3))(*reals, labels)
    wanted = torch.func.grad(step, (0, 1, 2, 3))(*wide, labels)
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-5


def test_vmap_of_grad_equals_a_loop() -> None:
    *reals, labels = operands(torch.float32)
    grad = torch.func.grad(step, (0, 2))
    xs = torch.stack([reals[0], reals[0] + 1])
    found = torch.func.vmap(grad, (0, None, None, None, None))(xs, *reals[1:], labels)
    each = [grad(x, *reals[1:], labels) for x in xs]
    torch.testing.assert_close(found, tuple(torch.stack(g) for g in zip(*each, strict=True)))


def test_two_runs_are_equal_to_the_bit() -> None:
    held = inputs(3000, 4096, torch.bfloat16)
    args = tuple(held[n] for n in ("grad", "x", "weight", "mean", "rstd", "extra"))
    first, second = (norms.layer_norm_backward(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_captured_graph_gives_the_same() -> None:
    held = inputs(64, 4096, torch.bfloat16)
    wanted = norms.rms_norm(held["x"], held["weight"], 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norms.rms_norm(held["x"], held["weight"], 1e-5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
