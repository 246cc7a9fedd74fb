"""Checkpoints in Hugging Face's format: onto any mesh and back, bit by bit."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import redraw
from processes import launch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardwise as sw
from shardwise import models, strategies
from shardwise.models.folder import Folder

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
}
BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 24,
    "max_position_embeddings": 8,
}
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 24,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 24,
    "max_position_embeddings": 30,
    "word_embed_proj_dim": 16,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 6,
}
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> class, config, arguments
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "opt post": (
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "bert": ("BertForPreTraining", "BertConfig", BERT),
    "bert masked": ("BertForMaskedLM", "BertConfig", BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}
MESHES: dict[str, tuple[dict[str, int], sw.Strategy]] = {
    "1d": ({"data": 2, "tensor": 2}, strategies.data() * strategies.tensor_1d()),
    "fsdp": ({"data": 4}, strategies.fsdp()),
    "3d": ({"i": 2, "j": 2, "k": 2}, strategies.tensor_3d()),
}


def reference(name: str, **changes: Any) -> Any:
    """A random model of transformers."""
    import transformers

    model, config, arguments = REFERENCES[name]
    made = getattr(transformers, config)(**{**arguments, **changes})
    return redraw(getattr(transformers, model)(made))


def written(module: Any, path: Path, **options: Any) -> Path:
    """Its folder, as transformers writes it."""
    module.save_pretrained(path, **options)
    return path


def reread(module: Any, path: Path) -> Any:
    """A model of the same class from a folder."""
    return type(module).from_pretrained(path).eval()


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    return {
        name: value
        for file in path.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        bits = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a[name], b[name]))
        assert torch.equal(*bits), name


def output(module: Any, given: Tensor) -> Tensor:
    """A reference's logits."""
    with torch.no_grad():
        found = module(given)
    return found["prediction_logits" if "prediction_logits" in found else "logits"]


def inputs(name: str) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    if name == "vit":
        return torch.randn(4, 3, 8, 8, generator=rng)
    return torch.randint(23, (4, 8), generator=rng)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Name to a random model and its folder; made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def find(name: str) -> tuple[Any, Path]:
        if name not in made:
            module = reference(name)
            made[name] = module, written(module, tmp_path_factory.mktemp("hf") / name)
        return made[name]

    return find


Find = Callable[[str], tuple[Any, Path]]


@pytest.mark.parametrize("on", MESHES)
@pytest.mark.parametrize("name", REFERENCES)
def test_loads_computes_and_saves_what_transformers_does(
    name: str, on: str, folders: Find, tmp_path: Path
) -> None:
    module, path = folders(name)
    axes, strategy = MESHES[on]
    mesh = sw.make_mesh(axes)
    model, params = models.load(path, mesh, strategy)
    layouts = strategy.layouts(model.declaration, model.config, mesh)
    for (where, p), layout in zip(sw.tree.items(params), sw.tree.leaves(layouts), strict=True):
        assert p.layout is layout, where
    given = inputs(name)
    row = "images" if name == "vit" else "tokens"
    ours = model.apply(params, sw.shard(given, mesh, strategy[row])).full_tensor()
    wanted = output(module, given)
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()

    models.save(tmp_path / "out", model, params)
    same_bits(tensors(tmp_path / "out"), tensors(path))
    again = reread(module, tmp_path / "out")
    assert torch.equal(output(again, given), wanted)
    known = json.loads((tmp_path / "out" / "config.json").read_text())
    assert known["model_type"] == module.config.model_type
    assert models.load(tmp_path / "out", mesh, strategy)[0].config == model.config


@pytest.mark.parametrize(
    ("name", "pad", "changes", "strategy"),
    [
        ("llama", {"vocab": 4, "kv_heads": 4}, {}, strategies.tensor_1d()),
        ("llama", {"vocab": 4}, {}, strategies.tensor_1d(kv="replicate")),
        (
            "llama",
            {"vocab": 8, "heads": 4, "ffn": 4},
            {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1,
             "intermediate_size": 27},
            strategies.tensor_1d(kv="replicate"),
        ),
        ("gpt2", {"vocab": 4, "heads": 4}, {"n_head": 2}, strategies.tensor_1d()),
        ("opt", {"vocab": 4, "heads": 4}, {"num_attention_heads": 2}, strategies.tensor_1d()),
    ],
)  # fmt: skip
def test_padding_changes_nothing_and_is_cut_off(
    name: str, pad: dict[str, int], changes: dict[str, Any], strategy: sw.Strategy, tmp_path: Path
) -> None:
    module = reference(name, **changes, vocab_size=23)
    path = written(module, tmp_path / "in")
    mesh = sw.make_mesh({"tensor": 4})
    model, params = models.load(path, mesh, strategy, pad=pad)
    assert model.config.sizes["vocab"] == 24
    embed = params["embed"].full_tensor()
    assert embed.shape[0] == 24
    assert not embed[23].any()
    given = inputs(name)
    ours = model.apply(params, sw.shard(given, mesh, strategy["tokens"])).full_tensor()[..., :23]
    wanted = output(module, given)
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()
    models.save(tmp_path / "out", model, params)
    same_bits(tensors(tmp_path / "out"), tensors(path))


