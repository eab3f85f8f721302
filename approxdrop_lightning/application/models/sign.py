"""SIGN, a graph network on precomputed neighbourhood averages: an MLP with one tower per hop."""

import torch
from torch import Tensor, nn

from approxdrop_lightning.application.models.checks import check_counts, check_rate
from approxdrop_lightning.application.models.classifier import Classifier, OptimizerFactory, adam

DEFAULT_OPTIMIZER = adam(lr=0.001)


class SIGNClassifier(Classifier):
    """One tower per hop; their outputs are concatenated and classified by a head.

    Frasca et al. 2020, *SIGN: Scalable Inception Graph Neural Networks* (arXiv 2004.11198), in the commonly trained
    form: each tower is linear, PReLU, dropout, linear. The concatenated outputs pass through PReLU and dropout into
    a head of the same form. Every PReLU has a single weight. Training does not need the graph, so batches can be
    large.

    Batches are pairs ``(hops[B, num_hops + 1, in_features], labels[B])``; hop 0 is the node itself.

    Args:
        in_features: number of features per node.
        num_hops: number of hops K; there are K + 1 towers.
        hidden_size: width of every hidden layer and of each tower's output.
        num_classes: number of outputs.
        rate: dropout rate in [0, 1).
        optimizer: creates the optimizer from the parameters; default Adam with learning rate 0.001.

    Raises:
        ValueError: if an argument is out of range, or a batch has a different number of hops.
    """

    def __init__(
        self,
        in_features: int,
        num_hops: int,
        num_classes: int,
        hidden_size: int = 512,
        rate: float = 0.5,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__(optimizer or DEFAULT_OPTIMIZER)
        check_counts(in_features=in_features, num_hops=num_hops, num_classes=num_classes, hidden_size=hidden_size)
        check_rate(rate)
        # Checkpoints that contain a function could not be loaded with weights_only.
        self.save_hyperparameters(ignore=["optimizer"])
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(in_features, hidden_size),
                nn.PReLU(),
                nn.Dropout(rate),
                nn.Linear(hidden_size, hidden_size),
            )
            for _ in range(num_hops + 1)
        )
        self.prelu = nn.PReLU()
        self.dropout = nn.Dropout(rate)
        self.head = nn.Sequential(
            nn.Linear((num_hops + 1) * hidden_size, hidden_size),
            nn.PReLU(),
            nn.Dropout(rate),
            nn.Linear(hidden_size, num_classes),
        )

    def forward(self, hops: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` for ``hops[B, num_hops + 1, in_features]``."""
        if hops.size(1) != len(self.towers):
            raise ValueError(f"the model has num_hops={len(self.towers) - 1}, the batch has {hops.size(1) - 1}")
        made = [tower(hop) for tower, hop in zip(self.towers, hops.unbind(1), strict=True)]
        return self.head(self.dropout(self.prelu(torch.cat(made, dim=-1))))
