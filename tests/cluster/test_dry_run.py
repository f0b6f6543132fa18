"""What a cluster would need: the figures against figures that come another way, and the text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lamina_jax.cluster.dry_run import describe
from lamina_jax.cluster.file import find_cluster_file, read_cluster
from lamina_jax.cluster.forecast import check_heads, forecast, weight_bytes, wire_bytes
from lamina_jax.cluster.processes import Cluster, FollowerProcess, PrefillProcess
from lamina_jax.config import ConfigError
from lamina_jax.models import ModelConfig
from lamina_jax.models.hf_config import read_config
from lamina_jax.pool.geometry import CacheGeometry, head_table
from lamina_jax.serve import main
from lamina_jax.weights.loader import num_bytes
from lamina_jax.weights.safetensors import find_tensors

ROOT = Path(__file__).parent.parent.parent
BUNDLED = ROOT / "lamina_jax" / "data" / "bundled"
FIXTURES = sorted((ROOT / "tests" / "fixtures" / "parity").glob("*/config.json"))

LARGE = ModelConfig(  # 8 of the 80 layers of Llama 3 70B, as attention sees them
    family="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_layers=8,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position=8192,
)


def local() -> Cluster:
    return read_cluster(find_cluster_file("local"))


def with_settings(cluster: Cluster, **settings: object) -> Cluster:
    engine = replace(cluster.engine, settings=replace(cluster.engine.settings, **settings))  # type: ignore[arg-type]
    return replace(cluster, engine=engine)


def with_workers(cluster: Cluster, count: int, devices: str | None = None) -> Cluster:
    worker = cluster.workers[0]
    worker = replace(worker, settings=replace(worker.settings, devices=devices))
    return replace(cluster, workers=(worker,) * count)


@pytest.mark.parametrize("config", [BUNDLED / "config.json", *FIXTURES], ids=lambda path: path.parent.name)
def test_weights_are_as_large_as_the_checkpoint(config: Path) -> None:
    shape = read_config(config.parent)
    stored = find_tensors(config.parent)
    names = [name for name in stored if not (shape.tie_embeddings and name == "lm_head.weight")]
    size = sum(num_bytes(stored[name]) for name in names)
    assert weight_bytes(shape, shape.dtype) == size
    assert size / 2 <= weight_bytes(shape, shape.dtype, shards=2) < size


@given(
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (12, 3)]),
    shards=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 64),
    workers=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_wire_bytes_are_the_sizes_of_the_tensors(
    heads: tuple[int, int], shards: int, rows: int, workers: int, dtype: str
) -> None:
    query, kv = heads
    assume(query % shards == 0 and (kv % shards == 0 or shards % kv == 0))
    pieces = head_table(query, kv, shards, 1).pieces
    geometry = CacheGeometry(
        num_layers=3,
        num_pages=1,
        page_size=8,
        num_kv_heads=kv,
        num_heads=query,
        head_dim=16,
        dtype="float32",
        wire_dtype=dtype,
    )
    e, d, group, layers = (4 if dtype == "float32" else 2), query * 16, query // kv, 3
    formula = (2 + 2 / group) * e * d * rows * layers + 4 * query * rows * layers
    assert wire_bytes(geometry, rows, workers, pieces, by_token=False) == round(formula)
    more = (workers - 1) * (2 * e * d + 4 * query) * rows * layers  # q, o and lse, once more per worker
    assert wire_bytes(geometry, rows, workers, pieces, by_token=True) == round(formula) + more


@pytest.mark.parametrize(
    ("partition", "workers", "page_bytes", "full_pages"),
    [  # a page of 64 tokens in 8 layers: 64 * 2 * 8 * 128 * 2 bytes * 8; 8192 tokens are 128 pages
        ("heads", 4, 2_097_152 // 4, 8 * 128),
        ("requests", 4, 2_097_152, 2 * 128),
        ("requests", 3, 2_097_152, 3 * 128),
        ("tokens", 3, 2_097_152, 8 * 43),
    ],
)
def test_pages_of_each_partition(partition: str, workers: int, page_bytes: int, full_pages: int) -> None:
    cluster = with_settings(with_workers(local(), workers), partition=partition, num_pages=77)
    needs = forecast(cluster, LARGE)
    assert (needs.page_bytes, needs.full_pages, needs.num_pages) == (page_bytes, full_pages, 77)


@pytest.mark.parametrize(
    ("settings", "rows", "messages"),
    [
        ({"max_num_seqs": 5}, 8, 4),  # one machine's CPU: one microbatch, no overlap
        ({"max_num_seqs": 4, "compute_devices": "gpu:0"}, 8, 6),  # two microbatches of 4 rows, padded
        ({"max_num_seqs": 9, "overlap": "on"}, 16, 6),
        ({"max_num_seqs": 3, "microbatches": 2}, 8, 4),
    ],
)
def test_rows_count_padding(settings: dict[str, object], rows: int, messages: int) -> None:
    needs = forecast(with_settings(local(), **settings), LARGE)
    assert (needs.rows, needs.messages_per_layer) == (rows, messages)


def with_followers(cluster: Cluster, count: int) -> Cluster:
    followers = (FollowerProcess(host="here"),) * count
    return replace(cluster, engine=replace(cluster.engine, followers=followers)).connected()


@pytest.mark.parametrize(
    ("hosts", "workers", "partition", "pairs"),
    [  # of a compute host and a worker that has heads of it
        (1, 4, "heads", 4),
        (2, 2, "heads", 2),
        (2, 4, "heads", 4),
        (4, 2, "heads", 4),
        (2, 3, "requests", 6),
        (2, 3, "tokens", 6),
    ],
)
def test_compute_hosts_share_weights_and_wire(hosts: int, workers: int, partition: str, pairs: int) -> None:
    one = with_settings(with_workers(local(), workers), partition=partition, overlap="on")
    alone, needs = forecast(one, LARGE), forecast(with_followers(one, hosts - 1), LARGE)
    assert list(needs.weights) == ["engine", *(f"follower {i}" for i in range(1, hosts))]
    assert {weights.bytes for weights in needs.weights.values()} == {weight_bytes(LARGE, "bfloat16", hosts)}
    assert needs.wire_bytes == alone.wire_bytes == hosts * needs.host_wire_bytes
    assert needs.messages_per_layer == pairs * 3


def test_more_compute_devices_than_kv_heads_repeat_them_and_send_each_once() -> None:
    few = replace(LARGE, num_kv_heads=2)
    one = with_workers(local(), 1)
    alone, needs = forecast(one, few), forecast(with_followers(one, 3), few)
    assert needs.wire_bytes == alone.wire_bytes
    assert needs.host_wire_bytes > needs.wire_bytes / 4  # two of the four send k and v


def test_a_prefill_host_has_all_weights_and_whole_pages() -> None:
    two = PrefillProcess(host="here", port=7301, compute_devices="cpu:0-1")
    cluster = with_followers(replace(local(), prefill=(two,)), 1)
    needs = forecast(cluster, LARGE)
    assert (needs.weights["prefill 0"].devices, needs.weights["engine"].devices) == (2, 1)
    assert needs.weights["prefill 0"].bytes == weight_bytes(LARGE, "bfloat16", 2)
    assert needs.whole_page_bytes == 2 * needs.page_bytes


def test_compute_hosts_that_cannot_share_the_heads() -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.settings: compute_devices.* 3 devices.* 64 query and 8 KV"
    ):
        forecast(with_followers(local(), 2), LARGE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").glob("*.toml")), ids=lambda p: p.stem)
def test_every_file_that_comes_along_has_a_dry_run(path: Path) -> None:
    text = describe(read_cluster(path))
    for role in read_cluster(path).roles():
        assert text.count(f"\n{role}") == 3  # its process, its command, its memory


@pytest.mark.parametrize(
    ("partition", "workers", "devices", "words"),
    [
        ("heads", 3, None, ["workers: 3", "8 KV heads", "1 or 2 or 4 or 8"]),
        ("heads", 4, "gpu:0-3", ["workers[0].devices", "4 devices", "2 KV heads", "1 or 2"]),
        ("tokens", 3, "cpu:0-2", ["workers[0].devices", "8 KV heads", "1 or 2 or 4 or 8"]),
    ],
)
def test_workers_that_cannot_share_the_heads(
    partition: str, workers: int, devices: str | None, words: list[str]
) -> None:
    cluster = with_settings(with_workers(local(), workers, devices), partition=partition)
    with pytest.raises(ConfigError) as error:
        check_heads(cluster, LARGE)
    for word in [str(cluster.file), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("partition", "workers", "devices"),
    [("heads", 8, None), ("heads", 2, "gpu:0-3"), ("requests", 3, "cpu:0-1"), ("tokens", 3, None)],
)
def test_workers_that_can(partition: str, workers: int, devices: str | None) -> None:
    check_heads(with_settings(with_workers(local(), workers, devices), partition=partition), LARGE)


def test_workers_with_unequal_devices() -> None:
    cluster = local()
    two = with_workers(cluster, 1, "cpu:0-1").workers
    with pytest.raises(ConfigError, match=r"workers\[1\]\.devices: 2, but workers\[0\] has 1: "):
        check_heads(replace(cluster, workers=cluster.workers[:1] + two), LARGE)


def test_the_text() -> None:
    text = describe(local())
    for words in (
        "worker 1  here (127.0.0.1)  127.0.0.1:7102  any    cpu:0",
        "engine: python -m lamina_jax.serve --cluster ",
        "worker 0: python -m lamina_jax.attend --listen 127.0.0.1:7101 --devices cpu:0 --memory-fraction 0.2",
        "8 requests of 2048 tokens fill 256 pages (16.0 MiB) per worker with partition=heads",
        "49,664 bytes",  # (2 + 2/2) 2 256 8 4 + 4 4 8 4
    ):
        assert words in text


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = describe(read_cluster(find_cluster_file("configs/clusters/local.toml")))
    assert f"\n```\n{text}\n```\n" in (ROOT / "docs" / "clusters.md").read_text()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    return code, *capsys.readouterr()


def write(folder: Path, old: str, new: str) -> str:
    text = find_cluster_file("local").read_text()
    assert old in text
    (folder / "pool.toml").write_text(text.replace(old, new))
    return str(folder / "pool.toml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = "bundled"', 'model = "no/such"', ["engine.settings.model", "'no/such'"]),
        (
            "max_num_seqs",
            "max_model_len = 4096\nmax_num_seqs",
            ["settings: max_model_len=4096", "2048"],
        ),
        ("port = 7102", "port = 7101", ["workers[1].port", "workers[0].port"]),
        ('here = "127.0.0.1"', 'here = "10.0.0.1"', ["workers[0].host", "10.0.0.1", "--token-file"]),
        ("max_num_seqs", "num_page = 3\nmax_num_seqs", ["engine.settings.num_page", "num_pages"]),
    ],
)
def test_a_dry_run_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, words: list[str]
) -> None:
    file = write(tmp_path, old, new)
    code, out, err = run(capsys, "--cluster", file, "--dry-run")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {file}: ")
    for word in words:
        assert word in line


def test_a_token_that_is_not_on_this_machine_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "[engine]", '[security]\ntoken_file = "token"\n[engine]')
    code, out, _ = run(capsys, "--cluster", file, "--dry-run")
    assert code == 0
    assert out.endswith(f"note: security.token_file: there is no {tmp_path / 'token'} on this machine\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dry-run"], ["--dry-run", "--cluster"]),
        (["--cluster", "local", "--port", "80"], ["--cluster", "--port 80", "local"]),
        (["some/model", "--cluster", "local"], ["--cluster", "some/model"]),
        (["--cluster", "nowhere"], ["'nowhere'", "local"]),
    ],
)
def test_flags_that_cannot_stand_together(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 1
    for word in words:
        assert word in err


def test_a_file_that_is_wrong_in_itself_is_refused_without_jax(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 7102", "port = 7101")
    code = f"""
import sys
from lamina_jax.serve import main
assert main(["--cluster", {file!r}, "--dry-run"]) == 1
assert not {{"jax", "flax", "fastapi"}} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
