"""Delete a cast or a collective, and numbers change: every row of a small program bears load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardwise as sw
from shardwise.layouts.convert import TABLE

# Rows whose result has the operand's shape, so that "none" in their place still runs.
ROWS = [("U", "I"), ("U", "R"), ("I", "U"), ("R", "U")]


def program(rows: Any = None) -> dict[str, torch.Tensor]:
    """Loss and gradients of a two-layer net, 1D tensor parallel, a bias on an owed sum."""
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    x = sw.shard(draw(8, 4), mesh, "b/data d")
    params = {
        "up": sw.shard(draw(4, 6), mesh, "d f/tensor"),
        "down": sw.shard(draw(6, 4), mesh, "f/tensor d"),
        "bias": sw.shard(draw(4), mesh, "d"),
        "gain": sw.shard(draw(4), mesh, "d {R:data,tensor}"),
    }

    def loss(p: Any) -> Any:
        y = F.gelu(x @ p["up"]) @ p["down"] + p["bias"] + p["gain"]
        z = sw.reshard(y, "b/data d {R:tensor}")
        return (z * z).sum() + (p["bias"] * 2).sum()

    with pytest.MonkeyPatch.context() as patch:
        for row in rows or ():
            patch.setitem(TABLE, row, "none")
        value, grads = sw.value_and_grad(loss)(params)
    return {"value": value.full_tensor()} | {k: g.full_tensor() for k, g in grads.items()}


@pytest.mark.parametrize("row", ROWS)
def test_without_a_row_the_numbers_are_wrong(row: tuple[str, str]) -> None:
    right = program()
    try:
        wrong = program([row])
    except sw.LayoutError:  # replicas that disagree are caught when they are read
        return
    assert any(not torch.allclose(right[k], wrong[k]) for k in right), row


def test_the_program_itself_is_right() -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    x, up, down, bias, gain = draw(8, 4), draw(4, 6), draw(6, 4), draw(4), draw(4)
    leaves = [t.requires_grad_() for t in (up, down, bias, gain)]
    z = F.gelu(x @ up) @ down + bias + gain
    value = (z * z).sum() + (bias * 2).sum()
    expected = torch.autograd.grad(value, leaves)
    found = program()
    torch.testing.assert_close(found["value"], value.detach(), rtol=1e-12, atol=1e-12)
    for name, want in zip(("up", "down", "bias", "gain"), expected, strict=True):
        torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12)
