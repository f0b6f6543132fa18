"""`--quick` of every benchmark gives other defaults, and a flag beside it holds."""

from __future__ import annotations

import argparse
import importlib

import pytest

from lamina_jax.bench import BENCHMARKS
from lamina_jax.benchmarks import kernels
from lamina_jax.benchmarks.kernel_passes import Cell
from lamina_jax.benchmarks.quick import add_quick, parse


def parser_of(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lamina_jax.benchmarks.{name}").add_arguments(parser)
    return parser


def test_a_flag_that_is_given_holds() -> None:
    def parsed(*flags: str) -> tuple[int, float]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--seconds", type=float, default=2.0)
        add_quick(parser, "less", rounds=1, seconds=0.1)
        args = parse(parser, flags)
        return args.rounds, args.seconds

    assert parsed() == (5, 2.0)
    assert parsed("--quick") == (1, 0.1)
    assert parsed("--quick", "--rounds", "5") == parsed("--rounds", "5", "--quick") == (5, 0.1)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if "--quick" in parser_of(name).format_help()])
def test_quick_names_arguments_that_there_are(name: str) -> None:
    usual, quick = (vars(parse(parser_of(name), flags)) for flags in ([], ["--quick"]))
    assert set(quick["quick"]) <= set(usual)
    assert all(quick[argument] == value != usual[argument] for argument, value in quick["quick"].items())


def test_a_quick_run_of_the_kernels_takes_what_is_said() -> None:
    def cells(*flags: str) -> list[Cell]:
        return kernels._cells(parse(parser_of("kernels"), ["--quick", *flags]), "cpu")

    assert len(cells()) == len(kernels.QUICK["cpu"]) + 2
    assert {cell.batch for cell in cells("--batch", "3", "5")} == {3, 5}
    assert cells("--batch", "3", "--context", "64", "--group", "2") == [Cell(3, 64, 2)]
