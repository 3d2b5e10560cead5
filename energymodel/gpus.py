"""Loads what a GPU is by its datasheet from `profiles/gpus/*.json`.

Every field of a file is `{"value": ..., "source": "..."}`. The canonical name is the file's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from energymodel.datafiles import data_path
from energymodel.errors import ProfileError, unknown_name
from energymodel.specs import GpuSpec

_DTYPES = ("bf16", "fp16", "fp8", "int8", "fp32", "mxfp4")
_MAX_FILE_BYTES = 2**20
_MOST = 1e20  # no unit used here comes near it


def load_gpu(name_or_path: str) -> GpuSpec:
    """GPU by canonical name, alias or NVML name, or from a JSON file.

    Case, `-`, `_` and spaces make no difference in names.

    Raises
    ------
    ProfileError
        If the GPU is unknown, or its file is malformed (names the field).
    """
    wanted = _plain(name_or_path)
    for path in sorted(data_path("gpus").glob("*.json")):
        document = _read(path)
        if wanted in _names(path.stem, document):
            return _gpu(path, document)
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        return _gpu(path, _read(path))
    raise ProfileError(
        unknown_name("GPU", name_or_path, list_gpus())
        + " For another GPU give a JSON file with the same fields."
    )


def list_gpus() -> tuple[str, ...]:
    """Canonical names of the GPUs that ship with the package."""
    return tuple(sorted(path.stem for path in data_path("gpus").glob("*.json")))


def _plain(name: str) -> str:
    """A name without the differences that do not matter."""
    return re.sub(r"[-_\s]+", " ", name.strip().lower())


def _names(stem: str, document: Mapping[str, Any]) -> set[str]:
    """All names of a shipped GPU, in plain form."""
    aliases = document["aliases"]["value"]
    return {_plain(name) for name in (stem, document["title"]["value"], *aliases)}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ProfileError(f"{path}: too large for a GPU file ({path.stat().st_size} bytes)")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise ProfileError(f"{path}: a GPU file is a JSON object, not a {type(document).__name__}")
    return document


def _gpu(path: Path, document: Mapping[str, Any]) -> GpuSpec:
    """Check every field of a file and build the GPU."""
    if unknown := sorted(set(document) - set(_FIELDS)):
        raise ProfileError(
            f"{path}: unknown fields {', '.join(unknown)}. Known: {', '.join(_FIELDS)}"
        )
    if missing := sorted(set(_FIELDS) - set(document)):
        raise ProfileError(f"{path}: missing fields {', '.join(missing)}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field, check in _FIELDS.items():
        entry = document[field]
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            raise ProfileError(f'{path}: {field} must be {{"value": ..., "source": "..."}}')
        source = entry["source"]
        if not isinstance(source, str) or not source.strip():
            raise ProfileError(f"{path}: {field}.source must say where the value comes from")
        values[field] = check(entry["value"], f"{path}: {field}.value")
        sources[field] = source
    return GpuSpec(name=_plain(path.stem).replace(" ", "-"), sources=sources, **values)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        raise ProfileError(f"{where} must be a positive number, not {str(value)[:40]}")
    return float(value)


def _number_or_none(value: Any, where: str) -> float | None:
    return None if value is None else _number(value, where)


def _whole(value: Any, where: str) -> int:
    number = _number(value, where)
    if number != int(number):
        raise ProfileError(f"{where} must be a whole number, not {value}")
    return int(number)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ProfileError(f"{where} must be text, not {str(value)[:40]}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ProfileError(f"{where} must be a list of texts, not {str(value)[:40]}")
    return tuple(_text(item, f"{where}[{i}]") for i, item in enumerate(value))


def _peaks(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise ProfileError(f"{where} must be an object of dense peaks by dtype")
    if unknown := sorted(set(value) - set(_DTYPES)):
        raise ProfileError(
            f"{where} has unknown dtypes {', '.join(unknown)}. Known: {', '.join(_DTYPES)}"
        )
    return {dtype: _number(peak, f"{where}.{dtype}") for dtype, peak in value.items()}


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "title": _text,
    "aliases": _texts,
    "architecture": _text,
    "peak_flops_per_s": _peaks,
    "hbm_bytes": _number,
    "hbm_bytes_per_s": _number,
    "l2_bytes": _number,
    "link_bytes_per_s": _number,
    "tdp_watts": _number,
    "sm_count": _whole,
    "boost_clock_hz": _number,
    "idle_watts": _number_or_none,
}
