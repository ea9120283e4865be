"""Classify tokens by hand-made loss trajectories."""

import numpy as np
import pytest

from rho1_jax.analysis.dynamics import CLASSES, class_means, classify, shares

N = 10
STEPS_OF_N = np.arange(N)


def of(*trajectories):
    return classify(np.stack(trajectories, axis=1))


def names(dynamics):
    return [CLASSES[number] for number in dynamics.class_T]


HIGH, LOW = np.full(N, 6.0), np.full(N, 0.5)
FALLING, RISING = np.linspace(6, 1, N), np.linspace(1, 6, N)


def test_all_four_classes():
    assert names(of(HIGH, RISING, FALLING, LOW)) == ["H->H", "L->H", "H->L", "L->L"]


def test_noise_around_a_level_is_not_a_change():
    noise = 0.2 * (-1.0) ** STEPS_OF_N
    assert names(of(HIGH + noise, LOW + noise, FALLING, RISING)) == ["H->H", "L->L", "H->L", "L->H"]


def test_change_is_slope_times_checkpoints_and_counts_above_a_fifth():
    for change, expected in ((-0.21, "H->L"), (-0.19, "L->L"), (0.19, "L->L"), (0.21, "L->H")):
        line = 1.0 + change / N * STEPS_OF_N
        dynamics = of(line, HIGH)
        assert dynamics.change_T[0] == pytest.approx(change)
        assert names(dynamics)[0] == expected


def test_line_is_fitted_by_least_squares():
    """A bump in the middle does not change the slope. One at the end changes it by 6 / (n (n + 1)) of its height."""
    bump = LOW.copy()
    bump[[4, 5]] += 3.0
    assert of(bump, HIGH).change_T[0] == pytest.approx(0, abs=1e-9)
    end = LOW.copy()
    end[-1] += 1.0
    assert of(end, HIGH).change_T[0] == pytest.approx(6 / (N * (N + 1)) * N)


def test_last_loss_decides_between_high_and_low():
    dips = np.full(N, 2.1)
    dips[-1] = 1.8
    assert names(of(dips, np.full(N, 2.0))) == ["L->L", "H->H"]


def test_last_loss_equal_to_the_mean_is_low():
    assert names(of(np.full(N, 2.0), np.full(N, 2.0))) == ["L->L", "L->L"]


def test_class_means_and_shares():
    losses = np.stack([HIGH, HIGH + 1, LOW, FALLING], axis=1)
    dynamics = classify(losses)
    assert shares(dynamics.class_T) == {"H->H": 0.5, "L->H": 0.0, "H->L": 0.25, "L->L": 0.25}
    means = class_means(losses, dynamics.class_T)
    assert means["H->H"] == [6.5] * N and means["L->H"] is None
    np.testing.assert_allclose(means["H->L"], FALLING)


def test_one_checkpoint_is_not_enough():
    with pytest.raises(ValueError, match="at least two checkpoints, not 1"):
        classify(np.ones((1, 3)))
