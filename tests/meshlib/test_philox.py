"""Philox: known answers, the block law bit for bit, statistics of a million values, and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.meshlib import philox

MILLION = 10**6
PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
PI_WORDS = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
# Random123, tests/kat_vectors, the three lines "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI_COUNTER, PI_KEY, PI_WORDS),
]

Draw = Callable[..., Tensor]
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
DRAWS: dict[str, Draw] = {
    "words": philox.words,
    "bernoulli": partial(philox.bernoulli, p=0.3),
    "bernoulli_float": partial(philox.bernoulli, p=0.3, dtype=torch.float32),
    "randint": partial(philox.randint, high=1000),
    "randint_wide": partial(philox.randint, low=-(2**63), high=2**63),
    "randint_int8": partial(philox.randint, low=-128, high=128, dtype=torch.int8),
    "scaled": partial(philox.normal, mean=1.0, std=0.02),
    "bounded": partial(philox.uniform, low=-3.0, high=0.1),
    "tail": partial(philox.truncated_normal, lower=4.0, upper=math.inf),
}
for _dtype in FLOATS:
    for _draw in (philox.uniform, philox.normal, philox.truncated_normal):
        DRAWS[f"{_draw.__name__}_{_dtype}"] = partial(_draw, dtype=_dtype)

words32 = st.integers(0, 2**32 - 1)
keys = st.tuples(words32, words32)


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def full(draw: Draw, key: philox.Key, *shape: int, **options: Any) -> Tensor:
    return draw(key, shape, whole(shape), **options)


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    bits = [t.clone(memory_format=torch.contiguous_format).view(-1) for t in (x, y)]
    assert torch.equal(bits[0].view(torch.uint8), bits[1].view(torch.uint8))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads help nothing here, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Words


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(
    counter: philox.Counter, key: philox.Key, answer: philox.Counter
) -> None:
    assert philox.philox4x32(counter, key) == answer


def test_words_of_a_block_give_the_known_answer_of_pi() -> None:
    group, row_low, row_high, salt = PI_COUNTER
    row = row_high << 32 | row_low
    shape = (2**62, 2**34)
    index = (slice(row, row + 1), slice(4 * group, 4 * group + 4))
    assert philox.words(PI_KEY, shape, index, salt=salt).tolist() == [list(PI_WORDS)]


@settings(deadline=None)
@given(keys, st.integers(0, 2**63 - 2), st.integers(0, 2**34 - 1), st.integers(0, 2**32 - 1))
def test_a_word_is_that_of_the_documented_counter(
    key: philox.Key, row: int, column: int, salt: int
) -> None:
    index = (slice(row, row + 1), slice(column, column + 1))
    counter = (column // 4, row % 2**32, row // 2**32, salt)
    word = philox.words(key, (2**63 - 1, 2**34), index, salt=salt)
    assert word.item() == philox.philox4x32(counter, key)[column % 4]


def test_leading_dims_make_one_row_number() -> None:
    key = philox.seed(3)
    assert_same_bits(full(philox.words, key, 3, 5, 7), full(philox.words, key, 15, 7).view(3, 5, 7))


@pytest.mark.parametrize("shape", [(37, 1), (37, 1, 1), (1, 37)])
def test_dims_of_size_one_do_not_change_a_vector(shape: tuple[int, ...]) -> None:
    key = philox.seed(3)
    assert_same_bits(full(philox.words, key, *shape).view(37), full(philox.words, key, 37))


def test_a_scalar_is_the_first_word() -> None:
    assert full(philox.words, (0, 0)).item() == KNOWN_ANSWERS[0][2][0]


# The law: a block equals the slice of the whole


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    sizes = st.one_of(st.just(1), st.integers(0, 9), st.sampled_from([16, 33]))
    shape = tuple(draw(st.lists(sizes, max_size=4)))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, tuple(slice(a, b) for a, b in ends)


@pytest.mark.parametrize("name", DRAWS)
@settings(max_examples=25, deadline=None)
@given(block=blocks(), key=keys, step=st.sampled_from([1, 2, 3, 7, 2**16]))
def test_any_block_is_the_slice_of_the_whole(
    name: str, block: tuple[tuple[int, ...], tuple[slice, ...]], key: philox.Key, step: int
) -> None:
    shape, index = block
    expected = full(DRAWS[name], key, *shape)[index]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "_STEP_CPU", step)
        assert_same_bits(DRAWS[name](key, shape, index), expected)


@pytest.mark.parametrize("shape", [(700_001,), (3, 300_007), (901, 777), (2, 150_001, 2)])
@pytest.mark.parametrize("draw", [philox.uniform, philox.normal, philox.truncated_normal])
def test_blocks_of_many_steps_are_slices_of_the_whole(shape: tuple[int, ...], draw: Draw) -> None:
    key = philox.seed(11)
    expected = full(draw, key, *shape, dtype=torch.float64)
    for part in (0.003, 0.31, 0.77):
        index = tuple(slice(int(n * part), n - int(n * part / 4)) for n in shape)
        assert_same_bits(draw(key, shape, index, dtype=torch.float64), expected[index])


def test_values_do_not_depend_on_threads_defaults_or_the_global_generator() -> None:
    key, threads, state = philox.seed(5), torch.get_num_threads(), torch.get_rng_state()
    expected = full(philox.normal, key, 600, 1001)
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = full(philox.normal, key, 600, 1001, device="cpu")
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert_same_bits(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DRAWS)
def test_results_own_their_memory(name: str) -> None:
    x = DRAWS[name](philox.seed(0), (9, 9), (slice(2, 5), slice(3, 8)))
    assert x.is_contiguous()
    assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize("name", DRAWS)
def test_meta_blocks_have_shape_and_dtype_without_memory(name: str) -> None:
    index = (slice(5, 2**40), slice(0, 3))
    x = DRAWS[name](philox.seed(0), (2**41, 3), index, device="meta")
    assert x.is_meta
    assert x.shape == (2**40 - 5, 3)
    assert x.dtype == full(DRAWS[name], philox.seed(0), 2).dtype


# Dtypes


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal, philox.truncated_normal])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded(draw: Draw, dtype: torch.dtype) -> None:
    key = philox.seed(1)
    assert_same_bits(full(draw, key, 50, 51, dtype=dtype), full(draw, key, 50, 51).to(dtype))


def test_uniform_float32_is_the_top_of_float64() -> None:
    key = philox.seed(1)
    fine = full(philox.uniform, key, 100, 101, dtype=torch.float64)
    coarse = full(philox.uniform, key, 100, 101)
    assert torch.equal((fine * 2**24).floor() * 2.0**-24, coarse.double())
    assert torch.equal(coarse * 2**24, (full(philox.words, key, 100, 101) >> 8).float())


def test_uniform_float64_is_the_top_of_two_words() -> None:
    key = philox.seed(1)
    high, low = (full(philox.words, key, 100, 101, salt=salt) for salt in (0, 2**31))
    fine = full(philox.uniform, key, 100, 101, dtype=torch.float64)
    assert torch.equal((fine * 2.0**53).long(), high << 21 | low >> 11)


@pytest.mark.parametrize("draw", [philox.normal, philox.truncated_normal])
def test_float32_and_float64_values_are_the_same_draw(draw: Draw) -> None:
    key = philox.seed(1)
    fine = full(draw, key, 100, 101, dtype=torch.float64)
    torch.testing.assert_close(full(draw, key, 100, 101).double(), fine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 2.0**-30, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1.0])
def test_bernoulli_is_uniform_below_p(p: float) -> None:
    key = philox.seed(2)
    mask = full(philox.bernoulli, key, 300, 301, p=p)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, full(philox.uniform, key, 300, 301) < p)
    assert_same_bits(full(philox.bernoulli, key, 300, 301, p=p, dtype=torch.float64), mask.double())


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**64), keys)
def test_randint_is_the_exact_product_of_64_bits(low: int, span: int, key: philox.Key) -> None:
    high = min(low + span, 2**63)
    found = full(philox.randint, key, 3, 5, low=low, high=high)
    top = full(philox.words, key, 3, 5).flatten().tolist()
    bottom = full(philox.words, key, 3, 5, salt=2**31).flatten().tolist()
    expected = [
        low + ((t << 32 | b) * (high - low) >> 64) for t, b in zip(top, bottom, strict=True)
    ]
    assert found.flatten().tolist() == expected


def test_randint_does_not_depend_on_the_dtype() -> None:
    x = full(philox.randint, philox.seed(0), 40, 41, low=-100, high=100)
    y = full(philox.randint, philox.seed(0), 40, 41, low=-100, high=100, dtype=torch.int8)
    assert_same_bits(y, x.to(torch.int8))


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(3, 3, torch.int64), (4, 3, torch.int64), (0, 257, torch.uint8), (-1, 5, torch.uint8)],
)
def test_randint_names_an_impossible_range(low: int, high: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"randint: \[{low}, {high}\) must hold an integer"):
        full(philox.randint, philox.seed(0), 4, low=low, high=high, dtype=dtype)


# Extreme words, which a test would not meet by chance


def constant_words(word: int) -> Callable[..., Tensor]:
    """In the place of `philox._mix`: the same word everywhere."""

    def mix(rows: Tensor, groups: Tensor, *_: Any) -> Tensor:
        return torch.full((2, 2, len(rows), len(groups)), word)

    return mix


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_uniform_reaches_zero_but_not_one(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word, value in ((0, 0.0), (2**32 - 1, 1.0 - 2.0**-bits)):
        monkeypatch.setattr(philox, "_mix", constant_words(word))
        assert full(philox.uniform, (0, 0), 4, dtype=dtype).tolist() == [value] * 4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float64, 53)])
@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_normal_is_the_formula_of_box_and_muller(
    word: int, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(philox, "_mix", constant_words(word))
    k = word if bits == 32 else word << 21 | word >> 11
    u = (k + 0.5) / 2.0**bits
    radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * u
    expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)], dtype=dtype)
    found = full(philox.normal, (0, 0), 2, dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6 if bits == 32 else 1e-13, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lower", "upper"), [(-2.0, 1.0), (-math.inf, math.inf), (3.0, math.inf)])
@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_truncated_normal_of_extreme_words_is_finite_and_inside(
    word: int, lower: float, upper: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(philox, "_mix", constant_words(word))
    x = full(philox.truncated_normal, (0, 0), 4, lower=lower, upper=upper, dtype=dtype)
    assert x.isfinite().all()
    assert ((x >= lower) & (x <= upper)).all()


@settings(deadline=None)
@given(st.floats(0.0, 1.0, width=64), st.integers(-600, 600))
def test_bernoulli_is_uniform_below_p_at_the_edge(p: float, offset: int) -> None:
    word = min(max(int(p * 2**32) + offset, 0), 2**32 - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "_mix", constant_words(word))
        mask = full(philox.bernoulli, (0, 0), 4, p=p)
        assert torch.equal(mask, full(philox.uniform, (0, 0), 4) < p)


# Statistics: keys are fixed, so a bound of 4 to 5 standard deviations holds or does not, once


def kolmogorov(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov-Smirnov distance times the root of n; above 1.95 with probability 0.001."""
    n = sample.numel()
    levels = cdf(sample.double().flatten().sort().values)
    steps = torch.arange(n, dtype=torch.float64) / n
    return max((levels - steps).max().item(), (steps + 1 / n - levels).max().item()) * n**0.5


