"""Who is let in: tokens, TLS and its mismatches, in a worker of this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import make_certificates, secret
from echo_session import SPEC
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_talk import StartWorker, data_channel, echo

from lamina_jax.config import SecurityConfig
from lamina_jax.exchange.channel import ChannelClosed
from lamina_jax.exchange.control import WorkerError
from lamina_jax.exchange.security import client_tls
from lamina_jax.exchange.socket import connect as open_socket


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def security(folder: Path, *, token: str = "", cert: str = "", ca: str = "") -> SecurityConfig:
    return SecurityConfig(
        token_file=str(folder / token) if token else None,
        tls_cert=str(folder / f"{cert}.pem") if cert else None,
        tls_key=str(folder / f"{cert}.key") if cert else None,
        tls_ca=str(folder / f"{ca}.pem") if ca else None,
    )


@pytest.mark.parametrize("engine", [{}, {"token": "wrong"}])
def test_a_wrong_token_is_refused_at_once(
    start_worker: StartWorker, tmp_path: Path, engine: dict[str, str]
) -> None:
    for name in ("token", "wrong"):
        secret(tmp_path / name, f"{name} secret\n")
    _, client = start_worker(security(tmp_path, token="token"), security(tmp_path, **engine))
    for call in (client.describe, lambda: client.lease(SPEC)):
        with pytest.raises(WorkerError, match=r"token is missing or another one.*--token-file") as refusal:
            call()
        assert not refusal.value.temporary
    stream = client.open_channel(()).stream_stream("/lamina_jax.Pool/Exchange")
    with pytest.raises(Exception, match="UNAUTHENTICATED"):
        next(stream(iter([b"frame"])))


def test_the_token_lets_in_and_health_needs_none(start_worker: StartWorker, tmp_path: Path) -> None:
    secret(tmp_path / "token", "a secret\n")
    server, client = start_worker(security(tmp_path, token="token"))
    assert echo(data_channel(client, client.lease(SPEC).session_id), b"x") == b"x"
    health = health_pb2_grpc.HealthStub(client.open_channel(()))
    ask = health_pb2.HealthCheckRequest(service="lamina_jax.Pool")
    assert health.Check(ask).status == health_pb2.HealthCheckResponse.SERVING
    server._health.enter_graceful_shutdown()
    assert health.Check(ask).status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("worker", "engine"),
    [
        ({"cert": "worker"}, {"ca": "ca"}),
        ({"cert": "worker", "ca": "ca", "token": "token"}, {"cert": "engine", "ca": "ca", "token": "token"}),
    ],
)
def test_tls_of_both_planes(
    start_worker: StartWorker, files: Path, worker: dict[str, str], engine: dict[str, str]
) -> None:
    _, client = start_worker(security(files, **worker), security(files, **engine))
    lease = client.lease(SPEC)
    address = f"127.0.0.1:{client.describe().data_port}"
    plain = open_socket(address, 5.0)
    with pytest.raises(ChannelClosed):
        echo(plain, b"not in TLS")
    other, _ = client_tls(security(files, ca="other")) or (None, None)
    with pytest.raises(ChannelClosed, match="CERTIFICATE_VERIFY_FAILED"):
        open_socket(address, 5.0, other)
    assert echo(data_channel(client, lease.session_id), b"x" * 4000) == b"x" * 4000


@pytest.mark.parametrize(
    ("worker", "engine", "words"),
    [
        ({"cert": "worker"}, {}, "if it has a tls_cert, give the engine its tls_ca"),
        ({"cert": "worker"}, {"ca": "other"}, "no TLS with it .*CERTIFICATE_VERIFY_FAILED"),
        ({}, {"ca": "ca"}, "no TLS with it"),
        ({"cert": "worker", "ca": "ca"}, {"ca": "ca"}, "does not answer"),
    ],
)
def test_tls_that_does_not_fit_is_named(
    start_worker: StartWorker, files: Path, worker: dict[str, str], engine: dict[str, str], words: str
) -> None:
    _, client = start_worker(security(files, **worker), security(files, **engine))
    with pytest.raises(WorkerError, match=words):
        client.describe()
