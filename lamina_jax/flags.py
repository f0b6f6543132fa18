"""Command line flags, one for each field of a configuration dataclass.

A flag's name, type, choices and default are the field's, its help is the field's line in the `Args:` of
the class's docstring: what a setting means stands in one place. Knows no setting by name, and no jax.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """Refuses a command line with one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def add_flags(parser: argparse.ArgumentParser, config_class: type, *, positional: str | None = None) -> None:
    """Add `--some-field` for every `some_field` of a dataclass; `positional` names one that needs no flag.

    A field that is a configuration of its own has its own flags; one that is a flag already is the same.
    """
    texts, hints = field_texts(config_class), get_type_hints(config_class)
    for field in fields(config_class):
        if is_dataclass(hints[field.name]) or _flag(field.name) in parser._option_string_actions:
            continue
        kind = without_none(hints[field.name])
        settings: dict[str, Any] = {"default": field.default, "help": _help(texts[field.name], field.default)}
        if kind is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"type": _reader(kind), "metavar": _metavar(kind)}
        if field.name == positional:
            parser.add_argument(field.name, **settings | {"nargs": "?", "metavar": field.name.upper()})
        else:
            parser.add_argument(_flag(field.name), **settings)


def from_flags(config_class: type[Config], options: argparse.Namespace, **parts: Any) -> Config:
    """The configuration that the parsed flags say; `parts`: its fields that are configurations of their own.

    Raises:
        ConfigError: a value that the class refuses.
    """
    names = [field.name for field in fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: getattr(options, name) for name in names if hasattr(options, name)}, **parts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def field_texts(config_class: type) -> dict[str, str]:
    """What the `Args:` of a class's docstring says of each field."""
    section = (inspect.getdoc(config_class) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = {}
    for entry in re.split(r"^ {4}(?=\w)", section, flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        texts.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return texts


def _help(text: str, default: object) -> str:
    text = text.rstrip(".").replace("%", "%%")
    return text if default is None or isinstance(default, bool) else f"{text} (default: {default})"


def without_none(hint: Any) -> Any:
    """T of `T | None`; other types as they are."""
    members = [member for member in get_args(hint) if member is not NoneType]
    return members[0] if NoneType in get_args(hint) and len(members) == 1 else hint


def _reader(kind: Any) -> Callable[[str], Any]:
    """Reads a value of `kind` from text, or says what was expected."""
    choices = {str(choice): choice for choice in get_args(kind)} if get_origin(kind) is Literal else None

    def read(text: str) -> Any:
        try:
            return choices[text] if choices is not None else kind(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"expected {_expected(kind)}, got {text!r}") from None

    return read


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "an integer", float: "a number"}.get(kind, "text")


def _metavar(kind: Any) -> str:
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else METAVARS[kind]
