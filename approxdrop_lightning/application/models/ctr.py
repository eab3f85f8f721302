"""Click prediction: an MLP on embeddings of categorical fields and numeric features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import BinaryAUROC

from approxdrop_lightning.application.models.checks import check_counts, check_rate
from approxdrop_lightning.application.models.classifier import OptimizerFactory, adam

Batch = tuple[Tensor, Tensor, Tensor]

DEFAULT_OPTIMIZER = adam(lr=0.001)


class ClickModel(LightningModule):
    """The deep component of DeepFM and related models (Guo et al. 2017, arXiv 1703.04247): predicts clicks.

    Each categorical field has an embedding. Concatenated with the numeric features, they pass through hidden layers
    of linear, optional batch norm, ReLU and dropout. Batches are triples ``(numbers[B, in_features], fields[B, F],
    clicked[B])``.

    Args:
        field_sizes: number of values of each of the F categorical fields.
        in_features: number of numeric features; may be 0.
        embedding_size: width of each field's embedding.
        hidden: width of each hidden layer, first to last.
        batch_norm: whether to put a batch norm before each ReLU. It reads every unit of the preceding layer, so
            nothing can be skipped there.
        rate: dropout rate in [0, 1).
        optimizer: creates the optimizer from the parameters; default Adam with learning rate 0.001.

    Raises:
        ValueError: if an argument is out of range.
    """

    first_of_field: Tensor

    def __init__(
        self,
        field_sizes: Sequence[int],
        in_features: int = 0,
        embedding_size: int = 16,
        hidden: Sequence[int] = (1024, 512, 512),
        batch_norm: bool = False,
        rate: float = 0.3,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__()
        field_sizes, hidden = [*field_sizes], [*hidden]
        for name, values in {"field_sizes": field_sizes, "hidden": hidden}.items():
            if not values:
                raise ValueError(f"{name} must name at least one size, got {values}")
            check_counts(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        check_counts(embedding_size=embedding_size)
        if isinstance(in_features, bool) or not isinstance(in_features, int) or in_features < 0:
            raise ValueError(f"in_features must be a whole number of at least 0, got {in_features!r}")
        check_rate(rate)
        # Checkpoints that contain a function could not be loaded with weights_only.
        self.save_hyperparameters(ignore=["optimizer"])
        self._make_optimizer = optimizer or DEFAULT_OPTIMIZER
        self.embedding = nn.Embedding(sum(field_sizes), embedding_size)
        nn.init.normal_(self.embedding.weight, std=0.05)
        starts = torch.tensor([0, *field_sizes[:-1]]).cumsum(0)
        self.register_buffer("first_of_field", starts, persistent=False)
        width = in_features + len(field_sizes) * embedding_size
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers += [nn.ReLU(), nn.Dropout(rate)]
            width = size
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.val_auc = BinaryAUROC()
        self.test_auc = BinaryAUROC()

    def forward(self, numbers: Tensor, fields: Tensor) -> Tensor:
        """Logits ``[B]`` of a click, given ``numbers[B, in_features]`` and ``fields[B, F]``."""
        embedded = self.embedding(fields + self.first_of_field).flatten(1)
        return self.net(torch.cat([numbers, embedded], dim=1)).squeeze(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats."""
        numbers, fields, clicked = batch
        loss = F.binary_cross_entropy_with_logits(self(numbers, fields), clicked.float())
        self.log("train/loss", loss, batch_size=len(clicked))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` (nats) and ``val/auc`` (area under the ROC curve)."""
        self._evaluate(batch, "val", self.val_auc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` (nats) and ``test/auc`` (area under the ROC curve)."""
        self._evaluate(batch, "test", self.test_auc)

    def _evaluate(self, batch: Batch, stage: str, auc: BinaryAUROC) -> None:
        numbers, fields, clicked = batch
        log_odds = self(numbers, fields)
        loss = F.binary_cross_entropy_with_logits(log_odds, clicked.float())
        auc.update(log_odds.sigmoid(), clicked)
        self.log(f"{stage}/loss", loss, batch_size=len(clicked))
        self.log(f"{stage}/auc", auc, on_step=False, on_epoch=True, batch_size=len(clicked), prog_bar=True)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer that ``optimizer`` creates."""
        return self._make_optimizer(self.parameters())
