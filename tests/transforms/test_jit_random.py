"""Random keys under `jit`: data of one program that draws what the function itself draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import random
from shardwise.cli.step import make_step

EAGER = {"backend": "eager"}
KEYS = [random.key(0), random.key(2**40 + 7), random.fold_in(random.key(3), "dropout")]
MESH = {"x": 2, "y": 3}
SHAPE, LAYOUT = (12, 18), "a/x b/y"


def drawn(draw: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda key, mesh: draw(key, SHAPE, mesh, LAYOUT, **options)


def categorical(key: Any, mesh: Any) -> Any:
    return random.categorical(key, sw.full((6, 6), 0.0, mesh, "b/x v/y"), classes=5)


DRAWS: dict[str, Callable[[Any, Any], Any]] = {
    "uniform": drawn(random.uniform, low=-1.3, high=0.7),
    "uniform f64": drawn(random.uniform, dtype=torch.float64),
    "uniform bf16": drawn(random.uniform, dtype=torch.bfloat16),
    "normal": drawn(random.normal, mean=1.0, std=0.3),
    "normal f64": drawn(random.normal, dtype=torch.float64),
    "truncated": drawn(random.truncated_normal, std=2.0),
    "randint": drawn(random.randint, low=-3, high=2**40),
    "bernoulli": drawn(random.bernoulli, p=0.3),
    "odd": lambda key, mesh: random.normal(key, (10, 1, 1), mesh, "a/x b c"),
    "scalar": lambda key, mesh: random.uniform(key, (), mesh),
    "padded": lambda key, mesh: random.normal(
        key, random.PaddedShape((4, 6), true=(3, 5)), mesh, "a/x b/y"
    ),
    "categorical": categorical,
    "split": lambda key, mesh: [random.uniform(k, (6,), mesh) for k in random.split(key, 3)],
    "fold_in": lambda key, mesh: [
        random.uniform(random.fold_in(random.fold_in(key, data), 1), (6,), mesh)
        for data in (0, 2**33 + 1, "blocks.w_up")
    ],
    "permutation": lambda key, mesh: random.permutation(key, 100),
    "normal_like": lambda key, mesh: random.normal_like(key, sw.full((6, 4), 0.0, mesh, "a/y b/x")),
}


def values(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, list) else [result]
    return [x if isinstance(x, torch.Tensor) else x.full_tensor() for x in results]


@pytest.mark.parametrize("name", DRAWS)
def test_one_program_draws_for_every_key_what_the_function_draws(name: str) -> None:
    mesh = sw.make_mesh(MESH)
    jitted = sw.jit(lambda key: DRAWS[name](key, mesh), options=EAGER)
    seen = []
    for key in KEYS:
        found, wanted = values(jitted(key)), values(DRAWS[name](key, mesh))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        seen.append(found[-1])
    assert len(jitted.programs) == 1
    assert name == "scalar" or not any(torch.equal(seen[0], other) for other in seen[1:])


def dropped_loss(params: Any, x: Any, key: Any) -> Any:
    first, second = random.split(key, 2)
    h = sw.nn.dropout(torch.tanh(x @ params["w"]), 0.25, first)
    h = sw.nn.dropout(h @ params["v"], 0.5, random.fold_in(second, "out"))
    return (h * h).mean()


def parameters(mesh: Any) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    w, v, x = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in ((6, 12), (12, 6), (4, 6))
    )
    params = {"w": sw.shard(w, mesh, "i h/y"), "v": sw.shard(v, mesh, "h/y o")}
    return params, sw.shard(x, mesh, "b/x i")


@pytest.mark.parametrize("transform", [lambda f: f, sw.remat], ids=["", "remat"])
def test_a_training_step_with_dropout_compiles_once(transform: Any) -> None:
    mesh = sw.make_mesh(MESH)
    params, x = parameters(mesh)
    gradient = sw.value_and_grad(transform(dropped_loss))

    def step(params: Any, x: Any, key: Any) -> Any:
        loss, grads = gradient(params, x, key)
        return sw.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    jitted = sw.jit(step, options=EAGER)
    losses = set()
    for number in range(3):
        key = random.fold_in(random.key(1), number)
        (found, loss), (wanted, expected) = jitted(params, x, key), step(params, x, key)
        for name in params:
            a, b = found[name].full_tensor(), wanted[name].full_tensor()
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss.full_tensor(), expected.full_tensor(), rtol=1e-12, atol=0.0)
        losses.add(float(loss.full_tensor()))
        params = found
    assert len(jitted.programs) == 1
    assert len(losses) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_inductor_draws_the_same() -> None:
    mesh = sw.make_mesh({"x": 1})
    x = sw.shard(torch.ones(8, 12), mesh)

    def draw(x: Any, key: Any) -> Any:
        first, second = random.split(key, 2)
        noise = random.uniform(first, (8, 12), mesh, dtype=torch.float64)
        return sw.nn.dropout(x, 0.5, second), noise, random.randint(key, (5,), mesh, high=99)

    jitted = sw.jit(draw)
    for key in KEYS:
        for a, b in zip(jitted(x, key), draw(x, key), strict=True):
            assert torch.equal(a.full_tensor(), b.full_tensor())
    assert len(jitted.programs) == 1


def test_keys_in_a_state_go_in_and_come_out() -> None:
    mesh = sw.make_mesh({"x": 2})

    def step(state: Any) -> Any:
        draw, left = random.split(state["key"], 2)
        return {"key": left, "sum": state["sum"] + random.uniform(draw, (4,), mesh, "a/x")}

    jitted = sw.jit(step, donate_argnums=0, options=EAGER)
    start = {"key": random.key(5), "sum": sw.full((4,), 0.0, mesh, "a/x")}
    wanted = step(step(step(start)))
    middle = jitted(start)
    found = jitted(jitted(middle))
    assert torch.equal(found["sum"].full_tensor(), wanted["sum"].full_tensor())
    assert found["key"] == wanted["key"]
    assert hash(found["key"]) == hash(wanted["key"])
    assert str(found["key"]) == str(wanted["key"])
    assert middle["key"] == step({**start, "sum": found["sum"]})["key"]  # not written over
    assert start["key"] == random.key(5)
    assert len(jitted.programs) == 1


def test_a_key_is_no_number_inside() -> None:
    mesh = sw.make_mesh({"x": 2})
    jitted = sw.jit(lambda key: sw.full((2,), float(key.words[0]), mesh), options=EAGER)
    with pytest.raises(TypeError, match="inside jit a key is data"):
        jitted(random.key(0))


def test_a_key_that_is_closed_over_or_static_is_part_of_the_program() -> None:
    mesh = sw.make_mesh({"x": 2})
    key = random.key(9)

    def added(x: Any) -> Any:
        return x + random.uniform(key, (4,), mesh) * random.normal(key, (4,), mesh)

    closed = sw.jit(added, options=EAGER)
    x = sw.full((4,), 1.0, mesh)
    assert torch.equal(closed(x).full_tensor(), added(x).full_tensor())
    static = sw.jit(lambda x, key: x * float(key.words[0]), static_argnums=1, options=EAGER)
    assert static(x, random.key(2)).full_tensor().tolist() == [2.0] * 4
    assert static(x, random.key(3)).full_tensor().tolist() == [3.0] * 4


class Dropping:
    """The least that the train command's step asks of a model."""

    def loss(self, params: Any, batch: Any, key: Any = None) -> Any:
        return dropped_loss(params, batch, key)


def test_the_train_step_compiles_once_for_all_its_keys() -> None:
    mesh = sw.make_mesh(MESH)
    params, x = parameters(mesh)
    optimizer = sw.optim.sgd(0.1)
    step = make_step(Dropping(), optimizer, micro_batches=2)  # pyright: ignore[reportArgumentType]
    jitted = sw.jit(step, options=EAGER)
    state = optimizer.init(params)
    for number in range(2):
        key = random.fold_in(random.key(1), number)
        (found, _, loss), (wanted, _, expected) = (f(params, state, x, key) for f in (jitted, step))
        torch.testing.assert_close(loss.full_tensor(), expected.full_tensor(), rtol=1e-12, atol=0)
        a, b = found["w"].full_tensor(), wanted["w"].full_tensor()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(jitted.programs) == 1
