"""AdamW, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from canaries import GUARD, guarded, watched
from torch import Tensor

from shardwise.kernels import adamw as plain
from shardwise.kernels import adamw_triton, launch

BLOCK = 256
# One block and less, several blocks with a rest, an exact one, a scalar, nothing.
# A rounding or two of sums whose terms are below 4.
CLOSE = {"rtol": 4e-7, "atol": 5e-7}
SHAPES = [(7,), (5, 100), (256,), (), (0, 3), (3, 1, 129), (16, 64)]
FACTORS = torch.tensor([0.25, -0.02, 0.995])
RATES = (0.9, 0.99, 1e-8)
HOW = launch.Launch(block=BLOCK, warps=4)
KEY = (123456789, 4000000000)


def lists(dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]] = SHAPES) -> Any:
    """Parameters, gradients and means of these dtypes."""
    torch.manual_seed(len(shapes))
    made = [[torch.randn(s).to(d) for s in shapes] for d in dtypes]
    made[3] = [v.abs() for v in made[3]]
    return made


def launched(
    operands: Any, keys: Tensor | None = None, places: Any = (), backwards: bool = False
) -> Any:
    with watched(adamw_triton, backwards=backwards):
        results = [[adamw_triton.empty(t.shape, t) for t in operands[k]] for k in (0, 2, 3)]
        adamw_triton.run(operands, results, FACTORS, *RATES, keys, places, HOW)
    return results


def twin(operands: Any, keys: Tensor | None = None, places: Any = ()) -> Any:
    return plain._adamw(*operands, FACTORS, *RATES, keys, places)


F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("dtypes", "backwards"),
    [((F32,) * 4, False), ((F32,) * 4, True), ((F16,) * 4, False), ((F32, F16, F32, F16), False)],
    ids=["float32", "float32 reversed", "float16", "mixed"],
)
def test_kernel_equals_its_twin(dtypes: tuple[torch.dtype, ...], backwards: bool) -> None:
    held = [[guarded(t) for t in column] for column in lists(dtypes)]
    before = [[t.clone() for t in column] for column in held]
    found = launched(held, backwards=backwards)
    close = {"rtol": 1e-3, "atol": 1e-6} if F16 in dtypes else CLOSE
    for a, b in zip(found, twin([[t.clone() for t in c] for c in before]), strict=True):
        torch.testing.assert_close(a, b, **close)
    assert all(torch.equal(a, b) for x, y in zip(held, before, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip


def test_results_over_the_operands_and_narrow_leaves() -> None:
    """In place, with leaves that do not begin at a multiple of 16 bytes between those that do."""
    shift = [i % 3 for i in range(len(SHAPES))]
    held = [
        [guarded(t, s) for t, s in zip(column, shift, strict=True)] for column in lists((F32,) * 4)
    ]
    wanted = twin([[t.clone() for t in c] for c in held])
    adamw_triton.run(held, (held[0], *held[2:]), FACTORS, *RATES, None, (), HOW)
    for a, b in zip((held[0], *held[2:]), wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for column in held:
        for t, s in zip(column, shift, strict=True):
            whole = torch.as_strided(t, (t.numel() + 2 * GUARD + s,), (1,), 0)
            assert whole[: GUARD + s].isnan().all(), "a write before a leaf"
            assert whole[GUARD + s + t.numel() :].isnan().all(), "a write behind a leaf"


def test_tables_are_kept_while_storage_is() -> None:
    held, kept = lists((F32,) * 4, SHAPES[:2]), []
    adamw_triton._tables.clear()
    for _ in range(3):
        adamw_triton.run(held, (held[0], *held[2:]), FACTORS, *RATES, None, (), HOW)
    assert len(adamw_triton._tables) == 1
    for k in range(adamw_triton.KEPT + 2):
        other = [[t.clone() for t in column] for column in held]
        adamw_triton.run(other, (held[0], *held[2:]), FACTORS, *RATES, None, (), HOW)
        assert len(adamw_triton._tables) == min(k + 2, adamw_triton.KEPT)
        kept.append(other)


# (global shape, start, size): whole; rows of a matrix; columns from 0, 4 and 3 on, widths that
# counters cut; three levels; one row; a column; a scalar.
PLACES = [
    ((4, 96), (0, 0), (4, 96)),
    ((8, 96), (4, 0), (4, 96)),
    ((8, 96), (2, 48), (4, 48)),
    ((5, 30), (1, 15), (3, 15)),
    ((6, 5, 4, 12), (2, 1, 2, 4), (4, 3, 2, 8)),
    ((1001,), (0,), (1001,)),
    ((1001,), (500,), (501,)),
    ((64, 1), (16, 0), (16, 1)),
    ((), (), ()),
]


def test_stochastic_rounding_has_the_bits_of_philox() -> None:
    """Bit for bit that of the whole tensor, rounded in torch; and on no mesh other numbers."""
    from shardwise.meshlib import philox

    torch.manual_seed(0)
    shapes = [size for _, _, size in PLACES]
    held = lists((B16, F32, F32, F32), shapes)
    names = torch.tensor([plain.name_words(f"leaf.{i}") for i in range(len(PLACES))])
    keys = plain._keys(torch.tensor(KEY), torch.tensor(5), names)
    now = philox.fold_in(KEY, 5)
    assert keys.tolist() == [list(philox.fold_in(now, f"leaf.{i}")) for i in range(len(PLACES))]
    places = [n for p in PLACES for n in plain.numbers(*p) or ()]
    found = launched(held, keys, places)
    # The sum before it is rounded: the kernel's own, with a parameter of float32.
    exact = launched([[p.float() for p in held[0]], *held[1:]])
    for i, (shape, start, size) in enumerate(PLACES):
        block = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        bits = philox.words(tuple(keys[i].tolist()), shape, block) >> 16
        wanted = plain._rounded(exact[0][i], bits.to(torch.int32))
        assert torch.equal(found[0][i].float(), wanted), (shape, start)
        assert not torch.equal(wanted, exact[0][i].bfloat16().float()) or not shape
    torch.testing.assert_close(found[1:], list(twin(held, keys, places)[1:]), **CLOSE)


def test_infinities_and_nan_are_not_rounded() -> None:
    held = lists((B16, F32, F32, F32), [(8,)])
    held[0][0][:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    keys, places = torch.tensor([KEY]), plain.numbers((8,), (0,), (8,))
    results = [[torch.empty_like(t) for t in held[k]] for k in (0, 2, 3)]
    adamw_triton.run(held, results, FACTORS, *RATES, keys, places, HOW)
    assert results[0][0][:3].tolist()[:2] == [float("inf"), float("-inf")]
    assert results[0][0].isnan().tolist() == [False, False, True] + [False] * 5


@pytest.mark.parametrize("count", [0, 1, 131])
def test_keys_equal_their_twin(count: int) -> None:
    names = torch.tensor([plain.name_words(f"w{i}") for i in range(count)], dtype=torch.int64)
    for step in (0, 7, 2**33 + 5):
        args = torch.tensor(KEY), torch.tensor(step), names.view(count, 3)
        with watched(adamw_triton):
            found = adamw_triton.adamw_keys(*args)
        assert torch.equal(found, plain._keys(*args))


def test_what_the_kernel_does_not_take_is_the_twin_s() -> None:
    wide = lists((torch.float64,) * 4, [(3,), (2, 2)])
    found = adamw_triton.adamw(*wide, FACTORS, *RATES, None, [])
    for a, b in zip(found, twin(wide), strict=True):
        torch.testing.assert_close(a, b)
    assert adamw_triton.adamw([], [], [], [], FACTORS, *RATES, None, []) == ([], [], [])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_optimizer_s_step_through_the_kernel(
    rounding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A donated step of `optim.adamw` by the path of a GPU equals the one in plain operations."""
    pytest.importorskip("optree")
    import shardwise as sw
    from shardwise import optim
    from shardwise.optim import fused

    dtype = B16 if rounding == "stochastic" else F32
    mesh = sw.make_mesh({"x": 2})
    layouts = {"w": "i/x j", "v": "i j/x", "b": "n"}
    opt = optim.adamw(0.1, rounding=rounding, state_dtype=F32, mask="[wv]")
    start, grad = ({k: torch.randn(6, 20)[: 6 if k != "b" else 1].squeeze(0).to(dtype)
                    for k in layouts} for _ in range(2))  # fmt: skip

    def trained() -> Any:
        params, grads = sw.shard(start, mesh, layouts), sw.shard(grad, mesh, layouts)
        state = opt.init(params)
        for _ in range(3):
            params, state = opt.step(grads, state, params, donate=True)
        return [x.full_tensor() for x in (*params.values(), *state["mu"].values())]

    passes = []

    def one_pass(s: Any, decay: Any, g: Any, mu: Any, nu: Any, p: Any, draw: Any = None) -> Any:
        passes.append(fused._on_gpu(s, decay, (p, g, mu, nu), draw))
        return passes[-1]

    results = []
    for use in (one_pass, lambda *a, **k: None):
        for name in ("adam", "adamw"):
            monkeypatch.setattr(sys.modules[f"shardwise.optim.{name}"], "one_pass", use)
        results.append(trained())
    assert len(passes) == 6
    assert None not in passes
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
