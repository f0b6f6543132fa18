"""Runs a chat template, which is a program from whoever made the checkpoint, sandboxed and bounded.

The sandbox reaches no attribute that begins with an underscore, changes no argument, and loads nothing.
Bounded are a rendering's CPU time (looked at before every turn of a loop and every call), the length of its
text, and what `*` makes; `**` is refused. Not bounded is what one operation does by itself: a filter over
a long list ends late, and a text that is doubled again and again may use up the memory before its time.

Imported only where a chat is rendered, so that the library does without jinja2 until then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_SECONDS = 2.0
"""CPU time of one rendering; ordinary ones take a few milliseconds."""

MAX_CHARACTERS = 10 * 2**20

LARGEST_PRODUCT = 2**24
"""Of `*`, whether it multiplies numbers or repeats a text."""

DEADLINE = "deadline "
"""In the variables of a rendering; the blank keeps it out of the template's reach."""


def compile_template(source: str) -> jinja2.Template:
    """Raises `jinja2.TemplateSyntaxError`."""
    return _Environment().from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        ValueError: the template refuses its variables, fails, or takes too long; with its own reason.
    """
    pieces, length = [], 0
    try:
        for piece in template.generate({**variables, DEADLINE: time.thread_time() + RENDER_SECONDS}):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_CHARACTERS} characters")
    except Exception as error:  # a stranger's program may raise anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"messages: the model's chat template cannot write them: {reason}") from error
    return "".join(pieces)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what a model is trained on; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """With what checkpoints expect: the blanks, filters and functions that transformers gives them."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.filters |= {"tojson": _to_json, "bounded": _bounded}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "bounded", [], [], None, None, lineno=loop.lineno)
        template.set_environment(self)
        return template

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_deadline(context)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("** is not allowed in a chat template")
        left_size, right_size = (
            len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)
        )
        if left_size * right_size > LARGEST_PRODUCT:
            raise jinja2.TemplateRuntimeError(f"* makes more than {LARGEST_PRODUCT}")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _bounded(context: Context, items: Iterable[Any]) -> Any:
    """The items of a loop, while there is time; undefined ones are left to the loop to speak of."""
    if isinstance(items, jinja2.Undefined):
        return items
    if hasattr(items, "__len__"):
        return _Bounded(context, items)
    return _turns(context, items)


class _Bounded:
    """Items whose number a loop may ask for."""

    def __init__(self, context: Context, items: Any) -> None:
        self._context, self._items = context, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _turns(self._context, self._items)


def _turns(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_deadline(context)
        yield item


def _check_deadline(context: Context) -> None:
    if time.thread_time() > context[DEADLINE]:
        raise jinja2.TemplateRuntimeError(f"it took more than {RENDER_SECONDS} s")


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it stands: jinja2's own filter writes it for the inside of HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
