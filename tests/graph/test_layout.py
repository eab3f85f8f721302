"""Layouts and tables: every unit is dropped with the rate, and masks are what packed maths computes."""

import numpy as np
import pytest
import torch
from torch import nn

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of, replay_key
from approxdrop_lightning.graph import packed
from approxdrop_lightning.graph.layout import Rows, layout_of, mask_of, rows_of, share_of_spare


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("pair", [(2, 1), (3, 1), (10, 3), (10, 7), (10, 9), (7, 2), (5, 5)])
@pytest.mark.parametrize("n", [1, 5, 33, 64, 129, 2048])
def test_the_share_is_exact(n, pair, shuffle):
    """Each place holds each block alike often, so a unit is kept as often as places are kept, the spare one too."""
    layout = layout_of(n, *pair, shuffle=shuffle)
    assert layout.blocks * layout.block == n
    dp, keep = pair
    spare = share_of_spare(layout, dp, keep) if layout.spare else 1.0
    assert (layout.kept - 1 + spare) / layout.blocks == pytest.approx(keep / dp)
    assert (layout.groups - 1) * layout.shift + layout.kept <= layout.blocks
    assert layout.groups == (1 if dp == keep else 2 if 2 * keep > dp else dp // keep)


@pytest.mark.parametrize(
    ("rate", "n", "shuffle"),
    [(0.3, 40, True), (0.3, 37, True), (0.7, 33, True), (0.5, 33, False), (0.7, 40, False)],
)
def test_units_are_dropped_with_the_rate(rate, n, shuffle):
    """4,000 steps: the mean of each unit, of each group, is within five standard deviations of the rate."""
    model = nn.Sequential(nn.Linear(4, n), nn.Dropout(rate), nn.Linear(n, 2))
    report = approximate(model, seed=1, shuffle=shuffle)
    book, (site,) = conversion_of(model).book, report.sites
    kept, neighbours, steps = {}, [], 4000
    for _ in range(steps):
        resample(model)
        entry = book.use(site, 0, n, (12,), book.pair(site), torch.device("cpu"))
        mask = mask_of(
            entry.use._replace(scale=1.0), book.table(torch.device("cpu")), entry.rows, (12,), torch.float64
        )
        for group in range(entry.layout.groups):
            kept.setdefault(group, []).append(mask[group].numpy())
        neighbours.append((mask[0, 0] * mask[0, 1]).item())
    for masks in kept.values():
        mean = np.mean(masks, 0)
        assert np.abs(mean - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / len(masks))
    if shuffle:  # units of other blocks are as good as independent; in the natural order they are not
        assert np.mean(neighbours) == pytest.approx((1 - rate) ** 2, abs=0.05)
    restore(model)


@pytest.mark.parametrize("pair", [(2, 1), (3, 1), (10, 3), (10, 7), (10, 9), (7, 2)])
@pytest.mark.parametrize("n", [5, 33, 64, 129, 2048])
def test_places_of_a_segment_are_alike(n, pair):
    """Whatever is kept at one of them, in a batch with the spare place or without, is kept at the others."""
    layout = layout_of(n, *pair)
    for active in {layout.kept, layout.kept - layout.spare}:
        windows = [range(g * layout.shift, g * layout.shift + active) for g in range(layout.groups)]
        kept_by = [[place in window for window in windows] for place in range(layout.blocks)]
        for segment in layout.segments:
            assert len({tuple(by) for by in kept_by[segment]}) == 1
    covered = sum(segment.stop - segment.start for segment in layout.segments)
    assert covered > layout.blocks - 4 * layout.groups - 2  # all but single places


def test_a_step_has_the_same_tables_whenever_a_use_is_met():
    """So a resumed run, which meets uses in another order, has the patterns of the run that was not interrupted."""
    tables = []
    for order in ((0, 1), (1, 0)):
        model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.3), nn.Linear(64, 48), nn.Dropout(0.3), nn.Linear(48, 2))
        report = approximate(model, seed=5)
        book = conversion_of(model).book
        met = {}
        for step in range(6):
            resample(model)
            for i in order if step else order[:1]:
                site, n = report.sites[i], (64, 48)[i]
                entry = book.use(site, 0, n, (8,), book.pair(site), torch.device("cpu"))
                met[i] = entry.use.place(book.table(torch.device("cpu"))).tolist()
        tables.append(met)
        restore(model)
    assert tables[0] == tables[1]


