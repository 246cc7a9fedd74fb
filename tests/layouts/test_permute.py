"""permute_shards: values, the adjoint law, derivatives, vmap, and what is recorded."""

from __future__ import annotations

import pytest
import torch
from check import moves, paired, placed
from gallery import mesh, values

import shardwise as sw
from shardwise.layouts.permute import permute_shards

RING = [(0, 1), (1, 2), (2, 0)]
PARTIAL = [(0, 2), (2, 1)]  # nothing arrives at 0


def test_blocks_move_to_their_positions() -> None:
    x = sw.shard(torch.arange(6), mesh(a=3), "n/a")
    assert permute_shards(x, "a", RING).full_tensor().tolist() == [4, 5, 0, 1, 2, 3]


def test_zeros_lie_where_nothing_arrives() -> None:
    x = sw.shard(torch.arange(1, 4), mesh(a=3), "n/a")
    assert permute_shards(x, "a", PARTIAL).full_tensor().tolist() == [0, 3, 1]


def test_positions_over_two_axes_count_as_one() -> None:
    x = sw.shard(torch.arange(6), mesh(b=3, a=2), "n/a/b")
    shift = [(p, (p + 1) % 6) for p in range(6)]
    assert permute_shards(x, ("a", "b"), shift).full_tensor().tolist() == [5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("pairs", [RING, PARTIAL])
@pytest.mark.parametrize("layout", ["_/a _", "_/a _ {U:b}", "_/a _ {R:b}", "_/a _/b", "_/b/a _"])
def test_backward_is_the_adjoint(pairs: list[tuple[int, int]], layout: str) -> None:
    grid = mesh(a=3, b=2)
    x = placed(values(12, 12), grid, layout)
    y, pull = sw.vjp(lambda x: permute_shards(x, "a", pairs), x)
    g = placed(values(12, 12, seed=1), grid, y.layout.dual, seed=2)
    (back,) = pull(g)
    assert back.layout is x.layout.dual
    assert paired(y, g) == pytest.approx(paired(x, back), abs=1e-12)


def test_one_record_forward_and_one_backward_of_the_local_elements() -> None:
    x = placed(values(12, 12), mesh(a=3), "_/a _")
    with sw.record() as plan:
        y, pull = sw.vjp(lambda x: permute_shards(x, "a", RING), x)
        pull(y.detach())
    assert moves(plan, "forward") == [("permute", "a", 48)]
    assert moves(plan, "backward") == [("permute", "a", 48)]


def test_the_identity_moves_nothing() -> None:
    x = placed(values(12), mesh(a=3), "_/a")
    with sw.record() as plan:
        assert permute_shards(x, "a", [(p, p) for p in range(3)]) is x
    assert not plan.collectives


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_and_vmap_pass_through() -> None:
    x = placed(values(12), mesh(a=3), "_/a")

    def local(*shards: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return permute_shards(sw.ShardedTensor(shards, x._type), "a", RING)._shards

    tangents = tuple(torch.ones_like(s) * i for i, s in enumerate(x.shards))
    _, pushed = torch.func.jvp(local, x.shards, tangents)
    assert [int(t[0]) for t in pushed] == [2, 0, 1]
    batched = tuple(torch.stack([s, 2 * s], -1) for s in x.shards)
    out = torch.vmap(local, in_dims=-1)(*batched)
    assert torch.equal(out[1], torch.stack([x.shards[0], 2 * x.shards[0]]))


def test_second_derivatives_pass_through() -> None:
    x = placed(values(6), mesh(a=3), "_/a")
    cube = sw.grad(
        lambda x: (sw.grad(lambda x: (permute_shards(x, "a", RING) ** 3).sum())(x)).sum()
    )
    assert torch.allclose(cube(x).full_tensor(), 6 * x.full_tensor())


@pytest.mark.parametrize("layout", ["_", "_ {R:a}", "_ {U:a}"])
def test_an_axis_that_cuts_nothing_is_refused(layout: str) -> None:
    x = placed(values(6), mesh(a=3), layout)
    with pytest.raises(sw.LayoutError, match="cuts no dim"):
        permute_shards(x, "a", RING)


@pytest.mark.parametrize("pairs", [[(0, 3)], [(0, 1), (0, 2)], [(0, 1), (2, 1)]])
def test_bad_positions_are_refused(pairs: list[tuple[int, int]]) -> None:
    x = placed(values(6), mesh(a=3), "_/a")
    with pytest.raises(ValueError, match="must differ and lie in"):
        permute_shards(x, "a", pairs)
