"""Llama 1, 2, 3 and its kin: RMS norms, grouped queries, rotary positions and a gated MLP.

Mistral, Qwen2 (biases of q, k, v), Qwen3 (normed q and k) and SmolLM2 are the same block with other
switches.

Reference: Touvron et al. 2023 (arXiv 2302.13971); Grattafiori et al. 2024 (arXiv 2407.21783).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.errors import nearest
from ..ops import nn
from ..ops.nn.rope import frequencies
from .config import Config
from .model import Model, expect
from .names import Source
from .transformer import Params, Place, attend, causal_model, gated_mlp, project


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Sizes and switches of a Llama; `kv_heads` 0 means `heads`, `head_dim` 0 embed / heads.

    Attributes:
        layer: blocks.
        embed: width of the stream.
        heads: of queries.
        kv_heads: of keys and values; each serves heads / kv_heads query heads.
        head_dim: width of a head.
        ffn: width inside the MLP.
        vocab: tokens.
        position: longest sequence that it was trained on.
        theta: base of the rotary wavelengths.
        scaling: of the rotary waves, as `nn.rope` takes it; None is none.
        window: a query sees only so many last tokens; None sees all.
        eps: of norms.
        tied: the head is the table of tokens.
        qkv_bias: biases of queries, keys and values.
        out_bias: a bias of attention's result.
        mlp_bias: biases of the MLP.
        qk_norm: queries and keys are normed, head by head.
    """

    layer: int = 32
    embed: int = 4096
    heads: int = 32
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 11008
    vocab: int = 32000
    position: int = 2048
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None
    window: int | None = None
    eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    DERIVED = ()

    def __post_init__(self) -> None:
        self.check_types()
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.embed % self.heads:
                raise ValueError(f"embed {self.embed} is not a multiple of heads {self.heads}")
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        frequencies(self.head_dim, self.theta, self.waves)  # refuses what rope cannot turn

    @property
    def waves(self) -> Mapping[str, Any]:
        """`scaling`, with the trained length where it does not say one itself."""
        return {"max_position_embeddings": self.position, **(self.scaling or {})}


def declare(config: LlamaConfig) -> dict[str, Any]:
    """The parameters of a Llama."""
    weight, zero, one = nn.normal(0.02), nn.constant(0.0), nn.constant(1.0)
    block = {
        "attn_norm": nn.Param("embed", one),
        "w_q": nn.Param("embed -> heads head_dim", weight),
        "w_k": nn.Param("embed -> kv_heads head_dim", weight),
        "w_v": nn.Param("embed -> kv_heads head_dim", weight),
        "w_o": nn.Param("heads head_dim -> embed", weight),
        "mlp_norm": nn.Param("embed", one),
        "w_gate": nn.Param("embed -> ffn", weight),
        "w_up": nn.Param("embed -> ffn", weight),
        "w_down": nn.Param("ffn -> embed", weight),
    }
    if config.qkv_bias:
        block["b_q"] = nn.Param("heads head_dim", zero)
        block["b_k"] = nn.Param("kv_heads head_dim", zero)
        block["b_v"] = nn.Param("kv_heads head_dim", zero)
    if config.out_bias:
        block["b_o"] = nn.Param("embed", zero)
    if config.mlp_bias:
        block["b_gate"] = nn.Param("ffn", zero)
        block["b_up"] = nn.Param("ffn", zero)
        block["b_down"] = nn.Param("embed", zero)
    if config.qk_norm:
        block["q_norm"] = nn.Param("head_dim", one)
        block["k_norm"] = nn.Param("head_dim", one)
    declared = {
        "embed": nn.Param("vocab embed", weight),
        "blocks": nn.stack(block),
        "final_norm": nn.Param("embed", one),
    }
    return declared if config.tied else {**declared, "head": nn.Param("vocab embed", weight)}


