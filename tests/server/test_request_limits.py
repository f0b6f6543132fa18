"""Bodies that are slow, or too many at once, and clients that stay."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from lamina_jax.server import request_limits
from lamina_jax.server.errors import ApiError
from lamina_jax.server.request_limits import RequestLimits

CHUNK: Message = {"type": "http.request", "body": b"x" * 10, "more_body": True}
LAST: Message = {"type": "http.request", "body": b"x" * 10}


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads its body, and stays until its client has left."""
    while (await receive()).get("more_body", False):
        pass
    assert (await receive())["type"] == "http.disconnect"


class Client:
    """Sends what it is told to, and then nothing until it leaves."""

    def __init__(self, *messages: Message) -> None:
        self._messages, self._leaves = list(messages), asyncio.Event()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        raise AssertionError("nothing is answered")

    def ask(self, app: RequestLimits) -> asyncio.Task[None]:
        return asyncio.create_task(app({}, self.receive, self.send))

    def leave(self) -> None:
        self._leaves.set()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "MAX_BYTES", 50)
    monkeypatch.setattr(request_limits, "BODY_SECONDS", 0.1)


def test_a_body_must_come_in_time() -> None:
    async def ask() -> None:
        app = RequestLimits(read_all, 60.0)
        with pytest.raises(ApiError) as raised:
            await Client(CHUNK).ask(app)
        assert (raised.value.status_code, raised.value.code) == (408, "timeout")

    asyncio.run(ask())


def test_once_it_has_come_its_client_may_wait() -> None:
    async def ask() -> None:
        client = Client(CHUNK, LAST)
        asking = client.ask(RequestLimits(read_all, 60.0))
        await asyncio.sleep(0.3)
        assert not asking.done()
        client.leave()
        await asking

    asyncio.run(ask())


def test_all_bodies_together_are_bounded_until_their_requests_are_over() -> None:
    async def ask() -> None:
        app = RequestLimits(read_all, 60.0)
        clients = [Client(CHUNK, LAST) for _ in range(4)]
        asking = [client.ask(app) for client in clients[:2]]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as raised:
            await clients[2].ask(app)
        assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
        assert raised.value.headers is not None
        assert int(raised.value.headers["retry-after"]) > 0
        clients[0].leave()
        await asking[0]
        asking.append(clients[3].ask(app))
        for client in (clients[1], clients[3]):
            client.leave()
        await asyncio.gather(*asking)

    asyncio.run(ask())


def test_who_is_not_gone_in_time_is_left() -> None:
    async def ask() -> None:
        await Client(LAST).ask(RequestLimits(read_all, 0.1))

    asyncio.run(asyncio.wait_for(ask(), 10.0))


def test_an_error_that_looks_like_it_is_not_hidden() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError("of its own")

    async def ask() -> None:
        with pytest.raises(TimeoutError, match="of its own"):
            await Client().ask(RequestLimits(fail, 60.0))

    asyncio.run(ask())
