"""Tile sizes and autotuning of the Triton products, and the specimens for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from approxdrop_lightning.ops.triton.launch import Launch

#: Types that the kernels support; they accumulate in float32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Compute capabilities that have tables of tile sizes: A100, H100, B200.
ARCHS = (80, 90, 100)

#: Whether kernels run in the interpreter, which is fixed when triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


class Tiling(NamedTuple):
    """Tile sizes and launch options of a product.

    Attributes:
        rows: Rows of the result per program.
        columns: Columns of the result per program.
        depth: Terms summed per step.
        num_warps: Warps per program.
        num_stages: Number of steps in flight.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


#: By compute capability; the first of each list is used if nothing is timed. 3 * (128 + 128) * 64 * 2 bytes = 96 KB
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
#: float32 without tf32 uses ordinary multiply-adds: tiles that fit into registers on every architecture.
_PLAIN = (Tiling(64, 64, 32, 8, 3),)
#: Unaligned rows are loaded element by element, 16-bit types through registers, and addresses need further registers.
_UNALIGNED = (Tiling(64, 64, 32, 8, 2),)
_PLAIN_UNALIGNED = (Tiling(32, 64, 32, 8, 3),)


def arch_of(device: torch.device) -> int:
    """The entry of :data:`ARCHS` whose tile sizes a device uses; 80 for the interpreter and smaller cards."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def tilings(arch: int, dtype: torch.dtype, precision: str = "ieee", aligned: bool = True) -> tuple[Tiling, ...]:
    """Candidate tile sizes, starting with the default.

    Args:
        arch: One of :data:`ARCHS`.
        dtype: One of :data:`DTYPES`.
        precision: ``"tf32"`` or ``"ieee"``; matters for float32 only.
        aligned: Whether all rows of the operands start at multiples of 16 bytes.
    """
    if dtype != torch.float32:
        return _TENSOR_CORE[arch] if aligned else _UNALIGNED
    if precision == "ieee":
        return _PLAIN if aligned else _PLAIN_UNALIGNED
    return tuple(t._replace(depth=t.depth // 2) for t in _TENSOR_CORE[arch])  # twice the bytes per term


def autotune_product(*names: str, key: list[str]) -> Callable[[Any], Any]:
    """``triton.autotune`` for a product kernel, over the :func:`tilings` for its device, type and alignment.

    The kernel must have an operand ``x`` and the compile-time constants ``PRECISION`` and ``ALIGNED``. If ``ARCH`` is
    given, it overrides the device of ``x``, which may then be a meta tensor.

    Args:
        names: Constants of the kernel that receive a tiling's rows, columns and depth.
        key: Arguments that trigger a new choice when they change.
    """

    def configs(chosen: tuple[Tiling, ...]) -> list[triton.Config]:
        return [
            triton.Config(dict(zip(names, t[:3], strict=True)), num_warps=t.num_warps, num_stages=t.num_stages)
            for t in chosen
        ]

    def fitting(_configs: list[triton.Config], _arguments: dict[str, Any], **call: Any) -> list[triton.Config]:
        x = call["x"]
        arch = call.get("ARCH") or arch_of(x.device)
        return configs(tilings(arch, x.dtype, call["PRECISION"], call["ALIGNED"]))

    every = [t for dtype in DTYPES for arch in ARCHS for aligned in (True, False) for precision in ("ieee", "tf32")
             for t in tilings(arch, dtype, precision, aligned)]  # fmt: skip
    return triton.autotune(
        configs(tuple(dict.fromkeys(every))), key=key, prune_configs_by={"early_config_prune": fitting}
    )


def bucket(size: int) -> int:
    """The next power of two; sizes in the same bucket share a choice of tiles."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class Specimen:
    """A kernel with the types, constants and options of one launch, for ahead-of-time compilation.

    Attributes:
        name: Display name.
        kernel: The ``triton.jit`` function.
        signature: Type of each argument, as expected by ``triton.compiler.ASTSource``.
        constants: Values of the arguments of type ``"constexpr"``.
        aligned: Arguments that are divisible by 16.
        options: ``num_warps`` and ``num_stages``.
        archs: Compute capabilities to compile it for.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]
    archs: tuple[int, ...] = ARCHS


def specimens_of(name: str, launch: Launch, archs: tuple[int, ...] = ARCHS) -> list[Specimen]:
    """Everything that Triton would compile for a launch, one specimen per configuration it would try.

    Triton specialises on types, on integers equal to 1 and on multiples of 16.

    Args:
        name: Display name.
        launch: A launch. Its tensors may be meta tensors, and count as aligned, as PyTorch's allocator aligns them.
        archs: Compute capabilities to compile it for.
    """
    found = []
    for config in launch.configurations():
        sizes = "x".join(map(str, config.kwargs.values()))
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        found.append(_specimen(f"{name}_{sizes}", launch, config.kwargs, options, archs))
    return found or [_specimen(name, launch, {}, launch.options, archs)]


def _specimen(
    name: str, launch: Launch, constants: dict[str, Any], options: dict[str, Any], archs: tuple[int, ...]
) -> Specimen:
    kernel = launch.kernel if hasattr(launch.kernel, "params") else launch.kernel.fn
    signature, constants, aligned = {}, launch.constants | constants, []
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        value = launch.arguments[parameter.name]
        signature[parameter.name] = _type(value, parameter.do_not_specialize)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or _is_aligned(value, parameter):
            aligned.append(parameter.name)
    constants = {key: value for key, value in constants.items() if key in signature}
    return Specimen(name, kernel, signature, constants, tuple(aligned), options, archs)


def _type(value: Any, general: bool) -> str:
    """Triton's name for an argument's type; ``general`` arguments are never specialised to constants."""
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
    """Raise ``ValueError`` unless the kernels support the types and devices of the operands."""
    for operand in operands:
        if operand.dtype not in DTYPES:
            raise ValueError(f"{caller}: the triton backend takes float32, float16 and bfloat16, got {operand.dtype}")
        if operand.device.type not in ("cuda", "meta") and not INTERPRETED:
            raise ValueError(
                f"{caller}: the triton backend needs tensors on a CUDA device (or TRITON_INTERPRET=1 for its "
                f"interpreter), got {operand.device}"
            )
