"""Twenty steps equal torch.optim, or the published formulas written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import Tree, close, matrices, run, values

import shardwise as sw
from shardwise import optim
from shardwise.optim.codes import decode, encode

STEPS = 20
GRADS = [values(i + 1) for i in range(STEPS)]


def torch_run(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], params: Tree) -> Tree:
    """What a torch optimizer makes of the same gradients."""
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    opt = make(list(leaves.values()))
    for grads in GRADS:
        for k, p in leaves.items():
            p.grad = grads[k].clone()
        opt.step()
    return {k: v.detach() for k, v in leaves.items()}


T = torch.optim
TORCH: dict[str, tuple[optim.Transform, Any]] = {
    "sgd": (optim.sgd(0.1), lambda p: T.SGD(p, lr=0.1)),
    "momentum": (optim.sgd(0.1, momentum=0.9), lambda p: T.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        optim.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: T.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "penalty": (
        optim.chain(optim.add_decayed_weights(0.1), optim.sgd(0.1, momentum=0.9)),
        lambda p: T.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (
        optim.adam(0.02, b1=0.8, b2=0.95, eps=1e-3),
        lambda p: T.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3),
    ),
    "pieces of adam": (
        optim.chain(optim.scale_by_adam(eps=1e-3), optim.scale(-0.02)),
        lambda p: T.Adam(p, lr=0.02, eps=1e-3),
    ),
    "adamw": (
        optim.adamw(0.02, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3),
        lambda p: T.AdamW(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    "injected adamw": (
        optim.inject(optim.adamw, lr=0.02, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3),
        lambda p: T.AdamW(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    "adafactor": (
        optim.adafactor(0.05, weight_decay=0.1),
        lambda p: T.Adafactor(p, lr=0.05, weight_decay=0.1),
    ),
    "adafactor with other constants": (
        optim.adafactor(0.9, decay=-0.5, eps=1e-3, eps_scale=0.5),
        lambda p: T.Adafactor(p, lr=0.9, beta2_decay=-0.5, eps=(1e-3, 0.5)),
    ),
}


@pytest.mark.parametrize("layout", ["replicated", "three axes"])
@pytest.mark.parametrize("name", TORCH)
def test_equal_to_torch(name: str, layout: str) -> None:
    ours, theirs = TORCH[name]
    close(run(ours, values(0), GRADS, layout)[0], torch_run(theirs, values(0)))


def reference(
    step: Callable[[str, torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor],
    params: Tree,
) -> Tree:
    """Steps of p = step(path, p, g, memory, t), t from 1, memory a dict per tensor."""
    memory: dict[str, dict[str, Any]] = {k: {} for k in params}
    for t, grads in enumerate(GRADS, 1):
        params = {k: step(k, p, grads[k], memory[k], t) for k, p in params.items()}
    return params


def per_layer(step: Any) -> Any:
    """The step on each layer of "stack" as on a tensor of its own."""

    def each(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
        if k != "stack":
            return step(k, p, g, memory, t)
        own = [memory.setdefault(i, {}) for i in range(len(p))]  # pyright: ignore
        return torch.stack([step(k, *x, t) for x in zip(p, g, own, strict=True)])

    return each


def lion(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    m = memory.get("m", torch.zeros_like(p))
    c = 0.9 * m + 0.1 * g
    memory["m"] = 0.99 * m + 0.01 * g
    return p - 0.02 * (torch.sign(c) + 0.1 * p)


def adam_direction(g: Any, memory: dict[str, Any], t: int, eps: float) -> Any:
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
    return m / (1 - 0.9**t) / (torch.sqrt(v / (1 - 0.999**t)) + eps)


def lamb(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    u = adam_direction(g, memory, t, 1e-6) + 0.1 * p
    return p - 0.02 * (p.norm() / u.norm()) * u


def lars(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    rate = 0.05 * p.norm() / (g.norm() + 0.1 * p.norm())
    memory["v"] = 0.9 * memory.get("v", 0.0) + 0.5 * rate * (g + 0.1 * p)
    return p - memory["v"]


def came(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    def mean(name: str, new: Any, decay: float) -> Any:
        memory[name] = decay * memory.get(name, 0.0) + (1 - decay) * new
        return memory[name]

    square = g**2 + 1e-30
    if p.ndim < 2:
        u = g / mean("v", square, 0.999).sqrt()
    else:
        row, col = mean("r", square.mean(-1), 0.999), mean("c", square.mean(-2), 0.999)
        u = g / (torch.outer(row, col) / row.mean()).sqrt()
    u = u / max(1.0, float(u.square().mean().sqrt()))
    m = mean("m", u, 0.9)
    if p.ndim > 1:
        stray = (u - m) ** 2 + 1e-16
        row, col = mean("R", stray.mean(-1), 0.9999), mean("C", stray.mean(-2), 0.9999)
        m = m / (torch.outer(row, col) / row.mean()).sqrt()
    return p - 0.01 * (m + 0.1 * p)


def galore(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    if p.ndim < 2:
        return p - 0.02 * adam_direction(g, memory, t, 1e-8)
    left = p.shape[0] <= p.shape[1]
    if (t - 1) % 8 == 0:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        q = u[:, :3] if left else vh[:3].T
        q = q * torch.sign(q.gather(0, q.abs().argmax(0, keepdim=True)))
        memory["q"] = q
    q = memory["q"]
    low = adam_direction(q.T @ g if left else g @ q, memory, t, 1e-8)
    return p - 0.02 * 0.25 * (q @ low if left else low @ q.T)


def adam8bit(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
    """Adam whose means go through codes between steps; blocks are rows cut into runs of 4."""
    if p.numel() < 100:
        return p - 0.02 * adam_direction(g, memory, t, 1e-8)
    m = 0.9 * memory.get("m", torch.zeros_like(p, dtype=torch.float32)) + 0.1 * g.float()
    v = 0.999 * memory.get("v", torch.zeros_like(p, dtype=torch.float32)) + 0.001 * g.float() ** 2
    memory["m"] = torch.cat([decode(*encode(b, 4, True), 4, True) for b in m.split(4, -1)], -1)
    memory["v"] = torch.cat([decode(*encode(b, 4, False), 4, False) for b in v.split(4, -1)], -1)
    return p - 0.02 * (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)).double()


FORMULAS: dict[str, tuple[optim.Transform, Any]] = {
    "lion": (optim.lion(0.02, weight_decay=0.1), lion),
    "lamb": (optim.lamb(0.02, weight_decay=0.1), lamb),
    "lamb per layer": (optim.lamb(0.02, weight_decay=0.1, stacked="stack"), per_layer(lamb)),
    "lars": (optim.lars(0.5, trust=0.05, weight_decay=0.1), lars),
    "lars per layer": (
        optim.lars(0.5, trust=0.05, weight_decay=0.1, stacked="stack"),
        per_layer(lars),
    ),
    "came": (optim.came(0.01, weight_decay=0.1, stacked="stack"), per_layer(came)),
    "galore": (optim.galore(0.02, rank=3, every=8), per_layer(galore)),
    "adam8bit": (optim.adam8bit(0.02, block=4, least=100), adam8bit),
}


@pytest.mark.parametrize("layout", ["replicated", "three axes"])
@pytest.mark.parametrize("name", FORMULAS)
def test_equal_to_the_published_formulas(name: str, layout: str) -> None:
    ours, theirs = FORMULAS[name]
    tolerance = 1e-6 if name == "adam8bit" else 1e-12
    close(run(ours, values(0), GRADS, layout)[0], reference(theirs, values(0)), tolerance)


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("layout", ["replicated", "three axes", "layers"])
@pytest.mark.parametrize("match", ["spectral", "adamw", "none"])
@pytest.mark.parametrize("weights", ["in out", "out in"])
def test_muon_equals_its_formula(layout: str, match: Any, weights: Any) -> None:
    def step(k: str, p: Any, g: Any, memory: dict[str, Any], t: int) -> Any:
        m = memory["m"] = 0.95 * memory.get("m", 0.0) + g
        fan_in, fan_out = p.shape if weights == "in out" else p.shape[::-1]
        length = {
            "spectral": math.sqrt(max(1, fan_out / fan_in)),
            "adamw": 0.2 * math.sqrt(max(p.shape)),
            "none": 1,
        }[match]
        return p - 0.02 * (length * newton_schulz(g + 0.95 * m) + 0.1 * p)

    opt = optim.muon(0.02, weight_decay=0.1, match=match, weights=weights, dtype=None)
    params = matrices(values(0))
    ours, _ = run(opt, params, [matrices(g) for g in GRADS], layout)
    close(ours, reference(per_layer(step), params))


def test_muon_in_bfloat16_equals_torch() -> None:
    params = {k: v for k, v in values(0).items() if k in ("w", "tall")}
    theirs = torch_run(lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1), params)
    opt = optim.muon(0.02, weight_decay=0.1, weights="out in")
    ours, _ = run(opt, params, [{k: g[k] for k in params} for g in GRADS], "three axes")
    close(ours, theirs, 2e-2)
    # The bound means something: the steps are many times longer than it.
    assert all((theirs[k] - params[k]).abs().max() > 0.1 for k in params)


def test_a_muon_step_moves_every_direction_of_a_matrix_equally() -> None:
    g = {"w": values(3)["w"]}
    moved, _ = run(optim.muon(1.0, match="none", dtype=None), g, [g], "two dims")
    singular = torch.linalg.svdvals(moved["w"] - g["w"])
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_galore_is_adam_where_the_rank_is_full() -> None:
    params = values(0)
    ours, _ = run(optim.galore(0.01, rank=8), params, GRADS, "dim 1")
    adam, _ = run(optim.adam(0.01), params, GRADS)
    close(ours, adam)


def test_codes_hold_small_values_beside_large_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1000, generator=rng)
    for signed in (True, False):
        value = x if signed else x.abs()
        codes, scales = encode(value, 256, signed)
        assert codes.dtype is torch.uint8
        assert codes.shape == x.shape
        assert scales.shape == (64, 4)
        back = decode(codes, scales, 256, signed)
        big = value.abs().reshape(64, -1).amax(-1, keepdim=True)
        assert float(((back - value).abs() / big).max()) < 0.02
        assert float((back - value).abs().mean()) < 0.02
    zero = torch.zeros(3, 10)
    assert torch.equal(decode(*encode(zero, 4, True), 4, True), zero)


@pytest.mark.parametrize("decades", range(5))
def test_adam8bit_steps_stay_short_where_a_block_spans_decades(decades: int) -> None:
    torch.manual_seed(0)
    mesh = sw.make_mesh({"data": 2})
    opt = optim.adam8bit(1.0)
    params = {"w": sw.shard(torch.zeros(64, 256), mesh, "a/data b")}
    state = opt.init(params)
    for _ in range(12):
        g = torch.randn(64, 256) * torch.logspace(-decades, 0, 256)
        updates, state = opt.update({"w": sw.shard(g, mesh, "a/data b")}, state, params)
        assert updates["w"].full_tensor().abs().max() < 10
