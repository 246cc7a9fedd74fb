"""The norms on a GPU: bf16 within half a unit in the last place of float64, results poisoned."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from device_check import BITS, SLACK, STATISTIC, check, norm_inputs

from shardwise.kernels import norms, norms_triton

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)
NORMS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "rms_norm": ("x weight", (1e-5,), (SLACK, STATISTIC)),
    "layer_norm": ("x weight bias", (1e-5,), (SLACK, STATISTIC, STATISTIC)),
    "rms_norm_backward": ("grad x weight rstd extra", (), (SLACK, STATISTIC)),
    "layer_norm_backward": ("grad x weight mean rstd extra", (), (SLACK, STATISTIC, STATISTIC)),
}
SHAPES = [(33, 64), (301, 768), (1000, 1000), (517, 4096), (40, 8192), (7, 16384), (5, 20000)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    names, static, slacks = NORMS[name]
    if "backward" in name and shape[1] > norms_triton.LARGEST_BACKWARD:
        pytest.skip("torch computes it")
    held = norm_inputs(*shape, dtype)
    check(name, (*(held[n] for n in names.split()), *static), slacks)


@DTYPES
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_norm_of_a_sum_sees_the_rounded_sum(centred: bool, dtype: torch.dtype) -> None:
    held = norm_inputs(129, 4096, dtype)
    x, extra, weight, bias = (held[n] for n in ("x", "extra", "weight", "bias"))
    if centred:
        y, total, *rest = norms.add_layer_norm(x, extra, weight, bias, 1e-5)
        alone = norms.layer_norm(total, weight, bias, 1e-5)
    else:
        y, total, *rest = norms.add_rms_norm(x, extra, weight, 1e-5)
        alone = norms.rms_norm(total, weight, 1e-5)
    assert torch.equal(total, x + extra)
    for a, b in zip((y, *rest), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0 ** (1 - BITS[a.dtype]), atol=1e-6)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm_backward"])
def test_unaligned_rows(name: str) -> None:
    names, static, slacks = NORMS[name]
    held = norm_inputs(37, 777, torch.bfloat16)
    check(name, (*(held[n] for n in names.split()), *static), slacks, shift=1)


def test_two_runs_are_equal_to_the_bit() -> None:
    held = norm_inputs(3000, 4096, torch.bfloat16)
    args = tuple(held[n] for n in ("grad", "x", "weight", "mean", "rstd", "extra"))
    first, second = (norms.layer_norm_backward(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_captured_graph_gives_the_same() -> None:
    held = norm_inputs(64, 4096, torch.bfloat16)
    wanted = norms.rms_norm(held["x"], held["weight"], 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norms.rms_norm(held["x"], held["weight"], 1e-5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
