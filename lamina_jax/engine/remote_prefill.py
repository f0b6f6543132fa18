"""Prompts prefilled on prefill hosts, their KV pulled by the attention workers.

It runs errands: a thread for each of those under way, which waits for one host and all workers. It chooses
the host, tries another where one fails, and gets hosts back that were lost. It knows nothing of scheduling.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.engine.errands import Errand
from lamina_jax.exchange.control import WorkerClient
from lamina_jax.exchange.peers import Report, trouble, wait_for_all
from lamina_jax.exchange.prefill import PrefillError, PrefillHost, RemotePrompt
from lamina_jax.exchange.pull import TICKET_BYTES, PullOrder, decode_pulled, drop_of
from lamina_jax.models.hf_config import read_config
from lamina_jax.pool.geometry import geometry_of
from lamina_jax.weights.fingerprint import fingerprint
from lamina_jax.weights.hub import find_model

log = logging.getLogger(__name__)

MOST_AT_ONCE = 8
"""Errands under way: a worker's threads and a host's memory are for so many."""

ERRAND_SECONDS = 600.0
"""What prefilling and pulling one prompt may take on one host, its time in the queue there included."""

DROP_SECONDS = 15.0
"""What a worker may take to write no more for a prompt that nobody wants: else it counts as lost."""

PULL_SECONDS = ERRAND_SECONDS + 2 * DROP_SECONDS
"""A worker that answers neither Pull nor Drop in this time is lost."""

PROBE_SECONDS, LONGEST_PAUSE = 1.0, 30.0
"""Between looks at hosts that are down; and how long at most one that goes on failing is left alone."""


@dataclass(frozen=True)
class Puller:
    """A worker's part of an errand: what it is told, and what ends it if it does not answer."""

    client: WorkerClient
    order: PullOrder
    lose: Callable[[str], None]


Orders = Callable[[Errand, bytes, str], list[Puller]]
"""What each worker that holds a part of the request is told, of a ticket at a prefill host's address."""


@dataclass(eq=False)
class _Host:
    """A prefill host as this engine gets on with it. Times are of `time.monotonic`."""

    client: PrefillHost
    tokens: int = 0
    down: bool = False
    pause: float = PROBE_SECONDS
    next_try: float = 0.0


@dataclass(eq=False)
class _Trip:
    """An errand on its way."""

    errand: Errand
    changed: threading.Condition = field(default_factory=threading.Condition)
    dropped: threading.Event = field(default_factory=threading.Event)

    def drop(self) -> None:
        with self.changed:
            self.dropped.set()
            self.changed.notify_all()

    def wake(self, *_: object) -> None:
        with self.changed:
            self.changed.notify_all()


