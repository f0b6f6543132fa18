"""What a compiled program says of itself: memory, collectives, and how much on-chip memory its kernels take.

It reads the text of compiled HLO, and what `ptxas -v` says of the PTX that XLA has dumped.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
_SCOPED = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores")
_TARGET = re.compile(r"^\.target (sm_\w+)", re.MULTILINE)

PTXAS_SECONDS = 60.0


class Kernels(NamedTuple):
    """The most that any kernel of a program takes.

    Attributes:
        vmem: bytes of a TPU's vector memory that an operator keeps for itself; None on a GPU.
        registers: of a thread; None on a TPU, and where there is no PTX to look at.
        spilled: bytes of a thread that registers do not hold; None likewise.
    """

    vmem: int | None = None
    registers: int | None = None
    spilled: int | None = None

    def __str__(self) -> str:
        if self.registers is not None:
            return f"{self.registers} registers, {self.spilled} B spilled"
        return "" if self.vmem is None else f"{self.vmem / 2**10:.0f} KiB VMEM"


def collectives(hlo: str) -> dict[str, int]:
    """How many collective operators of each kind a compiled program runs."""
    return dict(sorted(Counter(_COLLECTIVE.findall(hlo)).items()))


def vmem(hlo: str) -> Kernels:
    """Of a program compiled for a TPU."""
    return Kernels(vmem=max(map(int, _SCOPED.findall(hlo)), default=0))


def registers(ptx_files: Iterable[Path], ptxas: Path) -> Kernels:
    """Of the kernels in PTX files, assembled once more to hear it."""
    told = [_assembled(file, ptxas) for file in ptx_files]
    if not told:
        return Kernels()
    used, spilled = (
        max((int(size) for text in told for size in what.findall(text)), default=0)
        for what in (_REGISTERS, _SPILLS)
    )
    return Kernels(registers=used, spilled=spilled)


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on each device of a `jax.stages.Compiled`."""
    told = compiled.memory_analysis()
    return {
        "arguments": told.argument_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
        "results": told.output_size_in_bytes - told.alias_size_in_bytes,
    }


def _assembled(ptx: Path, ptxas: Path) -> str:
    target = _TARGET.search(ptx.read_text(encoding="utf-8"))
    if target is None:  # constants alone
        return ""
    command = [str(ptxas), "-v", "--gpu-name", target.group(1), "-o", "/dev/null", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PTXAS_SECONDS, check=True)
    return done.stderr
