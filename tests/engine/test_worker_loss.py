"""A worker is lost: what ran ends with an error, what waits is served once the worker is back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losable_runner import WORKER, LosableRunner
from whole_outputs import gather

from lamina_jax import LLM
from lamina_jax.core import Request, RequestOutput, SamplingParams, WorkerLost
from lamina_jax.engine import outage
from lamina_jax.engine.engine import CHECK_SECONDS, Engine
from lamina_jax.engine.outage import Outage
from lamina_jax.engine.runner import RecoverableRunner
from lamina_jax.engine.scheduler import Scheduler, SchedulerConfig
from lamina_jax.testing import FakeModel, FakeRunner

MODEL = FakeModel()
SEATS = 3
make_runner = partial(FakeRunner, MODEL, num_pages=24, page_size=4)


@pytest.fixture(autouse=True, scope="module")
def no_pause() -> Iterator[None]:
    """Every step while a worker is lost is a try."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outage, "FIRST_PAUSE", 0.0)
        yield


def engine_over(runner: Any) -> Engine:
    config = SchedulerConfig(
        vocab_size=MODEL.vocab_size,
        num_pages=24,
        page_size=4,
        max_model_len=24,
        max_num_seqs=SEATS,
        microbatches=2,
        decode_buckets=(1, 2),
        prefill_buckets=((1, 5), (2, 3)),
    )
    return Engine(Scheduler(config), runner, tokenizer=None, eos_token_ids=(), vocab_size=MODEL.vocab_size)


@pytest.fixture
def runner() -> LosableRunner:
    return LosableRunner(make_runner)


@pytest.fixture
def engine(runner: LosableRunner) -> Engine:
    return engine_over(runner)


PROMPT = (1, 2, 3)


def request(request_id: str, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> Request:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0} | sampling))
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=params)


def steps_until(engine: Engine, condition: Callable[[], bool]) -> dict[str, RequestOutput]:
    """The outputs that have finished on the way, in that order, put together from what was told here."""
    told: dict[str, RequestOutput] = {}
    finished: dict[str, RequestOutput] = {}
    for _ in range(1000):
        if condition():
            return finished
        news = engine.step()
        gather(told, news)
        finished.update((new.request_id, told[new.request_id]) for new in news if new.finished)
    raise AssertionError("it does not come to an end")


def idle(engine: Engine) -> bool:
    return not engine.has_work and engine.lost is None


def assert_all_pages_free(engine: Engine) -> None:
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_pages
    engine.scheduler.check_idle()


def assert_served(output: RequestOutput, prompt: Sequence[int] = PROMPT, max_tokens: int = 8) -> None:
    assert output.error is None
    assert output.outputs
    for choice in output.outputs:
        assert choice.token_ids == MODEL.generate(prompt, max_tokens)


def assert_ended_by_the_loss(output: RequestOutput) -> None:
    assert WORKER in (output.error or "")
    assert "its connection broke" in (output.error or "")
    assert "error" in {choice.finish_reason for choice in output.outputs}


@pytest.mark.parametrize("at", ["dispatch", "read"])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("tries", [1, 4])
@pytest.mark.parametrize("count", [1, SEATS, SEATS + 3])
def test_what_ran_ends_and_what_waits_is_served_later(
    engine: Engine, runner: LosableRunner, at: str, steps: int, tries: int, count: int
) -> None:
    names = [f"r{i}" for i in range(count)]
    for i, name in enumerate(names):
        engine.submit(request(name, (i, 7)))
    for _ in range(steps):
        engine.step()
    runner.kill(at, tries=tries)
    ended = steps_until(engine, lambda: engine.lost is not None)
    began = len(ended)
    assert list(ended) == names[:began]
    assert 1 <= began <= SEATS
    for output in ended.values():
        assert_ended_by_the_loss(output)
    assert_all_pages_free(engine)
    assert engine.scheduler.num_waiting == count - began
    served = steps_until(engine, lambda: idle(engine))
    assert runner.tries == tries
    assert list(served) == names[began:]
    for name, output in served.items():
        assert_served(output, (int(name[1:]), 7))
    assert_all_pages_free(engine)


def test_a_loss_in_idleness_is_noticed_and_ends_nothing(engine: Engine, runner: LosableRunner) -> None:
    assert isinstance(runner, RecoverableRunner)
    assert engine.pause == CHECK_SECONDS
    runner.kill("check", tries=3)
    assert engine.step() == []
    assert engine.lost is not None
    assert (engine.lost.worker, engine.lost.reason) == (WORKER, "its connection broke at check")
    engine.submit(request("late"))
    assert_served(steps_until(engine, lambda: idle(engine))["late"])


def test_a_request_to_an_idle_engine_waits_if_the_worker_has_gone_before(
    engine: Engine, runner: LosableRunner
) -> None:
    runner.kill("check")
    engine.submit(request("r"))
    assert_served(steps_until(engine, lambda: idle(engine))["r"])
    assert runner.losses == 1


def test_all_continuations_of_a_prompt_end_together(engine: Engine, runner: LosableRunner) -> None:
    """Some of them run, one has ended, others wait."""
    engine.submit(request("n", n=SEATS + 2, max_tokens=4))
    runner.kill("read")
    ended = steps_until(engine, lambda: engine.lost is not None)
    assert_ended_by_the_loss(ended["n"])
    assert [choice.finish_reason for choice in ended["n"].outputs] == ["error"] * (SEATS + 2)
    assert not engine.has_work
    assert steps_until(engine, lambda: idle(engine)) == {}


