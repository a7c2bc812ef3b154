"""A strict reading of a CustomResourceDefinition's schema: what a cluster would refuse, or drop without a word."""

import re
from typing import Any

import yaml

__all__ = ["problems", "schema_of"]

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def schema_of(text: str, version: str) -> dict[str, Any]:
    """Returns the schema of one version of a definition, given as YAML."""
    (found,) = [v for v in yaml.safe_load(text)["spec"]["versions"] if v["name"] == version]
    return found["schema"]["openAPIV3Schema"]


def problems(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """Returns what is wrong with a value, with where; rules in CEL (x-kubernetes-validations) are not read."""
    if schema.get("x-kubernetes-int-or-string"):
        kinds: Any = (int, str)
    else:
        kinds = _TYPES[schema["type"]]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        return [f"{at}: {type(value).__name__} in place of {schema.get('type', 'integer or string')}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{at}: {value!r} does not match {schema['pattern']}")
    size, of = (value, "imum") if isinstance(value, (int, float)) else (len(value), "Items")
    of = "Length" if isinstance(value, str) else of
    if not schema.get(f"min{of}", size) <= size <= schema.get(f"max{of}", size):
        found.append(f"{at}: {size} is below or above what is allowed")
    if isinstance(value, list):
        found += [line for i, item in enumerate(value) for line in problems(item, schema["items"], f"{at}[{i}]")]
    if isinstance(value, dict):
        found += _fields(value, schema, at)
    return found


def _fields(value: dict[str, Any], schema: dict[str, Any], at: str) -> list[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    found = [f"{at}.{name}: missing" for name in schema.get("required", ()) if name not in value]
    for name, inner in value.items():
        if name in known or isinstance(others, dict):
            found += problems(inner, known.get(name, others), f"{at}.{name}")
        elif not at.endswith(".metadata"):  # its schema is Kubernetes' own, and not written out
            found.append(f"{at}.{name}: unknown")
    return found
