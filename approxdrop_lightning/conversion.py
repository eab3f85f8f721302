"""A converted model: its layers, samplers and report, and what happens to them from step to step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parameter import UninitializedParameter

from approxdrop_lightning.graph.book import Book
from approxdrop_lightning.graph.calls import Calls
from approxdrop_lightning.graph.doors import CHARGE
from approxdrop_lightning.graph.frames import Callers
from approxdrop_lightning.graph.pairs import Pair, exact_pair
from approxdrop_lightning.layers import ApproxDropoutSite, ApproxLSTM, Site, TileSite
from approxdrop_lightning.layers.converted import Converted, class_for, give_back
from approxdrop_lightning.layers.entrances import Entrances, compiled_parts
from approxdrop_lightning.layers.waiting import remove_hooks, settle
from approxdrop_lightning.multiplies import Count
from approxdrop_lightning.options import Options
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.report import Report, Row
from approxdrop_lightning.settling import Layer, Settling

_SEVERAL = torch.distributed.is_available()
#: The conversion of each converted model. Kept outside of the model, since copies and pickles must not contain it.
_CONVERSIONS: weakref.WeakKeyDictionary[nn.Module, Conversion] = weakref.WeakKeyDictionary()


class NotRestoredWarning(UserWarning):
    """The class of a layer could not be restored. The layer nevertheless computes what the stock layer computes."""


class Conversion:
    """The state of a converted model.

    Args:
        model: The model.
        options: How it is converted.
        seed: Seed of the first sampler; each further one takes the next integer.
        rank: Of this process among those of a distributed run. Patterns differ by rank, ``(dp, keep)`` does not.

    Attributes:
        report: One row per dropout.
        samplers: One per dropout rate.
        settling: Decides which layers are stock.
        stepping: Whether a training step is under way; custom loops do not say when one ends.
        book: Patterns of compiled graphs; None if the model can have none.
    """

    def __init__(self, model: nn.Module, options: Options, seed: int, rank: int = 0) -> None:
        self.model = weakref.ref(_key(model))
        self.options, self.seed, self.rank = options, seed, rank
        self.report = Report()
        self.samplers: dict[float, PatternSampler] = {}
        self._of_calls: dict[Pair, PatternSampler] = {}  # of functional dropouts, which have a fixed pair
        self.stepping = True
        self.settling = Settling(self.report)
        self._layers = self.settling.layers
        self._rested = False  # whether a layer has become stock since the last step began
        self._others: list[weakref.ref[nn.Module]] = []
        self._count: Count | None = None
        self.book: Book | None = None
        self._callers: Callers | None = None  # functions of a compiled model that run eagerly
        self._entrances: Entrances | None = None  # of the compiled parts of an eager model

    def rate(self, own: float) -> float:
        """The requested rate, or the model's own if none was requested."""
        return own if self.options.rate is None else self.options.rate

    def site(self, name: str, own: float) -> Site:
        """Create a site. Sites with the same rate share a sampler, and therefore ``(dp, keep)`` in every step."""
        options, rate = self.options, self.rate(own)
        if rate not in self.samplers:
            self.samplers[rate] = options.sampler(rate, self.seed + len(self.samplers), self.rank)
        arguments = (name, rate, self.samplers[rate], options.scale, options.policy, options.backend)
        if options.pattern == "row":
            site = Site(*arguments)
        else:
            site = TileSite(*arguments, independent=options.pattern == "dropconnect")
        self.report.rows.append(Row(name, rate, site=site, own_rate=None if own == rate else own))
        return site

    def site_of_call(self, name: str, rate: float) -> Site | str:
        """Create a site for a functional dropout of a compiled graph (a :class:`.calls.Owner`).

        Its rate is the model's own, because in eager mode nothing can change it.

        Returns:
            The site; if no pair drops exactly its rate, a text that says so.
        """
        options = self.options
        pair = exact_pair(rate, options.max_dp, options.keep)
        if pair is None:
            return f"no pattern of max_dp={options.max_dp} and keep={options.keep!r} drops exactly {rate:g}"
        if pair not in self._of_calls:
            sampler = self._of_calls[pair] = options.sampler(rate, 0, pair=pair)
            sampler.seed_of_step = self._leader.seed_of_step
        site = Site(name, rate, self._of_calls[pair], options.scale, options.policy)
        self.settling.resume(site)
        assert self.book is not None
        self.book.add(site, None)
        self.report.found(name, rate, site)
        return site

    @property
    def layer_sites(self) -> list[Site]:
        """The sites of layers, which exist from the conversion on, unlike those of functional dropouts."""
        of_calls = self._of_calls.values()
        return [site for site in self.report.sites if site.sampler not in of_calls]

    @property
    def _leader(self) -> PatternSampler:
        """The sampler whose seeds functional dropouts share."""
        return next(iter(self.samplers.values()))

    @property
    def in_step(self) -> bool:
        """Whether the model is in training mode, and a training step is under way."""
        model = self.model()
        return self.stepping and model is not None and model.training

    def draw(self) -> None:
        """Draw patterns in the next steps, because a graph reads them."""
        self.settling.is_idle = False

    def swap(self, module: nn.Module, cls: type, **attributes: Any) -> None:
        """Change the class of a layer in place: it keeps its identity, parameters and hooks.

        Args:
            module: The layer.
            cls: One of :mod:`.layers`.
            **attributes: Those that the class declares.
        """
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
        """Make a layer stock until the next step, because the model evaluates or a tool inspects it."""
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
        """The converted layers that still exist, even if they are no longer part of the model."""
        return [module for layer in self._layers.values() if (module := layer.ref()) is not None]

    @property
    def others(self) -> list[nn.Module]:
        """The modules that were not converted."""
        return [layer for ref in self._others if (layer := ref()) is not None]

    def inspect(self, model: nn.Module) -> None:
        """Note the size of the largest weight, which layers are compiled, and which modules were not converted."""
        self._others = [weakref.ref(module) for module in model.modules() if not isinstance(module, Converted)]
        weights = list(model.parameters())
        if not any(isinstance(weight, UninitializedParameter) for weight in weights):
            largest = max((weight.numel() for weight in weights if weight.dim() == 2), default=0)
            lstm = any(issubclass(layer.cls, ApproxLSTM) for layer in self._layers.values())
            for site in self.report.sites:
                site.largest, site.beside_lstm = largest, lstm
        compiled = {id(module) for part in compiled_parts(model) for module in part.modules()}
        for key, layer in self._layers.items():
            layer.compiled = key in compiled

    def resample(self, fresh: bool = True, batch: Any = None) -> None:
        """Begin a training step.

        Args:
            fresh: Whether new patterns are drawn; otherwise those of the last step are used again.
            batch: The batch of the step; None if it is not known.
        """
        if self._count is None and not _in_step_with_others() and self.settling.goes_on(batch):
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
            for sampler in self._of_calls.values():
                sampler.seed_of_step = self._leader.seed_of_step
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
        """Convert the layers again that have been stock since the model was evaluated."""
        self._rested = False
        for layer in self._layers.values():
            if layer.attributes and not layer.stock:
                layer.wake()

    def _drawn_from(self) -> Iterable[PatternSampler]:
        """The samplers that a step needs: all of them if there are compiled graphs that draw."""
        compiled = self.book is not None and (self.book.may_draw or self.settling.expects_to_draw)
        every = compiled or _in_step_with_others()
        return self.samplers.values() if every else self.settling.samplers()

    def _note(self, multiplies: int) -> None:
        self.report.elsewhere += multiplies

    def end(self) -> None:
        """End the training step: compute the outputs that are still held, and decide what is skipped from now on."""
        settle()
        if self._count is not None:
            self._count.stop()
            self._count = None
        self.settling.end()
        if self.settling.is_idle:
            remove_hooks()

    def finish(self) -> None:
        """Mark the training step as over: until the next one, training mode means the stock model."""
        self.stepping = False
        if self.settling.watching or any(site.opened for site in self.report.sites):
            self.end()  # other steps are ended when the next one begins

    def serve_compiled(self, model: nn.Module) -> None:
        """Prepare for ``torch.compile``, so that compiled graphs of the model skip as well."""
        if self.options.pattern != "row":
            return
        if not self.samplers:  # functional dropouts need the seed of a step
            self.samplers[0.0] = self.options.sampler(0.0, self.seed, self.rank)
        self.book = Book(self.layers or list(model.modules()), Calls(model, self, self.report.left))
        self._entrances = Entrances(model) if self.report.sites else None
        self._callers = Callers(model, [layer for layer in self.layers if isinstance(layer, ApproxLSTM)])
        for module in self.layers:
            if isinstance(module, ApproxDropoutSite) and module.site.rate:
                self.book.add(module.site, module)
        self.report.work.append(self.book.work)
        self.book.begin()
        CHARGE.take(self.book)

    def register(self, model: nn.Module) -> None:
        """Let :func:`conversion_of` find this conversion."""
        _CONVERSIONS[_key(model)] = self

    def restore(self) -> None:
        """Restore the stock classes, whatever else has changed the layers. Never raises.

        Warns:
            NotRestoredWarning: The class of a layer cannot be changed.
        """
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
        except Exception as error:  # the attributes of a layer were removed
            failed.append(f"the decisions on what is skipped ({error!r})")
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
                f"not restored: {'; '.join(failed)}. These layers nevertheless compute what the stock layers compute",
                NotRestoredWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """State of the samplers by rate."""
        return {repr(rate): sampler.state_dict() for rate, sampler in self.samplers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue saved sequences of patterns.

        Raises:
            ValueError: The state belongs to other rates or distributions.
        """
        if not state and list(self.samplers) == [0.0]:  # before functional dropouts skipped
            return
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the saved patterns are of the rates {sorted(state)}, the model has {sorted(self.state_dict())}"
            )
        for rate, sampler in self.samplers.items():
            sampler.load_state_dict(state[repr(rate)])


def _in_step_with_others() -> bool:
    """Whether there are several processes. They draw from all samplers, so that none gets ahead of the others."""
    return _SEVERAL and torch.distributed.is_initialized()


def _key(model: nn.Module) -> nn.Module:
    """The model, unwrapped if ``torch.compile`` has wrapped it."""
    return model.__dict__["_modules"]["_orig_mod"] if isinstance(model, OptimizedModule) else model


def find_conversion(model: nn.Module) -> Conversion | None:
    """The conversion of a model, or None."""
    return _CONVERSIONS.get(_key(model))


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion of a model.

    Raises:
        ValueError: The model is not converted.
    """
    conversion = find_conversion(model)
    if conversion is None:
        raise ValueError("the model is not converted (a copy of one is not); approximate(model) first")
    return conversion


def _conversions_in(model: nn.Module) -> list[Conversion]:
    """The conversions of a model and of its submodules."""
    found = (_CONVERSIONS.get(module) for module in _key(model).modules())
    return [conversion for conversion in found if conversion is not None]


def replay_key(model: nn.Module) -> Hashable:
    """Everything that the operations of the current step depend on. Steps with equal keys may share a CUDA graph.

    The key consists of ``(dp, keep)`` for each rate, in eager layers and in compiled graphs, the location of the
    tables that graphs read, and which layers are stock.

    Args:
        model: Any model; the whole of it, submodules or nothing may be converted.
    """
    conversions = _conversions_in(model)
    eager = (
        (rate, sampler.dp, sampler.keep)
        for conversion in conversions
        for rate, sampler in sorted(conversion.samplers.items())
    )
    settled = (conversion.settling.version for conversion in conversions)
    return *eager, *settled, *(c.book.replay_key for c in conversions if c.book is not None)


def check_replayable(model: nn.Module) -> None:
    """Check, after the forward pass of a step, that a replay of the step would use new patterns.

    Args:
        model: As for :func:`replay_key`.

    Raises:
        RuntimeError: A pattern was drawn on the host during the step, so a replay would repeat it.
    """
    drawn = [
        site.name for conversion in _conversions_in(model) for site in conversion.report.sites if site.drew_on_host
    ]
    if drawn:
        raise RuntimeError(
            f"the patterns of {', '.join(drawn)} are drawn by eager layers, so every replay would repeat them; "
            "compile the model (torch.compile), whose graphs read patterns from the device's memory"
        )
