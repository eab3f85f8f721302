"""The public functions: products and recurrences that skip what a pattern drops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.ops import lstm
from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.lstm import flat_weights
from approxdrop_lightning.ops.row_linear import compact, row_backend
from approxdrop_lightning.ops.row_linear.reference import ACTIVATIONS
from approxdrop_lightning.ops.tile_linear import reference as masked
from approxdrop_lightning.ops.tile_linear import tile_backend
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern


def lines_up(first: RowPattern | None, second: RowPattern | None) -> bool:
    """Whether both patterns fit into one product, that is, divide the rows into the same groups."""
    if first is None or second is None:
        return True
    same = (first.n_groups, first.n_orders) == (second.n_groups, second.n_orders)
    return same or not first.interleave or not second.interleave


def pack(x: Tensor, pattern: RowPattern, backend: str = "auto") -> Tensor:
    """Pack the values that a pattern keeps.

    Args:
        x: Dense, ``[*leading, n]``.
        pattern: A pattern of ``n`` units.
        backend: ``"reference"``, ``"compact"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[*leading, n_kept]`` for a shared pattern. For an interleaved one, flat values, group after group, each
        row-major ``[rows of the group, kept units of the group]``.

    Raises:
        ValueError: ``x`` is not ``n`` wide, or the backend is unknown.
    """
    if x.dim() == 0 or x.shape[-1] != pattern.n:
        raise ValueError(f"pack: the pattern is of {pattern.n} units, got x of shape {tuple(x.shape)}")
    values = row_backend(backend).pack(x, pattern)
    return values if pattern.interleave else values.view(*x.shape[:-1], pattern.n_kept)


def unpack(
    values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...] | None = None, backend: str = "auto"
) -> Tensor:
    """Restore packed values to their positions, with zeros where the pattern drops: inverse of :func:`pack`.

    Args:
        values: Values as returned by :func:`pack`.
        pattern: The pattern with which they were packed.
        leading_shape: Shape of the batch; needed for an interleaved pattern.
        backend: ``"reference"``, ``"compact"``, ``"triton"`` or ``"auto"``.

    Returns:
        Dense, ``[*leading, n]``.

    Raises:
        ValueError: The number of values does not match the pattern and the shape.
    """
    leading = _leading_shape("unpack", values, pattern, leading_shape)
    return row_backend(backend).unpack(values, pattern, leading)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_pattern: RowPattern | None = None,
    out_pattern: RowPattern | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    leading_shape: tuple[int, ...] | None = None,
    activation: str = "identity",
) -> Tensor:
    """Linear layer between two row patterns (Song et al., DATE 2019, section 3.1).

    With shared patterns, ``y = act(scale * (x @ weight[kept_out][:, kept_in].T + bias[kept_out]))``, with compact
    inputs and outputs. With interleaved patterns, the same holds for each group of rows. Only ``1 / (dp_in *
    dp_out)`` of the dense multiplies are executed (``keep = 1``). Gradients are those of the masked dense product;
    the weight's is dense.

    Args:
        x: Dense ``[*leading, n_in]`` without ``in_pattern``, otherwise packed as returned by :func:`pack`.
        weight: ``[n_out, n_in]``.
        bias: ``[n_out]``.
        in_pattern: Pattern of the ``n_in`` inputs; None if all are read.
        out_pattern: Pattern of the ``n_out`` outputs; None if all are computed.
        scale: Factor of product and bias.
        backend: ``"reference"`` (masked dense), ``"compact"`` (gather and multiply), ``"triton"`` (kernels for CUDA)
            or ``"auto"``.
        leading_shape: Shape of the batch; needed if ``in_pattern`` is interleaved.
        activation: ``"identity"``, ``"relu"`` or ``"gelu"``, applied after scaling; part of the product with
            ``"triton"``.

    Returns:
        Dense ``[*leading, n_out]`` without ``out_pattern``, otherwise packed as returned by :func:`pack`.

    Raises:
        ImportError: Triton was requested but is not installed.
        ValueError: Shapes, types or devices do not match, the groups of two interleaved patterns differ, or the
            backend or the activation is unknown or not available here.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"row_linear: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    if weight.dim() != 2:
        raise ValueError(f"row_linear: weight must be [n_out, n_in], got shape {tuple(weight.shape)}")
    n_out, n_in = weight.shape
    for name, pattern, n in (("in", in_pattern, n_in), ("out", out_pattern, n_out)):
        if pattern is not None and pattern.n != n:
            raise ValueError(f"row_linear: {name}_pattern is of {pattern.n} units, the weight has {n}")
    if bias is not None and tuple(bias.shape) != (n_out,):
        raise ValueError(f"row_linear: bias must be [{n_out}], got shape {tuple(bias.shape)}")
    if in_pattern and out_pattern and not lines_up(in_pattern, out_pattern):
        raise ValueError(
            f"row_linear: interleaved patterns must have the same number of groups, got {in_pattern.n_groups} in "
            f"and {out_pattern.n_groups} out"
        )
    if in_pattern is None:
        if x.dim() == 0 or x.shape[-1] != n_in:
            raise ValueError(f"row_linear: x must be [..., {n_in}], got shape {tuple(x.shape)}")
        leading = tuple(x.shape[:-1])
    else:
        leading = _leading_shape("row_linear", x, in_pattern, leading_shape)
    x, weight, bias = _operands("row_linear", x=x, weight=weight, bias=bias)
    y = row_backend(backend).row_linear(x, weight, bias, in_pattern, out_pattern, leading, scale, activation)
    if out_pattern is None:
        return y.view(*leading, n_out)
    return y.view(-1) if out_pattern.interleave else y.view(*leading, out_pattern.n_kept)


