"""The notebooks run from top to bottom, and keep outputs that read well where nothing runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook_runs import notebooks

RUNNER = Path(__file__).with_name("notebook_runs.py")
NAMES = [
    "01_roofline_and_energy",
    "02_calibration",
    "03_trace_to_joules",
    "04_paper_findings",
    "05_capacity_planning",
]
RESULT = re.compile(r"\d+(?:\.\d+)?\s?(?:%|J\b|kJ\b|MJ\b|kWh\b|W\b|ms\b)")


def test_all_are_there() -> None:
    assert [path.stem for path in notebooks()] == NAMES


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(RUNNER), "--check", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_its_outputs_are_kept(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_its_text_leaves_results_to_the_cells(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    told = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert RESULT.findall(told) == []
