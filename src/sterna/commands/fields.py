"""KEY=VALUE metadata from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sterna.errors import InvalidArgument


def parse_metadata(given: Sequence[str], option: str = "--meta") -> dict[str, Any]:
    """A dictionary of KEY=VALUE strings; a value that is JSON is taken as JSON, anything else as text. Raises InvalidArgument."""
    fields: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"{option} {item!r}: expected KEY=VALUE")
        if key in fields:
            raise InvalidArgument(f"{option} {key!r} is given twice")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    return fields
