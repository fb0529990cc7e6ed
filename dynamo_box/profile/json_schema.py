"""The JSON Schema of a profile file, for editors: `python -m dynamo_box.profile.json_schema >
profiles/schema.json`.

A file may say less and more than a loaded profile: shorthands, `extends`, empty keys that take a base's value
away, and `${…}` where a number will be.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dynamo_box.profile.schema import Profile

_INTERPOLATED = {"type": "string", "pattern": r"\$\{"}
_SHORTHANDS = {
    "ServedModel": {"type": "string", "minLength": 1},
    "Workers": {"type": "integer", "minimum": 1},
    "RoleWorkers": {"type": "integer", "minimum": 1},
}


def json_schema() -> dict[str, Any]:
    schema = Profile.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "A profile that holds where this one says nothing: its name, or a path from here.",
        },
        **schema["properties"],
    }
    for section in (schema, *definitions.values()):
        section.pop("required", None)  # a base may say it
        section["properties"] = {key: _value(value) for key, value in section.get("properties", {}).items()}
    for name, shorthand in _SHORTHANDS.items():
        definitions[name] = {"anyOf": [definitions[name], shorthand, _INTERPOLATED]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """`profiles/schema.json` as it should be."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _value(schema: dict[str, Any]) -> dict[str, Any]:
    schema.pop("title", None)
    about: dict[str, Any] = {key: schema.pop(key) for key in ("description", "default") if key in schema}
    choices = schema.pop("anyOf", None) or [schema]
    if any(choice.get("type") in ("integer", "number", "boolean") or "enum" in choice for choice in choices):
        choices = [*choices, _INTERPOLATED]
    if {"type": "null"} not in choices:
        choices = [*choices, {"type": "null"}]
    return {**about, "anyOf": choices}


if __name__ == "__main__":
    sys.stdout.write(schema_text())
