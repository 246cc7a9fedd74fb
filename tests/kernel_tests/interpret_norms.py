"""The norms, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

import pytest
import torch
from canaries import compare

from shardwise.kernels import norms, norms_triton

SIZES = [(7, 64), (5, 1000), (2, 4097), (33, 96)]
TOLERANCE = {
    torch.float32: {"atol": 3e-5, "rtol": 3e-5},
    torch.float16: {"atol": 4e-3, "rtol": 2e-3},
}
MODULES = (norms_triton,)


def inputs(rows: int, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows * size)
    tensors = {n: torch.randn(rows, size).to(dtype) for n in ("x", "extra", "grad")}
    tensors |= {n: torch.randn(size).to(dtype) for n in ("weight", "bias")}
    _, mean, rstd = norms._layer(tensors["x"].float(), tensors["weight"].float(), None, 1e-5)
    return {**tensors, "mean": mean, "rstd": rstd}


OPS = {
    "rms_norm": ("x weight", (1e-5,), norms._rms),
    "add_rms_norm": ("x extra weight", (1e-5,), norms._add_rms),
    "layer_norm": ("x weight bias", (1e-5,), norms._layer),
    "add_layer_norm": ("x extra weight bias", (1e-5,), norms._add_layer),
    "rms_norm_backward": ("grad x weight rstd extra", (), norms._rms_backward),
    "layer_norm_backward": ("grad x weight mean rstd extra", (), norms._layer_backward),
}


@pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_kernel_equals_its_twin(
    name: str, shape: tuple[int, int], dtype: torch.dtype, backwards: bool
) -> None:
    names, static, twin = OPS[name]
    held = inputs(*shape, dtype)
    tolerance = dict(TOLERANCE[dtype])
    if "backward" in name:  # the weight's gradient is a sum over rows, rounded to the dtype
        tolerance["atol"] *= 4
    args = (*(held[n] for n in names.split()), *static)
    launcher = getattr(norms_triton, name)
    compare(launcher, twin, args, MODULES, backwards=backwards, **tolerance)


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward"])
def test_nothing_extra_and_strided_gradients(name: str) -> None:
    held = inputs(5, 96, torch.float32)
    names, _, twin = OPS[name]
    args = [held[n] for n in names.split()[:-1]]
    found = getattr(norms_triton, name)(torch.ones(()).expand(5, 96), *args[1:], None)
    wanted = twin(torch.ones(5, 96), *args[1:], None)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_no_rows_give_zero_gradients() -> None:
    x, w = torch.zeros(0, 64), torch.ones(64)
    assert [r.shape[0] for r in norms_triton.rms_norm(x, w, 1e-5)] == [0, 0]
    assert not norms_triton.rms_norm_backward(x, x, w, torch.zeros(0), None)[1].any()


def test_rows_too_long_for_registers_are_torch_s() -> None:
    x, w = torch.randn(2, norms_triton.LARGEST_FORWARD + 1), torch.ones(())
    found = norms_triton.rms_norm(x, w, 1e-5)
    torch.testing.assert_close(found, norms._rms(x, w, 1e-5))