@pytest.mark.parametrize(
    ("axes", "strategy"),
    [
        ({"data": 4}, strategies.fsdp()),  # biases [3 heads, head_dim 4/data]: inside the heads
        ({"pipe": 2, "tensor": 3}, strategies.tensor_1d("tensor").replace(layer="pipe")),
    ],
)
def test_cuts_inside_heads_and_of_layers(
    axes: dict[str, int], strategy: sw.Strategy, tmp_path: Path
) -> None:
    module = reference("gpt2", n_embd=12, n_head=3)
    path = written(module, tmp_path / "in")
    mesh = sw.make_mesh(axes)
    model, params = models.load(path, mesh, strategy)
    _, whole = models.load(path, sw.make_mesh({"data": 1}), strategies.data())
    cut = params["blocks"]["b_q"].layout.dims
    assert cut == (((), (), ("data",)) if "data" in axes else (("pipe",), ("tensor",), ()))
    for (where, a), b in zip(sw.tree.items(params), sw.tree.leaves(whole), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()), where
    models.save(tmp_path / "out", model, params)
    same_bits(tensors(tmp_path / "out"), tensors(path))


def test_parameters_of_another_model_are_refused(tmp_path: Path, folders: Find) -> None:
    model, params = load(folders("gpt2")[1])
    with pytest.raises(ValueError, match="not this model's: pos"):
        models.save(tmp_path / "out", model, {k: v for k, v in params.items() if k != "pos"})
    with pytest.raises(ValueError, match=r"embed has shape \(32, 16\), not \(24, 16\)"):
        models.save(tmp_path / "out", model, {**params, "embed": params["pos"]})


