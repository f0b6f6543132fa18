"""A worker that answers at once with device arrays, for the exchange's benchmark.

`python -m lamina_jax.benchmarks.null_transfer SOCKET QUERY_BYTES ANSWER_BYTES` listens at a Unix socket for
frames, reads the addresses of the engine's two transfer servers as a line of JSON, prints those of its own
likewise, and ends with its connection.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from contextlib import suppress
from itertools import count

import jax
import jax.numpy as jnp
from jax.experimental.transfer import start_transfer_server
from jax.sharding import SingleDeviceSharding

from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.frames import Kind
from lamina_jax.exchange.socket import SocketChannel
from lamina_jax.exchange.transfer import TransferLink

KEY = bytes(16)
LOCAL = "127.0.0.1"
DEADLINE_SECONDS = 60.0


def main() -> None:
    path, query, answer = sys.argv[1:]
    engine = json.loads(sys.stdin.readline())
    (device,) = jax.local_devices()
    there = jax.ShapeDtypeStruct((int(query) // 2,), jnp.uint16, sharding=SingleDeviceSharding(device))
    prepared = jnp.zeros(int(answer) // 2, jnp.uint16)
    compute = jax.jit(lambda q, prepared: prepared + q[0]).lower(there, prepared).compile()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = start_transfer_server(device.client, f"{LOCAL}:0", [f"{LOCAL}:0"])
    link = TransferLink(device, LOCAL, KEY)
    link.connect(engine["exchange"])
    print(json.dumps({"raw": server.address(), "exchange": link.address}), flush=True)

    def raw() -> None:
        connection = server.connect(engine["raw"])
        asked = connection.pull(0, [there])
        for trip in count():
            following = connection.pull(2 * trip + 2, [there])
            jax.block_until_ready(asked)
            server.await_pull(2 * trip + 1, [prepared])
            asked = following

    threading.Thread(target=raw, daemon=True).start()
    channel = SocketChannel(listener.accept()[0], DEADLINE_SECONDS)
    with suppress(ChannelClosed):
        while True:
            header, _ = channel.receive(lambda header: 0)
            (q,) = link.pull(header, [there])
            link.offer(header._replace(kind=Kind.ANSWER), [compute(q, prepared)])


if __name__ == "__main__":
    main()
