"""ViT equals Hugging Face's, and under every strategy the unsharded one, with every gradient."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import parity
import pytest
import torch
from gallery import mesh, values
from tiny import TINY, Tiny

import shardwise as sw
from shardwise import models, strategies

vit: Any = importlib.import_module("shardwise.models.vit")  # the module, not the function
F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
UNSHARDED = ({"data": 1}, strategies.data())
MESHES: dict[str, tuple[dict[str, int], sw.Strategy]] = {
    "data": ({"data": 4}, strategies.data()),
    "fsdp": ({"data": 4}, strategies.fsdp()),
    "tensor_1d": ({"tensor": 4}, strategies.tensor_1d()),
    "sequence_parallel": ({"tensor": 2}, strategies.sequence_parallel()),
    "tensor_2d": ({"row": 2, "col": 2}, strategies.tensor_2d(method="direct")),
    "tensor_2p5d": (
        {"depth": 2, "row": 2, "col": 2},
        strategies.tensor_2p5d(method="direct"),
    ),
    "tensor_3d": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d()),
    "data x tensor_1d": ({"data": 2, "tensor": 2}, strategies.data() * strategies.tensor_1d()),
    "fsdp x sequence_parallel": (
        {"data": 2, "tensor": 2},
        (strategies.fsdp() * strategies.sequence_parallel()).replace(recompute="all"),
    ),
}


def reference(config: Any, dtype: torch.dtype) -> Any:
    """Hugging Face's model of these sizes, redrawn."""
    import transformers

    found = vit.config_to(config)
    theirs = transformers.ViTConfig(**{k: v for k, v in found.items() if k != "model_type"})
    return parity.redraw(transformers.ViTForImageClassification(theirs).to(dtype))


def run(tiny: Tiny, axes: dict[str, int], strategy: sw.Strategy, **known: Any) -> parity.Ran:
    """The tiny model in float64 with wide parameters, that are the same for every strategy."""
    model = tiny.make(tiny.config, strategy.replace(precision=F64))
    params = wide(model)
    return parity.run_ours(model, mesh(**axes), params, tiny.batch(), **known)


def wide(model: models.Model) -> Any:
    """Plain parameters drawn wide, so that every term matters."""
    rng = torch.Generator().manual_seed(0)

    def draw(param: sw.nn.Param) -> torch.Tensor:
        return torch.randn(param.shape(model.config), generator=rng, dtype=torch.float64) * 0.3

    return sw.tree.map(draw, model.declaration)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_loss_and_gradients_equal_hugging_face(
    dtype: torch.dtype, tolerance: float, qkv_bias: bool
) -> None:
    tiny = TINY["vit"]()
    config = dataclasses.replace(tiny.config, qkv_bias=qkv_bias)
    strategy = strategies.data() * strategies.tensor_1d()
    model = models.vit(config, strategy.replace(precision=sw.Precision(dtype, dtype, dtype)))
    theirs = reference(config, dtype)
    batch = dict(tiny.batch())
    batch["images"] = batch["images"].to(dtype)
    wanted = parity.run_reference(theirs, lambda m: m(batch["images"]).logits, batch["labels"])
    params = parity.to_params(parity.state_of(theirs), model)
    ran = parity.run_ours(model, mesh(data=2, tensor=2), params, batch)
    parity.check(ran, wanted, tolerance)
    assert ran.grads.keys() == wanted.grads.keys()
    assert all(grad.abs().max() > 0 for name, grad in ran.grads.items() if ".key.bias" not in name)


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_equal_the_unsharded_run(name: str) -> None:
    tiny = TINY["vit"]()
    parity.check(run(tiny, *MESHES[name]), run(tiny, *UNSHARDED), 1e-11)


def test_padded_heads_change_nothing() -> None:
    tiny = TINY["vit"]()
    config = dataclasses.replace(tiny.config, embed=12, heads=3, ffn=18)
    padded = dataclasses.replace(config, pad={"heads": 4, "ffn": 4})
    theirs = reference(config, torch.float64)
    state = parity.state_of(theirs)
    runs = []
    for one, axes in ((config, {"tensor": 1}), (padded, {"tensor": 4})):
        model = models.vit(one, strategies.tensor_1d().replace(precision=F64))
        params = parity.to_params(state, model)
        runs.append(parity.run_ours(model, mesh(**axes), params, tiny.batch()))
    parity.check(runs[1], runs[0], 1e-11)


