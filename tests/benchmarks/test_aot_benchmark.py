"""Ahead-of-time compilation, as far as it needs no compiler: what is read, and the table. See tests/aot."""

from __future__ import annotations

import argparse
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from lamina_jax.aot.cases import CASES, chosen
from lamina_jax.aot.devices import KINDS, Topology, target_config
from lamina_jax.aot.measure import Kernels, collectives, registers, vmem
from lamina_jax.aot.sides import SIDES
from lamina_jax.benchmarks import aot
from lamina_jax.benchmarks.columns import Column
from lamina_jax.models.shapes import SHAPES

HLO = """
%add.clone (x: f32[], y: f32[]) -> f32[] { ROOT %add = f32[] add(%x, %y) }
ENTRY %main {
  %all-reduce = f32[32,1024]{1,0:T(8,128)S(1)} all-reduce(%fusion.27), channel_id=1, to_apply=%add.clone
  %all-gather-start = (bf16[64,1024]{0,1}, bf16[64,4096]{0,1}) all-gather-start(%bitcast.30.0), dimensions={1}
  %all-gather-done = bf16[64,4096]{0,1} all-gather-done(%all-gather-start)
  %fusion = f32[8] fusion(%all-reduce), kind=kLoop, backend_config={"used_scoped_memory_configs":[]}
  ROOT %all-reduce.1 = f32[8] all-reduce(%fusion), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"131072"}]}
  %c = f32[8] custom-call(%x), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"2048"}]}
}
"""  # noqa: E501 - as XLA writes them


def test_collectives_are_counted_once_each() -> None:
    assert collectives(HLO) == {"all-gather": 1, "all-reduce": 2}
    assert collectives("%x = f32[] add(%y, %z)") == {}


def test_vector_memory_is_that_of_the_greediest_operator() -> None:
    assert vmem(HLO) == Kernels(vmem=131072)
    assert str(vmem(HLO)) == "128 KiB VMEM"


def test_registers_are_those_that_ptxas_tells_of_each_file(tmp_path: Path) -> None:
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(
        '#!/bin/sh\nfor file; do :; done\ncat "$file".told >&2\necho "$3" >> "$(dirname "$file")/targets"\n'
    )
    ptxas.chmod(ptxas.stat().st_mode | stat.S_IEXEC)
    told = {
        "a": "0 bytes spill stores, 0 bytes spill loads\nUsed 80 registers, 384 bytes smem",
        "b": "8 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\nUsed 40 registers",
    }
    for name, text in told.items():
        (tmp_path / f"{name}.ptx").write_text(".version 8.0\n.target sm_90a\n")
        (tmp_path / f"{name}.ptx.told").write_text(text)
    (tmp_path / "constants.ptx").write_text("")
    found = registers(sorted(tmp_path.glob("*.ptx")), ptxas)
    assert found == Kernels(registers=80, spilled=16)
    assert str(found) == "80 registers, 16 B spilled"
    assert (tmp_path / "targets").read_text().split() == ["sm_90a", "sm_90a"]
    assert registers([], ptxas) == Kernels()


def test_the_cases_are_all_of_known_sides_models_and_devices() -> None:
    assert len(set(CASES)) == len(CASES)
    for case in CASES:
        assert case.side in SIDES
        assert case.model in SHAPES
        assert Topology(case.topology).size >= 1
    sides = {(case.side, case.model) for case in CASES}
    assert sides >= {(side, model) for side in ("compute", "memory") for model in SHAPES}


def test_cases_are_chosen_by_all_of_the_words() -> None:
    assert [str(case) for case in chosen(["memory llama3-8b h20"])] == ["memory llama3-8b h20:1"]
    assert chosen([]) == CASES
    with pytest.raises(ValueError, match="no case has 'b200'"):
        chosen(["h100", "b200"])


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:2y2", "h100:0", "h100:2x2x2"])
def test_a_topology_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="KIND:SHAPE"):
        Topology(name)


