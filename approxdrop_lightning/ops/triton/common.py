"""What Triton kernels share beside a launch: tile sizes, their choice by timing, what is compiled ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from approxdrop_lightning.ops.triton.launch import Launch, precision

#: Types that the kernels multiply; sums are float32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Compute capabilities that the tables of tile sizes are made for: A100, H100, B200.
ARCHS = (80, 90, 100)

#: Whether kernels are interpreted: they are what they were when triton was imported.
_INTERPRETED = triton.knobs.runtime.interpret

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        rows: Rows of the result that a program makes.
        columns: Its columns.
        depth: Terms that are summed at a time.
        num_warps: Warps of a program.
        num_stages: Steps of ``depth`` in flight.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def blocks(self, rows: int, columns: int, depth: int) -> tuple[int, int, int]:
        """Rows, columns and depth for dense operands of such sizes: not beyond them, at least a tensor core's."""
        sizes = zip(self[:3], (rows, columns, depth), strict=True)
        first, second, third = (max(16, min(block, bucket(size))) for block, size in sizes)
        return first, second, third


#: By compute capability; the first of each list serves where nothing is timed. 3 * (128 + 128) * 64 * 2 bytes = 96 KB
#: also fit the 99 KB of the consumer cards that use the first table.
_TENSOR_CORE = {
    80: (Tiling(128, 128, 32, 8, 4), Tiling(128, 64, 64, 4, 3), Tiling(64, 64, 64, 4, 4), Tiling(32, 64, 64, 4, 4)),
    90: (Tiling(128, 128, 64, 8, 4), Tiling(128, 64, 64, 4, 4), Tiling(64, 64, 64, 4, 4), Tiling(64, 128, 64, 4, 4)),
    100: (
        Tiling(128, 128, 64, 8, 4),
        Tiling(128, 64, 64, 4, 4),
        Tiling(64, 64, 64, 4, 4),
        Tiling(128, 128, 32, 8, 4),
    ),
}
#: float32 without tf32 runs on ordinary multiply-adds: tiles that fit the registers, on every architecture.
_PLAIN = (Tiling(64, 64, 32, 8, 3),)
#: Elements of rows that are not aligned are loaded one by one: in 16 bits through registers, and addresses take more.
_UNALIGNED = (Tiling(64, 64, 32, 8, 2),)
_PLAIN_UNALIGNED = (Tiling(32, 64, 32, 8, 3),)


def arch_of(device: torch.device) -> int:
    """The entry of :data:`ARCHS` whose tile sizes a device uses: 80 for the interpreter and for small cards."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def tilings(arch: int, dtype: torch.dtype, precision: str = "ieee", aligned: bool = True) -> tuple[Tiling, ...]:
    """Tile sizes worth trying, the one to take untried first.

    Args:
        arch: One of :data:`ARCHS`.
        dtype: One of :data:`DTYPES`.
        precision: ``"tf32"`` or ``"ieee"``; only float32 knows a difference.
        aligned: Whether all rows of the operands begin at multiples of 16 bytes.
    """
    if dtype != torch.float32:
        return _TENSOR_CORE[arch] if aligned else _UNALIGNED
    if precision == "ieee":
        return _PLAIN if aligned else _PLAIN_UNALIGNED
    return tuple(t._replace(depth=t.depth // 2) for t in _TENSOR_CORE[arch])  # twice the bytes for each term


def bucket(size: int) -> int:
    """The power of two at or above a size: sizes of one bucket share a choice of tiles."""
    return 1 << max(size - 1, 0).bit_length()


def tilings_for(x: Tensor, aligned: bool = True) -> tuple[Tiling, ...]:
    """Tile sizes worth trying for products of an operand's type on its device; ``aligned`` as in :func:`tilings`."""
    return tilings(arch_of(x.device), x.dtype, precision(x.dtype), aligned)


def tuning_key(name: str, x: Tensor, *sizes: int) -> tuple[Hashable, ...]:
    """Key of a choice of tiles: a kernel, type and device of an operand, and buckets of sizes."""
    return name, x.dtype, precision(x.dtype), x.device.index, *map(bucket, sizes)


_fastest: dict[Hashable, int] = {}


