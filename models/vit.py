"""ViT: an encoder of pre-norm blocks over the patches of an image, and a classifier.

The sequence is a learned token, CLS, and one token per patch, row by row of the image; the class is
read off the CLS. 224 x 224 pixels in patches of 16 make 197 tokens, an odd number: a strategy that
cuts the sequence is refused before anything runs, unless its axes divide it.

Reference: Dosovitskiy et al. 2020 (arXiv 2010.11929).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ..layouts.layout import Layout, make
from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh
from ..ops import nn, random
from ..ops.nn.patches import patch_embedding
from ..ops.random import Key
from .config import EqualHeads
from .model import Model, expect
from .names import Source
from .transformer import Params, Place, attend, first_token, mlp, project, run_blocks


@dataclass(frozen=True)
class ViTConfig(EqualHeads):
    """Sizes of a ViT; `ffn` 0 means four times `embed`.

    Attributes:
        layer: number of blocks.
        embed: width of the stream.
        heads: of attention.
        image: edge of an image in pixels.
        patch: edge of a patch in pixels.
        channel: colours of a pixel.
        classes: of the classifier.
        ffn: inner width of the MLP.
        dropout: of embeddings, attention's output and the MLP's output.
        eps: of the norms.
        qkv_bias: whether queries, keys and values have one.
    """

    layer: int = 12
    embed: int = 768
    heads: int = 12
    image: int = 224
    patch: int = 16
    channel: int = 3
    classes: int = 1000
    ffn: int = 0
    dropout: float = 0.0
    eps: float = 1e-12
    qkv_bias: bool = True

    DERIVED = (*EqualHeads.DERIVED, "pixel", "position")
    PADDED = ("heads", "kv_heads", "ffn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image % self.patch:
            raise ValueError(f"image {self.image} is not a multiple of patch {self.patch}")

    @property
    def pixel(self) -> int:
        """Numbers in one patch."""
        return self.channel * self.patch**2

    @property
    def position(self) -> int:
        """Length of the sequence: CLS and the patches."""
        return (self.image // self.patch) ** 2 + 1


PRESETS: dict[str, dict[str, int]] = {
    "vit-b16": {"layer": 12, "embed": 768, "heads": 12, "patch": 16},
    "vit-l16": {"layer": 24, "embed": 1024, "heads": 16, "patch": 16},
    "vit-h14": {"layer": 32, "embed": 1280, "heads": 16, "patch": 14},
}


def declare(config: ViTConfig) -> dict[str, Any]:
    """The parameters of a ViT."""
    weight, zero, one = nn.normal(0.02), nn.constant(0.0), nn.constant(1.0)
    biases = {
        "b_q": nn.Param("heads head_dim", zero),
        "b_k": nn.Param("kv_heads head_dim", zero),
        "b_v": nn.Param("kv_heads head_dim", zero),
    }
    block = {
        "attn_norm": nn.Param("embed", one),
        "attn_norm_bias": nn.Param("embed", zero),
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        **(biases if config.qkv_bias else {}),
        "w_o": nn.Param("heads head_dim -> embed", weight),
        "b_o": nn.Param("embed", zero),
        "mlp_norm": nn.Param("embed", one),
        "mlp_norm_bias": nn.Param("embed", zero),
        "w_up": nn.Param("embed -> ffn", weight),
        "b_up": nn.Param("ffn", zero),
        "w_down": nn.Param("ffn -> embed", weight),
        "b_down": nn.Param("embed", zero),
    }
    return {
        "cls": nn.Param("embed", weight),
        "pos": nn.Param("position embed", weight),
        "w_patch": nn.Param("pixel -> embed", weight),
        "b_patch": nn.Param("embed", zero),
        "blocks": nn.stack(block),
        "final_norm": nn.Param("embed", one),
        "final_norm_bias": nn.Param("embed", zero),
        "w_class": nn.Param("embed -> classes", weight),
        "b_class": nn.Param("classes", zero),
    }


def _names() -> dict[str, Source]:
    """Where each parameter lies on disk; weights are [out, in], that of patches a convolution's."""
    layer = "vit.encoder.layer.{layer}"

    def pair(roles: tuple[str, str], name: str, weight: str, bias: str) -> dict[str, Source]:
        kinds = zip(roles, ("weight", "bias"), (weight, bias), strict=True)
        return {role: Source(f"{name}.{kind}", dims) for role, kind, dims in kinds}

    def norm(role: str, name: str) -> dict[str, Source]:
        return pair((role, f"{role}_bias"), name, "embed", "embed")

    output, heads = f"{layer}.attention.output.dense", "embed (heads head_dim)"
    block = {
        **norm("attn_norm", f"{layer}.layernorm_before"),
        **pair(("w_o", "b_o"), output, heads, "embed"),
        **norm("mlp_norm", f"{layer}.layernorm_after"),
        **pair(("w_up", "b_up"), f"{layer}.intermediate.dense", "ffn embed", "ffn"),
        **pair(("w_down", "b_down"), f"{layer}.output.dense", "embed ffn", "embed"),
    }
    for word, kind in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
        roles, dims = (f"w_{word[0]}", f"b_{word[0]}"), f"({kind} head_dim)"
        block |= pair(roles, f"{layer}.attention.attention.{word}", f"{dims} embed", dims)
    patches = "vit.embeddings.patch_embeddings.projection"
    return {
        "cls": Source("vit.embeddings.cls_token", "embed", shape="1 1 embed"),
        "pos": Source(
            "vit.embeddings.position_embeddings", "position embed", shape="1 position embed"
        ),
        "w_patch": Source(f"{patches}.weight", "embed pixel", shape="embed channel patch patch"),
        "b_patch": Source(f"{patches}.bias", "embed"),
        **{f"blocks.{role}": source for role, source in block.items()},
        **norm("final_norm", "vit.layernorm"),
        **pair(("w_class", "b_class"), "classifier", "classes embed", "classes"),
    }


