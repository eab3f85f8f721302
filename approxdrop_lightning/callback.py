"""The Lightning callback: converts the model, draws patterns for each batch, logs, saves and restores."""

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
from approxdrop_lightning.options import SEQUENCE_RULE, CallbackOptions, check_same_sequence, described, takes
from approxdrop_lightning.report import Report
from approxdrop_lightning.surgery import convert

log = logging.getLogger(__name__)

_TESTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class ApproxDropout(Callback):
    """Make the dropout of a model skip the work that it drops.

    When training starts, ``nn.Dropout`` layers and the ``nn.Linear`` and ``nn.LSTM`` layers next to them are
    converted in place. Patterns are drawn for each batch, and when training ends, the stock layers are restored.
    Validation, test and prediction are those of the unconverted model, and so is the ``state_dict`` at any time.

    One callback can be used for several fits. A model with the same sites (names and rates) continues the sequence of
    patterns and the realised rate; any other model starts a new one.

    {options}

    Raises:
        MisconfigurationException: An argument is out of range, or a rate is not feasible.

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
        # Names and rates of the sites that the state belongs to; None if it is from a checkpoint.
        self._saved_sites: list[tuple[str, float]] | None = None
        self._dropped, self._steps = 0.0, 0
        self._before = (0.0, 0)  # both at the beginning of the epoch
        self._generators: dict[str, Any] | None = None  # from a checkpoint, until training resumes
        self._reported = False

    @classmethod
    def paper(cls, rate: float | None = None, max_dp: int = 10, **overrides: Any) -> ApproxDropout:
        """The setting of the paper: a pattern shared by the batch, no shuffling, one cell kept, maximum entropy."""
        settings: dict[str, Any] = {
            "interleave": False,
            "shuffle": False,
            "keep": "one",
            "concentration": 0.0,
        } | overrides
        return cls(rate=rate, max_dp=max_dp, **settings)

    @property
    def state_key(self) -> str:
        """A key for each kind of pattern, so that two callbacks do not load each other's state."""
        return self._generate_state_key(pattern=self.options.pattern)

    @property
    def realised_rate(self) -> float | None:
        """Mean share of units or weights dropped so far, over steps and sites; None if no pattern was drawn."""
        return self._dropped / self._steps if self._steps else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the model before the optimizers are created and the strategy wraps it."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if strategy not in _TESTED_STRATEGIES and not self.options.untested_strategies:
            raise MisconfigurationException(
                f"ApproxDropout: {strategy} is not among the tested strategies {', '.join(_TESTED_STRATEGIES)}; "
                "untested_strategies=True tries it all the same"
            )
        if self._conversion is not None:  # its fit ended in another callback's exception
            self.teardown(trainer, pl_module, "fit")
        # Layers created in configure_model must exist. Calling it twice is allowed by Lightning's contract.
        pl_module.configure_model()
        try:
            seed = trainer.strategy.broadcast(self._seed())
            rank = 0 if self.options.sync_patterns else trainer.global_rank
            self._conversion = convert(pl_module, self.options, seed, rank)
        except ValueError as error:
            raise MisconfigurationException(f"ApproxDropout: {error}") from error
        self._conversion.stepping = False  # until the first batch
        self.report, self._reported = self._conversion.report, False
        if self._saved_sites not in (None, self._sites(self._conversion)):
            self._forget()  # the state of a fit of another model is not a checkpoint
        if self._saved is not None:
            self._continue(self._conversion, self._saved)

    @staticmethod
    def _sites(conversion: Conversion) -> list[tuple[str, float]]:
        return [(site.name, site.rate) for site in conversion.layer_sites]

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
        """Restore the state of PyTorch's generators, from which stock dropout draws.

        This happens before the data loader draws the order of the data from them.
        """
        if trainer.world_size > 1:  # the state is from the first process
            self._generators = None
        if self._generators is not None:
            _set_generators(self._generators)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this batch's patterns."""
        if batch_idx == 0:  # a run resumed within an epoch continues that epoch
            self._before = (self._dropped, self._steps)
        fresh = self.options.resample == "batch" or batch_idx % trainer.accumulate_grad_batches == 0
        assert self._conversion is not None  # setup has run
        self._conversion.resample(fresh, batch)
        if self._generators is not None:
            if batch_idx:  # resumed within an epoch: the order of the data has been drawn since
                _set_generators(self._generators)
            self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the realised rate; after the first batch, print the report."""
        assert self._conversion is not None
        patterns = [p for site in self._conversion.report.sites for p in site.last_patterns]
        if patterns:
            self._dropped += sum(1 - p.share for p in patterns) / len(patterns)
            self._steps += 1
        self._conversion.finish()  # until the next batch, dropout (of a sampler, for example) is stock
        if not self._reported:
            self._reported = True
            self._conversion.end()
            rank_zero_info(f"ApproxDropout:\n{self.report}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean of the epoch. Lightning's own means would miss the steps before a resume within the epoch."""
        if steps := self._steps - self._before[1]:
            pl_module.log("dropout/realised_rate", (self._dropped - self._before[0]) / steps)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the stock layers; a second fit of a model with the same sites continues the sequence."""
        if stage == "fit" and self._conversion is not None:
            self._saved, self._saved_sites = self.state_dict(), self._sites(self._conversion)
            conversion, self._conversion = self._conversion, None
            conversion.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the stock layers: Lightning does not call teardown when it re-raises an exception."""
        try:
            self.teardown(trainer, pl_module, "fit")
        except Exception as error:  # a warning turned into an error must not replace the exception
            log.warning("ApproxDropout: %s", error)

    def state_dict(self) -> dict[str, Any]:
        """The state of the samplers, the decisions on what is skipped, the realised rate, and the options.

        If stock dropout runs anywhere, the state of PyTorch's generators is included.
        """
        if self._conversion is None:
            return self._saved or {}
        return {
            "options": asdict(self.options),
            "rule": SEQUENCE_RULE,
            "samplers": self._conversion.state_dict(),
            "policy": self.options.policy.state(),
            "settled": self._conversion.settling.state_dict(),
            "generators": _generators() if self._conversion.settling.has_stock else None,
            "dropped": self._dropped,
            "steps": self._steps,
            "before": self._before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the saved sequence of patterns."""
        self._saved, self._saved_sites = state_dict or None, None
        if self._conversion is not None and self._saved is not None:
            self._continue(self._conversion, self._saved)

    def _continue(self, conversion: Conversion, state: dict[str, Any]) -> None:
        fresh, undecided = conversion.state_dict(), conversion.settling.state_dict()
        try:
            check_same_sequence(state["options"], self.options, state.get("rule", 1))
            conversion.load_state_dict(state["samplers"])
            if self._saved_sites is None:  # from a checkpoint, which resumes a whole run
                self._generators = state.get("generators")
            if state.get("policy") == self.options.policy.state():  # otherwise the decisions are made again
                conversion.settling.load_state_dict(state["settled"])
            self._dropped, self._steps = float(state["dropped"]), int(state["steps"])
        except (
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:  # RuntimeError: the state of a generator
            conversion.load_state_dict(fresh)  # keep nothing of it, neither for this fit nor for a later one
            conversion.settling.load_state_dict(undecided)
            self._forget()
            what = f"{error} is missing: another version wrote it" if isinstance(error, KeyError) else error
            raise MisconfigurationException(
                f"ApproxDropout: the checkpoint's patterns do not fit this run: {what}; "
                "LightningModule.load_from_checkpoint takes its weights and begins a new sequence"
            ) from error
        self._before = tuple(state.get("before", (self._dropped, self._steps)))


def _generators() -> dict[str, Any]:
    """State of PyTorch's generators, for the CPU and, if it is in use, the current GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


# The options are described in one place; ``help()``, LightningCLI and the API reference read this docstring.
ApproxDropout.__doc__ = (ApproxDropout.__doc__ or "").replace(
    "{options}", textwrap.indent(described(CallbackOptions), "    ").strip()
)
