"""The twins' machine code without a GPU: compiled ahead for a named target, and what can be read off it.

Triton's wheel carries the compilers and the disassembler for its targets, so instructions, registers and spills can
be checked on any machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stretto.core.errors import require
from stretto.kernels.triton import striped, w4a8, w4a16
from stretto.kernels.triton.layout import tile_depth
from stretto.kernels.triton.striped import ROWS_OF_TILES, STAGES_AMD, STAGES_NVIDIA, warps_of

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "w4a16": (w4a16.multiply, {"x": "*bf16"}),
    "w4a8": (w4a8.multiply, {"x": "*i8"}),
    "quantize": (w4a8.quantize_group, {"x": "*fp32"}),
    "sum": (striped.sum_slices, {}),
}
_POINTERS = {
    "weights": "*u8",
    "scales": "*fp16",
    "minima": "*fp16",
    "numbers": "*fp32",
    "values": "*i8",
    "out": "*bf16",
    "partials": "*fp32",
}
_NUMBERS = ("rows", "columns", "inner", "inner_tiles", "column_tiles", "slices", "length")


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """One kernel as a target runs it.

    Attributes:
        text: PTX, or AMD's assembly.
        registers: vector registers of a thread.
        spilled: registers that did not fit, or on NVIDIA the bytes of stack that they took.
        local_bytes: memory of a thread beside its registers.
        shared_bytes: of a program.
    """

    text: str
    registers: int
    spilled: int
    local_bytes: int
    shared_bytes: int

    def count(self, pattern: str) -> int:
        """How many times a regular expression occurs in the text."""
        return len(re.findall(pattern, self.text))


def machine_code(
    kernel: str,
    target: str,
    *,
    rows: int,
    group: int = 128,
    inner: int = 4096,
    minimum: bool = False,
    fragments: bool = False,
) -> MachineCode:
    """A twin, or one of the small kernels before and after it, for tiles of `rows` and weights in groups of `group`.

    Raises:
        ValueError: for a kernel or target that is not known here.
    """
    require(kernel in KERNELS, "kernel", kernel, f"one of {', '.join(KERNELS)}")
    require(target in TARGETS, "target", target, f"one of {', '.join(TARGETS)}")
    function, own = KERNELS[kernel]
    require(rows in ROWS_OF_TILES, "rows", rows, f"one of {', '.join(map(str, ROWS_OF_TILES))}")
    known: dict[str, int | None] = {**w4a16.constants(group, tile_depth(group), inner, rows, minimum)}
    known |= {"FRAGMENT_WARPS": warps_of(rows) if fragments else 0}
    known |= {"GROUP": group, "WIDTH": triton.next_power_of_2(group)}
    if not minimum:
        known["minima"] = None
    constants = {name: value for name, value in known.items() if name in function.arg_names}
    types = {**_POINTERS, **own, **dict.fromkeys(_NUMBERS, "i32")}
    names = function.arg_names
    # What the launcher would find out: addresses, and sizes of inner dimensions, are multiples of 16.
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in ("inner", "columns")]
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
    )
    stages = STAGES_NVIDIA if TARGETS[target].backend == "cuda" else STAGES_AMD
    options = {"num_warps": warps_of(rows), "num_stages": stages}
    if kernel == "quantize":
        options |= w4a8.QUANTIZE_OPTIONS
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return (_nvidia if TARGETS[target].backend == "cuda" else _amd)(compiled)


def _nvidia(compiled: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return MachineCode(
        text=compiled.asm["ptx"],
        registers=used["REG"],
        spilled=used["STACK"],
        local_bytes=used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def _amd(compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
    return MachineCode(
        text=text,
        registers=used["vgpr_count"] + used["agpr_count"],
        spilled=used["vgpr_spill_count"],
        local_bytes=used["private_segment_fixed_size"],
        shared_bytes=compiled.metadata.shared,
    )