def fastest(key: Hashable, launches: Iterable[Launch]) -> Launch:
    """The fastest of launches that do the same; all are timed when the key is new.

    Nothing is timed in the interpreter, while a CUDA graph is captured, or if ``APPROXDROP_AUTOTUNE=0``: then it is
    the first.

    Args:
        key: What the choice depends on: the kernel, types, and the :func:`bucket` of dense sizes, so that it does not
            change with the pattern.
        launches: Candidates, made as they are needed. What they write does not depend on what was there.
    """
    launches = iter(launches)
    if key in _fastest:
        return next(islice(launches, _fastest[key], None))
    first = next(launches)
    if os.environ.get("APPROXDROP_AUTOTUNE", "1") == "0" or not _on_gpu(first):
        return first
    if torch.cuda.is_current_stream_capturing():
        return first
    candidates = [first, *launches]
    times = [_seconds(launch.run) for launch in candidates]
    _fastest[key] = times.index(min(times))
    return candidates[_fastest[key]]


def run_fastest(
    name: str, x: Tensor, sizes: tuple[int, ...], launch_of: Callable[[Tiling], Launch], aligned: bool = True
) -> None:
    """Launch a product, cut as is :func:`fastest`.

    Args:
        name: Of the kernel.
        x: One of its operands.
        sizes: Dense rows, outputs and inputs.
        launch_of: The launch with given tile sizes.
        aligned: As in :func:`tilings`.
    """
    key = (aligned, *tuning_key(name, x, *sizes))
    fastest(key, map(launch_of, tilings_for(x, aligned))).run()


def _on_gpu(launch: Launch) -> bool:
    """Whether a launch runs on a GPU, not in the interpreter."""
    return any(isinstance(value, Tensor) and value.is_cuda for value in launch.arguments.values())


def _seconds(run: Callable[[], None]) -> float:
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20) / 1e3
    except OutOfResources:  # of shared memory, on a card smaller than the table was made for
        return float("inf")


@dataclass(frozen=True)
class Specimen:
    """One kernel with the types, constants and options of one launch: what is compiled ahead of time.

    Attributes:
        name: What it is, for people.
        kernel: The ``triton.jit`` function.
        signature: Type of each argument, as ``triton.compiler.ASTSource`` wants it.
        constants: Values of the arguments of type ``"constexpr"``.
        aligned: Arguments that are divisible by 16.
        num_warps: Warps of a program.
        num_stages: Tiles in flight.
        archs: Compute capabilities to compile it for.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS


def specimen(name: str, launch: Launch, archs: tuple[int, ...] = ARCHS) -> Specimen:
    """What Triton would compile for a launch: it specialises on types, on numbers that are 1 and on multiples of 16.

    Args:
        name: What it is, for people.
        launch: A launch; its tensors may be of the meta device and count as aligned, as PyTorch's allocator has them.
        archs: Compute capabilities to compile it for.
    """
    signature, constants, aligned = {}, dict(launch.constants), []
    for parameter in launch.kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        value = launch.arguments[parameter.name]
        signature[parameter.name] = _type(value, parameter.do_not_specialize)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or _is_aligned(value, parameter):
            aligned.append(parameter.name)
    return Specimen(
        name, launch.kernel, signature, constants, tuple(aligned), launch.num_warps, launch.num_stages, archs
    )


def _type(value: Any, general: bool) -> str:
    """Triton's name of an argument's type; ``general`` arguments are never constants."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if value is None or (value == 1 and isinstance(value, int) and not general):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any, parameter: Any) -> bool:
    if not isinstance(value, int) or parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return value % 16 == 0


def check_operands(caller: str, *operands: Tensor) -> None:
    """``ValueError`` unless the kernels can read the operands, here and now."""
    for operand in operands:
        if operand.dtype not in DTYPES:
            raise ValueError(f"{caller}: the triton backend takes float32, float16 and bfloat16, got {operand.dtype}")
        if operand.device.type not in ("cuda", "meta") and not _INTERPRETED:
            raise ValueError(
                f"{caller}: the triton backend needs tensors on a CUDA device (or TRITON_INTERPRET=1 for its "
                f"interpreter), got {operand.device}"
            )
