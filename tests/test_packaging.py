"""The data files are found from a built wheel, an editable install and a plain checkout.

No network: the wheel is built without isolation, and the fresh environments see the packages of the
current one (the dependencies, the build backend) through a .pth file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from docs_blocks import Runner, compare, pieces

import energymodel

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "profiles"
TEMPLATES = ROOT / "energymodel" / "templates"


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Output of a command, run away from the checkout and its PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def fresh_environment(folder: Path) -> Path:
    """Python of a new virtual environment that sees the current one's packages, but not its .pth.

    An editable install of the current environment is therefore not seen.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent
    )
    current = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "current.pth").write_text("\n".join(sorted(current)) + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: str | Path) -> None:
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "install", *offline, *what, cwd=python.parent)


def profiles_folder(python: Path, cwd: Path, **variables: str) -> Path:
    code = "from energymodel.datafiles import data_path; print(data_path())"
    return Path(run(python, "-c", code, cwd=cwd, **variables))


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the source distribution, and of the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    (built,) = release.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_all_data_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"energymodel/py.typed", "energymodel/specs.py", "calibration/__init__.py"} <= names
    templates = {name for name in names if name.startswith("energymodel/templates/")}
    assert templates == {f"energymodel/templates/{name}" for name in files_below(TEMPLATES)}
    prefix = "energymodel/_profiles/"
    shipped = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert shipped == files_below(PROFILES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "profiles/")) for name in names)


def test_the_source_distribution_holds_what_a_packager_needs(release: Path) -> None:
    (built,) = release.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "CITATION.cff", "README.md", "Makefile", "mkdocs.yml", "docs/index.md"):
        assert name in names
    assert {"tests/test_packaging.py", "profiles/grids.csv", "pyproject.toml"} <= names


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {energymodel.__version__}\n" in citation


def test_the_quick_start_works_word_for_word_with_only_the_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, wheel)
    folder = tmp_path / "empty"
    folder.mkdir()
    runner = Runner(folder, python)
    statements = ["import energymodel; assert 'site-packages' in energymodel.__file__"]
    for piece in pieces((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")):
        if piece.kind == "python":
            statements.append(piece.source)
        elif (printed := runner.run(piece)) is not None and piece.shown.strip():
            compare(piece, printed)
    run(python, "-c", "\n".join(statements), cwd=folder)


def test_an_installed_wheel_finds_its_own_data_files(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, wheel)
    found = profiles_folder(python, cwd=tmp_path)
    assert found.is_relative_to(tmp_path / "venv")
    assert found.name == "_profiles"
    assert files_below(found) == files_below(PROFILES)


def test_an_installed_wheel_has_the_command(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, wheel)
    version = run(python, "-c", "import energymodel; print(energymodel.__version__)", cwd=tmp_path)
    assert version in run(python.parent / "energymodel", "--version", cwd=tmp_path)


def test_the_shell_completes_commands(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, wheel)
    asked = {"_ENERGYMODEL_COMPLETE": "complete_bash", "COMP_WORDS": "energymodel pre"}
    completed = run(python.parent / "energymodel", cwd=tmp_path, COMP_CWORD="1", **asked)
    assert completed == "predict"


def test_an_editable_install_reads_the_checkout(tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, "--editable", ROOT)
    assert profiles_folder(python, cwd=tmp_path) == PROFILES


def test_a_checkout_works_without_an_install(tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    assert profiles_folder(python, cwd=tmp_path, PYTHONPATH=str(ROOT)) == PROFILES
