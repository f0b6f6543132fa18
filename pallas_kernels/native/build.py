"""Compiling the C++ kernels for this machine's CPU, once: the library is kept for the next start.

Knows how a compiler is found and called. Knows nothing of what the kernels compute, nor of JAX beyond its
headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
from jaxlib import version as jaxlib_version

SOURCES = Path(__file__).parent
SECONDS = 90.0
"""How long compiling may take, and so how long a compiler that hangs holds up a start. On two quiet cores it
needs some eight."""

# Runs a compiler, which has children of its own: when standard input ends, because the process that holds its
# other end has, the whole group ends.
WITH_PARENT = (
    'exec 3<&0; "$@" 3<&- </dev/null & compiler=$!; { cat <&3; kill -9 0; } >/dev/null 2>&1 & wait $compiler'
)

# As fast as this machine allows: the library is never used on another. GCC warns of its own headers.
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread", "-w")


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def library(folder: Path) -> Path:
    """The compiled kernels, from `folder`, or compiled and kept there.

    What they are compiled from and for is in the file's name, so that another machine, compiler or jaxlib
    compiles its own.

    Raises:
        BuildError: no compiler, one that fails, or a folder that cannot be written to.
    """
    compiler = _compiler()
    path = folder / f"lamina-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lamina-native-") as work:
            built = Path(work) / path.name
            _compile(compiler, built)
            _put(built, path)
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error.strerror}") from error
    return path


def _put(built: Path, path: Path) -> None:
    """Copy at once: others, of other machines too, may be looking, or putting theirs."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(built.read_bytes())
        os.replace(unfinished, path)
    except OSError:
        os.unlink(unfinished)
        raise


def _compile(compiler: list[str], output: Path) -> None:
    """Each source by a process of its own, then all into one library."""
    headers = ("-isystem", jax.ffi.include_dir())
    objects = {path: output.with_name(f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cc"))}
    compilations = [
        [*compiler, *OPTIONS, *headers, "-c", str(source), "-o", str(to)] for source, to in objects.items()
    ]
    _run(compilations, output.parent)
    _run([[*compiler, "-shared", "-pthread", *map(str, objects.values()), "-o", str(output)]], output.parent)


def _run(commands: list[list[str]], folder: Path) -> None:
    """All at the same time. None outlives this call, nor this process if it is killed."""
    deadline = time.monotonic() + SECONDS
    alive, held = os.pipe()
    running = [
        subprocess.Popen(
            ["/bin/sh", "-c", WITH_PARENT, "sh", *command],
            stdin=alive,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        for command, process in zip(commands, running, strict=True):
            _, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            if process.returncode:
                told = errors.decode(errors="replace")[-2000:]
                raise BuildError(f"{shlex.join(command)} failed:\n{told}")
    except subprocess.TimeoutExpired:
        raise BuildError(f"{commands[0][0]} took more than {SECONDS:.0f} s, and was ended") from None
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        os.close(alive)
        os.close(held)


def _compiler() -> list[str]:
    """The command of a C++ compiler that knows GCC's vector types: $CXX, else what is installed."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: neither $CXX nor g++, clang++ or c++")


def _fingerprint(compiler: list[str]) -> str:
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, timeout=30, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise BuildError(f"{shlex.join(compiler)} --version fails ({error})") from error
    digest = hashlib.sha256()
    for part in (version, jaxlib_version.__version__.encode(), shlex.join(OPTIONS).encode(), _cpu()):
        digest.update(part + b"\0")
    for path in sorted(SOURCES.glob("*.cc")) + sorted(SOURCES.glob("*.h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> bytes:
    """What the instructions that the compiler may use depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    telling = (b"vendor_id", b"cpu family", b"model", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(telling)}))
