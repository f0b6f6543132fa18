"""Memory limits of containers, pods and jobs, in folders as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina_jax import memory
from lamina_jax.memory_groups import left_in_groups


def group(folder: Path, limit: str, used: int, cached: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    prefix = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}active_file {cached}\n{prefix}inactive_file 1\n")


def system(tmp_path: Path, groups: str) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    return tmp_path / "sys/fs/cgroup"


def test_every_group_above_counts(tmp_path: Path) -> None:
    """A job's limit holds for its steps, which have none of their own; cached files are as good as free."""
    top = system(tmp_path, "0::/job/step\n")
    group(top / "job/step", "max", 500)
    group(top / "job", "1000", 700, cached=99)
    assert list(left_in_groups(tmp_path)) == [400]


def test_the_first_version(tmp_path: Path) -> None:
    top = system(tmp_path, "3:cpuset:/x\n2:memory:/docker/1\n0::/\n") / "memory"
    group(top / "docker/1", "1000", 950, version=1)
    group(top, "9223372036854771712", 2000, version=1)
    assert list(left_in_groups(tmp_path)) == [51, 9223372036854771712 - 1999]


def test_in_a_container_the_top_is_its_own(tmp_path: Path) -> None:
    """Its path may be that of the machine, which is not to be seen."""
    top = system(tmp_path, "0::/kubepods/pod1\n")
    group(top, "1000", 2000)
    assert list(left_in_groups(tmp_path)) == [0]


def test_where_there_are_none(tmp_path: Path) -> None:
    assert list(left_in_groups(tmp_path)) == []


def test_the_memory_of_a_host_is_no_more_than_a_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.host_memory()
    monkeypatch.setattr(memory, "left_in_groups", lambda: iter([]))
    assert memory.host_memory() > 0
    monkeypatch.setattr(memory, "left_in_groups", lambda: iter([4096, whole * 2]))
    assert memory.host_memory() == 4096
