"""The times of a step: what they add up to, on a made-up clock and between real workers, and the trace."""

from __future__ import annotations

import gc
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALL, TINY, save_random

from lamina_jax import LLM, SamplingParams
from lamina_jax.config import AttendConfig, ConfigError, EngineConfig, SecurityConfig
from lamina_jax.exchange import timings as timings_module
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.timeline import FIGURES, Timeline
from lamina_jax.exchange.timings import STEPS, Timings, clock_offset
from lamina_jax.worker.server import WorkerServer
from lamina_jax.worker.session import Session

LAYERS = 3
AHEAD = (5_000, -7_000)
"""Of the made-up workers' clocks."""


@dataclass
class Simulation:
    """A decode loop, its compute mesh and its workers, as plain numbers; what they do is noted in `timings`.

    The loop's own work takes no time, so that what is true can be said to the nanosecond. `draw` gives how
    long anything takes.
    """

    microbatches: int
    workers: int
    draw: Any
    send: int = 0
    guesses: tuple[int, ...] = AHEAD
    now: int = 1000
    mesh_free: int = 0
    sender_free: int = 0
    compute: dict[Any, list[range]] = field(default_factory=lambda: defaultdict(list))
    attention: dict[Any, list[range]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[Any, list[range]] = field(default_factory=lambda: defaultdict(list))
    out: dict[Any, list[int]] = field(default_factory=lambda: defaultdict(list))
    back: dict[Any, list[int]] = field(default_factory=lambda: defaultdict(list))

    def run(self, steps: int) -> Timeline:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timings_module, "monotonic_ns", lambda: self.clock)
            timings = self.timings = Timings(LAYERS, [f"worker{w}" for w in range(self.workers)])
            timings.restart(self.guesses[: self.workers], lambda: 0)
            self.worker_free = [0] * self.workers
            self.arrives: dict[Any, list[tuple[int, int, int]]] = {}
            headers: dict[int, Header] = {}
            for step in range(steps):
                self.clock = self.now
                timings.begin_step(step)
                for j in range(self.microbatches):
                    if step:
                        self.wait(headers[j], step - 1, LAYERS - 1)
                    self.clock = self.now
                    headers[j] = Header(Kind.BEGIN, 0, j, 0, 1 + step * self.microbatches + j)
                    timings.begin(headers[j])
                    self.slice(headers[j], step, 0)
                timings.begin_layers()
                for layer in range(1, LAYERS):
                    for j in range(self.microbatches):
                        self.wait(headers[j], step, layer - 1)
                        self.slice(headers[j], step, layer)
                timings.end_dispatch()
                if step:
                    timings.end_step()
            for header in headers.values():
                self.wait(header, steps - 1, LAYERS - 1)
            timings.end_step()
            return Timeline(timings)

    def slice(self, header: Header, step: int, layer: int) -> None:
        key = step, header.microbatch, layer
        given_ns, start = self.now, max(self.now, self.mesh_free)
        q = start + self.draw()
        self.mesh_free = q + self.draw()
        self.compute[key] += [range(start, q), range(q, self.mesh_free)]
        self.arrives[key] = []
        for w in range(self.workers):
            sent = self.sends(w, header._replace(kind=Kind.QUERY, layer=layer), given_ns, q)
            received = max(sent + self.draw(), self.worker_free[w])
            done = self.worker_free[w] = received + self.draw()
            self.attention[key].append(range(received, done))
            self.out[key].append(received - q)
            self.arrives[key].append((received, done, done + self.draw()))
        for w in range(self.workers):
            self.sends(w, header._replace(kind=Kind.KV, layer=layer), given_ns, self.mesh_free)

    def sends(self, worker: int, header: Header, given_ns: int, ready: int) -> int:
        taken = max(given_ns, self.sender_free)
        self.clock = self.sender_free = max(taken, ready) + self.send
        self.timings.workers[worker].sent(header, given_ns if ready <= taken else ready)
        return self.clock

    def wait(self, header: Header, step: int, layer: int) -> None:
        key = step, header.microbatch, layer
        wanted = header._replace(kind=Kind.ANSWER, layer=layer)
        for w, (received, done, arrives) in enumerate(self.arrives[key]):
            waited = self.clock = self.now
            self.timings.workers[w].waits(wanted)
            self.now = self.clock = max(self.now, arrives)
            times = {"received_ns": received + AHEAD[w], "done_ns": done + AHEAD[w]}
            self.timings.workers[w].answered(wanted._replace(**times))
            self.waits[key].append(range(waited, self.now))
            self.back[key].append(self.now - max(done, waited))

    def truth(self, key: tuple[int, int, int]) -> dict[str, int]:
        """The figures of one layer, counted nanosecond by nanosecond where one may hide another."""
        busy = {
            t for spans in (self.compute, self.attention) for some in spans.values() for s in some for t in s
        }
        return {
            "compute": sum(len(s) for s in self.compute[key]),
            "wire_out": max(self.out[key]),
            "attention": max(len(s) for s in self.attention[key]),
            "wire_back": max(self.back[key]),
            "exposed_wire": sum(t not in busy for s in self.waits[key] for t in s),
        }


