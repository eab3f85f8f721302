"""A word-level LSTM language model after Zaremba et al. 2014, with conventional dropout."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric

State = tuple[Tensor, Tensor]

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


class LSTMLanguageModel(LightningModule):
    """Embedding, LSTM layers, linear decoder; dropout on every non-recurrent connection.

    Architecture, initialisation, loss and schedule are those of Zaremba, Sutskever and Vinyals 2014,
    *Recurrent Neural Network Regularization* (arXiv 1409.2329), section 4.1. Batches are time-major pairs
    ``(inputs[T, B], targets[T, B])``; targets of -100 are ignored. The text is read by truncated
    back-propagation through time: the hidden state goes on from batch to batch, detached, and starts from
    zero with each epoch; training, validation and test each carry their own.

    Gradient clipping belongs to the Trainer (``gradient_clip_val``; 5 or 10 in the paper).

    Args:
        vocab_size: number of words V; the datamodule must have as many.
        hidden_size: width H of the embedding and of every LSTM layer.
        num_layers: number of LSTM layers.
        rate: dropout rate in [0, 1) of the non-recurrent connections: the input of each LSTM layer and the
            input of the decoder.
        init_range: all parameters start uniform in +/- this.
        tie_weights: let embedding and decoder share one matrix (Press and Wolf 2017; not in Zaremba).
        lr: learning rate of SGD.
        full_lr_epochs: number of epochs at ``lr``.
        lr_decay: after them the learning rate is divided by this, once per epoch.
        loss: what is differentiated: ``"sum_steps"``, the mean over the batch and the *sum* over the T steps
            (Zaremba; what lr 1 and clip 5 refer to), or ``"mean"``, the mean over all tokens. What is logged
            as ``train/loss`` is nats per token in either case.

    Raises:
        ValueError: for a value outside what is allowed, and at set-up for a datamodule of another vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 200,
        num_layers: int = 2,
        rate: float = 0.5,
        init_range: float = 0.1,
        tie_weights: bool = False,
        lr: float = 1.0,
        full_lr_epochs: int = 4,
        lr_decay: float = 2.0,
        loss: Literal["sum_steps", "mean"] = "sum_steps",
    ) -> None:
        super().__init__()
        counts = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"dropout rate {rate} is outside [0, 1); the LSTM has one rate for all sites")
        if loss not in ("sum_steps", "mean"):
            raise ValueError(f"loss must be 'sum_steps' or 'mean', got {loss!r}")
        if lr_decay <= 0:
            raise ValueError(f"lr_decay must be positive, got {lr_decay}")
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.embedding_dropout = nn.Dropout(rate)
        # One layer has no connection between layers, and nn.LSTM warns of a rate that does nothing.
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers, dropout=rate if num_layers > 1 else 0.0)
        self.decoder_dropout = nn.Dropout(rate)
        self.decoder = nn.Linear(hidden_size, vocab_size)
        if tie_weights:
            self.decoder.weight = self.embedding.weight
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)

        self._carried: dict[str, State] = {}
        self.train_nll = NllPerToken()
        self.val_nll = NllPerToken()
        self.test_nll = NllPerToken()

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose vocabulary is not the model's."""
        expected = self.hparams["vocab_size"]
        found = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        if found is not None and found != expected:
            raise ValueError(f"the model has vocab_size={expected}, but the data has {found} words")

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict each next word.

        Args:
            inputs: word indices ``[T, B]``.
            state: hidden and cell state before the first step, each ``[num_layers, B, H]``; None is zero.

        Returns:
            Logits ``[T, B, V]`` and the state after the last step.
        """
        embedded = self.embedding_dropout(self.embedding(inputs))
        hidden, state = self.lstm(embedded, state)
        return self.decoder(self.decoder_dropout(hidden)), state

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss to differentiate; see ``loss`` above."""
        nll, tokens = self._score(batch, "train")
        self.log("train/loss", nll.detach() / tokens)
        return nll / batch[1].size(1) if self.hparams["loss"] == "sum_steps" else nll / tokens

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count towards ``val/loss`` (nats per token) and ``val/ppl``."""
        self._score(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count towards ``test/loss`` (nats per token) and ``test/ppl``."""
        self._score(batch, "test")

    def _score(self, batch: tuple[Tensor, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        """Run the batch from the carried state; return the summed nll (nats) and the number of tokens."""
        inputs, targets = batch
        logits, state = self(inputs, self._state(stage, batch_size=inputs.size(1)))
        self._carried[stage] = (state[0].detach(), state[1].detach())
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        tokens = (targets != IGNORED).sum().clamp(min=1)
        getattr(self, f"{stage}_nll").update(nll.detach(), tokens)
        return nll, tokens

    def _state(self, stage: str, batch_size: int) -> State | None:
        """The state that the stage has reached; None, to start anew, if the batch size has changed."""
        state = self._carried.get(stage)
        if state is None or state[0].size(1) != batch_size:
            return None
        return state[0].to(self.device), state[1].to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the text anew; on_train_epoch_start will not do, a resume within an epoch calls it too."""
        if batch_idx == 0:
            self._carried.pop("train", None)
            self.train_nll.reset()

    def on_validation_epoch_start(self) -> None:
        """Start the validation text from its beginning."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Start the test text from its beginning."""
        self._start("test")

    def on_train_epoch_end(self) -> None:
        """Log ``train/ppl``, with dropout on and the parameters moving, as is customary."""
        self.log("train/ppl", self.train_nll.compute().exp())

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/ppl`` over all tokens."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/ppl`` over all tokens."""
        self._log_perplexity("test")

    def _start(self, stage: str) -> None:
        self._carried.pop(stage, None)
        getattr(self, f"{stage}_nll").reset()

    def _log_perplexity(self, stage: str) -> None:
        nll = getattr(self, f"{stage}_nll").compute()
        self.log(f"{stage}/loss", nll)
        self.log(f"{stage}/ppl", nll.exp(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the training state of the text and the score so far, for a resume within an epoch."""
        if "train" in self._carried:
            checkpoint["carried_state"] = tuple(part.cpu() for part in self._carried["train"])
            checkpoint["train_nll"] = (self.train_nll.nll.cpu(), self.train_nll.tokens.cpu())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the state that was saved, if any; a checkpoint without one loads as well."""
        if "carried_state" in checkpoint:
            self._carried["train"] = tuple(checkpoint["carried_state"])
        if "train_nll" in checkpoint:
            self.train_nll.reset()
            # The score may not be where the model is about to be.
            there = self.train_nll.nll.device
            self.train_nll.update(*(part.to(there) for part in checkpoint["train_nll"]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with the published schedule; see ``full_lr_epochs`` and ``lr_decay`` above."""
        # Under mixed precision Lightning refuses to clip for a fused optimizer, which unscales by itself.
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _lr_factor(self, epoch: int) -> float:
        """Factor on ``lr`` in ``epoch``, counted from 0."""
        return math.pow(self.hparams["lr_decay"], -max(0, epoch + 1 - self.hparams["full_lr_epochs"]))
