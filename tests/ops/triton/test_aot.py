"""Kernels compiled ahead of time, without a GPU, in subprocesses where the interpreter is off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, compiler_environment

pytest.importorskip("triton")

import triton

from approxdrop_lightning.ops.triton import aot

pytestmark = pytest.mark.triton


def run(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "approxdrop_lightning.ops.triton.aot", *arguments],
        env=environment or compiler_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """The wheel includes the assembler; builds of Triton without it cannot run these tests."""
    for tool in (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.cuobjdump):
        if not Path(tool.path).exists():
            pytest.skip(f"{tool.path} is missing")


#: Some kernels of each module with their default tiling; the others are left to the command line.
PRODUCTS = ("tile_forward_32_128x128", "tile_input_grad_16_128x128", "tile_weight_grad_128_128x128")
COPIES = ("unpack_blocks_both_16x128", "unpack_single_both_16x128")
KERNELS = (*PRODUCTS, *COPIES, "lstm_backward_kept")


@pytest.fixture(scope="module")
def reports():
    done = run("--kernel", *KERNELS, "--json")
    assert done.returncode == 0, done.stderr
    return [aot.KernelReport(**report) for report in json.loads(done.stdout)]


def test_every_kernel_and_architecture_is_there(reports):
    assert {(name, r.arch) for r in reports for name in KERNELS if name in r.kernel} == {
        (name, arch) for name in KERNELS for arch in (80, 90, 100)
    }


def test_nothing_is_spilled(reports):
    assert [r for r in reports if r.spills] == []


def test_products_of_16_bit_types_run_on_tensor_cores(reports):
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    products = [r for r in reports if r.kernel.startswith(PRODUCTS)]
    assert {r.dtype for r in products} == {"fp16", "bf16"}
    assert [r for r in products if instruction[r.arch] not in r.tensor_core] == []


def test_operands_are_copied_asynchronously(reports):
    assert [r for r in reports if r.kernel.startswith(PRODUCTS) and r.copies == "-"] == []


def test_blocks_of_units_are_copied_16_bytes_at_a_time(reports):
    """Single units are loaded one by one. The name of one kernel's specimens is a part of the other's."""
    by_kind = {
        kind: {(r.arch, r.dtype): r for r in reports if f"pack_{kind}_both" in r.kernel and r.kernel[0] == "u"}
        for kind in ("blocks", "single")
    }
    assert len(by_kind["blocks"]) == len(by_kind["single"]) == 9
    for key, report in by_kind["blocks"].items():
        assert report.store_bits == 128
        assert report.loads < by_kind["single"][key].loads / (1.3 if report.dtype == "fp32" else 1.5)


def test_blocks_fit_an_sm(reports):
    assert [r for r in reports if r.occupancy <= 0] == []


def test_the_table_has_a_row_for_each_report():
    done = run("--kernel", "lstm_forward_kept", "--arch", "80", "90", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    names = "kernel arch dtype registers spills shared occupancy tensor core copies loads store bits"
    assert " ".join(head.split()) == names
    assert [row.split()[:3] for row in rows] == [
        ["lstm_forward_kept", arch, dtype] for dtype in ("bf16", "fp32") for arch in ("sm80", "sm90")
    ]


def test_mistakes_are_named():
    done = run("--kernel", "no such kernel")
    assert done.returncode == 2
    assert "no kernel for [80, 90, 100] has one of ['no such kernel'] in its name; there are " in done.stderr
    done = run(environment=compiler_environment() | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "without TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "expected"),
    [
        (80, 32, 0, 4, 1.0),  # 65536 registers for 64 warps of 32 threads
        (80, 255, 0, 4, 8 / 64),  # 256 registers: 8 warps
        (80, 32, 100 * 1024, 4, 4 / 64),  # 164 KB: one block
        (90, 32, 100 * 1024, 4, 8 / 64),  # 228 KB: two
        (90, 32, 0, 1, 32 / 64),  # no more than 32 blocks
        (90, 255, 0, 16, 0.0),  # does not fit
    ],
)
def test_occupancy_is_what_registers_memory_and_blocks_allow(arch, registers, shared, num_warps, expected):
    assert aot.occupancy(arch, registers, shared, num_warps) == expected
