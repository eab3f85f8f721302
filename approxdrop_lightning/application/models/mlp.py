"""A multi-layer perceptron for image classification, with conventional dropout."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from approxdrop_lightning.application.models.classifier import Classifier, OptimizerFactory

# The optimizer updates every weight, dropped or not, so dropout cannot make its step cheaper; the fused one is the
# cheapest that PyTorch offers.
DEFAULT_OPTIMIZER: OptimizerFactory = partial(SGD, lr=0.01, momentum=0.9, fused=True)


class MLPClassifier(Classifier):
    """Linear, ReLU and dropout for each hidden layer, followed by a linear output layer.

    The paper trains such a "four-layer MLP" on MNIST (Song et al. 2019, section 4: input, two hidden layers,
    output), with dropout on each hidden activation.

    Args:
        in_features: number of values per input, e.g. 784 for a 28 x 28 image.
        hidden: width of each hidden layer, first to last.
        num_classes: number of outputs.
        rate: dropout rate in [0, 1), one for all hidden layers or one per layer.
        optimizer: creates the optimizer from the parameters, e.g. ``functools.partial(torch.optim.Adam)``;
            default SGD with learning rate 0.01 and momentum 0.9.
        schedule: ``"constant"``, or ``"cosine"`` to decay the learning rate to zero along half a cosine wave.

    Raises:
        ValueError: if a rate lies outside [0, 1), the number of rates is not that of the hidden layers, or the
            schedule is unknown.

    Example:
        >>> model = MLPClassifier(hidden=(256, 128), rate=[0.2, 0.5])
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden: Sequence[int] = (1024, 1024),
        num_classes: int = 10,
        rate: float | Sequence[float] = 0.5,
        optimizer: OptimizerFactory | None = None,
        schedule: Literal["constant", "cosine"] = "constant",
    ) -> None:
        super().__init__(optimizer or DEFAULT_OPTIMIZER)
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")
        rates = _rate_per_layer(rate, len(hidden))
        # Checkpoints that contain a function could not be loaded with weights_only.
        self.save_hyperparameters(ignore=["optimizer"])
        layers: list[nn.Module] = [nn.Flatten()]
        for width, layer_rate in zip(hidden, rates, strict=True):
            layers += [nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(layer_rate)]
            in_features = width
        self.net = nn.Sequential(*layers, nn.Linear(in_features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, ...]`` with ``in_features`` values each."""
        return self.net(images)

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        """The optimizer that ``optimizer`` creates, and the learning-rate schedule."""
        optimizer = self._make_optimizer(self.parameters())
        if self.hparams["schedule"] == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _rate_per_layer(rate: float | Sequence[float], layers: int) -> list[float]:
    if isinstance(rate, str):  # a str is a sequence as well
        raise ValueError(f"rate={rate} is neither a number in [0, 1) nor a list of them")
    rates = list(rate) if isinstance(rate, Sequence) else [rate] * layers
    if len(rates) != layers:
        raise ValueError(f"{len(rates)} dropout rates {rates} for {layers} hidden layers: give 1 or {layers}")
    for value in rates:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"dropout rate {value} is outside [0, 1)")
    return rates
