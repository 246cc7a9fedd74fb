"""Random fill and dropout on a GPU: the bits of the twin on a CPU, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from device_check import DEVICE, MODULES
from torch import Tensor

from shardwise.kernels import random
from shardwise.meshlib import philox

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

# Global shape, start, size; the first four are flat ranges with 16-byte loads.
BLOCKS = {
    "whole": ((513, 4096), (0, 0), (513, 4096)),
    "a vector": ((3_000_000,), (1_000_004,), (1_500_000,)),
    "some rows": ((4000, 768), (1001, 0), (2003, 768)),
    "cut sequence": ((5, 512, 1024), (0, 256, 0), (5, 256, 1024)),
    "cut heads": ((2, 12, 130, 64), (0, 6, 65, 32), (2, 6, 65, 32)),
    "odd columns": ((300, 5001), (7, 1234), (291, 3333)),
    "ragged vector": ((1_000_003,), (3,), (999_999,)),
    "narrow rows": ((10_000, 3), (77, 0), (9_001, 3)),
    "columns of size 1": ((20_000, 1), (77, 0), (9_001, 1)),
    "a number": ((), (), ()),
    "nothing": ((8, 8), (3, 0), (0, 8)),
    "rows above 2^31": ((2**31 + 99, 4096), (2**31 - 50, 0), (101, 4096)),
    "four levels, torch's": ((4, 4, 4, 4, 16), (0, 2, 2, 2, 0), (4, 2, 2, 2, 16)),
}
KEYS = [(0, 0), (7, 2**32 - 1), (2**31, 2**31)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def key(words: tuple[int, int], device: Any = "cpu") -> Tensor:
    return random.key_of(random.seed_of(words), device)


def assert_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.is_cuda
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    whole = wanted.contiguous()
    raw = [t.reshape(-1).view(torch.uint8) for t in (found.cpu(), whole) if t.numel()]
    assert not raw or torch.equal(*raw)


@pytest.mark.parametrize("name", BLOCKS)
def test_fills_have_the_bits_of_the_twin(name: str) -> None:
    place = BLOCKS[name]
    for words in KEYS:
        with watched(*MODULES):
            here, there = key(words, DEVICE), key(words)
            args = (*place, 2**31 + 5)
            assert_bits(random.random_words(here, *args), random._words(there, *args))
            args = (*place, 0, random.level(0.3))
            assert_bits(random.random_mask(here, *args), random._mask(there, *args))
            for dtype in DTYPES[:3]:
                args = (*place, 3, -1.3, 0.7, dtype)
                assert_bits(random.random_uniform(here, *args), random._uniform(there, *args))


@pytest.mark.parametrize("name", ["some rows", "odd columns", "cut heads"])
def test_fills_have_the_bits_of_philox(name: str) -> None:
    shape, start, size = BLOCKS[name]
    there = (KEYS[1], shape, tuple(slice(a, a + n) for a, n in zip(start, size, strict=True)))
    here = (key(KEYS[1], DEVICE), shape, start, size, 0)
    assert_bits(random.random_words(*here), philox.words(*there))
    assert_bits(random.random_mask(*here, random.level(0.3)), philox.bernoulli(*there, p=0.3))
    for dtype in DTYPES[:3]:
        found = random.random_uniform(*here, -1.3, 0.7, dtype)
        assert_bits(found, philox.uniform(*there, low=-1.3, high=0.7, dtype=dtype))


@pytest.mark.parametrize("shift", [0, 1], ids=["", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_dropout_has_the_bits_of_the_twin(name: str, dtype: torch.dtype, shift: int) -> None:
    shape, start, size = BLOCKS[name]
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype)
    rest = (shape, start, random.level(0.9), 1 / 0.9)
    wanted = random._dropout(x, key(KEYS[1]), 0, *rest)
    held = guarded(x.to(DEVICE), shift)
    with watched(*MODULES):
        by_tensor = random.dropout(held, key(KEYS[1], DEVICE), 0, *rest)
        by_number = random.dropout(held, None, random.seed_of(KEYS[1]), *rest)
        torch.cuda.synchronize()
    assert_bits(by_tensor, wanted)
    assert_bits(by_number, wanted)
    assert torch.equal(held.cpu(), x)


def test_dropout_is_linear_and_its_own_derivative() -> None:
    x, g, h = torch.randn(3, 40, 256, device=DEVICE).bfloat16()
    here = key((1, 2), DEVICE)

    def drop(x: Tensor) -> Tensor:
        return random.dropout(x, here, 0, (40, 256), (0, 0), random.level(0.9), 1 / 0.9)

    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(drop(leaf), leaf, g)[0], drop(g))
    _, pull = torch.func.vjp(drop, x)
    assert torch.equal(pull(g)[0], drop(g))
    _, pull_again = torch.func.vjp(lambda g: pull(g)[0], g)
    assert torch.equal(pull_again(h)[0], drop(h))
    each = torch.func.vmap(drop)(torch.stack([x, g]))
    assert torch.equal(each, torch.stack([drop(x), drop(g)]))
    _, tangent = torch.func.jvp(drop, (x,), (g,))
    assert torch.equal(tangent, drop(g))


@pytest.mark.parametrize("words", KEYS)
def test_keys_made_of_keys(words: tuple[int, int]) -> None:
    for counter in ((0, 0, 0, 0), (3, 0, 0, 3 * 2**30 + 1), (2**32 - 1, 2**31, 7, 2**32 - 1)):
        found = random.random_key(key(words, DEVICE), *counter)
        assert_bits(found, random._derived(key(words), *counter))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_program_serves_all_keys(backend: str) -> None:
    below, shape = random.level(0.5), (64, 512)

    def draw(x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        k = random.random_key(k, 1, 0, 0, 3 * 2**30)
        dropped = random.dropout(x, k, 0, shape, (0, 0), below, 2.0)
        noise = random.random_uniform(k, shape, (0, 0), shape, 1, 0.0, 1.0, torch.float32)
        return dropped * 2, noise + 1

    x = torch.randn(64, 512, device=DEVICE).bfloat16()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    results = []
    for words in KEYS:
        found, wanted = (f(x, key(words, DEVICE)) for f in (compiled, draw))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        results.append(found[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not any(torch.equal(results[0], r) for r in results[1:])


def test_a_captured_graph_draws_anew_for_a_new_key() -> None:
    x, here = torch.randn(64, 4096, device=DEVICE).bfloat16(), key((1, 2), DEVICE)

    def drop(k: Tensor) -> Tensor:
        return random.dropout(x, k, 0, (64, 4096), (0, 0), random.level(0.9), 1 / 0.9)

    drop(here)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = drop(here)
    for words in KEYS:
        here.copy_(key(words))
        graph.replay()
        assert torch.equal(found, drop(key(words, DEVICE)))


def test_two_runs_are_equal_to_the_bit() -> None:
    x = torch.randn(3000, 4096, device=DEVICE)
    rest = ((3000, 4096), (0, 0), random.level(0.9), 1 / 0.9)
    assert torch.equal(*(random.dropout(x, None, 11, *rest) for _ in range(2)))
