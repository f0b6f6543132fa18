"""Checks the kernels on this machine's accelerator and times them: `make test-gpu`, `make test-tpu`.

Runs the tests of this folder, then `bench kernels --quick`, each in a process of its own that has the device
alone and a deadline, and writes all of it to one file to send back. It needs JAX for the device, jaxtyping,
numpy, pytest and hypothesis. The exit code is 0 where all tests passed and the benchmark ran.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

BACKEND = {"gpu": "cuda", "tpu": "tpu"}
PAGE_SIZE = {"gpu": 64, "tpu": 128}
FACTS_SECONDS, TEST_SECONDS, ALL_SECONDS = 60, 270, 470
"""The benchmark has what is left. What a part has printed by its deadline is kept."""

OUTCOMES = "PASSED", "FAILED", "ERROR", "SKIPPED"
TEST_LINE = re.compile(rf"^(\S+::\S+) ({'|'.join(OUTCOMES)})", re.MULTILINE)
FACTS = """
import importlib.metadata, json, platform, jax
device = jax.devices()[0]
print(json.dumps({
    "device": device.device_kind, "platform": device.platform, "devices": len(jax.devices()),
    "memory": (device.memory_stats() or {}).get("bytes_limit"), "python": platform.python_version(),
    "packages": {d.name: d.version for d in importlib.metadata.distributions() if d.name and
        any(d.name.startswith(p) for p in ("jax", "libtpu", "nvidia-c", "torch", "flash", "numpy"))},
}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="check.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("platform", choices=BACKEND)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the result (default hardware-PLATFORM.json)"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + ALL_SECONDS
    out = args.out or Path(f"hardware-{args.platform}.json")
    environment = environment_of(args.platform)

    facts = run([sys.executable, "-c", FACTS], FACTS_SECONDS, environment)
    if facts["exit_code"]:
        print(f"JAX finds no {args.platform} on this machine:\n{facts['output'][-2000:]}")
        return 2
    found = facts_in(facts["output"])
    print(f"{found['devices']} x {found['device']}, Python {found['python']}")
    result = {"platform": args.platform, "facts": found, "driver": driver(args.platform), "commit": commit()}
    result["tests"] = tests = run_tests(environment)
    save(out, result)  # what there is, should the rest be cut off
    print(f"tests: {counts(tests['outcomes'])} in {tests['seconds']:.0f} s")
    result["benchmark"] = benchmark = run_benchmark(
        args.platform, deadline - time.monotonic(), environment, out.with_suffix(".rows")
    )
    save(out, result)
    print(benchmark["output"])
    failed = [name for name, outcome in tests["outcomes"].items() if outcome in ("FAILED", "ERROR")]
    if tests["exit_code"] and not failed:  # they could not be collected, or were cut off
        print(tests["output"][-2000:])
    print(*(f"FAILED {name}" for name in failed), f"all of it is in {out.resolve()}", sep="\n")
    return int(bool(tests["exit_code"] or benchmark["exit_code"]))


def environment_of(platform: str) -> dict[str, str]:
    """The device alone, not the CPU in its place; strict dtypes, as in every test; room for torch."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "JAX_PLATFORMS": BACKEND[platform],
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What it printed on both streams, its exit code (124: ended at the deadline), the seconds it took."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        output, code = (late.stdout or b"") + f"\nended after {seconds:.0f} s\n".encode(), 124
    text = output.decode(errors="replace")
    return {"exit_code": code, "seconds": time.monotonic() - started, "output": text}


def facts_in(output: str) -> dict[str, Any]:
    """The answer of FACTS among what a runtime may print before and after it."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"device"')))


def run_tests(environment: Mapping[str, str]) -> dict[str, Any]:
    """The tests of this folder; "outcomes" by test, as far as they came."""
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE), "-v", "--tb=short"]
    ran = run([*command, "-rs", "-o", "faulthandler_timeout=60"], TEST_SECONDS, environment)
    return {**ran, "outcomes": dict(TEST_LINE.findall(ran["output"]))}


def run_benchmark(
    platform: str, seconds: float, environment: Mapping[str, str], rows: Path
) -> dict[str, Any]:
    command = [sys.executable, "-m", "lamina_jax.bench", "kernels", "--quick", "--json", str(rows)]
    ran = run([*command, "--page-size", str(PAGE_SIZE[platform])], seconds, environment)
    if rows.exists():
        ran["rows"] = json.loads(rows.read_text())["results"]
        rows.unlink()
    return ran


def counts(outcomes: Mapping[str, str]) -> str:
    found = Counter(outcomes.values())
    return ", ".join(f"{found[outcome]} {outcome.lower()}" for outcome in OUTCOMES)


def driver(platform: str) -> str:
    """What nvidia-smi says of the GPU, its clocks and its driver."""
    if platform != "gpu":
        return ""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        return run(["nvidia-smi", query, "--format=csv"], 20, os.environ)["output"]
    except FileNotFoundError:
        return "no nvidia-smi"


def commit() -> str:
    try:
        return run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], 20, os.environ)[
            "output"
        ].strip()
    except FileNotFoundError:
        return "no git"


def save(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
