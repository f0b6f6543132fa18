"""What `check.py` makes of its parts' output; needs no device."""

from __future__ import annotations

import os

import check

VERBOSE = """\
tests/hardware/test_a.py::test_heads[bfloat16-5] PASSED                  [ 33%]
tests/hardware/test_a.py::test_heads[int8-5] FAILED                      [ 66%]
tests/hardware/test_a.py::test_fp8 SKIPPED (refused: fp8)                [100%]
FAILED tests/hardware/test_a.py::test_heads[int8-5] - AssertionError
"""


def test_outcomes_are_read_as_far_as_they_came() -> None:
    outcomes = dict(check.TEST_LINE.findall(VERBOSE))
    assert [name.rpartition("::")[2] for name in outcomes] == [
        "test_heads[bfloat16-5]",
        "test_heads[int8-5]",
        "test_fp8",
    ]
    assert check.counts(outcomes) == "1 passed, 1 failed, 0 error, 1 skipped"


def test_facts_are_found_among_what_a_runtime_prints() -> None:
    assert check.facts_in('{"a": 1}\n{"device": "TPU v5e", "devices": 4}\nI0000 closing\n') == {
        "device": "TPU v5e",
        "devices": 4,
    }


def test_what_was_printed_by_the_deadline_is_kept() -> None:
    ran = check.run(["sh", "-c", "echo so far; exec sleep 60"], 1.0, os.environ)
    assert (ran["exit_code"], ran["output"]) == (124, "so far\n\nended after 1 s\n")
    assert ran["seconds"] < 30


def test_both_streams_and_the_exit_code_are_kept() -> None:
    ran = check.run(["sh", "-c", "echo one; echo two >&2; exit 3"], 60, os.environ)
    assert (ran["exit_code"], ran["output"]) == (3, "one\ntwo\n")
