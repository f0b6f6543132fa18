"""The engine over a fake runner: continuations, aborts, refusals; every page comes back."""

from __future__ import annotations

from typing import Any

import pytest
from whole_outputs import gather

from lamina_jax.core import Request, RequestOutput, SamplingParams
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
