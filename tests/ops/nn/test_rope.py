"""`nn.rope`: Hugging Face's tables for every type of scaling; the same numbers in every layout."""

from __future__ import annotations

import pytest
import torch
from check import close, moves, placed, pulled
from gallery import mesh, values

from shardwise import nn
from shardwise.ops.audit import report
from shardwise.ops.nn.rope import frequencies

SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all": {
        "rope_type": "yarn",
        "factor": 40,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "yarn, amplitude": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 0.7,
        "original_max_position_embeddings": 16,
    },
}


def theirs(scaling, head_dim, theta, length):
    """Hugging Face's rotary module of a Llama with this scaling: cos and sin of [1, length]."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rows = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    rows["rope_type"] = rows.pop("type", rows["rope_type"])
    longest = rows.pop("max_position_embeddings", 1024)
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=longest,
        rope_parameters=rows,
    )
    module = LlamaRotaryEmbedding(config)
    return module(torch.zeros(1), torch.arange(length)[None])


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_values_are_hugging_face_s(name, theta):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = theirs(SCALINGS[name], 16, theta, 24)
    x = values(2, 24, 3, 16).float()
    want, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    ours = placed(x, mesh(data=2), "b/data s h d")
    y = nn.rope(ours, torch.arange(24), theta=theta, scaling=SCALINGS[name])
    torch.testing.assert_close(y.full_tensor(), want, rtol=1e-6, atol=1e-6)


def test_types_of_scaling_differ():
    """A type that were ignored would pass as another."""
    tables = [frequencies(16, 1e4, s, 24) for s in SCALINGS.values()]
    kinds = {(tuple(f.tolist()), a) for f, a in tables}
    assert len(kinds) == len(SCALINGS) - 1  # none and default


def test_dynamic_scaling_starts_where_the_trained_length_ends():
    scaling = SCALINGS["dynamic"]
    plain = frequencies(16)[0]
    assert torch.equal(frequencies(16, scaling=scaling, length=8)[0], plain)
    assert not torch.equal(frequencies(16, scaling=scaling, length=9)[0], plain)
    x = placed(values(1, 4, 2, 16), mesh(a=1), "b s h d")
    long = nn.rope(x, torch.arange(4) + 20, scaling=scaling, length=24)
    close(
        long,
        turned(values(1, 4, 2, 16), torch.arange(4) + 20, frequencies(16, 1e4, scaling, 24)[0]),
    )


def turned(x, positions, frequency, *, interleaved=False):
    """The rotation as products of complex numbers."""
    angle = (positions[..., None].float() * frequency)[..., None, :]
    if positions.ndim == 1:
        angle = angle[None]
    spin = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    n = frequency.shape[0]
    head, rest = x[..., : 2 * n], x[..., 2 * n :]
    pairs = head.unflatten(-1, (n, 2) if interleaved else (2, n))
    first, second = pairs.unbind(-1 if interleaved else -2)
    z = torch.complex(first, second) * spin
    both = torch.stack((z.real, z.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((both, rest), -1)


# layout of x and of its positions [batch seq]
ROWS = {
    "data": ("b/data s h d", "b/data s", {"data": 2}),
    "1D": ("b s h/t d", "b s", {"t": 2}),
    "kv whole": ("b s h d {R:t}", "b s {R:t}", {"t": 2}),
    "cut sequence": ("b s/t h d", "b s/t", {"t": 3}),
    "2D": ("b/row s h/col d", "b/row s", {"row": 2, "col": 2}),
    "3D": ("b/i/k s h/j d", "b/i/k s", {"i": 2, "j": 2, "k": 2}),
    "owed": ("b s h d {U:t}", "b s", {"t": 2}),
}
POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [5, 4, 3, 2, 1, 0], [9, 1, 7, 0, 0, 8]]
)


@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"dims": 4}, {"dims": 8}])
@pytest.mark.parametrize("row", ROWS)
def test_sharded_equals_unsharded_and_moves_nothing(row, options):
    like, like_positions, sizes = ROWS[row]
    value = values(4, 6, 4, 8)
    on = mesh(**sizes)
    x = placed(value, on, like)
    leaf = value.clone().requires_grad_()
    frequency = frequencies(options.get("dims", 8), 1e4)[0]
    for plain in (POSITIONS, POSITIONS[3]):
        to = like_positions if plain.ndim == 2 else like_positions.split(" ", 1)[1]
        for positions in (plain, placed(plain, on, to)):
            y, grads, plan = pulled(
                lambda x, at=positions: nn.rope(x, at, **options), [x], values(4, 6, 4, 8, seed=1)
            )
            want = turned(leaf, plain, frequency, interleaved=options.get("interleaved", False))
            close(y, want)
            close(grads[0], torch.autograd.grad(want, leaf, values(4, 6, 4, 8, seed=1))[0])
            assert y.layout is x.layout
            assert moves(plan, "forward") == moves(plan, "backward") == []


def test_every_layout_but_a_cut_head_dim():
    frequency = frequencies(6)[0]
    for options in ({}, {"interleaved": True}):
        found = report(
            lambda x, o=options: nn.rope(x, torch.arange(6), **o),
            [(6, 6, 6, 6)],
            reference=lambda x, o=options: turned(x, torch.arange(6), frequency, **o),
        )
        assert not found.wrong, found.wrong[:3]
        assert {key[1] for key in found.choice} <= {"_ _ _ _/a"}
        assert len(found.right) + len(found.choice) == 2 * 7


def test_bad_input_says_what_is_wrong():
    x = placed(values(1, 2, 2, 6), mesh(a=1), "b s h d")
    at = torch.arange(2)
    with pytest.raises(ValueError, match="5 of 6 entries cannot turn in pairs"):
        nn.rope(x, at, dims=5)
    with pytest.raises(ValueError, match="8 of 6"):
        nn.rope(x, at, dims=8)
    with pytest.raises(ValueError, match=r"unknown type 'lama3'.*did you mean 'llama3'"):
        nn.rope(x, at, scaling={"rope_type": "lama3"})
    with pytest.raises(ValueError, match="type 'linear' lacks 'factor'"):
        nn.rope(x, at, scaling={"rope_type": "linear"})
