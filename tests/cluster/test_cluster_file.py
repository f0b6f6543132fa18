"""Every key of a cluster file is obeyed, or refused with the file, the key's path and what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lamina_jax import attend, serve
from lamina_jax.cluster.claims import indices
from lamina_jax.cluster.commands import commands
from lamina_jax.cluster.file import ELSEWHERE, find_cluster_file, read_cluster
from lamina_jax.cluster.processes import Cluster
from lamina_jax.config import AttendConfig, ConfigError, EngineConfig, SecurityConfig, ServerConfig

ROOT = Path(__file__).parent.parent.parent

PLAIN = """
[hosts]
a = "127.0.0.1"
b = "10.0.0.2"
[engine]
host = "a"
[[workers]]
host = "a"
port = 7101
[[workers]]
host = "b"
port = 7101
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster") / "pool.toml"


def read(file: Path, text: str) -> Cluster:
    file.write_text(text)
    return read_cluster(file)


def refused(file: Path, text: str) -> str:
    """What follows the file's name in the error."""
    with pytest.raises(ConfigError) as error:
        read(file, text)
    name, _, said = str(error.value).partition(": ")
    assert name == str(file)
    return said


def test_what_is_left_out_takes_the_defaults(file: Path) -> None:
    cluster = read(file, PLAIN)
    assert cluster.engine.settings == EngineConfig(attention="127.0.0.1:7101,10.0.0.2:7101")
    assert cluster.engine.server == ServerConfig()
    assert [worker.settings for worker in cluster.workers] == [
        AttendConfig(listen="127.0.0.1:7101"),
        AttendConfig(listen="10.0.0.2:7101"),
    ]
    assert list(cluster.roles()) == ["engine", "worker 0", "worker 1"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").glob("*.toml")), ids=lambda p: p.stem)
def test_the_files_that_come_along_are_found_by_name(path: Path) -> None:
    assert read_cluster(find_cluster_file(path.stem)) == read_cluster(path)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"'lcoal'.*local"):
        find_cluster_file("lcoal")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[hosts]", "[hosts", ["no TOML"]),
        (PLAIN[: PLAIN.index("[engine]")], "hosts = 3\n", ["hosts", "[hosts]", "3"]),
        ('a = "127.0.0.1"', "a = 127", ["hosts.a", "text in quotes", "127"]),
        ("[hosts]", 'color = "red"\n[hosts]', ["color", "no such key", "security"]),
        ('host = "b"', 'host = "c"', ["workers[1].host", "'c'", "a, b"]),
        ('[engine]\nhost = "a"', "", ["engine.host", "missing"]),
        ('[engine]\nhost = "a"', '[engine]\nhost = "z"', ["engine.host", "'z'", "a, b"]),
        ('host = "b"\nport = 7101', 'host = "b"', ["workers[1].port", "missing", "an integer"]),
        ('host = "b"\nport = 7101', 'host = "b"\nport = "7101"', ["workers[1].port", "an integer", "'7101'"]),
        ('host = "b"\nport = 7101', 'host = "b"\nport = 0', ["workers[1].port", "65535", "0"]),
        ('host = "b"\nport = 7101', 'host = "b"\nport = 70000', ["workers[1]", "70000"]),
        ('host = "b"', 'host = "a"', ["workers[1].port", "7101", "workers[0].port"]),
        ('host = "b"', 'host = "b"\nmemory_fraction = 2', ["workers[1]", "memory_fraction", "2"]),
        ('host = "b"', 'host = "b"\nmemory_fraction = true', ["workers[1].memory_fraction", "number"]),
        ('host = "b"', 'host = "b"\nlisten = "x:1"', ["workers[1].listen", "no such key", "port"]),
        ('host = "b"', 'host = "b"\nsettings = {}', ["workers[1].settings", "no such key"]),
        ('host = "b"', 'host = "b"\ndata_port = 7101', ["workers[1].data_port", "7101", "workers[1].port"]),
        ('host = "b"', 'host = "b"\ncores = "1-"', ["workers[1].cores", "0-3", "'1-'"]),
        ('host = "b"', 'host = "b"\ncores = "3-1"', ["workers[1].cores", "at least one", "'3-1'"]),
        ('host = "b"', 'host = "b"\ndevices = "gpu:x"', ["workers[1].devices", "'gpu:x'"]),
        ('host = "b"', 'host = "b"\nenvironment = {A = 1}', ["workers[1].environment.A", "text", "1"]),
        ('host = "b"', 'host = "b"\nenvironment = "A=1"', ["workers[1].environment", "'A=1'"]),
        ("[[workers]]", "[workers]", ["no TOML"]),
        ("[engine]", "[engine.settings]\ndtype = 'int8'\n[engine]", ["settings.dtype", "'auto'", "'int8'"]),
        ("[engine]", "[engine.settings]\nmax_num_seqs = 0\n[engine]", ["engine.settings: max_num_seqs", "0"]),
        ("[engine]", "[engine.settings]\nmicrobatches = true\n[engine]", ["settings.microbatches", "True"]),
        ("[engine]", "[engine.settings]\nmodle = 'x'\n[engine]", ["engine.settings.modle", "model"]),
        ("[engine]", "[engine.settings]\nattention = 'x:1'\n[engine]", ["settings.attention", "[[workers]]"]),
        ("[engine]", "[engine.settings]\nplacement = 'collocated'\n[engine]", ["settings: ", "collocated"]),
        ("[engine]", "[engine.server]\nport = 7101\n[engine]", ["workers[0].port", "engine.server.port"]),
        ("[engine]", "[engine.server]\nhost = '10.0.0.1'\n[engine]", ["engine.server: host", "10.0.0.1"]),
        ("[engine]", "[engine.server]\ninsecure = true\n[engine]", ["engine.server.insecure", "[security]"]),
        ("[engine]", "[engine.settings]\nprefill = 'x:1'\n[engine]", ["settings.prefill", "[[prefill]]"]),
        ("[engine]", "[engine.settings]\nhost_id = 1\n[engine]", ["settings.host_id", "place in the file"]),
        ("[engine]", "[engine]\ncoordinator_port = 7100", ["coordinator_port", "[[engine.followers]]"]),
        ("[engine]", "[engine.followers]\nhost = 'a'\n[engine]", ["[[engine.followers]]"]),
        ("[engine]", "[[engine.followers]]\nhost = 'z'\n[engine]", ["engine.followers[0].host", "'z'"]),
        ("[engine]", "[[engine.followers]]\nport = 1\n[engine]", ["engine.followers[0].port", "no such key"]),
        ("[engine]", "[[engine.followers]]\nhost = 'b'\n[engine]", ["engine.host", "127.0.0.1", "elsewhere"]),
        ("[hosts]", "[[prefill]]\nhost = 'b'\nport = 7101\n[hosts]", ["prefill[0].port", "workers[1].port"]),
        ("[hosts]", "[[prefill]]\nhost = 'b'\n[hosts]", ["prefill[0].port", "missing"]),
        ("[hosts]", "[security]\ntls_cert = 'c'\ntls_key = 'k'\n[hosts]", ["security", "tls_ca"]),
        ("[hosts]", "[security]\ntls_cert = 'c'\n[hosts]", ["security", "tls_cert and tls_key"]),
        ("[hosts]", "[security]\npassword = 'c'\n[hosts]", ["security.password", "token_file"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(file: Path, old: str, new: str, words: list[str]) -> None:
    assert old in PLAIN
    said = refused(file, PLAIN.replace(old, new, 1))
    for word in words:
        assert word in said


def test_no_workers(file: Path) -> None:
    assert "[[workers]]" in refused(file, PLAIN.partition("[[workers]]")[0])


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: cannot be read: No such file"):
        read_cluster(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.toml: is no TOML"):
        read_cluster(tmp_path / "bytes.toml")


def test_security_is_for_all_and_paths_begin_at_the_file(file: Path) -> None:
    text = '[security]\ntoken_file = "secret"\ninsecure = true\n[engine.settings]\nmodel = "./m"\n' + PLAIN
    cluster = read(file, text)
    expected = SecurityConfig(token_file=str(file.parent / "secret"), insecure=True)
    assert cluster.security == expected
    assert cluster.engine.server.insecure
    assert cluster.engine.settings.model == str(file.parent / "m")
    engine, worker, other = commands(cluster, python="python")
    assert engine.argv == ("python", "-m", "lamina_jax.serve", "--cluster", str(file))
    shared = ("--token-file", str(file.parent / "secret"), "--insecure")
    assert worker.argv == ("python", "-m", "lamina_jax.attend", "--listen", "127.0.0.1:7101", *shared)
    assert other.argv[4] == "10.0.0.2:7101"


def test_the_key_file_lies_beside_the_cluster_file(file: Path) -> None:
    cluster = read(
        file, PLAIN.replace("[[workers]]", '[engine.server]\napi_key_file = "keys"\n[[workers]]', 1)
    )
    assert cluster.engine.server.api_key_file == str(file.parent / "keys")


def tables() -> list[tuple[str, type, set[str]]]:
    """Each table that is a configuration class: how it begins, and the fields that stand elsewhere."""
    return [
        ("[engine.settings]", EngineConfig, set(ELSEWHERE) | {"security"}),
        ("[engine.server]", ServerConfig, set(ELSEWHERE)),
        ("[security]", SecurityConfig, set()),
        ("[[workers]]\nhost = 'b'\nport = 9999", AttendConfig, {"listen"}),
    ]


KEYS = [
    (start, config_class, key)
    for start, config_class, elsewhere in tables()
    for key in get_type_hints(config_class)
    if key not in elsewhere
]


def kinds(hint: Any) -> set[type]:
    """The TOML types that a field takes."""
    if get_origin(hint) is Literal:
        return {type(choice) for choice in get_args(hint)}
    found = {member for member in get_args(hint) if member is not type(None)} or {hint}
    return found | ({int} if float in found else set())


@pytest.mark.parametrize(
    ("start", "config_class", "key"), KEYS, ids=lambda part: str(part).partition("\n")[0]
)
def test_a_value_of_another_type_is_refused_by_its_path(
    file: Path, start: str, config_class: type, key: str
) -> None:
    taken = kinds(get_type_hints(config_class)[key])
    for value in ("text", 3, 0.5, True, [1], {"a": 1}):
        if type(value) not in taken:
            said = refused(file, f"{PLAIN}\n{start}\n{key} = {toml(value)}\n")
            assert said.startswith(f"{path_of(start)}.{key}: expected ")
            assert repr(value) in said


def path_of(start: str) -> str:
    return "workers[2]" if start.startswith("[[") else start.strip("[]")


def toml(value: object) -> str:
    return "{ a = 1 }" if isinstance(value, dict) else json.dumps(value)


@given(
    settings=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
            "partition": st.sampled_from(["heads", "requests", "tokens"]),
            "exchange": st.sampled_from(["auto", "socket", "grpc"]),
            "microbatches": st.sampled_from(["auto", 1, 2]),
            "max_num_seqs": st.integers(1, 2**31),
            "prefill_stall_ms": st.integers(1, 9) | st.floats(0.1, 1e9),
            "kv_dtype": st.sampled_from(["bf16", "int8", "fp8", "float32", "bfloat16"]),
        },
    )
)
def test_settings_arrive_as_they_are_written(file: Path, settings: dict[str, Any]) -> None:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    read_back = read(file, f"{PLAIN}\n[engine.settings]\n{lines}\n").engine.settings
    assert read_back == replace(EngineConfig(attention=read_back.attention), **settings)


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=2, max_size=2), st.booleans())
def test_cores_belong_to_one_process_of_a_machine(file: Path, cores: list[set[int]], same: bool) -> None:
    ours, theirs = (",".join(map(str, sorted(some))) for some in cores)
    host = "a" if same else "b"
    text = f'{PLAIN}\n[[workers]]\nhost = "{host}"\nport = 7103\ncores = "{theirs}"\n'
    text = text.replace("[engine]", f'[engine]\ncores = "{ours}"', 1)
    shared = cores[0] & cores[1]
    if same and shared:
        said = refused(file, text)
        assert said.startswith(f"workers[2].cores: core {min(shared)} ")
        assert "engine.cores" in said
    else:
        assert read(file, text).engine.cores == ours


