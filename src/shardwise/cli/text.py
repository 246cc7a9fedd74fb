"""Text as training data: files to bytes, bytes to tokens, tokens to batches.

A token is a byte, so the vocabulary has 256 entries and nothing is ever unknown. Every function
here is deterministic and knows nothing of meshes: each process computes the same global batch and
`shardwise.shard` keeps what belongs to it. A batch is a function of (seed, step) alone, so that a
resumed run, and a run on another mesh, reads the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCAB = 256
IGNORE = -100  # the label of a position that does not count, as in torch's cross_entropy
SUFFIXES = (".md", ".txt")


def read_text(path: str | Path) -> bytes:
    """A file, or all text files below a folder, as one byte string.

    Args:
        path: a file of any name, or a folder: its `.md` and `.txt` files, at any depth, hidden ones
            left out, joined in order of their paths.

    Returns:
        The bytes as they lie on disk.

    Raises:
        ValueError: nothing there, nothing in it, or bytes that are not UTF-8 (file and offset are
            named).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no {' or '.join(SUFFIXES)} file in this folder")
    parts = [file.read_bytes() for file in files]
    for file, part in zip(files, parts, strict=True):
        try:
            part.decode()
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
            raise ValueError(f"{file}: not UTF-8 text: {reason}") from None
    text = b"".join(parts)
    if not text:
        raise ValueError(f"{path}: empty")
    return text


def _files(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    names = {file: file.relative_to(folder).parts for file in found}
    return sorted(
        (file for file in found if not any(part.startswith(".") for part in names[file])),
        key=names.__getitem__,
    )


def split_text(text: bytes, fraction: float) -> tuple[bytes, bytes]:
    """The text cut in two at one byte offset: training text, validation text.

    Args:
        text: all of it.
        fraction: part of the bytes that is for training, between 0 and 1.

    >>> split_text(b"to be or not", 0.5)
    (b'to be ', b'or not')
    """
    cut = int(len(text) * fraction)
    return text[:cut], text[cut:]


def encode(text: str | bytes) -> Tensor:
    """Text to tokens, uint8[bytes].

    >>> encode("Ay")
    tensor([ 65, 121], dtype=torch.uint8)
    """
    data = text.encode() if isinstance(text, str) else text
    if not data:
        return torch.tensor([], dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(tokens: Tensor) -> str:
    """Tokens to text; bytes that are not UTF-8 become the replacement character.

    >>> decode(encode("Ay, there's the rub"))
    "Ay, there's the rub"
    """
    return bytes(tokens.tolist()).decode(errors="replace")


def batches(data: Tensor, *, seq: int, batch: int, seed: int, step: int) -> dict[str, Tensor]:
    """The training batch of one step: windows of the text that start at random places.

    Args:
        data: tokens, uint8[n] with n > seq.
        seq: tokens in a window.
        batch: number of windows (global).
        seed: of the run.
        step: of the run.

    Returns:
        `tokens` and `labels`, both int64[batch seq]; a label is the token after its own.

    Raises:
        ValueError: if the text is shorter than seq + 1 tokens.

    >>> batch = batches(encode("to be or not to be"), seq=8, batch=2, seed=0, step=0)
    >>> [decode(row) for row in batch["tokens"]], [decode(row) for row in batch["labels"]]
    (['o be or ', 'not to b'], [' be or n', 'ot to be'])
    """
    starts = data.numel() - seq
    if starts < 1:
        raise ValueError(f"a text of {data.numel()} tokens has no window of {seq} + 1 tokens")
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    start = torch.randint(starts, (batch, 1), generator=generator)
    windows = data[start + torch.arange(seq + 1)].long()
    return {"tokens": windows[:, :-1].contiguous(), "labels": windows[:, 1:].contiguous()}


def validation_batches(data: Tensor, *, seq: int, batch: int) -> Iterator[dict[str, Tensor]]:
    """The whole text in order, once: every token but the first is a label exactly once.

    Args:
        data: tokens, uint8[n] with n > 1.
        seq: tokens in a window.
        batch: number of windows in each batch (global).

    Yields:
        `tokens` and `labels`, both int64[batch seq]. The last batch is filled up with token 0 and
        label `IGNORE`, so weigh a batch by its number of other labels.

    Raises:
        ValueError: if the text has fewer than 2 tokens.
    """
    if data.numel() < 2:
        raise ValueError(f"a text of {data.numel()} tokens has no label")
    size = seq * batch
    for start in range(0, data.numel() - 1, size):
        piece = data[start : start + size + 1].long()
        tokens = torch.zeros(size, dtype=torch.int64)
        labels = torch.full((size,), IGNORE)
        tokens[: len(piece) - 1], labels[: len(piece) - 1] = piece[:-1], piece[1:]
        yield {"tokens": tokens.view(batch, seq), "labels": labels.view(batch, seq)}