def correlation(x: Tensor, y: Tensor) -> float:
    """Correlation times the root of n: near a standard normal for independent samples."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    product, squares = (x * y).mean(), (x * x).mean() * (y * y).mean()
    return (product / squares.sqrt() * math.sqrt(x.numel())).item()


def normal_cdf(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(MILLION,), (1000, 1000), (250_000, 4), (MILLION, 1)])
def test_uniform_values_are_uniform(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = full(philox.uniform, philox.seed(20), *shape, dtype=dtype)
    assert 0 <= x.min() < 1e-5
    assert 1 - 1e-5 < x.max() < 1
    assert abs(x.double().mean() - 0.5) < 5 * (12 * MILLION) ** -0.5
    assert kolmogorov(x, lambda levels: levels) < 1.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_values_have_the_moments_and_the_shape(dtype: torch.dtype) -> None:
    x = full(philox.normal, philox.seed(21), 1000, 1000, dtype=dtype).double()
    # Standard deviations of the first four sample moments, times the root of n.
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((x**power).mean() - moment) < 4 * deviation / 1000
    assert 4.3 < x.abs().max() < 6.7
    assert kolmogorov(x, normal_cdf) < 1.95


def test_mean_and_std_are_applied_before_the_rounding() -> None:
    key = philox.seed(21)
    exact = full(philox.normal, key, 100, 100, dtype=torch.float64)
    x = full(philox.normal, key, 100, 100, mean=3.0, std=0.5)
    torch.testing.assert_close(x.double(), 3.0 + 0.5 * exact, rtol=1e-6, atol=1e-6)
    low = full(philox.uniform, key, 100, 100, low=-2.0, high=6.0)
    assert torch.equal(low, full(philox.uniform, key, 100, 100) * 8.0 - 2.0)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(-2.0, 2.0), (-1.0, math.inf), (0.5, 0.75), (4.0, math.inf), (-math.inf, -9.0), (9.0, 12.0)],
)
def test_truncated_normal_has_the_shape_of_the_cut_normal(lower: float, upper: float) -> None:
    x = full(
        philox.truncated_normal,
        philox.seed(22),
        1000,
        1000,
        lower=lower,
        upper=upper,
        dtype=torch.float64,
    )
    assert x.min() >= lower
    assert x.max() <= upper
    # Of the mirrored values where that keeps the digits of the probabilities.
    sign = -1.0 if lower > 0 else 1.0
    ends = sorted((sign * lower, sign * upper))
    below, above = normal_cdf(torch.tensor(ends, dtype=torch.float64))
    assert kolmogorov(sign * x, lambda y: (normal_cdf(y) - below) / (above - below)) < 1.95


def test_truncated_normal_is_scaled_and_shifted() -> None:
    key = philox.seed(22)
    x = full(philox.truncated_normal, key, 500, 500, mean=1.0, std=0.02, dtype=torch.float64)
    plain = full(philox.truncated_normal, key, 500, 500, dtype=torch.float64)
    torch.testing.assert_close(x, 1.0 + 0.02 * plain, rtol=1e-14, atol=0.0)
    assert abs(plain.std() - 0.8796) < 0.004


@pytest.mark.parametrize("high", [2, 10, 37, 1000])
def test_randint_values_are_equally_frequent(high: int) -> None:
    counts = full(philox.randint, philox.seed(23), 1000, 1000, high=high).flatten().bincount()
    expected = MILLION / high
    assert counts.numel() == high
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (high - 1)) < 4 * math.sqrt(2 * (high - 1))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_bernoulli_has_frequency_p(p: float) -> None:
    mask = full(philox.bernoulli, philox.seed(24), 1000, 1000, p=p)
    assert abs(mask.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / MILLION)


def test_every_bit_of_the_words_is_fair() -> None:
    words = full(philox.words, philox.seed(25), 1000, 1000)
    bits = words.flatten()[:, None] >> torch.arange(32) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / 1000


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal])
def test_other_keys_and_salts_are_uncorrelated(draw: Draw) -> None:
    key = philox.seed(26)
    x = full(draw, key, 1000, 1000)
    children = philox.split(key, 2)
    others = [philox.seed(27), (key[0], 1), *children, philox.fold_in(key, 0)]
    samples = [full(draw, other, 1000, 1000) for other in others]
    samples += [full(draw, key, 1000, 1000, salt=salt) for salt in (1, 2, 2**29)]
    for y in [*samples, full(draw, children[0], 1000, 1000, salt=1)]:
        assert abs(correlation(x, y)) < 4
        assert abs(correlation(x**2, y**2)) < 4
    assert abs(correlation(samples[2], samples[3])) < 4


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal])
def test_neighbours_in_one_tensor_are_uncorrelated(draw: Draw) -> None:
    x = full(draw, philox.seed(28), 1000, 1000)
    pairs = [(x[:, :-lag], x[:, lag:]) for lag in (1, 2, 3, 4)] + [(x[:-1], x[1:])]
    pairs.append((x[:, 0::2], x[:, 1::2]))
    for a, b in pairs:
        assert abs(correlation(a, b)) < 4
        assert abs(correlation(a**2, b**2)) < 4


# Keys


def test_keys_are_the_same_on_every_machine() -> None:
    key = philox.seed(2**40 + 7)
    assert key == (7, 256)
    assert philox.split(key, 2) == [(3027289759, 3666451124), (3033817931, 2542533163)]
    assert philox.fold_in(key, 3) == (1803849753, 95024963)
    assert philox.fold_in(key, "blocks.w_up") == (1584941775, 836394718)


def test_derived_keys_differ() -> None:
    key = philox.seed(0)
    made = [key, *philox.split(key, 1000), *(philox.fold_in(key, i) for i in range(1000))]
    made += [philox.fold_in(key, str(i)) for i in range(1000)]
    made += [philox.fold_in(key, 2**63 + 1), philox.fold_in(key, ""), philox.seed(2**64 - 1)]
    made += philox.split(philox.seed(1), 1000)
    assert len(set(made)) == len(made)
    assert all(0 <= word < 2**32 for pair in made for word in pair)


def test_a_longer_split_only_appends() -> None:
    assert philox.split((1, 2), 9)[:4] == philox.split((1, 2), 4)
    assert philox.split((1, 2), 0) == []


def test_key_material_meets_no_words_of_any_salt() -> None:
    key = philox.seed(0)
    draws = [full(philox.words, key, 64, salt=salt) for salt in (0, 1, 2**31, 2**31 + 1)]
    seen = set(torch.cat(draws).tolist())
    assert not seen & {word for pair in philox.split(key, 32) for word in pair}


@pytest.mark.parametrize("value", [-1, 2**64, -(2**70)])
def test_seeds_and_data_out_of_range_are_named(value: int) -> None:
    with pytest.raises(ValueError, match=f"seed: {value} is out of range; it must be at least 0"):
        philox.seed(value)
    with pytest.raises(ValueError, match=f"fold_in: {value} is out of range"):
        philox.fold_in((0, 0), value)
    with pytest.raises(ValueError, match="split: -1 keys asked for"):
        philox.split((0, 0), -1)


def test_seeds_must_be_integers() -> None:
    with pytest.raises(TypeError):
        philox.seed(0.5)  # pyright: ignore[reportArgumentType]
