"""Base class of the classifiers: cross-entropy, accuracy, and a configurable optimizer."""

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
    """Base class of the classifiers. Batches are pairs ``(inputs[B, ...], labels[B])``; subclasses add ``forward``.

    Args:
        optimizer: creates the optimizer from the parameters, e.g. ``functools.partial(torch.optim.Adam)``.
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
        """Log ``val/loss`` (nats) and ``val/acc`` (fraction)."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` (nats) and ``test/acc`` (fraction)."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        # Given the batch size, Lightning's epoch mean is exactly the mean over samples.
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        """The optimizer that ``optimizer`` creates."""
        return self._make_optimizer(self.parameters())


def adam(lr: float) -> OptimizerFactory:
    """Fused Adam: the optimizer updates every weight, dropped or not, so its step should be cheap."""
    return partial(Adam, lr=lr, fused=True)
