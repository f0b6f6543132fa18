"""Which compute host a process is, from the variables that Slurm, Kubernetes and Cloud TPU set."""

from __future__ import annotations

import pytest

from lamina_jax.config import ConfigError, EngineConfig
from lamina_jax.hosts.detect import Place, find_place, first_host, placed_by

SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-05,9]"}
LWS = {"LWS_WORKER_INDEX": "0", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "lamina-0.lamina.default"}
JOB_SET = {
    "JOBSET_NAME": "lamina",
    "REPLICATED_JOB_NAME": "compute",
    "JOB_COMPLETION_INDEX": "3",
    "NUM_HOSTS": "4",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place("gpu03:7100", 4, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, Place("gpu03:7100", 2, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.1.1.1"},
            Place("10.1.1.1:7100", 1, 0),
        ),
        (LWS, Place("lamina-0.lamina.default:7100", 2, 0)),
        (JOB_SET, Place("lamina-compute-0-0.lamina:7100", 4, 3)),
        (TPU, Place("10.0.0.2:7100", 2, 1)),
        (TPU | LWS, Place("lamina-0.lamina.default:7100", 2, 0)),
    ],
)
def test_a_place_is_found(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[007,9],m1", "n007"), ("r[2-4]-x,y", "r2-x")],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {},
            r"looked for SLURM_PROCID.*LWS_WORKER_INDEX.*JOBSET_NAME.*TPU_WORKER_ID.*--coordinator HOST:PORT",
        ),
        ({"TPU_WORKER_ID": "0"}, "TPU_WORKER_HOSTNAMES is not set"),
        (LWS | {"LWS_GROUP_SIZE": "two"}, "LWS_GROUP_SIZE='two' is no number"),
        (TPU | {"TPU_WORKER_ID": "2"}, "host 2 of 2"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, r"'\[1-2\]' is no list of nodes"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_place(environment)


def test_auto_stands_for_what_is_found() -> None:
    config = EngineConfig(attention="a:1", coordinator="auto")
    found = placed_by(config, TPU)
    assert (found.coordinator, found.num_hosts, found.host_id) == ("10.0.0.2:7100", 2, 1)
    assert placed_by(found, {}) is found
