"""A process that compiles for one platform: `python -m lamina_jax.aot.worker PLATFORM`; see `main`.

Compilers are told where they are by the environment before they are loaded, so each platform has a process
of its own, and jax is imported late.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lamina_jax.aot.cases import Case
from lamina_jax.aot.measure import Kernels, collectives, memory_of, registers, vmem

PACKAGES = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}
"""What compiles for each platform."""

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Nobody else is kept from a chip: there is none.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""libtpu would ask the machine that it runs on."""


def missing(platform: str) -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    installed = {each.name for each in importlib.metadata.distributions()}
    return [name for name in PACKAGES[platform] if name not in installed]


def ptxas() -> Path:
    """The assembler of NVIDIA's; its package is one of `PACKAGES`."""
    (nvcc,) = importlib.import_module("nvidia.cuda_nvcc").__path__
    return Path(nvcc) / "bin" / "ptxas"


def main() -> None:
    """Print "ready"; then for each line, a question of `measure`, its answers as lines. JSON all."""
    platform = sys.argv[1]
    with tempfile.TemporaryDirectory(prefix="lamina-aot-") as folder:
        # What is computed in passing runs on the CPU.
        os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        # A program that comes from a cache leaves no PTX, and took no time to compile.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if platform == "tpu":
            os.environ |= TPU_ENVIRONMENT
        else:
            os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false"
        print("ready", flush=True)
        for line in sys.stdin:
            for answer in measure(json.loads(line), lambda hlo: _kernels(platform, hlo, Path(folder))):
                print(json.dumps(answer), flush=True)


def measure(question: dict[str, Any], kernels: Callable[[str], Kernels]) -> Iterator[dict[str, Any]]:
    """Compile a case.

    Args:
        question: "case", "rows", "context" and "kv_dtype".
        kernels: what those of the program just compiled take, by its HLO.

    Yields:
        Of each program as it is compiled its "name", "seconds" and what `lamina_jax.aot.measure` finds; of
        what does not fit, whatever programs need, there are none. At last "devices", "hosts"; "usable": bytes
        of each device that may be filled, and "needs" of them, by what for; "layer": the collectives of a
        layer in the middle.
    """
    from lamina_jax.aot.devices import Topology
    from lamina_jax.aot.sides import SIDES
    from lamina_jax.aot.step import Step
    from lamina_jax.memory import ACCELERATOR_FRACTION

    case = Case(*question["case"])
    step = Step(case.model, question["rows"], question["context"], question["kv_dtype"])
    topology = Topology(case.topology)
    devices, usable = topology.devices(), int(topology.kind.memory * ACCELERATOR_FRACTION)
    side = SIDES[case.side](step, devices)

    def needs() -> dict[str, int]:
        each = side.needs(devices, step.limits)._asdict()
        return {"pages": each.pop("page") * step.geometry.num_pages, **each}

    fits = sum(needs().values()) <= usable
    for name, job in side.jobs if fits else ():
        yield _compiled(name, job, kernels)
    yield {
        "layer": collectives("".join(each.compiled.as_text() for each in side.layer())) if fits else {},
        "needs": needs(),
        "usable": usable,
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
    }


def _compiled(name: str, job: Callable[[], Any], kernels: Callable[[str], Kernels]) -> dict[str, Any]:
    started = time.monotonic()
    compiled = job()
    seconds, hlo = time.monotonic() - started, compiled.as_text()
    return {
        "name": name.partition(" on ")[0],
        "seconds": seconds,
        **memory_of(compiled),
        "collectives": collectives(hlo),
        "kernels": kernels(hlo)._asdict(),
    }


def _kernels(platform: str, hlo: str, dump: Path) -> Kernels:
    if platform == "tpu":
        return vmem(hlo)
    found = registers(dump.glob("*.ptx"), ptxas())
    for file in dump.iterdir():  # the next program's stand alone
        file.unlink()
    return found


if __name__ == "__main__":
    main()
