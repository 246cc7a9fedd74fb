"""Models against a reference in plain torch: the same weights in, the same numbers out.

Weights travel by the model's own table of checkpoint names (`Model.names`): a state dict as it lies
on disk becomes our parameters (`to_params`), and parameters or gradients become such a state dict
(`to_state`). A reference is any torch module; Hugging Face's write their names through
`save_pretrained`, since some have other names in memory.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import einops
import torch
import torch.nn.functional as F
from tiny import TINY, drawn
from torch import Tensor, nn

import shardwise as sw
from shardwise import strategies
from shardwise.models import Model
from shardwise.models.names import Source

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
State = Mapping[str, Tensor]


def redraw(module: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Every parameter drawn anew, wide enough to matter, gains near 1; no dropout. Returns it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            is_gain = p.ndim == 1 and name.endswith(("weight", "gamma"))
            drawn = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.copy_(1 + 0.2 * drawn if is_gain else std * drawn)
    return module.eval()


def state_of(module: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """Its parameters, or their gradients, by the names that they have on disk; ties once."""
    if gradients:
        shown = copy.deepcopy(module)
        with torch.no_grad():
            for mine, p in zip(shown.parameters(), module.parameters(), strict=True):
                mine.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        return state_of(shown)
    save: Any = getattr(module, "save_pretrained", None)
    if save is None:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}
    from safetensors.torch import load_file
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {
            name: value.clone()
            for file in Path(folder).glob("*.safetensors")
            for name, value in load_file(file).items()
        }


def to_params(state: State, model: Model) -> Any:
    """Our parameters, plain and padded, from a state dict as it lies on disk."""
    sizes = model.config.true_sizes

    def made(path: str, param: sw.nn.Param) -> Tensor:
        source = model.names[path]
        own = param.names[len(param.stacked) :]
        layers = range(sizes["layer"]) if param.stacked else (0,)
        each = [_ours(_find(state, source, i), source, own, sizes) for i in layers]
        value = torch.stack(each) if param.stacked else each[0]
        short = [a - b for a, b in zip(param.shape(model.config), value.shape, strict=True)]
        return F.pad(value, [n for pair in ((0, s) for s in reversed(short)) for n in pair])

    leaves = [made(path, param) for path, param in sw.tree.items(model.declaration)]
    remaining = iter(leaves)
    return sw.tree.map(lambda _: next(remaining), model.declaration)


def to_state(params: Any, model: Model) -> dict[str, Tensor]:
    """The state dict on disk of our parameters or gradients (plain tensors), padding cut off."""
    sizes = model.config.true_sizes
    pieces: dict[str, dict[int, Tensor]] = {}
    sources: dict[str, Source] = {}
    for (path, param), value in zip(
        sw.tree.items(model.declaration), sw.tree.leaves(params), strict=True
    ):
        source = model.names[path]
        own = param.names[len(param.stacked) :]
        true = value[tuple(slice(n) for n in param.shape(sizes))]
        for i, layer in enumerate(true if param.stacked else (true,)):
            name = _name(source, i)
            laid = einops.rearrange(layer, f"{_told(' '.join(own))} -> {_told(source.dims)}")
            if source.shape:
                laid = laid.reshape([sizes.get(n) or int(n) for n in source.shape.split()])
            pieces.setdefault(name, {})[source.part] = laid
            sources[name] = source
    return {
        name: torch.cat([parts[i] for i in sorted(parts)], sources[name].along)
        if len(parts) > 1
        else parts[min(parts)]
        for name, parts in pieces.items()
    }


def _ours(value: Tensor, source: Source, own: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """One layer of a tensor on disk in the order of our dims."""
    known = {name: sizes[name] for name in own if not name.isdigit()}
    if source.shape:
        value = value.reshape([known.get(n) or int(n) for n in source.dims.split()])
    pattern = f"{_told(source.dims)} -> {_told(' '.join(own))}"
    return einops.rearrange(_part(value, source, sizes), pattern, **known)


def _told(dims: str) -> str:
    """Dims with a second dim of one name told from the first: einops wants them apart."""
    words: list[str] = []
    for word in dims.replace("(", "( ").replace(")", " )").split():
        words.append(f"{word}2" if word in words and word not in "()" else word)
    return " ".join(words)


def _name(source: Source, layer: int) -> str:
    return source.name.replace("{layer}", str(layer + source.first))


def _find(state: State, source: Source, layer: int) -> Tensor:
    """By its name, or by the one name that ends so: some files have a prefix, some not."""
    name = _name(source, layer)
    if name in state:
        return state[name]
    hits = [key for key in state if key.endswith(f".{name}")]
    assert len(hits) == 1, (name, hits, list(state))
    return state[hits[0]]


def _part(value: Tensor, source: Source, sizes: Mapping[str, int]) -> Tensor:
    if not source.parts:
        return value
    lengths = []
    for product in source.parts:
        length = 1
        for dim in product.split():
            length *= sizes[dim]
        lengths.append(length)
    return value.split(lengths, source.along)[source.part]


class Ran(NamedTuple):
    """What a model gave: plain tensors; gradients by the names on disk."""

    output: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def run_reference(
    module: nn.Module, forward: Callable[[Any], Tensor], labels: Tensor, *, classes: int = 0
) -> Ran:
    """The reference's logits, mean cross-entropy and gradients.

    Args:
        module: the reference.
        forward: of the module: its logits [..., classes].
        labels: beside the logits (not shifted); -100 does not count.
        classes: first so many logits; 0 is all.
    """
    module.zero_grad()
    logits = forward(module)
    scored = logits[..., :classes] if classes else logits
    loss = F.cross_entropy(scored.flatten(0, -2), labels.flatten(), ignore_index=-100)
    loss.backward()
    return Ran(logits.detach(), loss.detach(), state_of(module, gradients=True))


def run_ours(
    model: Model, mesh: sw.Mesh, params: Any, batch: Mapping[str, Any], **known: Any
) -> Ran:
    """The model's output, loss and gradients on a mesh.

    Args:
        model: under any strategy.
        mesh: for it.
        params: plain and padded, as `to_params` gives them.
        batch: plain tensors, with the entries that `model.loss` reads; cut as the row `tokens`.
        **known: more arguments of `model.apply`, plain or not.
    """
    s = model.strategy
    placed = sw.shard(params, mesh, s.layouts(model.declaration, model.config, mesh))
    given = {name: place(value, mesh, s) for name, value in batch.items()}
    more = {
        name: place(value, mesh, s) if isinstance(value, Tensor) else value
        for name, value in known.items()
    }
    first = next(name for name in ("tokens", "images") if name in given)
    output = model.apply(placed, given[first], **more)
    loss, grads = sw.value_and_grad(model.loss)(placed, given)
    for (path, g), p in zip(sw.tree.items(grads), sw.tree.leaves(placed), strict=True):
        assert g.layout is p.layout.dual, path
    whole = sw.tree.map(lambda g: g.full_tensor(), grads)
    state = to_state(whole, model)
    again = zip(sw.tree.items(to_params(state, model)), sw.tree.leaves(whole), strict=True)
    for (path, g), given in again:
        assert torch.equal(g, given), f"{path}: padding has a gradient"
    return Ran(output.full_tensor().detach(), loss.full_tensor(), state)


def place(value: Tensor, mesh: sw.Mesh, s: sw.Strategy) -> sw.ShardedTensor:
    """A batch entry cut as the row `tokens` (or `images`, `labels`) says, by its number of dims."""
    row = {4: "images", 2: "tokens", 1: "labels"}[value.ndim]
    return sw.shard(value, mesh, s[row])


def check(ours: Ran, reference: Ran, tolerance: float, rows: Tensor | None = None) -> None:
    """Output, loss and every gradient agree.

    Args:
        ours: from `run_ours`.
        reference: from `run_reference`, or another `run_ours`.
        tolerance: as in `agree`.
        rows: bool [batch seq], which rows of the output mean something; None is all.
    """
    width = reference.output.shape[-1]
    got, wanted = ours.output[..., :width], reference.output
    if rows is not None:
        got, wanted = got[rows], wanted[rows]
    agree("output", got, wanted, tolerance)
    agree("loss", ours.loss, reference.loss, tolerance)
    for name, grad in ours.grads.items():
        hits = [n for n in reference.grads if n == name or n.endswith(f".{name}")]
        assert len(hits) == 1, (name, hits)
        agree(name, grad, reference.grads[hits[0]], tolerance)


def agree(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """They differ by at most `tolerance` of the larger of 0.1 and the largest number."""
    assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
    largest = float(wanted.abs().max())
    off = float((got.to(wanted.dtype) - wanted).abs().max())
    assert off <= tolerance * max(largest, 0.1), f"{what}: off by {off} of {largest}"


def double(s: sw.Strategy) -> sw.Strategy:
    """The strategy in float64."""
    return s.replace(precision=sw.Precision(torch.float64, torch.float64, torch.float64))


Maker = Callable[..., sw.Strategy]
SHARDED: dict[str, tuple[dict[str, int], Maker]] = {
    "data": ({"data": 3}, lambda **_: strategies.data()),
    "fsdp": ({"data": 4}, lambda **_: strategies.fsdp()),
    "tensor_1d": ({"tensor": 3}, strategies.tensor_1d),
    "sequence_parallel": ({"tensor": 4}, strategies.sequence_parallel),
    "tensor_2d": ({"row": 3, "col": 3}, partial(strategies.tensor_2d, method="direct")),
    "tensor_2d, streamed": ({"row": 2, "col": 2}, strategies.tensor_2d),
    "tensor_2p5d": (
        {"depth": 2, "row": 2, "col": 2},
        partial(strategies.tensor_2p5d, method="direct"),
    ),
    "tensor_3d": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d),
    "data * tensor_3d": (
        {"data": 2, "i": 2, "j": 2, "k": 2},
        lambda **kv: strategies.data() * strategies.tensor_3d(**kv),
    ),
    "fsdp * tensor_1d": (
        {"data": 2, "tensor": 2},
        lambda **kv: strategies.fsdp() * strategies.tensor_1d(**kv),
    ),
}
_whole: dict[str, Ran] = {}


def check_sharded(family: str, name: str, size: int = 72) -> None:
    """A tiny model under a row of SHARDED equals itself on one device, in float64 to 1e-10.

    Args:
        family: of `tiny.TINY`.
        name: of `SHARDED`.
        size: of the batch.
    """
    case = TINY[family]()
    batch = case.batch(size)
    known = {"mask": batch["mask"]} if "mask" in batch else {}

    def run(axes: Mapping[str, int], s: sw.Strategy) -> Ran:
        model = case.make(case.config, double(s))
        mesh = sw.make_mesh(axes, transport="simulated", device="cpu")
        return run_ours(model, mesh, drawn(model), batch, **known)

    key = f"{family} {size}"
    if key not in _whole:
        _whole[key] = run({"data": 1}, strategies.data())
    axes, make = SHARDED[name]
    check(run(axes, make(kv=case.kv)), _whole[key], 1e-10)
