"""The engine over a fake runner: continuations, aborts, refusals; every page comes back."""

from __future__ import annotations

import time
from typing import Any

import pytest
from whole_outputs import gather

from lamina_jax import LLM
from lamina_jax.core import QueueFull, Request, RequestOutput, SamplingParams
from lamina_jax.engine.engine import Engine
from lamina_jax.engine.scheduler import Scheduler, SchedulerConfig
from lamina_jax.testing import FakeModel, FakeRunner

MODEL = FakeModel()


@pytest.fixture
def engine() -> Engine:
    config = SchedulerConfig(
        vocab_size=MODEL.vocab_size,
        num_pages=32,
        page_size=4,
        max_model_len=24,
        max_num_seqs=4,
        max_waiting=6,
        microbatches=2,
        decode_buckets=(1, 2),
        prefill_buckets=((1, 5), (2, 3)),
    )
    runner = FakeRunner(MODEL, num_pages=32, page_size=4)
    return Engine(Scheduler(config), runner, tokenizer=None, eos_token_ids=(), vocab_size=MODEL.vocab_size)


def request(request_id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Request:
    params = SamplingParams(**({"max_tokens": 5, "temperature": 0} | sampling))
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=params)


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        gather(outputs, engine.step())
    engine.scheduler.check_idle()
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_pages
    return outputs


def test_a_prompt_has_as_many_continuations_as_it_asks_for(engine: Engine) -> None:
    engine.submit(request("three", n=3))
    engine.submit(request("one", (7,) * 11))
    outputs = run(engine)
    assert [output.index for output in outputs["three"].outputs] == [0, 1, 2]
    alone = MODEL.generate((1, 2, 3), 5)
    assert [output.token_ids for output in outputs["three"].outputs] == [alone] * 3
    assert outputs["three"].finished
    assert outputs["one"].outputs[0].token_ids == MODEL.generate((7,) * 11, 5)


def test_an_abort_ends_every_continuation(engine: Engine) -> None:
    engine.submit(request(n=3))
    outputs: dict[str, RequestOutput] = {}
    for _ in range(3):
        gather(outputs, engine.step())
    told = [len(choice.token_ids) for choice in outputs["r"].outputs]
    last = engine.abort("r")
    assert last is not None
    assert [(choice.finish_reason, choice.token_ids) for choice in last.outputs] == [("abort", [])] * 3
    gather(outputs, [last])
    assert outputs["r"].finished
    alone = MODEL.generate((1, 2, 3), 5)
    assert [choice.token_ids for choice in outputs["r"].outputs] == [alone[:count] for count in told]
    assert engine.abort("r") is None
    assert run(engine) == {}
    engine.submit(request())
    assert run(engine)["r"].outputs[0].token_ids == MODEL.generate((1, 2, 3), 5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (request(prompt=(1, 97)), "token id 97"),
        (request(logit_bias={200: 1.0}), "token id 200"),
        (request(stop="x"), "stop needs one"),
        (request(prompt=()), "empty"),
        (request(prompt=(1,) * 24), "max_model_len"),
        (request(n=7), "n=7 choices .* max_waiting=6"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_held(
    engine: Engine, wrong: Request, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        engine.submit(wrong)
    assert not engine.has_work
    engine.submit(request())
    with pytest.raises(ValueError, match="already held"):
        engine.submit(request())
    run(engine)


def test_an_id_that_a_choice_has_is_refused(engine: Engine) -> None:
    engine.submit(request("a#1"))
    with pytest.raises(ValueError, match="'a' is already held"):
        engine.submit(request("a", n=2))
    assert run(engine).keys() == {"a#1"}


def test_a_full_queue_takes_no_more_and_holds_nothing_of_it(engine: Engine) -> None:
    for number in range(4):
        engine.submit(request(f"r{number}"))
    with pytest.raises(QueueFull, match="4 requests wait, and 3 more would exceed max_waiting=6"):
        engine.submit(request("r", n=3))
    engine.submit(request("two", n=2))
    with pytest.raises(QueueFull):
        engine.submit(request("r"))
    assert engine.stats()["requests_waiting"] == 6
    engine.step()  # four are admitted
    engine.submit(request("r"))
    outputs = run(engine)
    assert outputs.keys() == {"r0", "r1", "r2", "r3", "two", "r"}
    alone = MODEL.generate((1, 2, 3), 5)
    assert all(choice.token_ids == alone for output in outputs.values() for choice in output.outputs)


def test_several_are_taken_or_none(engine: Engine) -> None:
    with pytest.raises(ValueError, match="token id 97"):
        engine.submit(request("a"), request("b", prompt=(1, 97)))
    with pytest.raises(ValueError, match=r"4 prompts of 8 choices are more than may wait: .* max_waiting=6"):
        engine.submit(*(request(f"r{number}", n=2) for number in range(4)))
    assert not engine.has_work
    engine.submit(request("first"))
    with pytest.raises(QueueFull, match="1 requests wait, and 6 more"):
        engine.submit(*(request(f"r{number}", n=2) for number in range(3)))
    engine.submit(request("a"), request("b"))
    assert run(engine).keys() == {"first", "a", "b"}


def test_how_long_a_prompt_waited_is_said_once(engine: Engine) -> None:
    engine.submit(*(request(f"r{number}", n=3) for number in range(2)))
    waited: dict[str, list[float]] = {}
    while engine.has_work:
        time.sleep(0.01)
        for new in engine.step():
            if new.queue_seconds is not None:
                waited.setdefault(new.request_id, []).append(new.queue_seconds)
    assert {name: len(times) for name, times in waited.items()} == {"r0": 1, "r1": 1}
    assert 0.01 <= waited["r0"][0] < waited["r1"][0] < 10


def test_generate_takes_more_prompts_than_may_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_jax.llm.build_engine", lambda *_, **__: engine)
    llm, params = LLM("fake"), SamplingParams(n=2, max_tokens=3, temperature=0)
    prompts = [[number] for number in range(20)]
    with pytest.raises(ValueError, match="token id 97"):
        llm.generate([*prompts, [97]], params)
    assert not engine.has_work
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        assert [choice.token_ids for choice in output.outputs] == [MODEL.generate(prompt, 3)] * 2


def test_what_is_counted(engine: Engine) -> None:
    engine.submit(request(n=2))
    engine.submit(request("other", (7,) * 11, max_tokens=2))
    run(engine)
    stats = engine.stats()
    assert (stats["prompt_tokens"], stats["generation_tokens"]) == (2 * 3 + 11, 2 * 5 + 2)
    assert (stats["preemptions"], stats["requests_running"], stats["requests_waiting"]) == (0, 0, 0)
