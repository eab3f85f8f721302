"""Stop training when the loss is NaN or infinite."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class FiniteLoss(Callback):
    """Raise if the training loss is NaN or infinite, before the backward pass, so that checkpoints stay usable.

    Reading the loss synchronizes with the GPU at each step, which ``ThroughputLogger`` does anyway.

    Raises:
        FloatingPointError: During training, if the loss is not finite.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss."""
        if not loss.isfinite().all():
            raise FloatingPointError(
                f"the training loss is {loss.item()} at step {trainer.global_step}: a smaller learning rate or "
                "clipped gradients (trainer.gradient_clip_val) may help; checkpoints are of steps before"
            )
