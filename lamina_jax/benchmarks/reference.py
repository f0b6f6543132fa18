"""The outside references of benchmarks: llama.cpp; torch and transformers, in this Python or another one."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import ArgumentParser, ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NO_REFERENCE = (
    "this Python has no torch and transformers to compare with: `make .venv-parity/.installed`, then "
    "--reference-python .venv-parity/bin/python"
)


def add_reference_python(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--reference-python",
        metavar="PATH",
        help="a Python that has torch and transformers, to compare with (default: this one, if it has)",
    )


def reference_python(chosen: str | None) -> str | None:
    """The Python that was chosen, or this one where it has what is needed."""
    return chosen or (sys.executable if find_spec("torch") and find_spec("transformers") else None)


def reference_command(python: str, script: str, settings: dict[str, Any]) -> list[str]:
    """What starts a script of this folder in another Python, where lamina_jax need not be installed."""
    # -P: the modules beside the script are not its own, and have the names of others.
    return [python, "-P", str(Path(__file__).with_name(script)), json.dumps(settings)]


def add_llama_batched_bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--llama-batched-bench",
        metavar="PATH",
        type=_batched_bench,
        help="llama.cpp's tool of that name, to compare with; of what it does only the generation (S_TG) is "
        "timed, not its prefill (default: no such column)",
    )


def _batched_bench(path: str) -> str:
    found = shutil.which(path)
    if found is None:
        raise ArgumentTypeError(f"there is no program {path!r}: build llama.cpp's target llama-batched-bench")
    if find_spec("gguf") is None:
        raise ArgumentTypeError(
            "this Python has no gguf to write the model with: pip install 'lamina_jax[bench]'"
        )
    return found


def llama_cpp_command(tool: str, model: Path, dtype: str, gguf: Path) -> list[str]:
    """What starts llama.cpp as a column; see `lamina_jax.benchmarks.llama_cpp_worker` for the settings."""
    settings = {"tool": tool, "model": str(model), "dtype": dtype, "gguf": str(gguf)}
    return [sys.executable, "-m", "lamina_jax.benchmarks.llama_cpp_worker", json.dumps(settings)]
