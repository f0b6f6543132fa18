from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("version", "jax_version", "frames_version", "platform", "device_kind", "devices", "memory_bytes", "data_port", "unix_path", "held_by", "clock_ns", "listen")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    FRAMES_VERSION_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    CLOCK_NS_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    version: str
    jax_version: str
    frames_version: int
    platform: str
    device_kind: str
    devices: int
    memory_bytes: int
    data_port: int
    unix_path: str
    held_by: str
    clock_ns: int
    listen: str
    def __init__(self, version: _Optional[str] = ..., jax_version: _Optional[str] = ..., frames_version: _Optional[int] = ..., platform: _Optional[str] = ..., device_kind: _Optional[str] = ..., devices: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., data_port: _Optional[int] = ..., unix_path: _Optional[str] = ..., held_by: _Optional[str] = ..., clock_ns: _Optional[int] = ..., listen: _Optional[str] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("engine", "spec")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    engine: str
    spec: WorkerSpec
    def __init__(self, engine: _Optional[str] = ..., spec: _Optional[_Union[WorkerSpec, _Mapping]] = ...) -> None: ...

class LeaseEvent(_message.Message):
    __slots__ = ("progress", "ready")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    ready: Ready
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done", "total")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("session_id", "pages")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    pages: int
    def __init__(self, session_id: _Optional[bytes] = ..., pages: _Optional[int] = ...) -> None: ...

class WorkerSpec(_message.Message):
    __slots__ = ("geometry", "devices", "layers", "buckets", "pages_per_request", "overlap", "pieces", "copies", "by_token")
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    PAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    BY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    geometry: Geometry
    devices: int
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    pages_per_request: int
    overlap: bool
    pieces: int
    copies: int
    by_token: bool
    def __init__(self, geometry: _Optional[_Union[Geometry, _Mapping]] = ..., devices: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ..., pages_per_request: _Optional[int] = ..., overlap: _Optional[bool] = ..., pieces: _Optional[int] = ..., copies: _Optional[int] = ..., by_token: _Optional[bool] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("num_layers", "num_pages", "page_size", "num_kv_heads", "num_heads", "head_dim", "dtype", "wire_dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    dtype: str
    wire_dtype: str
    def __init__(self, num_layers: _Optional[int] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., num_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., wire_dtype: _Optional[str] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("window", "scale", "softcap")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    window: int
    scale: float
    softcap: float
    def __init__(self, window: _Optional[int] = ..., scale: _Optional[float] = ..., softcap: _Optional[float] = ...) -> None: ...

class Bucket(_message.Message):
    __slots__ = ("rows", "queries", "cached")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    rows: int
    queries: int
    cached: bool
    def __init__(self, rows: _Optional[int] = ..., queries: _Optional[int] = ..., cached: _Optional[bool] = ...) -> None: ...
