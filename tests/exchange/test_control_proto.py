"""control_pb2.py is what control.proto says; `make proto` makes it so."""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_the_generated_files_are_those_of_the_proto(tmp_path: Path) -> None:
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    source = "lamina_jax/exchange/control.proto"
    assert protoc.main(["protoc", f"-I{ROOT}", *out, str(ROOT / source)]) == 0
    for name in ("control_pb2.py", "control_pb2.pyi"):
        made, kept = (folder / "lamina_jax/exchange" / name for folder in (tmp_path, ROOT))
        assert made.read_text() == kept.read_text(), "run `make proto` and commit what it writes"
