"""Shared by the tests of the Triton backend: patterns, and a comparison with the definition."""

import torch

from approxdrop_lightning import RowPattern, functional

#: Sums of at most 130 products of size 1: rounding of float32 adds up to 1e-5; half precision rounds results to 1e-3.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 2e-2},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1},
}
#: bfloat16 is incorrect in the interpreter.
TYPES = (torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else []))


def make_pattern(n, dp, keep, interleave=False, shuffle=False, block_size=1, orders=1):
    permutations = [torch.randperm(-(-n // block_size)) for _ in range(orders)]
    order = torch.stack(permutations) if shuffle else None
    return RowPattern(n, dp, int(torch.randint(dp, ())), keep, interleave, order, block_size)


def run(x, weight, bias, in_pattern, out_pattern, backend, scale=1.0, activation="identity"):
    """Dense in, dense out."""
    leading = x.shape[:-1]
    packed = x if in_pattern is None else functional.pack(x, in_pattern, backend)
    y = functional.row_linear(packed, weight, bias, in_pattern, out_pattern, scale, backend, leading, activation)
    return y if out_pattern is None else functional.unpack(y, out_pattern, leading, backend)


def assert_is_the_reference(
    leading, n_in, n_out, in_pattern, out_pattern, dtype=torch.float32, bias=True, scale=1.5, activation="identity"
):
    """Compare output and all gradients with the reference in double precision on the same numbers."""
    shapes = [(*leading, n_in), (n_out, n_in), *([(n_out,)] if bias else [])]
    values = [torch.randn(shape).to(dtype) / (8 if i == 1 else 1) for i, shape in enumerate(shapes)]
    direction = torch.randn(*leading, n_out).to(dtype)
    found = []
    for backend, exact in (("triton", dtype), ("reference", torch.float64)):
        tensors = [value.to(exact).requires_grad_() for value in values]
        x, weight, b = tensors if bias else (*tensors, None)
        y = run(x, weight, b, in_pattern, out_pattern, backend, scale, activation)
        found.append((y, *torch.autograd.grad(y, tensors, direction.to(exact))))
    case = (leading, in_pattern, out_pattern, dtype)
    for name, mine, wanted in zip(("y", "x", "weight", "bias"), *found, strict=False):
        assert mine.dtype == dtype
        torch.testing.assert_close(
            mine.double(), wanted, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n} of {case}: {m}"
        )


def compilations(launches):
    """Number of kernels that a GPU would compile for these launches, untuned; not for the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), set()
    for launch in launches:
        tuned = launch.configurations()
        kernel = launch.kernel.fn if tuned else launch.kernel
        constants = launch.constants | (tuned[0].kwargs if tuned else {})
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, _ = bind(**launch.arguments, **constants, debug=False, instrumentation_mode="")
        keys.add((kernel.__name__, str(specialization)))
    return len(keys)
