"""JSON schemas of the files that energymodel reads and writes, made from the dataclasses.

A field's description is the text below it in the dataclass; fields that a schema does not name are
refused, as the readers of these files do.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from energymodel.calibrations import SCHEMA_VERSION as CALIBRATION_VERSION
from energymodel.calibrations import Calibration
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.fleet_plan import Plan
from energymodel.pareto import OBJECTIVES
from energymodel.plan_report import SCHEMA_VERSION as PLAN_VERSION
from energymodel.plan_scaling import Scaling
from energymodel.results import SCHEMA_VERSION as RESULT_VERSION
from energymodel.results import Prediction
from energymodel.specs import GpuSpec
from energymodel.sweep import Point
from energymodel.sweep_report import SCHEMA_VERSION as POINTS_VERSION

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _FromDataclasses(GenerateJsonSchema):
    """Adds the fields' descriptions, closes objects, and leaves out titles that repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dataclass_schema(self, schema: Any) -> Schema:
        made = super().dataclass_schema(schema)
        made["additionalProperties"] = False
        for name, text in field_texts(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made


def json_schema(name: str) -> Schema:
    """Schema of a file format by its name, see `schema_names`.

    Raises
    ------
    ConfigurationError
        If there is no such format.
    """
    if name not in _MAKERS:
        raise ConfigurationError(unknown_name("schema", name, _MAKERS))
    return {"$schema": _DIALECT, **_MAKERS[name]()}


def schema_names() -> tuple[str, ...]:
    """Names of the formats that have a schema."""
    return tuple(_MAKERS)


def field_texts(cls: type) -> dict[str, str]:
    """The text below each field of a class, on one line; fields without one are absent."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if is_field and is_text and isinstance(below.value.value, str):  # type: ignore[attr-defined]
            texts[field.target.id] = " ".join(below.value.value.split())  # type: ignore[attr-defined]
    return texts


def _from(cls: Any) -> Schema:
    schema: Schema = TypeAdapter(cls).json_schema(
        mode="serialization", schema_generator=_FromDataclasses
    )
    return schema


def _points() -> Schema:
    """What `sweep_report.as_json` writes."""
    both = {"first": {"type": "number"}, "second": {"type": "number"}}
    comparison = {
        "sentence": {"type": "string"},
        "joules_per_request": {"type": "object", "additionalProperties": _closed(both)},
    }
    schema = _closed(
        {
            "schema_version": {"const": POINTS_VERSION},
            "objective": {"enum": list(OBJECTIVES)},
            "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
            "best": _numbers("Points within the targets, the best first, counted from 1."),
            "front": _numbers("Points that no other beats in everything, counted from 1."),
        }
    )
    schema["properties"]["comparison"] = _closed(comparison)  # only with --compare
    return {"$defs": _definitions(list[Point]), **schema}


def _plan() -> Schema:
    """What `plan_report.to_dict` writes."""
    definitions = _definitions(tuple[Plan, Scaling])
    plan = definitions.pop("Plan")["properties"]
    pool = {
        "trace": {"type": "string"},
        "share": {"type": "number", "description": "Of the trace's requests [-]."},
        **definitions["Point"]["properties"],
    }
    plan["schema_version"] = {"const": PLAN_VERSION}
    plan["feasible"] = {"type": "boolean"}
    plan["objective"] = {"enum": list(OBJECTIVES)}
    plan["infeasible"] = {
        "type": ["string", "null"],
        "description": "Why no plan exists; null if there is one.",
    }
    plan["pools"] = {"type": "array", "items": _closed(pool)}
    plan["scaling"] = {"anyOf": [{"$ref": "#/$defs/Scaling"}, {"type": "null"}]}
    del definitions["Point"], definitions["Pool"]
    return {"$defs": definitions, **_closed(plan)}


def _definitions(kind: Any) -> dict[str, Schema]:
    """Schemas, by name, of the dataclasses that a type holds; all their fields are written."""
    definitions: dict[str, Schema] = _from(kind)["$defs"]
    for schema in definitions.values():
        schema["required"] = list(schema["properties"])
    return definitions


def _closed(properties: Schema) -> Schema:
    """An object that has these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _numbers(description: str) -> Schema:
    return {"type": "array", "items": {"type": "integer"}, "description": description}


def _result() -> Schema:
    schema = _from(Prediction)
    schema["properties"]["schema_version"] = {"const": RESULT_VERSION}
    schema["required"] = list(schema["properties"])  # all are written
    return schema


def _calibration() -> Schema:
    schema = _from(Calibration)
    schema["properties"]["schema_version"] = {"const": CALIBRATION_VERSION}
    _not_negative(schema)
    return schema


def _gpu() -> Schema:
    """A GPU file holds every field of `GpuSpec` but its name, each with its source."""
    schema = _from(GpuSpec)
    _not_negative(schema)
    fields = {k: v for k, v in schema["properties"].items() if k not in ("name", "sources")}
    source = {"type": "string", "minLength": 1, "description": "Where the value comes from."}
    schema["properties"] = {
        name: {
            "type": "object",
            "properties": {"value": value, "source": source},
            "required": ["value", "source"],
            "additionalProperties": False,
        }
        for name, value in fields.items()
    }
    schema["required"] = list(fields)
    return schema


def _not_negative(schema: Any) -> None:
    """Give every number the lower bound 0 that the readers of calibrations and GPUs hold to."""
    if isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            schema["minimum"] = 0
        for value in schema.values():
            _not_negative(value)
    elif isinstance(schema, list):
        for value in schema:
            _not_negative(value)


_MAKERS: dict[str, Callable[[], Schema]] = {
    "result": _result,
    "points": _points,
    "plan": _plan,
    "calibration": _calibration,
    "gpu": _gpu,
}