def tile_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: TilePattern | BernoulliPattern,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with a tile pattern of its weight (Song et al., DATE 2019, section 3.2).

    ``y = scale * x @ (weight * mask).T + bias`` with the mask of the pattern: weights are dropped, the bias is not.
    Only ``keep / dp`` of the dense multiplies are executed, in the forward pass and for both gradients; the weight's
    is dense, with zeros where the weight is dropped.

    Args:
        x: ``[*leading, n_in]``.
        weight: ``[n_out, n_in]``.
        bias: ``[n_out]``, or None.
        pattern: Pattern of the weight. With independent weights (no tiles) the product is masked and dense.
        scale: Factor of the kept weights.
        backend: ``"reference"`` (masked dense), ``"compact"`` (products of parts), ``"triton"`` (kernels for CUDA) or
            ``"auto"``.

    Returns:
        ``[*leading, n_out]``.

    Raises:
        ImportError: Triton was requested but is not installed.
        ValueError: Shapes, types or devices do not match, or the backend is unknown or not available here.
    """
    n_out, n_in = pattern.n_out, pattern.n_in
    _check_weight("tile_linear", weight, pattern)
    if bias is not None and tuple(bias.shape) != (n_out,):
        raise ValueError(f"tile_linear: bias must be [{n_out}], got shape {tuple(bias.shape)}")
    if x.dim() == 0 or x.shape[-1] != n_in:
        raise ValueError(f"tile_linear: x must be [..., {n_in}], got shape {tuple(x.shape)}")
    leading = x.shape[:-1]
    x, weight, bias = _operands("tile_linear", x=x.reshape(-1, n_in), weight=weight, bias=bias)
    if isinstance(pattern, BernoulliPattern):
        choose_backend(backend, tiles_of=x)  # validated, although there is no choice
        y = masked.tile_linear(x, weight, bias, pattern, scale)
    else:
        y = tile_backend(backend, x).tile_linear(x, weight, bias, pattern, scale)
    return y.view(*leading, n_out)


def masked_weight(weight: Tensor, pattern: TilePattern | BernoulliPattern, scale: float = 1.0) -> Tensor:
    """``scale * weight * mask``, for products that skip nothing.

    Args:
        weight: ``[n_out, n_in]``.
        pattern: Pattern of the weight.
        scale: Factor of the kept weights.

    Returns:
        ``[n_out, n_in]``, zero where the pattern drops.

    Raises:
        ValueError: The pattern has a different shape.
    """
    _check_weight("masked_weight", weight, pattern)
    return masked.masked_weight(weight, pattern, scale)


def _check_weight(caller: str, weight: Tensor, pattern: TilePattern | BernoulliPattern) -> None:
    if tuple(weight.shape) != (pattern.n_out, pattern.n_in):
        raise ValueError(
            f"{caller}: the pattern is of a weight [{pattern.n_out}, {pattern.n_in}], got shape {tuple(weight.shape)}"
        )


def select_columns(weight: Tensor, pattern: RowPattern) -> Tensor:
    """The columns of a weight that a shared pattern of its inputs keeps.

    Args:
        weight: ``[n_out, n_in]``.
        pattern: Shared pattern of the ``n_in`` inputs.

    Returns:
        ``[n_out, n_kept]``. Its gradient is dense.

    Raises:
        ValueError: The pattern is interleaved or not of ``n_in`` units.
    """
    return compact.select_columns(weight, _columns("select_columns", weight, pattern))


def _columns(caller: str, weight: Tensor, pattern: RowPattern) -> RowPattern:
    if pattern.interleave or weight.dim() != 2 or weight.shape[1] != pattern.n:
        raise ValueError(
            f"{caller}: needs a shared pattern of the weight's inputs, got {pattern} for {tuple(weight.shape)}"
        )
    return pattern


def lstm_weights(pattern: RowPattern | None, weight_ih: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Weights with which the vendor's LSTM kernel reads only the kept inputs.

    Args:
        pattern: Shared pattern of the ``n_in`` inputs, or None.
        weight_ih: ``[4 * H, n_in]``.
        *others: ``weight_hh``, and the biases if there are any.

    Returns:
        One tensor per weight, the first of shape ``[4 * H, n_kept]`` with a dense gradient. On CUDA they are copies
        in contiguous memory, as cuDNN expects them.

    Raises:
        ValueError: The pattern is interleaved or not of ``n_in`` units.
    """
    if weight_ih.is_cuda:
        kept = None
        if pattern is not None:
            kept = _columns("lstm_weights", weight_ih, pattern).units(0).on(weight_ih.device)
        return flat_weights.flat_weights(kept, weight_ih, *others)
    return (weight_ih if pattern is None else select_columns(weight_ih, pattern)), *others


