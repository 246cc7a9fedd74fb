"""Models under 3D, 2.5D and sharded sequence parallelism on 8 Gloo processes equal one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import trained
from processes import launch

import shardwise as sw

pytestmark = pytest.mark.processes
CASES = [
    ("llama3", "8: 3D"),
    ("llama3", "8: fsdp x sequence"),
    ("gpt2", "8: 2.5D"),
    ("palm", "8: 3D"),
    ("bert", "8: data x 1D"),
    ("vit", "8: 3D"),
]


def everywhere() -> dict[str, Any]:
    """What each process runs: losses and whole gradients of all cases."""
    found: dict[str, Any] = {}
    for name, case in CASES:
        _, loss, grads = trained(name, case)
        found[f"{name} {case} loss"] = loss.full_tensor()
        for path, grad in sw.tree.items(grads):
            found[f"{name} {case} {path}"] = grad.full_tensor()
    return found


def test_eight_processes_equal_the_simulation() -> None:
    expected = everywhere()
    for outcome in launch(everywhere, 8, timeout=240):
        assert outcome.value.keys() == expected.keys()
        for key, value in outcome.value.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=key)
