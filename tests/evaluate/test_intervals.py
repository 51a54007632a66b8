import math

import numpy as np
import pytest
from scipy import special

from pdrunet_jax.evaluate.intervals import interval


def test_intervals_repeat():
    values = np.random.default_rng(0).uniform(size=20)
    patients = [str(number // 2) for number in range(20)]
    assert interval(values, patients, seed=3) == interval(values, patients, seed=3)
    assert interval(values, patients, seed=3) != interval(values, patients, seed=4)


def test_images_of_one_patient_do_not_count_as_independent():
    """With every image duplicated, the interval keeps its width if patients are known and shrinks if not."""
    values = np.random.default_rng(0).uniform(0.5, 1, size=30)
    twice, patients = np.repeat(values, 2), [str(number) for number in np.repeat(np.arange(30), 2)]
    once = np.diff(interval(values, [str(number) for number in range(30)])).item()
    clustered = np.diff(interval(twice, patients)).item()
    naive = np.diff(interval(twice, [str(number) for number in range(60)])).item()
    assert clustered == pytest.approx(once, rel=0.01)
    assert naive < 0.8 * clustered


@pytest.mark.parametrize("patients", [6, 15])
def test_intervals_cover_the_true_mean_for_skewed_scores_and_patients_of_unequal_size(patients):
    """benchmarks/coverage.py is the full version."""
    truth, hits, trials = 0.9029, 0, 500
    for trial in range(trials):
        generator = np.random.default_rng([patients, trial])
        member = np.repeat(np.arange(patients), generator.integers(1, 7, size=patients))
        logits = 2.6 + 0.8 * generator.normal(size=patients)[member] + 0.6 * generator.normal(size=len(member))
        low, high = interval(special.expit(logits), member.astype(str).tolist(), trial)
        hits += low <= truth <= high
    assert 0.92 <= hits / trials <= 0.98


def test_an_interval_scales_and_shifts_with_its_values():
    generator = np.random.default_rng(1)
    values, patients = generator.uniform(size=20), [str(number // 3) for number in range(20)]
    low, high = interval(values, patients)
    assert interval(5 - 2 * values, patients) == pytest.approx((5 - 2 * high, 5 - 2 * low), abs=0.05)
    assert interval(3 * values + 1, patients) == pytest.approx((3 * low + 1, 3 * high + 1), rel=1e-9)


def test_equal_values_have_an_interval_of_one_point():
    low, high = interval(np.full(7, 0.9), list("aabbccd"))
    assert low == high == pytest.approx(0.9, rel=1e-15)


def test_bounds_are_kept_and_one_odd_patient_leaves_an_end():
    values, patients = np.array([0.2, *[1.0] * 9]), [str(number) for number in range(10)]
    low, high = interval(values, patients, bounds=(0.0, 1.0))
    assert 0 <= low < 0.92 < high <= 1
    free = interval(-values, patients)
    assert all(math.isfinite(bound) for bound in free)
    assert free[1] - free[0] < 2


def test_one_patient_has_no_interval():
    assert all(math.isnan(bound) for bound in interval(np.array([0.1, 0.2]), ["a", "a"]))


def test_memory_for_many_patients_is_bounded_by_parts_that_change_nothing_but_the_draws():
    generator = np.random.default_rng(0)
    values = generator.uniform(size=6000)
    low, high = interval(values, [str(number) for number in range(6000)])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(6000), rel=0.1)
