"""Flags come from the fields of the configuration, and a wrong one is refused in one line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from lamina_jax.config import ConfigError, EngineConfig, SecurityConfig, ServerConfig
from lamina_jax.flags import field_texts
from lamina_jax.serve import parse


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_no_flags_give_the_defaults() -> None:
    assert parse([]) == (EngineConfig(), ServerConfig())


@pytest.mark.parametrize("config_class", [EngineConfig, ServerConfig, SecurityConfig])
def test_every_field_is_a_flag_with_help(config_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(config_class):
        if field.name not in ("model", "security"):
            assert f"--{field.name.replace('_', '-')} " in shown
            assert field_texts(config_class)[field.name].rstrip(".")[:30] in shown


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["some/folder"], "model", "some/folder"),
        (["--placement", "collocated"], "placement", "collocated"),
        (["--max-model-len", "256"], "max_model_len", 256),
        (["--memory-fraction", "0.5"], "memory_fraction", 0.5),
        (["--microbatches", "2"], "microbatches", 2),
        (["--microbatches", "auto"], "microbatches", "auto"),
        (["--compute-devices=cpu:0"], "compute_devices", "cpu:0"),
    ],
)
def test_engine_flags(argv: list[str], name: str, value: Any) -> None:
    engine, server = parse(argv)
    assert engine == EngineConfig(**{name: value})
    assert server == ServerConfig()


def test_server_flags() -> None:
    argv = ["--host", "0.0.0.0", "--insecure", "--port", "0", "--drain-seconds", "2.5"]
    assert parse(argv)[1] == ServerConfig(host="0.0.0.0", insecure=True, port=0, drain_seconds=2.5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prot", "1"], ["--prot"]),
        (["--max-model", "8"], ["--max-model"]),  # no abbreviations
        (["a", "b"], ["b"]),
        (["--port"], ["--port", "expected one argument"]),
        (["--port", "http"], ["--port", "an integer", "'http'"]),
        (["--port", "70000"], ["port", "70000"]),
        (["--drain-seconds", "-1"], ["drain_seconds", "-1"]),
        (["--drain-seconds", "nan"], ["drain_seconds", "nan"]),
        (["--request-seconds", "0"], ["request_seconds"]),
        (["--request-seconds", "soon"], ["--request-seconds", "a number", "'soon'"]),
        (["--microbatches", "3"], ["--microbatches", "auto, 1, 2", "'3'"]),
        (["--dtype", "int8"], ["--dtype", "float32", "'int8'"]),
        (["--max-num-seqs", "0"], ["max_num_seqs", "0"]),
        (["--memory-fraction", "2"], ["memory_fraction", "2"]),
        (["--log-format", "xml"], ["--log-format", "text, json", "'xml'"]),
        (["--host", "0.0.0.0"], ["0.0.0.0", "--api-key-file", "--insecure"]),
        (["--host", "::"], ["--insecure"]),
        (["--host", "example.org"], ["--insecure"]),
        (["--host", ""], ["--insecure"]),
    ],
)
def test_what_is_wrong_is_named(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *argv)
    for word in words:
        assert word in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_insecure(host: str) -> None:
    assert ServerConfig(host=host).host == host
    with pytest.raises(ConfigError):
        ServerConfig(host="10.0.0.1")
    assert ServerConfig(host="10.0.0.1", api_key_file="keys").host == "10.0.0.1"
