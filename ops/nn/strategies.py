"""Presets: the rows of data, FSDP and 1D tensor parallelism for a transformer's roles.

The axis that is gathered at use stands last on its dim, so that one all_gather does it. `hidden` is
the residual stream, `block_in` the normed input of qkv, of up and gate, and of the head: converted
once, used by all.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from ...layouts.strategy import Precision, Strategy, Table

_EMPTY: Table = MappingProxyType({})


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
    base = data(axis)
    return Strategy({"*": f".../{axis}"}, base.compute, base.activations, options={"save": save})


def tensor_1d(axis: str = "tensor", *, kv: Literal["cut", "replicate"] = "cut") -> Strategy:
    """Megatron's tensor parallelism: heads, ffn and vocabulary cut; one all_reduce per half block.

    Args:
        axis: mesh axis.
        kv: "replicate" leaves keys and values whole, where the axis does not divide their heads.
    """
    t = axis
    parameters = {
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
        "e_up": f"expert embed ffn/{t}",
        "e_down": f"expert ffn/{t} embed",
        "router": "embed expert",
        "*": "...",
    }
    activations = {
        "tokens": "batch seq",
        "hidden": "batch seq embed",
        "block_in": f"batch seq embed {{R:{t}}}",
        "heads": f"batch seq heads/{t} head_dim",
        "ffn": f"batch seq ffn/{t}",
        "logits": f"batch seq vocab/{t}",
        "expert_in": f"expert slot embed {{R:{t}}}",
        "expert_ffn": f"expert slot ffn/{t}",
    }
    whole = kv == "replicate"
    keys = {
        "w_k": "embed kv_heads head_dim" if whole else f"embed kv_heads/{t} head_dim",
        "b_k": "kv_heads head_dim" if whole else f"kv_heads/{t} head_dim",
    }
    keys |= {"w_v": keys["w_k"], "b_v": keys["b_k"]}
    compute = {"q_norm": f"head_dim {{R:{t}}}"}
    compute |= {"k_norm": compute["q_norm"]}
    full = {**parameters, **keys, **_likewise(parameters)}
    return Strategy(
        full,
        {**full, **compute},
        {
            **activations,
            "kv": "batch seq kv_heads head_dim" if whole else f"batch seq kv_heads/{t} head_dim",
            "attended": activations["heads"],
        },
    )


def _likewise(table: Mapping[str, str]) -> dict[str, str]:
    """Roles with the rows of another role."""
    same = {"w_gate": "w_up", "b_gate": "b_up", "e_gate": "e_up", "b_down": "b_o", "head": "embed", "k_norm": "q_norm"}  # fmt: skip  # noqa: E501
    return {role: table[other] for role, other in same.items()}


def from_toml(text: str) -> Strategy:
    """A strategy from `Strategy.to_toml`.

    >>> from shardwise import strategies
    >>> s = strategies.fsdp()
    >>> strategies.from_toml(s.to_toml()) == s
    True
    """
    tables = tomllib.loads(text)
    given = dict(tables.get("strategy", {}))
    names = ("rest", "compute", "activations")
    parts = {name: given.pop(name, {}) for name in names}
    dtypes = {name: getattr(torch, dtype) for name, dtype in tables.get("precision", {}).items()}
    return Strategy(**parts, precision=Precision(**dtypes), options=given)
