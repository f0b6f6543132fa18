"""Fields that clients know and this server does not honour: refused by name, unless they ask for nothing."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

Refused = Mapping[str, tuple[object, ...]]
"""Fields that ask for what there is not, and the values that ask for nothing; null always does."""

REFUSED: Refused = {
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}

REFUSED_IN_COMPLETIONS: Refused = {**REFUSED, "suffix": ("",)}

REFUSED_IN_CHAT: Refused = {
    **REFUSED,
    "audio": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def check_refused(body: Mapping[str, Any], refused: Refused) -> None:
    """Raises `PydanticCustomError` where a field of the body asks for what there is not."""
    for name, harmless in refused.items():
        if name in body and not _asks_for_nothing(body[name], harmless):
            raise _not_supported(name, body[name], harmless)


def _asks_for_nothing(value: object, harmless: tuple[object, ...]) -> bool:
    # True == 1 in Python, but a flag where a number belongs is a mistake.
    return value is None or any(value == known and type(value) is type(known) for known in harmless)


def _not_supported(name: str, value: object, harmless: tuple[object, ...]) -> PydanticCustomError:
    instead = " or ".join(json.dumps(choice) for choice in harmless) or "null"
    return refusal(name, f"{name}={reprlib.repr(value)} is not supported: leave it out or send {instead}")


def refusal(name: str | None, message: str) -> PydanticCustomError:
    """Of a field of what is validated; None: of that itself. Braces of a value are no places of the text."""
    return PydanticCustomError("not_supported", "{message}", {"param": name, "message": message})
