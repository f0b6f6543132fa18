"""The serve command as a process of a benchmark."""

from __future__ import annotations

import pytest

from lamina_jax.benchmarks.processes import ServerProcess, running


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why() -> None:
    missing = ServerProcess("no/such/folder")
    with pytest.raises(SystemExit, match=r"(?s)exit code 1:.*no/such/folder"), running(missing):
        pytest.fail("it is not there")
    server = ServerProcess("bundled", ["--max-num-seqs", "4"])
    try:
        with pytest.raises(SystemExit, match=r"not ready after 0 s"):
            server.wait_ready(0.1)
    finally:
        server.end()
    assert server.process.returncode is not None
