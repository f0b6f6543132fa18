"""Compiled programs are kept and found again, from anywhere, whatever else happens to the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from lamina_jax.compilation import Compilation, Compiled, compile_all
from lamina_jax.compilation_cache import default_folder, keep_programs

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def _settings_of_the_session() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def compile_once() -> tuple[Compiled, np.ndarray]:
    """A program as a start would compile it, and what it computes."""
    size = jax.ShapeDtypeStruct((3,), jnp.float32)
    program = Compilation(lambda x: 2 * x + 1, (size,))
    compiled = compile_all([("program", program.compile)], lambda done, total: None)
    return compiled, np.asarray(program(jnp.arange(3.0)))


def test_a_program_is_found_again(tmp_path: Path) -> None:
    keep_programs(str(tmp_path / "new" / "folder"))
    assert [compile_once()[0][:2] for _ in range(2)] == [(1, 0), (1, 1)]


def test_counts_are_told() -> None:
    assert str(Compiled(61, 60, 1.26)) == "compiled 61 programs: 60 from the cache, 1 new, in 1.3 s"


def test_off_keeps_nothing(tmp_path: Path) -> None:
    keep_programs(str(tmp_path))
    keep_programs("off")
    keep_programs(None)  # nobody has asked for it since
    assert [compile_once()[0][:2] for _ in range(2)] == [(1, 0), (1, 0)]
    assert not list(tmp_path.iterdir())


def test_the_folder_that_jax_has_is_left_alone(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    keep_programs(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert [compile_once()[0].from_cache for _ in range(2)] == [0, 1]


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "lamina_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(None)
    folder = tmp_path / "cache" / "lamina_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_written_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    keep_programs(str(tmp_path / "file" / "cache"))
    assert "file/cache" in caplog.text
    assert "--compilation-cache" in caplog.text
    assert compile_once()[0].from_cache == 0


@pytest.mark.parametrize("damage", [lambda entry: entry[: len(entry) // 2], lambda entry: b"x" * len(entry)])
def test_an_entry_that_cannot_be_read_is_compiled_anew(tmp_path: Path, damage: object) -> None:
    keep_programs(str(tmp_path))
    _, expected = compile_once()
    for entry in tmp_path.iterdir():
        entry.write_bytes(damage(entry.read_bytes()))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        compiled, found = compile_once()
    assert compiled.from_cache == 0
    np.testing.assert_array_equal(found, expected)


def test_two_at_once_get_the_same(tmp_path: Path) -> None:
    """As many threads as there are cores write and read one entry."""
    keep_programs(str(tmp_path))
    size = jax.ShapeDtypeStruct((3,), jnp.float32)
    programs = [Compilation(lambda x: 3 * x - 1, (size,)) for _ in range(4 * (os.cpu_count() or 1))]
    compile_all([("program", program.compile) for program in programs], lambda done, total: None)
    for program in programs:
        np.testing.assert_array_equal(program(jnp.arange(3.0)), [-1.0, 2.0, 5.0])