class RemotePrefill:
    """The prefill hosts that `config.prefill` names; see `lamina_jax.engine.runner.Elsewhere`.

    Args:
        max_tokens: longest prompt that they must take.
        orders: who pulls.

    Raises:
        ConfigError: an address or a file that cannot be used.
    """

    def __init__(self, config: EngineConfig, max_tokens: int, orders: Orders) -> None:
        addresses = [address.strip() for address in (config.prefill or "").split(",")]
        if len(set(addresses)) < len(addresses):
            raise ConfigError(f"prefill={config.prefill!r} names a host twice")
        checkpoint = checkpoint_of(config)
        self._hosts = [
            _Host(PrefillHost(address, config.security, checkpoint, max_tokens)) for address in addresses
        ]
        self._orders, self._wait_seconds = orders, config.worker_wait_seconds
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._threads = ThreadPoolExecutor(MOST_AT_ONCE, "prefill errand")
        self._trips: dict[int, _Trip] = {}
        self._over: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
        self._some_over = threading.Event()
        self._prompts = self._tokens = self._bytes = self._retries = self._fallbacks = 0

    def connect(self, report: Report) -> None:
        """Wait until all hosts are up, and look for those that go down from now on.

        Raises:
            PrefillError: one that waiting does not mend, or that is missing after `worker_wait_seconds`.
        """
        wait_for_all([host.client for host in self._hosts], self._wait_seconds, report)
        threading.Thread(target=self._probe, name="prefill probe", daemon=True).start()

    @property
    def available(self) -> bool:
        return any(not host.down for host in self._hosts)

    def begin(self, errand: Errand) -> None:
        trip = self._trips[errand.number] = _Trip(errand)
        self._threads.submit(self._run, trip)

    def drop(self, number: int) -> None:
        if trip := self._trips.get(number):
            trip.drop()

    def over(self) -> list[tuple[int, bool]]:
        self._some_over.clear()
        over = []
        while not self._over.empty():
            over.append(self._over.get())
        for number, _ in over:
            del self._trips[number]
        return over

    def wait(self, seconds: float) -> None:
        self._some_over.wait(seconds)

    def stats(self) -> dict[str, Any]:
        return {
            "prefill_hosts": len(self._hosts),
            "prefill_hosts_up": sum(not host.down for host in self._hosts),
            "prefill_prompts": self._prompts,
            "prefill_tokens": self._tokens,
            "prefill_pulled_bytes": self._bytes,
            "prefill_retries": self._retries,
            "prefill_fallbacks": self._fallbacks,
        }

    def close(self) -> None:
        """Drop everything and hang up."""
        self._closed.set()
        for trip in list(self._trips.values()):
            trip.drop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for host in self._hosts:
            host.client.close()

    def _run(self, trip: _Trip) -> None:
        complete = False
        try:
            complete = self._bring(trip)
        except Exception:
            log.exception("errand for request %s", trip.errand.request_id)
        self._over.put((trip.errand.number, complete))
        self._some_over.set()

    def _bring(self, trip: _Trip) -> bool:
        """Try one host after the other; whether the KV has been brought."""
        tokens = len(trip.errand.tokens)
        for host in self._choices(tokens):
            if trip.dropped.is_set():
                break
            try:
                pulled = self._once(host.client, trip)
            except PrefillError as error:
                self._failed(host, error)
                continue
            finally:
                with self._lock:
                    host.tokens -= tokens
            if pulled is None:
                break
            with self._lock:
                host.pause = PROBE_SECONDS
                self._prompts += 1
                self._tokens += tokens
                self._bytes += pulled
            return True
        if not trip.dropped.is_set():
            with self._lock:
                self._fallbacks += 1
        return False

    def _choices(self, tokens: int) -> Iterator[_Host]:
        """Hosts that are up, each once, the least loaded first; each has `tokens` more to do."""
        tried: list[_Host] = []
        while True:
            with self._lock:
                left = [host for host in self._hosts if not host.down and host not in tried]
                if not left:
                    return
                host = min(left, key=lambda host: host.tokens)
                host.tokens += tokens
            tried.append(host)
            yield host

    def _once(self, host: PrefillHost, trip: _Trip) -> int | None:
        """Have one host prefill it, and all workers pull; bytes, or None if it was dropped meanwhile.

        When this returns, or raises, nothing is written to the request's pages any more.
        """
        ticket = secrets.token_bytes(TICKET_BYTES)
        with host.prefill(trip.errand.tokens, ticket, trip.wake) as prompt:
            pullers = self._orders(trip.errand, ticket, prompt.address)
            # Perhaps since a worker was lost: then these orders are for the cache after it.
            if trip.dropped.is_set():
                return None
            calls = [puller.client.future("Pull", puller.order, PULL_SECONDS) for puller in pullers]
            try:
                for call in calls:
                    call.add_done_callback(trip.wake)
                with trip.changed:
                    trip.changed.wait_for(lambda: _decided(trip, prompt, calls), ERRAND_SECONDS)
                if trip.dropped.is_set():
                    return None
                return self._outcome(host, prompt, pullers, calls)
            finally:
                _end_pulls(pullers, calls)

    def _outcome(
        self, host: PrefillHost, prompt: RemotePrompt, pullers: Sequence[Puller], calls: Sequence[Any]
    ) -> int:
        """Bytes that were pulled; a PrefillError where not all were."""
        if all(call.done() and call.exception() is None for call in calls):
            return sum(decode_pulled(call.result()).bytes for call in calls)
        if prompt.lost:
            raise prompt.lost
        ended = [(puller, call) for puller, call in zip(pullers, calls, strict=True) if call.done()]
        failed = [(puller, error) for puller, call in ended if (error := call.exception())]
        if not failed:
            raise PrefillError(host.address, f"a prompt was not prefilled and pulled in {ERRAND_SECONDS:g} s")
        puller, error = failed[0]
        raise PrefillError(host.address, f"worker {puller.client.address} pulled not all: {error.details()}")

    def _failed(self, host: _Host, error: PrefillError) -> None:
        log.warning("%s; the prompt is prefilled elsewhere", error)
        with self._lock:
            self._retries += 1
            if not error.busy:
                host.down = True
                host.next_try = time.monotonic() + host.pause
                host.pause = min(2 * host.pause, LONGEST_PAUSE)

    def _probe(self) -> None:
        """Look whether hosts that are down are up again."""
        while not self._closed.wait(PROBE_SECONDS):
            for host in self._hosts:
                if host.down and time.monotonic() >= host.next_try and trouble(host.client) is None:
                    log.info("prefill host %s is up again", host.client.address)
                    host.down = False


def checkpoint_of(config: EngineConfig) -> str:
    """What an engine and its prefill hosts must have in common, as a text to compare."""
    folder = find_model(config.model)
    shape = read_config(folder)
    activations = shape.dtype if config.dtype == "auto" else config.dtype
    return fingerprint(folder, activations, geometry_of(config, shape).dtype)


def _decided(trip: _Trip, prompt: RemotePrompt, calls: Sequence[Any]) -> bool:
    """Whether nothing is to be waited for any more: all is there, something failed, or nobody wants it."""
    done = [call for call in calls if call.done()]
    failed = any(call.exception() is not None for call in done)
    return trip.dropped.is_set() or failed or len(done) == len(calls) or prompt.lost is not None


def _end_pulls(pullers: Sequence[Puller], calls: Sequence[Any]) -> None:
    """Returns when no worker writes any more. One that cannot be asked counts as lost, with its cache."""
    until = time.monotonic() + DROP_SECONDS
    drops = [
        puller.client.future("Drop", drop_of(puller.order), DROP_SECONDS)
        for puller, call in zip(pullers, calls, strict=True)
        if not call.done()
    ]
    for puller, call in zip(pullers, calls, strict=True):
        try:
            error = call.exception(timeout=max(0.1, until - time.monotonic()))
        except grpc.FutureTimeoutError:
            puller.lose("it does not end a pull that nobody wants any more")
            continue
        except grpc.FutureCancelledError:
            continue
        # Said by the worker itself, when the pull had ended; anything else comes from the connection.
        if error is not None and error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            puller.lose(f"a pull ended with {error.code().name} {error.details()}")
    for drop in drops:
        drop.cancel()
