"""The attention worker's command: its flags, and what it refuses before it serves."""

from __future__ import annotations

import socket
from dataclasses import fields

import pytest
from echo_session import EchoSession

from lamina_jax.attend import parse, run
from lamina_jax.config import AttendConfig, ConfigError, SecurityConfig, host_and_port
from lamina_jax.flags import field_texts


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line with which a start is refused, exit code 1."""
    assert run(*parse(flags), EchoSession) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]) == (AttendConfig(), SecurityConfig())
    assert parse(["--listen", "[::1]:0", "--metrics-port", "0", "--token-file", "t"]) == (
        AttendConfig(listen="[::1]:0", metrics_port=0),
        SecurityConfig(token_file="t"),
    )
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for config_class in (AttendConfig, SecurityConfig):
        for field in fields(config_class):
            assert f"--{field.name.replace('_', '-')} " in shown
            assert field_texts(config_class)[field.name].rstrip(".")[:30] in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "7101"], "listen='7101': expected 'host:port'"),
        (["--listen", "::1:7101"], "listen="),
        (["--data-port", "70000"], "data_port must be in 0 .. 65535, got 70000"),
        (["--metrics-port", "-1"], "metrics_port"),
        (["--memory-fraction", "1.5"], "memory_fraction must be in (0, 1], got 1.5"),
        (["--drain-seconds", "nan"], "drain_seconds"),
        (["--tls-cert", "c.pem"], "tls_cert and tls_key belong together"),
        (["--model", "bundled"], "--model"),
    ],
)
def test_a_wrong_flag_ends_with_code_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, name in (("--data-port", "data_port"), ("--metrics-port", "metrics_port")):
            line = refused(capsys, "--listen", "127.0.0.1:0", flag, str(port))
            assert line.startswith(f"error: {name}: port {port} on 127.0.0.1 is in use")
        assert "listen: port" in refused(capsys, "--listen", f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:0"], "'0.0.0.0' can be reached from other machines"),
        (["--listen", "no.such.host.invalid:0", "--insecure"], "no.such.host.invalid cannot be listened on"),
        (["--listen", "127.0.0.1:0", "--devices", "cpu:99"], "there is no cpu:99"),
        (["--listen", "127.0.0.1:0", "--devices", "abacus"], "no 'abacus' devices"),
        (["--listen", "127.0.0.1:0", "--token-file", "/nowhere"], "token_file='/nowhere' cannot be read"),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *flags)


def test_addresses() -> None:
    assert host_and_port("listen", "127.0.0.1:0") == ("127.0.0.1", 0)
    assert host_and_port("listen", "[::1]:7101") == ("::1", 7101)
    assert host_and_port("listen", "worker-3.pool:7101") == ("worker-3.pool", 7101)
    for wrong in ("", ":1", "host", "host:", "host:x", "host:70000", "::1:1", "[h]:1x", "[]:1"):
        with pytest.raises(ConfigError, match="expected 'host:port'"):
            host_and_port("listen", wrong)
