"""Compile all Triton kernels without a GPU and analyse the code: ``python -m approxdrop_lightning.ops.triton.aot``.

Reports for each kernel, architecture and type the registers, spilled bytes, shared memory, theoretical occupancy,
tensor-core instruction and asynchronous copies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from approxdrop_lightning.text_table import text_table

if TYPE_CHECKING:
    from approxdrop_lightning.ops.triton.common import Specimen

#: Modules that define ``specimens()``.
MODULES = ("lstm.triton_lstm", "pack.triton_pack", "tile_linear.triton_tiles")

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": the same for 8.0, 9.0 and 10.0 except
# for the shared memory per SM. The system reserves 1 KB of it per block; registers are allocated to warps in units of
# 256.
_REGISTERS, _REGISTER_UNIT, _WARPS, _BLOCKS, _RESERVED = 65536, 256, 64, 32, 1024
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}

_TENSOR_CORE_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
_ASYNCHRONOUS = re.compile(r"\bcp\.async\.c[ag]\.")
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")


@dataclass(frozen=True)
class KernelReport:
    """Resource usage and notable instructions of one compiled kernel.

    Attributes:
        kernel: Name of the specimen.
        arch: Compute capability.
        dtype: Type of the first matrix argument.
        registers: Registers per thread.
        spills: Stack bytes per thread; since the kernels have no local arrays, all of it is spilled registers.
        shared: Bytes of shared memory per block.
        occupancy: Theoretical occupancy: share of an SM's warps that registers, shared memory and block limits allow.
        tensor_core: Tensor-core instruction found, or ``"-"``.
        copies: Asynchronous copies found, or ``"-"``.
        loads: Number of synchronous global loads in the code; fewer means wider.
        store_bits: Width of the widest global store.
    """

    kernel: str
    arch: int
    dtype: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    tensor_core: str
    copies: str
    loads: int
    store_bits: int


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> float:
    """Theoretical occupancy: the share of an SM's warps that can be resident at the same time.

    Args:
        arch: Compute capability.
        registers: Registers per thread.
        shared: Bytes of shared memory per block.
        num_warps: Warps per block.
    """
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(
        _REGISTERS // (of_a_warp * num_warps), _SHARED[arch] // (shared + _RESERVED), _WARPS // num_warps, _BLOCKS
    )
    return blocks * num_warps / _WARPS


def compile_specimen(specimen: Specimen, arch: int) -> KernelReport:
    """Compile one specimen down to machine code (``ptxas``), as a launch on that architecture would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = specimen.kernel.arg_names.index
    source = ASTSource(
        specimen.kernel,
        specimen.signature,
        specimen.constants,
        {(position(name),): [["tt.divisibility", 16]] for name in specimen.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=specimen.options)
    usage = _resource_usage(compiled.asm["cubin"])
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for kind, count, bits in _ACCESS.findall(ptx):
        widths[kind].append(int(count or 1) * int(bits))
    return KernelReport(
        specimen.name,
        arch,
        next(kind[1:] for kind in specimen.signature.values() if kind.startswith("*")),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared,
        occupancy(arch, usage["REG"], shared, compiled.metadata.num_warps),
        " ".join(sorted(set(_TENSOR_CORE_INSTRUCTION.findall(ptx)))) or "-",
        "cp.async" if _ASYNCHRONOUS.search(ptx) else "-",
        len(widths["ld"]),
        max(widths["st"], default=0),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def specimens(parts: Sequence[str] = ("",)) -> list[Specimen]:
    """Specimens of all modules, limited to names that contain one of ``parts``."""
    found = []
    for name in MODULES:
        found += import_module(f"approxdrop_lightning.ops.{name}").specimens()
    return [specimen for specimen in found if any(part in specimen.name for part in parts)]


def compile_all(
    parts: Sequence[str] = ("",), archs: Sequence[int] = (80, 90, 100), jobs: int = 1
) -> list[KernelReport]:
    """Compile all specimens whose names contain one of ``parts``, and return their reports.

    Args:
        parts: Substrings of names; the empty string matches all.
        archs: Compute capabilities.
        jobs: Number of processes; the compiler holds the GIL, so threads would not help.

    Raises:
        ValueError: No specimen matches.
        RuntimeError: The interpreter is enabled, which has nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("kernels are compiled ahead of time without TRITON_INTERPRET=1")
    parts, archs = tuple(parts), tuple(archs)
    count = len(_tasks(parts, archs))
    if not count:
        names = sorted({specimen.name for specimen in specimens()})
        raise ValueError(
            f"no kernel for {list(archs)} has one of {list(parts)} in its name; there are {', '.join(names)}"
        )
    compile_one = partial(_compile_task, parts, archs)
    if jobs == 1:
        return [compile_one(number) for number in range(count)]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, range(count)))


@cache
def _tasks(parts: tuple[str, ...], archs: tuple[int, ...]) -> list[tuple[Specimen, int]]:
    return [(specimen, arch) for specimen in specimens(parts) for arch in specimen.archs if arch in archs]


def _compile_task(parts: tuple[str, ...], archs: tuple[int, ...], number: int) -> KernelReport:
    """Compile the specimen of a number; kernels themselves cannot be pickled for another process."""
    return compile_specimen(*_tasks(parts, archs)[number])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the reports as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m approxdrop_lightning.ops.triton.aot", description=__doc__)
    parser.add_argument("--kernel", nargs="+", default=[""], help="only kernels with one of these in their names")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=(80, 90, 100))
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        reports = compile_all(options.kernel, options.arch, options.jobs)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps([asdict(report) for report in reports]))
        return
    header = [field.name.replace("_", " ") for field in fields(KernelReport)]
    rows = []
    for report in reports:
        cells = asdict(report) | {"arch": f"sm{report.arch}", "occupancy": f"{report.occupancy:.0%}"}
        rows.append(list(map(str, cells.values())))
    print(text_table(header, rows))


if __name__ == "__main__":
    main()