def test_many_files_and_an_index(tmp_path: Path) -> None:
    module = reference("llama")
    path = written(module, tmp_path / "in", max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    axes, strategy = MESHES["fsdp"]
    model, params = models.load(path, sw.make_mesh(axes), strategy)
    models.save(tmp_path / "out", model, params, file_bytes=8000)
    same_bits(tensors(tmp_path / "out"), tensors(path))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 10000 for name in files)
    assert index["metadata"]["total_size"] == sum(
        v.numel() * v.element_size() for v in tensors(path).values()
    )
    assert torch.equal(
        output(reread(module, tmp_path / "out"), inputs("llama")), output(module, inputs("llama"))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_or_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    module = reference("gpt2").to(dtype)
    path = written(module, tmp_path / "in")
    axes, strategy = MESHES["1d"]
    mesh = sw.make_mesh(axes)
    model, params = models.load(path, mesh, strategy)
    assert {p.dtype for p in sw.tree.leaves(params)} == {dtype}
    models.save(tmp_path / "out", model, params)
    same_bits(tensors(tmp_path / "out"), tensors(path))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    _, wide = models.load(path, mesh, strategy, dtype=torch.float32)
    for a, b in zip(sw.tree.leaves(params), sw.tree.leaves(wide), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.full_tensor().float(), b.full_tensor())


def respelled(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the folder's tensors under other names."""
    held = {name: value.clone() for name, value in load_file(path / "model.safetensors").items()}
    save_file(change(held), path / "model.safetensors", {"format": "pt"})


def test_old_and_bare_names_are_read_and_written_back(tmp_path: Path) -> None:
    axes, strategy = MESHES["1d"]
    mesh = sw.make_mesh(axes)
    gpt2 = written(reference("gpt2"), tmp_path / "gpt2")
    _, plain = models.load(gpt2, mesh, strategy)

    def bare(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("transformer."): v for name, v in held.items()}

    respelled(gpt2, bare)
    wanted = tensors(gpt2)
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
    copies = {"lm_head.weight": wanted["wte.weight"].clone()}
    respelled(gpt2, lambda held: {**held, **buffers, **copies})
    model, params = models.load(gpt2, mesh, strategy)
    for a, b in zip(sw.tree.leaves(plain), sw.tree.leaves(params), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
    models.save(tmp_path / "out", model, params)
    same_bits(tensors(tmp_path / "out"), wanted)

    bert = written(reference("bert"), tmp_path / "bert")

    def old(held: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        for new, former in pairs:
            held = {name.replace(new, former): v for name, v in held.items()}
        return held

    respelled(bert, old)
    assert any(name.endswith("gamma") for name in tensors(bert))
    model, params = models.load(bert, mesh, strategy)
    models.save(tmp_path / "out2", model, params)
    same_bits(tensors(tmp_path / "out2"), tensors(bert))


def test_an_untied_copy_of_the_head_is_refused(tmp_path: Path) -> None:
    path = written(reference("gpt2"), tmp_path / "in")
    respelled(path, lambda held: {**held, "lm_head.weight": held["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        models.load(path, sw.make_mesh({"data": 1}), strategies.data())


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    path = written(reference("llama"), tmp_path / "in")

    def spoil(held: dict[str, Tensor]) -> dict[str, Tensor]:
        del held["model.layers.1.mlp.up_proj.weight"], held["lm_head.weight"]
        held["model.norm.weight"] = torch.ones(17)
        return {**held, "model.layers.3.extra": torch.ones(2, 3)}

    respelled(path, spoil)
    with pytest.raises(ValueError, match="does not fit its config") as caught:
        models.load(path, sw.make_mesh({"data": 1}), strategies.data())
    assert str(caught.value).splitlines()[1:] == [
        "  missing     model.layers.1.mlp.up_proj.weight [32, 16]",
        "  mis-shaped  model.norm.weight [17], but config.json says [16]",
        "  missing     lm_head.weight [24, 16]",
        "  unexpected  model.layers.3.extra [2, 3]",
    ]


@pytest.fixture
def small(tmp_path: Path, folders: Find) -> Path:
    """A copy of a folder, to be damaged."""
    return Path(shutil.copytree(folders("gpt2")[1], tmp_path / "small"))


def load(path: Path) -> Any:
    return models.load(path, sw.make_mesh({"data": 1}), strategies.data())


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _long_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def _index(path: Path, file: str, *, extra: str = "") -> None:
    names = [*tensors(path), *([extra] if extra else [])]
    (path / "model.safetensors").rename(path / "part.safetensors")
    table = {"weight_map": dict.fromkeys(names, file)}
    (path / "model.safetensors.index.json").write_text(json.dumps(table))


def _empty_index(path: Path) -> None:
    _index(path, "part.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")


def _config(path: Path, **changes: Any) -> None:
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**known, **changes}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_truncate, "is no safetensors file"),
        (_long_header, "is no safetensors file"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "is no safetensors file"),
        (lambda p: _index(p, "../small/part.safetensors"), "no file of this folder"),
        (lambda p: _index(p, "/etc/passwd"), "no file of this folder"),
        (lambda p: _index(p, "..\\part.safetensors"), "no file of this folder"),
        (lambda p: _index(p, "model.bin"), "no file of this folder"),
        (lambda p: _index(p, "other.safetensors"), r"names other\.safetensors, which is missing"),
        (lambda p: _index(p, "part.safetensors", extra="more"), r"only in the index \['more'\]"),
        (_empty_index, "has no weight_map"),
        (lambda p: (p / "config.json").write_text("{"), "is no JSON"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), "is no JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "holds list"),
        (lambda p: _config(p, model_type="gpt3"), "model_type 'gpt3'.*'gpt2'"),
        (lambda p: _config(p, model_type=["gpt2"]), "model_type"),
        (lambda p: _config(p, n_embd="16"), "wrong type"),
        (lambda p: _config(p, n_embd=-16), "expected at least 1"),
        (lambda p: _config(p, n_layer=10**9), "1000000000 layers"),
        (lambda p: _config(p, vocab_size=10**15), "mis-shaped"),
    ],
)
def test_damaged_and_hostile_folders_are_refused(
    damage: Callable[[Path], Any], match: str, small: Path
) -> None:
    load(small)
    damage(small)
    with pytest.raises(ValueError, match=match):
        load(small)


def test_what_is_no_floating_number_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype = torch\.int32"):
        models.load(small, sw.make_mesh({"data": 1}), strategies.data(), dtype=torch.int32)
    respelled(small, lambda held: {k: v.to(torch.int8) for k, v in held.items()})
    with pytest.raises(ValueError, match=r"not floating  .* holds torch\.int8"):
        load(small)


def test_what_our_config_has_not_is_written_back(small: Path, tmp_path: Path) -> None:
    _config(small, bos_token_id=7, task_specific_params={"a": [1]})
    generation = {"eos_token_id": 5, "do_sample": True}
    (small / "generation_config.json").write_text(json.dumps(generation))
    before = json.loads((small / "config.json").read_text())
    model, params = load(small)
    models.save(tmp_path / "same", model, params)
    after = json.loads((tmp_path / "same" / "config.json").read_text())
    gone = {k: v for k, v in before.items() if after.get(k) != v}
    assert not gone.keys() - {"architectures", "dtype"}
    assert json.loads((tmp_path / "same" / "generation_config.json").read_text()) == generation

    changed = replace(model, config=replace(model.config, eps=1e-3))
    models.save(tmp_path / "changed", changed, params)
    after = json.loads((tmp_path / "changed" / "config.json").read_text())
    assert after["layer_norm_epsilon"] == 1e-3
    assert after["bos_token_id"] == 7
    assert load(tmp_path / "changed")[0].config == changed.config


def test_heads_that_are_not_read_are_named(tmp_path: Path, folders: Find) -> None:
    path = Path(shutil.copytree(folders("bert")[1], tmp_path / "bert"))
    respelled(path, lambda held: {**held, "classifier.weight": torch.zeros(2, 16)})
    _config(path, architectures=["BertForSequenceClassification"])
    words = "names BertForSequenceClassification; heads that are read .*BertForMaskedLM"
    with pytest.raises(ValueError, match=words):
        load(path)


def test_missing_files(tmp_path: Path, small: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load(tmp_path / "nothing")
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin holds pickles"):
        load(small)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = load(small)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        models.save(small, model, params)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("shardwise.models.huggingface.write_json", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        models.save(tmp_path / "out", model, params)
    assert sorted(tmp_path.iterdir()) == before


@contextlib.contextmanager
def reads() -> Iterator[list[int]]:
    """The sizes of all slices read."""
    sizes: list[int] = []
    plain = Folder.read

    def counted(self: Folder, *args: Any) -> Tensor:
        found = plain(self, *args)
        sizes.append(found.numel())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", counted)
        yield sizes


def test_only_slices_are_read(folders: Find) -> None:
    _, path = folders("llama")
    total = sum(v.numel() for v in tensors(path).values())
    axes, strategy = MESHES["fsdp"]
    with reads() as sizes:
        models.load(path, sw.make_mesh(axes), strategy)
    assert sum(sizes) == total  # each element once
    assert max(sizes) == 32 * 16 // 4  # one device's slice of one layer's largest matrix
    with reads() as sizes:
        models.load(path, sw.make_mesh(axes, transport="abstract"), strategy)
    assert sizes == []


def anonymous() -> int:
    """Bytes of this process's own memory: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_and_save(path: str, out: str) -> dict[str, Any]:
    """On each of two processes: what it read, the most memory it took, and the sum it holds."""
    mesh = sw.make_mesh({"data": 2})
    strategy = strategies.fsdp()
    seen: list[int] = []
    base = anonymous()
    plain = Folder.read

    def watched(self: Folder, *args: Any) -> Tensor:
        found = plain(self, *args)
        seen.append(anonymous() - base)
        return found

    Folder.read = watched  # type: ignore[method-assign]
    with reads() as sizes:
        model, params = models.load(path, mesh, strategy)
    models.save(out, model, params)
    refused = ""
    try:
        models.save(out, model, params)
    except sw.MeshError as error:
        refused = str(error)
    held = sum(p.to_local().numel() for p in sw.tree.leaves(params))
    return {"read": sum(sizes), "peak": max(seen), "held": held, "refused": refused}


@pytest.mark.processes
def test_each_process_holds_its_own_part_and_one_writes(tmp_path: Path) -> None:
    wide = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
    path = written(reference("llama", **wide, vocab_size=512), tmp_path / "in")
    total = sum(v.numel() for v in tensors(path).values())
    assert total * 4 > 25e6
    ended = launch(load_and_save, 2, str(path), str(tmp_path / "out"))
    for process in ended:
        value = process.value
        assert value["read"] == value["held"] <= total // 2 + total // 50
        assert "nothing is overwritten" in value["refused"]  # in both, though one writes
        assert value["peak"] < total * 4 * 0.65  # its half, a slice, and change
    same_bits(tensors(tmp_path / "out"), tensors(path))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
