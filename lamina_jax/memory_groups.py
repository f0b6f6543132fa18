"""How much memory the control groups of Linux leave this process: those of a container, a pod or a job.

Knows both versions of control groups, and nothing of who will fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SYSTEM = Path("/")


class _Names(NamedTuple):
    """Of files in a group's folder, and of the lines of memory.stat that tell what could be taken back."""

    folder: str
    limit: str
    used: str
    cached: tuple[str, str]


_V1 = _Names(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
_V2 = _Names(".", "memory.max", "memory.current", ("active_file", "inactive_file"))


def left_in_groups(system: Path = SYSTEM) -> Iterator[int]:
    """Bytes that each group with a limit, of those that this process is in, has left; files that are cached
    count as free, as they do in MemAvailable.

    Args:
        system: where /proc and /sys are.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        top = system / "sys/fs/cgroup" / names.folder
        group = top / path.lstrip("/")
        # In a container the path may be that of the machine, of which only the top is to be seen here.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _left_in(folder, names)


def _left_in(folder: Path, names: _Names) -> Iterator[int]:
    try:
        limit, used = (int((folder / name).read_text()) for name in (names.limit, names.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, limit - used + sum(int(stat[name]) for name in names.cached))
    except (OSError, ValueError, KeyError):  # no such folder, or no limit: "max"
        return
