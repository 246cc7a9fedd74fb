"""The maps with int8 and int4 weights, interpreted (test_interpreter.py runs it on its own)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from canaries import compare

from shardwise.kernels import gemv, gemv_triton, norms_triton
from shardwise.kernels.launch import Launch

MODULES = (gemv_triton, norms_triton)
TOLERANCE = {
    torch.float32: {"atol": 3e-5, "rtol": 1e-5},
    torch.float16: {"atol": 3e-4, "rtol": 6e-4},  # half a unit in the last place
}
KINDS = pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)
SPLITS = pytest.mark.parametrize("splits", [1, 3])
ROW = Launch(block=4, warps=1, rows=8)  # more tiles than sizes ask for
ROWS = Launch(block=32, warps=1, rows=16, stages=2)


def how(rows: int) -> Launch:
    return ROW if rows == 1 else ROWS


@KINDS
@SPLITS
@pytest.mark.parametrize(
    ("rows", "size", "outs"), [(1, 208, 19), (1, 77, 5), (3, 208, 19), (16, 77, 33)]
)
def test_int8(
    rows: int, size: int, outs: int, splits: int, dtype: torch.dtype, backwards: bool
) -> None:
    torch.manual_seed(size)
    q, scale = gemv.quantize_int8(torch.randn(size, outs), dtype)
    args = (torch.randn(rows, size).to(dtype), q, scale)
    launcher = partial(gemv_triton.int8_linear, how=how(rows), splits=splits)
    compare(launcher, gemv._int8, args, MODULES, backwards=backwards, **TOLERANCE[dtype])


@KINDS
@SPLITS
@pytest.mark.parametrize(
    ("rows", "size", "outs", "group"),
    [(1, 320, 19, 32), (1, 384, 5, 128), (3, 640, 19, 128), (16, 256, 33, 256)],
)
def test_int4(
    rows: int, size: int, outs: int, group: int, splits: int, dtype: torch.dtype, backwards: bool
) -> None:
    torch.manual_seed(size)
    weight = gemv.quantize_int4(torch.randn(size, outs), group, dtype)
    args = (torch.randn(rows, size).to(dtype), *weight, group)
    launcher = partial(gemv_triton.int4_linear, how=how(rows), splits=splits)
    compare(launcher, gemv._int4, args, MODULES, backwards=backwards, **TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 2])
def test_the_launches_of_the_sizes(rows: int) -> None:
    torch.manual_seed(rows)
    w, x = torch.randn(4224, 9), torch.randn(rows, 1, 4224)
    for launcher, twin, weight in (
        (gemv_triton.int8_linear, gemv._int8, gemv.quantize_int8(w)),
        (gemv_triton.int4_linear, gemv._int4, (*gemv.quantize_int4(w), 128)),
    ):
        compare(launcher, twin, (x, *weight), MODULES, atol=2e-4, rtol=1e-5)


def test_what_no_kernel_is_for_is_torch_s() -> None:
    w, x = torch.randn(96, 7), torch.randn(17, 96)
    eight, four = gemv.quantize_int8(w), (*gemv.quantize_int4(w, 48), 48)
    for rows in (x, x[:0], x[:2]):
        found = gemv_triton.int4_linear(rows, *four)
        torch.testing.assert_close(found, gemv._int4(rows, *four))
    for rows in (x, x[:0]):
        torch.testing.assert_close(gemv_triton.int8_linear(rows, *eight), gemv._int8(rows, *eight))


def test_codes_are_read_from_their_bits() -> None:
    """Every code at every place of a word."""
    codes = (torch.arange(16)[:, None] + torch.arange(32)) % 16
    weight = (gemv.pack_int4(codes, 32), torch.ones(16, 1), torch.zeros(16, 1))
    for k in range(32):
        x = torch.zeros(1, 32)
        x[0, k] = 1
        found = gemv_triton.int4_linear(x, *weight, 32, Launch(block=1, warps=1, rows=16))
        assert found[0].tolist() == codes[:, k].tolist()