def test_a_sequence_that_the_axes_do_not_divide_is_refused_before_anything_runs() -> None:
    strategy = strategies.sequence_parallel()
    model = models.vit(models.ViTConfig(layer=1, embed=8, heads=2, classes=4), strategy)
    on = mesh(tensor=2)
    params = model.init(sw.random.key(0), on)
    images = sw.shard(values(2, 3, 224, 224).float(), on, strategy["images"])
    with sw.record() as plan, pytest.raises(sw.LayoutError) as error:
        model.apply(params, images)
    assert error.value.kind == "indivisible"
    assert "axis 'tensor' of size 2 cuts the sequence" in str(error.value)
    assert "197 tokens (CLS and 196 patches)" in str(error.value)
    assert not plan.ops


def test_other_images_are_refused() -> None:
    tiny = TINY["vit"]()
    on = mesh(data=2)
    model = models.vit(tiny.config, strategies.data())
    params = model.init(sw.random.key(0), on)
    images = sw.shard(values(2, 3, 16, 16).float(), on, model.strategy["images"])
    with pytest.raises(ValueError, match=r"images \(2, 3, 16, 16\); expected \[batch 3 12 12\]"):
        model.apply(params, images)


def test_dropout_is_equal_on_every_mesh_and_does_something() -> None:
    tiny = TINY["vit"]()
    config = dataclasses.replace(tiny.config, dropout=0.3)
    losses = []
    for name in ("data", "tensor_3d", "sequence_parallel", "fsdp x sequence_parallel"):
        axes, strategy = MESHES[name]
        model, on = models.vit(config, strategy.replace(precision=F64)), mesh(**axes)
        layouts = model.strategy.layouts(model.declaration, config, on)
        params = sw.shard(wide(model), on, layouts)
        batch = {k: parity.place(v, on, model.strategy) for k, v in tiny.batch().items()}
        losses.append(float(model.loss(params, batch, key=sw.random.key(3)).full_tensor()))
        assert abs(losses[0] - float(model.loss(params, batch).full_tensor())) > 1e-3
    assert max(losses) - min(losses) < 1e-11


def test_a_layer_under_1d_moves_one_all_reduce_per_half_block_each_way() -> None:
    tiny = TINY["vit"]()
    moved = {}
    for layers in (1, 2):
        config = dataclasses.replace(tiny.config, layer=layers)
        model, on = models.vit(config, strategies.tensor_1d()), mesh(tensor=4)
        params = model.init(sw.random.key(0), on)
        given = {k: v.float() if v.is_floating_point() else v for k, v in tiny.batch().items()}
        batch = {k: parity.place(v, on, model.strategy) for k, v in given.items()}
        with sw.record() as plan:
            sw.value_and_grad(model.loss)(params, batch)
        moved[layers] = {
            phase: sorted(
                (c.kind, c.shape, c.elements) for c in plan.collectives if c.phase == phase
            )
            for phase in ("forward", "backward")
        }
    stream = 8 * 10 * 36
    one = [("all_reduce", (8, 10, 36), 2 * 3 * stream // 4)] * 2
    # nothing else moves: patches, classifier and loss are whole on every device
    assert moved[1] == {"forward": one, "backward": one}
    assert moved[2] == {"forward": one * 2, "backward": one * 2}


def test_names_are_those_of_a_checkpoint_there_and_back() -> None:
    config = TINY["vit"]().config
    model = models.vit(config, strategies.data())
    state = parity.state_of(reference(config, torch.float32))
    back = parity.to_state(parity.to_params(state, model), model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_config_json_there_and_back() -> None:
    import transformers

    config = models.ViTConfig(layer=3, embed=24, heads=3, image=32, patch=8, classes=7, ffn=50)
    theirs = transformers.ViTConfig(**vit.config_to(config))
    assert vit.config_from(theirs.to_dict()) == config
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        vit.config_from({"hidden_act": "relu"})
    with pytest.raises(ValueError, match="not square"):
        vit.config_from({"image_size": [224, 192]})
    assert vit.config_from({"image_size": [32, 32], "num_labels": 3}).image == 32


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit-b16", 86_567_656), ("vit-l16", 304_326_632), ("vit-h14", 632_045_800)],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    model = models.vit(models.ViTConfig(**vit.PRESETS[name]), strategies.data())
    assert model.num_parameters == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed": 10, "heads": 3}, "embed 10 is not a multiple of heads 3"),
        ({"image": 30, "patch": 16}, "image 30 is not a multiple of patch 16"),
        ({"layer": 0}, "layer = 0"),
        ({"pad": {"classes": 8}}, "'classes' cannot be padded"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.ViTConfig(**given)
