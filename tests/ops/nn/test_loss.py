"""`nn.cross_entropy` and `nn.log_prob`: torch's numbers in every layout; logits never move."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled, ran
from gallery import mesh, rng, values

import shardwise as sw
from shardwise import nn

# B S V: batch, seq, classes
B, S, V = 8, 6, 24

# layouts of logits and labels
ROWS = {
    "one device": ("b s v", "b s", {"a": 1}),
    "data": ("b/data s v", "b/data s", {"data": 4}),
    "1D": ("b s v/t", "b s", {"t": 3}),
    "SP": ("b s v/t", "b s/t", {"t": 2}),
    "data, 1D": ("b/data s v/t", "b/data s", {"data": 2, "t": 2}),
    "2D": ("b/row s v/col", "b/row s", {"row": 2, "col": 2}),
    "3D": ("b/i/k s v/j", "b/i/j s", {"i": 2, "j": 2, "k": 2}),
    "classes by two": ("b s v/x/y", "b s/x", {"x": 2, "y": 3}),
    "owed": ("b s v/x {U:y}", "b s", {"x": 2, "y": 2}),
}

LABELS = torch.randint(17, (B, S), generator=rng(3))
SOME = LABELS.masked_fill(LABELS % 3 == 0, -100)
LOGITS = values(B, S, V) * 3

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.01},
    "padded": {"classes": 17},
    "padded, smooth, z": {"classes": 17, "label_smoothing": 0.2, "z_loss": 0.01},
    "a class is ignored": {"ignore_index": 3},
    "ignored beyond the classes": {"ignore_index": 255},
    "not padded after all": {"classes": V, "label_smoothing": 0.1},
}


def truth(logits, labels, *, z_loss=0.0, classes=None, **options):
    """torch's own, on the true classes; z_loss on its side."""
    logits = logits[..., :classes]
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    extra = z_loss * logits.logsumexp(-1) ** 2
    extra = extra.masked_fill(labels == options.get("ignore_index", -100), 0).flatten()
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return (loss + extra).view(labels.shape)
    count = (labels != options.get("ignore_index", -100)).sum() if reduction == "mean" else 1
    return loss + extra.sum() / count


def labels_for(options):
    ignored = options.get("ignore_index", -100)
    return LABELS if ignored == 3 else torch.where(SOME == -100, ignored, LABELS)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_torch_s(name, row):
    options = OPTIONS[name]
    like, like_labels, sizes = ROWS[row]
    on = mesh(**sizes)
    labels = labels_for(options)
    logits = placed(LOGITS, on, like)
    leaf = LOGITS.clone().requires_grad_()
    want = truth(leaf, labels, **options)
    cotangent = values(*want.shape, seed=4)
    y, (grad,), _ = pulled(
        lambda x: nn.cross_entropy(x, placed(labels, on, like_labels), **options),
        [logits],
        cotangent,
    )
    close(y, want)
    close(grad, torch.autograd.grad(want, leaf, cotangent)[0])
    assert grad.layout is logits.layout.dual


@pytest.mark.parametrize("name", OPTIONS)
def test_no_collective_carries_logits(name):
    options = OPTIONS[name]
    for row in ("1D", "3D", "classes by two"):
        like, like_labels, sizes = ROWS[row]
        on = mesh(**sizes)
        labels = placed(labels_for(options), on, like_labels)
        logits = placed(LOGITS, on, like)
        shape = (B, S) if name == "none" else ()
        _, _, plan = pulled(
            lambda x, at=labels: nn.cross_entropy(x, at, **options),
            [logits],
            values(*shape, seed=4),
        )
        assert plan.collectives
        assert max(math.prod(c.shape) for c in plan.collectives) <= B * S  # no class-sized one
        assert moves(plan, "backward") == []
        statistics = [c.reduce for c in plan.collectives if c.op == "logsumexp"]
        assert statistics == ["max", "sum"]  # once, smoothed or not


def test_cut_classes_cost_one_maximum_and_one_sum_of_the_rows():
    on = mesh(data=2, t=4)
    logits, labels = sw.shard(LOGITS, on, "b/data s v/t"), sw.shard(SOME, on, "b/data s")
    loss, plan = ran(lambda: nn.cross_entropy(logits, labels))
    rows = 2 * 3 / 4 * B * S / 2  # ring volume of [rows] over 4
    count = 2 * 1 / 2 * 1  # how many labels count, over data
    assert moves(plan, "forward") == [
        ("all_reduce", "t", rows),
        ("all_reduce", "t", rows),
        ("all_reduce", "data", count),
    ]
    assert str(loss.layout) == " {U:data,t}".strip()


@pytest.mark.parametrize("row", ["one device", "3D"])
def test_nothing_to_count_is_nan_and_its_sum_is_zero_as_in_torch(row):
    like, like_labels, sizes = ROWS[row]
    on = mesh(**sizes)
    logits = placed(LOGITS, on, like)
    labels = placed(torch.full((B, S), -100), on, like_labels)
    assert F.cross_entropy(LOGITS.flatten(0, 1), torch.full((B * S,), -100)).isnan()
    assert nn.cross_entropy(logits, labels).full_tensor().isnan()
    loss, (grad,) = sw.value_and_grad(
        lambda x: nn.cross_entropy(x[0], labels, reduction="sum", z_loss=0.1)
    )((logits,))
    assert loss.item() == 0
    assert not grad.full_tensor().any()


@pytest.mark.parametrize("row", ROWS)
def test_log_prob_is_log_softmax_at_the_labels(row):
    like, like_labels, sizes = ROWS[row]
    on = mesh(**sizes)
    leaf = LOGITS.clone().requires_grad_()
    want = leaf.log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    labels = placed(LABELS, on, like_labels)
    y, (grad,), _ = pulled(
        lambda x: nn.log_prob(x, labels), [placed(LOGITS, on, like)], values(B, S, seed=4)
    )
    close(y, want)
    close(grad, torch.autograd.grad(want, leaf, values(B, S, seed=4))[0])


def test_padding_is_never_chosen_and_gets_no_gradient():
    on = mesh(t=4)
    wild = LOGITS.clone()
    wild[..., 17:] = 1e30  # what lies in the padding does not matter
    logits, labels = sw.shard(wild, on, "b s v/t"), sw.shard(SOME, on)
    options = {"classes": 17, "label_smoothing": 0.1, "z_loss": 0.1}
    loss, grad = sw.value_and_grad(lambda x: nn.cross_entropy(x, labels, **options))(logits)
    close(loss, truth(LOGITS, SOME, **options))
    assert not grad.full_tensor()[..., 17:].any()


def test_half_precision_is_widened():
    on = mesh(t=2)
    half = LOGITS.bfloat16()
    loss = nn.cross_entropy(sw.shard(half, on, "b s v/t"), sw.shard(SOME, on))
    assert loss.dtype == torch.float32
    want = F.cross_entropy(half.float().flatten(0, 1), SOME.flatten())
    torch.testing.assert_close(loss.full_tensor(), want)


def test_bad_input_says_what_is_wrong():
    logits, labels = sw.shard(LOGITS, mesh(a=1)), sw.shard(LABELS, mesh(a=1))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        nn.cross_entropy(logits, labels, label_smoothing=2)
    with pytest.raises(ValueError, match="30 classes of logits of width 24"):
        nn.cross_entropy(logits, labels, classes=30)
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        nn.cross_entropy(logits, labels, reduction="avg")  # pyright: ignore
