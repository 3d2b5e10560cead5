"""Errors a user can act on. The CLI prints their message and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EnergyModelError(Exception):
    """Base of every error caused by input, configuration or capacity."""


class TraceError(EnergyModelError):
    """A request trace cannot be read or is refused; names file, row and field."""


class ProfileError(EnergyModelError):
    """A GPU or calibration file is unknown or malformed; names the field."""


class UnsupportedModelError(EnergyModelError):
    """A model config holds an architecture or field that is not understood."""


class ConfigurationError(EnergyModelError):
    """An option or a combination of options makes no sense; names the option."""


class CapacityError(EnergyModelError):
    """The model or the load does not fit the GPUs given; says what would."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: the closest matches and all known names."""
    known = sorted(known)
    close = get_close_matches(name.lower(), [k.lower() for k in known], n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}."
