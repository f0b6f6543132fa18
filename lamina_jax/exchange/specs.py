"""A `WorkerSpec` as a message of control.proto and back. What comes from the wire is checked."""

from __future__ import annotations

from dataclasses import asdict

from lamina_jax.config import ConfigError
from lamina_jax.exchange import control_pb2 as pb
from lamina_jax.pool.geometry import CacheGeometry
from lamina_jax.pool.spec import WorkerSpec

_COUNTS = ("devices", "pages_per_request", "pieces", "copies")
_MOST_LAYERS, _MOST_BUCKETS, _MOST_TOKENS = 1024, 256, 1 << 20


def spec_to_message(spec: WorkerSpec) -> pb.WorkerSpec:
    """For the wire."""
    layers = zip(spec.windows, spec.scales, spec.softcaps, strict=True)
    return pb.WorkerSpec(
        geometry=pb.Geometry(**asdict(spec.geometry)),
        layers=[pb.Layer(window=window, scale=scale, softcap=softcap) for window, scale, softcap in layers],
        buckets=[
            pb.Bucket(rows=rows, queries=queries, cached=cached) for rows, queries, cached in spec.buckets
        ],
        overlap=spec.overlap,
        by_token=spec.by_token,
        **{name: getattr(spec, name) for name in _COUNTS},
    )


def spec_from_message(message: pb.WorkerSpec) -> WorkerSpec:
    """The inverse.

    Raises:
        ConfigError: a spec that no engine of this version sends; the text names the field.
    """
    fields = {field.name: getattr(message.geometry, field.name) for field in pb.Geometry.DESCRIPTOR.fields}
    counts = {name: getattr(message, name) for name in _COUNTS}
    for name, value in {**fields, **counts}.items():
        if name.endswith("dtype"):
            _check(value in ("float32", "bfloat16"), name, value)
        else:
            _check(value > 0, name, value)
    _check(len(message.layers) == fields["num_layers"] <= _MOST_LAYERS, "layers", len(message.layers))
    _check(0 < len(message.buckets) <= _MOST_BUCKETS, "buckets", len(message.buckets))
    for bucket in message.buckets:
        tokens = bucket.rows * bucket.queries
        _check(0 < tokens <= _MOST_TOKENS, "buckets", (bucket.rows, bucket.queries))
    _check(fields["num_heads"] % fields["num_kv_heads"] == 0, "num_heads", fields["num_heads"])
    _check(fields["num_kv_heads"] % message.devices == 0, "devices", message.devices)
    return WorkerSpec(
        geometry=CacheGeometry(**fields),
        windows=tuple(layer.window for layer in message.layers),
        scales=tuple(layer.scale for layer in message.layers),
        softcaps=tuple(layer.softcap if layer.HasField("softcap") else None for layer in message.layers),
        buckets=tuple((bucket.rows, bucket.queries, bucket.cached) for bucket in message.buckets),
        overlap=message.overlap,
        by_token=message.by_token,
        **counts,
    )


def _check(right: bool, name: str, value: object) -> None:
    if not right:
        raise ConfigError(f"the spec of a lease: {name}={value} cannot be")
