"""What the word-level language models have in common: how a text is scored and logged."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from approxdrop_lightning.application.models.checks import check_counts, check_rate

IGNORED = -100  # target of padding: neither trained on nor scored


class NllPerToken(Metric):
    """Negative log-likelihood per token, in nats, over *all* tokens; its exponential is the perplexity.

    Not torchmetrics' ``MeanMetric``: its check for NaN waits for the device at every step, and without the
    check (``nan_strategy="disable"``) version 1.9 ignores the weights.
    """

    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add the sum ``nll`` over ``tokens`` tokens."""
        self.nll += nll
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.nll / self.tokens


class LanguageModel(LightningModule):
    """Base of the language models: scores, their logs, and a score that survives a resume within an epoch.

    Batches are time-major pairs ``(inputs[T, B], targets[T, B])`` of word indices; targets of -100 are ignored.
    A subclass defines :meth:`logits` and the optimizer, and has ``vocab_size`` among its hyperparameters.

    Args:
        vocab_size: number of words V; the datamodule must have as many.
        rate: dropout rate in [0, 1).
        counts: further whole numbers of at least 1, by name.

    Raises:
        ValueError: for a value outside what is allowed, and at set-up for a datamodule of another vocabulary.
    """

    def __init__(self, vocab_size: int, rate: float, **counts: int) -> None:
        super().__init__()
        check_counts(vocab_size=vocab_size, **counts)
        check_rate(rate)
        self.train_nll = NllPerToken()
        self.val_nll = NllPerToken()
        self.test_nll = NllPerToken()

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose vocabulary is not the model's."""
        expected = self.hparams["vocab_size"]
        found = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        if found is not None and found != expected:
            raise ValueError(f"the model has vocab_size={expected}, but the data has {found} words")

    def logits(self, inputs: Tensor, stage: str) -> Tensor:
        """Logits ``[T, B, V]`` of the words after ``inputs[T, B]``; ``stage`` is train, val or test."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss to differentiate; what is logged as ``train/loss`` is nats per token."""
        nll, tokens = self.score(batch, "train")
        self.log("train/loss", nll.detach() / tokens)
        return self.objective(nll, tokens, batch[1].size(1))

    def objective(self, nll: Tensor, tokens: Tensor, streams: int) -> Tensor:
        """What is differentiated: the mean over the tokens, unless a model says otherwise.

        Args:
            nll: the sum over the batch, in nats.
            tokens: number of its targets, padding left out.
            streams: number of texts read side by side, B.
        """
        return nll / tokens

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count towards ``val/loss`` (nats per token) and ``val/ppl``."""
        self.score(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count towards ``test/loss`` (nats per token) and ``test/ppl``."""
        self.score(batch, "test")

    def score(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        """Run the batch and count it towards the stage's score; return the summed nll (nats) and its tokens."""
        inputs, targets = batch
        logits = self.logits(inputs, stage)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        tokens = (targets != IGNORED).sum().clamp(min=1)
        getattr(self, f"{stage}_nll").update(nll.detach(), tokens)
        return nll, tokens

    def start(self, stage: str) -> None:
        """Begin the stage's text anew."""
        getattr(self, f"{stage}_nll").reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the text anew; on_train_epoch_start will not do, a resume within an epoch calls it too."""
        if batch_idx == 0:
            self.start("train")

    def on_validation_epoch_start(self) -> None:
        """Start the validation text from its beginning."""
        self.start("val")

    def on_test_epoch_start(self) -> None:
        """Start the test text from its beginning."""
        self.start("test")

    def on_train_epoch_end(self) -> None:
        """Log ``train/ppl``, with dropout on and the parameters moving, as is customary."""
        self.log("train/ppl", self.train_nll.compute().exp())

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/ppl`` over all tokens."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/ppl`` over all tokens."""
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        nll = getattr(self, f"{stage}_nll").compute()
        self.log(f"{stage}/loss", nll)
        self.log(f"{stage}/ppl", nll.exp(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the score so far, for a resume within an epoch."""
        if self.train_nll.tokens > 0:
            checkpoint["train_nll"] = (self.train_nll.nll.cpu(), self.train_nll.tokens.cpu())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the score that was saved, if any; a checkpoint without one loads as well."""
        if "train_nll" in checkpoint:
            self.train_nll.reset()
            # The score may not be where the model is about to be.
            there = self.train_nll.nll.device
            self.train_nll.update(*(part.to(there) for part in checkpoint["train_nll"]))

    @property
    def fused(self) -> bool:
        """Whether the optimizer may be the fused one."""
        # Under mixed precision Lightning refuses to clip for a fused optimizer, which unscales by itself.
        return "mixed" not in str(self.trainer.precision)