def test_an_abort_during_the_loss(engine: Engine, runner: LosableRunner) -> None:
    for i in range(SEATS + 2):
        engine.submit(request(f"r{i}"))
    engine.step()
    engine.step()
    runner.kill("read", tries=3)
    ended = steps_until(engine, lambda: engine.lost is not None)
    waiting = [f"r{i}" for i in range(SEATS + 2) if f"r{i}" not in ended]
    assert engine.abort(next(iter(ended))) is None
    aborted = engine.abort(waiting[0])
    assert aborted is not None
    assert aborted.outputs[0].finish_reason == "abort"
    assert list(steps_until(engine, lambda: idle(engine))) == waiting[1:]


def test_what_was_told_last_of_the_worker_is_what_is_known(engine: Engine, runner: LosableRunner) -> None:
    runner.kill("check", tries=3)
    reasons = []
    while engine.step() == [] and engine.lost is not None:
        reasons.append(engine.lost.reason)
    assert reasons == ["its connection broke at check"] * 2 + ["it is not ready yet"]


def test_a_runner_that_cannot_recover_is_not_asked_to() -> None:
    class Dying(FakeRunner):
        def read(self, step: Any) -> Any:
            raise WorkerLost(WORKER, "gone")

    engine = engine_over(Dying(MODEL, num_pages=24, page_size=4))
    assert engine.pause is None
    engine.submit(request("r"))
    with pytest.raises(WorkerLost, match=WORKER):
        steps_until(engine, lambda: idle(engine))


SUBMIT = st.tuples(
    st.just("submit"),
    st.lists(st.integers(0, 96), min_size=1, max_size=9),
    st.integers(1, 9),
    st.integers(1, 3),
)
ACTIONS = st.lists(
    SUBMIT
    | st.tuples(st.just("step"), st.integers(1, 6))
    | st.tuples(st.just("abort"), st.integers(0, 9))
    | st.tuples(st.just("kill"), st.sampled_from(["dispatch", "read", "check"]), st.integers(1, 4)),
    max_size=40,
)


@given(actions=ACTIONS)
@settings(max_examples=100, deadline=None)
def test_every_request_ends_once_and_every_page_comes_back(actions: list[tuple[Any, ...]]) -> None:
    runner = LosableRunner(make_runner)
    engine = engine_over(runner)
    outputs: dict[str, RequestOutput] = {}
    submitted: dict[str, Request] = {}

    for action in actions:
        match action:
            case "submit", prompt, max_tokens, n:
                new = request(f"r{len(submitted)}", tuple(prompt), max_tokens=max_tokens, n=n)
                submitted[new.request_id] = new
                engine.submit(new)
            case "step", count:
                for _ in range(count):
                    gather(outputs, engine.step())
            case "abort", index if index < len(submitted):
                if (last := engine.abort(f"r{index}")) is not None:
                    gather(outputs, [last])
            case "kill", at, tries if engine.lost is None:
                runner.kill(at, tries=tries)
    runner.revive()
    for _ in range(1000):
        if idle(engine):
            break
        gather(outputs, engine.step())
    assert outputs.keys() == submitted.keys()
    assert all(output.finished for output in outputs.values())
    for name, output in outputs.items():
        prompt, max_tokens = submitted[name].prompt_token_ids, submitted[name].sampling.max_tokens
        if output.error is not None:
            assert_ended_by_the_loss(output)
        elif output.outputs[0].finish_reason == "length":
            assert_served(output, prompt, max_tokens)
    assert_all_pages_free(engine)


def test_tries_come_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tried: list[float] = []

    def recover() -> bool:
        tried.append(now)
        return len(tried) == 8

    loss = Outage(WorkerLost(WORKER, "gone"), recover)
    pauses = []
    while True:
        pauses.append(loss.seconds_left)
        now += 0.5 * pauses[-1]
        assert not loss.ends(), "a try came too early"
        now += loss.seconds_left
        if loss.ends():
            break
    assert len(tried) == len(pauses) == 8
    longest = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert len({pause / most for pause, most in zip(pauses, longest, strict=True)}) > 1


@pytest.fixture
def llm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr("lamina_jax.llm.build_engine", lambda *_, **__: engine)
    return LLM("fake")


GREEDY = SamplingParams(max_tokens=5, temperature=0)


@pytest.mark.parametrize("at", ["dispatch", "read"])
def test_generate_raises_and_then_works_again(llm: LLM, runner: LosableRunner, at: str) -> None:
    runner.kill(at, tries=3)
    with pytest.raises(WorkerLost, match=rf"{WORKER} is lost: its connection broke at {at}"):
        llm.generate([[1], [2], [3], [4], [5]], GREEDY)
    assert not llm.engine.has_work
    assert_all_pages_free(llm.engine)
    for output in llm.generate([[1], [2]], GREEDY):
        assert_served(output, output.prompt_token_ids, 5)


def test_generate_waits_for_a_worker_that_was_lost_before(llm: LLM, runner: LosableRunner) -> None:
    runner.kill("check", tries=4)
    (output,) = llm.generate([1], GREEDY)
    assert_served(output, [1], 5)
    assert runner.tries == 4


def test_generate_does_not_wait_for_ever(
    llm: LLM, runner: LosableRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina_jax.llm.WORKER_SECONDS", 0.05)
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.01)
    runner.kill("check", tries=1000)
    llm.engine.submit(request("somebody else's"))
    with pytest.raises(WorkerLost, match=WORKER):
        llm.generate([1], GREEDY)
    assert llm.engine.scheduler.num_waiting == 1
    runner.revive()
    assert_served(llm.generate([1], GREEDY)[0], [1], 5)