MANY = f"""{PLAIN}
[[prefill]]
host = "a"
port = 7301
compute_devices = "cpu:0"
[[engine.followers]]
host = "a"
[[engine.followers]]
host = "a"
cores = "1"
environment = {{ A = "b" }}
[engine.settings]
num_pages = 9
partition = "tokens"
"""


def test_every_process_of_several_compute_and_prefill_hosts(file: Path) -> None:
    cluster = read(file, MANY)
    roles = ["engine", "follower 1", "follower 2", "worker 0", "worker 1", "prefill 0"]
    assert list(cluster.roles()) == roles
    settings = cluster.engine.settings
    assert (settings.coordinator, settings.num_hosts, settings.host_id) == ("127.0.0.1:7100", 3, 0)
    assert settings.prefill == "127.0.0.1:7301"
    assert cluster.compute_settings(2) == replace(settings, host_id=2)
    own = EngineConfig(compute_devices="cpu:0")
    assert cluster.prefill_settings(0) == own
    started = {command.role: command for command in commands(cluster, python="python")}
    serve = ("python", "-m", "lamina_jax.serve", "--cluster", str(file))
    assert started["follower 2"].argv == (*serve, "--host-id", "2")
    assert (started["follower 2"].cores, started["follower 2"].environment) == ("1", {"A": "b"})
    assert started["prefill 0"].argv == (*serve, "--role", "prefill", "--host-id", "0")


