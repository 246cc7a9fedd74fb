"""The families of models that have Hugging Face checkpoints: one row each.

A row says how config.json is read and written, which prefix of names may be missing, which tensors
are no parameters, and which may repeat another. Where the parameters lie is the model's own table,
`Model.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layouts.strategy import Strategy
from ..meshlib.errors import nearest
from .bert import BERTConfig, bert
from .bert import config_from as _bert_from
from .bert import config_to as _bert_to
from .config import Config
from .folder import CONFIG
from .gpt2 import GPT2Config, gpt2
from .gpt2 import config_from as _gpt2_from
from .gpt2 import config_to as _gpt2_to
from .llama import LlamaConfig, llama
from .llama import config_from as _llama_from
from .llama import config_to as _llama_to
from .model import Model
from .opt import OPTConfig, opt
from .opt import config_from as _opt_from
from .opt import config_to as _opt_to
from .palm import PaLMConfig, palm
from .palm import config_from as _palm_from
from .palm import config_to as _palm_to
from .vit import ViTConfig, vit
from .vit import config_from as _vit_from
from .vit import config_to as _vit_to


@dataclass(frozen=True)
class Family:
    """How a kind of model is read from and written to a checkpoint.

    Attributes:
        make: (config, strategy) -> Model.
        config: our config's class.
        config_from: config.json -> our config.
        config_to: our config -> config.json.
        prefix: of names, which some files leave out.
        ignored: patterns of tensors that are no parameters here: masks, cached frequencies, heads
            that the model's task has not.
        heads: of Hugging Face's classes, those whose weights are read.
        copies: pattern of a tensor that some files store, to the parameter that it must equal.
    """

    make: Callable[[Any, Strategy], Model]
    config: type[Config]
    config_from: Callable[[Mapping[str, Any]], Any]
    config_to: Callable[[Any], dict[str, Any]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()


_HEAD = {"lm_head.weight": "embed"}
_LLAMA = Family(
    llama,
    LlamaConfig,
    _llama_from,
    _llama_to,
    prefix="model.",
    ignored=("*.rotary_emb.inv_freq",),
    copies=_HEAD,
    heads=tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")),
)
FAMILIES: dict[str, Family] = {  # model_type in config.json -> its row
    "gpt2": Family(
        gpt2,
        GPT2Config,
        _gpt2_from,
        _gpt2_to,
        prefix="transformer.",
        ignored=("*.attn.bias", "*.attn.masked_bias"),
        copies=_HEAD,
        heads=("GPT2LMHeadModel", "GPT2Model"),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "opt": Family(
        opt,
        OPTConfig,
        _opt_from,
        _opt_to,
        prefix="model.",
        copies=_HEAD,
        heads=("OPTForCausalLM", "OPTModel"),
    ),
    "palm": Family(
        palm,
        PaLMConfig,
        _palm_from,
        _palm_to,
        ignored=("*.beta", "*.inv_freq"),
        copies={"[0-9]*.weight": "embed"},  # the last module of a sequence
    ),
    "bert": Family(
        bert,
        BERTConfig,
        _bert_from,
        _bert_to,
        prefix="bert.",
        ignored=("*embeddings.position_ids", "cls.*", "*pooler.*"),
        copies={
            "cls.predictions.decoder.weight": "embed",
            "cls.predictions.decoder.bias": "b_vocab",
        },
        heads=("BertForPreTraining", "BertForMaskedLM", "BertModel"),
    ),
    "vit": Family(
        vit, ViTConfig, _vit_from, _vit_to, prefix="vit.", heads=("ViTForImageClassification",)
    ),
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: an unknown one, with the nearest name.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: {CONFIG} has model_type {name!r}{nearest(str(name), list(FAMILIES))}"
        )
    return FAMILIES[name]


def family_with(config: Config) -> Family:
    """The family of one of our configs.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise ValueError(f"no family of checkpoints has the config {type(config).__name__}")


def read_config(family: Family, config: Mapping[str, Any], where: str) -> Any:
    """Our config from config.json.

    Raises:
        ValueError: what it lacks, or has of a wrong type.
    """
    try:
        return family.config_from(config)
    except KeyError as missing:
        raise ValueError(f"{where}: {CONFIG} lacks {missing}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {CONFIG} has a value of a wrong type: {error}") from None
