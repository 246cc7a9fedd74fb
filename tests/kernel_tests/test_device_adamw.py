"""AdamW on a GPU: against float64, against torch's own launches, in place, in graphs."""

# pyright: basic, reportPrivateImportUsage=false
# (torch._foreach_*)
from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from device_check import DEVICE
from torch import Tensor

from shardwise.kernels import adamw, adamw_triton
from shardwise.meshlib import philox

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

F32, B16 = torch.float32, torch.bfloat16
DTYPES = {
    "fp32": (F32, F32, F32, F32),
    "bf16": (B16, B16, B16, B16),
    "bf16, wide means": (B16, B16, F32, F32),
    "fp32, bf16 means": (F32, F32, B16, B16),
    "bf16 gradients": (F32, B16, F32, F32),
}
# Less than a block, more, an exact number of blocks, a scalar, nothing, and a long one.
SHAPES = [(7,), (5, 1000), (64, 64), (), (0, 3), (3, 1, 129), (1024, 2048), (1999, 1001)]
ROOT, RATE, KEPT = 0.25, -0.02, 0.995
B1, B2, EPS = 0.9, 0.99, 1e-8
KEY = (123456789, 4000000000)


def lists(dtypes: tuple[torch.dtype, ...], shapes: Any = SHAPES) -> list[list[Tensor]]:
    rng = torch.Generator(DEVICE).manual_seed(len(shapes))
    made = [[torch.randn(s, device=DEVICE, generator=rng).to(d) for s in shapes] for d in dtypes]
    made[3] = [v.abs() for v in made[3]]
    return made


def factors(dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor([ROOT, RATE, KEPT], device=DEVICE, dtype=dtype)


def step(held: Any, keys: Tensor | None = None, places: Any = ()) -> Any:
    return adamw.adamw(*held, factors(), B1, B2, EPS, keys, list(places))


def close(found: Any, exact: Any) -> None:
    """Half a unit in the last place of the result, and a few of the float32 sums before it.

    Operands are below 8 and v may be near 0, where root and quotient are large: the error of the
    float32 arithmetic is relative to |p| + |m / denominator|, which 2^-20 covers eight times over.
    """
    for column, wanted in zip(found, exact, strict=True):
        for a, b in zip(column, wanted, strict=True):
            ulp = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=0.5 * ulp + 2.0**-20, atol=8 * 2.0**-21)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", DTYPES)
def test_kernel_against_float64(name: str, shift: int) -> None:
    plain = lists(DTYPES[name])
    held = [[guarded(t, shift) for t in column] for column in plain]
    with watched(adamw_triton) as canaries:
        found = step(held)
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    wide = [[t.double() for t in column] for column in plain]
    close(found, adamw._adamw(*wide, factors(torch.float64), B1, B2, EPS, None, []))
    for x, y in zip(held, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True)), "an input was changed"


