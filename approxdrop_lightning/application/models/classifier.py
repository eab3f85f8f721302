"""What the classifiers have in common: cross-entropy, accuracy, and an optimizer of the user's choice."""

from collections.abc import Callable, Iterable
from functools import partial

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]


class Classifier(LightningModule):
    """Base of the classifiers. Batches are pairs ``(inputs[B, ...], labels[B])``; a subclass defines ``forward``.

    Args:
        optimizer: makes the optimizer from the parameters, e.g. ``functools.partial(torch.optim.Adam)``.
    """

    def __init__(self, optimizer: OptimizerFactory) -> None:
        super().__init__()
        self._make_optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats."""
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` (nats) and ``val/acc`` (share of 1)."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` (nats) and ``test/acc`` (share of 1)."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        # With batch_size given, Lightning's mean over the epoch is the mean over samples, exactly.
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        """Whatever ``optimizer`` makes of the parameters."""
        return self._make_optimizer(self.parameters())


def adam(lr: float) -> OptimizerFactory:
    """Adam in one fused call: it sees every weight, dropped or not, so its step had better be cheap."""
    return partial(Adam, lr=lr, fused=True)
