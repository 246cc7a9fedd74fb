"""BERT equals Hugging Face's, and under every strategy the unsharded one, with every gradient."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from gallery import mesh
from tiny import TINY
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies

bert: Any = importlib.import_module("shardwise.models.bert")  # the module, not the function
F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
UNSHARDED = ({"data": 1}, strategies.data())
MESHES: dict[str, tuple[dict[str, int], sw.Strategy]] = {
    "data": ({"data": 4}, strategies.data()),
    "fsdp": ({"data": 4}, strategies.fsdp()),
    "fsdp, tied once": ({"data": 4}, strategies.fsdp().replace(tied="once")),
    "tensor_1d": ({"tensor": 4}, strategies.tensor_1d()),
    "sequence_parallel": ({"tensor": 4}, strategies.sequence_parallel()),
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
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"]
)


def config_for(task: str, **sizes: Any) -> Any:
    return dataclasses.replace(TINY["bert"]().config, task=task, **sizes)


def reference(config: Any, dtype: torch.dtype) -> Any:
    """Hugging Face's model of this config, redrawn.

    Without a padding token, whose row of the table torch leaves out of gradients on purpose.
    """
    import transformers

    found = bert.config_to(config) | {"pad_token_id": None}
    kind = getattr(transformers, found["architectures"][0])
    return parity.redraw(kind(transformers.BertConfig(**without_type(found))).to(dtype))


def without_type(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "model_type"}


def theirs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch by Hugging Face's names."""
    return {
        "input_ids": batch["tokens"],
        "attention_mask": batch["mask"],
        "token_type_ids": batch["types"],
    }


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("mask", "types")}


def wide(model: models.Model) -> Any:
    """Plain parameters drawn wide, so that every term matters."""
    rng = torch.Generator().manual_seed(0)

    def draw(param: sw.nn.Param) -> Tensor:
        return torch.randn(param.shape(model.config), generator=rng, dtype=torch.float64) * 0.3

    return sw.tree.map(draw, model.declaration)


def under(config: Any, name: str) -> tuple[models.Model, sw.Mesh]:
    axes, strategy = UNSHARDED if name == "unsharded" else MESHES[name]
    return models.bert(config, strategy.replace(precision=F64)), mesh(**axes)


def placed(
    model: models.Model, on: sw.Mesh, batch: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Any]]:
    """Wide parameters at rest, and the batch."""
    layouts = model.strategy.layouts(model.declaration, model.config, on)
    return (
        sw.shard(wide(model), on, layouts),
        {name: parity.place(value, on, model.strategy) for name, value in batch.items()},
    )


@DTYPES
def test_pretraining_equals_hugging_face(dtype: torch.dtype, tolerance: float) -> None:
    config, batch = config_for("pretrain"), TINY["bert"]().batch()
    module = reference(config, dtype)
    given = theirs(batch) | {
        "labels": batch["labels"],
        "next_sentence_label": batch["next_labels"],
    }
    out = module(**given)
    out.loss.backward()
    grads = parity.state_of(module, gradients=True)
    wanted = parity.Ran(out.prediction_logits.detach(), out.loss.detach(), grads)
    strategy = strategies.data() * strategies.tensor_1d()
    model = models.bert(config, strategy.replace(precision=sw.Precision(dtype, dtype, dtype)))
    params = parity.to_params(parity.state_of(module), model)
    ran = parity.run_ours(model, mesh(data=2, tensor=2), params, batch, **inputs(batch))
    parity.check(ran, wanted, tolerance)
    assert ran.grads.keys() == wanted.grads.keys()
    assert all(grad.abs().max() > 0 for name, grad in ran.grads.items() if ".key.bias" not in name)


@DTYPES
def test_masked_tokens_equal_hugging_face_with_padded_sizes(
    dtype: torch.dtype, tolerance: float
) -> None:
    config = config_for("masked", embed=12, heads=3, vocab=23, ffn=18)
    batch = dict(TINY["bert"]().batch())
    del batch["next_labels"]
    batch["tokens"], batch["labels"] = batch["tokens"].clamp(max=22), batch["labels"].clamp(max=22)
    module = reference(config, dtype)
    wanted = parity.run_reference(module, lambda m: m(**theirs(batch)).logits, batch["labels"])
    padded = dataclasses.replace(config, pad={"vocab": 4, "heads": 4, "ffn": 4})
    strategy = strategies.tensor_1d().replace(precision=sw.Precision(dtype, dtype, dtype))
    model = models.bert(padded, strategy)
    params = parity.to_params(parity.state_of(module), model)
    ran = parity.run_ours(model, mesh(tensor=4), params, batch, **inputs(batch))
    parity.check(ran, wanted, tolerance)
    assert ran.grads.keys() == wanted.grads.keys()