def test_a_gpu_is_described_by_what_differs() -> None:
    text = target_config(KINDS["l40s"])
    assert "cuda_compute_capability { major: 8 minor: 9 }" in text
    assert "shared_memory_per_block_optin: 101376" in text
    assert "core_count: 142" in text
    assert "fpus_per_core: 128" in text
    assert "fpus_per_core: 64" in target_config(KINDS["a100"])
    with pytest.raises(ValueError, match="tpu"):
        target_config(KINDS["v5e"])


def result(**changes: Any) -> dict[str, Any]:
    program = {
        "name": "slice 1 (query) (32, 1)",
        "seconds": 1.25,
        "arguments": 3_000_000,
        "temporaries": 2_000_000,
        "results": 1_000_000,
        "collectives": {"all-reduce": 2},
        "kernels": Kernels(vmem=2048)._asdict(),
    }
    needs = {"weights": 9_000_000_000, "pages": 0, "temporaries": 100_000_000, "in_flight": 1_000_000_000}
    return {
        "case": "compute llama3-70b v5e:4x4",
        "devices": 16,
        "hosts": 4,
        "usable": 14_400_000_000,
        "needs": needs,
        "layer": {"all-reduce": 2},
        "programs": [program, {**program, "kernels": Kernels(vmem=1024)._asdict()}],
        **changes,
    }


def test_a_row_says_what_a_case_needs() -> None:
    row = aot.summary([result()]).splitlines()[-1]
    assert row.split("  ")[0] == "compute llama3-70b v5e:4x4"
    assert " ".join(row.split()[3:]) == "16 4 2 2.5 9.00 0.10 1.00 14.4 2 all-reduce 2 KiB VMEM"


def test_what_does_not_fit_is_refused_in_words() -> None:
    refused = result(usable=9_900_000_000, programs=[], layer={})
    assert aot.refusal(refused) == "does not fit: needs 10.1 GB of 9.9 GB"
    assert "does not fit: needs 10.1 GB of 9.9 GB" in aot.summary([result(), refused]).splitlines()[-1]
    assert aot.refusal(result()) == ""


def test_programs_are_listed_in_megabytes() -> None:
    row = aot.programs(result()).splitlines()[-1]
    assert " ".join(row.split()[-9:]) == "1.2 3.0 2.0 1.0 2 all-reduce 1 KiB VMEM"


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "missing", lambda platform: ["libtpu"])
    with pytest.raises(SystemExit, match=r"libtpu .*not installed.*lamina_jax\[aot\]"):
        aot.compile_cases(chosen(["memory qwen3-0.6b v5e"]), {})


class Scripted(Column):
    """A process that compiles nothing: the lines that it has still to print."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        refused = question["case"].topology == "v5e:1x1"
        found = [] if refused else [{"name": "append"}, {"name": "attend"}]
        self.lines = [*found, {"needs": {}, "devices": question["rows"]}]
        return self.lines.pop(0)

    def line(self) -> str:
        return json.dumps(self.lines.pop(0))

    def close(self) -> None:
        assert not self.lines


def test_programs_are_told_one_by_one_and_then_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a deadline is that of a program."""
    started: list[str] = []
    monkeypatch.setattr(aot, "_column", lambda platform: started.append(platform) or Scripted())
    cases = chosen(["memory llama3-70b v5e", "memory llama3-70b h20"])
    results = aot.compile_cases(cases, {"rows": 8})
    assert [[program["name"] for program in result["programs"]] for result in results] == [
        [],
        *[["append", "attend"]] * 3,
    ]
    assert {result["devices"] for result in results} == {8}
    assert started == ["tpu", "cuda"]


def test_a_kv_dtype_that_is_none_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    aot.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-dtype", "int4"])
    assert "--kv-dtype: invalid choice: 'int4'" in capsys.readouterr().err
