"""The Lightning callback: converts, draws per batch, logs, saves, restores."""

from __future__ import annotations

import logging
import os
import textwrap
from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from approxdrop_lightning.conversion import Conversion
from approxdrop_lightning.options import CallbackOptions, check_same_sequence, described, takes
from approxdrop_lightning.report import Report
from approxdrop_lightning.surgery import convert

log = logging.getLogger(__name__)

_TESTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class ApproxDropout(Callback):
    """Make the dropout of a model skip the work that it drops.

    When training starts, ``nn.Dropout`` and the ``nn.Linear`` and ``nn.LSTM`` layers beside it are converted in
    place; for each batch patterns are drawn; when training ends, the stock layers are back. Validation, test and
    predict are those of the unconverted model, and so is the ``state_dict`` at any time.

    One object may serve several fits: a model with the same sites (names and rates) goes on with the sequence of
    patterns and the realised rate, any other begins anew.

    {options}

    Raises:
        MisconfigurationException: An argument is outside of its range or a rate is not feasible.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ApproxDropout()], logger=False, enable_checkpointing=False)
    """

    @takes(CallbackOptions)
    def __init__(self, rate: float | None = None, **options: Any) -> None:
        super().__init__()
        try:
            self.options = CallbackOptions.from_keywords("ApproxDropout", {"rate": rate} | options)
        except ValueError as error:
            raise MisconfigurationException(f"ApproxDropout: {error}") from error
        self.report: Report | None = None
        self._conversion: Conversion | None = None
        self._saved: dict[str, Any] | None = None
        # Names and rates of the fit that left the state; None: it is a checkpoint's.
        self._saved_sites: list[tuple[str, float]] | None = None
        self._dropped, self._steps = 0.0, 0
        self._before = (0.0, 0)  # of both, at the beginning of the epoch
        self._generators: dict[str, Any] | None = None  # of a checkpoint, until training goes on
        self._reported = False

    @classmethod
    def paper(cls, rate: float | None = None, max_dp: int = 10, **overrides: Any) -> ApproxDropout:
        """The paper's own setting: pattern shared by the batch, not shuffled, one cell kept, maximum entropy."""
        settings: dict[str, Any] = {
            "interleave": False,
            "shuffle": False,
            "keep": "one",
            "concentration": 0.0,
        } | overrides
        return cls(rate=rate, max_dp=max_dp, **settings)

    @property
    def state_key(self) -> str:
        """One key per pattern family, so that two callbacks do not load each other's state."""
        return self._generate_state_key(pattern=self.options.pattern)

    @property
    def realised_rate(self) -> float | None:
        """Mean share of units or weights that patterns dropped per step and site so far; None if none was drawn."""
        return self._dropped / self._steps if self._steps else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the model, before optimizers and strategy see it."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if strategy not in _TESTED_STRATEGIES and not self.options.untested_strategies:
            raise MisconfigurationException(
                f"ApproxDropout: {strategy} is not among the tested strategies {', '.join(_TESTED_STRATEGIES)}; "
                "untested_strategies=True tries it all the same"
            )
        if self._conversion is not None:  # of a fit whose end another callback's exception has kept from us
            self.teardown(trainer, pl_module, "fit")
        # Layers that are built in configure_model must exist; it is idempotent by Lightning's contract.
        pl_module.configure_model()
        try:
            seed = trainer.strategy.broadcast(self._seed())
            rank = 0 if self.options.sync_patterns else trainer.global_rank
            self._conversion = convert(pl_module, self.options, seed, rank)
        except ValueError as error:
            raise MisconfigurationException(f"ApproxDropout: {error}") from error
        self._conversion.stepping = False  # until a batch comes
        self.report, self._reported = self._conversion.report, False
        if self._saved_sites not in (None, self._sites(self._conversion)):
            self._forget()  # what an earlier fit of another model has left is no checkpoint
        if self._saved is not None:
            self._continue(self._conversion, self._saved)

    @staticmethod
    def _sites(conversion: Conversion) -> list[tuple[str, float]]:
        return [(site.name, site.rate) for site in conversion.report.sites]

    def _forget(self) -> None:
        self._saved = self._saved_sites = self._generators = None
        self._dropped, self._steps = 0.0, 0
        self._before = (0.0, 0)

    def _seed(self) -> int:
        if self.options.seed is not None:
            return self.options.seed
        everything = os.environ.get("PL_GLOBAL_SEED")
        if not everything:
            return torch.initial_seed()
        try:
            return int(everything)
        except ValueError:
            raise ValueError(f"the environment's PL_GLOBAL_SEED must be an integer, got {everything!r}") from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with PyTorch's random numbers where stock dropout draws from them.

        Before the loader is asked for the order of the data, which draws from them as well.
        """
        if trainer.world_size > 1:  # the state is that of the first process
            self._generators = None
        if self._generators is not None:
            _set_generators(self._generators)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this batch's patterns."""
        if batch_idx == 0:  # a run that is resumed within an epoch begins none
            self._before = (self._dropped, self._steps)
        fresh = self.options.resample == "batch" or batch_idx % trainer.accumulate_grad_batches == 0
        assert self._conversion is not None  # setup has run
        self._conversion.resample(fresh, batch)
        if self._generators is not None:
            if batch_idx:  # a run that is resumed within an epoch has drawn for its order of the data, too
                _set_generators(self._generators)
            self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add to the realised rate; print the report once the first batch has shown what is skipped."""
        assert self._conversion is not None
        patterns = [p for site in self._conversion.report.sites for p in site.last_patterns]
        if patterns:
            self._dropped += sum(1 - p.share for p in patterns) / len(patterns)
            self._steps += 1
        self._conversion.finish()  # dropout as a sampler, for one, is stock from here on
        if not self._reported:
            self._reported = True
            self._conversion.end()
            rank_zero_info(f"ApproxDropout:\n{self.report}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's mean; Lightning's own means forget what was before a resume within the epoch."""
        if steps := self._steps - self._before[1]:
            pl_module.log("dropout/realised_rate", (self._dropped - self._before[0]) / steps)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the stock layers back; a second fit of a model with the same sites continues the sequence."""
        if stage == "fit" and self._conversion is not None:
            self._saved, self._saved_sites = self.state_dict(), self._sites(self._conversion)
            conversion, self._conversion = self._conversion, None
            conversion.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end: Lightning calls no teardown after an exception that it raises again."""
        try:
            self.teardown(trainer, pl_module, "fit")
        except Exception as error:  # a warning that was made an error: it must not take the place of the exception
            log.warning("ApproxDropout: %s", error)

    def state_dict(self) -> dict[str, Any]:
        """State of the samplers, what is skipped where, the realised rate, and the options that made them.

        Where stock dropout runs, the state of PyTorch's generators is part of it.
        """
        if self._conversion is None:
            return self._saved or {}
        return {
            "options": asdict(self.options),
            "samplers": self._conversion.state_dict(),
            "policy": self.options.policy.state(),
            "settled": self._conversion.settling.state_dict(),
            "generators": _generators() if self._conversion.settling.has_stock else None,
            "dropped": self._dropped,
            "steps": self._steps,
            "before": self._before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the very same sequence of patterns."""
        self._saved, self._saved_sites = state_dict or None, None
        if self._conversion is not None and self._saved is not None:
            self._continue(self._conversion, self._saved)

    def _continue(self, conversion: Conversion, state: dict[str, Any]) -> None:
        fresh, undecided = conversion.state_dict(), conversion.settling.state_dict()
        try:
            check_same_sequence(state["options"], self.options)
            conversion.load_state_dict(state["samplers"])
            if self._saved_sites is None:  # a checkpoint, which resumes all of a run
                self._generators = state.get("generators")
            if state.get("policy") == self.options.policy.state():  # else it is decided anew
                conversion.settling.load_state_dict(state["settled"])
            self._dropped, self._steps = float(state["dropped"]), int(state["steps"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # the last: of a generator
            conversion.load_state_dict(fresh)  # nothing of it stays, neither for this fit nor for a later one
            conversion.settling.load_state_dict(undecided)
            self._forget()
            what = f"{error} is missing: another version wrote it" if isinstance(error, KeyError) else error
            raise MisconfigurationException(
                f"ApproxDropout: the checkpoint's patterns do not fit this run: {what}; "
                "LightningModule.load_from_checkpoint takes its weights and begins a new sequence"
            ) from error
        self._before = tuple(state.get("before", (self._dropped, self._steps)))


def _generators() -> dict[str, Any]:
    """State of PyTorch's generators: of the CPU, and of the current GPU if it is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


# One place describes the options; ``help()``, LightningCLI and the API reference read them here.
ApproxDropout.__doc__ = (ApproxDropout.__doc__ or "").replace(
    "{options}", textwrap.indent(described(CallbackOptions), "    ").strip()
)
