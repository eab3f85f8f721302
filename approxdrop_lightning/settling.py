"""Decides where nothing is skipped, and makes the converted layers there stock layers.

A step is *watched* if its batch may have shapes not seen before. All layers are then converted, and it is recorded
which layer reads what; after the step, it is decided for each use of a dropout whether to skip. Layers next to which
nothing is skipped are stock layers, without any code of this package, until the next watched step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from approxdrop_lightning.layers import ApproxDropoutSite, ApproxLinear, ApproxLSTM, TileLinear
from approxdrop_lightning.layers.converted import attributes, give_back
from approxdrop_lightning.layers.use import Use, key_of_state

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site
    from approxdrop_lightning.patterns.sampler import PatternSampler
    from approxdrop_lightning.report import Report

#: Shapes of the tensors in a batch; None if there are none, or they cannot be compared.
Shapes = tuple[tuple[int, ...], ...] | None


@dataclass
class Layer:
    """A converted layer.

    Attributes:
        name: Its name in the model.
        ref: The layer.
        cls: Its class while it is converted.
        attributes: The attributes that it has in addition while it is converted; empty as long as it is.
        sites: The dropouts that it is or contains.
        compiled: Whether it is in a part compiled by ``torch.compile``, where a different class means a new graph.
        stock: Whether nothing is skipped next to it, so that it stays a stock layer in training as well.
    """

    name: str
    ref: weakref.ref[nn.Module]
    cls: type
    attributes: dict[str, Any]
    sites: tuple[Site, ...] = ()
    compiled: bool = False
    stock: bool = False

    def wake(self) -> None:
        """Convert it, if it is in training mode and its class has not been changed by others."""
        module = self.ref() if self.attributes else None
        if module is None or not module.training or type(module) is not vars(self.cls)["stock"]:
            return
        module.__class__ = self.cls
        for name, value in self.attributes.items():
            # Bypasses nn.Module.__setattr__: these attributes must not be registered or saved.
            object.__setattr__(module, name, value)
        self.attributes = {}

    def rest(self) -> None:
        """Make it a stock layer."""
        module = self.ref()
        if module is None or type(module) is not self.cls:
            return
        mine = attributes(self.cls) & module.__dict__.keys()
        self.attributes = {name: module.__dict__[name] for name in mine}
        give_back(module)

    def put(self, **values: Any) -> None:
        """Set attributes, whether or not it is converted at the moment."""
        if self.attributes:
            self.attributes.update(values)
        elif (module := self.ref()) is not None:
            vars(module).update(values)

    def get(self, name: str) -> Any:
        """The value of an attribute, whether or not it is converted at the moment; None if it is missing."""
        module = self.ref()
        return self.attributes.get(name) if self.attributes else getattr(module, name, None)

    def may_be_stock(self, busy: set[str]) -> bool:
        """Whether nothing is skipped in it or next to it.

        Args:
            busy: Names of the layers in which something is skipped.
        """
        if self.compiled:
            return False
        if issubclass(self.cls, (ApproxLinear, TileLinear)):
            return self.name not in busy
        module = self.ref()
        if issubclass(self.cls, ApproxDropoutSite):
            return all(site.is_stock and site.rate == getattr(module, "p", None) for site in self.sites)
        if issubclass(self.cls, ApproxLSTM):
            if self.get("recurrent_sites") or any(
                name == self.name or name.startswith(f"{self.name} (") for name in busy
            ):
                return False
            return all(site.is_stock and site.rate == getattr(module, "dropout", None) for site in self.sites)
        return False


@dataclass
class Settling:
    """Makes the decisions for one model, between steps.

    Attributes:
        report: The report of the model, which has its sites.
        layers: The converted layers by id.
        watching: Whether the current step is watched.
        version: Number of times that classes of layers have changed.
        is_idle: Whether all layers are stock.
    """

    report: Report
    layers: dict[int, Layer] = field(default_factory=dict)
    watching: bool = True
    version: int = 0
    is_idle: bool = False
    #: Shapes of the largest batches watched; smaller ones show nothing new.
    _known: list[Shapes] = field(default_factory=list)
    _shapes: Shapes = None
    _steps: int = 0
    _again: bool = False  # the next step is watched, whatever its batch
    #: Of functional dropouts that no graph has shown since the decisions were loaded: by name, as `Site.in_graphs`.
    _expected: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def _sites(self) -> list[Site]:
        return [site for site in self.report.sites if site.rate and site.decides]

    def goes_on(self, batch: Any) -> bool:
        """Whether all layers stay stock in a step with this batch, so that there is nothing to do."""
        if not self.is_idle:
            return False
        # The usual batch, a few tensors: in networks so small that they are stock, a microsecond counts.
        if type(batch) in (tuple, list) and self._shapes is not None and len(batch) == len(self._shapes):
            for leaf, shape in zip(batch, self._shapes, strict=True):
                if type(leaf) is not Tensor or leaf.is_nested or leaf.shape != shape:
                    break
            else:
                return True
        shapes = shapes_of(batch)
        if shapes is None and (self._steps + 1) & self._steps:
            self._steps += 1
            return True
        return shapes is not None and shapes == self._shapes

    def begin(self, batch: Any) -> None:
        """Begin a step. If nothing is known of its batch, steps 1, 2, 4, 8, ... are watched."""
        self._shapes = shapes_of(batch)
        self._steps += 1
        known = any(_covers(large, self._shapes) for large in self._known)
        if self._shapes is None and self._steps & (self._steps - 1) == 0:
            known = False
        watching = self._again or not known
        if watching != self.watching:
            self.watching = watching
            self._arrange()

    def end(self) -> None:
        """Decide according to what the step has shown."""
        sites = self._sites
        if not self.watching and not any(site.opened for site in sites):
            return
        if self.watching and not any(site.uses for site in sites):
            if sites and all(site.is_native for site in sites):
                self._watched()
                self.is_idle = True
            return  # nothing ran eagerly
        whole = self._read_whole_too()
        for layer in self.layers.values():
            if layer.name in whole:
                layer.get("work").forget_outputs()
        settled: list[Use] = []
        self._again = False
        for site in sites:
            complete = self.watching or any(use.skips is not None for use in site.uses.values())
            site.opened = False
            for use in [use for use in site.uses.values() if use.skips is None]:
                if use.seen and complete:
                    use.settle(whole)
                    settled.append(use)
                elif use.seen or use.unseen:  # in a step that dropped nothing, or next to layers that were stock
                    use.reopen()
                    self._again = True
        for use in settled:
            if use.skips and any(other.is_stock for other in use.beside):
                use.reopen()  # a tensor that was concatenated with it is stock now
                self._again = True
        nothing = {site for site in sites if site.reason is not None}
        for site in sites:
            site.sum_up()
        for ledger in self.report.work:
            ledger.forget(nothing)
        if self.watching and not self._again:
            self._watched()
        self.watching = False
        self._arrange()

    def _watched(self) -> None:
        """Note that a step has shown all that batches of its shapes, and smaller ones, can show."""
        self._known = [s for s in self._known if not _covers(self._shapes, s)] + [self._shapes]
        self.watching = False

    def _read_whole_too(self) -> set[str]:
        """Names of layers whose outputs were read whole although kept units had been computed separately."""
        linear = (layer for layer in self.layers.values() if issubclass(layer.cls, ApproxLinear))
        return {layer.name for layer in linear if layer.get("read_whole_too")}

    def _arrange(self) -> None:
        """Give each layer the class that it has in the next step."""
        self.version += 1
        uses = [use for site in self._sites for use in site.uses.values() if use.skips is not False]
        busy = {name for use in uses for name in use.layers}
        before = {name for use in uses for names in use.before for name in names}
        seen = any(site.uses and not site.policy.everywhere for site in self._sites)
        for layer in self.layers.values():
            layer.stock = seen and not self.watching and layer.may_be_stock(busy)
            if issubclass(layer.cls, ApproxLinear):
                waits = (self.watching or layer.name in before) and not layer.get("read_whole_too")
                layer.put(defers=waits, watched=self.watching)
            if layer.stock:
                layer.rest()
            else:
                layer.wake()
            for site in layer.sites:
                if layer.stock and not site.resting:
                    site.forget_patterns()
                site.resting = layer.stock
        native = not self.watching and all(site.is_native for site in self._sites)
        read = any(True in site.in_graphs for site in self._sites)  # functional dropouts of graphs have no layer
        self.is_idle = native or (not read and all(layer.stock for layer in self.layers.values()))

    @property
    def has_stock(self) -> bool:
        """Whether stock dropout runs in place of any site."""
        return any(False in site.in_graphs or any(use.is_stock for use in site.uses.values()) for site in self._sites)

    def samplers(self) -> list[PatternSampler]:
        """The samplers that patterns are drawn from in the current step."""
        drawing = (site for site in self.report.sites if not (site.resting or site.is_native))
        return list({id(site.sampler): site.sampler for site in drawing}.values())

    def state_dict(self) -> dict[str, Any]:
        """All decisions, as plain values."""
        return {
            "uses": {
                site.name: [use.state() for use in site.uses.values() if use.skips is not None]
                for site in self._sites
            },
            "in_graphs": self._expected | {site.name: sorted(site.in_graphs) for site in self._sites},
            "read_whole_too": sorted(self._read_whole_too()),
            "known": [None if shapes is None else [list(shape) for shape in shapes] for shapes in self._known],
            "steps": self._steps,
            "again": self._again,
        }

    @property
    def expects_to_draw(self) -> bool:
        """Whether a functional dropout has skipped that no graph has shown since the decisions were loaded."""
        return any(True in seen for seen in self._expected.values())

    def resume(self, site: Site) -> None:
        """Give a functional dropout, which a graph has shown, the decisions that were loaded for it."""
        site.in_graphs = set(self._expected.pop(site.name, []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved decisions, except those for sites that the model does not have."""
        for site in self._sites:
            site.uses.clear()
            for saved in state["uses"].get(site.name, []):
                key = key_of_state(saved)
                use = site.uses[key] = Use(site, key, site.policy.at(torch.device(key[2]), key[1]))
                use.load_state(saved)
            site.in_graphs = set(state.get("in_graphs", {}).get(site.name, []))
            site.sum_up()
        known = {site.name for site in self._sites}
        self._expected = {name: seen for name, seen in state.get("in_graphs", {}).items() if name not in known}
        for layer in self.layers.values():
            if issubclass(layer.cls, ApproxLinear):
                layer.put(read_whole_too=layer.name in state["read_whole_too"])
        self._known = [None if known is None else tuple(map(tuple, known)) for known in state["known"]]
        self._steps, self._again = int(state["steps"]), bool(state["again"])
        self.watching = not self._known  # until a batch comes
        self._arrange()


def shapes_of(batch: Any) -> Shapes:
    """Shapes of the tensors in a batch; None if there are none, or if a tensor is nested."""
    flat = type(batch) in (tuple, list) and all(type(leaf) is Tensor for leaf in batch)
    try:
        leaves = batch if flat else tree_leaves(batch)  # which takes a while
    except RecursionError:  # a container that contains itself
        return None
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(tensor.is_nested for tensor in tensors):  # their shapes cannot be compared
        return None
    return tuple(tuple(tensor.shape) for tensor in tensors) or None


def _covers(large: Shapes, small: Shapes) -> bool:
    """Whether no size of the second batch exceeds that of the first, so that it shows nothing new."""
    if large is None or small is None or large == small:
        return large == small
    return len(large) == len(small) and all(map(_shape_covers, large, small))


def _shape_covers(large: Sequence[int], small: Sequence[int]) -> bool:
    return len(large) == len(small) and all(a >= b for a, b in zip(large, small, strict=True))
