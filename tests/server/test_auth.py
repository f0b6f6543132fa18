"""API keys: which files are refused, which requests, and that no key is ever told."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import FakeEngine, continuation, running
from starlette.responses import PlainTextResponse

from lamina_jax.config import ConfigError
from lamina_jax.serve import main
from lamina_jax.server.api_keys import read_keys
from lamina_jax.server.auth import KeyGuard

KEY, OTHER = "k" * 16, "0123456789abcdef0123456789abcdef"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(f"# of the first team\n{KEY}\n\n   {OTHER}  \n#{'x' * 20}\n")
    return path


def ask(
    keys: tuple[bytes, ...], path: str = "/v1/models", method: str = "GET", **headers: str
) -> httpx.Response:
    guard = KeyGuard(PlainTextResponse("inside"), keys)

    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://a") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize("shown", [f"Bearer {KEY}", f"bearer {OTHER}", f"BEARER   {KEY}"])
def test_each_key_opens(file: Path, shown: str) -> None:
    assert ask(read_keys(str(file)), authorization=shown).text == "inside"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}k"},
        {"authorization": f"Bearer {KEY}, Bearer {OTHER}"},
        {"authorization": f"Bearer #{'x' * 20}"},
        {"x-api-key": KEY},
    ],
)
def test_nothing_else_does(file: Path, headers: dict[str, str]) -> None:
    response = ask(read_keys(str(file)), **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_api_key",
        None,
    )
    assert KEY[:-1] not in response.text


def test_a_header_that_is_no_ascii(file: Path) -> None:
    async def call() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/stats", "method": "GET"}
        scope["headers"] = [(b"authorization", b"Bearer \xff\xfe" + KEY.encode())]
        await KeyGuard(PlainTextResponse("inside"), read_keys(str(file)))(scope, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(call())[0]["status"] == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_who_looks_after_the_server_needs_no_key(file: Path, path: str) -> None:
    keys = read_keys(str(file))
    assert ask(keys, path).text == "inside"
    assert ask(keys, f"{path}/").status_code == 401
    assert ask(keys, method="OPTIONS").text == "inside"


@pytest.mark.parametrize("path", ["/metrics", "/stats", "/openapi.json", "/docs", "/nothing", "//health"])
def test_everything_else_does(file: Path, path: str) -> None:
    assert ask(read_keys(str(file)), path).status_code == 401


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no key"),
        (b"\n# only a comment\n  \n", "holds no key"),
        (b"# first\n" + b"k" * 15, "line 2 has less than 16"),
        (KEY.encode() + b"\n\nsecret word that has blanks\n", "line 3 is no key"),
        ("schlüsselschlüssel".encode(), "line 1 is no key"),
    ],
)
def test_a_file_that_is_refused_names_the_line_and_not_the_key(
    file: Path, content: bytes, problem: str
) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as refused:
        read_keys(str(file))
    assert "secret" not in str(refused.value)
    assert "kkk" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file='.*none' cannot be read: No such file"):
        read_keys(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_keys(str(tmp_path))


def test_a_file_that_everybody_can_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_keys(str(file))
    assert not caplog.records
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_keys(str(file))
    assert "chmod o-r" in caplog.text
    assert KEY not in caplog.text


def test_a_server_with_keys(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From the file to the answers; nothing that it says or prints holds a key."""
    with running(FakeEngine().build, api_key_file=str(file)) as server:
        body = {"model": "fake", "prompt": "abc", "max_tokens": 4}
        shown = {"authorization": f"Bearer {OTHER}"}
        refused = server.client.post("/v1/completions", json=body)
        assert refused.status_code == 401
        assert refused.headers["x-request-id"]
        assert server.client.get("/stats").status_code == server.client.get("/metrics").status_code == 401
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200
        answer = server.client.post("/v1/completions", json=body, headers=shown)
        assert answer.json()["choices"][0]["text"] == continuation("abc", 4)
        pages = [server.client.get(path, headers=shown) for path in ("/stats", "/metrics", "/v1/models")]
        assert [page.status_code for page in pages] == [200] * 3
    printed = capfd.readouterr()
    for text in (answer.text, *(page.text for page in pages), printed.out, printed.err):
        assert KEY not in text
        assert OTHER not in text


def test_the_command_refuses_a_wrong_file_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "0", "--api-key-file", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: api_key_file=")
    assert printed.count("\n") == 1
