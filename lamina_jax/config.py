"""The configuration tree: frozen dataclasses, filled from defaults, flags or a caller. No jax here.

Every key is obeyed or refused with a `ConfigError` that names it and says what to change.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot be obeyed; the message names it, its value and what to change."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file, what is wrong and what to do."""


class Range(NamedTuple):
    """In a field's type: which values it takes, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Range("a positive integer", lambda value: type(value) is int and value >= 1)]
Port = Annotated[int, Range("in 0 .. 65535", lambda value: 0 <= value <= 65535)]
Seconds = Annotated[float, Range("a number of at least 0", lambda value: 0 <= value < inf)]
Duration = Annotated[float, Range("a positive number", lambda value: 0 < value < inf)]
Positive = Annotated[float, Range("a positive number, or inf", lambda value: value > 0)]
Fraction = Annotated[float, Range("in (0, 1]", lambda value: 0 < value <= 1)]


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """What engine and attention workers show each other before they talk.

    Args:
        token_file: a file with a secret that both sides share.
        tls_cert: a PEM file with this side's certificate chain; an engine needs none.
        tls_key: a PEM file with the private key of tls_cert.
        tls_ca: a PEM file with the authorities that may have signed the other side's certificate; where a
            worker has one, the engine must show a certificate too.
        insecure: listen on, or connect to, addresses that other machines reach, though not all is in place
            that would make it safe.
    """

    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key belong together: give both, or neither")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is served.

    Args:
        model: a Hugging Face folder, a hub id ("org/name") that has been downloaded, or "bundled".
        placement: "disaggregated" (layers on the compute mesh, attention and KV cache on the memory
            mesh) or "collocated" (one program per step on the compute mesh).
        dtype: of weights and activations; "auto" takes the checkpoint's (bfloat16 for float16).
        kv_dtype: of the KV pages; "auto" takes that of the activations. int8 and fp8 (e4m3) keep a scale
            with each token's k and v of each head.
        max_model_len: longest prompt + continuation in tokens; None takes the model's own limit.
        max_num_seqs: requests decoded at once.
        max_waiting: requests that wait for that, each of a prompt's n choices being one; more are refused.
        max_prefill_tokens: longest chunk of a prompt that is prefilled at once; None takes
            min(max_model_len, 1024).
        prefill_stall_ms: how long requests that decode may wait for a chunk of somebody's prompt, in
            milliseconds; the time of each chunk size is measured at start. inf sets no bound.
        page_size: tokens per KV page.
        num_pages: pages of the KV pool; None sizes it from `memory_fraction`.
        memory_fraction: share of the memory devices that weights and pages may fill; None takes 0.9 of
            an accelerator and 0.4 of a host's free memory.
        microbatches: 1, 2 (the double buffer) or "auto".
        overlap: "on" sends q before k and v are computed (paper 4.2.2), "off" sends all at once.
        compute_devices, memory_devices: "cpu:0", "cpu:1-2", "gpu:0,1", ...; None chooses.
        attention: addresses of attention workers, "host:port,host:port": the memory mesh is theirs. None
            keeps it in this process.
        worker_wait_seconds: how long the engine waits at its start for workers that are not up yet.
        partition: how workers share the KV cache: by KV head, by request, or the tokens of each request.
        exchange: between the engine and its workers: "local" within a process, "socket" (blocking TCP, or
            a Unix socket on one host), "grpc" (through any proxy) or "jax" (device arrays, between devices
            of one platform); "auto" chooses and says why, and never takes "jax".
        wire_dtype: of q, k, v and o between the meshes; "auto" takes that of the activations.
        coordinator: "host:port" at which host 0 of several compute hosts gathers the others, or "auto": what
            Slurm, Kubernetes or Cloud TPU say of this process. None: one compute host.
        num_hosts: compute hosts that share the compute mesh; with coordinator, and not with "auto".
        host_id: which of them this is; host 0 schedules. With coordinator, and not with "auto".
        prefill: addresses of prefill hosts, "host:port,host:port", which prefill prompts in place of the
            compute mesh. None prefills in chunks beside decoding.
        timings: keep the times of the last steps over workers, layer by layer, and sum them up in the
            statistics.
        trace: a file that gets the last steps as a Chrome trace when the engine ends.
        compilation_cache: a folder that keeps compiled programs for the next start, or "off"; None takes
            $JAX_COMPILATION_CACHE_DIR, else lamina_jax/xla in $XDG_CACHE_HOME or ~/.cache.
        cpu_kernels: what a CPU computes attention and few-row products with: "native" (C++, compiled at the
            first start), "xla", or "auto": native where a C++ compiler is found.
        security: of the connections to workers.
    """

    model: str = "bundled"
    placement: Literal["disaggregated", "collocated"] = "disaggregated"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_dtype: Literal["auto", "bf16", "int8", "fp8", "float32", "bfloat16"] = "auto"
    max_model_len: Count | None = None
    max_num_seqs: Count = 8
    max_waiting: Count = 1024
    max_prefill_tokens: Count | None = None
    prefill_stall_ms: Positive = 500.0
    page_size: Count = 64
    num_pages: Count | None = None
    memory_fraction: Fraction | None = None
    microbatches: Literal["auto", 1, 2] = "auto"
    overlap: Literal["auto", "on", "off"] = "auto"
    compute_devices: str | None = None
    memory_devices: str | None = None
    attention: str | None = None
    worker_wait_seconds: Seconds = 60.0
    partition: Literal["heads", "requests", "tokens"] = "heads"
    exchange: Literal["auto", "local", "socket", "grpc", "jax"] = "auto"
    wire_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    coordinator: str | None = None
    num_hosts: int | None = None
    host_id: int | None = None
    prefill: str | None = None
    timings: bool = False
    trace: str | None = None
    compilation_cache: str | None = None
    cpu_kernels: Literal["auto", "native", "xla"] = "auto"
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.partition != "heads" and self.placement == "collocated":
            raise ConfigError(
                f"partition={self.partition} is among workers, and placement=collocated has none"
            )
        if self.attention and self.placement == "collocated":
            raise ConfigError("attention names workers, which placement=collocated has no use for")
        if self.attention and self.memory_devices:
            raise ConfigError("attention and memory_devices both say where the KV cache is: give one of them")
        if self.attention is None and self.exchange in ("socket", "grpc", "jax"):
            raise ConfigError(
                f"exchange={self.exchange} needs workers: name them with attention=HOST:PORT,..."
            )
        for name in ("timings", "trace"):
            if self.attention is None and getattr(self, name):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} takes the times of what crosses between processes, and "
                    "within one nothing can be timed that is not held up: name workers with "
                    f"attention=HOST:PORT,..., or leave {name} out"
                )
            if self.exchange == "jax" and getattr(self, name):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} takes the times of frames, and exchange=jax sends no "
                    f"tensors in them: leave {name} out, or choose socket or grpc"
                )
        if self.attention and self.exchange == "local":
            raise ConfigError("exchange=local is within one process: leave attention out, or choose another")
        self._check_hosts()
        if self.prefill and not self.attention:
            raise ConfigError(
                "prefill names hosts whose KV attention workers pull: name those with attention, too"
            )
        if self.partition == "tokens" and self.overlap == "off":
            raise ConfigError(
                "partition=tokens sends q to every worker, and k, v to one: it cannot send them in one "
                "message, leave overlap=off out"
            )

    def _check_hosts(self) -> None:
        given = {name for name in ("num_hosts", "host_id") if getattr(self, name) is not None}
        wanted = set() if self.coordinator in (None, "auto") else {"num_hosts", "host_id"}
        if given != wanted:
            raise ConfigError(
                f"coordinator={self.coordinator!r}, num_hosts={self.num_hosts}, host_id={self.host_id}: an "
                'address comes with both of the others, "auto" or none with neither'
            )
        if self.coordinator is None:
            return
        if not self.attention:
            raise ConfigError(
                "coordinator is for compute hosts, whose KV cache workers hold: name those with attention"
            )
        if self.num_hosts is None or self.host_id is None:
            return
        host_and_port("coordinator", self.coordinator)
        if not 0 <= self.host_id < self.num_hosts:
            raise ConfigError(f"host_id={self.host_id} must be in 0 .. num_hosts - 1 = {self.num_hosts - 1}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a model is offered over HTTP.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes any free one and prints it.
        drain_seconds: at SIGTERM or Ctrl-C, how long the running requests may take to end.
        request_seconds: longest time that one request may take, its time in the queue included.
        api_key_file: a file with one key per line, of which every request must show one, but to /health and
            /ready; blank lines and lines that begin with # are left out. None asks for no key.
        log_format: of the log on stderr: "text", or "json" for one object per line.
        insecure: listen on, or connect to, addresses that other machines reach, though not all is in place
            that would make it safe.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    drain_seconds: Seconds = 30.0
    request_seconds: Duration = 600.0
    api_key_file: str | None = None
    log_format: Literal["text", "json"] = "text"
    insecure: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)
        if not (is_loopback(self.host) or self.api_key_file or self.insecure):
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines, and no API key is asked for: give "
                "--api-key-file FILE, listen on 127.0.0.1, or say --insecure if everyone on that network may "
                "use the model"
            )


