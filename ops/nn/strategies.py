"""Presets: the rows of data, FSDP, 1D, 2D, 2.5D and 3D tensor parallelism for a transformer.

The axis that is gathered at use stands last on its dim, so that one all_gather does it. `hidden` is
the residual stream, `block_in` the normed input of qkv, of up and gate, and of the head: converted
once, used by all.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ...layouts.precision import DTYPES, Precision
from ...layouts.rows import Frozen
from ...layouts.strategy import Strategy, Table
from ...meshlib.errors import nearest

_EMPTY: Table = Frozen()
KV = Literal["cut", "replicate"]


def rows(rest: Table, *, compute: Table = _EMPTY, activations: Table = _EMPTY) -> Strategy:
    """A strategy of one's own from its tables; compute rows default to those at rest.

    >>> from shardwise import strategies
    >>> strategies.rows({"w": "d f/tensor"}).compute_row("w")
    'd f/tensor'
    """
    return Strategy(rest, {**rest, **compute}, activations)


def data(axis: str = "data") -> Strategy:
    """Data parallelism: the batch is cut; parameters are whole, their gradients all_reduced.

    Cost per step and device: 2(n-1)/n of the gradients' bytes, backward.
    """
    _check_axes("data", axis)
    return Strategy(
        {"*": "..."},
        {"*": f"... {{R:{axis}}}"},
        {
            "*": f"batch/{axis} ...",
            "expert_in": f"expert slot/{axis} embed",
            "expert_ffn": f"expert slot/{axis} ffn",
        },
    )


def fsdp(axis: str = "data", *, save: Literal["gathered", "shard"] = "shard") -> Strategy:
    """Fully sharded data parallelism: parameters are cut at rest and gathered at use (ZeRO-3).

    Cost per step and device: (n-1)/n of the parameters' bytes each way; once more with
    save="shard", which gathers again in the backward and so holds one layer at a time.
    """
    _check_axes("fsdp", axis)
    base = data(axis)
    return Strategy({"*": f".../{axis}"}, base.compute, base.activations, options={"save": save})


def tensor_1d(axis: str = "tensor", *, kv: KV = "cut") -> Strategy:
    """Megatron's tensor parallelism: heads, ffn and vocabulary cut; one all_reduce per half block.

    Cost per layer and device, each way: 4(n-1)/n of the stream [batch seq embed].

    Args:
        axis: mesh axis.
        kv: "replicate" leaves keys and values whole, where the axis does not divide their heads.
    """
    _check_axes("tensor_1d", axis)
    t = axis
    rest = {
        "w_q": f"embed heads/{t} head_dim",
        "w_o": f"heads/{t} head_dim embed",
        "w_up": f"embed ffn/{t}",
        "w_down": f"ffn/{t} embed",
        "b_q": f"heads/{t} head_dim",
        "b_up": f"ffn/{t}",
        "b_o": "embed",
        "*norm*": "embed",
        "q_norm": "head_dim",
        "embed": f"vocab/{t} embed",
        "pos": "position embed",
        "b_vocab": f"vocab/{t}",
        "e_up": f"expert embed ffn/{t}",
        "e_down": f"expert ffn/{t} embed",
        "router": "embed expert",
    }
    activations = {
        "tokens": "batch seq",
        "images": "batch channel height width",
        "labels": "batch",
        "hidden": "batch seq embed",
        "block_in": f"batch seq embed {{R:{t}}}",
        "heads": f"batch seq heads/{t} head_dim",
        "ffn": f"batch seq ffn/{t}",
        "logits": f"batch seq vocab/{t}",
        "expert_in": f"expert slot embed {{R:{t}}}",
        "expert_ffn": f"expert slot ffn/{t}",
    }
    whole = _Whole(
        "embed kv_heads head_dim",
        f"embed kv_heads head_dim {{R:{t}}}",
        f"kv_heads head_dim {{R:{t}}}",
        f"batch seq kv_heads head_dim {{R:{t}}}",
    )
    compute = {"q_norm": f"head_dim {{R:{t}}}"}
    return _transformer(rest, compute, activations, whole, kv)


def sequence_parallel(axis: str = "tensor", *, kv: KV = "cut") -> Strategy:
    """1D with the stream between the products cut over the sequence (Megatron's).

    An all_reduce becomes a reduce_scatter and an all_gather: the same bytes, 1/n of the memory
    of norms, dropout and residuals.

    Args:
        axis: mesh axis; it must divide the sequence.
        kv: as in `tensor_1d`.
    """
    return tensor_1d(axis, kv=kv).replace(
        compute={"*norm*": f"embed {{R:{axis}}}"},
        activations={"hidden": f"batch seq/{axis} embed"},
    )


def tensor_2d(
    row: str = "row",
    col: str = "col",
    *,
    method: Literal["direct", "streamed"] = "streamed",
    kv: KV = "cut",
) -> Strategy:
    """SUMMA: weights and activations in blocks on a square of q x q devices.

    Cost per layer and device, forward: (q-1)/q^2 (7 stream + 12 embed^2); as much backward with
    method="direct", which holds the gathered operands, and twice as much with "streamed", which
    holds one panel of 1/q of them at a time.

    Args:
        row: mesh axis that cuts the batch, and the contracted dim of weights.
        col: mesh axis of the same size that cuts the features.
        method: of the matmuls: "streamed" leaves weights and block inputs where they rest.
        kv: as in `tensor_1d`.
    """
    _check_axes("tensor_2d", row, col)
    rest = {
        "w_q": f"embed/{row} heads/{col} head_dim",
        "w_o": f"heads/{row} head_dim embed/{col}",
        "w_up": f"embed/{row} ffn/{col}",
        "w_down": f"ffn/{row} embed/{col}",
        "b_q": f"heads/{col} head_dim",
        "b_up": f"ffn/{col}",
        "b_o": f"embed/{col}",
        "*norm*": f"embed/{col}",
        "q_norm": "head_dim",
        "embed": f"vocab/{col} embed/{row}",
        "pos": f"position embed/{col}",
        "b_vocab": f"vocab/{col}",
    }
    gathered = {
        "w_q": f"embed heads/{col} head_dim {{R:{row}}}",
        "w_o": f"heads head_dim embed/{col} {{R:{row}}}",
        "w_up": f"embed ffn/{col} {{R:{row}}}",
        "w_down": f"ffn embed/{col} {{R:{row}}}",
    }
    compute = {
        "b_q": f"heads/{col} head_dim {{R:{row}}}",
        "b_up": f"ffn/{col} {{R:{row}}}",
        "b_o": f"embed/{col} {{R:{row}}}",
        "*norm*": f"embed/{col} {{R:{row}}}",
        "q_norm": f"head_dim {{R:{col},{row}}}",
        "embed": f"vocab/{col} embed {{R:{row}}}",
        "pos": f"position embed/{col} {{R:{row}}}",
        "b_vocab": f"vocab/{col} {{R:{row}}}",
    }
    activations = {
        "tokens": f"batch/{row} seq",
        "images": f"batch/{row} channel height width",
        "labels": f"batch/{row}",
        "hidden": f"batch/{row} seq embed/{col}",
        "block_in": f"batch/{row} seq embed {{R:{col}}}",
        "heads": f"batch/{row} seq heads/{col} head_dim",
        "ffn": f"batch/{row} seq ffn/{col}",
        "logits": f"batch/{row} seq vocab/{col}",
    }
    if method == "direct":
        compute |= gathered
    else:
        activations["block_in"] = activations["hidden"]
    whole = _Whole(
        f"embed/{row}/{col} kv_heads head_dim",
        f"embed kv_heads head_dim {{R:{row},{col}}}",
        f"kv_heads head_dim {{R:{row},{col}}}",
        f"batch/{row} seq kv_heads head_dim {{R:{col}}}",
    )
    made = _transformer(rest, compute, activations, whole, kv)
    return replace(made, options={"matmul": method}, equal=((row, col),))


def tensor_2p5d(
    depth: str = "depth",
    row: str = "row",
    col: str = "col",
    *,
    method: Literal["direct", "streamed"] = "streamed",
    kv: KV = "cut",
) -> Strategy:
    """Tesseract: `depth` squares of SUMMA, each on its own part of the batch.

    Cost per layer and device, forward: (q-1)/q^2 (7 stream / d + 12 embed^2); backward as in 2D,
    and an all_reduce of the weights' gradients over depth.
    """
    _check_axes("tensor_2p5d", depth, row, col)
    return data(depth) * tensor_2d(row, col, method=method, kv=kv)


def tensor_3d(i: str = "i", j: str = "j", k: str = "k", *, kv: KV = "cut") -> Strategy:
    """Blocks on a cube of q x q x q devices: every operand and result is cut by all three axes.

    Cost per layer and device, each way: (q-1)/q^3 (16 stream + 12 embed^2), the least that any
    layout can move for a square product.

    Args:
        i: mesh axis that gathers weights.
        j: mesh axis that cuts features inside a block, and gathers its input.
        k: mesh axis that cuts the stream's features, and scatters a block's products.
        kv: as in `tensor_1d`.
    """
    _check_axes("tensor_3d", i, j, k)
    rest = {
        "w_q": f"embed/{k}/{i} heads/{j} head_dim",
        "w_o": f"heads/{j}/{i} head_dim embed/{k}",
        "w_up": f"embed/{k}/{i} ffn/{j}",
        "w_down": f"ffn/{j}/{i} embed/{k}",
        "b_q": f"heads/{j} head_dim",
        "b_up": f"ffn/{j}",
        "b_o": f"embed/{k}",
        "*norm*": f"embed/{k}",
        "q_norm": "head_dim",
        "embed": f"vocab/{j} embed/{k}/{i}",
        "pos": f"position embed/{k}",
        "b_vocab": f"vocab/{j}",
    }
    compute = {
        "w_q": f"embed/{k} heads/{j} head_dim {{R:{i}}}",
        "w_o": f"heads/{j} head_dim embed/{k} {{R:{i}}}",
        "w_up": f"embed/{k} ffn/{j} {{R:{i}}}",
        "w_down": f"ffn/{j} embed/{k} {{R:{i}}}",
        "b_q": f"heads/{j} head_dim {{R:{i}}}",
        "b_up": f"ffn/{j} {{R:{i}}}",
        "b_o": f"embed/{k} {{R:{i}}}",
        "*norm*": f"embed/{k} {{R:{i},{j}}}",
        "q_norm": f"head_dim {{R:{i},{j},{k}}}",
        "embed": f"vocab/{j} embed/{k} {{R:{i}}}",
        "pos": f"position embed/{k} {{R:{i},{j}}}",
        "b_vocab": f"vocab/{j} {{R:{i}}}",
    }
    activations = {
        "tokens": f"batch/{i}/{j} seq",
        "images": f"batch/{i}/{j} channel height width",
        "labels": f"batch/{i}/{j}",
        "hidden": f"batch/{i}/{j} seq embed/{k}",
        "block_in": f"batch/{i} seq embed/{k} {{R:{j}}}",
        "heads": f"batch/{i}/{k} seq heads/{j} head_dim",
        "ffn": f"batch/{i}/{k} seq ffn/{j}",
        "logits": f"batch/{i}/{k} seq vocab/{j}",
    }
    whole = _Whole(
        f"embed/{k}/{i}/{j} kv_heads head_dim",
        f"embed/{k} kv_heads head_dim {{R:{i},{j}}}",
        f"kv_heads head_dim {{R:{i},{j}}}",
        f"batch/{i}/{k} seq kv_heads head_dim {{R:{j}}}",
    )
    made = _transformer(rest, compute, activations, whole, kv)
    return replace(made, equal=((i, j, k),))


@dataclass(frozen=True)
class _Whole:
    """Rows of key and value heads that the axes do not cut: weight at rest and at use, ..."""

    rest: str
    compute: str
    bias: str
    activation: str


def _check_axes(preset: str, *axes: Any) -> None:
    """Refuse what is no name of an axis, and one axis in two places."""
    for axis in axes:
        if not isinstance(axis, str) or not axis.isidentifier():
            raise ValueError(f"{preset}: {axis!r} is no name of a mesh axis, such as 'data'")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{preset}: axes {', '.join(map(repr, axes))} must differ")


def _transformer(
    rest: Table, compute: Table, activations: Table, whole: _Whole, kv: KV
) -> Strategy:
    """A tensor preset from the rows of its table: the roles that go like others are filled in."""
    if kv not in get_args(KV):
        raise ValueError(f"strategy: kv = {kv!r}{nearest(str(kv), get_args(KV))}")
    rest = {**rest, **_likewise(rest)}
    compute = {**rest, **compute, **_likewise(compute)}
    activations = {**activations, **_likewise(activations)}
    if kv == "replicate":
        weights, biases = ("w_k", "w_v"), ("b_k", "b_v")
        rest |= dict.fromkeys(weights, whole.rest) | dict.fromkeys(biases, "kv_heads head_dim")
        compute |= dict.fromkeys(weights, whole.compute) | dict.fromkeys(biases, whole.bias)
        activations["kv"] = whole.activation
    return Strategy({**rest, "*": "..."}, {**compute, "*": "..."}, activations)


# role -> the role whose row it has, and a dim's name there and here
_LIKE: dict[str, tuple[str, str, str]] = {
    "w_k": ("w_q", "heads", "kv_heads"),
    "w_v": ("w_q", "heads", "kv_heads"),
    "b_k": ("b_q", "heads", "kv_heads"),
    "b_v": ("b_q", "heads", "kv_heads"),
    "kv": ("heads", "heads", "kv_heads"),
    "attended": ("heads", "", ""),
    "w_gate": ("w_up", "", ""),
    "b_gate": ("b_up", "", ""),
    "e_gate": ("e_up", "", ""),
    "b_down": ("b_o", "", ""),
    "head": ("embed", "", ""),
    "k_norm": ("q_norm", "", ""),
    "w_mix": ("w_up", "ffn", "mixed"),  # embed -> mixed outside the blocks (BERT's transform)
    "b_mix": ("b_up", "ffn", "mixed"),
    "types": ("pos", "position", "types"),
    "w_patch": ("pos", "position", "pixel"),
    "b_patch": ("*norm*", "", ""),
    "cls": ("*norm*", "", ""),
}


def _likewise(table: Table) -> dict[str, str]:
    """The rows that other roles share with those of the table."""
    return {
        role: table[other].replace(there, here) if there else table[other]
        for role, (other, there, here) in _LIKE.items()
        if other in table
    }


def from_toml(text: str) -> Strategy:
    """A strategy from `Strategy.to_toml`.

    Raises:
        ValueError: no TOML; an unknown table, key, option or dtype; a value of a wrong type.

    >>> from shardwise import strategies
    >>> s = strategies.fsdp()
    >>> strategies.from_toml(s.to_toml()) == s
    True
    """
    tables = tomllib.loads(text)
    for name, table in tables.items():
        if name not in ("strategy", "precision"):
            raise ValueError(f"unknown table {name!r}{nearest(name, ('strategy', 'precision'))}")
        if not isinstance(table, dict):
            raise ValueError(f"{name} = {table!r}; expected the table [{name}]")
    given: dict[str, Any] = dict(tables.get("strategy", {}))
    parts = {name: given.pop(name, {}) for name in ("rest", "compute", "activations")}
    equal = given.pop("equal", [])
    if isinstance(equal, list):  # TOML has no tuples
        equal = tuple(tuple(axes) if isinstance(axes, list) else axes for axes in equal)
    dtypes: dict[str, Any] = {}
    for name, dtype in tables.get("precision", {}).items():
        if name == "fp8" and isinstance(dtype, bool):
            dtypes[name] = dtype
            continue
        if name == "fp8":
            raise ValueError(f"precision: fp8 = {dtype!r}; expected true or false")
        if name not in vars(Precision()):
            raise ValueError(f"precision: unknown key {name!r}{nearest(name, vars(Precision()))}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"precision: {name} = {dtype!r}{nearest(str(dtype), DTYPES)}")
        dtypes[name] = DTYPES[dtype]
    try:
        return Strategy(**parts, precision=Precision(**dtypes), options=given, equal=equal)
    except TypeError as error:
        raise ValueError(str(error)) from None