@pytest.mark.parametrize("name", ["data", "sequence_parallel", "tensor_3d"])
def test_hidden_states_and_pooled_vector_equal_hugging_face(name: str) -> None:
    config, batch = config_for("encode"), TINY["bert"]().batch()
    module = reference(config, torch.float64)
    out = module(**theirs(batch))
    weight = torch.linspace(-1, 1, 36, dtype=torch.float64)  # a plain sum of a norm has no gradient
    ((out.last_hidden_state * weight).sum() + (out.pooler_output * weight).sum()).backward()
    wanted = parity.state_of(module, gradients=True)

    model, on = under(config, name)
    params = parity.to_params(parity.state_of(module), model)
    params = sw.shard(params, on, model.strategy.layouts(model.declaration, config, on))
    tokens, *others = (
        parity.place(batch[key], on, model.strategy) for key in ("tokens", "mask", "types")
    )
    given = dict(zip(("mask", "types"), others, strict=True))

    def total(params: Any) -> Any:
        hidden, pooled = models.encode(model, params, tokens, **given)
        return (hidden * weight).sum() + (pooled * weight).sum()  # pyright: ignore

    hidden, pooled = models.encode(model, params, tokens, **given)
    states = out.last_hidden_state.detach()
    assert pooled is not None
    parity.agree("hidden", hidden.full_tensor(), states, 1e-12)
    parity.agree("pooled", pooled.full_tensor(), out.pooler_output.detach(), 1e-12)
    parity.agree("apply", model.apply(params, tokens, **given).full_tensor(), states, 1e-12)
    grads = sw.tree.map(lambda g: g.full_tensor(), sw.grad(total)(params))
    ours = parity.to_state(grads, model)
    assert ours.keys() == wanted.keys()
    for key, grad in ours.items():
        parity.agree(key, grad, wanted[key], 1e-11)


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_equal_the_unsharded_run(name: str) -> None:
    tiny = TINY["bert"]()
    batch = tiny.batch()
    runs = []
    for which in (name, "unsharded"):
        model, on = under(tiny.config, which)
        runs.append(parity.run_ours(model, on, wide(model), batch, **inputs(batch)))
    parity.check(runs[0], runs[1], 1e-11)