def simulation(data: st.DataObject, **fields: Any) -> Simulation:
    longest = st.integers(1, data.draw(st.sampled_from([3, 60])))
    sizes = {
        "microbatches": data.draw(st.integers(1, 3), "n"),
        "workers": data.draw(st.integers(1, 2), "W"),
    }
    return Simulation(**{**sizes, **fields}, draw=lambda: data.draw(longest))


def parts(spans: Any) -> list[tuple[int, int]]:
    there = spans.end > 0
    return sorted(zip(spans.start[there].tolist(), spans.end[there].tolist(), strict=True))


@settings(max_examples=40)
@given(st.data())
def test_each_figure_of_each_layer_is_what_happened(data: st.DataObject) -> None:
    simulated = simulation(data)
    timeline = simulated.run(steps=2)
    assert timeline.layers.size == 2 * simulated.microbatches * LAYERS
    for layer in timeline.layers.reshape(-1):
        key = tuple(int(layer[name]) for name in ("step", "microbatch", "layer"))
        assert {name: int(layer[name]) for name in FIGURES} == simulated.truth(key), key
    mean = timeline.sums()
    for name in FIGURES:
        assert mean[name] == pytest.approx(timeline.layers[name].sum() / 2 / 1e3)
    last = max(simulated.now, simulated.mesh_free)
    assert mean["step"] == pytest.approx((last - 1000) / 2 / 1e3)


@settings(max_examples=30)
@given(st.data(), st.integers(0, 200), st.lists(st.integers(-20_000, 20_000), min_size=2, max_size=2))
def test_no_time_is_negative_however_slow_the_sender_and_wrong_the_clocks(
    data: st.DataObject, send: int, guesses: list[int]
) -> None:
    timeline = simulation(data, send=send, guesses=tuple(guesses)).run(steps=2)
    for name in ("compute", "send", "wire_out", "attention", "wire_back", "wait", "steps"):
        assert all(start <= end for start, end in parts(getattr(timeline, name))), name
    for spans in (timeline.compute, timeline.send, timeline.wait):
        assert all(before[1] <= after[0] for before, after in pairwise(parts(spans)))
    wait = timeline.wait.length.sum(axis=2)
    assert (timeline.layers["exposed_wire"] >= 0).all()
    assert (timeline.layers["exposed_wire"] <= wait).all()


@settings(max_examples=20)
@given(st.data(), st.integers(-20_000, 20_000))
def test_a_wrong_clock_moves_time_between_the_two_ways_only(data: st.DataObject, guess: int) -> None:
    simulated = simulation(data, microbatches=1, workers=1, guesses=(guess,))
    timeline = simulated.run(steps=2)
    both = timeline.layers["wire_out"] + timeline.layers["wire_back"]
    for layer, total in zip(timeline.layers.reshape(-1), both.reshape(-1).tolist(), strict=True):
        truth = simulated.truth(tuple(int(layer[name]) for name in ("step", "microbatch", "layer")))
        assert total == truth["wire_out"] + truth["wire_back"]
        assert layer["attention"] == truth["attention"]
        assert layer["exposed_wire"] <= truth["wire_out"] + truth["wire_back"]


def test_the_last_steps_are_kept_and_those_that_end() -> None:
    simulated = Simulation(microbatches=3, workers=2, draw=lambda: 2)
    timeline = simulated.run(steps=STEPS + 30)
    assert np.unique(timeline.rows["step"]).tolist() == list(range(30, STEPS + 30))
    assert timeline.sums()["steps"] == STEPS
    timings = simulated.timings
    timings.begin_step(STEPS + 30)
    timings.begin(Header(Kind.BEGIN, 0, 0, 0, 3 * (STEPS + 30) + 1))
    assert Timeline(timings).sums()["steps"] == STEPS, (
        "a step under way counts, or has cost one that had ended"
    )
    timings.restart((0, 0), lambda: 0)
    assert Timeline(timings).sums() == {"steps": 0, **dict.fromkeys(FIGURES, 0.0), "step": 0.0}


def test_host_time_is_of_both_threads_and_leaves_waits_out() -> None:
    timings, sender_cpu_ns = Timings(3, ["worker"]), [0]
    timings.restart([0], lambda: sender_cpu_ns[0])
    for step in range(4):
        timings.begin_step(step)
        for microbatch in range(2):
            timings.begin(Header(Kind.BEGIN, 0, microbatch, step=2 * step + microbatch))
        sender_cpu_ns[0] += 40_000_000
        timings.begin_layers()
        time.sleep(0.05)
        sender_cpu_ns[0] += 20_000_000
        timings.end_dispatch()
        timings.end_step()
    host = timings.host()
    assert 60_000 <= host["host"] < 75_000
    assert 5_000 <= host["host_per_hop"] < 8_000, "of two layers of two microbatches"


