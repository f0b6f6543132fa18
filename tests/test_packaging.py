"""The wheel: it holds the two packages with their data and nothing else, and works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in a clean environment; its output."""
    env = {"PATH": os.defpath, "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command], cwd=cwd, env=env, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which sees this one's dependencies but not the checkout.

    A path in a .pth file is searched, but .pth files found there are not read, so that an editable
    install of the checkout stays out.
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=home)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_only_the_two_packages_install(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lamina_jax", "pallas_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_tracked_file_of_the_packages_is_in(wheel: Path) -> None:
    """Package data (the bundled model, py.typed) travels with the code."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "lamina_jax", "pallas_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {"lamina_jax/py.typed", "pallas_kernels/py.typed"} <= packed
    assert set(tracked.stdout.split()) <= packed


def test_the_wheel_works_from_an_empty_directory(python: Path, tmp_path: Path) -> None:
    """The library's front door: a model of the fixtures, decoded across two meshes."""
    case = ROOT / "tests" / "fixtures" / "parity" / "llama_theta"
    code = f"""
import lamina_jax
llm = lamina_jax.LLM({str(case)!r}, max_model_len=32, max_num_seqs=1, num_pages=4)
(output,) = llm.generate([1, 2, 3], lamina_jax.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
print(len(output.outputs[0].token_ids), lamina_jax.__file__)
"""
    count, file = run(python, "-c", code, cwd=tmp_path).split(maxsplit=1)
    assert count == "2"
    assert not Path(file).is_relative_to(ROOT)


def test_the_commands_are_in_the_wheel(python: Path, tmp_path: Path) -> None:
    assert "--max-num-seqs" in run(python, "-m", "lamina_jax.serve", "--help", cwd=tmp_path)


def test_the_cluster_files_are_in_the_wheel(python: Path, tmp_path: Path) -> None:
    dry_run = run(python, "-m", "lamina_jax.serve", "--cluster", "local", "--dry-run", cwd=tmp_path)
    assert f"{python.parent.parent}/lib" in dry_run
    assert str(ROOT) not in dry_run
