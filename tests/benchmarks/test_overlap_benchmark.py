"""What the benchmarks over two cores make of times; the processes that take them are not started here."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.benchmarks import bandwidth, overlap, overlap_gain
from lamina_jax.benchmarks.bandwidth import bandwidth_at, formula
from lamina_jax.benchmarks.columns import Column
from lamina_jax.benchmarks.processes import pinned
from lamina_jax.benchmarks.two_cores import PAGE_SIZE, Bench, balanced_context

BATCH = 512
LAYERS_US = 90_000.0


class FakeColumn(Column):
    """An ideal machine: layers take `LAYERS_US`, attention `per_token` for each token of the context."""

    def __init__(self, name, per_token, *, hidden=False, collocated=False, asked=None):
        self.name, self._per_token, self._hidden = name, per_token, hidden
        self._collocated = collocated
        self.asked = [] if asked is None else asked

    def ask(self, steps, *, context, batch=BATCH):
        self.asked.append(self.name)
        attention = self._per_token * context
        both = max(LAYERS_US, attention) if self._hidden else LAYERS_US + attention
        seconds = 1e-6 * (both / 2 if self._collocated else both) * steps
        taken = {
            "tokens_per_second": batch * steps / seconds,
            "seconds": seconds,
            "steps": steps,
            "cpus": 1.0,
        }
        if self._collocated:
            return taken
        others = dict.fromkeys(("wire_out", "wire_back", "exposed_wire", "host_per_hop"), 10.0)
        return {**taken, "timings": {"compute": LAYERS_US, "attention": attention, **others}}


class IdealBench(Bench):
    """The columns of `bench overlap`, on that machine."""

    def __init__(self, per_token):
        self.columns = ideal(per_token)


def ideal(per_token):
    asked = []
    return [
        *(
            FakeColumn(name, per_token, hidden=name.startswith(overlap.TWO), asked=asked)
            for name in overlap.SPLIT
        ),
        FakeColumn("collocated, 1 device", per_token, collocated=True, asked=asked),
    ]


@settings(deadline=None, max_examples=50)
@given(st.floats(LAYERS_US / 1000, LAYERS_US / 70))
def test_the_balanced_context_is_where_attention_takes_as_long(per_token):
    found = balanced_context(FakeColumn("x", per_token), 1024)
    assert found % PAGE_SIZE == 0
    assert abs(found - LAYERS_US / per_token) <= PAGE_SIZE / 2 + 1e-6


def test_ratios_of_an_ideal_machine():
    bench = IdealBench(LAYERS_US / 256)
    balanced, short = (overlap._measure(bench, 3, 0.5, context) for context in (256, 64))
    assert balanced["two / one"] == pytest.approx(2.0)
    assert balanced["two / collocated"] == pytest.approx(1.0)
    assert short["two / one"] == pytest.approx(1.25)
    assert short["two / collocated"] == pytest.approx(1.25 / 2)
    assert balanced["best"]["collocated"] == "collocated, 1 device"


def test_columns_are_timed_in_turn():
    bench = IdealBench(LAYERS_US / 256)
    overlap._measure(bench, 3, 0.5, 256)
    names = [column.name for column in bench.columns]
    assert bench.columns[0].asked == names * 4  # one turn to find out how many steps


def test_the_tables_name_what_was_missed(capsys):
    bench = IdealBench(LAYERS_US / 256)
    overlap._print([overlap._measure(bench, 3, 0.5, context) for context in (64, 256)], 64, BATCH, 3)
    said = capsys.readouterr().out
    assert "goal: two / one at least 1.8: 1.25 (missed)" in said
    assert "goal: two / collocated at least 0.95: 0.62 (missed)" in said
    assert "90.0" in said


def test_a_hop_says_how_many_layers_stay_hidden(capsys):
    hop = overlap._hop(FakeColumn("two", LAYERS_US / 256, hidden=True), 8, 256)
    assert hop["host_per_hop_us"] == 10.0
    assert f"hidden up to L x n = {LAYERS_US / 10:.0f}" in capsys.readouterr().out


def test_the_gain_is_taken_at_the_same_cache_for_each_g():
    shapes = {G: overlap_gain.COMPUTE_BOUND.num_heads // G for G in overlap_gain.PAPER}
    assert all(overlap_gain.KV_PER_ROW % (heads * PAGE_SIZE) == 0 for heads in shapes.values())


def test_the_formula():
    # G = 4, d = 512, 3 layers, float32: 2.5 * 4 * 512 * 3 = 15360 bytes for each row of a step
    assert formula(100, seconds=0.5) == pytest.approx(15360 * 100 / (0.2 * 0.5))


@settings(deadline=None, max_examples=50)
@given(st.floats(1e6, 1e9), st.lists(st.floats(1e5, 1e10), min_size=2, max_size=6, unique=True))
def test_the_bandwidth_at_a_slowdown_is_exact_where_sending_is_not_hidden(wanted, rates):
    """A step takes 1 s, and sending `0.2 wanted` bytes: 20 % more at the bandwidth `wanted`."""

    def slowdown(rate):
        return 1 + 0.2 * wanted / rate

    points = [{"bytes_per_second": rate, "slowdown": slowdown(rate)} for rate in sorted(rates, reverse=True)]
    found = bandwidth_at(1.2, [{"bytes_per_second": None, "slowdown": 1.0}, *points])
    if min(rates) < wanted * 0.999:
        assert found == pytest.approx(wanted, rel=1e-6)
    elif min(rates) > wanted * 1.001:
        assert found is None


def test_a_plot_without_matplotlib_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lamina_jax.benchmarks.bandwidth_plot", raising=False)
    parser = argparse.ArgumentParser()
    bandwidth.add_arguments(parser)
    with pytest.raises(SystemExit, match=r"matplotlib: install lamina_jax\[plots\]"):
        bandwidth.run(parser.parse_args(["--plot", "x.svg"]))


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from lamina_jax.benchmarks.bandwidth_plot import draw

    rates = {math.inf: 1.0, 100e6: 1.1, 50e6: 1.3}
    steps = [[0.1 * factor] * 3 for factor in rates.values()]
    curve = bandwidth._curve("one microbatch", list(rates), steps, BATCH, 80e6)
    assert 50e6 < curve["measured"] < 100e6
    file = Path(tmp_path, "plot.svg")
    draw([curve], 80e6, argparse.Namespace(plot=file, batch=BATCH, context=256))
    assert "one microbatch" in file.read_text()


def test_a_pinned_command_ends_with_its_parent():
    assert pinned(["a"], None) == ["a"]
    assert pinned(["a", "-b"], "1")[-5:] == ["--cores", "1", "--", "a", "-b"]
