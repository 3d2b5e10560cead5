"""What an import costs: `energymodel --help` must start at once, and the core needs no GPU library.

Asserted on the modules loaded, not on the clock.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

GPU_LIBRARIES = {"torch", "transformers", "vllm", "pynvml"}
SLOW_LIBRARIES = {"matplotlib", "numba", "polars", "scipy", "sklearn"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["energymodel", "energymodel.cli", "calibration"])
def test_an_import_loads_nothing_slow(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & (GPU_LIBRARIES | SLOW_LIBRARIES)


def test_the_parameters_need_the_standard_library_alone() -> None:
    modules = "energymodel.specs, energymodel.units, energymodel.errors, energymodel.datafiles"
    loaded = modules_after(f"import {modules}")
    assert "numpy" not in loaded


def test_predict_is_reachable_without_a_gpu_library() -> None:
    assert not modules_after("import energymodel; energymodel.predict") & GPU_LIBRARIES
