"""Conversion of a model in place: dropout becomes sites, the layers beside it learn to skip."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Hashable, Iterable
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from approxdrop_lightning.graph.book import Book
from approxdrop_lightning.graph.doors import CHARGE
from approxdrop_lightning.graph.frames import Callers
from approxdrop_lightning.inspection import functional_dropouts
from approxdrop_lightning.layers import (
    ApproxDropoutSite,
    ApproxLinear,
    ApproxLSTM,
    Site,
    TileLinear,
    TileLSTM,
    TileSite,
)
from approxdrop_lightning.layers.converted import Converted, class_for, give_back
from approxdrop_lightning.layers.entrances import Entrances, compiled_parts
from approxdrop_lightning.layers.lazy_tensor import remove_hooks, settle
from approxdrop_lightning.multiplies import Count
from approxdrop_lightning.options import Options
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.report import Report, Row
from approxdrop_lightning.settling import Layer, Settling
from approxdrop_lightning.work import Ledger

#: What was done to each converted model. Kept beside the models: no copy and no pickle of one takes it along.
_CONVERSIONS: weakref.WeakKeyDictionary[nn.Module, Conversion] = weakref.WeakKeyDictionary()


class NoEffectWarning(UserWarning):
    """The model has no dropout that could be made to skip work."""


class NotRestoredWarning(UserWarning):
    """The class of a layer could not be put back. It computes as the stock layer all the same."""


class Conversion:
    """What was done to a model: its report, samplers and converted layers."""

    def __init__(self, model: nn.Module, options: Options, seed: int, rank: int = 0) -> None:
        self.model = weakref.ref(_key(model))
        self.options, self.seed, self.rank = options, seed, rank
        self.report = Report()
        self.samplers: dict[float, PatternSampler] = {}
        #: Whether a step is under way. Loops of one's own do not say where it ends.
        self.stepping = True
        self.settling = Settling(self.report)
        self._layers = self.settling.layers
        self._rested = False  # whether a layer has become a stock one since the last step began
        self._others: list[weakref.ref[nn.Module]] = []
        self._count: Count | None = None
        #: Patterns of compiled graphs; functions that run eagerly all the same; what watches compiled parts of an
        #: eager model.
        self.book: Book | None = None
        self._callers: Callers | None = None
        self._entrances: Entrances | None = None

    def rate(self, own: float) -> float:
        """The rate asked for, else the model's own."""
        return own if self.options.rate is None else self.options.rate

    def left(self, name: str, own: float | None, reason: str) -> None:
        """Report a dropout that stays as it is."""
        self.report.left(name, own, reason)

    def site(self, name: str, own: float) -> Site:
        """A new site; sites of one rate share a sampler, hence ``(dp, keep)`` of each step."""
        options, rate = self.options, self.rate(own)
        if rate not in self.samplers:
            self.samplers[rate] = options.sampler(rate, self.seed + len(self.samplers), self.rank)
        arguments = (
            name,
            rate,
            self.samplers[rate],
            options.scale,
            options.policy,
            options.backend,
        )
        if options.pattern == "row":
            site = Site(*arguments)
        else:
            site = TileSite(*arguments, independent=options.pattern == "dropconnect")
        self.report.rows.append(Row(name, rate, site=site, own_rate=None if own == rate else own))
        return site

    def swap(self, module: nn.Module, cls: type, **attributes: Any) -> None:
        """Change a layer's class in place: same object, same parameters, same hooks."""
        name = attributes["name"] if "name" in attributes else attributes["site"].name
        ref = weakref.ref(module)
        sites = [attributes["site"]] if "site" in attributes else []
        for more in ("sites", "recurrent_sites"):
            sites += attributes.get(more, [])
        owned = attributes | {"owner": (ref, weakref.ref(self))}
        layer = Layer(name, ref, class_for(cls, type(module)), owned, tuple(sites))
        self._layers[id(module)] = layer
        layer.wake()
        if "work" in attributes:
            self.report.work.append(attributes["work"])

    def rest(self, module: nn.Module) -> None:
        """Make a layer of which nothing is asked the stock one until the next step."""
        layer = self._layers.get(id(module))
        if layer is not None and layer.ref() is module:
            for site in layer.sites:
                site.check_resampled_before_rest()
            layer.rest()
            self._rested = True
            if self._callers is not None and isinstance(module, nn.LSTM):
                self._callers.end()

    @property
    def layers(self) -> list[nn.Module]:
        """The converted layers that are still there, in the model or in somebody else's hands."""
        return [module for layer in self._layers.values() if (module := layer.ref()) is not None]

    @property
    def others(self) -> list[nn.Module]:
        """The layers of the model that were not converted."""
        return [layer for ref in self._others if (layer := ref()) is not None]

    def know_sizes(self, model: nn.Module) -> None:
        """Tell the sites how large the model's weights are, and the layers whether they are compiled."""
        weights = list(model.parameters())
        if not any(isinstance(weight, UninitializedParameter) for weight in weights):
            largest = max((weight.numel() for weight in weights if weight.dim() == 2), default=0)
            lstm = any(issubclass(layer.cls, ApproxLSTM) for layer in self._layers.values())
            for site in self.report.sites:
                site.largest, site.beside_lstm = largest, lstm
        compiled = {id(module) for part in compiled_parts(model) for module in part.modules()}
        for key, layer in self._layers.items():
            layer.compiled = key in compiled

    def stays(self, modules: Iterable[nn.Module]) -> None:
        """Note which layers of the model were not converted."""
        self._others = [weakref.ref(module) for module in modules if not isinstance(module, Converted)]

    def resample(self, fresh: bool = True, batch: Any = None) -> None:
        """Begin a training step: with the next patterns, or with those of the last step again.

        Args:
            fresh: Whether patterns are drawn.
            batch: What the step is going to read; None if it is not known.
        """
        if self._count is None and not self._in_step_with_others and self.settling.goes_on(batch):
            self.stepping = True
            if self._rested:
                self._wake()
            return
        self.end()
        self.settling.begin(batch)
        self._wake()
        self.stepping = True
        if fresh:
            for sampler in self._drawn_from():
                sampler.draw()
        sites = self.report.sites
        first = not any(site.steps for site in sites)
        for site in sites:
            if not (site.resting or site.is_native):
                site.begin(fresh)
        if self.book is not None:
            self.book.begin()
        if self._callers is not None:
            self._callers.begin()
        if first:
            stock = [module for layer in self._layers.values() if layer.stock and (module := layer.ref()) is not None]
            self._count = Count([*self.others, *stock], self._note)
        typical = all(sampler.keep < sampler.dp for rate, sampler in self.samplers.items() if rate)
        for ledger in self.report.work:
            ledger.begin(typical and (first or self.settling.watching))

    def _wake(self) -> None:
        """Convert the layers again that have been stock ones since the model was evaluated."""
        self._rested = False
        for layer in self._layers.values():
            if layer.attributes and not layer.stock:
                layer.wake()

    @property
    def _in_step_with_others(self) -> bool:
        """Whether there are several processes: they draw from all samplers, so that none is ahead of another."""
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    def _drawn_from(self) -> Iterable[PatternSampler]:
        """Samplers that a step needs: all, if sites may be compiled, whose graphs read the draw of the first one."""
        compiled = self.book is not None and self.book.may_draw
        every = compiled or self._in_step_with_others
        return self.samplers.values() if every else self.settling.samplers()

    def _note(self, multiplies: int) -> None:
        self.report.elsewhere += multiplies

    def end(self) -> None:
        """End the training step: it is decided what is skipped, and outputs that somebody holds get their values."""
        settle()
        if self._count is not None:
            self._count.stop()
            self._count = None
        self.settling.end()
        if self.settling.is_idle:
            remove_hooks()

    def finish(self) -> None:
        """Say that a training step is over: what is called in training mode from now on is stock."""
        self.stepping = False
        if self.settling.watching or any(site.opened for site in self.report.sites):
            self.end()  # of other steps it is the next one's beginning that does it

    def serve_compiled(self, model: nn.Module) -> None:
        """Let compiled graphs of the model skip as well."""
        modules = [m for m in self.layers if isinstance(m, ApproxDropoutSite) and m.site.rate]
        if self.options.pattern != "row" or not modules:
            return
        self.book, self._entrances = Book(self.layers, self.report.left), Entrances(model)
        self._callers = Callers(model, [layer for layer in self.layers if isinstance(layer, ApproxLSTM)])
        for module in modules:
            self.book.add(module.site, module)
        self.report.work.append(self.book.work)
        self.book.begin()
        CHARGE.take(self.book)

    def restore(self) -> None:
        """Give the stock classes back, whatever else has changed the layers; what cannot be is named in a warning."""
        if self.book is not None:
            CHARGE.give(self.book.serial)
            self.book.close()
        if self._entrances is not None:
            self._entrances.leave()
        if self._callers is not None:
            self._callers.end()
        model = self.model()
        if model is not None and _CONVERSIONS.get(model) is self:
            del _CONVERSIONS[model]
        failed = []
        try:
            self.end()
        except Exception as error:  # somebody took from a layer what it learns with
            failed.append(f"what its layers have learned ({error!r})")
        for layer in self._layers.values():
            module = layer.ref()
            try:
                if module is not None:
                    give_back(module)
            except Exception as error:
                failed.append(f"{layer.name} of the class {type(module).__name__} ({error})")
        self._layers.clear()
        remove_hooks()
        if failed:
            warnings.warn(
                f"not restored: {'; '.join(failed)}. These layers compute as the stock ones all the same",
                NotRestoredWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """State of the samplers, by rate."""
        return {repr(rate): sampler.state_dict() for rate, sampler in self.samplers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the very same sequences.

        Raises:
            ValueError: The state is of other rates or distributions.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the saved patterns are of the rates {sorted(state)}, the model has {sorted(self.state_dict())}"
            )
        for rate, sampler in self.samplers.items():
            sampler.load_state_dict(state[repr(rate)])


def convert(model: nn.Module, options: Options, seed: int, rank: int = 0) -> Conversion:
    """Convert a model in place; see :func:`approximate`."""
    if _find(model) is not None:
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
                conversion.left(f"{name} ({what})", module.dropout, reason)
        for name, place, reason in functional_dropouts(model):
            conversion.left(f"{name or 'the model'} ({place})", None, reason)
    except ValueError:  # a rate of the model's that no pattern serves
        conversion.restore()
        raise
    if any(site.rate for site in conversion.report.sites):
        for name, module in model.named_modules():
            if computes_as(module, nn.Linear) and "weight" in module._parameters:
                _convert_linear(conversion, name, module)
            elif isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch."):
                conversion.report.notes.append(f"{name} is left as it is: {_own_forward(module)}")
        conversion.know_sizes(model)
        conversion.stays(model.modules())
    else:
        warnings.warn(f"no dropout could be converted:\n{conversion.report}", NoEffectWarning, stacklevel=3)
    conversion.serve_compiled(model)
    _CONVERSIONS[_key(model)] = conversion
    return conversion


def _release(model: nn.Module) -> None:
    """Make stock layers of those that a conversion has left behind.

    Raises:
        ValueError: A layer belongs to a model that is converted still.
    """
    left = [(name, module) for name, module in model.named_modules() if isinstance(module, Converted)]
    for name, layer in left:
        if layer.is_live:
            raise ValueError(f"the layer {name!r} is part of another converted model; restore(that model) first")
    for _, layer in left:
        with contextlib.suppress(TypeError):  # of a class that cannot be changed: it is left as it is, by its name
            give_back(layer)


def computes_as(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether a module is of a stock class, or of one derived from it that changes nothing of what it computes."""
    cls = type(module)
    if cls is stock:
        return True
    if not isinstance(module, stock) or isinstance(module, (Converted, nn.modules.lazy.LazyModuleMixin)):
        return False
    methods = ("forward", "__call__", "check_forward_args", "permute_hidden", "__getattr__", "train")
    same = all(getattr(cls, name, None) is getattr(stock, name, None) for name in methods)
    return same and not cls.__module__.startswith("torch.")  # which has reasons for its own


def _own_forward(module: nn.Module) -> str:
    return f"its class {type(module).__name__} has code of its own for what it computes"


def _convert_dropout(conversion: Conversion, name: str, module: nn.modules.dropout._DropoutNd) -> None:
    if not isinstance(module, nn.Dropout):
        conversion.left(name, module.p, f"{type(module).__name__} drops other things than units")
    elif not computes_as(module, nn.Dropout):
        conversion.left(name, module.p, _own_forward(module))
    elif conversion.rate(module.p) == module.p == 0:
        conversion.left(name, 0.0, "the rate is 0")
    elif conversion.rate(module.p) >= 1:
        conversion.left(name, module.p, "it drops everything")
    else:
        conversion.swap(module, ApproxDropoutSite, site=conversion.site(name, module.p))


def _convert_linear(conversion: Conversion, name: str, module: nn.Linear) -> None:
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
            conversion.left(site, module.dropout, reason)
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
                conversion.left(site, 0.0, "the rate is 0")
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
    """Make the dropout of a model skip the work that it drops. Changes the model in place.

    ``nn.Dropout``, ``nn.Linear`` and ``nn.LSTM`` layers keep their identity, parameters and names; only their
    classes change. Call :func:`resample` before each training step.

    Args:
        model: Any module.
        seed: Seed of the patterns; None takes PyTorch's initial seed, without using its generator.
        **options: As of :class:`.Options`.

    Returns:
        The report: one row per dropout found.

    Raises:
        ValueError: An option is outside of its range, the seed is not an integer, a rate is not feasible, or the
            model is converted already.
    """
    chosen = Options.from_keywords("approximate", options)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, SupportsIndex)):
        raise ValueError(f"approximate: seed must be an integer or None, got {seed!r}")
    return convert(model, chosen, torch.initial_seed() if seed is None else seed).report


def resample(model: nn.Module, batch: Any = None) -> None:
    """Draw the next patterns of a converted model: once per training step.

    Args:
        model: The model.
        batch: What the step is going to read: tensors, in whatever containers. By their shapes larger batches than
            those seen so far are noticed, for which skipping may gain. Without it steps 1, 2, 4, ... look for that.

    Raises:
        ValueError: The model is not converted.
    """
    conversion_of(model).resample(batch=batch)


def replay_key(model: nn.Module) -> Hashable:
    """What the code of this step depends on. Steps of one key may share a CUDA graph.

    That is ``(dp, keep)`` of each rate, in eager layers and in compiled graphs, where the tables of these are, and
    which layers are stock.

    Args:
        model: A model that is converted, or parts of which are, or none.
    """
    conversions = _conversions(model)
    eager = (
        (rate, sampler.dp, sampler.keep)
        for conversion in conversions
        for rate, sampler in sorted(conversion.samplers.items())
    )
    settled = (conversion.settling.version for conversion in conversions)
    return *eager, *settled, *(c.book.replay_key for c in conversions if c.book is not None)


def check_replayable(model: nn.Module) -> None:
    """Check, after the forward pass of a step, that a replay of the step would take other patterns.

    Args:
        model: As for :func:`replay_key`.

    Raises:
        RuntimeError: A pattern was drawn on the host during the step: a replay would repeat it.
    """
    drawn = [site.name for conversion in _conversions(model) for site in conversion.report.sites if site.drew_on_host]
    if drawn:
        raise RuntimeError(
            f"the patterns of {', '.join(drawn)} are drawn by eager layers, so every replay would repeat them; "
            "compile the model (torch.compile), whose graphs read patterns from the device's memory"
        )


def restore(model: nn.Module) -> None:
    """Give a converted model its ordinary classes back. Parameters are untouched.

    Whatever else has changed the model since: layers that were replaced or removed are stock layers again if somebody
    holds them; a class that others have derived from that of a converted layer (a parametrization) stays, and derives
    from the stock class. A class that does not allow it is named in a :class:`NotRestoredWarning`; its layer computes
    as the stock one.

    Raises:
        ValueError: The model is not converted.
    """
    conversion_of(model).restore()


def _key(model: nn.Module) -> nn.Module:
    """The model itself, if it is wrapped by ``torch.compile``."""
    return getattr(model, "_orig_mod", model)


def _find(model: nn.Module) -> Conversion | None:
    """The conversion of a model, or None."""
    return _CONVERSIONS.get(_key(model))


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion of a model.

    Raises:
        ValueError: The model is not converted.
    """
    conversion = _find(model)
    if conversion is None:
        raise ValueError("the model is not converted (a copy of one is not); approximate(model) first")
    return conversion


def _conversions(model: nn.Module) -> list[Conversion]:
    """The conversions of a model and of its parts."""
    found = (_CONVERSIONS.get(module) for module in _key(model).modules())
    return [conversion for conversion in found if conversion is not None]
