"""Paged attention on a CPU: against torch's attention over the tokens in a row, and its merging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import real
from torch import Tensor

from shardwise.kernels import decode

LENGTHS = [7, 1, 0, 11]
PAGE, HEADS, KV_HEADS, DIM = 3, 6, 2, 5


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    table = torch.randperm(20)[:16].view(4, 4).int()
    pages = real(2, 20, PAGE, KV_HEADS, DIM)
    q = real(4, HEADS, DIM, seed=1)
    return q, pages[0], pages[1], table, torch.tensor(LENGTHS, dtype=torch.int32)


def in_a_row(pages: Tensor, table: Tensor, length: int, skipped: set[int]) -> Tensor:
    """Keys or values [heads, tokens, d] of one sequence, a token at a time."""
    kept = [n for n in range(length) if n // PAGE not in skipped]
    rows = [pages[int(table[n // PAGE]), n % PAGE] for n in kept]
    return torch.stack(rows, 1).repeat_interleave(HEADS // KV_HEADS, 0)


@pytest.mark.parametrize("skipped", [set(), {1}, {0, 2}], ids=str)
def test_attention_is_torch_s_over_the_tokens_of_each_sequence(skipped: set[int]) -> None:
    q, k_pages, v_pages, table, lengths = inputs()
    marked = table.clone()
    marked[:, sorted(skipped)] = -1
    out, lse = decode.paged_attention(q, k_pages, v_pages, marked, lengths, 0.3)
    for b, length in enumerate(LENGTHS):
        if all(n // PAGE in skipped for n in range(length)):
            assert not out[b].any()
            assert (lse[b] == -torch.inf).all()
            continue
        k, v = (in_a_row(pages, table[b], length, skipped) for pages in (k_pages, v_pages))
        wanted = F.scaled_dot_product_attention(q[b].unsqueeze(1), k, v, scale=0.3)[:, 0]
        torch.testing.assert_close(out[b], wanted, rtol=1e-12, atol=1e-12)
        sums = (torch.einsum("hd,hnd->hn", q[b], k) * 0.3).logsumexp(1)
        torch.testing.assert_close(lse[b], sums, rtol=1e-12, atol=1e-12)


def test_scale_by_default() -> None:
    args = inputs()
    found, wanted = decode.paged_attention(*args), decode.paged_attention(*args, DIM**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_numbers_outside_the_sequences_do_not_count() -> None:
    q, k_pages, v_pages, table, lengths = inputs()
    wanted = decode.paged_attention(q, k_pages, v_pages, table, lengths)
    for pages in (k_pages, v_pages):
        unused = [p for p in range(20) if p not in table.flatten().tolist()]
        pages[unused] = torch.nan
        pages[int(table[1, 0]), 1:] = torch.nan  # after the only token of a sequence
    found = decode.paged_attention(q, k_pages, v_pages, table, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_derivatives_are_finite_where_a_sequence_is_empty() -> None:
    q, k_pages, v_pages, table, lengths = inputs()
    reals = [x.requires_grad_() for x in (q, k_pages.clone(), v_pages.clone())]
    out, _ = decode.paged_attention(reals[0], reals[1], reals[2], table, lengths)
    grads = torch.autograd.grad(out.square().sum(), reals)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0].any()
    assert not grads[0][2].any()


def test_parts_on_several_devices_merge_to_the_whole() -> None:
    q, k_pages, v_pages, table, lengths = inputs()
    wanted = decode.paged_attention(q, k_pages, v_pages, table, lengths)
    held = torch.arange(4) % 3
    parts = [
        decode.paged_attention(q, k_pages, v_pages, torch.where(held == p, table, -1), lengths)
        for p in range(3)
    ]
    outs, lses = (torch.stack(column) for column in zip(*parts, strict=True))
    assert lses.isinf().any()  # of a part without a token, and of a sequence without any
    torch.testing.assert_close(decode.merge(outs, lses), wanted, rtol=1e-12, atol=1e-12)


def test_a_token_is_written_to_its_slot() -> None:
    _, k_pages, v_pages, _, _ = inputs()
    before = k_pages.clone(), v_pages.clone()
    k, v = real(2, 3, KV_HEADS, DIM, seed=5)
    decode.write_kv_(k, v, k_pages, v_pages, torch.tensor([4, -1, 59]))
    for pages, old, new in ((k_pages, before[0], k), (v_pages, before[1], v)):
        assert torch.equal(pages[1, 1], new[0])
        assert torch.equal(pages[19, 2], new[2])
        changed = (pages != old).flatten(2).any(2).nonzero().tolist()
        assert changed == [[1, 1], [19, 2]]


def test_what_does_not_fit_is_told() -> None:
    q, k, v, table, lengths = inputs()
    with pytest.raises(ValueError, match="q is"):
        decode.paged_attention(q, k, v[:1], table, lengths)
    with pytest.raises(ValueError, match="do not fit pages"):
        decode.paged_attention(q[:, :5], k, v, table, lengths)
    for wrong in ((table[:3], lengths), (table, lengths[:3])):
        with pytest.raises(ValueError, match="for 4 sequences"):
            decode.paged_attention(q, k, v, *wrong)
    new, slots = k[:2, 0], torch.tensor([0, 1])
    with pytest.raises(ValueError, match="contiguous"):
        decode.write_kv_(new, new, k.transpose(0, 1), v, slots)
    with pytest.raises(ValueError, match="do not fit"):
        decode.write_kv_(new, new, k, v, slots[:1])
    with pytest.raises(ValueError, match="differ"):
        decode.write_kv_(new, new, k, v.float(), slots)
