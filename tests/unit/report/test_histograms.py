"""Histograms of whole numbers: bins that are drawn hold what was counted."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_ray.report.histograms import Counted, counted_plot


def counted(values: list[int]) -> Counted:
    """Count each number by itself."""
    counts = np.bincount(values)
    return Counted(np.arange(len(counts) + 1), counts, float(np.mean(values)))


def test_numbers_lie_in_the_middle_of_bins_of_one() -> None:
    part = counted([0, 2, 2, 3, 3, 3])
    assert part.within(np.array([-0.5, 0.5, 1.5, 2.5, 3.5])).tolist() == [1, 0, 2, 3]
    assert part.within(np.array([-0.5, 1.5, 3.5])).tolist() == [1, 5]


def test_wide_bins_are_spread_evenly() -> None:
    part = Counted(np.array([0, 4, 12]), np.array([8, 16]), 6.0)  # 0 to 3, and 4 to 11
    assert part.within(np.array([-0.5, 1.5, 3.5, 7.5, 11.5])).tolist() == [4, 4, 8, 8]
    assert part.within(np.array([11.5, 20.5])).tolist() == [0]


@pytest.mark.parametrize("values", [[5], [0, 1], [3] * 50 + [4] * 50, list(range(200))])
def test_nothing_is_beyond_the_axis_where_no_value_is_far_out(values: list[int]) -> None:
    plot = counted_plot("lengths", "Lengths", "Tokens.", "tokens", {"chosen": counted(values)})
    assert plot.caption == f"Tokens. n = {len(values)}."


def test_far_values_are_counted_in_the_caption() -> None:
    plot = counted_plot("lengths", "Lengths", "Tokens.", "tokens", {"chosen": counted([*range(10)] * 100 + [5000] * 2)})
    assert plot.caption == "Tokens. n = 1,002. Beyond the axis: 2."
