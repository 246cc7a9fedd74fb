"""`patch_embedding`: a convolution whose stride is its kernel, as a reshape and one matmul."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...layouts.layout import LayoutLike
from ...layouts.sharded import ShardedTensor
from ..einops import rearrange
from ..given import check_sharded
from .dense import dense


def patch_embedding(
    images: ShardedTensor,
    w: ShardedTensor,
    b: Any = None,
    *,
    patch: int,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """Square patches of images, each times one matrix, row by row of the image.

    Args:
        images: [batch, channel, height, width]; the batch may be cut. Patches must divide height
            and width.
        w: [channel * patch * patch, embed], or [channel, patch, patch, embed] with uncut leading
            dims. A convolution's weight [embed, channel, patch, patch], as in Hugging Face's ViT,
            is `weight.permute(1, 2, 3, 0)`, or `weight.flatten(1).T`.
        b: [embed]; joins before a sum is reduced.
        patch: edge of a patch in pixels.
        out: layout of the result.
        over: as in `einsum`.

    Returns:
        [batch, patches, embed] with (height / patch) * (width / patch) patches.

    Cost: that of `dense`; cutting the image moves nothing.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> images = sw.shard(torch.ones(2, 3, 8, 12), mesh, "batch/data channel height width")
    >>> w = sw.shard(torch.ones(3 * 4 * 4, 6), mesh, "pixel embed/tensor")
    >>> sw.nn.patch_embedding(images, w, patch=4)
    f32[2/data 6 6/tensor] local[1 6 3] on mesh(data=2, tensor=2)
    """
    check_sharded("patch_embedding", images=images, w=w)
    if images.ndim != 4:
        raise ValueError(
            f"patch_embedding takes [batch channel height width], got {list(images.shape)}"
        )
    _, channel, height, width = images.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch_embedding: patches of {patch} do not divide {height} x {width}")
    if w.ndim == 4:
        w = rearrange(w, "channel row col embed -> (channel row col) embed")
    if w.ndim != 2 or w.shape[0] != channel * patch * patch:
        raise ValueError(
            f"patch_embedding: w {tuple(w.shape)} does not take {channel} channels of "
            f"{patch} x {patch} pixels"
        )
    pixels = rearrange(images, "b c (h r) (w s) -> b (h w) (c r s)", r=patch, s=patch)
    return dense(pixels, w, b, out=out, over=over)
