"""Certificates for an address made by the openssl command, for tests of TLS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


def make_certificates(folder: Path, host: str = "127.0.0.1") -> Path:
    """NAME.pem and NAME.key in `folder`: of the authorities `ca` and `other`, and, by `ca`, of `worker` and
    `engine`; `token` and `wrong`, two secrets."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes this test's certificates, and is not there")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        openssl(f"req -x509 {KEY} -keyout {name}.key -out {name}.pem -subj /CN={name} -days 2")
    (folder / "names").write_text(f"subjectAltName=IP:{host}\n")
    for name in ("worker", "engine"):
        openssl(f"req {KEY} -keyout {name}.key -out {name}.csr -subj /CN={name}")
        by = "-CA ca.pem -CAkey ca.key -CAcreateserial"
        openssl(f"x509 -req -in {name}.csr {by} -out {name}.pem -days 2 -extfile names")
    for name in ("token", "wrong"):
        secret(folder / name, f"{name} secret\n")
    return folder


def secret(path: Path, text: str) -> str:
    """A file with a secret in it; its path."""
    path.write_text(text)
    path.chmod(0o600)
    return str(path)
