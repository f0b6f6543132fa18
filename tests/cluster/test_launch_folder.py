"""The Dockerfiles, which no test builds: what can be seen without."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lamina_jax.cluster.pod import IMAGE_TAGS, USER

ROOT = Path(__file__).parent.parent.parent
DOCKERFILES = sorted((ROOT / "launch" / "docker").iterdir())
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, what follows), comments left out and lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()
    ]


def test_there_is_one_for_each_platform() -> None:
    assert {path.suffix.removeprefix(".") for path in DOCKERFILES} == set(IMAGE_TAGS.values())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_there_is_and_runs_as_its_own_user(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", found[0][1])
    for name, rest in found:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
    (installed,) = (rest for name, rest in found if name == "RUN" and rest.startswith("pip "))
    assert "--constraint constraints.txt" in installed
    extras = re.findall(r"\.\[(\w+)\]", installed)
    assert set(extras) <= set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    last = dict(found)
    assert last["USER"] == str(USER)
    assert "/health" in last["HEALTHCHECK"]
    assert f"--tag lamina_jax:{path.suffix[1:]} ." in path.read_text()
