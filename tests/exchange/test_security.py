"""What the settings of tokens, certificates and addresses allow, and how they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.config import ConfigError, SecurityConfig
from lamina_jax.exchange.security import (
    check_address,
    client_tls,
    read_token,
    server_tls,
    shows_token,
    token_metadata,
)

TOKENS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)


@given(TOKENS, TOKENS)
def test_only_the_same_token_is_let_in(token: str, other: str) -> None:
    assert shows_token((("user-agent", "x"), *token_metadata(token)), token)
    assert shows_token(token_metadata(other), token) == (other == token)
    assert not shows_token((), token)
    assert not shows_token((("authorization", token),), token)
    assert shows_token(token_metadata(other), None)


def test_a_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(" s3cret \n")
    path.chmod(0o640)
    assert read_token(SecurityConfig(token_file=str(path))) == "s3cret"
    assert read_token(SecurityConfig()) is None


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"", 0o600, "holds no secret"),
        (b" \n\n", 0o600, "holds no secret"),
        (b"one\ntwo", 0o600, "one line of printable ASCII"),
        ("schlüssel".encode(), 0o600, "cannot be read"),
        (b"secret", 0o644, "every user of this machine: chmod o-r"),
        (None, 0, "cannot be read.*No such file"),
    ],
)
def test_token_files_that_are_refused(tmp_path: Path, content: bytes | None, mode: int, words: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=words) as refusal:
        read_token(SecurityConfig(token_file=str(path)))
    assert str(path) in str(refusal.value)


def test_addresses() -> None:
    token = SecurityConfig(token_file="t")
    certificate = SecurityConfig(tls_ca="ca")
    both = SecurityConfig(token_file="t", tls_cert="c", tls_key="k")
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        check_address(host, SecurityConfig(), "listen")
    for host in ("0.0.0.0", "::", "10.0.0.1", "worker.example", ""):
        check_address(host, both, "listen")
        check_address(host, SecurityConfig(insecure=True), "listen")
        for security, missing in ((token, "--tls-ca"), (certificate, "--token-file")):
            with pytest.raises(ConfigError, match=rf"^listen: '{host}' .*{missing}.*--insecure"):
                check_address(host, security, "listen")


def test_certificate_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert server_tls(SecurityConfig()) is None
    assert client_tls(SecurityConfig()) is None
    with pytest.raises(ConfigError, match="give tls_cert and tls_key"):
        server_tls(SecurityConfig(tls_ca="ca.pem"))
    with pytest.raises(ConfigError, match="give tls_ca too"):
        client_tls(SecurityConfig(tls_cert="c.pem", tls_key="k.pem"))
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for path in (str(garbage), str(tmp_path / "missing.pem")):
        with pytest.raises(ConfigError, match=path):
            client_tls(SecurityConfig(tls_ca=path))
        with pytest.raises(ConfigError, match=path):
            server_tls(SecurityConfig(tls_cert=path, tls_key=path))
