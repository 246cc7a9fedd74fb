"""Options and fixtures of all tests: golden texts are compared verbatim."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no limit on the time of one: the machine may be busy.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"
_LINE = re.compile(r"\b(test_\w+\.py):\d+")  # a test's own line moves when the test is edited


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text equals tests/golden/<name>.txt, to the letter."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        shown = _LINE.sub(r"\1:LINE", text) + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(shown)
        assert path.exists(), f"{path} is missing; write it with --update-golden and review it"
        assert shown == path.read_text()

    return compare


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test alone gives the same numbers as in the suite."""
    torch.manual_seed(0)