def test_the_mean_is_over_the_labels_of_the_global_batch() -> None:
    tiny = TINY["bert"]()
    batch = dict(tiny.batch())
    labels = batch["labels"]
    counts = (labels.unflatten(0, (4, 2)) != -100).sum((1, 2))
    assert counts[0] == 0  # so that a mean of the devices' means would differ, or be no number
    assert len(set(counts.tolist())) > 2
    del batch["next_labels"]
    model, on = under(tiny.config, "data")
    ran = parity.run_ours(model, on, wide(model), batch, **inputs(batch))
    expected = F.cross_entropy(ran.output.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(ran.loss, expected, rtol=1e-12, atol=0)


def test_padding_is_seen_by_nobody_and_types_matter() -> None:
    tiny = TINY["bert"]()
    batch = dict(tiny.batch())
    real = batch["mask"].bool()
    other = dict(batch, tokens=torch.where(real, batch["tokens"], (batch["tokens"] + 7) % 24))
    assert not torch.equal(other["tokens"], batch["tokens"])
    model, on = under(tiny.config, "tensor_3d")
    params, given = placed(model, on, batch)
    _, changed = placed(model, on, other)

    def logits(tokens: Any, **known: Any) -> Tensor:
        return model.apply(params, tokens, **known).full_tensor()

    known = {name: given[name] for name in ("mask", "types")}
    before, after = logits(given["tokens"], **known), logits(changed["tokens"], **known)
    torch.testing.assert_close(before[real], after[real], rtol=0, atol=1e-12)
    assert (before - logits(changed["tokens"], types=given["types"]))[real].abs().max() > 1e-3
    first = sw.shard(torch.zeros(8, 12, dtype=torch.int64), on, model.strategy["tokens"])
    plain = logits(given["tokens"], mask=given["mask"])  # no types: all of the first segment
    torch.testing.assert_close(plain, logits(given["tokens"], mask=given["mask"], types=first))
    assert (before - plain).abs().max() > 1e-3


def test_dropout_is_equal_on_every_mesh_and_does_something() -> None:
    tiny = TINY["bert"]()
    config = dataclasses.replace(tiny.config, dropout=0.3)
    losses = []
    for name in ("unsharded", "data", "tensor_3d", "fsdp x sequence_parallel"):
        model, on = under(config, name)
        params, batch = placed(model, on, tiny.batch())
        losses.append(float(model.loss(params, batch, key=sw.random.key(3)).full_tensor()))
        assert abs(losses[0] - float(model.loss(params, batch).full_tensor())) > 1e-3
    assert max(losses) - min(losses) < 1e-11


def test_a_layer_under_1d_moves_one_all_reduce_per_half_block_each_way() -> None:
    tiny = TINY["bert"]()
    moved: dict[int, dict[str, list[Any]]] = {}
    for layers in (1, 2):
        model, on = under(dataclasses.replace(tiny.config, layer=layers), "tensor_1d")
        params, batch = placed(model, on, tiny.batch())
        with sw.record() as plan:
            sw.value_and_grad(model.loss)(params, batch)
        moved[layers] = {
            phase: [(c.kind, c.shape, c.elements) for c in plan.collectives if c.phase == phase]
            for phase in ("forward", "backward")
        }
    stream, rows = 8 * 12 * 36, 2 * 3 * 8 * 12 // 4
    one = [("all_reduce", (8, 12, 36), 2 * 3 * stream // 4)] * 2
    # besides: the vocabulary's lookup, the transform's result, statistics of the loss; and back,
    # the inputs of the transform and of the vocabulary
    statistics = [("all_reduce", (8, 12, 1), rows), ("all_reduce", (8, 12, 1), rows)]
    ends = [one[0], ("all_gather", (8, 12, 9), 3 * stream // 4), *statistics]

    for layers in (1, 2):
        assert sorted(moved[layers]["forward"]) == sorted([*ends, *one * layers])
        assert moved[layers]["backward"] == one * (layers + 1)


def test_an_encoder_has_no_loss() -> None:
    model, on = under(config_for("encode"), "data")
    params, batch = placed(model, on, TINY["bert"]().batch())
    with pytest.raises(ValueError, match="task 'encode' has no loss"):
        model.loss(params, batch)


@pytest.mark.parametrize("task", ["pretrain", "masked", "encode"])
def test_names_are_those_of_a_checkpoint_there_and_back(task: str) -> None:
    config = config_for(task)
    model = models.bert(config, strategies.data())
    state = parity.state_of(reference(config, torch.float32))
    back = parity.to_state(parity.to_params(state, model), model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    paths = {path for path, _ in sw.tree.items(model.declaration)}
    assert model.names.keys() == paths


@pytest.mark.parametrize("task", ["pretrain", "masked", "encode"])
def test_config_json_there_and_back(task: str) -> None:
    import transformers

    config = config_for(task, dropout=0.1)
    found = bert.config_to(config)
    assert bert.config_from(transformers.BertConfig(**without_type(found)).to_dict()) == config
    with pytest.raises(ValueError, match="hidden_act = 'relu'; only 'gelu' is read"):
        bert.config_from({**found, "hidden_act": "relu"})


@pytest.mark.parametrize(
    ("name", "count"), [("bert-base", 109_482_240), ("bert-large", 335_141_888)]
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    config = models.BERTConfig(**bert.PRESETS[name], task="encode")
    assert models.bert(config, strategies.data()).num_parameters == count
    # the heads: a transform with its norm, the vocabulary's bias, the next sentence
    whole = models.bert(models.BERTConfig(**bert.PRESETS[name]), strategies.data())
    embed = config.embed
    heads = embed * embed + 3 * embed + config.vocab + 2 * embed + 2
    assert whole.num_parameters == count + heads


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed": 10, "heads": 3}, "embed 10 is not a multiple of heads 3"),
        ({"task": "mask"}, "unknown 'mask'.*masked"),
        ({"types": 0}, "types = 0"),
        ({"pad": {"types": 4}}, "'types' cannot be padded"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.BERTConfig(**given)
