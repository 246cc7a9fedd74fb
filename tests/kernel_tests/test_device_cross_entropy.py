"""Cross-entropy on a GPU: against float64, with poisoned results and bounded memory."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import watched
from device_check import BITS, DEVICE, MODULES, STATISTIC, check
from torch import Tensor

from shardwise.kernels import cross_entropy

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)


def logits_and_labels(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + size)
    labels = torch.randint(50, 50 + size, (rows,), device=DEVICE)
    labels[0], labels[1] = -100, 50 + size
    return (torch.randn(rows, size, device=DEVICE) * 4).to(dtype), labels


@DTYPES
@pytest.mark.parametrize("shape", [(65, 1000), (9, 32000), (5, 50257), (7, 128256)], ids=str)
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(*shape, dtype)
    stop = 50 + shape[1] - 7  # the last 7 are padding
    check("cross_entropy_parts", (logits, labels, 50, stop), (STATISTIC, 0.0))
    lse, _ = cross_entropy._parts(logits.double(), labels, 50, stop)
    grads = torch.randn(2, shape[0], device=DEVICE)
    args = (*grads, logits, labels, lse.float(), 50, stop)
    check("cross_entropy_parts_backward", args, (STATISTIC,))


def test_more_elements_than_an_int32_counts() -> None:
    rows, size = 16400, 131072
    logits = torch.zeros(rows, size, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 8.0
    labels = torch.full((rows,), 5, device=DEVICE)
    lse, target = cross_entropy.cross_entropy_parts(logits, labels, 0, size)
    wanted = torch.logsumexp(logits[-1].double(), -1)
    assert abs(lse[-1].double() - wanted) < 1e-4
    assert target[-1] == 8
    one = torch.ones(rows, device=DEVICE)
    grad = cross_entropy.cross_entropy_parts_backward(one, -one, logits, labels, lse, 0, size)
    torch.testing.assert_close(grad[-1, 5].item(), (8 - wanted).exp().item() - 1, rtol=0.01, atol=0)


@pytest.mark.parametrize("chunk", [100, 4096])
def test_linear_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 512, device=DEVICE).bfloat16()
    weight = torch.randn(5000, 512, device=DEVICE).mul(0.05).bfloat16()
    labels = torch.randint(0, 4990, (300,), device=DEVICE)
    scale = torch.full((300,), 1 / 300, device=DEVICE)
    with watched(*MODULES):
        found = cross_entropy.linear_cross_entropy(hidden, weight, labels, scale, 4990, chunk)
    exact = cross_entropy._linear(
        hidden.double(), weight.double(), labels, scale.double(), 4990, 300
    )
    for a, b in zip(found, exact, strict=True):  # logits and their gradient are rounded to bf16
        assert ((a.double() - b).norm() / b.norm()).item() < 6e-3
    args = (hidden, weight, labels, 0, 4990, chunk)
    lse, target = cross_entropy.linear_cross_entropy_parts(*args)
    torch.testing.assert_close(lse - target, found[1], rtol=1e-3, atol=1e-3)
    grads = cross_entropy.linear_cross_entropy_parts_backward(
        scale, -scale, hidden, weight, labels, lse, 0, 4990, chunk
    )
    for a, b in zip(grads, exact[2:], strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 6e-3


def test_linear_cross_entropy_holds_one_chunk_of_logits() -> None:
    hidden = torch.randn(4096, 256, device=DEVICE).bfloat16()
    weight = torch.randn(32000, 256, device=DEVICE).bfloat16()
    labels, scale = (
        torch.zeros(4096, dtype=torch.long, device=DEVICE),
        hidden.new_ones(4096).float(),
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = cross_entropy.linear_cross_entropy(hidden, weight, labels, scale, 32000, 512)
    used = torch.cuda.max_memory_allocated() - before
    kept = sum(r.numel() * r.element_size() for r in results)
    assert used <= kept + 512 * 32000 * 2 + (8 << 20)
