"""JSON objects of a checkpoint, read key by key with a type. What a key means is its reader's business."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from lamina_jax.config import CheckpointError

T = TypeVar("T", int, float, bool, str, list, dict)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or not one JSON object; says where it breaks off.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


class Section:
    """A JSON object whose keys are read with a type; null counts as absent. `where` names it in errors."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} = {value!r}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str, kind: type[T]) -> T:
        """The key's value. Numbers must be positive."""
        if not self.has(key):
            raise CheckpointError(f"{self.where}: the key {key} is missing")
        value = self.values[key]
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**53 else math.inf
        if type(value) is not kind:
            raise self.error(key, value, f"a value of type {kind.__name__}")
        if kind is not bool and isinstance(value, int | float) and not 0 < value < math.inf:
            raise self.error(key, value, "a positive number")
        return value

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The key's value, or the default where it is absent."""
        return self.require(key, kind) if self.has(key) else default
