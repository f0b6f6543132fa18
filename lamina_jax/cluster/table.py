"""Strict reading of TOML tables into configuration classes; knows no setting by name.

Every error names the file and the key's path, as in `pool.toml: workers[1].port: ...`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Set
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lamina_jax.config import ConfigError
from lamina_jax.flags import without_none

Config = TypeVar("Config")

EXPECTED = {
    str: "text in quotes",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}


class Table:
    """One table of a file.

    Args:
        values: by key.
        file: where it stands.
        path: its own key path in the file, "" for the whole file.
    """

    def __init__(self, values: dict[str, Any], file: Path, path: str = "") -> None:
        self.values, self.file, self.path = values, file, path

    def error(self, key: str, problem: str) -> ConfigError:
        """What is wrong with a key, or with the whole table where `key` is ""."""
        return ConfigError(": ".join(part for part in (str(self.file), self._path(key), problem) if part))

    def part(self, key: str) -> Table:
        """The table at `key`, empty where there is none."""
        return Table(self._get(key, dict, {}), self.file, self._path(key))

    def parts(self, key: str) -> list[Table]:
        """The tables of the array at `key` ([[key]])."""
        values = self._get(key, list, [])
        if not all(type(value) is dict for value in values):
            raise self.error(key, f"expected tables, each under a [[{self._path(key)}]] of its own")
        return [Table(value, self.file, f"{self._path(key)}[{i}]") for i, value in enumerate(values)]

    def some(self, keys: Set[str]) -> Table:
        """This table with these keys alone."""
        return Table({key: value for key, value in self.values.items() if key in keys}, self.file, self.path)

    def strings(self) -> dict[str, str]:
        """The whole table, whose values are all text."""
        return {key: self._typed(key, str) for key in self.values}

    def read(self, config_class: type[Config], elsewhere: Mapping[str, str] = {}, **given: Any) -> Config:
        """An object of a dataclass from the keys of this table.

        Args:
            elsewhere: fields that are not taken from here, and why not.
            given: values of fields that the caller has read already.

        Raises:
            ConfigError: a key that the class has no field for, one that is missing, a value of the wrong
                type, or one that the class refuses.
        """
        hints, needed = get_type_hints(config_class), required(config_class)
        for key in sorted(elsewhere.keys() & self.values.keys()):
            raise self.error(key, f"not here: {elsewhere[key]}")
        self.only(*(name for name in hints if name not in elsewhere))
        for key in sorted(needed - self.values.keys() - given.keys()):
            raise self.error(key, f"missing: expected {_expected(without_none(hints[key]))}")
        values = {key: self._typed(key, hints[key]) for key in self.values if key not in given}
        try:
            return config_class(**values, **given)
        except ConfigError as error:
            raise self.error("", str(error)) from None

    def only(self, *keys: str) -> None:
        """Refuse any key but these."""
        for key in self.values:
            if key not in keys:
                raise self.error(key, f"there is no such key here; there are {', '.join(keys)}")

    def _path(self, key: str) -> str:
        return ".".join(part for part in (self.path, key) if part)

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key, default)
        if type(value) is not kind:
            path = self._path(key)
            brackets = f"[{path}]" if kind is dict else f"[[{path}]]"
            raise self.error(key, f"expected a table, {brackets}, got {value!r}")
        return value

    def _typed(self, key: str, hint: Any) -> Any:
        value, kind = self.values[key], without_none(hint)
        if kind is float and type(value) is int:
            return float(value)
        if get_origin(kind) is dict:
            return self.part(key).strings()
        if get_origin(kind) is Literal:
            taken = any(value == choice and type(value) is type(choice) for choice in get_args(kind))
        else:
            taken = type(value) is kind
        if not taken:
            raise self.error(key, f"expected {_expected(kind)}, got {value!r}")
        return value


def read_file(path: Path) -> Table:
    """The table that a TOML file is.

    Raises:
        ConfigError: a file that cannot be read, or is no TOML.
    """
    try:
        return Table(tomllib.loads(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from None


def names(config_class: type) -> set[str]:
    """The fields of a dataclass."""
    return {field.name for field in fields(config_class)}


def required(config_class: type) -> set[str]:
    """The fields of a dataclass that have no default."""
    missing = (MISSING, MISSING)
    return {field.name for field in fields(config_class) if (field.default, field.default_factory) == missing}


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    return EXPECTED[get_origin(kind) or kind]
