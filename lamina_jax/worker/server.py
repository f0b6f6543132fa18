"""A worker's life: ports are bound, devices found, leases given; at last it drains and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import jax
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import lamina_jax
from lamina_jax.config import AttendConfig, SecurityConfig, address_of, host_and_port
from lamina_jax.cpu_kernels import use_native
from lamina_jax.devices import choose_worker_devices
from lamina_jax.exchange.channel import FRAME_SECONDS
from lamina_jax.exchange.control import KEEPALIVE
from lamina_jax.exchange.control_messages import SERVICE, Description
from lamina_jax.exchange.frames import VERSION
from lamina_jax.exchange.grpc import MOST_BYTES, stream_options
from lamina_jax.exchange.security import TokenCheck, check_address, client_tls, read_token, server_tls
from lamina_jax.exchange.socket import SocketChannel, connect
from lamina_jax.memory import available_memory, default_fraction, unused_memory
from lamina_jax.pool.spec import WorkerSpec
from lamina_jax.worker.lease import Session
from lamina_jax.worker.leases import Leases
from lamina_jax.worker.metrics import WorkerMetrics
from lamina_jax.worker.ports import bind_grpc, naming
from lamina_jax.worker.service import PoolService
from lamina_jax.worker.sockets import DataListener, serve_lease

MOST_CALLS = 512
"""Of each compute host two for its lease, and two for each prompt that is pulled: their threads only wait."""

PULL_SECONDS = 600.0
"""How long a pull waits for a prompt whose turn has not come; that the prefill host lives is the engine's
concern."""

_OPTIONS = (
    *KEEPALIVE,
    ("grpc.so_reuseport", 0),  # a port in use is an error
    *stream_options(MOST_BYTES),
)

MakeSession = Callable[[WorkerSpec, Sequence[jax.Device]], Session]
"""Of a spec and as many devices as it asks for."""


class WorkerServer:
    """Binds its ports when it is made; `serve` answers on them.

    Raises:
        ConfigError: a setting that cannot be obeyed.
        ListenError: a port that cannot be listened on.
    """

    def __init__(self, config: AttendConfig, security: SecurityConfig, make_session: MakeSession) -> None:
        host, port = host_and_port("listen", config.listen)
        check_address(host, security, "listen")
        self._config, self._make_session, self._host = config, make_session, host
        self._security = security
        self._credentials: grpc.ServerCredentials | None
        ssl_context, self._credentials = server_tls(security) or (None, None)
        self.leases = Leases(self._session)
        self._devices: Sequence[jax.Device] = ()
        self._health = health.HealthServicer()
        self._grpc = grpc.server(
            ThreadPoolExecutor(MOST_CALLS, "grpc"),
            interceptors=[TokenCheck(read_token(security))],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        self.port = bind_grpc(self._grpc, host, port, self._credentials)
        self.metrics_port: int | None = None
        if config.metrics_port is not None:
            with naming("metrics_port", "127.0.0.1", config.metrics_port):
                metrics = WorkerMetrics(
                    self.leases, lambda: unused_memory(self._devices) if self._devices else 0
                )
                self.metrics_port = metrics.serve(config.metrics_port).server_port
        with naming("data_port", host, config.data_port):
            self._data = DataListener(host, config.data_port, partial(serve_lease, self.leases), ssl_context)

    def start(self) -> Description:
        """Find the devices and answer from now on.

        Raises:
            ConfigError: a device that does not exist, or does not say how much memory it has.
        """
        self._devices = choose_worker_devices(self._config.devices)
        if self._config.devices is None and use_native(self._config.cpu_kernels, self._devices[0]):
            self._devices = self._devices[:1]  # whose kernels use every core
        fraction = self._config.memory_fraction or default_fraction(self._devices)
        facts = Description(
            version=lamina_jax.__version__,
            frames_version=VERSION,
            jax_version=jax.__version__,
            platform=self._devices[0].platform,
            device_kind=self._devices[0].device_kind,
            devices=len(self._devices),
            memory_bytes=int(available_memory(self._devices) * fraction),
            data_port=self._data.port,
            unix_path=self._data.unix_path,
            listen=address_of(self._host, self.port),
        )
        self._grpc.add_generic_rpc_handlers([PoolService(facts, self.leases, self._dial).handlers()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._data.start()
        self._grpc.start()
        return facts

    def drain(self) -> None:
        """Be SERVING no more, refuse new leases, and wait for the engine that has one to leave."""
        self._health.enter_graceful_shutdown()
        self.leases.drain(self._config.drain_seconds)

    def close(self) -> None:
        """Hang up and give the ports back."""
        self._data.close()
        self._grpc.stop(grace=0.2).wait(2.0)

    def _session(self, spec: WorkerSpec) -> Session:
        return self._make_session(spec, self._devices[spec.first_device : spec.first_device + spec.devices])

    def _dial(self, address: str) -> SocketChannel:
        """Connect with a prefill host's data listener, as an engine would."""
        check_address(host_and_port("address", address)[0], self._security, "the prefill host")
        tls = client_tls(self._security)
        return connect(address, FRAME_SECONDS, tls[0] if tls else None, idle_seconds=PULL_SECONDS)
