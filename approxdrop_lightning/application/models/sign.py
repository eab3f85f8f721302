"""SIGN, a graph network whose neighbourhoods are averaged beforehand: an MLP with a tower for each hop."""

import torch
from torch import Tensor, nn

from approxdrop_lightning.application.models.checks import check_counts, check_rate
from approxdrop_lightning.application.models.classifier import Classifier, OptimizerFactory, adam

DEFAULT_OPTIMIZER = adam(lr=0.001)


class SIGNClassifier(Classifier):
    """A tower for the features of each hop; what they make is put side by side and classified.

    Frasca et al. 2020, *SIGN: Scalable Inception Graph Neural Networks* (arXiv 2004.11198), as it is commonly
    trained: every tower is linear, PReLU, dropout, linear, and so is the head, behind a PReLU and a dropout of the
    towers' concatenated outputs. All PReLUs have one weight. Training needs no graph, so batches are large.

    Batches are pairs ``(hops[B, num_hops + 1, in_features], labels[B])``; hop 0 is the node itself.

    Args:
        in_features: features of a node.
        num_hops: hops K; there are K + 1 towers.
        hidden_size: width of every hidden layer and of what each tower makes.
        num_classes: number of outputs.
        rate: dropout rate in [0, 1).
        optimizer: makes the optimizer from the parameters; default Adam with learning rate 0.001.

    Raises:
        ValueError: for a value outside what is allowed, and for a batch of another number of hops.
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
        # A function is no value that a checkpoint should hold: it could not be loaded with weights_only.
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
        """Logits ``[B, num_classes]`` of ``hops[B, num_hops + 1, in_features]``."""
        if hops.size(1) != len(self.towers):
            raise ValueError(f"the model has num_hops={len(self.towers) - 1}, the batch has {hops.size(1) - 1}")
        made = [tower(hop) for tower, hop in zip(self.towers, hops.unbind(1), strict=True)]
        return self.head(self.dropout(self.prelu(torch.cat(made, dim=-1))))
