"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Machines differ in speed and a compiled function is slow once: no test asserts on time.
settings.register_profile("energymodel", deadline=None)
settings.load_profile("energymodel")

# Tables are as wide here as there, whatever the terminal or pytest-xdist say.
os.environ["COLUMNS"] = "100"