_BLOCK = {
    "attn_norm": ("input_layernorm.weight", "embed"),
    "w_q": ("self_attn.q_proj.weight", "(heads head_dim) embed"),
    "b_q": ("self_attn.q_proj.bias", "(heads head_dim)"),
    "q_norm": ("self_attn.q_norm.weight", "head_dim"),
    "w_k": ("self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    "b_k": ("self_attn.k_proj.bias", "(kv_heads head_dim)"),
    "k_norm": ("self_attn.k_norm.weight", "head_dim"),
    "w_v": ("self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    "b_v": ("self_attn.v_proj.bias", "(kv_heads head_dim)"),
    "w_o": ("self_attn.o_proj.weight", "embed (heads head_dim)"),
    "b_o": ("self_attn.o_proj.bias", "embed"),
    "mlp_norm": ("post_attention_layernorm.weight", "embed"),
    "w_gate": ("mlp.gate_proj.weight", "ffn embed"),
    "b_gate": ("mlp.gate_proj.bias", "ffn"),
    "w_up": ("mlp.up_proj.weight", "ffn embed"),
    "b_up": ("mlp.up_proj.bias", "ffn"),
    "w_down": ("mlp.down_proj.weight", "embed ffn"),
    "b_down": ("mlp.down_proj.bias", "embed"),
}
NAMES = {
    "embed": Source("model.embed_tokens.weight", "vocab embed"),
    **{
        f"blocks.{role}": Source(f"model.layers.{{layer}}.{name}", dims)
        for role, (name, dims) in _BLOCK.items()
    },
    "final_norm": Source("model.norm.weight", "embed"),
    "head": Source("lm_head.weight", "vocab embed"),
}


def llama(config: LlamaConfig, strategy: Strategy) -> Model:
    """A Llama under a strategy.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> s = strategies.tensor_1d()
    >>> config = models.LlamaConfig(layer=2, embed=8, heads=4, kv_heads=2, ffn=16, vocab=16)
    >>> model = models.llama(config, s)
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> params = model.init(sw.random.key(0), mesh)
    >>> params["blocks"]["w_k"]
    f32[2 8 2/tensor 2] local[2 8 1 2] on mesh(tensor=2)
    >>> tokens = sw.shard(torch.zeros(2, 4, dtype=torch.int64), mesh, s["tokens"])
    >>> model.apply(params, tokens)
    f32[2 4 16/tensor] local[2 4 8] on mesh(tensor=2)
    """
    s = expect("llama", config, LlamaConfig, strategy)
    is_dynamic = config.waves.get("rope_type", config.waves.get("type")) == "dynamic"

    def norm(x: ShardedTensor, gain: ShardedTensor) -> ShardedTensor:
        return nn.rms_norm(x, gain, eps=config.eps)

    def embed(params: Params, tokens: ShardedTensor, positions: Any) -> ShardedTensor:
        return nn.embedding(tokens, s.use({"embed": params["embed"]})["embed"], out=s["hidden"])

    def block(p: Params, x: ShardedTensor, place: Place) -> ShardedTensor:
        def rotate(q: ShardedTensor, k: ShardedTensor) -> tuple[ShardedTensor, ShardedTensor]:
            if config.qk_norm:
                q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
            options: Any = {"theta": config.theta, "scaling": config.waves}
            if is_dynamic and isinstance(place.positions, Tensor):
                options["length"] = int(place.positions.max()) + 1
            return tuple(nn.rope(x, place.positions, **options) for x in (q, k))  # pyright: ignore

        h = reshard(norm(x, p["attn_norm"]), s["block_in"])
        x = x + project(
            p, attend(p, h, s, place, rotate=rotate, config=config, window=config.window), s
        )
        h = reshard(norm(x, p["mlp_norm"]), s["block_in"])
        return x + gated_mlp(p, h, s, F.silu)

    def last(params: Params, x: ShardedTensor) -> ShardedTensor:
        return norm(x, s.use({"final_norm": params["final_norm"]})["final_norm"])

    return causal_model(
        config, s, declare(config), embed=embed, block=block, last=last, names=NAMES
    )


# our field -> Hugging Face's key; the first five must be there
_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "position": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "theta": "rope_theta",
}
# model_type -> what its class assumes of keys that are not there
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SHARED = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_ACTIVATIONS = ("silu", "swish")  # two names of one function


def config_from(found: Mapping[str, Any], *, pad: Mapping[str, int] | None = None) -> LlamaConfig:
    """The config of a Hugging Face config.json of type llama, mistral, qwen2 or qwen3.

    Dropout and keys that change no result are ignored.

    Raises:
        KeyError: a size is missing.
        ValueError: another type, activation or kind of rotary positions; windows in some layers
            only; quantized weights.
    """
    kind = found.get("model_type", "llama")
    if kind not in _DEFAULTS:
        raise ValueError(f"llama: model_type {kind!r} is unknown{nearest(kind, list(_DEFAULTS))}")
    _refuse(found, kind)
    waves = dict(_waves(found))
    known = {**_SHARED, **_DEFAULTS[kind], **found}
    known["rope_theta"] = waves.pop("rope_theta", known["rope_theta"])
    required = list(_KEYS.values())[:5]
    given = {name: known[key] for name, key in _KEYS.items() if key in known or key in required}
    for name in ("kv_heads", "head_dim"):  # null there, 0 here: as many as heads, embed / heads
        given[name] = given.get(name) or 0
    is_plain = waves.get("rope_type", waves.get("type", "default")) == "default"
    biased = bool(found.get("attention_bias"))
    return LlamaConfig(
        **{**given, "theta": float(given["theta"])},
        scaling=None if is_plain else waves,
        window=known.get("sliding_window") if kind == "mistral" else None,
        qkv_bias=biased or kind == "qwen2",
        out_bias=biased and kind != "qwen2",
        mlp_bias=bool(found.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        pad=pad or {},
    )


def _waves(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file says of rotary waves; the older key wins, as in Hugging Face's classes."""
    return found.get("rope_scaling") or found.get("rope_parameters") or {}


def _refuse(found: Mapping[str, Any], kind: str) -> None:
    """Raise where the file asks for what is not here."""
    waves = _waves(found)
    layers = set(found.get("layer_types") or ())
    partly = waves.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    problems = {
        f"hidden_act = {found.get('hidden_act')!r}; only 'silu' is read": found.get(
            "hidden_act", "silu"
        )
        not in _ACTIVATIONS,
        "quantization_config; dequantize the weights first": found.get("quantization_config")
        is not None,
        f"partial_rotary_factor = {partly}; only whole heads turn": partly not in (None, 1, 1.0),
        "windows in some layers (use_sliding_window, layer_types)": kind.startswith("qwen")
        and (bool(found.get("use_sliding_window")) or "sliding_attention" in layers),
        "attention_bias or mlp_bias, which its class has not": kind in ("mistral", "qwen2")
        and bool(found.get("attention_bias") or found.get("mlp_bias")),
    }
    for text, applies in problems.items():
        if applies:
            raise ValueError(f"llama: config.json has {text}")


def config_to(config: LlamaConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of this config, in the keys that all versions read.

    Raises:
        ValueError: switches that no Hugging Face class has together.

    >>> config_from(config_to(PRESETS["llama-3.2-1b"])) == PRESETS["llama-3.2-1b"]
    True
    """
    kind = _kind(config)
    biases = {} if kind in ("mistral", "qwen2") else {"attention_bias": config.out_bias}
    return {
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        "hidden_act": _ACTIVATIONS[0],
        "rope_scaling": None if config.scaling is None else dict(config.scaling),
        **biases,
        **({"mlp_bias": config.mlp_bias} if kind == "llama" else {}),
        **({"sliding_window": config.window} if kind == "mistral" else {}),
        **({"use_sliding_window": False} if kind.startswith("qwen") else {}),
    }


def _kind(config: LlamaConfig) -> str:
    """The model_type whose class computes what the config says."""
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    none, asked = (False, False, False), (biases, config.qk_norm, config.window is not None)
    kinds = {
        (none, False, False): "llama",
        ((False, False, True), False, False): "llama",
        ((True, True, False), False, False): "llama",
        ((True, True, True), False, False): "llama",
        (none, False, True): "mistral",
        ((True, False, False), False, False): "qwen2",
        (none, True, False): "qwen3",
        ((True, True, False), True, False): "qwen3",
    }
    if asked not in kinds:
        raise ValueError(
            "llama: no Hugging Face class has these switches together: "
            f"qkv_bias {config.qkv_bias}, out_bias {config.out_bias}, mlp_bias {config.mlp_bias}, "
            f"qk_norm {config.qk_norm}, window {config.window}"
        )
    return kinds[asked]


_WAVES3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_V3: dict[str, Any] = {"vocab": 128256, "theta": 5e5}


def _sized(embed: int, ffn: int, layer: int, heads: int, kv_heads: int, **more: Any) -> LlamaConfig:
    sizes = {"embed": embed, "ffn": ffn, "layer": layer, "heads": heads, "kv_heads": kv_heads}
    return LlamaConfig(**sizes, **more)


PRESETS = {
    "llama-7b": _sized(4096, 11008, 32, 32, 32, eps=1e-6),
    "llama-13b": _sized(5120, 13824, 40, 40, 40, eps=1e-6),
    "llama-33b": _sized(6656, 17920, 60, 52, 52, eps=1e-6),
    "llama-65b": _sized(8192, 22016, 80, 64, 64, eps=1e-6),
    "llama-2-7b": _sized(4096, 11008, 32, 32, 32, position=4096),
    "llama-2-13b": _sized(5120, 13824, 40, 40, 40, position=4096),
    "llama-2-70b": _sized(8192, 28672, 80, 64, 8, position=4096),
    "llama-3-8b": _sized(4096, 14336, 32, 32, 8, position=8192, **_V3),
    "llama-3-70b": _sized(8192, 28672, 80, 64, 8, position=8192, **_V3),
    "llama-3.1-8b": _sized(4096, 14336, 32, 32, 8, position=131072, scaling=_WAVES3, **_V3),
    "llama-3.2-1b": _sized(
        2048, 8192, 16, 32, 8,
        position=131072, scaling={**_WAVES3, "factor": 32.0}, tied=True, **_V3,
    ),
    "smollm2-135m": _sized(
        576, 1536, 30, 9, 3, vocab=49152, position=8192, theta=1e5, tied=True
    ),
}  # fmt: skip
