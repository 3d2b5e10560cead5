"""The cache of compiled loops: any change renews it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from energymodel import compiled

PACKAGE = Path(compiled.__file__).parent


def test_every_file_with_compiled_loops_names_the_cache() -> None:
    found = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if re.search(r"^@(compiled|njit)\b", path.read_text(), re.MULTILINE)
    }
    assert found | {"compiled"} == set(compiled._FILES)


def test_a_change_in_any_of_them_takes_another_folder(tmp_path: Path) -> None:
    for name in compiled._FILES:
        (tmp_path / f"{name}.py").write_bytes((PACKAGE / f"{name}.py").read_bytes())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import compiled; "
        "print(compiled.cache_folder())"
    )

    def folder() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        ).stdout

    before = folder()
    assert before == folder()
    assert str(tmp_path / "cache") in before
    with (tmp_path / "step_costs.py").open("a") as file:
        file.write("# changed\n")
    assert folder() != before
