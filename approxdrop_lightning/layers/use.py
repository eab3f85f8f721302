"""Records of a dropout at inputs of one shape, and the decision they lead to: skip, or stock dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from approxdrop_lightning.policy import Thresholds

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site

#: Functions as a reader of the report knows them: what follows a linear layer is normalised in one dimension.
_MODULES = {
    "batch_norm": "BatchNorm1d",
    "instance_norm": "InstanceNorm1d",
    "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm",
    "rms_norm": "RMSNorm",
}

#: Shape, type (of products, under ``torch.autocast`` too) and kind of device.
Key = tuple[tuple[int, ...], torch.dtype, str]


class Use:
    """Uses of a site at inputs of one shape: the only record of them in a step.

    As long as it is *open*, the readers of the output and the makers of the input are recorded. :meth:`settle` then
    decides for all later steps; a use at which nothing is skipped is stock dropout from then on.

    Args:
        site: The site.
        key: Of the inputs.
        ask: Thresholds of the policy for these.
    """

    def __init__(self, site: Site, key: Key, ask: Thresholds) -> None:
        self.site, self.key, self.ask = site, key, ask
        self.name, self.backend = site.name, site.backend
        #: Whether something is skipped; None: it is open.
        self.skips: bool | None = None
        #: Why not.
        self.reason: str | None = None
        #: Multiplies saved: in layers before it (the outputs of several may be dropped together), and in readers.
        self.before: dict[tuple[str, ...], int] = {}
        self.after: dict[str, int] = {}
        #: Who reads all of the output, and how many values.
        self.whole: dict[str, int] = {}
        #: Layers before it whose outputs something else reads whole, and what does.
        self.read_before: dict[str, str] = {}
        #: Whether who reads it has decided, and not its own sizes: then fewer rows skip nothing either, and more do.
        self.by_readers = False
        #: Uses whose outputs were side by side with this one's for a reader.
        self.beside: set[Use] = set()
        #: The first product that was too small, if one was.
        self.too_small: str | None = None
        #: Whether a pattern has shown who reads it, and whether one that dropped nothing has not.
        self.seen = self.unseen = False

    @property
    def steps(self) -> int:
        """Steps that the site has begun."""
        return self.site.steps

    @property
    def parts(self) -> list[Use]:
        """Uses of single sites: this one."""
        return [self]

    def put_beside(self, others: Sequence[Use]) -> None:
        """A reader may read it side by side with others."""
        if self.skips is None:
            self.beside.update(other for other in others if other is not self)

    def shares(self, multiplies: int) -> list[tuple[Site, int]]:
        """Sites that so many multiplies of a product fall to: this one's."""
        return [(self.site, multiplies)]

    # -- noted while it is open

    def made_by(self, names: tuple[str, ...], multiplies: int) -> None:
        """Layers of these names compute kept units only, of so many multiplies."""
        if self.skips is None:
            self.before[names] = self.before.get(names, 0) + int(multiplies * self.site.rate)
            self.site.producers.update(names)

    def read_kept(self, name: str, multiplies: int) -> None:
        """A layer of that name reads kept units only, in a product of so many multiplies."""
        if self.skips is None:
            self.after[name] = self.after.get(name, 0) + int(multiplies * self.site.rate)
            self.site.consumers.add(name)

    def read_whole(self, name: str) -> None:
        """A function of that name reads everything, zeros too."""
        if self.skips is None:
            self.whole[name] = self.whole.get(name, 0) + math.prod(self.key[0])
            self.site.dense_readers.add(name)

    def refuse(self, reason: str | None) -> bool:
        """Whether there is a reason against skipping in a product; it is noted."""
        if reason is not None and self.too_small is None:
            self.too_small = reason
        return self.site.refuse(reason)

    def saves_too_few(self, multiplies: int) -> bool:
        """Whether a product of a linear layer, of so many multiplies, is too small to gain by the dropout."""
        return self.refuse(self.ask.product(int(multiplies * self.site.rate)))

    def saves_too_few_in_lstm(self, multiplies: int) -> bool:
        """Likewise of a product of an LSTM."""
        return self.refuse(self.ask.lstm(int(multiplies * self.site.rate)))

    # -- decided

    @property
    def is_stock(self) -> bool:
        """Whether stock dropout runs."""
        return self.skips is False and not self.site.policy.everywhere

    def decide(self, reason: str | None) -> None:
        """Decide: for skipping, or against it for the reason given."""
        self.skips, self.reason = reason is None, reason

    def settle(self, read_whole_too: set[str]) -> None:
        """Decide by the records.

        Args:
            read_whole_too: Layers whose outputs are read whole as well: their kept units are not computed apart.
        """
        self.by_readers = True
        for names in [names for names in self.before if read_whole_too & set(names)]:
            del self.before[names]
        if self.whole and self.before and not self.after and (reason := self.ask.residual_sum(self.whole)):
            self.decide(reason)
        elif self.before or self.after:
            self.decide(self.ask.together([*self.before.values(), *self.after.values()], sum(self.whole.values())))
        else:
            self.decide(self.too_small or self.site.unread(self))

    def follow(self, other: Use, ratio: float) -> None:
        """Decide as at inputs of so many times fewer rows, or more."""
        self.by_readers = True
        self.decide(other.reason)
        self.before = {names: int(saved * ratio) for names, saved in other.before.items()}
        self.after = {name: int(saved * ratio) for name, saved in other.after.items()}
        self.whole = {name: int(values * ratio) for name, values in other.whole.items()}

    def reopen(self) -> None:
        """Discard the records: something beside it has changed."""
        self.skips = self.reason = self.too_small = None
        self.before, self.after, self.whole, self.beside = {}, {}, {}, set()
        self.seen = self.unseen = self.by_readers = False

    def note_before(self, found: dict[str, str]) -> None:
        """Layers before it that are read whole, each with the function that reads it."""
        self.read_before.update((name, _MODULES.get(by, by)) for name, by in found.items())
        self.site.whole.update(self.read_before)

    @property
    def layers(self) -> set[str]:
        """Names of the layers that skip something."""
        return {name for names in self.before for name in names} | set(self.after)

    def state(self) -> dict[str, Any]:
        """The decision, of plain values."""
        shape, dtype, device = self.key
        return {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "reason": self.reason,
            "by_readers": self.by_readers,
            "before": [[list(names), saved] for names, saved in self.before.items()],
            "after": dict(self.after),
            "whole": dict(self.whole),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take a decision over."""
        self.decide(state["reason"])
        self.by_readers = bool(state["by_readers"])
        self.before = {tuple(names): saved for names, saved in state["before"]}
        self.after, self.whole = dict(state["after"]), dict(state["whole"])


def key_of_state(state: dict[str, Any]) -> Key:
    """The key of a saved decision."""
    return tuple(state["shape"]), getattr(torch, state["dtype"]), state["device"]
