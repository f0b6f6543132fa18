"""What `/openapi.json` promises holds: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import pytest
import schemathesis
from fake_server import DEADLINE, Running, continuation, pages_are_back
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

# The server draws its seeds in other threads while hypothesis draws its examples.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@pytest.mark.parametrize(
    "examples", [30, pytest.param(300, marks=[pytest.mark.load, pytest.mark.timeout(900)])]
)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_is_promised(fake: Running, mode: GenerationMode, examples: int) -> None:
    schema = schemathesis.openapi.from_url(str(fake.client.base_url.join("/openapi.json")))
    operations = schema.as_strategy(generation_mode=mode)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(operations)
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "fake"  # another name is refused before anything else
        case.call_and_validate(checks=CHECKS, timeout=DEADLINE)

    check()
    fake.wait_for("/stats", pages_are_back)
    assert fake.complete("abc", max_tokens=9).json()["choices"][0]["text"] == continuation("abc", 9)


def test_every_error_is_described(fake: Running) -> None:
    paths = fake.client.get("/openapi.json").json()["paths"]
    for methods in paths.values():
        for operation in methods.values():
            assert {"4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
