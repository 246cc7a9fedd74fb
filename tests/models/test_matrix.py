"""Every model under every strategy equals its unsharded run: loss and every gradient, in float64.

Meshes of 1, 4, 8, 9 and 16 simulated devices. The unsharded run is the same model on one device,
which other tests compare with independent implementations.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from matrix import F64, every, placed, rows_of, tiny, trained
from tiny import TINY, drawn

import shardwise as sw
from shardwise import strategies as s
from shardwise.layouts.layout import resolve

NAMES = tuple(every("cut"))
# What no padding of ours helps: the sequence of ViT (patches and CLS) is not divisible by 4.
REFUSED = {("vit", "4: sequence"), ("vit", "4: sequence, ring")}


@cache
def unsharded(name: str, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients on one device."""
    of = tiny(name)
    strategy = s.tensor_1d(kv=of.kv).replace(precision=F64)
    model, mesh = of.make(of.config, strategy), sw.make_mesh({"tensor": 1})
    batch = placed(of.batch(rows), strategy, mesh)
    params = sw.shard(drawn(model), mesh, strategy.layouts(model.declaration, of.config, mesh))
    loss, grads = sw.value_and_grad(model.loss)(params, batch)
    return loss.item(), {k: g.full_tensor() for k, g in sw.tree.items(grads)}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("name", TINY)
def test_loss_and_gradients_equal_the_unsharded_run(name: str, case: str) -> None:
    of = tiny(name)
    strategy, axes = every(of.kv)[case]
    rows = rows_of(strategy, axes)
    if (name, case) in REFUSED:
        model = of.make(of.config, strategy)
        with pytest.raises(sw.LayoutError, match="seq"):
            model.check(sw.make_mesh(axes), batch=rows, seq=10)
        return
    params, value, found = trained(name, case)
    loss, grads = unsharded(name, rows)
    assert abs(value.item() - loss) < 1e-10
    for (path, grad), param in zip(sw.tree.items(found), sw.tree.leaves(params), strict=True):
        assert grad.layout is param.layout.dual, path
        torch.testing.assert_close(
            grad.full_tensor(), grads[path], rtol=1e-10, atol=1e-10, msg=path
        )


def test_the_matrix_has_every_preset_and_mesh_size() -> None:
    sizes = {math.prod(axes.values()) for _, axes in every("cut").values()}
    assert sizes == {1, 4, 8, 9, 16}
    assert resolve(every("cut")["8: 3D"][0]["hidden"], 3).dims == (("i", "j"), (), ("k",))
