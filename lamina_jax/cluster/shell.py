"""Writes commands into bash scripts. An argument may name a variable of the script: ${name} or ${name[0]}."""

from __future__ import annotations

import re
import shlex

from lamina_jax.cluster.commands import Command

VARIABLE = re.compile(r"\$\{[a-z_]+(?:\[\d+\])?\}")


def quoted(text: str) -> str:
    """One word of bash: the text as it is, its variables by their values."""
    if not VARIABLE.search(text):
        return shlex.quote(text)
    variables = VARIABLE.findall(text)
    parts = [re.sub(r'([\\"`$])', r"\\\1", part) for part in VARIABLE.split(text)]
    return (
        '"' + "".join(part + variable for part, variable in zip(parts, [*variables, ""], strict=True)) + '"'
    )


def line(command: Command) -> str:
    """The command with its variables and cores, as words of one line."""
    words = [f"{name}={value}" for name, value in command.environment.items()]
    words = ["env", "PYTHONUNBUFFERED=1", *words]
    if command.cores is not None:
        words += ["taskset", "--cpu-list", command.cores]
    return " ".join(map(quoted, [*words, *command.argv]))
