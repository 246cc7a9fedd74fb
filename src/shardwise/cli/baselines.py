"""What a model's validation loss is worth: bits per byte of the same text under simpler predictors.

A *unigram* model knows how often each byte occurs in the training text. gzip and lzma are given
either the validation text alone, or the training text before it: then the training text's own
compressed size is taken off. gzip looks back 32 KiB only, so the training text hardly helps it;
lzma sees all of it.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """One predictor's result.

    Attributes:
        name: of the predictor.
        bits_per_byte: of the validation text; lower is better.
        given: what the predictor had seen before: "training text" or "nothing".
    """

    name: str
    bits_per_byte: float
    given: str


def baselines(train: bytes, validation: bytes) -> list[Baseline]:
    """Bits per byte of the validation text under unigram, gzip -9 and lzma (preset 9).

    Args:
        train: what the predictors may have seen.
        validation: what they are measured on; not empty.

    Returns:
        Unigram first, then the compressors, each with the training text and with nothing. The same
        bytes give the same numbers; other releases of zlib and liblzma may differ in the last
        digits.

    Cost: each compressor reads the training text twice and the validation text twice.

    >>> for line in baselines(b"to be or not to be " * 50, b"to be or not"):
    ...     print(f"{line.name:8} given {line.given}")
    unigram  given training text
    gzip -9  given training text
    gzip -9  given nothing
    lzma     given training text
    lzma     given nothing
    """
    if not validation:
        raise ValueError("the validation text is empty")
    lines = [Baseline("unigram", unigram_bits(train, validation), "training text")]
    texts = (train + validation, train, validation)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # both compressors release the lock
        sizes = {name: pool.map(compress, texts) for name, compress in _COMPRESSORS.items()}
        for name, (both, before, alone) in sizes.items():
            for size, given in ((both - before, "training text"), (alone, "nothing")):
                lines.append(Baseline(name, 8 * size / len(validation), given))
    return lines


def unigram_bits(train: bytes, validation: bytes) -> float:
    """Bits per byte of the validation text when each byte has its frequency in the training text.

    Each of the 256 bytes counts once more than it occurs (Laplace), so an unseen byte is not
    impossible.

    >>> unigram_bits(b"", b"any text")
    8.0
    """
    seen, total = Counter(train), len(train) + 256
    bits = sum(n * math.log2(total / (seen[byte] + 1)) for byte, n in Counter(validation).items())
    return bits / len(validation)


def _gzip_size(data: bytes) -> int:
    return len(gzip.compress(data, 9, mtime=0))


def _lzma_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))


_COMPRESSORS: dict[str, Callable[[bytes], int]] = {"gzip -9": _gzip_size, "lzma": _lzma_size}
