"""Converts a model in place: dropouts become sites, and the layers next to them learn to skip."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, SupportsIndex

import torch
from torch import nn

from approxdrop_lightning.conversion import Conversion, conversion_of, find_conversion
from approxdrop_lightning.inspection import CALL, OTHER, functional_dropouts
from approxdrop_lightning.layers import (
    ApproxDropoutSite,
    ApproxLinear,
    ApproxLSTM,
    CapturedLinear,
    TileLinear,
    TileLSTM,
)
from approxdrop_lightning.layers.converted import Converted, give_back
from approxdrop_lightning.layers.entrances import compiled_parts
from approxdrop_lightning.options import Options
from approxdrop_lightning.report import Report
from approxdrop_lightning.work import Ledger


class NoEffectWarning(UserWarning):
    """The model has no dropout that could skip work."""


def convert(model: nn.Module, options: Options, seed: int, rank: int = 0) -> Conversion:
    """Convert a model in place.

    Args:
        model: The model.
        options: How it is converted.
        seed: As for :class:`.Conversion`.
        rank: As for :class:`.Conversion`.

    Raises:
        ValueError: The model, or a layer of it, is converted already, or a rate of the model is not feasible.
    """
    if find_conversion(model) is not None:
        raise ValueError("the model is converted already; restore(model) first")
    _release(model)
    conversion = Conversion(model, options, seed, rank)
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                _convert_dropout(conversion, name, module)
            elif isinstance(module, nn.LSTM) and (computes_as(module, nn.LSTM) or module.dropout):
                _convert_lstm(conversion, name, module)
            elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout:
                what = "attention weights" if isinstance(module, nn.MultiheadAttention) else "between its layers"
                reason = f"dropout inside {type(module).__name__} is left as it is"
                conversion.report.left(f"{name} ({what})", module.dropout, reason)
        for name, place, reason in functional_dropouts(model):
            reason = OTHER if reason == CALL and options.pattern != "row" else reason
            conversion.report.left(f"{name or 'the model'} ({place})", None, reason)
    except ValueError:  # no pattern has a rate of the model
        conversion.restore()
        raise
    found = any(site.rate for site in conversion.report.sites)
    for name, module in model.named_modules():
        if computes_as(module, nn.Linear) and "weight" in module._parameters:
            _convert_linear(conversion, name, module, found)
        elif found and isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch."):
            conversion.report.notes.append(f"{name} is left as it is: {_own_forward(module)}")
    if found:
        conversion.inspect(model)
    elif not (_is_compiled(model) and any(row.reason == CALL for row in conversion.report)):
        warnings.warn(f"no dropout could be converted:\n{conversion.report}", NoEffectWarning, stacklevel=3)
    conversion.serve_compiled(model)
    conversion.register(model)
    return conversion


def _is_compiled(model: nn.Module) -> bool:
    """Whether a module, or a method that an instance has of its own, was compiled by ``torch.compile``."""
    values = (value for module in model.modules() for value in vars(module).values())
    return bool(compiled_parts(model)) or any(hasattr(value, "_torchdynamo_orig_callable") for value in values)


def _release(model: nn.Module) -> None:
    """Restore layers that an earlier conversion has left behind.

    Raises:
        ValueError: A layer belongs to a model that is still converted.
    """
    left = [(name, module) for name, module in model.named_modules() if isinstance(module, Converted)]
    for name, layer in left:
        if layer.is_live:
            raise ValueError(f"the layer {name!r} is part of another converted model; restore(that model) first")
    for _, layer in left:
        with contextlib.suppress(TypeError):  # its class cannot be changed, so it stays as it is
            give_back(layer)


def computes_as(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether a module is an instance of a stock class, or of a subclass that does not change what is computed."""
    cls = type(module)
    if cls is stock:
        return True
    if not isinstance(module, stock) or isinstance(module, (Converted, nn.modules.lazy.LazyModuleMixin)):
        return False
    methods = ("forward", "__call__", "check_forward_args", "permute_hidden", "__getattr__", "train")
    same = all(getattr(cls, name, None) is getattr(stock, name, None) for name in methods)
    return same and not cls.__module__.startswith("torch.")  # PyTorch has reasons for its subclasses


def _own_forward(module: nn.Module) -> str:
    return f"its class {type(module).__name__} has code of its own for what it computes"


