"""Modules as functions: their forward on ShardedTensors equals itself, gradients too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import redraw
from torch import Tensor, nn

import shardwise as sw
from shardwise import interop, strategies

WIDE = sw.Precision(torch.float64, torch.float64, torch.float64)
VOCAB = 12


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.5))
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.scale * self.down(self.mlp(self.mlp_norm(x)))


class Tiny(nn.Module):
    """A transformer with a shared block, a tied head, a frozen parameter and two buffers."""

    steps: Tensor
    gain: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList([Block(width, 2), Block(width, 2)])
        self.blocks.append(self.blocks[0])
        self.head = nn.Linear(width, VOCAB)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, width))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, tokens: Tensor, *, shifted: bool = True) -> Tensor:
        x = self.embed(tokens) * self.gain
        x = x + self.shift if shifted else x
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# Megatron's, for the names above and for Hugging Face's Llama.
ONE_D = sw.Strategy(
    {
        "*.[qkv]_proj.weight": "out/tensor in",
        "*.[qkv]_proj.bias": "out/tensor",
        "*.o_proj.weight": "out in/tensor",
        "*.mlp.0.weight": "out/tensor in",
        "*.mlp.0.bias": "out/tensor",
        "*.down.weight": "out in/tensor",
        "*.mlp.gate_proj.weight": "out/tensor in",
        "*.mlp.up_proj.weight": "out/tensor in",
        "*.mlp.down_proj.weight": "out in/tensor",
        "*embed_tokens.weight": "vocab/tensor embed",
        "embed.weight": "vocab/tensor embed",
        "lm_head.weight": "vocab/tensor embed",
        "head.bias": "vocab/tensor",
        "*": "...",
    },
    {"*": "..."},
    {"tokens": "batch seq"},
)
CASES = {
    "data": (strategies.data(), {"data": 4}),
    "fsdp": (strategies.fsdp(), {"data": 4}),
    "1d": (ONE_D, {"tensor": 2}),
    "data x 1d": (strategies.data() * ONE_D, {"data": 2, "tensor": 2}),
    "fsdp x 1d": (strategies.fsdp() * ONE_D, {"data": 2, "tensor": 2}),
}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return redraw(Tiny().double())


def loss_of(logits: Any, tokens: Any) -> Any:
    vocab = logits.shape[-1]
    return F.cross_entropy(logits[:, :-1].reshape(-1, vocab), tokens[:, 1:].reshape(-1))


def equals_torch(module: nn.Module, case: str, logits: Callable[[Any], Any], vocab: int) -> sw.Plan:
    """Value and gradients of our loss and of the module's own."""
    strategy, sizes = CASES[case]
    strategy = strategy.replace(precision=WIDE)
    tokens = torch.randint(vocab, (4, 8), generator=torch.Generator().manual_seed(1))
    expected = loss_of(logits(module(tokens)), tokens)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(expected, list(trained.values()))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    mesh = sw.make_mesh(sizes)
    params = interop.module_params(module, mesh, strategy)
    params, frozen = sw.tree.partition(params, lambda name, _: name in trained)
    rows = sw.shard(tokens, mesh, strategy["tokens"])

    def loss(params: Any, rows: Any) -> Any:
        used = strategy.use(sw.tree.combine(params, frozen))
        return loss_of(logits(interop.functional_call(module, used, rows)), rows)

    with sw.record() as plan:
        value, grads = sw.value_and_grad(loss)(params, rows)
    torch.testing.assert_close(value.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    for (name, p), grad in zip(trained.items(), wanted, strict=True):
        assert grads[name].layout is params[name].layout, name
        assert grad.abs().max() > 1e-6 or name.endswith("k_proj.bias"), name  # softmax's own zero
        mine = grads[name].full_tensor()
        torch.testing.assert_close(
            mine, grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert module.get_parameter(name) is p
    assert all(torch.equal(module.state_dict()[n], t) for n, t in before.items())
    return plan


@pytest.mark.parametrize("case", CASES)
def test_a_module_equals_itself(case: str) -> None:
    plan = equals_torch(tiny(), case, lambda y: y, VOCAB)
    if case == "1d":  # an all_reduce for each half block each way: Megatron's, and nothing gathered
        assert plan.count(kind="all_reduce", axis="tensor", phase="backward") == 7
        assert plan.count(kind="all_gather") == 0


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def exact(self: Any, x: Any) -> Any:  # its own rounds to float32
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
    attention, tied = request.param
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        attn_implementation=attention,
        use_cache=False,
    )
    return redraw(transformers.LlamaForCausalLM(config).double())


@pytest.mark.parametrize("llama", [("sdpa", False), ("eager", True)], ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_hugging_faces_llama_equals_itself(llama: nn.Module, case: str) -> None:
    plan = equals_torch(llama, case, lambda y: y.logits, 16)
    if case == "1d":  # of the embedding and each half block, where the next norm reads the stream
        assert plan.count(kind="all_reduce", axis="tensor", op="rms_norm") == 5


def test_parameters_keep_names_order_and_rows() -> None:
    module, mesh = tiny(), sw.make_mesh({"data": 2, "tensor": 2})
    params = interop.module_params(module, mesh, strategies.fsdp() * ONE_D)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert str(params["blocks.0.q_proj.weight"]) == "f32[8/tensor/data 8]"  # the param dtype
    assert str(params["blocks.1.down.weight"]) == "f32[8/data 32/tensor]"
    assert str(params["blocks.1.scale"]) == "f32[]"
    for name, p in params.items():
        assert torch.equal(p.full_tensor(), module.get_parameter(name).float())


def test_rows_that_do_not_fit_are_named() -> None:
    s = strategies.rows({"*": "out/x in"})
    with pytest.raises(sw.LayoutError) as caught:
        interop.module_params(nn.Linear(3, 5), sw.make_mesh({"x": 2}), s)
    text = str(caught.value)
    assert "weight: rest row: dim 0 of size 5 is not divisible by axis 'x'" in text
    assert "bias: rest row" in text
    with pytest.raises(sw.MeshError, match="unknown axis 'x'"):
        interop.module_params(nn.Linear(3, 4, bias=False), sw.make_mesh({"y": 2}), s)


def test_a_module_on_meta_is_planned_and_not_sharded() -> None:
    with torch.device("meta"):
        module = Tiny()
    mesh = sw.make_mesh({"data": 64, "tensor": 4}, transport="abstract")
    params = interop.module_params(module, mesh, strategies.data() * ONE_D)
    assert str(params["blocks.0.mlp.0.weight"]) == "f32[32/tensor 8]"
    with pytest.raises(sw.LayoutError, match=r"embed.weight: the parameter is on the meta device"):
        interop.module_params(module, sw.make_mesh({"data": 2}), strategies.data())


def test_the_module_is_restored_after_an_exception() -> None:
    module = tiny().float()
    mesh = sw.make_mesh({"data": 2})
    before = dict(module.named_parameters(remove_duplicate=False))
    params = interop.module_params(module, mesh, strategies.data())
    module.blocks[1].down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interop.functional_call(module, params, torch.zeros(2, 4, dtype=torch.int64))
    after = dict(module.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert module.head.weight is module.embed.weight


def test_calls_nest() -> None:
    linear, mesh = nn.Linear(4, 4).double(), sw.make_mesh({"data": 2})
    params = interop.module_params(linear, mesh, strategies.data().replace(precision=WIDE))
    twice = {name: 2 * p for name, p in params.items()}
    x = torch.ones(2, 4, dtype=torch.float64)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear

        def forward(self, x: Any) -> Any:
            return self.inner(x) + interop.functional_call(linear, twice, x)

    outer = {f"inner.{name}": p for name, p in params.items()}
    y = interop.functional_call(Outer(), outer, sw.shard(x, mesh, "b/data d"))
    torch.testing.assert_close(y.full_tensor(), 3 * linear(x).detach(), rtol=1e-13, atol=1e-13)


def test_buffers_and_keywords() -> None:
    module, mesh = tiny(), sw.make_mesh({"data": 2})
    strategy = strategies.data().replace(precision=WIDE)
    params = interop.module_params(module, mesh, strategy)
    tokens = torch.randint(VOCAB, (2, 4))
    gain = torch.arange(8.0, dtype=torch.float64)
    given = params | {"gain": sw.shard(gain, mesh)}
    rows = sw.shard(tokens, mesh, "b/data s")
    y = interop.functional_call(module, given, rows, shifted=False).full_tensor()
    kept = interop.functional_call(module, params, rows).full_tensor()
    torch.testing.assert_close(kept, module(tokens).detach(), rtol=1e-12, atol=1e-12)
    module.gain.copy_(gain)
    torch.testing.assert_close(y, module(tokens, shifted=False).detach(), rtol=1e-12, atol=1e-12)


def test_names_are_checked() -> None:
    module, mesh = tiny(), sw.make_mesh({"data": 2})
    params = interop.module_params(module, mesh, strategies.data())
    rows = torch.zeros(2, 4, dtype=torch.int64)
    call = interop.functional_call
    with pytest.raises(
        ValueError, match=r"no parameter 'embed.wight'; did you mean 'embed.weight'"
    ):
        call(module, {**params, "embed.wight": params["shift"]}, rows)
    short = {name: p for name, p in params.items() if name != "blocks.0.scale"}
    with pytest.raises(ValueError, match=r"missing: blocks.0.scale, blocks.2.scale; give"):
        call(module, short, rows)
    with pytest.raises(ValueError, match=r"head.weight is tied to another name"):
        call(module, {**params, "head.weight": 2 * params["embed.weight"]}, rows)
    renamed = {("head.weight" if n == "embed.weight" else n): p for n, p in params.items()}
    del renamed["shift"]  # frozen: a constant
    y = call(module.float(), renamed, sw.shard(rows, mesh, "b/data s"))
    torch.testing.assert_close(y.full_tensor(), module(rows).detach())
    with pytest.raises(ValueError, match="missing"):
        interop.load_module(module, short)


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.linear(x)


def test_what_is_no_function_is_refused() -> None:
    mesh, data = sw.make_mesh({"data": 2}), strategies.data()
    module = Counting()
    x = sw.shard(torch.ones(2, 2), mesh, "b/data d")
    with pytest.raises(TypeError, match="wrote into the buffer 'calls'"):
        interop.functional_call(module, interop.module_params(module, mesh, data), x)
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    params = interop.module_params(noisy, mesh, data)
    with pytest.raises(sw.LayoutError, match="keys are explicit"):
        interop.functional_call(noisy, params, x)
    y = interop.functional_call(noisy.eval(), params, x)
    torch.testing.assert_close(y.full_tensor(), noisy(torch.ones(2, 2)).detach())


def test_code_that_asks_what_can_be_iterated_gets_a_type_error() -> None:
    x = sw.shard(torch.ones(2, 3), sw.make_mesh({"data": 2}), "b/data d")
    with pytest.raises(TypeError) as caught:
        iter(x)
    assert isinstance(caught.value, sw.LayoutError)
    assert [str(row) for row in x.T] == ["f32[2/data]"] * 3


def test_training_with_our_optimizer_and_back() -> None:
    module = tiny()
    theirs = copy.deepcopy(module)
    strategy, sizes = CASES["fsdp x 1d"]
    strategy = strategy.replace(precision=WIDE)
    mesh = sw.make_mesh(sizes)
    tokens = torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = sw.shard(tokens, mesh, strategy["tokens"])
    params = interop.module_params(module, mesh, strategy)
    params, frozen = sw.tree.partition(params, lambda name, _: name != "shift")

    def loss(params: Any) -> Any:
        used = strategy.use(sw.tree.combine(params, frozen))
        return loss_of(interop.functional_call(module, used, rows), rows)

    mine = sw.optim.adamw(1e-2, weight_decay=0.1)
    state = mine.init(params)
    other = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for _ in range(3):
        params, state = mine.step(sw.grad(loss)(params), state, params)
        other.zero_grad()
        loss_of(theirs(tokens), tokens).backward()
        other.step()
    assert not torch.allclose(module.embed.weight, theirs.embed.weight, atol=1e-3)
    interop.load_module(module, sw.tree.combine(params, frozen))
    assert module.head.weight is module.embed.weight
    for (name, p), q in zip(module.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    bad = {**sw.tree.combine(params, frozen), "shift": sw.zeros((9,), mesh)}
    before = module.embed.weight.clone()
    with pytest.raises(ValueError, match=r"shift has shape \(9,\), the module's is \(8,\)"):
        interop.load_module(module, {n: 2 * p for n, p in bad.items()})
    assert torch.equal(module.embed.weight, before)
