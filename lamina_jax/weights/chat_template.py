"""How a checkpoint writes a conversation as one prompt: its chat template, and the messages it may be given.

Messages have OpenAI's form. Knows nothing of HTTP or of token ids; runs the template by `jinja_sandbox`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina_jax.config import CheckpointError

if TYPE_CHECKING:
    import jinja2

ROLES = ("system", "developer", "user", "assistant", "tool")
PASSED_ON = ("role", "content", "name", "tool_call_id", "reasoning_content")
"""Keys of a message that the template is given; a message with others, if they are not empty, is refused."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may write (`bos_token`, `eos_token`, ...). Plain data."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. It holds its own special tokens: encode it without adding any.

        Args:
            messages: `{"role", "content"}` mappings; content is a string or a list of
                `{"type": "text", "text"}` parts, which are joined by line breaks. A "developer" is called
                "system" where the template does not know that role.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: more that this template looks at, such as `enable_thinking`.

        Raises:
            ValueError: a message that cannot be honoured, by its place; a template that refuses the
                conversation, is malformed, or takes too long.
        """
        from lamina_jax.weights.jinja_sandbox import render

        system = "developer" if "developer" in self.source else "system"
        plain = [_message(f"messages[{i}]", message, system) for i, message in enumerate(messages)]
        if not plain:
            raise ValueError("messages must hold at least one message")
        given = {"messages": plain, "add_generation_prompt": add_generation_prompt}
        return render(self._compiled, {**(variables or {}), **self.special_tokens, **given})

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        from lamina_jax.weights.jinja_sandbox import compile_template

        try:
            return compile_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"this model's chat template is malformed: {error} (line {error.lineno})"
            ) from None


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The folder's template, from chat_template.jinja or else tokenizer_config.json; None if it has none.

    Raises:
        CheckpointError: tokenizer_config.json is malformed.
    """
    config = _tokenizer_config(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _named(config.get("chat_template"))
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    tokens = {key: _text_of_token(value) for key, value in config.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: text for key, text in tokens.items() if text is not None})


def _tokenizer_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no object")
    return config


def _named(templates: Any) -> Any:
    """The template "default" of a list of named ones."""
    if not isinstance(templates, list):
        return templates
    named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    return named.get("default")


def _text_of_token(token: Any) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _message(where: str, message: Mapping[str, Any], system: str) -> dict[str, Any]:
    """A message as templates know them, all content one string."""
    given = {key: value for key, value in message.items() if value not in (None, [], {})}
    if unknown := [key for key in given if key not in PASSED_ON]:
        raise ValueError(f"{where}.{unknown[0]} is not supported: leave it out")
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}; got {reprlib.repr(role)}")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(given.get(key, ""), str):
            raise ValueError(f"{where}.{key} must be a string, got {reprlib.repr(given[key])}")
    role = system if role == "developer" else role
    return {**given, "role": role, "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a string or a list of text parts, got {reprlib.repr(content)}")
    return "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f'{where} must be {{"type": "text", "text": ...}}, got {reprlib.repr(part)}')
    if part["type"] != "text":
        raise ValueError(f"{where}: parts of type {part['type']!r} are not supported, only 'text'")
    if not isinstance(part.get("text"), str) or not part.keys() <= {"type", "text"}:
        raise ValueError(
            f"{where} must hold type and text, a string, and nothing else; got {reprlib.repr(part)}"
        )
    return part["text"]
