"""Batches are a function of their draws; every epoch has every picture, however few there are."""
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pixart.bins import base_sizes, bin_table, nearest_bin
from pixart.training.buckets import bins_at, bucket_sizes, nearest_bins
from pixart.training.data.order import Plan
from pixart.training.draws import Draws


def draws(batch: int, seed: int = 0, stage: int = 0) -> Draws:
    return Draws(seed, stage, batch, range(4))


def counted(plan: Plan, first: int) -> Counter:
    """How much each entry weighs in an epoch that begins with the batch `first`."""
    total: Counter = Counter()
    for number in range(first, first + plan.batches):
        rows = plan.rows(draws(number))
        for pick, weight in zip(rows.picks, rows.weights):
            total[pick] += weight
    return total


@pytest.mark.parametrize("bins", [[0, 1, 2, 3, 4], [0] * 9 + [1], [0, 0, 0], [1] * 8])
def test_every_epoch_has_every_picture_once(bins):
    """The reference's sampler yields nothing at all for five pictures in five bins."""
    plan = Plan(bins, 4)
    for epoch in range(3):
        total = counted(plan, epoch * plan.batches)
        assert sorted(total) == list(range(len(bins))) and all(abs(weight - 1) < 1e-9 for weight in total.values())


def test_a_batch_is_of_one_bin_and_full():
    plan = Plan([0] * 7 + [1] * 3 + [2] * 11, 4)
    bins = np.array(plan.bins)
    for number in range(plan.batches * 2):
        rows = plan.rows(draws(number))
        assert len(rows.picks) == len(rows.weights) == 4 and len(set(bins[rows.picks])) == 1


def test_a_batch_depends_on_its_draws_alone():
    bins = np.random.default_rng(0).integers(0, 5, 50).tolist()
    forwards, fresh = Plan(bins, 4), Plan(bins, 4)
    numbers = list(range(3 * forwards.batches))
    in_order = [forwards.rows(draws(number)) for number in numbers]
    assert [fresh.rows(draws(number)) for number in reversed(numbers)] == in_order[::-1]
    epochs = [in_order[start : start + forwards.batches] for start in range(0, len(numbers), forwards.batches)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [forwards.rows(draws(number, seed=1)) for number in numbers] != in_order
    assert [forwards.rows(draws(number, stage=1)) for number in numbers] != in_order


def test_bins_are_not_taken_one_after_another():
    plan = Plan([0] * 40 + [1] * 40, 4)
    order = [plan.bins[plan.rows(draws(number)).picks[0]] for number in range(plan.batches)]
    changes = sum(a != b for a, b in zip(order, order[1:]))
    assert changes > 3


@pytest.mark.parametrize("base", base_sizes())
def test_the_nearest_bin_is_the_references(base):
    rng = np.random.default_rng(base)
    heights, widths = rng.integers(64, 4000, (2, 300))
    expected = [nearest_bin(base, int(width), int(height)) for width, height in zip(widths, heights)]
    assert nearest_bins(heights, widths, bins_at(1024, base)) == [(each.height, each.width) for each in expected]


def test_a_base_size_without_bins_takes_the_variants_scaled():
    scaled = bins_at(256, 128)
    assert sorted(set(scaled.values())) == bucket_sizes(256, 128) and scaled.keys() == bin_table(256).keys()
    assert bins_at(1024, 512) == bin_table(512)
    assert bins_at(1024, 512, squares=True) == {"1.0": (512, 512)}