def test_the_clock_that_answers_fastest_is_believed() -> None:
    pauses = iter([0.02, 0.02, 0.001, 0.02, 0.02, 0.02, 0.02, 0.02])

    def clock_ns() -> int:
        ahead = time.monotonic_ns() + 10**12
        time.sleep(next(pauses))
        return ahead

    assert abs(clock_offset(clock_ns) - 10**12) < 8e6


@pytest.mark.parametrize("setting", [{"timings": True}, {"trace": "trace.json"}])
def test_without_workers_it_is_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}=.*attention=HOST:PORT.*leave {name} out"):
        EngineConfig(**setting)


@pytest.fixture
def attention() -> Iterator[str]:
    """The addresses of two workers in this process; at its end nobody holds them."""
    with ExitStack() as stack:
        addresses = []
        for device in ("cpu:1", "cpu:2"):
            config = AttendConfig(listen="127.0.0.1:0", devices=device)
            server = stack.enter_context(closing(WorkerServer(config, SecurityConfig(), Session)))
            server.start()
            addresses.append(f"127.0.0.1:{server.port}")
        yield ",".join(addresses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random(tmp_path_factory.mktemp("tiny")))


PROMPTS = [[5, 7, 11] * 4, [3] * 30, [9, 8]]


def test_a_trace_that_cannot_be_written_is_refused_by_name(
    folder: str, attention: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"trace='.*nowhere/trace\.json' cannot be written: No such file"):
        LLM(folder, attention=attention, trace=str(tmp_path / "nowhere" / "trace.json"), **SMALL)


@pytest.mark.parametrize(("overlap", "microbatches"), [("on", 2), ("off", 1)])
def test_trace_of_two_workers(
    folder: str, attention: str, tmp_path: Path, overlap: str, microbatches: int
) -> None:
    file = tmp_path / "trace.json"
    settings: dict[str, Any] = {**SMALL, "overlap": overlap, "microbatches": microbatches}
    llm = LLM(folder, attention=attention, trace=str(file), **settings)
    llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    stats, offsets = llm.stats(), llm.engine.runner.exchange.timings.offsets_ns
    assert all(abs(offset) < 50e6 for offset in offsets), "there is one clock on this host"
    figures = stats["timings"]
    assert figures["steps"] == stats["steps"] <= STEPS
    assert all(figures[name] > 0 for name in ("compute", "wire_out", "attention", "wire_back", "host"))
    assert 0 <= figures["exposed_wire"] < figures["step"]
    del llm
    gc.collect()
    check_trace(json.loads(file.read_text())["traceEvents"], stats["steps"], attention.split(","), overlap)


def check_trace(events: list[dict[str, Any]], steps: int, addresses: list[str], overlap: str) -> None:
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    slices = [e for e in events if e["ph"] == "X"]
    threads: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in slices:
        process = names["process_name", event["pid"], 0]
        threads[process, names["thread_name", event["pid"], event["tid"]]].append(event)
    assert len(slices) + len(names) == len(events)
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], event["dur"]))
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in thread)
        for before, after in pairwise(thread):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002, (before, after)
    assert [event["args"]["step"] for event in threads["engine", "steps"]] == list(range(steps))

    def layers_of(process: str, thread: str, name: str) -> set[tuple[int, int, int]]:
        found = threads[process, thread]
        return {tuple(e["args"].values()) for e in found if e["name"] == name}

    ran = {of[:2] for of in layers_of("engine", "compute", "compute q")}
    ran |= {of[:2] for of in layers_of("engine", "compute", "compute k, v")}
    assert {step for step, _ in ran} == set(range(steps))
    every = {(*of, layer) for of in ran for layer in range(TINY.num_layers)}
    sent = layers_of("engine", "sender", "send q") | layers_of("engine", "sender", "send k, v")
    assert sent == every
    asked = layers_of("engine", "sender", "send q")
    assert asked == {of for of in every if of[:2] in {key[:2] for key in asked}}
    read = {of for of in asked if of[2] < TINY.num_layers - 1}
    if overlap == "on":
        assert layers_of("engine", "sender", "send k, v") == every
    for address in addresses:
        assert read <= layers_of(f"worker {address}", "attention", "attention") <= asked
        for way in ("wire out", "wire back"):
            found = [
                layers_of("engine", f"wire {address}, microbatch {j}", way) for j in {of[1] for of in asked}
            ]
            assert read <= set().union(*found) <= asked
