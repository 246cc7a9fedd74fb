"""Checkpoints of tests are not synced to the device: no test could see it, and all would wait."""

from __future__ import annotations

import pytest
from disks import Watched

from shardwise.checkpoint import files


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(files, "CURRENT", watched)
    return watched
