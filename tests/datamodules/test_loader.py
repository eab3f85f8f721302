"""Resumable loading, through Lightning's own protocol and by hand."""

from itertools import chain, islice

import torch
from torch.utils.data import BatchSampler, TensorDataset

from datamodules.loader import EpochSampler, ResumableLoader


def make(seed=0):
    data = TensorDataset(torch.arange(23))
    return ResumableLoader(data, batch_sampler=BatchSampler(EpochSampler(23, seed), 4, drop_last=False))


def test_an_epoch_stopped_anywhere_goes_on_with_the_next_batch():
    whole = [batch[0].tolist() for batch in make()]
    assert sorted(chain.from_iterable(whole)) == list(range(23))
    for stop in range(len(whole) + 1):
        first = make()
        head = [batch[0].tolist() for batch in islice(first, stop)]
        second = make()
        second.load_state_dict(first.state_dict())
        tail = [batch[0].tolist() for batch in second]
        assert head + tail == (whole if stop < len(whole) else whole + whole)
        assert [batch[0].tolist() for batch in second] == whole  # the epoch after that is whole


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = EpochSampler(50, seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
            assert tuple(sampler) == orders[seed, epoch]
    assert len(set(orders.values())) == 4