@pytest.mark.parametrize("name", ["fp32", "fp32, bf16 means"])
def test_kernel_has_the_bits_of_torch_s_own_launches(name: str) -> None:
    """The same sums by `torch._foreach_*` with float32 means, as `optim.adamw` runs under tracing.

    Torch contracts x + a (y - x) and x + a (g g), and nothing else here; so does the kernel.
    """
    p, g, m, v = lists(DTYPES[name])
    root, rate, kept = factors().unbind()
    mean, square = ([t.float() for t in c] for c in (m, v))
    mean = torch._foreach_lerp(mean, [t.float() for t in g], 1 - B1)
    square = torch._foreach_addcmul(torch._foreach_mul(square, B2), g, g, value=1 - B2)
    below = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(square), root), EPS)
    move = torch._foreach_mul(torch._foreach_div(mean, below), rate)
    wanted = torch._foreach_add(torch._foreach_mul(p, kept), move)
    found = step([p, g, m, v])
    for a, b in zip(found[0], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip((*found[1], *found[2]), (*mean, *square), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_in_place_equals_new_tensors(name: str, rounded: bool) -> None:
    held = lists(DTYPES[name])
    keys = torch.tensor([KEY] * len(SHAPES), device=DEVICE) if rounded else None
    places = [n for s in SHAPES for n in adamw.numbers(s, (0,) * len(s), s) or ()]
    wanted = step(held, keys, places)
    for _ in range(2):  # the same in every run
        again = [[t.clone() for t in c] for c in held]
        out = (again[0], *again[2:])
        adamw_triton.run(again, out, factors(), B1, B2, EPS, keys, places)
        for x, y in zip(out, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


PLACES = [
    ((4, 96), (0, 0), (4, 96)),
    ((8192, 1024), (4096, 512), (2048, 512)),
    ((8, 96), (2, 48), (4, 48)),
    ((5, 30), (1, 15), (3, 15)),
    ((6, 5, 4, 12), (2, 1, 2, 4), (4, 3, 2, 8)),
    ((1001,), (0,), (1001,)),
    ((100001,), (50000,), (50001,)),
    ((64, 1), (16, 0), (16, 1)),
    ((), (), ()),
]


@pytest.mark.parametrize("name", ["bf16", "bf16, wide means"])
def test_stochastic_rounding_has_the_bits_of_philox(name: str) -> None:
    held = lists(DTYPES[name], [size for _, _, size in PLACES])
    names = torch.tensor([adamw.name_words(f"leaf.{i}") for i in range(len(PLACES))])
    key, at = torch.tensor(KEY), torch.tensor(5)
    keys = adamw.adamw_keys(*(x.to(DEVICE) for x in (key, at, names)))
    assert torch.equal(keys.cpu(), adamw.adamw_keys(key, at, names))
    places = [n for p in PLACES for n in adamw.numbers(*p) or ()]
    found = step(held, keys, places)
    exact = step([[p.float() for p in held[0]], *held[1:]])[0]
    for i, (shape, start, size) in enumerate(PLACES):
        block = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        words = philox.words(tuple(keys[i].tolist()), shape, block) >> 16
        wanted = adamw._rounded(exact[i], words.to(torch.int32).to(DEVICE))
        assert torch.equal(found[0][i].float(), wanted), (shape, start)


def test_stochastic_rounding_keeps_the_mean() -> None:
    size, value = 1 << 20, 1.0 + 2.0**-9  # a quarter of the way to the next bfloat16
    ones = torch.ones(size, device=DEVICE, dtype=B16)
    zeros = torch.zeros_like(ones)
    made = torch.tensor([1.0, 0.0, value], device=DEVICE)
    places = adamw.numbers((size,), (0,), (size,))
    keys = torch.tensor([KEY], device=DEVICE)
    new = adamw.adamw([ones], [zeros], [zeros], [zeros], made, B1, B2, EPS, keys, places)[0][0]
    assert set(new.unique().tolist()) == {1.0, 1.0078125}
    # The share that goes up is 1/4; its standard deviation here is 4.2e-4.
    assert abs((new > 1).double().mean().item() - 0.25) < 2.5e-3


def test_a_captured_graph_steps_again_and_again() -> None:
    held = lists(DTYPES["fp32"])
    wanted = [[t.clone() for t in c] for c in held]
    made = factors()

    def run(x: Any) -> None:
        adamw_triton.run(x, (x[0], *x[2:]), made, B1, B2, EPS, None, ())

    run(held)  # compiles, and puts the tables on the device
    run(wanted)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(held)
    adamw_triton._tables.clear()
    for _ in range(3):
        graph.replay()
        run(wanted)
    torch.cuda.synchronize()
    for x, y in zip(held, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_compiled_step_is_one_node() -> None:
    held = lists(DTYPES["fp32"], SHAPES[:3])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: step(x), backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(*held), step(held), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_many_leaves_are_one_launch() -> None:
    held = lists(DTYPES["fp32"], [(96,), (33, 64)] * 150)
    made = factors()

    def run() -> None:
        adamw_triton.run(held, (held[0], *held[2:]), made, B1, B2, EPS, None, ())

    run()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.events() or () if str(e.device_type) == "DeviceType.CUDA"]
    assert len(events) == 1, [e.name for e in events]