@pytest.mark.parametrize("leading", [(), (7,), (12,), (4, 6), (6, 4), (3, 5, 4)])
@pytest.mark.parametrize("pair", [(2, 1), (3, 1), (10, 7)])
@pytest.mark.parametrize("orders", [1, 3])
def test_packed_maths_equals_masks(leading, pair, orders):
    """A layer between two dropouts, packed: output and gradients are those of the masked product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 24), nn.Dropout(0.5)).double()
    report = approximate(model, seed=2)
    book = conversion_of(model).book
    uses = []
    for i, n in enumerate((20, 24)):
        layout = layout_of(n, *pair, orders=orders)
        book.sites[i][0].sampler.orders = orders
        entry = book.use(report.sites[i], 0, n, leading, pair, torch.device("cpu"))
        size = layout.size
        place = torch.stack([torch.randperm(layout.blocks) for _ in range(layout.orders)])
        book.table(torch.device("cpu"))[entry.use.at + 4096 * (i + 1) :][:size] = torch.cat(
            [place.view(-1), place.argsort(1).view(-1), torch.tensor([layout.kept - layout.spare])]
        )
        uses.append(entry.use._replace(at=entry.use.at + 4096 * (i + 1), **layout._asdict()))
    inside, outside = uses
    rows = rows_of(inside.layout.all_groups, leading)
    table = book.table(torch.device("cpu"))
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*leading, 20), (24, 20), (24,)))
    masks = [mask_of(use, table, rows, leading, torch.float64) for use in uses]

    values = packed.scaled(packed.pack(x, table, inside, rows), table, inside)
    values = packed.scaled(packed.linear(values, w, b, table, inside, outside, rows), table, outside)
    found = packed.unpack(values, table, outside, rows, leading)
    expected = nn.functional.linear(x * masks[0], w, b) * masks[1]
    loss = torch.randn_like(expected)
    for a, e in zip(
        (found, *torch.autograd.grad((found * loss).sum(), (x, w, b))),
        (expected, *torch.autograd.grad((expected * loss).sum(), (x, w, b))),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed.mask(x, table, inside, rows), x * masks[0])
    restore(model)


@pytest.mark.parametrize(
    "options", [{}, {"group_rows": 64}, {"orders": 2}, {"shuffle": False}, {"interleave": False}]
)
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("leading", [(128,), (512,), (20,), (35, 20), (4, 8, 20)])
def test_a_batch_has_as_many_orders_as_in_eager_mode(leading, rate, options):
    """Narrow layers have as many as wide ones, so that a product between them serves the patterns of both."""
    model = nn.Sequential(nn.Linear(4, 2048), nn.Dropout(rate), nn.Linear(2048, 96), nn.Dropout(rate))
    report = approximate(model, seed=0, concentration=float("inf"), **options)
    resample(model)
    book, sampler = conversion_of(model).book, report.sites[0].sampler
    assert book.pair(report.sites[0]) == (sampler.dp, sampler.keep)
    expected = sampler.pattern(2048, leading_shape=leading)
    for site, n in zip(report.sites, (2048, 96), strict=True):
        layout = book.use(site, 0, n, leading, book.pair(site), torch.device("cpu")).layout
        assert (layout.orders, layout.all_groups) == (expected.n_orders, expected.n_groups)
    if leading == (128,) and not options:
        assert expected.n_orders == {0.3: 3, 0.5: 8, 0.7: 10}[rate]
    restore(model)


@pytest.mark.parametrize("groups", [2, 3, 6, 16])
@pytest.mark.parametrize("leading", [(35, 20), (20, 35), (5, 32), (4, 4)])
def test_a_sample_meets_several_groups(groups, leading):
    """In ``[T, B, n]`` as well as in ``[B, T, n]``: steps of a sample differ in what they keep."""
    rows = rows_of(groups, leading)
    assert isinstance(rows, Rows)
    from approxdrop_lightning.graph.layout import group_of_row

    group = group_of_row(leading, rows)
    fewest = min(len(set(line.tolist())) for line in (*group, *group.t()))
    assert fewest >= min(groups, 4, *leading) - 1 and fewest > 1


def test_steps_of_another_pair_or_other_tables_share_no_cuda_graph():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.7), nn.Linear(64, 2))
    approximate(model, seed=0)
    book = conversion_of(model).book
    keys = {}
    for _ in range(60):
        resample(model)
        keys.setdefault(book.pair(book.sites[0][0]), set()).add(replay_key(model))
    assert len(keys) > 1  # several pairs were drawn
    for pair, found in keys.items():
        assert all(key[-1][0] == (pair,) for key in found)
    before = replay_key(model)
    book._too_small.add(torch.device("cpu"))  # as a use does for which there is no room
    kept_alive = book.tables[torch.device("cpu")]
    book.table(torch.device("cpu"))
    assert replay_key(model) != before
    del kept_alive
    restore(model)
