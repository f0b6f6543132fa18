"""A script whose `LLM` leads another compute host: how that ends when the script does."""

from __future__ import annotations

import signal
import sys
import time

import pytest
from compute_hosts import FollowerProcess
from real_processes import (
    MARGIN_SECONDS,
    NOTICED_SECONDS,
    SETTINGS,
    Process,
    Start,
    WorkerProcess,
    free_ports,
)

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]

SCRIPT = """
import sys, time
from lamina_jax import LLM, SamplingParams
model, attention, coordinator = sys.argv[1:]
llm = LLM(model, attention=attention, coordinator=coordinator, num_hosts=2, host_id=0, **{settings})
tokens = llm.generate([[3, 14, 15]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids
print(f"generated {{len(tokens)}}", file=sys.stderr, flush=True)
{end}
"""
ENDS = {"closes": "llm.close(); llm.close()", "ends": "", "raises": "raise KeyError('of the script')"}


class LeaderScript(Process):
    """Over one worker; `end` is what it does when it has generated."""

    def __init__(self, checkpoint: str, attention: str, coordinator: str, end: str) -> None:
        script = SCRIPT.format(settings=repr(SETTINGS).replace("inf", "float('inf')"), end=end)
        super().__init__(sys.executable, "-c", script, checkpoint, attention, coordinator)


def led(run: Start, checkpoint: str, worker: WorkerProcess, end: str) -> tuple[LeaderScript, FollowerProcess]:
    """A script that has generated, and its follower."""
    attention = worker.wait_listening().address
    coordinator = f"127.0.0.1:{free_ports(1)[0]}"
    place = ("--coordinator", coordinator, "--num-hosts", "2", "--host-id", "1")
    leader = run(LeaderScript, checkpoint, attention, coordinator, end)
    follower = run(FollowerProcess, checkpoint, [attention], *place)
    leader.find("generated 4")
    return leader, follower


@pytest.mark.parametrize("how", ENDS)
def test_a_script_that_ends_has_its_followers_end_in_order(run: Start, checkpoint: str, how: str) -> None:
    worker: WorkerProcess = run(WorkerProcess)
    leader, follower = led(run, checkpoint, worker, ENDS[how])
    assert leader.exit_code(60) == (how == "raises"), leader.said
    assert follower.exit_code() == 0, follower.said
    assert "compute host 1 at its end" in follower.said
    assert "ending:" not in follower.said
    worker.is_free_within(5)


def test_a_script_that_is_killed_is_a_host_that_is_lost(run: Start, checkpoint: str) -> None:
    leader, follower = led(run, checkpoint, run(WorkerProcess), "time.sleep(100)")
    began = time.monotonic()
    leader.send(signal.SIGKILL)
    assert follower.exit_code() == 1
    assert time.monotonic() - began < NOTICED_SECONDS + MARGIN_SECONDS
    assert "compute host 0 at 127.0.0.1" in follower.said
