"""The outside reference of benchmarks: torch and transformers, in this Python or in another one."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
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
