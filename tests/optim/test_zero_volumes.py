"""What ZeRO costs: bytes of real shards, and elements that devices move, as whole numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import values
from zeros import PLACES, placed

import shardwise as sw
from shardwise import optim, strategies

BF16, F32 = torch.bfloat16, torch.float32
LAYERS, WIDTH, HIDDEN = 3, 12, 24
SIZES = {"layer": LAYERS, "embed": WIDTH, "ffn": HIDDEN}
BLOCKS = sw.nn.stack({"w_up": sw.nn.Param("embed -> ffn"), "w_down": sw.nn.Param("ffn -> embed")})
MASTER = optim.master(optim.adamw(0.01))
# Parameters, gradients, transform; bytes per parameter of parameters, gradients and state.
VARIANTS: dict[str, tuple[torch.dtype, torch.dtype, optim.Transform, tuple[int, int, int]]] = {
    "bf16, master": (BF16, BF16, MASTER, (2, 2, 12)),
    "bf16, gradients in float32, master": (BF16, F32, MASTER, (2, 4, 12)),
    "float32": (F32, F32, optim.adamw(0.01), (4, 4, 8)),
    "bf16, moments too": (BF16, BF16, optim.adamw(0.01), (2, 2, 4)),
    "bf16, float32 moments": (BF16, BF16, optim.adamw(0.01, state_dtype=F32), (2, 2, 8)),
    "momentum": (F32, F32, optim.sgd(0.1, momentum=0.9), (4, 4, 4)),
    "sgd": (F32, F32, optim.sgd(0.1), (4, 4, 0)),
    "lion": (F32, F32, optim.lion(0.1), (4, 4, 4)),
}
CUT = {0: (0, 0, 0), 1: (0, 0, 1), 2: (0, 1, 1), 3: (1, 1, 1)}  # what of these a stage cuts


class Stack:
    """A stack of two matrices a layer under a strategy."""

    def __init__(self, stage: int, mesh: sw.Mesh, dtype: torch.dtype = F32) -> None:
        whole = strategies.fsdp() if stage == 3 else strategies.data()
        if "tensor" in mesh.axes:
            whole = whole * strategies.tensor_1d()
        self.s = whole.replace(precision=sw.Precision(dtype, dtype, dtype))
        self.params = sw.nn.init(sw.random.key(0), {"blocks": BLOCKS}, SIZES, mesh, self.s)
        self.x = sw.shard(values(12, 4, WIDTH).to(dtype), mesh, self.s["hidden"])

    def loss(self, params: Any, x: Any) -> Any:
        s = self.s

        def layer(x: Any, p: Any) -> Any:
            p = s.use(p)
            h = F.gelu(sw.nn.dense(sw.reshard(x, s["block_in"]), p["w_up"], out=s["ffn"]))
            return sw.nn.dense(h, p["w_down"], out=s["hidden"]), None

        x, _ = sw.scan(layer, x, params["blocks"])
        return (x * x).mean()


def held(tree: Any) -> int:
    """Bytes of memory that the first device's tensors hold, scalars left out."""
    shards = [
        x.shards[0] for x in sw.tree.leaves(tree) if isinstance(x, sw.ShardedTensor) and x.ndim
    ]
    stores = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in shards}
    return sum(stores.values())


def count(params: Any, n: int) -> int:
    """Parameters of one device, where the data axis cuts none of n."""
    cut = [n if "data" in str(p.layout) else 1 for p in sw.tree.leaves(params)]
    return sum(p.shards[0].numel() * k for p, k in zip(sw.tree.leaves(params), cut, strict=True))