def test_flags_say_what_the_file_says(file: Path) -> None:
    """The command line of each process, read by its command, gives the settings of the file."""
    cluster = read(file, f"{MANY}\n[security]\ninsecure = true\ntoken_file = 'token'\n")
    for command in commands(cluster, python="python", by_flags=True):
        role, *number = command.role.split()
        module, arguments = command.argv[2], list(command.argv[3:])
        if role == "worker":
            settings, security = attend.parse(arguments)
            assert module == "lamina_jax.attend"
            assert settings == cluster.workers[int(number[0])].settings
            assert security == cluster.security
            continue
        options, _ = serve.cluster_flags().parse_known_args(arguments)
        engine, server = serve.parse(arguments)
        assert module == "lamina_jax.serve"
        if role == "prefill":
            assert (options.role, options.listen) == ("prefill", "127.0.0.1:7301")
            assert engine == cluster.prefill_settings(int(number[0]))
        else:
            assert engine == cluster.compute_settings(int(number[0]) if number else 0)
        if role == "engine":
            assert server == cluster.engine.server


def test_addresses_follow_the_hosts(file: Path) -> None:
    cluster = replace(read(file, MANY), hosts={"a": "one.local", "b": "two.local"}).connected()
    settings = cluster.engine.settings
    assert settings.attention == "one.local:7101,two.local:7101"
    assert (settings.coordinator, settings.prefill) == ("one.local:7100", "one.local:7301")
    assert [worker.settings.listen for worker in cluster.workers] == ["one.local:7101", "two.local:7101"]


