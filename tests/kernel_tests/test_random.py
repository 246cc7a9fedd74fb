"""The twins of `random` have the bits of `meshlib/philox.py`; their rules for vmap."""

from __future__ import annotations

import random as draws

import pytest
import torch

from shardwise.kernels import random
from shardwise.meshlib import philox

PLACE = ((6, 9), (1, 2), (3, 5))


def key(words: tuple[int, int]) -> torch.Tensor:
    return random.key_of(random.seed_of(words))


@pytest.mark.parametrize("seed", range(20))
def test_any_block_has_the_bits_of_philox(seed: int) -> None:
    rng = draws.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 5, 8, 9, 16]) for _ in range(rng.randint(0, 4)))
    start = tuple(rng.randrange(n) for n in shape)
    size = tuple(rng.randint(0, n - s) for n, s in zip(shape, start, strict=True))
    index = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    words, salt, p = (rng.getrandbits(32), rng.getrandbits(32)), rng.getrandbits(30), rng.random()
    here, there = (key(words), shape, start, size, salt), (words, shape, index)
    assert here[0].tolist() == list(words)
    assert torch.equal(random.random_words(*here), philox.words(*there, salt=salt))
    mask = random.random_mask(*here, random.level(p))
    assert torch.equal(mask, philox.bernoulli(*there, p=p, salt=salt))
    for dtype in (torch.float32, torch.bfloat16):
        drawn = random.random_uniform(*here, -1.3, 0.7, dtype)
        wanted = philox.uniform(*there, low=-1.3, high=0.7, dtype=dtype, salt=salt)
        assert torch.equal(drawn, wanted)
    x = torch.randn(size)
    dropped = random.dropout(x, None, random.seed_of(words), shape, start, random.level(p), 1.25)
    assert torch.equal(dropped, x * philox.bernoulli(*there, p=p) * 1.25)


def test_long_blocks_are_made_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random.random_words(key((1, 2)), *PLACE, 0)
    monkeypatch.setattr(random, "STEP", 3)
    assert torch.equal(random.random_words(key((1, 2)), *PLACE, 0), whole)


@pytest.mark.parametrize("data", [0, 3, 2**40 + 7, "blocks.w_up"])
def test_keys_made_of_keys_are_those_of_philox(data: int | str) -> None:
    words = (7, 2**32 - 1)
    found = random.random_key(key(words), *philox.fold_counter(data))
    assert tuple(found.tolist()) == philox.fold_in(words, data)
    second = random.random_key(key(words), *philox.split_counter(1))
    assert tuple(second.tolist()) == philox.split(words, 2)[1]


OPS = {
    "words": lambda k: random.random_words(k, *PLACE, 0),
    "uniform": lambda k: random.random_uniform(k, *PLACE, 0, 0.0, 1.0, torch.float32),
    "mask": lambda k: random.random_mask(k, *PLACE, 0, 2**23),
    "key": lambda k: random.random_key(k, 1, 2, 3, 4),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_keys(name: str, dim: int) -> None:
    keys = torch.stack([key((1, 2)), key((3, 4)), key((5, 6))])
    found = torch.func.vmap(OPS[name], in_dims=dim)(keys if dim == 0 else keys.T)
    assert torch.equal(found, torch.stack([OPS[name](k) for k in keys]))


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (2, 0)], ids=str)
def test_vmap_of_dropout(in_dims: tuple[int | None, int | None]) -> None:
    def drop(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return random.dropout(x, k, 0, (6, 9), (1, 2), 2**23, 2.0)

    xs, keys = torch.randn(3, 3, 5), torch.stack([key((i, 9)) for i in range(3)])
    wanted = [
        drop(
            xs[i] if in_dims[0] is not None else xs[0],
            keys[i] if in_dims[1] is not None else keys[0],
        )
        for i in range(3)
    ]
    x = xs[0] if in_dims[0] is None else xs.movedim(0, in_dims[0])
    k = keys[0] if in_dims[1] is None else keys
    assert torch.equal(torch.func.vmap(drop, in_dims)(x, k), torch.stack(wanted))
