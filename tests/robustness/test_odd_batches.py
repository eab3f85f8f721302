"""Empty batches, single rows, changing sizes and sequences of one step give the result of the definition."""

import pytest
import torch
from support.skipping import assert_skips
from torch import nn

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.application.models import LSTMLanguageModel

OPTIONS = [{}, {"interleave": False}, {"interleave": False, "shuffle": False, "keep": "one", "concentration": 0.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_an_mlp_on_batches_of_changing_sizes(options, rate):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 80), nn.ReLU(), nn.Dropout(rate), nn.Linear(80, 64), nn.Dropout(rate), nn.Linear(64, 3)
    )
    report = approximate(model, seed=0, min_gain=0, **options)
    for rows in [16, 1, 0, 2, 7, 1, 16, 3, 0, 129]:
        resample(model)
        x = torch.randn(rows, 20)
        found = model(x)
        gradients = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        hidden = torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias))
        masks = [layer.last_patterns[0].mask(rows) / (1 - rate) for layer in (model[2], model[4]) if rows]
        if rows:
            hidden = hidden * masks[0]
        hidden = nn.functional.linear(hidden, model[3].weight, model[3].bias)
        if rows:
            hidden = hidden * masks[1]
        expected = nn.functional.linear(hidden, model[5].weight, model[5].bias)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            gradients, torch.autograd.grad(expected.square().sum(), list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert_skips(report, "2", "4")


@pytest.mark.parametrize("options", [*OPTIONS, {"recurrent": True}])
def test_an_lstm_on_batches_of_changing_sizes(options):
    """The compact backend against the reference, with the same patterns."""
    models, reports = [], []
    for backend in ("compact", "reference"):
        torch.manual_seed(0)
        models.append(LSTMLanguageModel(vocab_size=30, hidden_size=64, rate=0.5))
        reports.append(approximate(models[-1], seed=0, backend=backend, min_gain=0, **options))
    for steps, rows in [(5, 4), (1, 4), (1, 1), (7, 1), (3, 9)]:
        words = torch.randint(30, (steps, rows))
        results = []
        for model in models:
            resample(model)
            logits, (h, c) = model(words)
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(logits.square().sum() + h.sum() + c.sum(), parameters, allow_unused=True)
            results.append([logits, h, c, *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for report in reports:
        assert_skips(report, everywhere=True)


@pytest.mark.parametrize("options", [{}, {"pattern": "tile"}, {"pattern": "dropconnect"}])
def test_an_lstm_on_an_empty_batch(options):
    """Like the stock LSTM, which returns an empty result or raises an error for empty batches."""
    stock, model = (LSTMLanguageModel(vocab_size=30, hidden_size=64, rate=0.5) for _ in range(2))
    approximate(model, seed=0, min_gain=0, **options)
    resample(model)
    words = torch.zeros(3, 0, dtype=torch.int64)
    outcomes = []
    for each in (stock, model):
        try:
            outcomes.append(tuple(each(words)[0].shape))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] or outcomes[1] == (3, 0, 30)
