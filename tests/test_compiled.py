"""The cache of compiled loops: any change renews it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
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


def test_folders_not_used_for_a_week_go_when_a_new_one_is_made(tmp_path: Path) -> None:
    now = time.time()
    ages = {
        "energymodel-0123456789abcdef": 8.0,  # days
        "energymodel-fedcba9876543210": 6.0,
        "energymodel-notes": 900.0,
        "other": 900.0,
    }
    for name, days in ages.items():
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "loop.nbc").touch()
        os.utime(tmp_path / name, (now - 86_400 * days,) * 2)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    os.utime(kept, (0, 0))
    (tmp_path / "energymodel-aaaaaaaaaaaaaaaa").symlink_to(kept)
    code = "from energymodel.compiled import cache_folder; print(cache_folder())"
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def folder() -> Path:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        return Path(run.stdout.strip())

    made = folder()
    assert made.parent == tmp_path
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*ages, made.name, "kept", "energymodel-aaaaaaaaaaaaaaaa"} - {
        "energymodel-0123456789abcdef"
    }
    assert (kept / "file").exists()
    # one in use stays: each use renews its time
    os.utime(made, (0, 0))
    assert folder() == made
    assert made.stat().st_mtime > now - 60
    # without a new one nothing goes
    os.utime(tmp_path / "energymodel-fedcba9876543210", (0, 0))
    folder()
    assert (tmp_path / "energymodel-fedcba9876543210").is_dir()
