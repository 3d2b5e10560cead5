"""`energymodel schema`: every file of a format is valid by its schema, and faults are not."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields

import jsonschema
import pytest
from typer.testing import CliRunner

import energymodel
from energymodel.calibrations import Calibration, list_calibrations
from energymodel.cli import app
from energymodel.datafiles import data_path
from energymodel.gpus import list_gpus
from energymodel.results import Prediction
from energymodel.schemas import field_texts, json_schema, schema_names
from energymodel.specs import GpuSpec


def document(kind: str, name: str) -> dict:
    return json.loads(data_path(f"{kind}s", f"{name}.json").read_text())


def faults(name: str, instance: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema(name))
    return [error.message for error in validator.iter_errors(instance)]


@pytest.mark.parametrize("name", schema_names())
def test_the_command_prints_a_valid_schema(name: str) -> None:
    outcome = CliRunner().invoke(app, ["schema", name])
    assert outcome.exit_code == 0
    printed = json.loads(outcome.stdout)
    assert printed == json_schema(name)
    jsonschema.Draft202012Validator.check_schema(printed)


def test_an_unknown_schema_is_refused_with_the_known_ones() -> None:
    outcome = CliRunner().invoke(app, ["schema", "resul"])
    assert outcome.exit_code == 2
    assert "Did you mean result?" in outcome.stderr


@pytest.mark.parametrize("name", list_calibrations())
def test_shipped_calibrations_are_valid(name: str) -> None:
    assert faults("calibration", document("calibration", name)) == []


@pytest.mark.parametrize("name", list_gpus())
def test_shipped_gpus_are_valid(name: str) -> None:
    assert faults("gpu", document("gpu", name)) == []


@pytest.mark.parametrize("options", [{}, {"grid": "france"}, {"binning": "paper"}])
def test_results_are_valid(options: dict) -> None:
    result = energymodel.predict("translation", gpu="a100", **options)
    assert faults("result", json.loads(json.dumps(result.to_dict()))) == []


def written(*command: str) -> dict:
    outcome = CliRunner().invoke(app, [*command, "--backend", "sequential", "--format", "json"])
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.mark.parametrize(
    "options",
    [
        ("--replicas", "1,2", "--compare", "1,2", "--mode", "exact", "--grid", "france"),
        ("--tensor-parallel", "1,3", "--gpu-memory-utilization", "0.8"),  # 3 is refused
    ],
)
def test_points_are_valid(options: tuple[str, ...]) -> None:
    found = written("whatif", "--trace", "azure_code", "--gpu", "h100", *options)
    assert faults("points", found) == []
    assert faults("points", found | {"schema_version": 0})
    assert faults("points", found | {"objective": "time"})
    found["points"][0]["setting"]["color"] = "red"
    assert faults("points", found)


@pytest.mark.parametrize(
    ("options", "feasible"),
    [
        (("--stock", "h100=4", "--scale-every", "900"), True),
        (("--stock", "h100=4,a100=0", "--ttft", "0.001"), False),
    ],
)
def test_plans_are_valid(options: tuple[str, ...], feasible: bool) -> None:
    sizes = ("--tensor-parallel", "1", "--max-batch", "64")
    found = written("plan", "--trace", "azure_conv", *sizes, *options)
    assert found["feasible"] is feasible
    assert (found["scaling"] is not None) is feasible
    assert faults("plan", found) == []
    assert faults("plan", found | {"pools": [{"trace": "azure_conv"}]})
    assert faults("plan", {key: value for key, value in found.items() if key != "value"})


def test_what_the_reader_refuses_the_schema_refuses() -> None:
    good = document("calibration", list_calibrations()[0])
    for change in ({"unknown": 1}, {"base_watts": -1.0}, {"base_watts": "70"}, {"origin": "guess"}):
        assert faults("calibration", good | change)
    missing = deepcopy(good)
    del missing["kernels"]["gemm"]["memory_efficiency"]
    assert faults("calibration", missing)
    gpu = document("gpu", "a100")
    assert faults("gpu", gpu | {"tdp_watts": 400})  # without a source
    assert faults("gpu", gpu | {"tdp_watts": {"value": 400, "source": ""}})


@pytest.mark.parametrize("cls", [Prediction, Calibration, GpuSpec])
def test_descriptions_are_the_texts_below_the_fields(cls: type) -> None:
    texts = field_texts(cls)
    assert texts
    assert set(texts) <= {f.name for f in fields(cls)}


def test_descriptions_reach_the_schema() -> None:
    described = json_schema("result")["properties"]["energy_joules"]["description"]
    assert described == field_texts(Prediction)["energy_joules"]
