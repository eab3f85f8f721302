"""Nodes of a synthetic graph with communities, and averaged features of their neighbourhoods."""

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loader import row_loader
from datamodules.source import check_at_least

Part = tuple[Tensor, Tensor]


class GraphDataModule(LightningDataModule):
    """Batches ``(hops[B, num_hops + 1, in_features], labels[B])`` of nodes of a synthetic graph.

    Each node belongs to a community, which is its label. Its features are the community's mean plus noise, and too
    noisy to be informative on their own. Neighbours tend to belong to the same community, so the mean of their
    features is more informative: hop ``k`` contains the features averaged over neighbours ``k`` times, precomputed as
    in SIGN (Frasca et al. 2020). Training, validation and test nodes are a random split of one graph.

    Args:
        nodes: Number of nodes; three fifths are for training, one fifth each for validation and test.
        in_features: Number of features per node.
        num_classes: Number of communities.
        num_hops: Number of hops K, not counting the node itself.
        degree: Number of neighbours that each node draws, in addition to those that draw it.
        homophily: Share of drawn neighbours that certainly belong to the same community, in [0, 1]; the others are
            uniform.
        signal: Norm of the communities' means, relative to noise of standard deviation 1 in each feature.
        batch_size: Nodes per batch.
        seed: Seed of graph, features and split.

    Attributes:
        data_source: Description of the data; set by ``setup``.

    Raises:
        ValueError: An argument is out of range.
    """

    best_perplexity = None

    def __init__(
        self,
        nodes: int = 20_000,
        in_features: int = 128,
        num_classes: int = 16,
        num_hops: int = 3,
        degree: int = 8,
        homophily: float = 0.4,
        signal: float = 1.5,
        batch_size: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, num_hops=num_hops, degree=degree, batch_size=batch_size)
        check_at_least(2, num_classes=num_classes)
        check_at_least(5 * num_classes, nodes=nodes)
        if not 0 <= homophily <= 1:
            raise ValueError(f"homophily must be in [0, 1], got {homophily!r}")
        if not signal >= 0:
            raise ValueError(f"signal must not be negative, got {signal!r}")
        self.nodes, self.in_features, self.num_classes, self.num_hops = nodes, in_features, num_classes, num_hops
        self.degree, self.homophily, self.signal = degree, homophily, signal
        self.batch_size, self.seed = batch_size, seed
        self.data_source: str | None = None

    def setup(self, stage: str | None = None) -> None:
        """Create the graph and average the features, once."""
        if self.data_source is not None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(self.num_classes, (self.nodes,), generator=generator)
        means = torch.randn(self.num_classes, self.in_features, generator=generator)
        means *= self.signal / means.norm(dim=1, keepdim=True)
        features = means[labels] + torch.randn(self.nodes, self.in_features, generator=generator)
        hops = torch.stack(average(features, *self._edges(labels, generator), self.num_hops), dim=1)
        parts = torch.randperm(self.nodes, generator=generator).split(
            [self.nodes - 2 * (self.nodes // 5), self.nodes // 5, self.nodes // 5]
        )
        self._train, self._val, self._test = ((hops[part], labels[part]) for part in parts)
        self.data_source = f"synthetic (a graph of {self.num_classes} communities)"

    def _edges(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Start and end nodes of all edges, each edge in both directions."""
        starts = torch.arange(self.nodes).repeat_interleave(self.degree)
        ends = torch.randint(self.nodes, (len(starts),), generator=generator)
        # With nodes sorted by community, a member of a community is drawn from a range.
        by_label = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=self.num_classes)
        first = counts.cumsum(0) - counts
        places = torch.rand(len(starts), generator=generator) * counts[labels[starts]]
        own = by_label[first[labels[starts]] + places.long()]
        ends = torch.where(torch.rand(len(starts), generator=generator) < self.homophily, own, ends)
        return torch.cat([starts, ends]), torch.cat([ends, starts])

    def train_dataloader(self) -> DataLoader:
        """Training batches, reshuffled in each epoch; the order follows from ``seed_everything``."""
        return row_loader(self._train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in order."""
        return row_loader(self._val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Test batches, in order."""
        return row_loader(self._test, self.batch_size)


def average(features: Tensor, starts: Tensor, ends: Tensor, hops: int) -> list[Tensor]:
    """Average features over neighbours 0 to ``hops`` times.

    Args:
        features: ``[N, F]``.
        starts: Receiving node of each edge, int64 ``[E]``; every node must have at least one edge.
        ends: Node of each edge whose features are read, int64 ``[E]``.
        hops: Number of averaging steps.

    Returns:
        ``hops + 1`` tensors ``[N, F]``.
    """
    degree = torch.bincount(starts, minlength=len(features)).unsqueeze(1)
    found = [features]
    for _ in range(hops):
        found.append(torch.zeros_like(features).index_add_(0, starts, found[-1][ends]) / degree)
    return found
