"""A word-level LSTM language model after Zaremba et al. 2014, with conventional dropout."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from approxdrop_lightning.application.models.language_model import LanguageModel

State = tuple[Tensor, Tensor]


class LSTMLanguageModel(LanguageModel):
    """Embedding, LSTM layers, linear decoder; dropout on every non-recurrent connection.

    Architecture, initialisation, loss and schedule are those of Zaremba, Sutskever and Vinyals 2014,
    *Recurrent Neural Network Regularization* (arXiv 1409.2329), section 4.1. Batches are time-major pairs
    ``(inputs[T, B], targets[T, B])``; targets of -100 are ignored. Training uses truncated back-propagation
    through time: the detached hidden state carries over from batch to batch and is reset to zero at the start
    of each epoch. Training, validation and test have separate states.

    Gradient clipping is left to the Trainer (``gradient_clip_val``; 5 or 10 in the paper).

    Args:
        vocab_size: vocabulary size V; must match the datamodule.
        hidden_size: width H of the embedding and of every LSTM layer.
        num_layers: number of LSTM layers.
        rate: dropout rate in [0, 1) of the non-recurrent connections: the input of each LSTM layer and the
            input of the decoder.
        init_range: all parameters are initialised uniformly in +/- this value.
        tie_weights: whether embedding and decoder share one matrix (Press and Wolf 2017; not in Zaremba).
        lr: learning rate of SGD.
        full_lr_epochs: number of epochs at ``lr``.
        lr_decay: factor by which the learning rate is divided in every later epoch.
        loss: the loss to minimize: ``"sum_steps"``, the mean over the batch and the *sum* over the T steps
            (Zaremba; lr 1 and clip 5 refer to it), or ``"mean"``, the mean over all tokens. ``train/loss`` is
            logged in nats per token either way.

    Raises:
        ValueError: if an argument is out of range, and in ``setup`` if the datamodule's vocabulary size differs.
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
        super().__init__(vocab_size, rate, hidden_size=hidden_size, num_layers=num_layers)
        if loss not in ("sum_steps", "mean"):
            raise ValueError(f"loss must be 'sum_steps' or 'mean', got {loss!r}")
        if lr_decay <= 0:
            raise ValueError(f"lr_decay must be positive, got {lr_decay}")
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.embedding_dropout = nn.Dropout(rate)
        # A single layer has no connections between layers, and nn.LSTM warns of a rate without effect.
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers, dropout=rate if num_layers > 1 else 0.0)
        self.decoder_dropout = nn.Dropout(rate)
        self.decoder = nn.Linear(hidden_size, vocab_size)
        if tie_weights:
            self.decoder.weight = self.embedding.weight
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)

        self._carried: dict[str, State] = {}

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

    def objective(self, nll: Tensor, tokens: Tensor, streams: int) -> Tensor:
        """The loss to minimize; see ``loss`` above."""
        return nll / streams if self.hparams["loss"] == "sum_steps" else nll / tokens

    def logits(self, inputs: Tensor, stage: str) -> Tensor:
        """Logits ``[T, B, V]`` from the carried state of the stage."""
        logits, state = self(inputs, self._state(stage, batch_size=inputs.size(1)))
        self._carried[stage] = (state[0].detach(), state[1].detach())
        return logits

    def _state(self, stage: str, batch_size: int) -> State | None:
        """The stage's current state; None, for a fresh start, if the batch size has changed."""
        state = self._carried.get(stage)
        if state is None or state[0].size(1) != batch_size:
            return None
        return state[0].to(self.device), state[1].to(self.device)

    def start(self, stage: str) -> None:
        """Reset the stage's state to zero."""
        self._carried.pop(stage, None)
        super().start(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the hidden state of training as well, for resuming mid-epoch."""
        super().on_save_checkpoint(checkpoint)
        if "train" in self._carried:
            checkpoint["carried_state"] = tuple(part.cpu() for part in self._carried["train"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the saved hidden state, if the checkpoint has one."""
        super().on_load_checkpoint(checkpoint)
        if "carried_state" in checkpoint:
            self._carried["train"] = tuple(checkpoint["carried_state"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with the published schedule; see ``full_lr_epochs`` and ``lr_decay`` above."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], fused=self.fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _lr_factor(self, epoch: int) -> float:
        """Factor on ``lr`` in ``epoch``, counted from 0."""
        return math.pow(self.hparams["lr_decay"], -max(0, epoch + 1 - self.hparams["full_lr_epochs"]))
