"""Base class of the word-level language models: scoring and logging."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from approxdrop_lightning.application.models.checks import check_counts, check_rate

IGNORED = -100  # target of padding, excluded from loss and score


class NllPerToken(Metric):
    """Negative log-likelihood per token, in nats, over *all* tokens; its exponential is the perplexity.

    Replaces torchmetrics' ``MeanMetric``, whose NaN check synchronizes with the device at every step; with the check
    disabled (``nan_strategy="disable"``), version 1.9 ignores the weights.
    """

    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add ``nll``, the sum over ``tokens`` tokens."""
        self.nll += nll
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.nll / self.tokens


class LanguageModel(LightningModule):
    """Base class of the language models: computes and logs the scores, and preserves them across mid-epoch resumes.

    Batches are time-major pairs ``(inputs[T, B], targets[T, B])`` of word indices; targets of -100 are ignored.
    Subclasses define :meth:`logits` and the optimizer, and save ``vocab_size`` as a hyperparameter.

    Args:
        vocab_size: vocabulary size V; must match the datamodule.
        rate: dropout rate in [0, 1).
        counts: further integers to validate, each at least 1, by name.

    Raises:
        ValueError: if an argument is out of range, and in ``setup`` if the datamodule's vocabulary size differs.
    """

    def __init__(self, vocab_size: int, rate: float, **counts: int) -> None:
        super().__init__()
        check_counts(vocab_size=vocab_size, **counts)
        check_rate(rate)
        self.train_nll = NllPerToken()
        self.val_nll = NllPerToken()
        self.test_nll = NllPerToken()

    def setup(self, stage: str) -> None:
        """Check that the datamodule's vocabulary size matches the model's."""
        expected = self.hparams["vocab_size"]
        found = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        if found is not None and found != expected:
            raise ValueError(f"the model has vocab_size={expected}, but the data has {found} words")

    def logits(self, inputs: Tensor, stage: str) -> Tensor:
        """Logits ``[T, B, V]`` of the words that follow ``inputs[T, B]``; ``stage`` is train, val or test."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss to minimize; ``train/loss`` is logged in nats per token."""
        nll, tokens = self.score(batch, "train")
        self.log("train/loss", nll.detach() / tokens)
        return self.objective(nll, tokens, batch[1].size(1))

    def objective(self, nll: Tensor, tokens: Tensor, streams: int) -> Tensor:
        """The loss to minimize: the mean over the tokens, unless a subclass overrides it.

        Args:
            nll: negative log-likelihood summed over the batch, in nats.
            tokens: number of targets, excluding padding.
            streams: number of parallel streams of text, B.
        """
        return nll / tokens

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate ``val/loss`` (nats per token) and ``val/ppl``."""
        self.score(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate ``test/loss`` (nats per token) and ``test/ppl``."""
        self.score(batch, "test")

    def score(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        """Run the batch and accumulate the stage's score; return the summed nll (nats) and the number of tokens."""
        inputs, targets = batch
        logits = self.logits(inputs, stage)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        tokens = (targets != IGNORED).sum().clamp(min=1)
        getattr(self, f"{stage}_nll").update(nll.detach(), tokens)
        return nll, tokens

    def start(self, stage: str) -> None:
        """Start reading the stage's text from its beginning."""
        getattr(self, f"{stage}_nll").reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restart the text at the first batch; on_train_epoch_start also runs when a run resumes mid-epoch."""
        if batch_idx == 0:
            self.start("train")

    def on_validation_epoch_start(self) -> None:
        """Start the validation text from its beginning."""
        self.start("val")

    def on_test_epoch_start(self) -> None:
        """Start the test text from its beginning."""
        self.start("test")

    def on_train_epoch_end(self) -> None:
        """Log ``train/ppl``, measured as usual with dropout on and while the parameters change."""
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
        """Save the score so far, for resuming mid-epoch."""
        if self.train_nll.tokens > 0:
            checkpoint["train_nll"] = (self.train_nll.nll.cpu(), self.train_nll.tokens.cpu())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the saved score, if the checkpoint has one."""
        if "train_nll" in checkpoint:
            self.train_nll.reset()
            # The score may not be on the device that the model will be moved to.
            there = self.train_nll.nll.device
            self.train_nll.update(*(part.to(there) for part in checkpoint["train_nll"]))

    @property
    def fused(self) -> bool:
        """Whether a fused optimizer can be used."""
        # Under mixed precision Lightning does not clip gradients for fused optimizers, which unscale them themselves.
        return "mixed" not in str(self.trainer.precision)
