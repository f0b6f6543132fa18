"""Chat templates: where they are found, what they are given, what they refuse, and what bounds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.models.hf_config import CheckpointError
from lamina_jax.weights import jinja_sandbox
from lamina_jax.weights.chat_template import ChatTemplate, load_chat_template
from lamina_jax.weights.hub import find_model

PLAIN = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


def rendered(source: str, messages: list[Any] = HELLO, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_the_bundled_models_template() -> None:
    template = load_chat_template(find_model("bundled"))
    assert template is not None
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = "<|bos|><|system|>Be brief.<|eos|><|user|>hello<|eos|>"
    assert template.render(messages) == expected + "<|assistant|>"
    assert template.render(messages, add_generation_prompt=False) == expected
    with pytest.raises(ValueError, match="unknown role: tool"):
        template.render([{"role": "tool", "content": "3"}])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (PLAIN, PLAIN),
        ([{"name": "tools", "template": "x"}, {"name": "default", "template": PLAIN}], PLAIN),
        ([{"name": "tools", "template": "x"}], None),
        (None, None),
    ],
)
def test_where_a_template_is_found(tmp_path: Path, written: object, expected: str | None) -> None:
    config = {"chat_template": written, "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    found = load_chat_template(tmp_path)
    assert (found and found.source) == expected
    if found:
        assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    beside = load_chat_template(tmp_path)
    assert beside is not None
    assert beside.render(HELLO) == "</s>"


def test_a_folder_without_any(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"chat_template": 3}'])
def test_a_malformed_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path)


def test_what_transformers_gives_a_template() -> None:
    assert rendered("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert (
        rendered("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    )
    assert rendered("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert rendered("{{ strftime_now('%Y') | length }}") == "4"
    assert rendered("{% generation %}{{ bos_token }}{% endgeneration %}") == "<s>"
    assert rendered("{{ thinking is defined }}", variables={"thinking": 1}) == "True"
    assert rendered("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n * 3 }}") == "6"
    assert rendered(
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }}{% endfor %}"
    ) == ("1/1 True")
    assert rendered("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% else %}none{% endfor %}") == "x1"
    assert rendered("{% for x in nothing %}{% else %}none{% endfor %}") == "none"


@given(st.lists(st.text(max_size=9), min_size=1, max_size=4))
def test_parts_are_joined_by_line_breaks(texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    joined = [{"role": "user", "content": "\n".join(texts)}]
    assert rendered(PLAIN, [{"role": "user", "content": parts}]) == rendered(PLAIN, joined)


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    message = [{"role": "developer", "content": "a"}]
    assert rendered(PLAIN, message) == "[system]a"
    assert rendered(PLAIN + "{# developer #}", message) == "[developer]a"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": "a"}, r"messages\[0\]\.role must be one of system"),
        ({"role": "robot", "content": "a"}, r"messages\[0\]\.role .* got 'robot'"),
        ({"role": "user"}, r"messages\[0\]\.content must be a string"),
        ({"role": "user", "content": 3}, r"messages\[0\]\.content must be a string"),
        ({"role": "user", "content": "a", "name": 3}, r"messages\[0\]\.name must be a string"),
        ({"role": "user", "content": [{"text": "a"}]}, r"messages\[0\]\.content\[0\] must be"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[0\]\.content\[0\] must hold"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            r"messages\[0\]\.content\[0\]: parts of type 'image_url' are not supported",
        ),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, r"messages\[0\]\.tool_calls is not"),
    ],
)
def test_a_message_that_cannot_be_honoured_is_named(message: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rendered(PLAIN, [message])


def test_an_answer_may_be_sent_back_with_its_empty_fields() -> None:
    answer = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "audio": None}
    assert rendered(PLAIN, [answer]) == "[assistant]a"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{{ 'a' + none }}", "NoneType"),
        ("{% if %}", r"malformed: .*line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 2 ** 8 }}", r"\*\* is not allowed"),
        ("{{ 'a' * 999999999 }}", "makes more than"),
        (
            "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
            "makes",
        ),
        ("{{ range(999999) }}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_fails_says_why(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}" + "{% endfor %}" * 3,
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "RENDER_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"more than 0\.1 s|recursion"):
        rendered(source)


def test_a_template_that_writes_too_much_is_ended() -> None:
    with pytest.raises(ValueError, match="characters"):
        rendered(
            "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
            [{"role": "user", "content": "a" * 1000}],
        )
