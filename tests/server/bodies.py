"""Strategies of request bodies: right ones, nearly right ones, and bytes that only look like JSON."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

from fake_server import MODEL
from hypothesis import strategies as st

PATHS = ("/v1/completions", "/v1/chat/completions")

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 20, 21, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(-5, 200),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\ud800", "a\udfff", "\x00", "{", "%s", "{0}", "#" * 500])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)

PROMPTS = st.one_of(
    st.text("abcdefgh ", min_size=1, max_size=12),
    st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=12),
    st.lists(st.text("abcdefgh", min_size=1, max_size=5), min_size=1, max_size=3),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "none"]),
            "content": st.text("abc", max_size=5)
            | st.lists(
                st.fixed_dictionaries({"type": st.just("text"), "text": st.text("ab", max_size=4)}),
                max_size=2,
            ),
        }
    ),
    min_size=1,
    max_size=3,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 12),
    "min_tokens": st.integers(0, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 100),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 2),
    "logit_bias": st.dictionaries(st.integers(0, 95).map(str), st.floats(-100, 100), max_size=3),
    "stop": TEXTS | st.lists(TEXTS, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 95), max_size=3),
    "ignore_eos": st.booleans(),
    "prompt_logprobs": st.integers(0, 3),
    "add_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "stream": st.booleans(),
    "user": TEXTS,
}
COMPLETION_FIELDS = {"prompt": PROMPTS, "echo": st.booleans(), "logprobs": st.integers(0, 3)}
CHAT_FIELDS = {
    "messages": MESSAGES,
    "logprobs": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["bos_token", "x", "messages"]), VALUES, max_size=2
    ),
}
NAMES = [
    *FIELDS,
    *COMPLETION_FIELDS,
    *CHAT_FIELDS,
    "model",
    "tools",
    "suffix",
    "best_of",
    "stream_options",
    "x",
    "",
]


@cache
def right(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies whose every field has a value of its type and range."""
    own = COMPLETION_FIELDS if path == PATHS[0] else CHAT_FIELDS
    needed = {"model": st.just("fake"), next(iter(own)): own[next(iter(own))]}
    optional = {**FIELDS, **{name: own[name] for name in own if name not in needed}}
    return st.fixed_dictionaries(needed, optional=optional)


@cache
@st.composite
def wrong(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A right body in which a few fields have become something else, are gone, or are new."""
    body = draw(right(path))
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)):
        body[name] = draw(VALUES)
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[name]
    return body


@cache
@st.composite
def broken(draw: st.DrawFn, path: str) -> bytes:
    """Bytes that are nearly a body: cut off, changed, nested deep, or anything."""
    text = json.dumps(draw(wrong(path))).encode()
    match draw(st.integers(0, 4)):
        case 0:
            return text[: draw(st.integers(0, len(text)))]
        case 1:
            at = draw(st.integers(0, len(text)))
            return text[:at] + draw(st.binary(min_size=1, max_size=4)) + text[at + 1 :]
        case 2:
            depth = draw(st.sampled_from([10, 200, 2_000, 50_000]))
            opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
            nested = opening * depth + b"1" + closing * depth
            return (
                b'{"model": "fake", "prompt": "a", "'
                + draw(st.sampled_from(NAMES)).encode()
                + b'": '
                + nested
                + b"}"
            )
        case 3:
            return (
                b'{"model": "fake", "prompt": "a", "max_tokens": ' + b"9" * draw(st.integers(1, 5_000)) + b"}"
            )
    return draw(st.binary(max_size=40))


CONTENT_TYPES = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-16",
        "application/json; charset=none",
        "application/vnd.api+json",
        "text/plain",
        "multipart/form-data; boundary=a",
        "application/x-www-form-urlencoded",
        "\xff",
        "",
    ]
)


@st.composite
def any_request(draw: st.DrawFn) -> tuple[str, bytes, str]:
    """(path, body, content type)"""
    path = draw(st.sampled_from(PATHS))
    match draw(st.integers(0, 3)):
        case 0:
            return path, json.dumps(draw(right(path))).encode(), "application/json"
        case 1:
            return path, json.dumps(draw(wrong(path))).encode(), "application/json"
        case 2:
            return path, draw(broken(path)), "application/json"
    return path, json.dumps(draw(st.one_of(right(path), VALUES))).encode(), draw(CONTENT_TYPES)
