"""A worker that answers at once, for the exchange's benchmark: prepared bytes over every channel.

`python -m lamina_jax.benchmarks.null_worker FOLDER QUERY_BYTES ANSWER_BYTES` listens at Unix sockets in
FOLDER, prints the ports of a raw TCP listener, of one for frames and of a gRPC server, and never ends.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np

from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.frames import Header, Kind
from lamina_jax.exchange.grpc import encode, serve_stream, stream_options
from lamina_jax.exchange.socket import SocketChannel

RAW_METHOD = "/lamina_jax.Benchmark/Raw"
DEADLINE_SECONDS = 60.0


def main() -> None:
    folder, (query, answer) = Path(sys.argv[1]), map(int, sys.argv[2:])
    header, out = Header(Kind.ANSWER, answer), np.zeros(answer, np.uint8)

    def raw_socket(sock: socket.socket) -> None:
        into, data = memoryview(bytearray(query)), bytes(answer)
        while receive_raw(sock, into):
            sock.sendall(data)

    def frames(sock: socket.socket) -> None:
        channel = SocketChannel(sock, DEADLINE_SECONDS)
        with suppress(ChannelClosed):
            while channel.receive(lambda header: header.length):
                channel.send(header, [out])

    def raw_grpc(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
        data = bytes(answer)
        return (data for _ in requests)

    def grpc_frames(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
        return (encode(header, [out]) for _ in serve_stream(requests, lambda header: header.length))

    ports = []
    for name, handle in (("raw", raw_socket), ("frames", frames)):
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(folder / name))
        unix.listen()
        tcp = socket.create_server(("127.0.0.1", 0))
        ports.append(tcp.getsockname()[1])
        for listener in (unix, tcp):
            threading.Thread(target=_serve, args=(listener, handle), daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(4), options=stream_options(max(query, answer)))
    methods = {"/lamina_jax.Pool/Exchange": grpc_frames, RAW_METHOD: raw_grpc}
    for method, handler in methods.items():
        service, name = method.lstrip("/").split("/")
        handlers = {name: grpc.stream_stream_rpc_method_handler(handler)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    ports.append(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    print(*ports, flush=True)
    server.wait_for_termination()


def _serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """One connection."""
    connection, _ = listener.accept()
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handle(connection)


def receive_raw(sock: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False where the connection ends."""
    got = 0
    while got < len(into):
        count = sock.recv_into(into[got:])
        if not count:
            return False
        got += count
    return True


if __name__ == "__main__":
    main()