@pytest.mark.parametrize("stage", CUT)
@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 4}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_real_shards_equals_the_formula(
    variant: str, axes: dict[str, int], stage: int
) -> None:
    param, grad, t, each = VARIANTS[variant]
    stack = Stack(stage, sw.make_mesh(axes), param)
    n, params = axes["data"], stack.params
    opt = optim.zero(t, stage)
    vg = sw.value_and_grad(stack.loss, grads=opt.grads, dtype=grad)
    state = opt.init(params)
    _, grads = vg(params, stack.x)
    params, state = opt.step(grads, state, params)
    _, grads = vg(params, stack.x)
    total = count(params, n)
    assert total == 2 * LAYERS * WIDTH * HIDDEN // axes.get("tensor", 1)
    expected = [b * total // (n if cut else 1) for b, cut in zip(each, CUT[stage], strict=True)]
    assert [held(params), held(grads), held(state)] == expected


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_figures_of_the_paper(stage: int, gigabytes: float) -> None:
    """7.5e9 parameters on 64 devices, arXiv 1910.02054, figure 1."""
    mesh = sw.make_mesh({"data": 64}, transport="abstract")
    at = "a b/data" if stage == 3 else "a b"
    params = {f"w{i}": sw.zeros((12500, 20000 // 64 * 64), mesh, at, dtype=BF16) for i in range(30)}
    opt = optim.zero(MASTER, stage)
    state = opt.init(params)
    wanted = opt.grads(params)
    owed = sum(
        sw.Layout(wanted[k]).local_shape(p.shape, mesh)[1] * p.shape[0] * 2
        for k, p in params.items()
    )
    local = [x.shards[0] for x in sw.tree.leaves([params, state])]
    total = owed + sum(s.numel() * s.element_size() for s in local)
    scale = 7.5e9 / sum(p.numel() for p in params.values())
    assert total * scale / 1e9 == pytest.approx(gigabytes, rel=3e-3)


def recorded(
    stack: Stack, stage: int, t: optim.Transform, micro: int = 1, dtype: Any = None
) -> sw.Plan:
    """One training step; the input has a gradient too, as in the middle of a model."""
    opt = optim.zero(t, stage)

    def wanted(both: Any) -> Any:
        return opt.grads(both[0]), both[1].layout

    vg = sw.value_and_grad(stack.loss, argnums=(0, 1), grads=wanted, dtype=dtype)
    state = opt.init(stack.params)
    with sw.record() as plan:
        _, (grads, _) = (sw.accumulate(vg, micro) if micro > 1 else vg)(stack.params, stack.x)
        opt.step(grads, state, stack.params)
    return plan


def moved(plan: sw.Plan, **match: Any) -> float:
    """Elements over the data axis, without the loss value."""
    return plan.elements(axis="data", **match) - plan.elements(axis="data", phase="report", **match)


@pytest.mark.parametrize(
    "axes", [{"data": 2}, {"data": 3}, {"data": 4}, {"data": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("stage", CUT)
def test_a_step_moves_2_2_2_or_3_times_the_parameters(axes: dict[str, int], stage: int) -> None:
    stack = Stack(stage, sw.make_mesh(axes))
    n = axes["data"]
    share = count(stack.params, n) * (n - 1) // n
    plan = recorded(stack, stage, MASTER)
    assert moved(plan) == {0: 2, 1: 2, 2: 2, 3: 3}[stage] * share
    by_kind = {
        0: {"all_reduce": 2 * share},
        1: {"reduce_scatter": share, "all_gather": share},
        2: {"reduce_scatter": share, "all_gather": share},
        3: {"reduce_scatter": share, "all_gather": 2 * share},
    }[stage]
    for kind in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
        assert moved(plan, kind=kind) == by_kind.get(kind, 0), kind


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches(stage: int) -> None:
    """Stage 1 scatters once; 2 and 3 scatter, and 3 gathers, for each micro-batch."""
    stack = Stack(stage, sw.make_mesh({"data": 2}))
    share = count(stack.params, 2) // 2
    plan = recorded(stack, stage, MASTER, micro=3)
    scattered, gathered = {1: (1, 1), 2: (3, 1), 3: (3, 6)}[stage]
    assert moved(plan, kind="reduce_scatter") == scattered * share
    assert moved(plan, kind="all_gather") == gathered * share
    assert moved(plan) == (scattered + gathered) * share


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_are_gathered_in_their_own_dtype(stage: int) -> None:
    stack = Stack(stage, sw.make_mesh({"data": 4}), BF16)
    share = count(stack.params, 4) * 3 // 4
    plan = recorded(stack, stage, MASTER, dtype=F32)
    assert plan.bytes(kind="all_gather", axis="data") == 2 * share
    assert plan.bytes(kind="reduce_scatter", axis="data") == 4 * share
    assert {c.dtype for c in plan.collectives if c.kind == "all_gather"} == {BF16}


def test_stage_1_takes_two_collectives_and_stage_2_scatters_layer_by_layer() -> None:
    mesh = sw.make_mesh({"data": 4})
    one, two = (recorded(Stack(stage, mesh), stage, MASTER) for stage in (1, 2))
    assert one.count(op="step") == 2
    assert one.count(kind="reduce_scatter", phase="forward") == 1
    assert two.count(op="step") == two.count(kind="all_gather") == 1
    assert two.count(kind="reduce_scatter", phase="backward") == 2 * LAYERS
    biggest = max(math.prod(c.shape) for c in two.collectives if c.kind == "reduce_scatter")
    assert biggest == WIDTH * HIDDEN  # one layer's matrix


@pytest.mark.parametrize("stage", CUT)
def test_gpt2_moves_as_much(stage: int) -> None:
    """The tied table is cast once, else it is gathered twice."""
    model, params, batch = placed(PLACES["data"], stage, F32, "once")
    opt = optim.zero(MASTER, stage)
    state = opt.init(params)
    with sw.record() as plan:
        _, grads = sw.value_and_grad(model.loss, grads=opt.grads)(params, batch)
        opt.step(grads, state, params)
    share = count(params, 4) * 3 // 4
    large = [c for c in plan.collectives if c.shape]  # no loss, no count of labels
    elements = sum(c.elements * c.repeat for c in large)
    again = sum(c.elements * c.repeat for c in large if c.phase == "regather")
    assert elements - again == 2 * share
    # Backward reads no position and no bias of a product, so they are not gathered again.
    free = [k for k, _ in sw.tree.items(params) if k == "pos" or ".b_" in k]
    small = sum(p.numel() for k, p in sw.tree.items(params) if k in free) * 3 // 4
    assert again == (share - small if stage == 3 else 0)


def test_sums_of_norms_are_scalars() -> None:
    """Clipping adds one number; LAMB two per matrix, in one collective."""
    mesh = sw.make_mesh({"data": 2})
    clipped = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    for t, numbers in ((clipped, 1), (optim.lamb(0.1), 2 * 2)):
        plan = recorded(Stack(1, mesh), 1, t)
        assert plan.count(kind="all_reduce", phase="forward") == 1
        assert moved(plan, kind="all_reduce") == numbers  # 2 (N-1)/N of them
