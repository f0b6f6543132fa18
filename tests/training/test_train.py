"""The command: its phases, its refusals."""

from __future__ import annotations

import argparse

import pytest

from lamina_jax.train import arguments, main, parse_phases
from lamina_jax.training.loop import Phase


def test_phases_are_lengths_and_minutes() -> None:
    assert parse_phases("256:70,1024:2.5") == [Phase(256, 70.0), Phase(1024, 2.5)]


@pytest.mark.parametrize("text", ["256", "256:x", "0:1", "4096:1", "256:0", "256:inf", "", "256:1:2"])
def test_other_phases_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"256:70,1024:25|a length must be"):
        parse_phases(text)


def test_out_is_needed_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "give --out DIR" in capsys.readouterr().err


def test_help_shows_the_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--export", "--evaluate"))
    assert "128:3,256:23,1024:11,2048:8" in text