NAMES = _names()


def vit(config: ViTConfig, strategy: Strategy) -> Model:
    """A ViT under a strategy.

    `apply(params, images, *, key=None)` takes [batch channel height width] and gives the logits
    [batch classes]; `loss(params, batch, *, key=None)` takes images and labels [batch] by name and
    gives the mean over the global batch.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> config = models.ViTConfig(layer=2, embed=8, heads=2, image=8, patch=4, classes=5)
    >>> model = models.vit(config, s)
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> images = sw.shard(torch.zeros(2, 3, 8, 8), mesh, s["images"])
    >>> model.apply(params, images)
    f32[2/data 5] local[1 5] on mesh(data=2, tensor=2)
    """
    s = expect("vit", config, ViTConfig, strategy)

    def norm(p: Params, role: str, x: ShardedTensor) -> ShardedTensor:
        return nn.layer_norm(x, p[role], p[f"{role}_bias"], eps=config.eps)

    def embed(params: Params, images: ShardedTensor) -> ShardedTensor:
        p = s.use({role: params[role] for role in ("cls", "pos", "w_patch", "b_patch")})
        stream = Layout(s["hidden"], 3)
        uncut = make((stream.dims[0], (), stream.dims[2]))  # patches alone do not fit the cuts
        x = patch_embedding(images, p["w_patch"], p["b_patch"], patch=config.patch, out=uncut)
        pad: Any = F.pad
        first = pad(p["cls"][None], (0, 0, 0, config.position - 1))  # CLS is row 0 of the sequence
        return reshard(pad(x, (0, 0, 1, 0)) + (p["pos"] + first), s["hidden"])

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        drop = place.key is not None and config.dropout > 0
        keys: Any = random.split(place.key, 2) if drop else (None, None)  # pyright: ignore
        h = reshard(norm(p, "attn_norm", x), s["block_in"])
        y = project(p, attend(p, h, s, place, causal=False), s)
        x = x + nn.dropout(y, config.dropout, keys[0])
        h = reshard(norm(p, "mlp_norm", x), s["block_in"])
        return x + nn.dropout(mlp(p, h, s, F.gelu), config.dropout, keys[1])

    def apply(params: Params, images: ShardedTensor, *, key: Key | None = None) -> ShardedTensor:
        _check(config, s, images.shape, images.mesh)
        own = random.fold_in(key, "embed") if key is not None else None
        x = nn.dropout(embed(params, images), config.dropout, own)
        x = run_blocks(block, x, params["blocks"], s, Place(None, key))
        p = s.use({role: value for role, value in params.items() if role in _LAST})
        token = first_token(norm(p, "final_norm", x), s)
        return nn.dense(token, p["w_class"], p["b_class"])

    def loss(params: Params, batch: Mapping[str, Any], *, key: Key | None = None) -> Any:
        return nn.cross_entropy(apply(params, batch["images"], key=key), batch["labels"])

    declaration = declare(config)
    held = {*declaration, *(f"blocks.{role}" for role in declaration["blocks"])}
    names = {path: source for path, source in NAMES.items() if path in held}
    return Model(config, s, declaration, apply, loss, names)


_LAST = ("final_norm", "final_norm_bias", "w_class", "b_class")


def _check(config: ViTConfig, s: Strategy, shape: Any, mesh: Mesh) -> None:
    """Refuse other images, and a sequence that the strategy's axes do not divide."""
    if tuple(shape[1:]) != (config.channel, config.image, config.image):
        edge = config.image
        raise ValueError(
            f"vit: images {tuple(shape)}; expected [batch {config.channel} {edge} {edge}]"
        )
    axes = Layout(s["hidden"], 3).dims[1]
    over = mesh.group_size(axes)
    if config.position % over:
        raise LayoutError(
            f"vit: axis {'/'.join(axes)!r} of size {over} cuts the sequence, but does not divide "
            f"its {config.position} tokens (CLS and {config.position - 1} patches); "
            "use a strategy whose row 'hidden' leaves seq whole, such as tensor_1d",
            kind="indivisible",
        )


# our field -> Hugging Face's key
_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "image": "image_size",
    "patch": "patch_size",
    "channel": "num_channels",
    "ffn": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
}


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> ViTConfig:
    """The config of a Hugging Face config.json.

    Raises:
        ValueError: another activation, images or patches that are not square.
    """
    if found.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"vit: hidden_act {found['hidden_act']!r}; only 'gelu' is read")
    given = {ours: found[key] for ours, key in _KEYS.items() if key in found}
    for name in ("image", "patch"):
        edges = given.get(name)
        if isinstance(edges, list | tuple):
            if len(set(edges)) != 1:
                raise ValueError(f"vit: {_KEYS[name]} {edges} is not square")
            given[name] = edges[0]
    # the classes are counted by their names; a file without any has Hugging Face's default of 2
    classes = len(found.get("id2label") or ()) or found.get("num_labels", 2)
    return ViTConfig(**given, classes=classes, pad=pad or {})


def config_to(config: ViTConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of this config.

    >>> config_from(config_to(ViTConfig(layer=2, classes=7))) == ViTConfig(layer=2, classes=7)
    True
    """
    ours = {key: getattr(config, name) for name, key in _KEYS.items()}
    labels = {str(n): f"LABEL_{n}" for n in range(config.classes)}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": "gelu",
        "id2label": labels,
        "label2id": {name: int(n) for n, name in labels.items()},
        **ours,
    }
