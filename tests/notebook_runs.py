"""Runs the notebooks: `python tests/notebook_runs.py` renews outputs, `--check` only runs them.

Names of notebooks may follow. A cell that fails ends the run with its traceback. What changes from
run to run without meaning (times, kernel versions, ids of figures) is not kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
_LIMIT_SECONDS = 300


def notebooks() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> NotebookNode:
    """Run a notebook from its own folder; CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_LIMIT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for number, cell in enumerate(notebook.cells, start=1):
        cell.metadata = NotebookNode()
        cell.id = f"cell-{number}"
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return notebook


def main() -> None:
    """Run the notebooks named, or all."""
    names = [argument for argument in sys.argv[1:] if argument != "--check"]
    for path in [Path(name).resolve() for name in names] or notebooks():
        executed = execute(path)
        if "--check" not in sys.argv:
            nbformat.write(executed, path)


if __name__ == "__main__":
    main()
