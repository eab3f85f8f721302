"""The synthetic graph: hops computed by hand, informative hops, disjoint splits, reproducible data."""

import pytest
import torch

from datamodules.graph import GraphDataModule, average


def make(**arguments):
    data = GraphDataModule(**({"nodes": 1500, "in_features": 24, "num_classes": 5, "batch_size": 250} | arguments))
    data.setup()
    return data


def test_average_by_hand():
    features = torch.tensor([[1.0], [2.0], [6.0]])
    starts, ends = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 0, 0])
    zero, one, two = average(features, starts, ends, 2)
    assert zero is features
    assert one.flatten().tolist() == [4, 1, 1]
    assert two.flatten().tolist() == [1, 4, 4]


def test_batches_cover_every_training_node_once_and_the_last_is_smaller():
    torch.manual_seed(0)
    data = make()
    batches = list(data.train_dataloader())
    assert [tuple(hops.shape) for hops, _ in batches] == [(250, 4, 24)] * 3 + [(150, 4, 24)]
    found = torch.cat([hops[:, 0] for hops, _ in batches])
    assert len(found.unique(dim=0)) == 900
    scored = torch.cat(
        [hops[:, 0] for loader in (data.val_dataloader(), data.test_dataloader()) for hops, _ in loader]
    )
    assert len(torch.cat([found, scored]).unique(dim=0)) == 1500


def test_neighbourhoods_tell_more_than_nodes():
    """Accuracy of the nearest class mean, for hop 0 and hop 2."""
    data = make(signal=1.5)
    hops, labels = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    shares = []
    for k in range(3):
        means = torch.stack([hops[labels == c, k].mean(0) for c in range(5)])
        nearest = torch.cdist(hops[:, k], means).argmin(1)
        shares.append((nearest == labels).float().mean().item())
    assert 0.3 < shares[0] < 0.7 < shares[1]
    assert shares[2] > shares[0] + 0.1


def test_one_seed_one_graph():
    state = torch.get_rng_state()
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first._train[0], again._train[0])
    assert not torch.equal(first._train[0], other._train[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 10}, "nodes must be .* at least 25, got 10"),
        ({"homophily": 1.5}, r"homophily must be in \[0, 1\], got 1.5"),
        ({"signal": -1.0}, "signal must not be negative, got -1.0"),
        ({"num_hops": 0}, "num_hops must be .* got 0"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
