"""Attention of one new token per sequence over keys and values kept in pages, and their merging.

A cache is a pool of pages [pages, page_size, kv_heads, d]; row b of `block_table` names the pages
of sequence b in the order of its tokens, of which the first `lengths[b]` count. With a query q of
`heads` heads, heads / kv_heads of which share the keys k and values v of one head,

    s_n = scale q . k_n,    lse = log sum_n exp s_n,    out = sum_n exp(s_n - lse) v_n

over the tokens n whose page is not negative: an entry -1 skips its page, which makes a window with
sinks (StreamingLLM) of any table. No token at all gives out = 0 and lse = -inf. Sums are formed in
float32 (float64 for float64). A GPU splits each sequence into parts and adds them in a fixed order.

Parts that lie on several devices are joined by `merge`, with the same numbers as the whole:

    lse = log sum_i exp lse_i,    out = sum_i exp(lse_i - lse) out_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define


def _tokens(pages: Tensor, block_table: Tensor, valid: Tensor) -> Tensor:
    """[batch, tokens, kv_heads, d] of each sequence, 0 where no token is: there may be NaN."""
    found = pages[block_table.clamp(min=0).long()].flatten(1, 2).to(wide(pages.dtype))
    return torch.where(valid[:, :, None, None], found, 0)


def _attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, d = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    place = torch.arange(block_table.shape[1] * page_size, device=q.device)
    valid = (block_table >= 0).repeat_interleave(page_size, 1) & (place < lengths[:, None])
    k, v = (_tokens(pages, block_table, valid) for pages in (k_pages, v_pages))
    grouped = q.to(k.dtype).reshape(batch, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("bkrd,bnkd->bkrn", grouped, k) * scale
    held = valid[:, None, None, :]
    shift = torch.where(held, scores, -torch.inf).detach().amax(-1, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, 0)  # no token at all: exp(-inf - 0) = 0
    weights = torch.where(held, torch.exp(torch.where(held, scores, shift) - shift), 0)
    total = weights.sum(-1)
    some = total > 0
    divisor = torch.where(some, total, 1)
    out = torch.einsum("bkrn,bnkd->bkrd", weights, v) / divisor[..., None]
    lse = torch.where(some, shift[..., 0] + divisor.log(), -torch.inf)
    return out.to(q.dtype).reshape(q.shape).contiguous(), lse.reshape(batch, heads).contiguous()


paged_attention_op = define(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths,"
    " float scale) -> (Tensor out, Tensor lse)",
    twin=_attention,
    cuda="decode_triton:paged_attention",
    backward=by_twin("paged_attention"),
    fake=lambda q, k_pages, v_pages, block_table, lengths, scale: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=wide(q.dtype)),
    ),
)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence and head over the tokens of its pages.

    Cost on a GPU: the keys and values of the tokens are read once, whatever the number of heads
    that share them. The derivative is that of the plain formula over all pages of the table.

    Args:
        q: [batch, heads, d], the queries of the newest tokens.
        k_pages: [pages, page_size, kv_heads, d], keys; kv_heads divides heads.
        v_pages: values, as the keys.
        block_table: int [batch, max_pages]; a negative entry skips its page.
        lengths: int [batch], tokens of each sequence, at most max_pages * page_size; tokens on
            skipped pages are counted.
        scale: factor of the products; 1 / sqrt(d) if None.

    Returns:
        The result [batch, heads, d] and the log-sum-exp [batch, heads] in float32 (float64 for
        float64), which `merge` wants.

    Raises:
        ValueError: the shapes do not fit together.

    >>> import torch
    >>> from shardwise.kernels.decode import paged_attention
    >>> keys, values = torch.zeros(4, 2, 1, 8), torch.arange(64.0).view(4, 2, 1, 8)
    >>> table, lengths = torch.tensor([[3, 1], [2, -1]]), torch.tensor([3, 0])
    >>> out, lse = paged_attention(torch.zeros(2, 1, 8), keys, values, table, lengths)
    >>> out[:, 0, 0], lse[:, 0].exp()  # the mean of 48, 56 and 16; nothing
    (tensor([40.,  0.]), tensor([3., 0.]))
    """
    if q.dim() != 3 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            "q is [batch, heads, d], pages are [pages, page_size, kv_heads, d]; got"
            f" {tuple(q.shape)}, {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        )
    if q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[2]:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit pages {tuple(k_pages.shape)}: the last dims are"
            " equal, and the number of kv heads divides that of heads"
        )
    if block_table.dim() != 2 or not block_table.shape[:1] == q.shape[:1] == lengths.shape:
        raise ValueError(
            f"a table {tuple(block_table.shape)} and lengths {tuple(lengths.shape)} for"
            f" {q.shape[0]} sequences: they are [batch, max_pages] and [batch]"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return paged_attention_op(q, k_pages, v_pages, block_table, lengths, scale)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join the attention over parts of the tokens into that over all of them.

    Args:
        outs: [parts, ..., d], the result of each part.
        lses: [parts, ...], its log-sum-exp; -inf where a part has no token.

    Returns:
        The result [..., d] in the dtype of `outs`, and its log-sum-exp [...].

    >>> import torch
    >>> from shardwise.kernels.decode import merge
    >>> out, lse = merge(torch.tensor([[2.0], [5.0]]), torch.tensor([2.0, 1.0]).log())
    >>> out, lse.exp()
    (tensor([3.]), tensor(3.))
    """
    shift = lses.detach().amax(0)
    shift = torch.where(shift.isfinite(), shift, 0)
    weights = torch.exp(lses - shift)
    total = weights.sum(0)
    some = total > 0
    divisor = torch.where(some, total, 1)
    out = (outs.to(lses.dtype) * (weights / divisor).unsqueeze(-1)).sum(0)
    return out.to(outs.dtype), torch.where(some, shift + divisor.log(), -torch.inf)


@torch.no_grad()
def write_kv_(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write the keys and values of new tokens into their slots of the pages, in place.

    It changes its arguments, so it is no op: not differentiable, and not to be traced. On a GPU it
    can be captured into a CUDA graph.

    Args:
        k: [tokens, kv_heads, d], the new keys.
        v: the new values.
        k_pages: [pages, page_size, kv_heads, d], contiguous; changed.
        v_pages: as the keys; changed.
        slots: int [tokens], page * page_size + place in the page, all different; a token with a
            negative slot (padding of a batch) is not written.

    Raises:
        ValueError: pages are not contiguous, or the shapes do not fit together.

    >>> import torch
    >>> from shardwise.kernels.decode import write_kv_
    >>> keys, values = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    >>> new = torch.tensor([5.0, 6.0]).view(2, 1, 1)
    >>> write_kv_(new, -new, keys, values, torch.tensor([2, -1]))
    >>> keys.flatten(), values.flatten()
    (tensor([0., 0., 5., 0.]), tensor([ 0.,  0., -5.,  0.]))
    """
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("pages are changed in place: they must be contiguous")
    if not k.shape == v.shape == (*slots.shape, *k_pages.shape[2:]):
        raise ValueError(
            f"keys {tuple(k.shape)}, values {tuple(v.shape)} and slots {tuple(slots.shape)} do not"
            f" fit pages {tuple(k_pages.shape)}"
        )
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError("the pages of keys and values differ in shape or dtype")
    k, v = k.to(k_pages.dtype), v.to(v_pages.dtype)
    if k.is_cuda:
        from . import decode_triton

        decode_triton.write_kv_(k, v, k_pages, v_pages, slots)
        return
    held = slots >= 0
    for new, pages in ((k, k_pages), (v, v_pages)):
        pages.flatten(0, 1).index_copy_(0, slots[held].long(), new[held])
