"""Random fill and dropout, interpreted: the bits of the twin (see test_interpreter.py)."""

from __future__ import annotations

import pytest
import torch
from canaries import compare

from shardwise.kernels import random, random_triton

# Global shape, start, size. Flat: rows of eights from a multiple of four. By rows: all others.
BLOCKS = {
    "whole": ((6, 64), (0, 0), (6, 64)),
    "a vector": ((5000,), (4,), (4096,)),
    "a ragged vector": ((5000,), (3,), (4097,)),
    "some rows": ((40, 96), (7, 0), (33, 96)),
    "some columns": ((9, 96), (0, 24), (9, 40)),
    "odd columns": ((9, 96), (2, 23), (7, 33)),
    "a number": ((), (), ()),
    "narrow rows": ((70, 3), (1, 0), (69, 3)),
    "columns of size 1": ((2000, 1), (5, 0), (1999, 1)),
    "two levels": ((4, 12, 16), (0, 3, 0), (4, 6, 16)),
    "two levels, odd": ((4, 12, 17), (1, 3, 2), (3, 6, 14)),
    "three levels": ((4, 6, 5, 24), (1, 2, 1, 8), (2, 3, 3, 16)),
    "three levels, odd": ((4, 6, 5, 7), (1, 2, 1, 1), (2, 3, 3, 5)),
    "nothing": ((4, 8), (1, 0), (0, 8)),
    "rows above 2^31": ((2**31 + 9, 16), (2**31 - 2, 0), (7, 16)),
}
EXACT = {"atol": 0.0, "rtol": 0.0}
KEYS = [(0, 0), (7, 2**32 - 1), (2**31, 2**31)]
MODULES = (random_triton,)


def key(words: tuple[int, int]) -> torch.Tensor:
    return random.key_of(random.seed_of(words))


@pytest.mark.parametrize("backwards", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_fill(name: str, backwards: bool) -> None:
    shape, start, size = BLOCKS[name]
    place = (key(KEYS[1]), shape, start, size)
    words = (random_triton.words, random._words_twin, (*place, 5))
    mask = (random_triton.mask, random._mask, (*place, 2**31, random.level(0.3)))
    scaled = (*place, 0, -1.3, 0.7, torch.float32)
    uniform = (random_triton.uniform, random._uniform, scaled)
    for launcher, twin, args in (words, mask, uniform):
        compare(launcher, twin, args, MODULES, backwards=backwards, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_dropout(name: str, dtype: torch.dtype) -> None:
    shape, start, size = BLOCKS[name]
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype)
    args = (x, key(KEYS[2]), 0, shape, start, random.level(0.75), 1.25)  # 1.25 is exact
    launched = []

    def launcher(*args: object) -> torch.Tensor:
        launched.append(random_triton.dropout(*args))
        return launched[0]

    tolerance = {"atol": 1e-6, "rtol": 2.0**-11 if dtype == torch.float16 else 1e-6}
    compare(launcher, random._dropout, args, MODULES, **tolerance)
    assert torch.equal(launched[0], random._dropout(*args))


@pytest.mark.parametrize("words", KEYS)
def test_keys_as_numbers_and_as_tensors(words: tuple[int, int]) -> None:
    x = torch.ones(4, 24)
    rest = ((8, 24), (2, 0), random.level(0.5), 2.0)
    wanted = random._dropout(x, key(words), 0, *rest)
    assert torch.equal(random_triton.dropout(x, key(words), 0, *rest), wanted)
    assert torch.equal(random_triton.dropout(x, None, random.seed_of(words), *rest), wanted)
    for counter in ((3, 0, 0, 2**32 - 1), (2**31, 1, 2, 3)):
        found = random_triton.derived(key(words), *counter)
        assert torch.equal(found, random._derived(key(words), *counter))


@pytest.mark.parametrize("width", [16, 15])
def test_dims_before_the_shape_share_the_mask(width: int) -> None:
    args = (key((1, 2)), 0, (6, width), (2, 0), random.level(0.5), 2.0)
    x = torch.randn(3, 4, width)
    found = random_triton.dropout(x, *args)
    each = [random_triton.dropout(one, *args) for one in x]
    assert torch.equal(found, torch.stack(each))


def test_strided_gradients() -> None:
    args = (key((1, 2)), 0, (8, 8), (0, 0), random.level(0.5), 2.0)
    found = random_triton.dropout(torch.ones(()).expand(8, 8), *args)
    assert torch.equal(found, random._dropout(torch.ones(8, 8), *args))


@pytest.mark.parametrize(
    ("shape", "start", "size"),
    [((2,) * 9, (0,) * 9, (1, 2) * 4 + (2,)), ((2**33, 4), (2**32, 0), (2, 4))],
    ids=["four levels", "rows above 2^32"],
)
def test_what_the_kernel_does_not_hold_is_the_twin_s(
    shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> None:
    assert not random_triton.fits(shape, start, size)
    place = (key((1, 2)), shape, start, size, 0)
    assert torch.equal(random_triton.words(*place), random._words(*place))
