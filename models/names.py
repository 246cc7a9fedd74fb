"""`Source`: where one of our parameters lies in a Hugging Face checkpoint, as a row of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One parameter's place in a checkpoint.

    Attributes:
        name: of the tensor there; "{layer}" stands for the number of the layer.
        dims: its dims by our names, in the file's order; a merged dim stands in parentheses:
            "(heads head_dim) embed" for a weight [out, in].
        parts: where several parameters share the tensor: the products of dims that follow each
            other along dim `along`.
        part: which of them this is.
        along: the file's dim that the parts share.
        shape: the file's own dims where they are not `dims`: a reshape of them, row by row, as of
            "embed pixel" for a convolution's "embed channel patch patch".
        first: the number of the first layer in names.

    >>> Source("h.{layer}.attn.c_attn.weight", "embed (heads head_dim)",
    ...        parts=("heads head_dim",) * 3, part=1, along=1).name
    'h.{layer}.attn.c_attn.weight'
    """

    name: str
    dims: str
    parts: tuple[str, ...] = ()
    part: int = 0
    along: int = 0
    shape: str = ""
    first: int = 0
