"""A prefill host's life: ports are bound, the model is loaded, prompts come; at last it ends."""

from __future__ import annotations

import logging
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import lamina_jax
from lamina_jax.config import EngineConfig, host_and_port
from lamina_jax.engine.remote_prefill import checkpoint_of
from lamina_jax.exchange.control import KEEPALIVE
from lamina_jax.exchange.frames import VERSION
from lamina_jax.exchange.prefill import REQUEST_BYTES, SERVICE, PrefillDescription
from lamina_jax.exchange.security import TokenCheck, check_address, read_token, server_tls
from lamina_jax.models.hf_config import read_config
from lamina_jax.pool.geometry import geometry_of
from lamina_jax.prefill.prefiller import Prefiller
from lamina_jax.prefill.prompts import MOST_PROMPTS, Prompts
from lamina_jax.prefill.service import KvSource, PrefillService
from lamina_jax.weights.hub import find_model
from lamina_jax.worker.ports import bind_grpc, naming
from lamina_jax.worker.sockets import DataListener

log = logging.getLogger(__name__)

MOST_CALLS = MOST_PROMPTS + 8
MOST_CONNECTIONS = 512
"""Of workers: each has one for each prompt that it pulls, and for each compute host."""

_OPTIONS = (
    *KEEPALIVE,
    ("grpc.so_reuseport", 0),  # a port in use is an error
    ("grpc.max_receive_message_length", REQUEST_BYTES),
)


class PrefillServer:
    """Binds its gRPC port when it is made; `start` loads the model and answers on it.

    Attributes:
        ended: set by whoever wants it to end, or when nothing can be prefilled any more.
        failed: whether that is why.

    Raises:
        ConfigError: a setting that cannot be obeyed.
        ListenError: a port that cannot be listened on.
    """

    def __init__(self, config: EngineConfig, listen: str) -> None:
        security = config.security
        self._config, (self._host, port) = config, host_and_port("listen", listen)
        check_address(self._host, security, "listen")
        self._tls: ssl.SSLContext | None
        self._tls, credentials = server_tls(security) or (None, None)
        self._health = health.HealthServicer()
        self._grpc = grpc.server(
            ThreadPoolExecutor(MOST_CALLS, "grpc"),
            interceptors=[TokenCheck(read_token(security))],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        self.port = bind_grpc(self._grpc, self._host, port, credentials)
        self.ended, self.failed = threading.Event(), False
        self.prompts: Prompts | None = None
        self._data: DataListener | None = None

    def start(self) -> PrefillDescription:
        """Load the model, compile, and answer from now on.

        Raises:
            ConfigError: a setting that cannot be obeyed.
            CheckpointError: a folder that cannot be loaded.
            ListenError: there is no free port for data connections.
        """
        prefiller = Prefiller(self._config)
        geometry = geometry_of(self._config, read_config(find_model(self._config.model)))
        # The engine prefills the last token of a prompt itself.
        prompts = Prompts(self._config.max_num_seqs, prefiller.max_tokens - 1, prefiller.vocab_size)
        self.prompts = prompts
        source = KvSource(prompts, geometry)
        with naming("data port", self._host, 0):
            self._data = DataListener(self._host, 0, source.serve, self._tls, MOST_CONNECTIONS)
        facts = PrefillDescription(
            version=lamina_jax.__version__,
            frames_version=VERSION,
            checkpoint=checkpoint_of(self._config),
            max_tokens=prefiller.max_tokens,
            data_port=self._data.port,
            device=f"{jax.devices()[0].device_kind}",
        )
        threading.Thread(target=self._run, args=(prefiller, prompts), name="prefill", daemon=True).start()
        self._grpc.add_generic_rpc_handlers([PrefillService(facts, prompts).handlers()])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._data.start()
        self._grpc.start()
        return facts

    def close(self) -> None:
        """Let go of all prompts, hang up and give the ports back."""
        self._health.enter_graceful_shutdown()
        if self.prompts is not None:
            self.prompts.close("the prefill host is shutting down")
        if self._data is not None:
            self._data.close()
        self._grpc.stop(grace=0.2).wait(2.0)

    def _run(self, prefiller: Prefiller, prompts: Prompts) -> None:
        try:
            prefiller.run(prompts)
        except Exception:
            log.exception("nothing can be prefilled any more")
            prompts.close("the prefill host has failed")
            self.failed = True
            self.ended.set()