@dataclass(frozen=True, kw_only=True)
class AttendConfig:
    """How an attention worker offers its devices.

    Args:
        listen: the address of its gRPC server, "host:port".
        devices: "cpu:0-1", "gpu:0", ...; None takes all accelerators, or a virtual CPU device per core, of
            which native kernels need but one.
        memory_fraction: share of the devices' memory that pages and programs may fill; None takes 0.9 of an
            accelerator and 0.4 of a host's free memory.
        data_port: of the socket listener, on the same host; 0 takes any free one, and engines are told.
        metrics_port: of Prometheus' page, /metrics, on 127.0.0.1; None offers none.
        drain_seconds: at SIGTERM or Ctrl-C, how long the engine that holds the worker may take to leave.
        compilation_cache: a folder that keeps compiled programs for the next start, or "off"; None takes
            $JAX_COMPILATION_CACHE_DIR, else lamina_jax/xla in $XDG_CACHE_HOME or ~/.cache.
        cpu_kernels: what a CPU computes attention with: "native" (C++, compiled at the
            first start), "xla", or "auto": native where a C++ compiler is found.
    """

    listen: str = "127.0.0.1:7101"
    devices: str | None = None
    memory_fraction: Fraction | None = None
    data_port: Port = 0
    metrics_port: Port | None = None
    drain_seconds: Seconds = 30.0
    compilation_cache: str | None = None
    cpu_kernels: Literal["auto", "native", "xla"] = "auto"

    def __post_init__(self) -> None:
        _check_fields(self)
        host_and_port("listen", self.listen)


def host_and_port(name: str, address: str) -> tuple[str, int]:
    """The two parts of the setting `name`: "host:port", or "[v6 address]:port".

    Raises:
        ConfigError: it is no such address.
    """
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"{name}={address!r}: expected 'host:port', such as '127.0.0.1:7101' or '[::1]:7101'"
        )
    return bare, int(port)


def address_of(host: str, port: int) -> str:
    """The inverse of `host_and_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def indices(text: str) -> list[int]:
    """The numbers that a text such as "0-3,5" names.

    Raises:
        ValueError: a text of another form, or one that names none, or one twice.
    """
    numbers: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError("expected numbers and ranges, such as 0 or 0-3 or 0,2-3")
        numbers.extend(range(int(first), int(last if dash else first) + 1))
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError("expected at least one number, and none twice")
    return numbers


def _check_fields(config: object) -> None:
    """Refuse a value that its field's type does not take: none of the choices, or out of a `Range`."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}; got {value!r}")
        for kind in (hint, *get_args(hint)) if value is not None else ():  # T, and T of T | None
            for bound in getattr(kind, "__metadata__", ()):
                if not bound.holds(value):
                    raise ConfigError(f"{name} must be {bound.words}, got {value!r}")