def lstm_sequence(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    pattern: RowPattern | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSTM recurrence over precomputed gate inputs.

    For each step ``i, f, g, o = gates[t] + scale * h[:, kept] @ weight_hh[:, kept].T``, then
    ``c = sigmoid(f) * c + sigmoid(i) * tanh(g)`` and ``h = sigmoid(o) * tanh(c)``, as in ``torch.nn.LSTM``.
    The backward pass collects the gates' gradients over time and computes that of ``weight_hh`` in one product.

    Args:
        gates: ``[T, B, 4 * H]``: input product plus both biases, in the order i, f, g, o.
        h0: ``[B, H]``.
        c0: ``[B, H]``.
        weight_hh: ``[4 * H, H]``.
        pattern: Shared pattern of the ``H`` recurrent inputs (recurrent dropout), or None.
        scale: Factor of the kept recurrent inputs.

    Returns:
        ``(h, h_T, c_T)`` of shapes ``[T, B, H]``, ``[B, H]`` and ``[B, H]``.

    Raises:
        ValueError: Shapes, types or devices do not match, ``T`` is 0, or the pattern is interleaved.
    """
    if gates.dim() != 3 or gates.shape[0] == 0 or gates.shape[2] % 4:
        raise ValueError(f"lstm_sequence: gates must be [T >= 1, B, 4 * H], got shape {tuple(gates.shape)}")
    _, batch, hidden = gates.shape[0], gates.shape[1], gates.shape[2] // 4
    for name, tensor, shape in (
        ("h0", h0, (batch, hidden)),
        ("c0", c0, (batch, hidden)),
        ("weight_hh", weight_hh, (4 * hidden, hidden)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"lstm_sequence: {name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
    if pattern is not None and (pattern.interleave or pattern.n != hidden):
        raise ValueError(f"lstm_sequence: the pattern must be shared and of {hidden} units, got {pattern}")
    gates, h0, c0, weight_hh = _operands("lstm_sequence", gates=gates, h0=h0, c0=c0, weight_hh=weight_hh)
    kept = None
    if pattern is not None and not pattern.keeps_all:
        weight_hh, kept = compact.select_columns(weight_hh, pattern), pattern.units(0).on(gates.device)
    if scale != 1.0:
        weight_hh = weight_hh * scale
    return lstm.sequence(gates, h0, c0, weight_hh, kept)


def _leading_shape(
    caller: str, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Shape of the batch that packed values belong to; raise ``ValueError`` if there is none."""
    if pattern.interleave:
        if leading_shape is None:
            raise ValueError(f"{caller}: leading_shape is needed with an interleaved pattern")
        expected = pattern.n_packed(tuple(leading_shape))
        if values.numel() != expected:
            raise ValueError(
                f"{caller}: the pattern keeps {expected} values of a batch {tuple(leading_shape)}, "
                f"got {values.numel()}"
            )
        return tuple(leading_shape)
    if values.dim() == 0 or values.shape[-1] != pattern.n_kept:
        raise ValueError(
            f"{caller}: the pattern keeps {pattern.n_kept} of {pattern.n} units, got x of shape {tuple(values.shape)}"
        )
    leading = tuple(values.shape[:-1])
    if leading_shape is not None and math.prod(leading_shape) != math.prod(leading):
        raise ValueError(
            f"{caller}: leading_shape {tuple(leading_shape)} does not fit x of shape {tuple(values.shape)}"
        )
    return leading if leading_shape is None else tuple(leading_shape)


def _operands(caller: str, **tensors: Tensor | None) -> list[Any]:
    """Cast like ``torch.autocast`` for ``F.linear``; raise ``ValueError`` if types or devices differ."""
    given = [t for t in tensors.values() if t is not None]
    device = given[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = {name: t if t is None or t.dtype == torch.float64 else t.to(dtype) for name, t in tensors.items()}
        given = [t for t in tensors.values() if t is not None]
    # Compiled code receives only addresses, and would misinterpret the bytes of another type.
    if not given[0].is_floating_point() or any(
        t.dtype != given[0].dtype or t.device != given[0].device for t in given
    ):
        kinds = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"{caller}: all must be of one floating-point type and on one device, got {kinds}")
    return list(tensors.values())
