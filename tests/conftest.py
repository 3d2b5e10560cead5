"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Machines differ in speed and a compiled function is slow once: no test asserts on time.
settings.register_profile("energymodel", deadline=None)
settings.load_profile("energymodel")

# Tables are as wide here as there, whatever the terminal or pytest-xdist say.
os.environ["COLUMNS"] = "100"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes, so that no worker ends on one alone."""
    items.sort(key=lambda item: "test_shipped_fits" not in item.nodeid)
