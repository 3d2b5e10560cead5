"""Finds the data files that ship with the package (`profiles/`)."""

from __future__ import annotations

from pathlib import Path

from energymodel.errors import ProfileError

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str) -> Path:
    """Path of a shipped data file or folder.

    An installed wheel holds the files in `energymodel/_profiles`; an editable
    install and a checkout read them from the `profiles/` folder beside the package.

    Raises
    ------
    ProfileError
        If neither folder exists, i.e. the installation is broken.
    """
    for root in (_PACKAGE / "_profiles", _PACKAGE.parent / "profiles"):
        if root.is_dir():
            return root.joinpath(*parts)
    raise ProfileError(
        f"the data files of energymodel are missing (looked beside {_PACKAGE}); reinstall it"
    )
