"""Writes plain data as YAML. Nothing here reads it, and no package is needed for so little."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
"""Which readers of YAML 1.1 do not take for text."""


def to_yaml(documents: list[dict[str, Any]]) -> str:
    """Documents of dictionaries, lists, text, integers and booleans."""
    return "---\n".join("\n".join(_lines(document)) + "\n" for document in documents)


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            if _is_block(below):
                # A list stands as deep as its key.
                indent = "" if isinstance(below, list) else "  "
                yield f"{_scalar(key)}:"
                yield from (indent + line for line in _lines(below))
            else:
                yield f"{_scalar(key)}: {_scalar(below)}"
    elif isinstance(value, list) and value:
        for below in value:
            first, *rest = _lines(below)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _is_block(value: Any) -> bool:
    return isinstance(value, dict | list) and bool(value)


def _scalar(value: Any) -> str:
    """JSON is YAML, but for characters beyond 16 bits; what reads as text without quotes has none."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, str):
        return '"' + "".join(_escaped(character) for character in value) + '"'
    return json.dumps(value)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\U{code:08x}" if code > 0xFFFF else json.dumps(character)[1:-1]
