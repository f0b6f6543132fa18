"""What importing loads: the host's decisions load no jax, the library no HTTP server and no backend."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = "import sys; print('\\n'.join(sorted(sys.modules)))"


def modules_after(*imports: str) -> set[str]:
    """Names in sys.modules of a fresh Python that has imported these."""
    code = "; ".join([*(f"import {name}" for name in imports), REPORT])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "lamina_jax",
        "lamina_jax.core",
        "lamina_jax.config",
        "lamina_jax.engine.pages",
        "lamina_jax.engine.scheduler",
        "lamina_jax.engine.pipeline",
        "lamina_jax.pool.partition",
        "lamina_jax.testing",
    ],
)
def test_the_hosts_decisions_load_no_jax(module: str) -> None:
    loaded = modules_after(module)
    assert module in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "fastapi", "uvicorn"}


def test_the_library_loads_no_http_server() -> None:
    loaded = modules_after("lamina_jax.llm", "lamina_jax.slicing", "lamina_jax.weights")
    assert "jax" in loaded
    assert not loaded & {"fastapi", "uvicorn", "starlette", "torch", "transformers"}


def test_the_server_loads_no_jax() -> None:
    """Its engine's process does, at the same time."""
    loaded = modules_after(
        "lamina_jax.serve",
        "lamina_jax.server.lifecycle",
        "lamina_jax.server.engine_loop",
        "lamina_jax.weights.hub",
    )
    assert "uvicorn" in loaded
    assert not loaded & {"jax", "jaxlib", "flax"}


def test_the_kernels_benchmark_loads_nothing_of_the_servers() -> None:
    """It runs on an accelerator's machine with jax, numpy and jaxtyping alone."""
    loaded = modules_after("lamina_jax.bench", "lamina_jax.benchmarks.kernels", "lamina_jax.ops")
    assert not loaded & {"fastapi", "grpc", "flax", "safetensors", "tokenizers", "msgspec", "rich", "scipy"}


def test_importing_starts_no_backend() -> None:
    """Virtual devices and platforms can still be chosen after the import."""
    code = (
        "import lamina_jax, lamina_jax.llm, lamina_jax.slicing, jax; "
        "jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 3); "
        "print(len(jax.devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_an_unknown_public_name_is_refused_with_the_names_there_are() -> None:
    import lamina_jax

    with pytest.raises(AttributeError, match=r"no attribute 'LMM'.*LLM"):
        _ = lamina_jax.LMM


def test_every_public_name_resolves() -> None:
    import lamina_jax

    for name in lamina_jax.__all__:
        assert getattr(lamina_jax, name).__name__ == name
