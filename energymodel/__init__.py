"""energymodel: how many joules an LLM workload costs on a GPU with a serving stack.

>>> import energymodel
>>> result = energymodel.predict("translation", gpu="a100", arrivals="offline")
>>> result.requests
1024

`workload.py` tells the whole story in one file. Names below are loaded on first use, so that
importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from energymodel.calibrations import Calibration as Calibration
    from energymodel.calibrations import load_calibration as load_calibration
    from energymodel.errors import EnergyModelError as EnergyModelError
    from energymodel.gpus import load_gpu as load_gpu
    from energymodel.models import load_model as load_model
    from energymodel.results import Prediction as Prediction
    from energymodel.traces import Requests as Requests
    from energymodel.workload import predict as predict
    from energymodel.workloads import load_requests as load_requests

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "calibrations",
    "EnergyModelError": "errors",
    "Prediction": "results",
    "Requests": "traces",
    "load_calibration": "calibrations",
    "load_gpu": "gpus",
    "load_model": "models",
    "load_requests": "workloads",
    "predict": "workload",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - the names of _HOMES are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'energymodel' has no attribute '{name}'")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"energymodel.{_HOMES[name]}"), name)
