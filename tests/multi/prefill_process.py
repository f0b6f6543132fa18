"""A prefill host as a process, and prompts for it."""

from __future__ import annotations

import sys
import threading

from real_processes import SETTINGS, Process, ServeProcess, flags

HOST_SETTINGS = {name: value for name, value in SETTINGS.items() if name not in ("overlap", "microbatches")}
LONG_PROMPT = [(7 * i) % 90 for i in range(120)]


class PrefillProcess(Process):
    """A prefill host on `port` of 127.0.0.1; 0 takes any."""

    def __init__(self, checkpoint: str, port: int = 0) -> None:
        command = (sys.executable, "-m", "lamina_jax.serve", checkpoint, *flags(HOST_SETTINGS))
        super().__init__(*command, "--role", "prefill", "--listen", f"127.0.0.1:{port}")

    @property
    def address(self) -> str:
        port = self.find(r"listening on .* \(port (\d+), data port")[1]
        return f"127.0.0.1:{port}"


class Traffic:
    """Prompts one after the other, in two threads, until it is over; what became of each."""

    def __init__(self, server: ServeProcess, count: int, tokens: int) -> None:
        self.answers: list[list[int] | str] = []
        self._server, self._count, self._tokens = server, count, tokens
        self.threads = [threading.Thread(target=self._run) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        for _ in range(self._count):
            answer = self._server.http.post(
                "/v1/completions", json=self._server.body(self._tokens, prompt=LONG_PROMPT)
            ).json()
            tokens = answer["choices"][0]["token_ids"] if "choices" in answer else answer["error"]["code"]
            self.answers.append(tokens)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(120)
