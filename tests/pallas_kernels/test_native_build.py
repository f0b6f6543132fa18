"""Compiling the native kernels: once, and what is said where it cannot be done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import native
from pallas_kernels.native import build


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a compiler, as $CXX: it tells its version, notes other calls and writes their output."""
    calls, script = tmp_path / "calls", tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo stand-in 1; exit; fi
echo "$@" >> {calls}
for last; do :; done
[ -e {tmp_path}/broken ] && {{ echo "vectors.h: no such instruction" >&2; exit 1; }}
echo library > "$last"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def test_a_library_is_compiled_once(compiler: Path) -> None:
    folder = compiler / "kept" / "native"
    first = build.library(folder)
    assert first.read_text() == "library\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    calls = (compiler / "calls").read_text().splitlines()
    assert len(calls) == 3  # each source, then all together
    assert build.library(folder) == first
    assert (compiler / "calls").read_text().splitlines() == calls
    assert [path.name for path in folder.iterdir()] == [first.name]  # nothing is left beside it


def test_another_compiler_makes_another_library(compiler: Path) -> None:
    first = build.library(compiler / "native")
    script = compiler / "c++"
    script.write_text(script.read_text().replace("stand-in 1", "stand-in 2"))
    assert build.library(compiler / "native") != first


def test_a_compiler_that_fails_is_quoted(compiler: Path) -> None:
    (compiler / "broken").touch()
    with pytest.raises(build.BuildError, match="no such instruction"):
        build.library(compiler / "native")
    assert list((compiler / "native").iterdir()) == []


def test_a_library_that_cannot_be_put_leaves_nothing(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(build.BuildError, match=r"cannot write to .*: No space left"):
        build.library(compiler / "native")
    assert list((compiler / "native").iterdir()) == []


def test_a_library_that_does_not_load_is_none(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an engine runs XLA's kernels, as where nothing can be compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiler))
    with pytest.raises(build.BuildError, match=r"cannot load the compiled kernels: .*remove them"):
        native.load.__wrapped__()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.library(tmp_path)


def test_a_compiler_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match="none --version fails"):
        build.library(tmp_path)


def test_a_compiler_that_takes_too_long(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = compiler / "c++"
    script.write_text(script.read_text().replace("for last", "sleep 30; for last"))
    monkeypatch.setattr(build, "SECONDS", 0.2)
    with pytest.raises(build.BuildError, match="took more than"):
        build.library(compiler / "native")


@pytest.mark.multi
def test_a_compiler_and_its_children_end_with_a_start_that_is_killed(compiler: Path) -> None:
    script, child = compiler / "c++", compiler / "child"
    script.write_text(
        script.read_text().replace("for last", f"sleep 300 & echo $! > {child}; wait; for last")
    )
    imports = "from pathlib import Path; from pallas_kernels.native import build"
    code = f"{imports}; build.library(Path({str(compiler)!r}))"
    start = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = int(_soon(lambda: child.read_text() if child.exists() else ""))
    finally:
        start.send_signal(signal.SIGKILL)
        start.wait()
    _soon(lambda: not _runs(pid))


def _soon(ask: Callable[[], Any]) -> Any:
    """What it answers, once that is true."""
    deadline = time.monotonic() + 30
    while not (answer := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
