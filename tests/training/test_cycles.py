"""The cyclic learning rate of FissionFusion's generation, and what it goes on from."""

import numpy as np
import pytest

from medmerge_jax.training.schedules import minima, triangular_rates


def test_the_rate_of_every_iteration_of_two_cycles_is_that_of_the_table():
    rates = triangular_rates(9, 2, cycle=4, highest=1.0, lowest=0.0)
    # Epoch e, from 1, and iteration i: t = (e mod 4 + i / 2) / 4, and the rate |1 − 2t|.
    table = {
        1: (0.5, 0.25),  # t = 2/8, 3/8
        2: (0.0, 0.25),  # t = 4/8, 5/8
        3: (0.5, 0.75),  # t = 6/8, 7/8
        4: (1.0, 0.75),  # t = 0, 1/8
        5: (0.5, 0.25),
        6: (0.0, 0.25),
        7: (0.5, 0.75),
        8: (1.0, 0.75),
        9: (0.5, 0.25),
    }
    assert rates.dtype == np.float32
    assert rates.reshape(9, 2).tolist() == [list(row) for row in table.values()]


def test_the_published_rates_lie_between_the_published_limits():
    rates = triangular_rates(17, 23, cycle=4, highest=1e-5, lowest=1e-8).astype(np.float64)
    t = np.array([(e % 4 + i / 23) / 4 for e in range(1, 18) for i in range(23)])
    by_hand = np.where(
        t < 0.5, 1e-5 * (1 - 2 * t) + 1e-8 * 2 * t, 1e-5 * (2 * t - 1) + 1e-8 * (2 - 2 * t)
    )
    np.testing.assert_allclose(rates, by_hand, rtol=1e-6)
    assert rates.min() == pytest.approx(1e-8) and rates.max() == pytest.approx(1e-5)


@pytest.mark.parametrize("cycle", [2, 4, 6])
def test_the_minima_are_the_epochs_before_the_lowest_rate(cycle):
    rates = triangular_rates(20, 5, cycle=cycle, highest=1.0, lowest=0.0).reshape(20, 5)
    lowest = [epoch for epoch in range(1, 20) if rates[epoch, 0] == 0]
    assert list(minima(20, cycle))[: len(lowest)] == lowest
    assert set(minima(20, cycle)) - set(lowest) <= {20}
