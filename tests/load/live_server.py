"""The serve command under load: its memory, and when it is idle again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from real_processes import Process, ServeProcess, flags
from worker_talk import until

from lamina_jax.benchmarks.load_client import Target
from lamina_jax.benchmarks.processes import descendants

FEW_PROGRAMS: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 8,
    "max_model_len": 256,
    "max_prefill_tokens": 32,
    "microbatches": 1,
    "overlap": "on",
    "compute_devices": "cpu:0",
    "prefill_stall_ms": float("inf"),
}
IDLE_SECONDS = 60.0


class LiveServer(ServeProcess):
    """The server with any settings, on any port of 127.0.0.1; it is ready."""

    def __init__(self, checkpoint: str, **settings: Any) -> None:
        options = flags({"port": 0} | FEW_PROGRAMS | settings)
        Process.__init__(self, sys.executable, "-m", "lamina_jax.serve", checkpoint, *options)
        self.model = checkpoint
        try:
            self.wait_ready(seconds=300.0)
        except BaseException:  # nobody else has it to end it
            self.close()
            raise

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def target(self) -> Target:
        """For the load client; every answer has its full length."""
        return Target(url=self.url, model=self.model, ignore_eos=True, seconds=300.0)

    def memory_mb(self) -> float:
        """Resident memory of all its processes."""
        pids = [self.popen.pid, *descendants(self.popen.pid)]
        return sum(_resident_kb(pid) for pid in pids) / 1024

    def check_idle(self) -> None:
        """Soon nothing runs or waits, every page is back, and no program was compiled since it was ready."""

        def idle() -> bool:
            stats = self.stats()
            return not stats["requests_running"] + stats["requests_waiting"] and self.pages_are_back()

        assert until(idle, IDLE_SECONDS), self.stats()
        assert self.stats()["compilations_after_ready"] == 0


def _resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
