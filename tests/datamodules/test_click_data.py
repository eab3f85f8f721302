"""The synthetic clicks: shapes, frequencies, calibrated odds, reproducible rows."""

import pytest
import torch

from datamodules.clicks import ClickDataModule


def make(**arguments):
    small = {"field_sizes": [3, 40], "in_features": 2, "train_size": 1000, "val_size": 500, "batch_size": 300}
    data = ClickDataModule(**(small | arguments))
    data.setup()
    return data


def test_batches_cover_every_row_and_the_last_is_smaller():
    torch.manual_seed(0)
    data = make()
    batches = list(data.train_dataloader())
    assert [len(clicked) for *_, clicked in batches] == [300, 300, 300, 100]
    numbers, fields, clicked = (torch.cat(part) for part in zip(*batches, strict=True))
    assert numbers.shape == (1000, 2) and fields.shape == (1000, 2) and clicked.shape == (1000,)
    assert len(numbers.unique(dim=0)) == 1000
    assert [fields[:, f].max() < size for f, size in enumerate((3, 40))] == [True, True]
    assert set(clicked.tolist()) == {0, 1}
    assert sum(len(clicked) for *_, clicked in data.val_dataloader()) == 500


def test_values_are_zipfian():
    data = make(field_sizes=[4], train_size=20_000)
    shares = torch.bincount(data._train[1].flatten()) / 20_000
    torch.testing.assert_close(shares, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) * 12 / 25, atol=0.02, rtol=0)


def test_the_rule_tells_who_clicks():
    """The best loss is far below that of a constant prediction, and closer to it with a narrower spread."""
    data, narrow = make(val_size=5000), make(val_size=5000, spread=0.1)
    for one, gain in ((data, (0.1, 0.3)), (narrow, (-0.01, 0.01))):
        share = one._test[2].double().mean()
        alone = float(torch.special.entr(share) + torch.special.entr(1 - share))
        assert gain[0] <= alone - one.best_loss < gain[1]


def test_one_seed_one_rule():
    state = torch.get_rng_state()
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first._train, again._train, strict=True))
    assert not torch.equal(first._train[0], other._train[0])


def test_default_fields_and_no_numbers():
    assert len(ClickDataModule().field_sizes) == 20
    assert make(in_features=0)._train[0].shape == (1000, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field_sizes": []}, "field_sizes must name at least one field"),
        ({"field_sizes": [3, 0]}, r"field_sizes\[1\] must be .* got 0"),
        ({"in_features": -1}, "in_features must be .* got -1"),
        ({"spread": -1.0}, "spread must not be negative, got -1.0"),
        ({"batch_size": 0}, "batch_size must be .* got 0"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