def test_compute_hosts_of_one_machine_share_no_accelerator_unless_they_see_others(file: Path) -> None:
    text = MANY.replace("num_pages", 'compute_devices = "gpu:0"\nnum_pages').replace(
        'host = "a"\n[[engine', 'host = "b"\n[[engine'
    )
    text = text.replace('a = "127.0.0.1"', 'a = "10.0.0.1"')
    assert "engine.followers[1].host: gpu:0 of 10.0.0.1 is engine.settings" in refused(file, text)
    seen = text.replace('A = "b"', 'CUDA_VISIBLE_DEVICES = "1"')
    assert len(read(file, seen).engine.followers) == 2


@pytest.mark.parametrize(("devices", "fine"), [("gpu:0", False), ("gpu:1", True), ("cpu:0", True)])
def test_an_accelerator_belongs_to_one_process(file: Path, devices: str, fine: bool) -> None:
    text = f'{PLAIN}\ndevices = "gpu:0"\n[[workers]]\nhost = "b"\nport = 7103\ndevices = "{devices}"\n'
    if fine:
        assert read(file, text).workers[2].settings.devices == devices
    else:
        assert "workers[2].devices: gpu:0 of 10.0.0.2 is workers[1].devices" in refused(file, text)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=4))
def test_indices_are_the_numbers_that_a_text_names(ranges: list[tuple[int, int]]) -> None:
    numbers = [n for first, more in ranges for n in range(first, first + more + 1)]
    assume(len(set(numbers)) == len(numbers))
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    assert indices(text) == numbers


@given(st.text(alphabet="0123456789-, x", max_size=8))
def test_indices_refuse_any_other_text(text: str) -> None:
    try:
        numbers = indices(text)
    except ValueError:
        return
    assert numbers
    assert set(text) <= set("0123456789-,")