def _convert_dropout(conversion: Conversion, name: str, module: nn.modules.dropout._DropoutNd) -> None:
    if not isinstance(module, nn.Dropout):
        conversion.report.left(name, module.p, f"{type(module).__name__} drops other things than units")
    elif not computes_as(module, nn.Dropout):
        conversion.report.left(name, module.p, _own_forward(module))
    elif conversion.rate(module.p) == module.p == 0:
        conversion.report.left(name, 0.0, "the rate is 0")
    elif conversion.rate(module.p) >= 1:
        conversion.report.left(name, module.p, "it drops everything")
    else:
        conversion.swap(module, ApproxDropoutSite, site=conversion.site(name, module.p))


def _convert_linear(conversion: Conversion, name: str, module: nn.Linear, beside_layers: bool) -> None:
    """Convert a linear layer of a model that has dropout layers, or has function calls alone."""
    if not beside_layers:
        if conversion.options.pattern == "row":
            conversion.swap(module, CapturedLinear, name=name)
        return
    if conversion.options.pattern != "row":
        conversion.swap(module, TileLinear, name=name, work=Ledger())
        return
    conversion.swap(
        module,
        ApproxLinear,
        name=name,
        backend=conversion.options.backend,
        defers=True,
        watched=True,
        read_whole_too=False,
        read_whole_by=None,
        work=Ledger(),
    )


def _convert_lstm(conversion: Conversion, name: str, module: nn.LSTM) -> None:
    inner = [f"{name} (after layer {i})" for i in range(module.num_layers - 1)] if module.dropout else []
    reason = ApproxLSTM.unsupported(module) if computes_as(module, nn.LSTM) else _own_forward(module)
    if reason is None and "weight_ih_l0" not in module._parameters:
        reason = "its weights are parametrized"
    if reason is None and inner and conversion.rate(module.dropout) >= 1:
        reason = "it drops everything"
    if reason:
        for site in inner:
            conversion.report.left(site, module.dropout, reason)
        return
    sites = [conversion.site(site, module.dropout) for site in inner]
    options = conversion.options
    recurrent = []
    if options.recurrent:
        names = [f"{name} (recurrent, layer {i})" for i in range(module.num_layers)]
        if conversion.rate(module.dropout):
            recurrent = [conversion.site(site, module.dropout) for site in names]
        else:
            for site in names:
                conversion.report.left(site, 0.0, "the rate is 0")
    conversion.swap(
        module,
        ApproxLSTM if options.pattern == "row" else TileLSTM,
        name=name,
        backend=options.backend,
        sites=sites,
        recurrent_sites=recurrent,
        work=Ledger(),
    )


def approximate(model: nn.Module, *, seed: int | None = None, **options: Any) -> Report:
    """Convert a model in place, so that its dropout skips the work that it drops.

    ``nn.Dropout``, ``nn.Linear`` and ``nn.LSTM`` layers keep their identity, parameters and names; only their
    classes change. Call :func:`resample` before each training step.

    Args:
        model: Any module.
        seed: Seed of the patterns; None means PyTorch's initial seed. Its generators are not used.
        **options: Those of :class:`.Options`.

    Returns:
        The report, with one row per dropout.

    Raises:
        ValueError: An option is outside of its range, the seed is not an integer, a rate is not feasible, or the
            model is converted already.
    """
    chosen = Options.from_keywords("approximate", options)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, SupportsIndex)):
        raise ValueError(f"approximate: seed must be an integer or None, got {seed!r}")
    return convert(model, chosen, torch.initial_seed() if seed is None else seed).report


def resample(model: nn.Module, batch: Any = None) -> None:
    """Draw the next patterns of a converted model. Call it once before each training step.

    Args:
        model: The model.
        batch: The batch of the step: tensors in any containers. Their shapes show when a batch is larger than all
            before it, so that skipping may pay off. Without a batch, steps 1, 2, 4, 8, ... check this.

    Raises:
        ValueError: The model is not converted.
    """
    conversion_of(model).resample(batch=batch)


def restore(model: nn.Module) -> None:
    """Restore the stock classes of a converted model. Parameters are not touched.

    This works whatever else has changed the model in the meantime. Layers that were removed from the model are
    restored as well. A class that was derived from that of a converted layer (by a parametrization, for example)
    remains, and is derived from the stock class again.

    Raises:
        ValueError: The model is not converted.

    Warns:
        NotRestoredWarning: The class of a layer cannot be changed. The layer nevertheless computes what the stock
            layer computes.
    """
    conversion_of(model).restore()
